"""The paper's comparison: five ways to choose and heal layers, each a run of its own, on one suite.

Each method's journal says how far it is, so that a comparison that was stopped goes on where it stood. The methods
carry the names of the published curves (`data/published/qwen2.5-3b_aggregate_curves.csv`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ildlab.distill.config import DistillConfig
from ildlab.errors import SessionError
from ildlab.evaluate.record import Evaluation
from ildlab.files import data_dir
from ildlab.model.load import LoadedModel
from ildlab.progress import Progress, Work, relabel
from ildlab.session.run import Run
from ildlab.session.session import PruningSession
from ildlab.session.tables import canary_scores


@dataclass(frozen=True)
class Method:
    """One way to prune; `label` is for a figure."""

    label: str
    ablation: bool  # choose layers by ablation; else by Block Influence
    iterative: bool  # measure again before every removal; else once, on the teacher
    distill: bool  # after every removal, or after so many:
    distill_every: int = 1
    measure_every: int = 1  # removals by one measurement, where it is iterative
    race: bool | None = None  # where it is not as `ablation_options` have it


METHODS = {
    "shortgpt": Method("ShortGPT (one pass of Block Influence)", False, False, False),
    "iterative_block_influence": Method("iterative Block Influence", False, True, False),
    "iterative_layerwise_pruning": Method("iterative layer-wise pruning", True, True, False),
    "iterative_block_influence_distillation": Method("iterative Block Influence + distillation", False, True, True),
    "iterative_layerwise_distillation": Method("iterative layer-wise distillation", True, True, True),
}


def compare_steps(
    folder: str | Path,
    teacher: LoadedModel,
    *,
    remove: int = 8,
    suite: str = "mini7",
    methods: Sequence[str] | Mapping[str, Method] = tuple(METHODS),
    evaluate_every: int = 1,
    ablation: str = "kl",
    ablation_options: dict[str, Any] | None = None,
    share_tokens: bool = False,
    **settings: Any,
) -> Work[pd.DataFrame]:
    """Run the methods one after another, each from where its journal stands.

    Parameters
    ----------
    folder : path
        A run folder for each method lies in it.
    remove, evaluate_every : int
        Layers to remove, and removals between two points of a curve (the last is always one).
    suite : str
        Whose aggregate is the curve.
    methods : sequence of str, or mapping of str to Method
        Keys of `METHODS`, or methods of your own by the names of their folders.
    ablation, ablation_options : str, dict
        Metric of the ablation methods, `"kl"`, `"nll"`, or `"task"` (the paper's: the suite itself), and arguments of
        `measure`, such as `{"race": True}`; with `"task"` also another `"suite"` than the curve's, such as a part of it.
    share_tokens : bool
        Tokens to distill on (`tokens` and `local_tokens` of `distill`) are a whole run's: each distillation takes the share of
        the removals since the one before, so that methods that distill more or less often see as many in all.
    **settings
        Fields of `SessionConfig`: text, tokens, distill, seed, ...

    Returns
    -------
    DataFrame
        The methods' curves, as of `curve`; so far as it goes, it is the `partial` of each `Progress`.
    """
    if not isinstance(methods, Mapping):
        unknown = [name for name in methods if name not in METHODS]
        if unknown:
            raise SessionError(f"Unknown method {', '.join(unknown)}. There are: {', '.join(METHODS)}.")
        methods = {name: METHODS[name] for name in methods}
    depth = teacher.model.config.get_text_config().num_hidden_layers
    if not 1 <= remove < depth or evaluate_every < 1:
        raise SessionError(
            f"remove={remove} of {depth} layers, evaluate_every={evaluate_every}: give 1 to {depth - 1}."
        )
    folder, parts, table = Path(folder).expanduser().absolute(), [], None
    skip = _rows_that_chose(ablation, ablation_options or {}, suite)
    for number, (name, method) in enumerate(methods.items()):
        metric, options = (ablation, ablation_options or {}) if method.ablation else ("block_influence", {})
        options = options if method.race is None else {**options, "race": method.race}
        if metric == "task":
            options = {"suite": suite, **options}
        wanted = {"metric": metric, "measure": options, "suite": suite, **settings}
        with PruningSession.resume(folder / name, teacher, **wanted) as session:
            known = 0
            for progress in _advance(session, method, remove, evaluate_every, share_tokens, folder / "suites"):
                if known < len(session.steps):  # a curve costs a bootstrap: drawn where a step is new
                    known, table = len(session.steps), pd.concat([*parts, curve(session, name, skip)])
                done = number * remove + len(session.removed)
                yield Progress(done, len(methods) * remove, f"{method.label}: {progress.note}", table)
            parts.append(curve(session, name, skip))
    return pd.concat(parts, ignore_index=True)


def _advance(session: PruningSession, method: Method, remove: int, every: int, share: bool, cache: Path) -> Work[None]:
    """Do what a run lacks, step by step, judging by its journal alone."""
    while True:
        gone = len(session.removed)
        # A distillation that was stopped part-way is no whole one: it is done again.
        done = [step.action for step in session.path if step.whole]
        since = done[len(done) - done[::-1].index("remove") :] if gone else done
        healed = gone % method.distill_every or method.distill_every  # removals that this distillation is for
        if gone and method.distill and (healed == method.distill_every or gone == remove) and "distill" not in since:
            tokens = _share_of(session, healed / remove) if share else {}
            work = session.distill_steps(**tokens)
            yield from relabel(work, f"distilling after removal {gone} of {remove}, ")
        elif (gone % every == 0 or gone == remove) and "evaluate" not in since:
            work = session.evaluate_steps(speed=False, cache=cache)
            yield from relabel(work, f"evaluating at {gone} removed, ")
        elif gone >= remove:
            return
        elif "measure" not in done or (
            method.iterative and gone % method.measure_every == 0 and "measure" not in since
        ):
            yield from relabel(session.measure_steps(), f"measuring for removal {gone + 1}, ")
        else:  # by scores of an earlier student where it is not measured anew: of the whole teacher, in a single pass
            session.remove(scores=session.latest_scores)


def _share_of(session: PruningSession, part: float) -> dict[str, int]:
    """Tokens of one of a run's distillations, where those of the config are of all."""
    config, one_pass = DistillConfig.from_dict(session.config.distill), session.config.train_tokens
    asked = {"tokens": config.tokens, "local_tokens": config.local_tokens}
    return {name: round(part * (one_pass if value is None else value)) for name, value in asked.items()}


def _rows_that_chose(ablation: str, options: dict[str, Any], suite: str) -> int:
    """How many first rows of each of the suite's tasks layers were chosen by: n, where `"suite@n"` chose."""
    chosen = str(options.get("suite", suite))
    base, mark, rows = chosen.rpartition("@")
    return int(rows) if ablation == "task" and mark and base == suite.partition("@")[0] else 0


def curve(run: Run, name: str, skip: int = 0) -> pd.DataFrame:
    """One row for each evaluation of a run by a suite; layers were chosen by the first `skip` rows of each task.

    Returns
    -------
    DataFrame
        `method` (the name), `layers_removed`, `share_removed`, `aggregate` with `low` and `high`, `aggregate_rest` (of
        the rows by which nothing was chosen; NaN where there are none), `corrected`, `quality_loss` with `loss_low` and
        `loss_high`, `perplexity`, `kl`, what it had cost by then (`measure_seconds`, `layer_passes` of a batch, NaN where a
        metric does not count them, `distill_seconds`, `distill_tokens`), `parameters`, and a column for each task and each canary (`canary_<name>`).
    """
    rows, removed = [], 0
    spent = {"measure_seconds": 0.0, "layer_passes": 0, "distill_seconds": 0.0, "distill_tokens": 0}
    for step in run.path:
        removed += step.action == "remove"
        if step.action in ("measure", "distill"):
            spent[f"{step.action}_seconds"] += step.seconds
        if step.action == "measure":
            spent["layer_passes"] += step.result["scores"]["details"].get("layer_passes", math.nan)
        spent["distill_tokens"] += step.result.get("tokens", 0) if step.action == "distill" else 0
        if step.action != "evaluate" or step.args["suite"] is None:
            continue
        found = Evaluation.from_dict(step.result["evaluation"])
        interval = found.suite.interval()
        row = {"method": name, "layers_removed": removed, "share_removed": removed / found.teacher_layers}
        row |= {"aggregate": interval.value, "low": interval.low, "high": interval.high}
        some_left = 0 < skip < min(task.n for task in found.suite.tasks.values())
        rest = found.suite.after(skip).aggregate if some_left else math.nan
        row |= {"aggregate_rest": rest, "corrected": found.suite.aggregate_corrected}
        lost = found.quality_loss_estimate()
        row |= {"quality_loss": lost.value, "loss_low": lost.low, "loss_high": lost.high}
        row |= {"perplexity": found.perplexity, "kl": found.kl, **spent}
        row |= {"parameters": found.parameters} | {task.name: task.score for task in found.suite.tasks.values()}
        rows.append(row | canary_scores(found))
    return pd.DataFrame(rows)


def task_columns(table: pd.DataFrame) -> list[str]:
    """Columns of `curve` that are scores of the suite's tasks."""
    names = list(table.columns)
    return [name for name in names[names.index("parameters") + 1 :] if not name.startswith("canary_")]


def published_curves() -> pd.DataFrame:
    """Curves of Qwen2.5-3B read off the authors' figure: method, layers_removed, aggregate, share_removed."""
    table = pd.read_csv(data_dir() / "published" / "qwen2.5-3b_aggregate_curves.csv")
    return table.assign(share_removed=table["layers_removed"] / 36)
