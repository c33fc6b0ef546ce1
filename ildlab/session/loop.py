"""The loop of the method: measure, remove, distill, evaluate, until a stop rule holds.

What comes next is told from the journal alone: a run that was killed, or steered by hand, finds its place.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd

from ildlab.distill.config import DistillConfig
from ildlab.distill.scope import resolve_scope
from ildlab.errors import DistillError, SessionError
from ildlab.evaluate.record import Evaluation
from ildlab.evaluate.suites import load_suite
from ildlab.importance.config import ABLATION
from ildlab.progress import Progress, Work, relabel
from ildlab.session import actions
from ildlab.session.journal import CHANGES_STUDENT, Step
from ildlab.session.places import in_suite, whole
from ildlab.session.run import Run
from ildlab.session.tables import history_table
from ildlab.typed import read_fields, read_values


@dataclass(frozen=True)
class RunSettings:
    """When the loop stops, and what it does on the way: the arguments of `run_steps`, as they are journaled."""

    target_layers: int | None = None
    max_loss: float | None = None
    distill: bool = True
    suite: str | None = None
    final: dict[str, Any] | None = None
    suite_each: bool = True
    at_once: int = 1
    shortlist: int | None = None

    def __post_init__(self):
        read_fields(self, SessionError)
        if self.at_once < 1:
            raise SessionError(f"at_once={self.at_once}: at least one layer is removed on each measurement.")
        if self.shortlist is not None and self.shortlist < 2:
            raise SessionError(f"shortlist={self.shortlist}: of at least two layers one is the less important.")
        final = self.final and read_values(DistillConfig, self.final, DistillError)
        object.__setattr__(self, "final", final or None)
        object.__setattr__(self, "suite", in_suite(self.suite, whole))
        if self.max_loss is not None and not 0 < self.max_loss < 1:
            raise SessionError(f"max_loss={self.max_loss}: it is a share of the teacher's quality, between 0 and 1.")
        if self.target_layers is None and (self.final or not self.suite_each):
            wanted = "A final distillation follows" if self.final else "Without suite_each, tasks are scored"
            raise SessionError(f"{wanted} when target_layers is reached: give it.")
        if self.max_loss is not None and not self.suite_each:
            raise SessionError(
                "max_loss decides after each removal, so tasks are scored there: leave suite_each True."
            )


def run_steps(
    run: Run,
    target_layers: int | None = None,
    max_loss: float | None = None,
    *,
    distill: bool = True,
    suite: str | None = None,
    final: dict[str, Any] | None = None,
    suite_each: bool = True,
    at_once: int = 1,
    shortlist: int | None = None,
) -> Work[pd.DataFrame]:
    """The whole method, until one of the paper's stop rules holds; with neither given, it goes on as it was begun.

    Parameters
    ----------
    target_layers : int, optional
        Stop when the student has this many layers.
    max_loss : float, optional
        Stop when the quality loss (`Evaluation.loss`) passes this share, between 0 and 1: the step that did is undone,
        and the last good student kept.
    distill : bool
        False for pruning alone, the paper's baseline.
    suite : str, optional
        By default the run's.
    final : dict, optional
        Fields of `DistillConfig` for one more distillation once `target_layers` is reached, with the scope
        counted from all the layers that were removed, such as `{"tokens": 20_480, "local_tokens": 200_000}`.
    suite_each : bool
        Score suite, canaries and speed at the end of each iteration; False: only when `target_layers` is reached.
    at_once : int
        Layers that go on one measurement, the least important first. Less is measured, and a layer's neighbours are not
        seen to matter more once it is gone.
    shortlist : int, optional
        By the metrics nll and kl: after the first measurement, score only as many layers as this, the least important when
        last scored, and the neighbours of every gap. Other metrics score every layer.

    Returns `history()`.
    """
    settings, resuming = _checked(
        run, RunSettings(target_layers, max_loss, distill, suite, final, suite_each, at_once, shortlist)
    )
    if resuming and _stopped_by_loss(run):
        return history_table(run)
    goal = settings.target_layers or 1
    if not resuming:
        run.append("run", args=asdict(settings))
    suite = settings.suite or run.config.suite
    if len(run.student) == len(run.teacher) and actions.teacher_evaluation(run, suite) is None:
        yield from relabel(actions.evaluate_steps(run, settings.suite), "evaluate the teacher", (0, 1))
    total = len(run.student) - goal
    while True:
        left = len(run.student)
        place = (total - (left - goal), total)
        phase = next_phase(run.path, settings.distill)
        # Judged from the journal, so that a run that was killed right after an evaluation gets its verdict too.
        if phase == "measure" and _undo_if_over(run, settings):
            yield Progress(*place, f"quality loss is over {settings.max_loss}: step undone")
            break
        if phase == "measure" and left <= goal:
            if not settings.final or _finally_distilled(run, settings.final):
                break
            phase = "final distillation"
        yield from _phase_steps(run, settings, phase, f"{left} layers: ", place)
    return history_table(run)


def _phase_steps(run: Run, settings: RunSettings, phase: str, label: str, place: tuple[int, int]) -> Work[None]:
    """Do one phase of an iteration."""
    if phase == "remove":
        scores, most = run.scores, min(settings.at_once, len(run.student) - (settings.target_layers or 1))
        gone = [actions.remove(run, scores=scores) for _ in range(most)]
        yield Progress(*place, f"{label}removed layer{'s' * (most > 1)} {', '.join(map(str, gone))}")
        return
    # What decides is the student at the end of an iteration: tasks and speed are measured there.
    ends = phase == "evaluate" or not settings.distill
    if not settings.suite_each:
        # A removal that is finally distilled is judged once more after that.
        ends &= len(run.student) == settings.target_layers and (phase == "evaluate" or not settings.final)
    if phase == "measure":
        work = actions.measure_steps(run, **_shortlisted(run, settings.shortlist))
    elif phase == "distill":
        work = actions.distill_steps(run)
    elif phase == "final distillation":
        work = actions.distill_steps(run, _final_config(run, settings.final), gap=run.removed)
    else:
        asked = {"speed": ends, "undistilled": ends, "canaries": ends or settings.suite_each}
        work = actions.evaluate_steps(run, settings.suite if ends else False, **asked)
    found = yield from relabel(work, label + phase, place)
    if isinstance(found, Evaluation):
        yield Progress(*place, label + _told(found, run.steps[-1]), found, "result")


def _told(found: Evaluation, step: Step) -> str:
    note, bare = f"perplexity {found.perplexity:.2f}, KL {found.kl:.4f}", step.result["undistilled"]
    if bare:
        note += f" (never distilled: {bare['perplexity']:.2f}, {bare['kl']:.4f})"
    if found.aggregate is not None:
        note += f", aggregate {found.aggregate:.3f} (quality loss {found.loss:+.1%})"
    return note


def _shortlisted(run: Run, count: int | None) -> dict[str, Any]:
    """Options of `measure` for the layers that may be the least important by what was measured before; none, for all."""
    metric = run.config.metric
    before = [step.step for step in run.path if step.action == "measure" and step.args["metric"] == metric]
    if not count or not before or metric not in ABLATION:
        return {}
    above: dict[int, float] = {}  # layer id -> how far above the least it was, when it was scored last
    for scores in map(run.scores_at, before):
        # Not the score: it has in it what all removals so far cost, and grows with every one.
        above |= (scores.table["score"] - scores.table["score"].min()).to_dict()
    least = sorted(set(above) & set(run.student.layer_ids), key=above.get)[:count]
    # A layer next to a gap may matter less once its neighbour is gone, however it stood.
    near = resolve_scope("neighbours", run.student, run.removed) if run.removed else []
    return {"layers": sorted({*least, *near}), "medians": scores.details.get("medians")}


def next_phase(path: list[Step], distill: bool = True) -> str:
    """What the loop does after a path: "measure", "remove", "evaluate removal", "distill" or "evaluate"."""
    done: list[str] = []
    for step in path:
        if step.action in ("remove", "create"):
            done = [step.action]
        elif step.action in ("measure", "distill", "evaluate") and step.whole:
            done.append(step.action)
    if done[-1] == "measure":
        return "remove"
    # A measure after the removal says that a person went on without the rest of the iteration.
    if done[0] == "remove" and "measure" not in done:
        if "distill" in done:
            last = len(done) - 1 - done[::-1].index("distill")
            if "evaluate" not in done[last:]:
                return "evaluate"
        elif "evaluate" not in done:
            return "evaluate removal"
        elif distill:
            return "distill"
    return "measure"


def _final_config(run: Run, changes: dict[str, Any]) -> DistillConfig:
    return DistillConfig.from_dict(run.config.distill | changes)


def _finally_distilled(run: Run, changes: dict[str, Any]) -> bool:
    """Whether the final distillation is in the journal, after the last removal."""
    last = max(i for i, step in enumerate(run.path) if step.action == "remove")
    # Data order follows the place in the run, not a seed. An older ildlab knew of one stage, then of one local rate.
    wanted = replace(_final_config(run, changes), seed=None)
    older = wanted if wanted.local_rate else replace(wanted, local_rate=2e-3)
    return any(
        DistillConfig.from_dict({"local_tokens": 0} | step.args["config"] | {"seed": None}) in (wanted, older)
        and step.args["gap"] == run.removed
        for step in run.path[last:]
        if step.action == "distill" and step.whole
    )


def _checked(run: Run, settings: RunSettings) -> tuple[RunSettings, bool]:
    """Settle the settings, and tell whether they go on with the latest run. Nothing is changed."""
    earlier = [RunSettings(**step.args) for step in run.steps if step.action == "run"]
    if settings.target_layers is None and settings.max_loss is None:
        if not earlier:
            raise SessionError("Say when to stop: target_layers=..., max_loss=..., or both.")
        settings = earlier[-1]
    resuming = bool(earlier) and earlier[-1] == settings
    now, goal = len(run.student), settings.target_layers
    if goal is not None and (goal < 1 or goal > now or (goal == now and not resuming)):
        raise SessionError(f"target_layers is {goal}: it must be at least 1 and less than today's {now} layers.")
    _final_config(run, settings.final or {})
    if settings.suite is not None:
        load_suite(settings.suite)
    return settings, resuming


def _started(run: Run) -> int:
    """The step at which the latest run began."""
    return max(step.step for step in run.steps if step.action == "run")


def _stopped_by_loss(run: Run) -> bool:
    """Whether the latest run ended by its limit, and the student is still the one that it left."""
    changes = [step for step in run.steps[_started(run) :] if step.action in ("undo", *CHANGES_STUDENT)]
    return bool(changes) and changes[-1].args.get("reason") == "max_loss"


def _undo_if_over(run: Run, settings: RunSettings) -> bool:
    """Undo this run's iteration that took the quality loss over the limit, and say whether there was one.

    A person's evaluation by another suite than the run's, or by none, has a quality loss of another kind.
    """
    suite, verdict = settings.suite or run.config.suite, None
    for step in run.path:
        if step.action in CHANGES_STUDENT:
            verdict = None
        elif step.action == "evaluate" and step.args["suite"] == suite:
            verdict = step.result["loss"]
    if settings.max_loss is None or verdict is None or verdict <= settings.max_loss:
        return False
    # What a person removed before the run is theirs.
    removals = [step for step in run.path if step.action == "remove" and step.step > _started(run)]
    if not removals:
        return False
    measured = max(
        (step.step for step in run.path if step.action == "measure" and step.step < removals[-1].step), default=-1
    )
    first = next(step for step in removals if step.step > measured)
    good = [step for step in run.journal.path_to(first.parent) if step.action not in ("measure", "run")][-1]
    actions.undo(run, good.step, reason="max_loss")
    return True
