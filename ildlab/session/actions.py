"""What a session's long actions do: measure, distill, evaluate, each ending in a step of the journal.

Generators of `Progress` over a `PruningSession`, which documents them; each holds the session for its whole
life. One that is closed or fails leaves the student as the journal has it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ildlab.distill.checkpoint import decisive
from ildlab.distill.config import DistillConfig
from ildlab.distill.scope import match_points, resolve_scope
from ildlab.distill.train import distill_steps
from ildlab.errors import DistillError, FileError, JournalError, NotFiniteError, SessionError
from ildlab.evaluate.text_quality import Evaluation, evaluate_steps
from ildlab.importance.config import options_of
from ildlab.importance.dispatch import measure_steps
from ildlab.importance.scores import LayerScores
from ildlab.progress import Progress, relabel
from ildlab.session.journal import CHANGES_STUDENT

if TYPE_CHECKING:
    from ildlab.session.session import PruningSession


def measure(
    session: PruningSession, metric: str | None, options: dict[str, Any]
) -> Generator[Progress, None, LayerScores]:
    """Score today's layers and journal the scores."""
    metric = metric or session.config.metric
    # Of the run's options, those that this metric has: a race is none of a metric of one pass.
    inherited = {k: v for k, v in session.config.measure.items() if k in options_of(metric)}
    options = {**inherited, **options}
    seed = options.pop("seed", session._seed())
    if metric == "task":
        options.setdefault("suite", session.config.suite)
    task = metric == "task"
    with session.acting("measure"):
        started = time.perf_counter()
        scores = yield from measure_steps(
            session.student,
            None if task else session.text("calibration"),
            metric,
            None if task else session.teacher,
            tokenizer=session.tokenizer if task else None,
            seed=seed,
            **options,
        )
        session._append(
            "measure",
            args={"metric": metric, **options},
            result={"scores": scores.to_dict()},
            seed=seed,
            seconds=time.perf_counter() - started,
        )
    return scores


def distill(
    session: PruningSession, config: DistillConfig, text: str | None, gap: Sequence[int] | None
) -> Generator[Progress, None, Any]:
    """Distill the student and journal the changed weights; closed, it keeps what was trained so far."""
    with session.acting("distill"):
        return (yield from _distill(session, config, text, gap))


def _distill(session: PruningSession, config: DistillConfig, text: str | None, gap: Sequence[int] | None):
    gap = _gap(session) if gap is None else _removed_before(session, gap)
    seed = session._seed() if config.seed is None else config.seed
    config = replace(config, seed=seed)
    # All that can be wrong is found out before anything of an interrupted distillation is set aside.
    match_points(config, session.student, resolve_scope(config.scope, session.student, gap))
    changed = [step.step for step in session.path if step.action in CHANGES_STUDENT]
    checkpoint = _checkpoint_of(session.folder / "checkpoint", changed, config, text, gap)
    metrics = session.folder / "metrics" / f"{len(session.steps):03d}.jsonl"
    started = time.perf_counter()
    work = distill_steps(
        session.student,
        session.teacher,
        session.text("train", text, config.tokens),
        config,
        gap=gap,
        checkpoint=checkpoint,
        metrics_path=metrics,
    )
    last: Progress | None = None
    try:
        while True:
            try:
                last = next(work)
            except StopIteration as stop:
                result = stop.value
                break
            yield last
    except GeneratorExit:
        work.close()
        if last is not None and last.done > 0:
            trained = resolve_scope(config.scope, session.student, gap)
            _commit_distill(session, trained, config, gap, {"stopped_at": last.done}, seed, started)
            checkpoint.unlink(missing_ok=True)  # what it holds is journaled now
        raise
    except BaseException as error:
        # Whatever went wrong, today's student is again the one of the journal.
        work.close()
        session.student = session.student_at(session.journal.head.step)
        if isinstance(error, NotFiniteError):  # the journal keeps why, for `diagnose`
            session._append("failed", args={"action": "distill"}, result={"error": str(error)}, seed=seed)
        raise
    summary = {
        "tokens": result.tokens,
        "text": text or session.config.text,
        "last": _plain(result.history.iloc[-1].to_dict()),
    }
    _commit_distill(session, result.trained, config, gap, summary, seed, started)
    shutil.rmtree(checkpoint.parent, ignore_errors=True)
    return result


def evaluate(
    session: PruningSession, suite: str | bool | None, cache: Path | None, undistilled: bool, options: dict[str, Any]
) -> Generator[Progress, None, Evaluation]:
    """Judge today's student and journal the result."""
    suite = None if suite is False else suite or session.config.suite
    blocks = session.text("eval")
    # Perplexity and even the aggregate can look fine while copying has collapsed.
    options.setdefault("canaries", True)
    with session.acting("evaluate"):
        started = time.perf_counter()
        teacher = teacher_evaluation(session, suite)
        found = yield from evaluate_steps(
            session.student,
            session.teacher,
            blocks,
            tokenizer=session.tokenizer,
            suite=suite,
            teacher_record=teacher.teacher_record() if teacher else None,
            cache=cache or session.folder / "suites",
            **options,
        )
        bare_figures = None
        if undistilled and session.trained:
            # What the same removals cost without any distillation: the other curve of the paper's figure.
            bare = session.teacher.share()
            for layer_id in session.removed:
                bare.remove(layer_id)
            work = evaluate_steps(bare, session.teacher, blocks, speed=False)
            plain = yield from relabel(work, "(never distilled) ")
            bare_figures = {"perplexity": plain.perplexity, "kl": plain.kl, "agreement": plain.agreement}
        session._append(
            "evaluate",
            args={"suite": suite},
            result=_plain(
                {
                    "evaluation": found.to_dict(),
                    "undistilled": bare_figures,
                    "loss": quality_loss(found),
                    "aggregate": found.aggregate,
                }
            ),
            seconds=time.perf_counter() - started,
        )
    return found


def quality_loss(found: Evaluation) -> float:
    """The share of quality lost that `max_loss` limits.

    With a suite, 1 - aggregate of the student / aggregate of the teacher (arXiv 2511.05085); without,
    1 - perplexity of the teacher / perplexity of the student.
    """
    if found.suite is not None:
        return found.quality_loss
    return 1 - found.teacher_perplexity / found.perplexity


# ---------------------------------------------------------------- helpers


def teacher_evaluation(session: PruningSession, suite: str | None) -> Evaluation | None:
    """The run's evaluation of its whole teacher on a suite (None: on any), where it has one."""
    for step in session.steps:
        if (
            step.action == "evaluate"
            and suite in (None, step.args["suite"])
            and len(step.layer_ids) == len(session.teacher)
        ):
            return Evaluation.from_dict(step.result["evaluation"])
    return None


def _gap(session: PruningSession) -> list[int]:
    """Layers removed since the student was last distilled: where it has to heal."""
    gap: list[int] = []
    for step in session.path:
        if step.action == "distill" and "stopped_at" not in step.result:
            gap = []
        elif step.action == "remove":
            gap.append(step.args["layer_id"])
    gap = gap or session.removed[-1:]
    if not gap:
        raise SessionError("Nothing was removed yet: the student is the teacher, and has nothing to learn from it.")
    return gap


def _removed_before(session: PruningSession, gap: Sequence[int]) -> list[int]:
    unknown = sorted(set(gap) - set(session.removed))
    if unknown or not gap:
        raise SessionError(
            f"gap={list(gap)}: give layers that were removed. {unknown or 'None'} of them was; "
            f"removed so far: {session.removed or 'none'}."
        )
    return list(gap)


def _commit_distill(session: PruningSession, trained, config, gap, summary, seed, started) -> None:
    _commit(
        session,
        "distill",
        trained,
        args={"config": config.to_dict(), "gap": gap, "trained": list(trained)},
        result=summary,
        seed=seed,
        seconds=time.perf_counter() - started,
    )


def _commit(session: PruningSession, action: str, changed: list[int], **fields: Any) -> None:
    """Journal a step that changed the weights of some layers, rounded to what is stored."""
    dtype = session.weights_dtype
    tensors = {}
    for layer_id in changed:
        layer = session.student.layers[session.student.position(layer_id)]
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                stored = parameter.to(dtype)
                parameter.copy_(stored)
                tensors[f"layer.{layer_id}.{name}"] = stored
    try:
        session._append(action, tensors=tensors or None, **fields)
    except (FileError, JournalError):
        session.student = session.student_at(session.journal.head.step)
        raise


def _checkpoint_of(folder: Path, changed: list[int], config: DistillConfig, text: str | None, gap: list[int]) -> Path:
    """File for the checkpoints of this very distillation: another one's, of other settings, stays where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"after_steps": changed, "config": decisive(config), "text": text, "gap": gap}
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{name}.safetensors"


def _plain(value: Any) -> Any:
    """JSON-able copy: numpy and torch scalars become Python's; a NaN is an error, not a value."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and value != value:
        raise DistillError("A recorded value is NaN: it would hide a failure. Look at the step's metrics file.")
    return value
