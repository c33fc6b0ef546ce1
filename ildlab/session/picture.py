"""A run as one picture, told from its journal alone: the stack at a step, its scores, and the iterations so far."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from ildlab.drawing.columns import Row, columns_of, unit_of
from ildlab.drawing.stack import Picture
from ildlab.importance.scores import LayerScores
from ildlab.session.journal import CHANGES_STUDENT, Journal, Step


def picture_of(
    journal: Journal,
    step: int | None = None,
    *,
    scores: LayerScores | None = None,
    kind: str | None = None,
    off: Collection[int] = (),
    drifts: dict[int, float | None] | None = None,
) -> Picture:
    """The stack as it was at a step, by default today's.

    Parameters
    ----------
    scores : LayerScores, optional
        Those of a measurement in hand, to draw in place of the journal's.
    kind : str, optional
        Kind of text whose scores are drawn; all kinds decide.
    off : collection of int
        Layers that are switched off.
    drifts : dict, optional
        Layers that train just now, with the distance of the hidden state after them from the teacher's, where known.
    """
    path = journal.path_to(journal.head.step if step is None else step)
    here, title, stale = path[-1].layer_ids, "", ""
    if scores is not None:
        title = f"Measuring {scores.metric}, {int(scores.table['n'].max())} sequences so far"
    elif (found := last_measured(path)) is not None:
        scores = LayerScores.from_dict(found.result["scores"])
        title = f"Importance by {scores.metric}, step {found.step}"
        since = next((s for s in path[path.index(found) :] if s.action in CHANGES_STUDENT), None)
        stale = f"from step {found.step}, before {_change(since)}: measure again" if since else ""
    else:
        title = f"{len(here)} layers, not measured yet: measuring shows here how much each one matters"
    trained = {i for s in path if s.action == "distill" for i in s.args.get("trained", ())} & set(here)
    shown = scores.of_kind(kind) if scores is not None and kind in scores.kinds else scores
    marks = {"here": here, "trained": trained, "off": off, "current": not stale}
    columns = columns_of(journal.steps[0].layer_ids, scores, shown=shown, **marks)
    if drifts is not None:
        columns = [replace(c, trains=c.layer_id in drifts, drift=drifts.get(c.layer_id)) for c in columns]
    return Picture(
        columns,
        title + (f", on {kind} alone (all kinds suggest)" if shown is not scores else ""),
        unit_of(shown) if shown is not None else "",
        stale,
        scores.separation() if scores is not None and not stale else None,
        iterations(journal),
    )


def last_measured(path: list[Step]) -> Step | None:
    """The latest measure on a path, though the student may have changed since."""
    return next((s for s in reversed(path) if s.action == "measure"), None)


def iterations(journal: Journal) -> list[Row]:
    """A row for each removal of a run, in the order they were made; those that today's student does not have are undone."""
    here = {step.step for step in journal.path_to(journal.head.step)}
    ends: dict[int, Step] = {}  # removal -> the last step that stands on it
    quality: dict[int, str] = {}
    removal: dict[int, int] = {}  # step -> the removal that it stands on
    for step in journal.steps:
        at = step.step if step.action == "remove" else removal.get(-1 if step.parent is None else step.parent, -1)
        removal[step.step] = at
        if at >= 0 and step.action != "undo":
            ends[at] = step
        if step.action == "evaluate":
            found = step.result["evaluation"]
            quality[at] = f"perplexity {found['perplexity']:.2f}, KL {found['kl']:.4f}"
    return [
        _row(journal, journal.steps[at], end, quality.get(at, "not evaluated"), at not in here)
        for at, end in ends.items()
    ]


def _row(journal: Journal, step: Step, end: Step, quality: str, undone: bool) -> Row:
    before = journal.path_to(step.parent)
    latest = next((s for s in reversed(before) if s.action in ("measure", *CHANGES_STUDENT)), None)
    scores = dict.fromkeys(before[-1].layer_ids, math.nan)
    if latest is not None and latest.action == "measure":
        found: dict[str, Any] = latest.result["scores"]
        scores |= {i: math.nan if v is None else v for i, v in zip(found["layer_ids"], found["score"])}
    removed = step.args["layer_id"]
    words = f"layer {removed} removed; {len(step.layer_ids)} layers left; {quality}; step {end.step}"
    return Row(end.step, scores, removed, words + "; undone" * undone, undone)


def _change(step: Step) -> str:
    return f"layer {step.args['layer_id']} was removed" if step.action == "remove" else "the student was distilled"
