"""One-pass importance of every layer from its input and output hidden states, streaming.

No metric here keeps more than one batch's hidden states or touches the LM head (`taylor` aside).
Everything is accumulated in fp32 on the device; one copy to the host a batch.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from .offload import is_offloaded, resident
from .parallel import Halving, rounds, world
from .progress import Progress
from .samples import Rows
from .scores import LayerScores, Samples
from .stack import LayerStack


def unit(hidden: Tensor) -> Tensor:
    """Hidden states [..., d] in fp32, each divided by its norm."""
    hidden = hidden.float()
    return hidden / torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the valid tokens of values [B, T]: [B]."""
    if mask is None:
        return values.mean(1)
    mask = mask.bool()
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1)


def block_influence(before: Tensor, after: Tensor, mask: Tensor | None = None) -> Tensor:
    """Block Influence of one layer: 1 - mean cosine of its input and output over tokens.

    ShortGPT (Men et al. 2024, arXiv 2403.03853), eq. 1. From unit vectors u, v as |u - v|^2 / 2,
    which loses no digits where the cosine is near 1.

    Parameters
    ----------
    before, after : Tensor [B, T, d]
    mask : Tensor [B, T], optional

    Returns
    -------
    Tensor [B] float32
    """
    return token_mean((unit(after) - unit(before)).square().sum(-1) / 2, mask)


def angle(u: Tensor, v: Tensor) -> Tensor:
    """Angle between unit vectors [..., d], over pi: in [0, 1]. Kahan's form, exact near 0 and near pi."""
    return (
        2
        / torch.pi
        * torch.atan2(torch.linalg.vector_norm(u - v, dim=-1), torch.linalg.vector_norm(u + v, dim=-1))
    )


def _square_error(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).square().mean(-1)


def _relative(before: Tensor, after: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm
    return norm(after - before, dim=-1) / norm(before, dim=-1)


# metric -> (what is made once of each hidden state, what two neighbours give for each token)
_PAIRWISE = {
    "block_influence": (unit, lambda u, v: (v - u).square_().sum(-1).mul_(0.5)),
    "angular_distance": (unit, angle),
    "mse": (Tensor.float, _square_error),
    "relative_l2": (Tensor.float, _relative),
}


@torch.no_grad()
def _pairwise(student: LayerStack, batches: list, metric: str) -> Tensor:
    """Values [rows, L] of the metrics that compare a layer's input with its output; layer-outer."""
    make, compare = _PAIRWISE[metric]
    trunks = [student.trunk(batch) for batch in batches]
    hidden = [trunk.h0 for trunk in trunks]
    made = [make(h) for h in hidden]
    columns: list[list[Tensor]] = [[] for _ in batches]
    for q, layer in enumerate(student.layers):
        with resident(layer):
            for b, trunk in enumerate(trunks):
                hidden[b] = student.run(q, hidden[b], trunk)
                now = make(hidden[b])
                columns[b].append(token_mean(compare(made[b], now), trunk.attention_mask))
                made[b] = now
    return torch.cat([torch.stack(column, 1) for column in columns])


def one_pass_steps(
    student: LayerStack,
    rows: Rows,
    metric: str,
    *,
    positions: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    confidence: float = 0.95,
    max_branch_bytes: int = 2 * 2**30,
) -> Generator[Progress, None, LayerScores]:
    """Score all layers by a one-pass metric; `ildlab.measure` documents the common arguments.

    Parameters
    ----------
    max_branch_bytes : int
        With offloaded layers: memory for the hidden states of the sequences that go through each
        layer while it is loaded.
    """

    def job(picked: np.ndarray) -> Tensor:
        parts = [picked[i : i + batch_size] for i in range(0, len(picked), batch_size)]
        values = _pairwise(student, [rows.batch(part) for part in parts], metric)
        weights = torch.full((len(picked), 1), rows.tokens.shape[1], device=values.device, dtype=values.dtype)
        if rows.mask is not None:
            weights[:, 0] = rows.mask[torch.as_tensor(picked)].sum(1).to(values.device)
        return torch.cat([values, weights], 1)

    total, done, group = len(rows.tokens), 0, batch_size
    if is_offloaded(student.layers):
        one = rows.tokens.shape[1] * student.hidden_size * (student.model.dtype.itemsize + 4) * 2
        group = max(batch_size, min(total, max_branch_bytes // one))
    run = Halving(job, group)
    samples = Samples(metric, rows.source, student.layer_ids, total, confidence)
    samples.details |= {"batch_size": batch_size, "ranks": world()[1], "notes": run.notes}
    for picked, values in rounds(total, group, run):
        samples.add(picked, student.layer_ids, values[:, :-1], values[:, -1])
        done += len(picked)
        if done < total:
            yield Progress(
                done, total, run.notes[-1] if run.notes else "", samples.scores() if done > 1 else None
            )
    scores = samples.scores()
    yield Progress(total, total, "", scores)
    return scores
