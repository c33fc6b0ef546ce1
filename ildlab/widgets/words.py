"""What the stepper says: errors, forecasts, the layers selected, the evaluation, what goes wrong."""

from __future__ import annotations

import html
from typing import Any

from ildlab.drawing.columns import score_words
from ildlab.errors import IldlabError, first_line
from ildlab.session.diagnosis import diagnose
from ildlab.session.story import judged

PHASES = {
    "measure": "Measure importance",
    "evaluate removal": "Evaluate the removal",
    "distill": "Distill",
    "evaluate": "Evaluate",
}


def note(words: str, role: str = "") -> str:
    """Plain words as HTML; with a role (such as "status") they are announced where they change."""
    said = f' role="{role}" aria-live="polite"' if role else ""
    return f'<div class="ildlab-note"{said}>{html.escape(words)}</div>'


def error_words(error: BaseException) -> str:
    """Our own errors are written for people; of any other, the first line, or its type's name."""
    return str(error) if isinstance(error, IldlabError) and str(error) else first_line(error)


def listed(layer_ids: list[int]) -> str:
    """Layer ids in a row."""
    return ", ".join(map(str, layer_ids))


def time_words(seconds: float | None) -> str:
    """A forecast, such as "about 40 s"; empty where nothing is known."""
    if seconds is None:
        return ""
    return f"about {max(1, round(seconds))} s" if seconds < 100 else f"about {seconds / 60:.0f} min"


def layer_words(session: Any, layer_ids: list[int], scores: Any, current: bool = True) -> str:
    """What these scores say of the layers that are selected; `current` unless the student changed since."""
    if not layer_ids:
        return "No layer is selected: click a column, or use the arrow keys on the stack (? shows all keys)."
    if len(layer_ids) > 1:
        return f"Layers {listed(layer_ids)} are selected."
    (layer_id,) = layer_ids
    if layer_id not in session.student.layer_ids:
        return f"Layer {layer_id} was removed."
    if scores is None or layer_id not in scores.table.index:
        return f"Layer {layer_id}: not measured yet."
    words = f"Layer {layer_id}: {score_words(scores, layer_id)}."
    if not current:
        return f"{words} The student changed since: measure again."
    if layer_id == scores.least_important:
        words += f" The least important one, with probability {scores.separation():.2f}"
        tied = [i for i in scores.tied if i != layer_id]
        words += f"; tied with {listed(tied)}." if tied else "."
    return words


def evaluation_html(session: Any) -> str:
    """Today's student beside the teacher, and below it the evaluation before that on the same way."""
    found, before, _ = judged(session)
    if found is None:
        return note("An evaluation shows here what the student is worth beside its teacher: press Evaluate.")
    earlier = f"<details><summary>the evaluation before it</summary>{before._repr_html_()}</details>" if before else ""
    return f'<div class="ildlab-note">{found._repr_html_()}</div>{earlier}'


def warnings_html(session: Any) -> str:
    """Failure signatures that the journal shows, a line each; what to try is a click away."""
    lines = [
        f"<details><summary>⚠ {html.escape(f.signature)}: {html.escape(f.seen)}</summary>{html.escape(f.advice)}</details>"
        for f in diagnose(session)
    ]
    return f'<div class="ildlab-note">{"".join(lines)}</div>' if lines else ""
