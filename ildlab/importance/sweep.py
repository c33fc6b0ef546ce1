"""The trunk-shared sweep: the model without each layer in turn, its bottom layers run once.

Skipping layer l leaves the layers below it as they were. Going down the stack once, each branch starts from the
trunk's own hidden state h[l] and runs only the layers above l: the same numbers as L separate runs, bit for bit, for
L·(L+1)/2 layer passes instead of L·(L-1). Everything here is layer-outer, batch-inner: a layer is visited once for all
batches and branches, which is what a model with offloaded layers needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ildlab.model.capture import Trunk
from ildlab.model.offload import is_offloaded, resident
from ildlab.model.stack import LayerStack
from ildlab.model.stacked import run_together

MOST_TOGETHER = 2**16  # tokens in one call of a layer: more do not make a GPU busier
LAYER_TENSORS = 8  # of the width of a layer's widest weight, for each token, that exist while it runs


def tokens_together(student: LayerStack) -> int:
    """Tokens of several branches that a layer takes in one call; 0, each branch by itself, but on CUDA.

    On a CPU a larger batch gains little, since products fill the cores as they are, and less than its proof takes at load.
    """
    if student.device.type != "cuda" or student.stacking is None:
        return 0
    free, _ = torch.cuda.mem_get_info(student.device)
    widest = max(max(p.shape) for p in student.layers[0].parameters())
    return min(MOST_TOGETHER, free // (LAYER_TENSORS * widest * student.model.dtype.itemsize))


def _advance(
    stack: LayerStack, q: int, trunks: Sequence[Trunk], moving: Sequence[list[Tensor]], together: int = 0
) -> None:
    """Run the layer at position q, while it is loaded, on all of these states in place: a [B, T, d] a batch each."""
    with resident(stack.layers[q]) if moving else contextlib.nullcontext():
        for b, trunk in enumerate(trunks):
            size = max(1, together // trunk.input_ids.numel())
            for part in (moving[i : i + size] for i in range(0, len(moving), size)):
                outs = run_together(stack, q, [states[b] for states in part], trunk, stack.stacking)
                for states, out in zip(part, outs, strict=True):
                    states[b] = out


def climb(
    stack: LayerStack, trunks: Sequence[Trunk], hidden: Sequence[Tensor] | None = None, start: int = 0
) -> Iterator[list[Tensor]]:
    """Run the layers from h[start] (`hidden`, one [B, T, d] a batch), each for all batches while it is loaded.

    Yields h[start + 1], h[start + 2], ... of every batch, the same list each time.
    """
    hidden = [trunk.h0 for trunk in trunks] if hidden is None else list(hidden)
    for q in range(start, len(stack)):
        _advance(stack, q, trunks, [hidden])
        yield hidden


def rows_at_once(student: LayerStack, total: int, batch_size: int, row_bytes: int, max_bytes: int) -> int:
    """Rows that go through each layer together: a batch, or where layers are offloaded as many as fit in memory."""
    return max(batch_size, min(total, max_bytes // row_bytes)) if is_offloaded(student.layers) else batch_size


@torch.no_grad()
def branches(
    student: LayerStack,
    trunks: Sequence[Trunk],
    layer_ids: Sequence[int] | None = None,
    *,
    max_branch_bytes: int = 2 * 2**30,
    reach: int = 0,
    on_trunk: Callable[[int, list[Tensor]], None] = lambda q, hidden: None,
    count: Callable[[int], None] = lambda passes: None,
) -> Iterator[tuple[list[int], list[list[Tensor]]]]:
    """Yield the final hidden states of the student without each layer, wave by wave.

    Parameters
    ----------
    trunks, layer_ids : sequence of Trunk, of int
        One for each batch; and the layers to skip, one at a time (all by default).
    max_branch_bytes : int
        Memory for the hidden states of trunk and branches, which else go in waves, of at least one branch.
    reach : int
        Carry the trunk at least to h[reach] (`len(student)`: to the whole student's output).
    on_trunk : callable(position q, h[q] of each batch), optional
        Sees the trunk's hidden states as they come; the list is the same each time.
    count : callable(int), optional
        Told the layer passes as they are run (one pass: one layer, one batch).

    Yields
    ------
    (layer ids, hidden)
        `hidden[i][b]` is h[L] [B, T, d], pre-norm, of batch b without `layer ids[i]`. Bottom first.
    """
    ids = student.layer_ids if layer_ids is None else layer_ids
    alive = sorted(student.position(layer_id) for layer_id in ids)
    trunk = [t.h0 for t in trunks]  # h[at] of each batch, [B, T, d]
    fits = max(1, max_branch_bytes // sum(h.nbytes for h in trunk) - 1)
    waves = [alive[i : i + fits] for i in range(0, len(alive), fits)] or [[]]
    together, at = tokens_together(student), 0  # the trunk stands at h[at]
    on_trunk(at, trunk)
    for wave in waves:
        goal = max(wave[-1] if wave else 0, reach if wave is waves[-1] else 0)
        going: dict[int, list[Tensor]] = {}  # skipped position -> the branch's states, [B, T, d] a batch
        for q in range(at, len(student)):
            moving = [*going.values()]
            if q in wave:
                going[q] = list(trunk)  # the branch stands at h[q], and skips what the others now run
            with resident(student.layers[q]) if moving or q < goal else contextlib.nullcontext():
                _advance(student, q, trunks, moving, together)
                # By itself: a part of a larger tensor would keep the whole of it for whomever `on_trunk` hands it to.
                _advance(student, q, trunks, [trunk] if q < goal else [])
            count(len(trunks) * (len(moving) + (q < goal)))
            if q < goal:
                at = q + 1
                on_trunk(at, trunk)
        if wave:
            final = [going[p] for p in wave]
            going, moving = {}, []  # so that the caller alone decides how long they live
            yield [student.layer_ids[p] for p in wave], final
