"""The loop of the method: measure, remove, distill, evaluate, until a stop rule holds.

What comes next is told from the journal alone, so that a run that was killed, or steered by hand for a
while, finds its place.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ildlab.distill.config import DistillConfig
from ildlab.errors import SessionError
from ildlab.evaluate.suites import load_suite
from ildlab.progress import Progress, relabel
from ildlab.session.actions import teacher_evaluation
from ildlab.session.journal import CHANGES_STUDENT

if TYPE_CHECKING:
    import pandas as pd

    from ildlab.session.session import PruningSession


@dataclass(frozen=True)
class RunSettings:
    """When the loop stops, and what it does on the way; see `PruningSession.run`."""

    target_layers: int | None = None
    max_loss: float | None = None
    distill: bool = True
    suite: str | None = None
    final: dict[str, Any] | None = None


def run_steps(session: PruningSession, settings: RunSettings) -> Generator[Progress, None, pd.DataFrame]:
    """Run the loop on a session; see `PruningSession.run`."""
    settings, resuming = _checked(session, settings)
    if resuming and _stopped_by_loss(session):
        return session.history()
    goal = settings.target_layers or 1
    if not resuming:
        session._append("run", args=asdict(settings))
    whole = len(session.student) == len(session.teacher)
    if whole and teacher_evaluation(session, settings.suite or session.config.suite) is None:
        yield from relabel(session.evaluate_steps(settings.suite), "evaluate the teacher", (0, 1))
    total = len(session.student) - goal
    while True:
        left = len(session.student)
        done = total - (left - goal)
        phase = next_phase(session, settings.distill)
        # Judged from the journal, so that a run that was killed right after an evaluation gets its verdict too.
        if phase == "measure" and _undo_if_over(session, settings):
            yield Progress(done, total, f"quality loss is over {settings.max_loss}: step undone")
            break
        if phase == "measure" and left <= goal:
            if not settings.final or _finally_distilled(session, settings.final):
                break
            phase = "final distillation"
        name = f"{left} layers: {phase}"
        if phase == "measure":
            yield from relabel(session.measure_steps(), name, (done, total))
        elif phase == "remove":
            layer_id = session.remove()
            yield Progress(done, total, f"{left} layers: removed layer {layer_id}")
        elif phase == "distill":
            yield from relabel(session.distill_steps(), name, (done, total))
        elif phase == "final distillation":
            config = _final_config(session, settings.final)
            yield from relabel(session.distill_steps(config, gap=session.removed), name, (done, total))
        else:
            # What decides is the student at the end of an iteration: tasks and speed are measured there.
            ends = phase == "evaluate" or not settings.distill
            work = session.evaluate_steps(settings.suite if ends else False, speed=ends, undistilled=ends)
            found = yield from relabel(work, name, (done, total))
            note = f"{left} layers: perplexity {found.perplexity:.2f}, KL {found.kl:.4f}"
            bare = session.steps[-1].result["undistilled"]
            if bare:
                note += f" (never distilled: {bare['perplexity']:.2f}, {bare['kl']:.4f})"
            if found.aggregate is not None:
                note += f", aggregate {found.aggregate:.3f} (quality loss {found.quality_loss:+.1%})"
            yield Progress(done, total, note, found, "result")
    return session.history()


def next_phase(session: PruningSession, distill: bool = True) -> str:
    """What the loop does next with a session.

    Returns
    -------
    str
        `"measure"`, `"remove"`, `"evaluate removal"`, `"distill"` or `"evaluate"`.
    """
    actions: list[str] = []
    for step in session.path:
        if step.action in ("remove", "create"):
            actions = [step.action]
        elif step.action in ("measure", "distill", "evaluate") and "stopped_at" not in step.result:
            actions.append(step.action)  # a distillation that was stopped part-way is no whole one
    if actions[-1] == "measure":
        return "remove"
    # A measure after the removal says that a person went on without the rest of the iteration.
    if actions[0] == "remove" and "measure" not in actions:
        if "distill" in actions:
            last = len(actions) - 1 - actions[::-1].index("distill")
            if "evaluate" not in actions[last:]:
                return "evaluate"
        elif "evaluate" not in actions:
            return "evaluate removal"
        elif distill:
            return "distill"
    return "measure"


def _final_config(session: PruningSession, changes: dict[str, Any]) -> DistillConfig:
    return DistillConfig.from_dict({**session.config.distill, **changes})


def _finally_distilled(session: PruningSession, changes: dict[str, Any]) -> bool:
    """Whether the final distillation is in the journal, after the last removal."""
    last = max(i for i, step in enumerate(session.path) if step.action == "remove")
    # As it comes back from the journal; data order follows the place in the run, whatever seed the config names.
    wanted = json.loads(json.dumps({**_final_config(session, changes).to_dict(), "seed": None}))
    return any(
        {**step.args["config"], "seed": None} == wanted and step.args["gap"] == session.removed
        for step in session.path[last:]
        if step.action == "distill" and "stopped_at" not in step.result
    )


def _checked(session: PruningSession, settings: RunSettings) -> tuple[RunSettings, bool]:
    """Settle the settings, and tell whether they go on with the latest run. Nothing is changed."""
    earlier = [RunSettings(**step.args) for step in session.steps if step.action == "run"]
    if settings.target_layers is None and settings.max_loss is None:
        if not earlier:
            raise SessionError("Say when to stop: target_layers=..., max_loss=..., or both.")
        settings = earlier[-1]
    resuming = bool(earlier) and earlier[-1] == settings
    now, goal, limit = len(session.student), settings.target_layers, settings.max_loss
    if goal is not None and (goal < 1 or goal > now or (goal == now and not resuming)):
        raise SessionError(f"target_layers is {goal}: it must be at least 1 and less than today's {now} layers.")
    if settings.final is not None:
        if goal is None:
            raise SessionError("A final distillation follows when target_layers is reached: give it.")
        _final_config(session, settings.final).check()
    if settings.suite is not None:
        load_suite(settings.suite)
    if limit is not None and not 0 < limit < 1:
        raise SessionError(f"max_loss is {limit}: it is a share of the teacher's quality, between 0 and 1.")
    return settings, resuming


def _stopped_by_loss(session: PruningSession) -> bool:
    """Whether the latest run ended by its limit, and the student is still the one that it left."""
    last_run = max(s.step for s in session.steps if s.action == "run")
    for step in reversed(session.steps[last_run:]):
        if step.action == "undo":
            return step.args["reason"] == "max_loss"
        if step.action in CHANGES_STUDENT:
            return False
    return False


def _undo_if_over(session: PruningSession, settings: RunSettings) -> bool:
    """Undo this run's iteration that took the quality loss over the limit; the last good student is kept.

    What counts is today's student on the run's own suite: a person's evaluation by another suite, or by none,
    has a quality loss of another kind.
    """
    started = max(s.step for s in session.steps if s.action == "run")
    suite, verdict = settings.suite or session.config.suite, None
    for step in session.path:
        if step.action in CHANGES_STUDENT:
            verdict = None
        elif step.action == "evaluate" and step.args["suite"] == suite:
            verdict = step.result["loss"]
    if settings.max_loss is None or verdict is None or verdict <= settings.max_loss:
        return False
    removals = [step for step in session.path if step.action == "remove" and step.step > started]
    if not removals:  # what a person removed before the run is theirs
        return False
    removal = removals[-1]
    before = session.journal.path_to(removal.parent)
    good = [step for step in before if step.action not in ("measure", "run")][-1]
    session.undo(good.step, reason="max_loss")
    return True
