"""What each optimizer step trains on: rows and sampled positions, both functions of (seed, step) alone.

Any process can make the batch of any step: resuming takes an integer, and several processes agree without a word.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ildlab.distill.config import DistillConfig
from ildlab.text.rows import Rows


@dataclass(frozen=True)
class Counts:
    """Tokens of the whole global batch that the sums of each term are divided by."""

    hidden: int
    kl: int
    ce: int


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step's sequences, over all processes."""

    step: int
    rows: Tensor  # [B] int64, of the text
    positions: Tensor | None  # [B, P] int64 where divergence and cross entropy are computed; None: everywhere
    counts: Counts

    def parts(self, rank: int, world: int, size: int | None) -> list[list[int]]:
        """Places in this batch that a process runs, a micro-batch of at most `size` a list."""
        mine = list(range(rank, len(self.rows), world))
        size = size or len(mine)
        return [mine[i : i + size] for i in range(0, len(mine), size)]


def global_batch(step: int, text: Rows, config: DistillConfig) -> GlobalBatch:
    """The batch of a step, counted from 0."""
    rows = row_order(step, len(text.tokens), config)
    mask = torch.ones(len(rows), text.tokens.shape[1]) if text.mask is None else text.mask[rows].float()  # [B, T]
    positions = _positions(step, mask, config)
    return GlobalBatch(step, rows, positions, _counts(mask, positions, config))


def row_order(step: int, count: int, config: DistillConfig) -> Tensor:
    """Rows [B] of a step's global batch: permutations of the text, one after another, cut to batches."""
    wanted = range(step * config.batch_size, (step + 1) * config.batch_size)
    epochs = {place // count for place in wanted}
    orders = {e: torch.randperm(count, generator=_generator(config.seed or 0, e)) for e in epochs}
    return torch.stack([orders[place // count][place % count] for place in wanted])  # [B]


def _positions(step: int, mask: Tensor, config: DistillConfig) -> Tensor | None:
    """Positions [B, P] drawn from those of a mask [B, T]."""
    if config.kl_positions is None or config.kl_positions >= mask.shape[1]:
        return None
    draw = torch.rand(mask.shape, generator=_generator(config.seed or 0, step, 7))  # [B, T]
    draw = draw.masked_fill(mask == 0, -1.0)  # padding only where nothing else is left
    return draw.topk(config.kl_positions, dim=1).indices.sort(dim=1).values  # [B, T] -> [B, P]


def _counts(mask: Tensor, positions: Tensor | None, config: DistillConfig) -> Counts:
    """Tokens that count in each term, of a mask [B, T] and sampled positions [B, P]."""
    if config.reduction == "paper":  # where padding counts as well
        return Counts(mask.numel(), mask.numel(), 1)
    hidden, labelled = mask.sum(), has_next(mask)
    if positions is not None:
        mask, labelled = mask.gather(1, positions), labelled.gather(1, positions)  # [B, T] -> [B, P]
    return Counts(max(1, int(hidden)), max(1, int(mask.sum())), max(1, int(labelled.sum())))


def has_next(mask: Tensor) -> Tensor:
    """1 where a valid token is followed by one: [B, T]; the last of a block has no label."""
    return mask * torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)  # [B, T-1] + [B, 1]


def _generator(*numbers: int) -> torch.Generator:
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(mixed)
