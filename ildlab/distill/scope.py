"""Which layers train, and after which of them hidden states are matched."""

from __future__ import annotations

from collections.abc import Sequence

from ildlab.distill.config import DistillConfig, scope_parts
from ildlab.errors import DistillError
from ildlab.model.stack import LayerStack


def resolve_scope(scope: str | Sequence[int], student: LayerStack, gap: int | Sequence[int]) -> list[int]:
    """Layer ids that train, bottom first.

    Parameters
    ----------
    scope : str or sequence of int
        See `DistillConfig.scope`.
    student : LayerStack
        Already without the removed layers.
    gap : int or sequence of int
        The layer ids just removed.

    Raises
    ------
    DistillError
        An unknown scope, a layer that is not in the student, or a scope around a gap where there is none.
    """
    ids = student.layer_ids
    gaps = sorted({gap} if isinstance(gap, int) else set(gap))
    still = [g for g in gaps if g in ids]
    if still:
        raise DistillError(f"Layer {still[0]} is named as a gap, but it is still in the student: remove it first.")
    if not isinstance(scope, str):
        missing = [i for i in scope if i not in ids]
        if missing or not scope:
            raise DistillError(f"scope={list(scope)}: layers {missing or 'none'} cannot train; the student has {ids}.")
        return sorted(set(scope), key=ids.index)
    name, reach = scope_parts(scope)
    if name == "all":
        return ids
    if not gaps:
        raise DistillError(f"scope={scope!r} needs to know which layer was removed (gap): give it, or scope='all'.")
    if name == "suffix":
        # Earlier gaps go on healing: every later removal changes what the layers above them should do.
        lowest = min({*gaps, *range(ids[-1])} - set(ids))
        below, above = [i for i in ids if i < lowest], [i for i in ids if i > lowest]
        # Where the gap is at the very top, the layer below it is all that can take over.
        return (below[-reach:] if reach else []) + above or below[-1:]
    chosen: set[int] = set()
    for g in gaps:
        chosen.update([i for i in ids if i < g][-reach:] + [i for i in ids if i > g][:reach])
    return [i for i in ids if i in chosen]


def match_points(config: DistillConfig, student: LayerStack, trained: Sequence[int]) -> list[int]:
    """Layer ids after which hidden states are matched, bottom first: the last that trains, and the student's last.

    A student's layer is matched with the teacher's of the same layer id. The student's last layer feeds
    the head, so it meets the teacher's last hidden state even where higher layers were removed.
    """
    return sorted({trained[-1], student.layer_ids[-1]}, key=student.position) if config.hidden_weight else []


def runs(student: LayerStack, trained: Sequence[int]) -> dict[int, int]:
    """Runs of layers that train and follow each other in the student: the last one's id -> the first one's position."""
    found: dict[int, int] = {}
    start = before = None
    for layer_id in trained:
        position = student.position(layer_id)
        if before is not None and position == student.position(before) + 1:
            del found[before]
        else:
            start = position
        found[layer_id], before = start, layer_id
    return found
