"""The paper's comparison: five ways to choose and heal layers, each a run of its own, on one suite.

Each method has a `PruningSession` in `folder/<method>`; its journal says how far it is, so that a
comparison that was stopped goes on where it stood. The methods carry the names of the published curves
(`data/published/qwen2.5-3b_aggregate_curves.csv`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from ildlab.distill.config import DistillConfig
from ildlab.errors import SessionError
from ildlab.evaluate.record import Evaluation
from ildlab.evaluate.results import SuiteResult
from ildlab.files import data_dir
from ildlab.model.load import LoadedModel
from ildlab.progress import Progress
from ildlab.session.config import SessionConfig
from ildlab.session.session import PruningSession
from ildlab.session.tables import canary_scores


@dataclass(frozen=True)
class Method:
    """One way to prune.

    Attributes
    ----------
    label : str
        For a figure.
    ablation : bool
        Choose layers by ablation; else by Block Influence.
    iterative : bool
        Measure again before every removal; else once, on the teacher.
    distill : bool
        Distill after every removal.
    """

    label: str
    ablation: bool
    iterative: bool
    distill: bool


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
    methods: Sequence[str] = tuple(METHODS),
    evaluate_every: int = 1,
    ablation: str = "kl",
    ablation_options: dict[str, Any] | None = None,
    **settings: Any,
) -> Generator[Progress, None, pd.DataFrame]:
    """Run the methods one after another, each from where its journal stands.

    Parameters
    ----------
    folder : path
        Of the comparison; a run folder for each method lies in it.
    teacher : LoadedModel
        Shared by all runs.
    remove : int
        Layers to remove.
    suite : str
        Whose aggregate is the curve.
    methods : sequence of str
        Keys of `METHODS`.
    evaluate_every : int
        Removals between two points of a curve (the last is always one).
    ablation : str
        Metric of the ablation methods: `"kl"`, `"nll"`, or `"task"` (the paper's: the suite itself).
    ablation_options : dict, optional
        For `measure`, such as `{"race": True, "positions": 32}`; with `"task"` also a `"suite"` other than that
        of the curve, such as a part of it.
    **settings
        Fields of `SessionConfig`: text, tokens, distill, seed, ...

    Yields
    ------
    Progress
        `partial` is the table so far.

    Returns
    -------
    DataFrame
        See `curves`.

    Raises
    ------
    SessionError
        An unknown method, or more layers to remove than there are.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise SessionError(f"Unknown method {', '.join(unknown)}. There are: {', '.join(METHODS)}.")
    depth = teacher.model.config.get_text_config().num_hidden_layers
    if not 1 <= remove < depth or evaluate_every < 1:
        raise SessionError(
            f"remove={remove} of {depth} layers, evaluate_every={evaluate_every}: give 1 to {depth - 1}."
        )
    folder, parts = Path(folder), []
    for number, name in enumerate(methods):
        method = METHODS[name]
        metric, options = (ablation, ablation_options or {}) if method.ablation else ("block_influence", {})
        if metric == "task":
            options = {"suite": suite, **options}
        skip = _rows_that_chose(ablation, ablation_options or {}, suite)
        own = folder / name
        wanted = {"metric": metric, "measure": options, "suite": suite, **settings}
        if (own / "config.json").exists():
            session = PruningSession.open(own, teacher)
            try:
                _check_same(session, wanted)
            except SessionError:
                session.close()
                raise
        else:
            session = PruningSession.create(own, teacher, **wanted)
        with session:
            for note in _advance(session, method, remove, evaluate_every, folder / "suites"):
                table = pd.concat([*parts, curve(session, name, skip)]) if len(session.path) > 1 else None
                done = number * remove + len(session.removed)
                yield Progress(done, len(methods) * remove, f"{method.label}: {note}", table)
            parts.append(curve(session, name, skip))
    return pd.concat(parts, ignore_index=True)


def _check_same(session: PruningSession, wanted: dict[str, Any]) -> None:
    """Raise SessionError where a run that is to go on was begun with other settings."""
    stored = asdict(session.config)
    fresh = {**stored, **asdict(SessionConfig(session.config.teacher, **wanted))}
    # What the caller leaves to the defaults may have been another default when the run was begun.
    fresh = {name: value if name in wanted else stored[name] for name, value in fresh.items()}
    other = [name for name in fresh if _settled(name, fresh[name]) != _settled(name, stored[name])]
    if other:
        told = "; ".join(f"{name} was {stored[name]!r}, now {fresh[name]!r}" for name in other)
        raise SessionError(
            f"The run in {session.folder} was begun with other settings ({told}): go on with those, or compare in "
            "another folder."
        )


def _settled(name: str, value: Any) -> str:
    """A setting as text: equal where two mean the same."""
    if name == "distill":
        value = value if isinstance(value, DistillConfig) else DistillConfig.from_dict(value)
        value = {**value.to_dict(), "seed": value.seed or 0}
    return json.dumps(value, sort_keys=True)


def _advance(session: PruningSession, method: Method, remove: int, every: int, cache: Path):
    """Do what a run lacks, step by step, judging by its journal alone; yields what comes next."""
    while True:
        gone = len(session.removed)
        # A distillation that was stopped part-way is no whole one: it is done again.
        since = [step.action for step in session.path if "stopped_at" not in step.result]
        since = since[len(since) - since[::-1].index("remove") :] if gone else since
        if gone and method.distill and "distill" not in since:
            yield f"distilling after removal {gone} of {remove}"
            yield from (f"distilling, {p.note}" for p in _every(session.distill_steps()))
        elif (gone % every == 0 or gone == remove) and "evaluate" not in since:
            yield f"evaluating at {gone} removed"
            work = session.evaluate_steps(speed=False, cache=cache)
            yield from (f"evaluating, {p.note}" for p in _every(work))
        elif gone >= remove:
            return
        elif not method.iterative:
            measured = [step.step for step in session.path if step.action == "measure"]
            if not measured:
                yield "measuring once"
                yield from (f"measuring, {p.note}" for p in _every(session.measure_steps()))
            else:
                ranking = session.scores_at(measured[0]).ranking
                session.remove(next(i for i in ranking if i not in session.removed))
        elif "measure" not in since:
            yield f"measuring for removal {gone + 1}"
            yield from (f"measuring, {p.note}" for p in _every(session.measure_steps()))
        else:
            session.remove()


def _every(work, seconds: float = 15.0):
    """Pass on progress now and then: a batch notebook prints a line for each."""
    last = time.perf_counter()
    for progress in work:
        if time.perf_counter() - last > seconds:
            last = time.perf_counter()
            yield progress


def _rows_that_chose(ablation: str, options: dict[str, Any], suite: str) -> int:
    """How many first rows of each of the suite's tasks layers were chosen by: n, where `"suite@n"` chose."""
    chosen = str(options.get("suite", suite))
    base, mark, rows = chosen.rpartition("@")
    return int(rows) if ablation == "task" and mark and base == suite.partition("@")[0] else 0


def curve(session: PruningSession, name: str, skip: int = 0) -> pd.DataFrame:
    """One row for each evaluation of a run.

    Parameters
    ----------
    session : PruningSession
    name : str
        Of the method.
    skip : int
        Rows at the beginning of each task that layers were chosen by.

    Returns
    -------
    DataFrame
        `method`, `layers_removed`, `share_removed`, `layer_id` (the last removed), `aggregate` with
        `low` and `high`, `aggregate_rest` (of the rows after the first `skip`, by which nothing was chosen; NaN
        where there are none), `corrected`, `quality_loss` with `loss_low` and `loss_high`, `perplexity`,
        `kl`, `parameters`, and a column for each task and each canary (`canary_<name>`).
    """
    rows, removed = [], []
    for step in session.path:
        if step.action == "remove":
            removed.append(step.args["layer_id"])
        elif step.action == "evaluate":
            found = Evaluation.from_dict(step.result["evaluation"])
            if found.suite is None:
                continue
            interval, loss = found.suite.interval(), found.quality_loss_estimate()
            rows.append(
                {
                    "method": name,
                    "layers_removed": len(removed),
                    "share_removed": len(removed) / found.teacher_layers,
                    "layer_id": removed[-1] if removed else None,
                    "aggregate": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                    "aggregate_rest": _rest(found.suite, skip),
                    "corrected": found.suite.aggregate_corrected,
                    "quality_loss": loss.value,
                    "loss_low": loss.low,
                    "loss_high": loss.high,
                    "perplexity": found.perplexity,
                    "kl": found.kl,
                    "parameters": found.parameters,
                    **{task.name: task.score for task in found.suite.tasks.values()},
                    **canary_scores(found),
                }
            )
    return pd.DataFrame(rows)


def _rest(found: SuiteResult, skip: int) -> float:
    """Aggregate of the rows after the first `skip` of each task."""
    if not 0 < skip < min(task.n for task in found.tasks.values()):
        return math.nan
    tasks = {
        name: replace(task, values=task.values[skip:], weights=task.weights and task.weights[skip:])
        for name, task in found.tasks.items()
    }
    return replace(found, tasks=tasks).aggregate


def task_columns(table: pd.DataFrame) -> list[str]:
    """Columns of `curve` that are scores of the suite's tasks."""
    names = list(table.columns)
    return [name for name in names[names.index("parameters") + 1 :] if not name.startswith("canary_")]


def published_curves() -> pd.DataFrame:
    """Curves of Qwen2.5-3B read off the authors' figure: method, layers_removed, aggregate, share_removed."""
    table = pd.read_csv(data_dir() / "published" / "qwen2.5-3b_aggregate_curves.csv")
    return table.assign(share_removed=table["layers_removed"] / 36)
