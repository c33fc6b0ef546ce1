"""A run's journal as tables: one row an iteration, task by task, and the losses of every distillation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import pandas as pd

from ildlab.evaluate.record import Evaluation
from ildlab.evaluate.results import SuiteResult, compare
from ildlab.session.journal import Step
from ildlab.session.run import Run

COLUMNS = (
    "n_removed layer_id score layers parameters perplexity_pruned kl_pruned aggregate_pruned perplexity kl "
    "perplexity_undistilled kl_undistilled agreement aggregate loss seconds"
)


def history_table(run: Run, step: int | None = None) -> pd.DataFrame:
    """One row an iteration, the teacher first, up to a step (by default today's student).

    Columns: `n_removed`, `layer_id`, `score`, `layers`, `parameters`; `perplexity`, `kl` (nats per token), `agreement`
    and `aggregate` after distillation; those with `_pruned` right after the removal, those with `_undistilled` of the
    teacher without the same layers, never distilled; `loss` (the quality loss that `max_loss` limits), `seconds`, and
    a `canary_<name>` for each canary of the iteration's last evaluation.
    """
    return table_of(run.path if step is None else run.journal.path_to(step), run.config.suite)


def table_of(path: list[Step], suite: str | None) -> pd.DataFrame:
    """`history_table` of the steps from a run's beginning on, whose setting `suite` was this; no model is needed."""
    rows: list[dict] = [{"n_removed": 0, "layers": len(path[0].layer_ids), "seconds": 0.0}]
    measuring = 0.0  # counts for the removal that follows it
    for record, stage in staged(path):
        if record.action == "measure":
            measuring += record.seconds
            continue
        if record.action == "remove":
            row = {"n_removed": rows[-1]["n_removed"] + 1, "layers": len(record.layer_ids), "seconds": measuring}
            rows.append(row | {"layer_id": record.args["layer_id"], "score": record.args.get("score")})
            measuring = 0.0
        rows[-1]["seconds"] += record.seconds
        if record.action == "evaluate":
            found, after = record.result["evaluation"], "_pruned" if stage == "pruned" else ""
            told = {f"{name}{after}": found[name] for name in ("perplexity", "kl")}
            told[f"aggregate{after}"] = record.result.get("aggregate")
            if record.args["suite"] or not suite:  # a loss by the text alone is of another kind
                told["loss"] = record.result["loss"]
            told |= {} if after else {"agreement": found["agreement"]}
            bare = record.result.get("undistilled") or {}
            told |= {f"{name}_undistilled": bare[name] for name in ("perplexity", "kl") if bare}
            rows[-1] |= told | {"parameters": found["parameters"]} | canary_scores(Evaluation.from_dict(found))
    canaries = dict.fromkeys(name for row in rows for name in row if name.startswith("canary_"))
    return pd.DataFrame(rows, columns=[*COLUMNS.split(), *canaries])


HEADS = {
    "n_removed": "layers removed",
    "layer_id": "the last one",
    "score": "its score",
    "layers": "layers left",
    "parameters": "parameters",
    "perplexity_pruned": "perplexity, just removed",
    "kl_pruned": "KL, just removed",
    "aggregate_pruned": "aggregate, just removed",
    "perplexity": "perplexity",
    "kl": "KL (nats/token)",
    "perplexity_undistilled": "perplexity, never distilled",
    "agreement": "same top token",
    "aggregate": "aggregate",
    "loss": "quality lost",
    "seconds": "time",
}


def history_html(run: Run) -> str:
    """`history_table` for people: names and units in words, what was done so far, and the teacher to compare with."""
    table = history_table(run).drop(columns=["kl_undistilled"])
    if len(table) == 1 and table["perplexity"].isna().all():
        return "<div>Nothing was removed yet: each removal adds a line here, with what it cost.</div>"
    judged = [step.result["evaluation"] for step in run.path if step.action == "evaluate"]
    if judged:  # every evaluation scores the teacher too
        for name, of in {"perplexity": "teacher_perplexity", "parameters": "teacher_parameters"}.items():
            table[name] = table[name].astype(float)
            table.loc[0, name] = judged[-1][of]
        table.loc[0, "kl"] = 0.0
    table["n_removed"] = ["none: the teacher", *(f"{n:.0f}" for n in table["n_removed"][1:])]
    table.loc[0, "seconds"] = table["seconds"][0] or math.nan
    share, count = "{:.1%}".format, "{:.0f}".format
    how = {"parameters": lambda v: f"{v / 1e6:,.1f} M", "agreement": share, "loss": share, "n_removed": str}
    how |= {"seconds": "{:.0f} s".format, "layers": count, "layer_id": count}
    told = {
        HEADS.get(name, name.replace("_", " ")): [
            "" if pd.isna(v) else how.get(name, "{:.4g}".format)(v) for v in values
        ]
        for name, values in table.dropna(axis=1, how="all").items()
    }
    return f'<div style="overflow-x:auto">{pd.DataFrame(told).to_html(index=False, border=0)}</div>'


def task_table(run: Run) -> pd.DataFrame:
    """Scores by task of suite and canaries, with the changes: teacher | pruned by the last removal | today's student.

    A model that was not scored has no column.
    """
    parts = {}
    for kind in ("suite", "canaries"):
        scored = scored_models(run, kind)
        if len(scored) > 1:
            parts[kind] = compare(**scored)
    return pd.concat(parts, names=["of", "task"]) if parts else pd.DataFrame()


def scored_models(run: Run, kind: str = "suite") -> dict[str, SuiteResult]:
    """Results of suite or canaries: of the teacher, the student that the last removal left, and today's."""
    models: dict[str, Evaluation] = {}
    for step, stage in staged(run.path):
        if step.action == "remove":
            models = {name: found for name, found in models.items() if name == "teacher"}
        elif step.action == "evaluate":
            models[stage] = Evaluation.from_dict(step.result["evaluation"])
    last = next(reversed(models.values()), None)
    # Every evaluation has scored the teacher too.
    scored = {"teacher": getattr(last, f"teacher_{kind}", None)} | {n: getattr(e, kind) for n, e in models.items()}
    return {name: result for name, result in scored.items() if result is not None}


def staged(path: Iterable[Step]) -> Iterator[tuple[Step, str]]:
    """Steps, each with what the student is after it: `"teacher"`, `"pruned"` (not distilled since), or `"student"`."""
    stage = "teacher"
    for step in path:
        stage = {"remove": "pruned", "distill": "student"}.get(step.action, stage)
        yield step, stage


def canary_scores(found: Evaluation) -> dict[str, float]:
    """Scores of the canaries, as columns `canary_<name>`; none where they were not scored."""
    tasks = found.canaries.tasks if found.canaries is not None else {}
    return {f"canary_{name}": task.score for name, task in tasks.items()}


def losses_of(run: Run, step: Step) -> pd.DataFrame:
    """Losses of one distillation, a row a record of `metrics/NNN.jsonl`; empty where it left none."""
    file = run.journal.losses_of(step.step)
    return pd.read_json(file, lines=True) if file.is_file() else pd.DataFrame()


def losses_table(run: Run) -> pd.DataFrame:
    """Losses of every distillation on the way to today's student, end to end.

    Columns: those of `metrics/NNN.jsonl`, `iteration` (layers removed by then) and a running `step`.
    """
    parts, removed = [], 0
    for step in run.path:
        removed += step.action == "remove"
        if step.action == "distill" and len(found := losses_of(run, step)):
            parts.append(found.assign(iteration=removed))
    if not parts:
        return pd.DataFrame({"iteration": [], "step": [], "kl": []})
    table = pd.concat(parts, ignore_index=True)
    return table.assign(step=range(1, len(table) + 1))
