"""The head: the one place where hidden states become logits, log-probabilities, NLL and KL.

Everything over the vocabulary is computed in fp32 log space (fp64 where that is what comes in), a chunk of positions
at a time, so that logits of a whole batch, [B, T, V], never exist. Logits are the model's own: `LayerStack.logits`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ildlab.model.stack import LayerStack

CPU_CHUNK = 48 * 2**20  # bytes of fp32 logits: larger chunks fall out of a CPU's cache
LEAST_CHUNK, MOST_CHUNK = 64 * 2**20, 2**30  # bytes on a device of its own memory, however much of it is free
HELD = 8  # tensors of the size of a chunk's logits that may exist at one time, allocator's slack included


def chunk_rows(stack: LayerStack) -> int:
    """Positions whose logits are made at one time, by the device: as many as its cache, or its free memory, holds."""
    budget = CPU_CHUNK
    if stack.device.type == "cuda":
        # A chunk that was sized for a CPU's cache would call the head thousands of times for a large vocabulary.
        free, _ = torch.cuda.mem_get_info(stack.device)
        budget = min(max(free // HELD, LEAST_CHUNK), MOST_CHUNK)
    vocabulary = stack.model.get_input_embeddings().weight.shape[0]
    return max(1, budget // (4 * vocabulary))


def wide(x: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


def in_fp64(x: Tensor) -> Tensor:
    """In fp64, or in fp32 where the device has no fp64 (MPS)."""
    return x.float() if x.device.type == "mps" else x.double()


def log_probabilities(logits: Tensor, *, in_place: bool = False) -> Tensor:
    """log p [..., V] of logits [..., V] in any floating dtype; fp32 (or fp64). In place, they may lose their values."""
    logits = wide(logits)
    # On a CPU in fp32, torch's log_softmax adds up a large vocabulary with an error of 3e-5; logsumexp does not.
    return torch.sub(logits, logits.logsumexp(-1, keepdim=True), out=logits if in_place else None)


def kl_per_token(loga: Tensor, logb: Tensor) -> Tensor:
    """KL(a || b) [...] in nats, from log-probabilities [..., V].

    `- a + b` sums to 0 but for rounding; with it, an error in either normaliser (about 1e-6 in fp32, which
    is what is left of a logsumexp near 20) cancels to first order instead of adding to the result.
    """
    a = loga.exp()
    return (a * (loga - logb) - a + logb.exp()).sum(-1)


def nll_per_token(logp: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood [n] of `targets` [n] int64 under log-probabilities [n, V]."""
    return -logp.gather(1, targets[:, None])[:, 0]


@torch.no_grad()
def branch_nll(stack: LayerStack, hidden: Sequence[Tensor], targets: Tensor) -> Tensor:
    """NLL [len(hidden), n] in nats of `targets` [n] int64 by several variants of a model.

    `hidden` holds the final hidden states h[L], pre-norm, [n, d], of each variant.
    """
    return _by_chunks(
        stack, len(targets), lambda part: [nll_per_token(_log_q(stack, h, part), targets[part]) for h in hidden]
    )


@torch.no_grad()
def branch_kl(stack: LayerStack, hidden: Sequence[Tensor], teacher: LayerStack, teacher_hidden: Tensor) -> Tensor:
    """KL(teacher || variant) [len(hidden), n] in nats for several variants of a model.

    `hidden` and `teacher_hidden` [n, d] are as in `branch_nll`; the teacher's head is paid once for all variants.
    """

    def chunk(part: slice) -> list[Tensor]:
        logp = _log_q(teacher, teacher_hidden, part).to(stack.device)
        p = logp.exp()
        entropy = logp.mul_(p).sum(-1)  # sum of p log p: [chunk]
        return [entropy - _log_q(stack, h, part).mul_(p).sum(-1) for h in hidden]

    return _by_chunks(stack, len(teacher_hidden), chunk)


@torch.no_grad()
def beside_teacher(
    student: LayerStack, teacher: LayerStack, hidden: Tensor, teacher_hidden: Tensor, targets: Tensor
) -> Tensor:
    """What a student's predictions are worth beside its teacher's, token by token.

    `hidden` and `teacher_hidden` are final hidden states [n, d], pre-norm; one and the same tensor means one and the
    same model (`both_final`). `targets` is [n] int64.

    Returns
    -------
    Tensor [4, n]
        NLL of the student and of the teacher, KL(teacher || student), and 1 where both find the same token likeliest.
    """

    def chunk(part: slice) -> list[Tensor]:
        gold = targets[part]
        theirs = _log_q(teacher, teacher_hidden, part).to(student.device)
        nll = nll_per_token(theirs, gold)
        if hidden is teacher_hidden:
            return [nll, nll, torch.zeros_like(nll), torch.ones_like(nll)]
        mine = _log_q(student, hidden, part)
        same = (mine.argmax(-1) == theirs.argmax(-1)).to(nll.dtype)
        return [nll_per_token(mine, gold), nll, kl_per_token(theirs, mine), same]

    return _by_chunks(student, len(targets), chunk)


def _log_q(stack: LayerStack, hidden: Tensor, part: slice) -> Tensor:
    # Nobody else has these logits; a copy of them takes a tenth of the head's time.
    return log_probabilities(stack.logits(hidden[part]), in_place=True)


def _by_chunks(stack: LayerStack, n: int, rows_of) -> Tensor:
    """Stack what `rows_of(slice)` -> list of Tensor [chunk] gives for all chunks of n positions: [len(list), n]."""
    step = chunk_rows(stack)
    return torch.cat([torch.stack(rows_of(slice(s, s + step))) for s in range(0, n, step)], dim=1)
