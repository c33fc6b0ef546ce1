"""A session in words: scores, errors, the evaluation, what goes wrong, and the tree of steps."""

from __future__ import annotations

import html
from typing import Any

from ildlab.errors import IldlabError, first_line
from ildlab.evaluate.record import Evaluation
from ildlab.session.diagnosis import diagnose


def note(words: str, role: str = "") -> str:
    """Plain words as HTML; with a role (such as "status") they are announced where they change."""
    said = f' role="{role}" aria-live="polite"' if role else ""
    return f'<div class="ildlab-note"{said}>{html.escape(words)}</div>'


def error_words(error: BaseException) -> str:
    """Our own errors are written for people; of any other, the first line, or its type's name."""
    return str(error) if isinstance(error, IldlabError) and str(error) else first_line(error)


def score_words(scores: Any, layer_id: int) -> str:
    """The score of a layer, with its interval and the number of sequences that it is from."""
    row = scores.table.loc[layer_id]
    return f"{scores.metric} {row.score:.4g} [{row.ci_low:.4g}, {row.ci_high:.4g}], n={int(row.n)}"


def layer_words(session: Any, layer_id: int) -> str:
    """What is known of a layer of today's student."""
    scores = session.scores
    if layer_id not in session.student.layer_ids:
        return f"Layer {layer_id} was removed."
    if scores is None or layer_id not in scores.table.index:
        return f"Layer {layer_id}: not measured since the student last changed."
    words = f"Layer {layer_id}: {score_words(scores, layer_id)}."
    if layer_id == scores.least_important:
        words += f" The least important one, with probability {scores.separation():.2f}"
        tied = [str(i) for i in scores.tied if i != layer_id]
        words += f"; tied with {', '.join(tied)}." if tied else "."
    return words


def evaluation_html(session: Any) -> str:
    """Today's student beside the teacher, and below it the evaluation before that on the same way."""
    found = session.evaluation
    if found is None:
        return ""
    *_, before, _ = [None, *(step for step in session.path if step.action == "evaluate")]
    if before is None:
        return found._repr_html_()
    earlier = Evaluation.from_dict(before.result["evaluation"])._repr_html_()
    told = f"<summary>the last evaluation before it, step {before.step}</summary>"
    return f"{found._repr_html_()}<details open>{told}{earlier}</details>"


def warnings_html(session: Any) -> str:
    """Failure signatures that the journal shows."""
    return "".join(note(str(finding)) for finding in diagnose(session))


def step_labels(session: Any) -> list[tuple[str, int]]:
    """The tree of steps as lines for a list: indented by branch, `●` on the way to today's student."""
    on_path = {step.step for step in session.path}
    depth: dict[int | None, int] = {}
    seen: set[int | None] = set()
    labels = []
    for step in session.steps:
        depth[step.step] = depth.get(step.parent, 0) + (step.parent in seen)
        seen.add(step.parent)
        if step.action == "undo":
            continue
        what = step.action
        if step.action == "remove":
            what += f" layer {step.args['layer_id']}"
        elif step.action == "evaluate":
            what += f": perplexity {step.result['evaluation']['perplexity']:.2f}"
        mark = "●" if step.step in on_path else "○"
        labels.append((f"{'  ' * depth[step.step]}{mark} {step.step}: {what} ({step.seconds:.0f} s)", step.step))
    return labels
