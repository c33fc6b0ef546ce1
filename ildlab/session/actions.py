"""What is done to a run's student: measure, remove, distill, evaluate, undo, each ending in a step of the journal.

Each holds the run for its whole life; one that is closed or fails leaves the student as the journal has it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from ildlab.distill.checkpoint import decisive
from ildlab.distill.config import DistillConfig, DistillResult
from ildlab.distill.processes import distill_steps as train_steps
from ildlab.distill.scope import resolve_scope
from ildlab.errors import NotFiniteError, SessionError
from ildlab.evaluate.record import Evaluation
from ildlab.evaluate.text_quality import evaluate_steps as judge_steps
from ildlab.importance.config import options_of
from ildlab.importance.dispatch import measure_steps as score_steps
from ildlab.importance.scores import LayerScores
from ildlab.model.stack import LayerStack
from ildlab.model.twin import cut_difference
from ildlab.progress import Work, relabel
from ildlab.session.journal import CHANGES_STUDENT, Step
from ildlab.session.run import Run, text_record
from ildlab.session.standing import Standing, beside, read_standing, remember
from ildlab.typed import reading


@reading(SessionError)
def measure_steps(run: Run, metric: str | None = None, **options: Any) -> Work[LayerScores]:
    """Score today's layers on the calibration text, and journal the scores.

    `metric` is by default the run's; `options` are those of `ildlab.measure`, and where not given the run's.
    """
    metric = metric or run.config.metric
    # Of the run's options, those that this metric has: a race is none of a metric of one pass.
    options = {k: v for k, v in run.config.measure.items() if k in options_of(metric)} | options
    seed = options.pop("seed", run.seed)
    with run.acting("measure"):
        if metric == "task":  # decided by a suite's rows, beside no teacher and on no text
            options.setdefault("suite", run.config.suite)
            work = score_steps(run.student, None, metric, None, seed=seed, tokenizer=run.tokenizer, **options)
            used = {}
        else:
            blocks = run.text("calibration")
            work = score_steps(run.student, blocks, metric, run.teacher, seed=seed, **options)
            used = {"text": text_record(blocks)}
        scores = yield from work
        found = {"scores": scores.to_dict(), **used}
        run.append("measure", args={"metric": metric, **options}, result=found, seed=seed)
    return scores


@reading(SessionError)
def remove(run: Run, layer_id: int | None = None, *, scores: LayerScores | None = None) -> int:
    """Remove a layer and return its id, by default the least important one by `scores` (the run's) that can go.

    A layer can go where the family's config can say what is left (`ildlab.model.twin`): else the checkpoint would be
    another model than the student.
    """
    with run.acting("remove a layer"):
        scores, student = scores or run.scores, run.student
        if layer_id is not None:
            student.position(layer_id)
        elif scores is None:
            raise SessionError("The student changed since it was measured: measure() first, or give a layer_id.")
        if len(student) == 1:
            raise SessionError("The student has one layer left; it cannot be removed.")
        layer_id = _that_can_go(student, _by_rank(scores, student) if layer_id is None else [layer_id])
        known = scores is not None and layer_id in scores.table.index
        told = {"layer_id": layer_id, "score": float(scores.table.loc[layer_id, "score"]) if known else None}
        told["metric"] = scores.metric if scores else None
        left = [i for i in student.layer_ids if i != layer_id]
        # The journal first: if it cannot be written, the student has not changed either.
        run.journal.append("remove", layer_ids=left, args=told, seed=run.seed)
        try:
            student.remove(layer_id)
        except BaseException:  # Ctrl-C: it is journaled, so it is done
            run.restore()
            raise
    return layer_id


def _by_rank(scores: LayerScores, student: LayerStack) -> list[int]:
    """The student's layers by these scores, the least important first; some may be gone since they were taken."""
    return [int(layer_id) for layer_id in scores.ranking if layer_id in student.layer_ids]


def _that_can_go(student: LayerStack, layer_ids: Sequence[int]) -> int:
    """The first of some layers without which the student can be saved; SessionError where there is none."""
    found = {}
    for layer_id in map(int, layer_ids):
        found[layer_id] = cut_difference(student, layer_id)
        if not found[layer_id]:
            return layer_id
    (layer_id, odd), *others = found.items()
    advice = "None of the others can go either." if others else "Take another: measure, and remove() without an id."
    raise SessionError(
        f"Layer {layer_id} cannot be removed from {type(student.model).__name__}: the config cannot describe what is left, "
        f"so that a checkpoint would be another model ({odd}). {advice}"
    )


@reading(SessionError)
def undo(run: Run, to: int | None = None, *, reason: str = "") -> Step:
    """Go back to a step, by default to before the latest change of the student; `to` may be one that was undone before."""
    if to is None:
        changes = [step for step in run.path if step.action in CHANGES_STUDENT]
        if not changes:
            raise SessionError("There is nothing to undo: the student is still the teacher.")
        to = changes[-1].parent
    run.journal.goal(to)
    with run.acting("undo"):
        student = run.student_at(to)
        if to != run.journal.head.step:  # to stay where one stands is no step
            run.journal.append("undo", layer_ids=student.layer_ids, args={"to": to, "reason": reason})
        run.student = student
    return run.journal.head


@reading(SessionError)
def distill_steps(
    run: Run,
    config: DistillConfig | None = None,
    *,
    text: str | None = None,
    gap: list[int] | None = None,
    processes: int | None = None,
    **changes: Any,
) -> Work[DistillResult]:
    """Distill the student from the teacher on the train text, and journal the changed weights.

    The generator, closed, keeps what was trained so far, as a step.

    Parameters
    ----------
    config : DistillConfig, optional
        By default the run's.
    text : str, optional
        Another source of `load_text` to train on in this step.
    gap : list of int, optional
        Removed layers that "neighbours" and "window(k)" are counted from (a suffix begins at the lowest
        layer ever removed). By default those removed since the last distillation.
    processes : int, optional
        As in `SessionConfig`; by default the run's.
    **changes
        Fields of the config to change for this step. `tokens` above the run's `train_tokens` draws more text;
        without a `seed` (None), data order follows the place in the run.

    Raises
    ------
    NotFiniteError
        The loss stopped being finite; the student is again as it was before the step.
    """
    with run.acting("distill"):
        # All that can be wrong is found out before anything of an interrupted distillation is set aside.
        config = DistillConfig.from_dict((config.to_dict() if config else run.config.distill) | changes)
        config = replace(config, seed=run.seed if config.seed is None else config.seed)
        processes = run.config.processes if processes is None else processes
        if processes < 1:
            raise SessionError(f"processes={processes}: at least 1 distills.")
        gap = _open_gap(run) if gap is None else gap
        if not gap or set(gap) - set(run.removed):
            raise SessionError(f"gap={gap}: give layers that were removed so far: {run.removed or 'none yet'}.")
        trained = resolve_scope(config.scope, run.student, gap)
        blocks = run.text("train", text, max(config.tokens or 0, config.local_tokens or 0))
        checkpoint = _checkpoint_of(run, config, text, gap)

        asked = {"config": config.to_dict(), "gap": gap, "trained": trained, "processes": processes}
        files = {"checkpoint": checkpoint, "metrics_path": run.journal.losses_of(len(run.steps))}

        def commit(**found: Any) -> None:
            found["text"] = text_record(blocks)
            run.commit("distill", trained, args=asked, result=found, seed=config.seed)

        among = {"processes": processes, "teacher_name": run.loaded.name}
        work, done = train_steps(run.student, run.teacher, blocks, config, gap=gap, **among, **files), 0
        try:
            while True:
                progress = next(work)
                if not done:
                    remember(checkpoint, progress.total, config, text, gap)
                done = progress.done
                yield progress
        except StopIteration as stop:
            result = stop.value
        except GeneratorExit:
            work.close()
            if done > 0:
                commit(stopped_at=done)
                checkpoint.unlink(missing_ok=True)  # what it holds is journaled now
                beside(checkpoint).unlink(missing_ok=True)
            raise
        except BaseException as error:
            work.close()
            run.restore()
            if isinstance(error, NotFiniteError):  # the journal keeps why, for `diagnose`
                run.append("failed", args={"action": "distill"}, result={"error": str(error)}, seed=config.seed)
            raise
        last = result.history.iloc[-1].dropna()  # of the other stage's terms it says nothing
        commit(tokens=result.tokens, last=last.to_dict())
        shutil.rmtree(checkpoint.parent, ignore_errors=True)
    return result


def _open_gap(run: Run) -> list[int]:
    """Layers removed since the student was last distilled."""
    gap: list[int] = []
    for step in run.path:
        if step.action == "distill" and step.whole:
            gap = []
        elif step.action == "remove":
            gap.append(step.args["layer_id"])
    gap = gap or run.removed[-1:]
    if not gap:
        raise SessionError("Nothing was removed yet: the student is the teacher, and has nothing to learn from it.")
    return gap


def _checkpoint_of(run: Run, config: DistillConfig, text: str | None, gap: list[int]) -> Path:
    """File for the checkpoints of this very distillation: another one's, of other settings, stays where it is."""
    changed = [step.step for step in run.path if step.action in CHANGES_STUDENT]
    content = {"after_steps": changed, "config": decisive(config), "text": text, "gap": gap}
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return run.folder / "checkpoint" / f"{name}.safetensors"


def standing(run: Run) -> Standing | None:
    """The distillation of today's student that was interrupted, if there is one: `distill` with its settings goes on."""
    for file in sorted((run.folder / "checkpoint").glob("*.safetensors")):
        found = read_standing(file)
        if found and _checkpoint_of(run, DistillConfig.from_dict(found.config), found.text, found.gap) == file:
            return found
    return None


@reading(SessionError)
def evaluate_steps(
    run: Run, suite: str | bool | None = None, *, undistilled: bool = True, cache: Path | None = None, **options: Any
) -> Work[Evaluation]:
    """Judge today's student against the teacher, and journal the result.

    Parameters
    ----------
    suite : str or False, optional
        By default (None) the run's; False for the eval text alone.
    undistilled : bool
        Evaluate the teacher without the same layers, never distilled, as well.
    cache : path, optional
        Folder where suite results are kept; by default one in the run's.
    **options
        As in `ildlab.evaluate`.
    """
    suite = (None if suite is False else suite) if suite is not None else run.config.suite
    # Perplexity and even the aggregate can look fine while copying has collapsed.
    options.setdefault("canaries", True)
    with run.acting("evaluate"):
        blocks = run.text("eval")
        teacher = teacher_evaluation(run, suite)
        by = {"tokenizer": run.tokenizer, "suite": suite, "cache": cache or run.folder / "suites"}
        by["teacher_record"] = teacher and teacher.teacher_record()
        found = yield from judge_steps(run.student, run.teacher, blocks, **by, **options)
        bare = None
        if undistilled and run.trained:
            # What the same removals cost without any distillation: the other curve of the paper's figure.
            plain = _judged_undistilled(run, text_record(blocks))
            if plain is None:
                work = judge_steps(run.teacher.share(without=run.removed), run.teacher, blocks, speed=False)
                plain = yield from relabel(work, "(never distilled) ")
            bare = {name: getattr(plain, name) for name in ("perplexity", "kl", "agreement")}
        told = {"evaluation": found.to_dict(), "undistilled": bare, "loss": found.loss, "aggregate": found.aggregate}
        run.append("evaluate", args={"suite": suite}, result=told | {"text": text_record(blocks)})
    return found


def _judged_undistilled(run: Run, text: dict[str, Any]) -> Evaluation | None:
    """The evaluation of today's layers on this text from before anything was distilled, where the run has one."""
    for step in takewhile(lambda step: step.action != "distill", run.path):
        if step.action == "evaluate" and step.layer_ids == run.student.layer_ids and step.result.get("text") == text:
            return Evaluation.from_dict(step.result["evaluation"])
    return None


def teacher_evaluation(run: Run, suite: str | None) -> Evaluation | None:
    """The run's evaluation of its whole teacher on a suite (None: on any), where it has one."""
    for step in run.steps:
        asked = step.action == "evaluate" and suite in (None, step.args["suite"])
        if asked and len(step.layer_ids) == len(run.teacher):
            return Evaluation.from_dict(step.result["evaluation"])
    return None
