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
    if scope == "all":
        return ids
    name, reach = scope_parts(scope)
    if not gaps:
        raise DistillError(f"scope={scope!r} needs to know which layer was removed (gap): give it, or scope='all'.")
    chosen: set[int] = set()
    # Earlier gaps go on healing: every later removal changes what the layers above them should do.
    lowest = min({*gaps, *range(ids[-1])} - set(ids))
    for g in gaps if name != "suffix" else [lowest]:
        below = [i for i in ids if i < g]
        above = [i for i in ids if i > g]
        if name == "suffix":
            # Where the gap is at the very top, the layer below it is all that can take over.
            chosen.update(above + (below[-reach:] if reach else []) or below[-1:])
        else:
            chosen.update(below[-reach:] + above[:reach])
    return [i for i in ids if i in chosen]


def match_points(config: DistillConfig, student: LayerStack, trained: Sequence[int]) -> list[int]:
    """Layer ids after which hidden states are matched, bottom first; the last one always means h[L].

    A student's layer is matched with the teacher's of the same layer id. The student's last layer feeds
    the head, so it meets the teacher's last hidden state even where higher layers were removed.
    """
    if config.hidden_weight == 0:
        return []
    ids = student.layer_ids
    reached = ids[ids.index(trained[0]) :]  # below, no gradient would come of it
    if config.hidden_at == "last":
        points = {ids[-1]}
    elif config.hidden_at == "last_trainable+last":
        points = {trained[-1], ids[-1]}
    elif config.hidden_at == "all":
        points = set(reached)
    else:
        points = set(config.hidden_at)
        wrong = [i for i in points if i not in reached]
        if wrong or not points:
            raise DistillError(
                f"hidden_at={list(config.hidden_at)}: no gradient reaches layers {wrong}; choose among {reached}."
            )
    found = [i for i in ids if i in points]
    check_reach(config, found, trained)
    return found


def check_reach(config: DistillConfig, points: Sequence[int], trained: Sequence[int]) -> None:
    """Raise DistillError where a layer would train that no term of the loss reaches."""
    if config.kl_weight or config.ce_weight or not points:
        return
    beyond = [i for i in trained if i > max(points)]
    if beyond:
        raise DistillError(
            f"Layers {beyond} lie above the last matched hidden state (layer {max(points)}), and there is no divergence: "
            "nothing would train them. Leave them out of the scope, or match a higher layer."
        )
