"""What student and teacher have in common runs once: their bottom layers, up to the first that differs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ildlab.model.capture import Trunk
from ildlab.model.stack import LayerStack


def shared_prefix(student: LayerStack, teacher: LayerStack) -> int:
    """Count the bottom layers that student and teacher have in common, ids and weights alike.

    Their hidden states are equal there, so that one pass serves both. It is 0 where anything outside the layers
    differs (embedding, final norm, head): such a student shares nothing that could be left out.
    """
    outside = _outside(student), _outside(teacher)
    if outside[0].keys() != outside[1].keys() or not all(_one(t, outside[1][name]) for name, t in outside[0].items()):
        return 0
    count = 0
    for mine, theirs, my_id, their_id in zip(student.layers, teacher.layers, student.layer_ids, teacher.layer_ids):
        pairs = zip(mine.parameters(), theirs.parameters(), strict=True)
        if my_id != their_id or not all(_one(a, b) for a, b in pairs):
            break
        count += 1
    return count


def _outside(stack: LayerStack) -> dict[str, Tensor]:
    """Parameters that belong to no layer, by name."""
    within = {id(p) for p in stack.layers.parameters()}
    return {name: p for name, p in stack.model.named_parameters() if id(p) not in within}


def _one(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory; an offloaded one (meta) has no address."""
    return a is b or (a.device.type != "meta" and a.device == b.device and a.data_ptr() == b.data_ptr())


@torch.no_grad()
def both_final(student: LayerStack, teacher: LayerStack, batch: Any) -> tuple[Tensor, Tensor, Trunk]:
    """Final hidden states of student and teacher, their common bottom layers run once.

    Returns
    -------
    student's h[L], teacher's h[L] : Tensor [B, T, d], pre-norm
        One and the same tensor where the two do not differ.
    Trunk
        The teacher's.
    """
    common = shared_prefix(student, teacher)
    theirs = teacher.trunk(batch)
    if common == 0:
        return student.final(batch), teacher.final(theirs), theirs
    hidden = theirs.h0
    for position in range(common):
        hidden = teacher.run(position, hidden, theirs)
    ours, reference = hidden, hidden
    for position in range(common, len(teacher)):
        reference = teacher.run(position, reference, theirs)
    if common < len(student):
        mine = student.trunk(batch)
        for position in range(common, len(student)):
            ours = student.run(position, ours, mine)
    return ours, reference, theirs
