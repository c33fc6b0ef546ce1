"""One-pass importance of every layer from its input and output hidden states, streaming.

No metric here keeps more than one batch's hidden states or touches the LM head (`taylor` aside).
Everything is accumulated in fp32 on the device; one copy to the host a batch.
"""

from __future__ import annotations

import time
from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor, nn

from ildlab.errors import MeasureError
from ildlab.importance.batches import Halving, rounds, world
from ildlab.importance.samples import Positions, Rows, Samples
from ildlab.importance.scores import LayerScores
from ildlab.model.capture import Trunk
from ildlab.model.head import chunk_rows, log_probabilities, nll_per_token
from ildlab.model.offload import is_offloaded, resident
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress


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
    return 2 / torch.pi * torch.atan2(torch.linalg.vector_norm(u - v, dim=-1), torch.linalg.vector_norm(u + v, dim=-1))


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
def _pairwise(student: LayerStack, batches: list, metric: str, tokens: str) -> Tensor:
    """Values [rows, L] of the metrics that compare a layer's input with its output; layer-outer."""
    make, compare = _PAIRWISE[metric]
    trunks = [student.trunk(batch) for batch in batches]
    masks = [last_token(trunk) if tokens == "last" else trunk.attention_mask for trunk in trunks]
    hidden = [trunk.h0 for trunk in trunks]
    made = [make(h) for h in hidden]
    columns: list[list[Tensor]] = [[] for _ in batches]
    for q, layer in enumerate(student.layers):
        with resident(layer):
            for b, trunk in enumerate(trunks):
                hidden[b] = student.run(q, hidden[b], trunk)
                now = make(hidden[b])
                columns[b].append(token_mean(compare(made[b], now), masks[b]))
                made[b] = now
    return torch.cat([torch.stack(column, 1) for column in columns])


def last_token(trunk: Trunk) -> Tensor:
    """Mask [B, T] of the last valid token of each sequence."""
    mask = trunk.attention_mask if trunk.attention_mask is not None else torch.ones_like(trunk.input_ids)
    place = torch.arange(mask.shape[1], device=mask.device)
    return place == torch.where(mask.bool(), place, -1).amax(1, keepdim=True)


_QUERY = ("q_proj", "query", "wq", "q_lin", "to_q", "query_proj")


def _query_projection(student: LayerStack, position: int) -> nn.Linear:
    found = [
        module
        for name, module in student.layers[position].named_modules()
        if name.rpartition(".")[2] in _QUERY and isinstance(module, nn.Linear)
    ]
    if len(found) != 1:
        raise MeasureError(
            f"The metric 'lrp' reads the query projection of each layer; layer {student.layer_ids[position]} of "
            f"{type(student.model).__name__} has {len(found) or 'none'} of its own (queries, keys and values may be "
            "fused into one matrix, or the layer has no attention). Choose another metric."
        )
    return found[0]


@torch.no_grad()
def _lrp(student: LayerStack, batches: list, epsilon: float) -> Tensor:
    """Values [rows, L] of the epsilon-rule relevance through the query projections; layer-outer."""
    queries = [_query_projection(student, q) for q in range(len(student))]
    trunks = [student.trunk(batch) for batch in batches]
    hidden = [trunk.h0 for trunk in trunks]
    columns: list[list[Tensor]] = [[] for _ in batches]
    met: list[tuple[Tensor, Tensor]] = []
    for q, query in enumerate(queries):
        hook = query.register_forward_hook(lambda module, args, out: met.append((args[0], out)))
        try:
            with resident(student.layers[q]):
                weight = query.weight.float()
                for b, trunk in enumerate(trunks):
                    hidden[b] = student.run(q, hidden[b], trunk)
                    x, z = met.pop()
                    z = z.float()
                    share = z / (z.abs() + epsilon)  # |z| / (z + epsilon sign z)
                    relevance = x.float() * (share @ weight)
                    columns[b].append(token_mean(relevance.abs().sum(-1), trunk.attention_mask))
        finally:
            hook.remove()
    return torch.cat([torch.stack(column, 1) for column in columns])


@torch.enable_grad()
def _taylor(student: LayerStack, batch, places: Positions, chunk: int) -> Tensor:
    """Values [rows, L]: first-order increase of the mean NLL where a layer's update is dropped."""
    trunk = student.trunk(batch)
    hidden = [trunk.h0.detach().requires_grad_()]
    for q in range(len(student)):
        hidden.append(student.run(q, hidden[-1], trunk))
    final = places.take(hidden[-1].detach()).requires_grad_()
    for s in range(0, len(final), chunk):
        # The graph of one chunk of logits at a time.
        nll = nll_per_token(log_probabilities(student.logits(final[s : s + chunk])), places.targets[s : s + chunk])
        torch.where(places.valid.flatten()[s : s + chunk], nll, 0.0).sum().backward()
    scored = places.take(hidden[-1])
    gradients = torch.autograd.grad(scored, hidden[1:], final.grad)
    with torch.no_grad():
        effects = [
            -(g.float() * (after - before).float()).sum((1, 2))
            for g, before, after in zip(gradients, hidden, hidden[1:], strict=False)
        ]
        return torch.stack(effects, 1) / places.weights[:, None]


@torch.no_grad()
def _magnitude(student: LayerStack) -> list[float]:
    """Sum of |w| over the weight matrices of each layer."""
    sums = []
    for layer in student.layers:
        with resident(layer):
            parts = [p.abs().sum(dtype=torch.float32) for p in layer.parameters() if p.dim() >= 2]
            sums.append(
                torch.stack(parts).double().sum() if parts[0].device.type != "mps" else torch.stack(parts).sum()
            )
    return [float(v) for v in torch.stack(sums).cpu()]


def one_pass_steps(
    student: LayerStack,
    rows: Rows,
    metric: str,
    *,
    positions: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    confidence: float = 0.95,
    tokens: str = "all",
    epsilon: float = 1e-6,
    max_branch_bytes: int = 2 * 2**30,
) -> Generator[Progress, None, LayerScores]:
    """Score all layers without an ablation; `ildlab.measure` documents the common arguments.

    With x[t] = h[l] and y[t] = h[l+1] of token t (y before the final norm, also for the last layer),
    means over the valid tokens:

    - `block_influence`: 1 - cos(x, y). ShortGPT (Men et al. 2024, arXiv 2403.03853), eq. 1.
    - `angular_distance`: arccos(cos(x, y)) / pi. Gromov et al. 2024 (arXiv 2403.17887), eq. 8; they
      read the last token alone (`tokens="last"`). Blocks of n layers: `ildlab.importance.hidden_states.block_distances`.
    - `mse`: mean over the width of (y - x)^2, the second score of the method's reference code.
    - `relative_l2`: |y - x| / |x|.
    - `lrp`: sum over the inputs of |x_i sum_k w_ki |z_k| / (z_k + epsilon sign z_k)|, where z = W x + b
      is the query projection: the epsilon rule (Bach et al. 2015; Montavon et al. 2019, eq. 10.2)
      with |z| as the relevance to hand down, which the reference code means to compute.
    - `taylor`: -<dNLL/dy, y - x>, summed over the tokens, for a mean NLL over the scored positions:
      the first-order increase of the loss where the layer's update is dropped (Molchanov et al. 2017,
      arXiv 1611.06440, for a layer's residual update). Signed; one forward and one backward pass.
    - `magnitude`: sum of |w| over the layer's weight matrices (Li et al. 2017; "Magnitude" of Kim et
      al. 2024, arXiv 2402.02834). Reads no text, has no interval.

    Parameters
    ----------
    tokens : {"all", "last"}
        For the metrics of x and y: every valid token, or only the last of each sequence.
    epsilon : float
        Of the epsilon rule.
    max_branch_bytes : int
        With offloaded layers: memory for the hidden states of the sequences that go through each
        layer while it is loaded.
    """
    if tokens not in ("all", "last"):
        raise MeasureError(f"tokens={tokens!r}: 'all' or 'last'.")
    if metric == "magnitude":
        started = time.perf_counter()
        sums = _magnitude(student)
        scores = LayerScores.exact(metric, "weights", student.layer_ids, sums, seconds=time.perf_counter() - started)
        yield Progress(1, 1, "", scores)
        return scores
    if metric == "lrp":
        for q in range(len(student)):
            _query_projection(student, q)  # refuse before any work
    places = Positions.sample(rows, positions, seed, predict=True) if metric == "taylor" else None

    def job(picked: np.ndarray) -> Tensor:
        parts = [picked[i : i + batch_size] for i in range(0, len(picked), batch_size)]
        if places is not None:
            mine = [places.of(part, student.device) for part in parts]
            chunk = chunk_rows(student)
            values = [_taylor(student, rows.batch(p), m, chunk) for p, m in zip(parts, mine, strict=True)]
            return torch.cat([torch.cat(values), torch.cat([m.weights for m in mine])[:, None]], 1)
        batches = [rows.batch(part) for part in parts]
        values = _lrp(student, batches, epsilon) if metric == "lrp" else _pairwise(student, batches, metric, tokens)
        count = torch.full((len(picked), 1), rows.tokens.shape[1], device=values.device, dtype=values.dtype)
        if tokens == "last":
            count.fill_(1)
        elif rows.mask is not None:
            count = rows.mask[torch.as_tensor(picked)].sum(1, keepdim=True).to(count)
        return torch.cat([values, count], 1)

    total, done, group = len(rows.tokens), 0, batch_size
    if is_offloaded(student.layers) and metric != "taylor":
        one = rows.tokens.shape[1] * student.hidden_size * (student.model.dtype.itemsize + 4) * 2
        group = max(batch_size, min(total, max_branch_bytes // one))
    run = Halving(job, group)
    samples = Samples(metric, rows.source, student.layer_ids, total, confidence)
    samples.details |= {"batch_size": batch_size, "ranks": world()[1], "notes": run.notes}
    if places is not None:
        samples.details |= {"positions": positions, "seed": seed}
    for picked, values in rounds(total, group, run):
        samples.add(picked, student.layer_ids, values[:, :-1], values[:, -1])
        done += len(picked)
        if done < total:
            yield Progress(done, total, run.notes[-1] if run.notes else "", samples.scores() if done > 1 else None)
    scores = samples.scores()
    yield Progress(total, total, "", scores)
    return scores
