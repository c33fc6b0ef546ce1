"""A run in words, told from its journal: where it stands, its steps as a tree, and what going back would take."""

from __future__ import annotations

from html import escape

from ildlab.evaluate.record import Evaluation
from ildlab.session.journal import CHANGES_STUDENT, Step
from ildlab.session.run import Run


def header_html(run: Run) -> str:
    """One line: model, layers, what was saved, and quality beside the teacher, each with its change since it was judged before."""
    student, teacher = run.student, run.teacher
    ours, theirs = (sum(p.numel() for p in stack.model.parameters()) for stack in (student, teacher))
    saved = (theirs - ours) * run.weights_dtype.itemsize / 1e6
    parts = [
        f"<b>{escape(run.config.teacher.rstrip('/').rpartition('/')[2])}</b>",
        f"<b>{len(student)}</b> of {len(teacher)} layers",
        f"{ours / 1e6:,.1f} M parameters" + (f" ({ours / theirs - 1:.1%}, {saved:,.0f} MB saved)" if saved else ""),
    ]
    found, before, at = judged(run)
    if found is None:
        parts.append("perplexity, KL and tasks kept: after an evaluation")
    else:
        # Its change since the evaluation before, where there was one.
        more, kl = (
            (f"; {found.perplexity - before.perplexity:+.2f}", f" ({found.kl - before.kl:+.3f})")
            if before
            else ("", "")
        )
        parts.append(f"perplexity <b>{found.perplexity:.2f}</b> (teacher {found.teacher_perplexity:.2f}{more})")
        parts.append(f"KL <b>{found.kl:.3f}</b> nats/token{kl}")
        if found.suite is not None:
            lost = found.quality_loss_estimate()
            parts.append(f"aggregate kept <b>{1 - lost.value:.1%}</b> [{1 - lost.high:.1%}, {1 - lost.low:.1%}]")
        if any(step.action in CHANGES_STUDENT for step in run.path if step.step > at):
            parts.append(f"<i>quality as of step {at}, the student changed since</i>")
    return f'<div class="ildlab-header">{" · ".join(parts)}</div>'


def judged(run: Run) -> tuple[Evaluation | None, Evaluation | None, int]:
    """The latest evaluation on the way to today's student, the one before it, and the step of the latest."""
    steps = [step for step in run.path if step.action == "evaluate"][-2:]
    found = [Evaluation.from_dict(step.result["evaluation"]) for step in steps]
    return (found[-1] if found else None), (found[0] if len(found) > 1 else None), steps[-1].step if steps else -1


def undo_words(run: Run, to: int | None = None) -> str:
    """What going to a step (by default before the latest change of the student) would take back."""
    if to is None:
        changes = [step for step in run.path if step.action in CHANGES_STUDENT]
        to = changes[-1].parent if changes else None
    there = {step.step for step in run.journal.path_to(to)} if to is not None else set()
    return ", ".join(
        f"{what(step)} (step {step.step})" for step in run.path if to is not None and step.step not in there
    )


def what(step: Step) -> str:
    """A step in words, with the quality that it found."""
    if step.action == "remove":
        return f"remove layer {step.args['layer_id']}"
    if step.action == "evaluate":
        found, aggregate = step.result["evaluation"], step.result.get("aggregate")
        told = f"perplexity {found['perplexity']:.2f}, KL {found['kl']:.3f}"
        return f"evaluate: {told}" + (f", aggregate {aggregate:.3f}" if aggregate is not None else "")
    if step.action == "measure":
        return f"measure {step.args['metric']}"
    return step.action + ("" if step.whole else f", stopped at {step.result['stopped_at']}")


def step_labels(run: Run) -> list[tuple[str, int]]:
    """The tree of steps as lines for a list: indented by branch, `●` on the way to today's student."""
    on_path = {step.step for step in run.path}
    depth: dict[int | None, int] = {}
    seen: set[int | None] = set()
    labels = []
    for step in run.steps:
        depth[step.step] = depth.get(step.parent, 0) + (step.parent in seen)
        seen.add(step.parent)
        if step.action == "undo":
            continue
        mark = "●" if step.step in on_path else "○"
        took = f" ({step.seconds:.0f} s)" if step.seconds >= 1 else ""
        labels.append((f"{'  ' * depth[step.step]}{mark} {step.step}: {what(step)}{took}", step.step))
    return labels


def compare_html(run: Run, one: int, other: int) -> str:
    """Two steps side by side: layers, what was removed, and the quality that was found there last."""
    columns = []
    for at in (one, other):
        path = run.journal.path_to(at)
        quality = [what(step) for step in path if step.action == "evaluate"][-1:] or ["not evaluated"]
        gone = [str(step.args["layer_id"]) for step in path if step.action == "remove"]
        cells = (f"step {at}", f"{len(path[-1].layer_ids)} layers", f"removed: {', '.join(gone) or 'none'}", *quality)
        columns.append(cells)
    rows = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in zip(*columns))
    return f'<div class="ildlab-note"><table aria-label="two steps compared">{rows}</table></div>'
