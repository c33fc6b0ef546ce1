"""Several hidden states go through a layer as one larger batch: on a GPU one call instead of many.

What a model hands to its layers is repeated where it has a batch dimension. Which of it has one is learned from the
model itself, at load, on two padded sequences, and proven there: a family for which it does not hold (a slope for each
head and sequence in one dimension, say) runs its branches one by one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ildlab.model.capture import Trunk

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Stacking:
    """Where in a layer's captured arguments tensors are: those with a batch dimension first, and the others."""

    batched: frozenset[tuple]
    fixed: frozenset[tuple]


def learned(stack: Any) -> Stacking | None:
    """How this model's layers take several states at once; None where they do not, or it cannot be told."""
    ids = stack.probe()  # [2, 7]
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    try:
        batched, fixed = set(), set()
        trunks = [stack.trunk(ids), stack.trunk({"input_ids": ids, "attention_mask": mask})]
        if "position_ids" in inspect.signature(stack.model.forward).parameters:  # as packed trees give them
            places = (mask.cumsum(1) - 1).clamp(min=0)
            trunks.append(stack.trunk({"input_ids": ids, "attention_mask": mask, "position_ids": places}))
        for call in (call for trunk in trunks for call in trunk.calls):
            for path, leaf in _leaves(call):
                (batched if leaf.dim() and leaf.shape[0] == len(ids) else fixed).add(path)
        found = Stacking(frozenset(batched), frozenset(fixed - batched))
        for trunk in trunks:
            other = trunk.h0.flip(0)  # another branch, so that one that took the other's place would show
            alone, together = [trunk.h0, other], [trunk.h0, other]
            for position in range(len(stack)):
                alone = [stack.run(position, hidden, trunk) for hidden in alone]
                together = run_together(stack, position, together, trunk, found)
            wrong = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(alone, together, strict=True))
            if not wrong <= (1e-5 if stack.model.dtype in (torch.float32, torch.float64) else 2e-2):
                return None
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return None  # as a family's layers say that they do not take it: one by one serves it
    return found


def run_together(
    stack: Any, position: int, states: Sequence[Tensor], trunk: Trunk, how: Stacking | None
) -> list[Tensor]:
    """Run the layer at `position` on several hidden states [B, T, d], in one call where that is proven."""
    size, count = len(states[0]), len(states)
    call = _repeated(trunk.calls[position], size, count, how) if how is not None and count > 1 else None
    if call is None:
        return [stack.run(position, hidden, trunk) for hidden in states]
    # A trunk of this one call, which `run` indexes by position.
    wide = Trunk(trunk.h0, {position: call}, None, trunk.input_ids)
    return list(stack.run(position, torch.cat(list(states)), wide).split(size))


def _leaves(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    """Every tensor in nested arguments, by path; TypeError at what could hold one unseen."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, (*path, key))
    elif isinstance(value, (tuple, list)):
        for number, each in enumerate(value):
            yield from _leaves(each, (*path, number))
    elif not isinstance(value, _PLAIN):
        raise TypeError(f"a {type(value).__name__} among a layer's arguments")


def _repeated(call: tuple[tuple, dict], size: int, count: int, how: Stacking) -> tuple[tuple, dict] | None:
    """Arguments for `count` times a batch of `size`; None where they are not such as were seen at load."""
    try:
        leaves = dict(_leaves(call))
    except TypeError:
        return None

    def seen(path: tuple, leaf: Tensor) -> bool:
        first = leaf.shape[0] if leaf.dim() else 1
        return first in (1, size) if path in how.batched else path in how.fixed and first != max(size, 2)

    def again(value: Any, path: tuple = ()) -> Any:
        if isinstance(value, Tensor):
            whole = path in how.batched and value.shape[0] == size
            return value.repeat(count, *[1] * (value.dim() - 1)) if whole else value
        if isinstance(value, dict):
            return {key: again(each, (*path, key)) for key, each in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(again(each, (*path, number)) for number, each in enumerate(value))
        return value

    return again(call) if all(seen(path, leaf) for path, leaf in leaves.items()) else None
