"""One-pass importance of every layer from its input and output hidden states, streaming.

With x = h[l] and y = h[l+1] of a token (y before the final norm, also for the last layer), means over the valid tokens:

- `block_influence`: 1 - cos(x, y). ShortGPT (Men et al. 2024, arXiv 2403.03853), eq. 1.
- `angular_distance`: arccos(cos(x, y)) / pi. Gromov et al. 2024 (arXiv 2403.17887), eq. 8, who read the last token
  alone. Blocks of n layers: `ildlab.importance.hidden_states.block_distances`.
- `mse`: mean over the width of (y - x)^2, the second score of the method's reference code.
- `relative_l2`: |y - x| / |x|.
- `lrp`: sum over the inputs of |x_i sum_k w_ki |z_k| / (z_k + epsilon sign z_k)|, where z = W x + b is the query
  projection: the epsilon rule (Bach et al. 2015; Montavon et al. 2019, eq. 10.2) with |z| as the relevance to hand
  down, which the reference code means to compute.
- `taylor`: -<dNLL/dy, y - x>, summed over the tokens, for a mean NLL over the scored positions: the first-order
  increase of the loss where the layer's update is dropped (Molchanov et al. 2017, arXiv 1611.06440, for a layer's
  residual update). Signed.
- `magnitude`: sum of |w| over the layer's weight matrices (Li et al. 2017; "Magnitude" of Kim et al. 2024,
  arXiv 2402.02834). Reads no text, has no interval.

No more than one batch's hidden states are kept, and none but `taylor` touches the LM head. Everything is accumulated in
fp32 on the device; one copy to the host a batch.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor, nn

from ildlab.errors import MeasureError
from ildlab.importance.config import MeasureConfig
from ildlab.importance.samples import Collector, Positions, SmallerOnOOM, rounds
from ildlab.importance.scores import LayerScores
from ildlab.importance.sweep import climb, rows_at_once
from ildlab.model.capture import sent
from ildlab.model.head import chunk_rows, in_fp64, log_probabilities, nll_per_token
from ildlab.model.offload import resident
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, Work
from ildlab.text.rows import Rows

EPSILON = 1e-6  # of the epsilon rule
QUERY = ("q_proj", "query", "wq", "q_lin", "to_q", "query_proj")


def one_pass_steps(student: LayerStack, rows: Rows | None, config: MeasureConfig) -> Work[LayerScores]:
    """Score all layers without an ablation; `MeasureConfig` documents the options."""
    metric, started = config.metric, time.perf_counter()
    if metric == "magnitude":
        sums = _magnitude(student)
        if bad := [i for i, v in zip(student.layer_ids, sums, strict=True) if not math.isfinite(v)]:
            raise MeasureError(f"magnitude of layer {bad[0]} is not finite: its weights are damaged. Load them again.")
        scores = LayerScores.exact(metric, "weights", student.layer_ids, sums, seconds=time.perf_counter() - started)
        yield Progress(1, 1, "", scores)
        return scores
    if metric == "lrp":
        _query_projections(student)  # refuse before any work
    total, group = len(rows.tokens), config.batch_size
    places = Positions.sample(rows, config.positions, config.seed, predict=True) if metric == "taylor" else None
    if places is None:  # each layer's states twice, as they are and in fp32
        one = rows.tokens.shape[1] * student.hidden_size * (student.model.dtype.itemsize + 4) * 2
        group = rows_at_once(student, total, group, one, config.max_branch_bytes)
    run = SmallerOnOOM(lambda picked: _values(student, rows, config, places, picked), group)
    collected = Collector(config, rows.source, student.layer_ids, total)
    collected.details["notes"] = run.notes
    for picked in rounds(total, group):
        values = run(picked)
        collected.add(picked, student.layer_ids, values[:, :-1], values[:, -1])
        if collected.count < total:
            yield collected.progress(run.notes[-1] if run.notes else "")
    scores = collected.scores()
    yield Progress(total, total, "", scores)
    return scores


def _values(student: LayerStack, rows: Rows, config: MeasureConfig, places: Positions | None, picked) -> Tensor:
    """Values and, last, weights (tokens scored) of the rows picked [n]: [n, L + 1]."""
    parts = [picked[i : i + config.batch_size] for i in range(0, len(picked), config.batch_size)]
    batches = [rows.batch(part) for part in parts]
    if places is not None:
        mine = [places.batch(part, student.device) for part in parts]
        values = torch.cat([_taylor(student, batch, m) for batch, m in zip(batches, mine, strict=True)])
        weights = torch.cat([m.weights for m in mine])  # [n]
    else:
        values = _lrp(student, batches) if config.metric == "lrp" else _pairwise(student, batches, config.metric)
        mask = torch.ones_like(rows.tokens) if rows.mask is None else rows.mask
        weights = mask[torch.as_tensor(picked)].sum(1).to(values.dtype)  # [n, T] -> [n]
        weights = sent(weights, values.device)
    return torch.cat([values, weights[:, None]], 1)


# ------------------------------------------- a layer's output against its input


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


def _angle(u: Tensor, v: Tensor) -> Tensor:
    # Kahan's form, exact near 0 and near pi.
    return 2 / torch.pi * torch.atan2(torch.linalg.vector_norm(u - v, dim=-1), torch.linalg.vector_norm(u + v, dim=-1))


def _relative(before: Tensor, after: Tensor) -> Tensor:
    return torch.linalg.vector_norm(after - before, dim=-1) / torch.linalg.vector_norm(before, dim=-1)


# metric -> (what is made once of each hidden state, what two of them give for each token: [..., d] -> [...])
_PAIRWISE = {
    # From unit vectors 1 - cosine is |u - v|^2 / 2, which loses no digits where the cosine is near 1.
    "block_influence": (unit, lambda u, v: (v - u).square_().sum(-1).mul_(0.5)),
    "angular_distance": (unit, _angle),
    "mse": (Tensor.float, lambda before, after: (after - before).square_().mean(-1)),
    "relative_l2": (Tensor.float, _relative),
}


def apart(before: Tensor, after: Tensor, metric: str) -> Tensor:
    """How far `after` [B, T, d] is from `before` at each token, [B, T] fp32, by one of the pairwise metrics."""
    make, compare = _PAIRWISE[metric]
    return compare(make(before), make(after))


@torch.no_grad()
def _pairwise(student: LayerStack, batches: list, metric: str) -> Tensor:
    """Values [rows, L] of the metrics that compare a layer's input with its output."""
    make, compare = _PAIRWISE[metric]
    trunks = [student.trunk(batch) for batch in batches]
    before = [make(trunk.h0) for trunk in trunks]
    columns: list[list[Tensor]] = [[] for _ in batches]  # [b][layer]: [B]
    for hidden in climb(student, trunks):
        for b, trunk in enumerate(trunks):
            after = make(hidden[b])
            columns[b].append(token_mean(compare(before[b], after), trunk.attention_mask))
            before[b] = after
    return torch.cat([torch.stack(column, 1) for column in columns])  # [b][layer] of [B] -> [rows, L]


# --------------------------------------------------- relevance, gradient, weights


def _query_projections(student: LayerStack) -> list[nn.Linear]:
    """The query projection of each layer."""
    projections = []
    for layer_id, layer in zip(student.layer_ids, student.layers, strict=True):
        named = [module for name, module in layer.named_modules() if name.rpartition(".")[2] in QUERY]
        found = [module for module in named if isinstance(module, nn.Linear)]
        if len(found) != 1:
            raise MeasureError(
                f"The metric 'lrp' reads the query projection of each layer; layer {layer_id} of "
                f"{type(student.model).__name__} has {len(found) or 'none'} of its own. Choose another metric."
            )
        projections += found
    return projections


@torch.no_grad()
def _lrp(student: LayerStack, batches: list) -> Tensor:
    """Values [rows, L] of the epsilon-rule relevance through the query projections."""
    trunks = [student.trunk(batch) for batch in batches]
    columns: list[list[Tensor]] = [[] for _ in batches]  # [b][layer]: [B]
    met: list[Tensor] = []  # of one layer, a batch each: [B, T]

    def see(query: nn.Linear, args: tuple[Tensor], z: Tensor) -> None:  # z [B, T, k]
        z = z.float()
        share = z / (z.abs() + EPSILON)  # |z| / (z + epsilon sign z)
        relevance = args[0].float() * (share @ query.weight.float())  # [B, T, d] * [B, T, k] @ [k, d] -> [B, T, d]
        met.append(relevance.abs().sum(-1).to(student.device))  # -> [B, T]

    hooks = [query.register_forward_hook(see) for query in _query_projections(student)]
    try:
        for _ in climb(student, trunks):
            for b, trunk in enumerate(trunks):
                columns[b].append(token_mean(met[b], trunk.attention_mask))
            met.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([torch.stack(column, 1) for column in columns])  # [b][layer] of [B] -> [rows, L]


@torch.enable_grad()
def _taylor(student: LayerStack, batch, places: Positions) -> Tensor:
    """Values [rows, L]: first-order increase of the mean NLL where a layer's update is dropped."""
    trunk = student.trunk(batch)
    hidden = [trunk.h0.detach().requires_grad_()]
    for q in range(len(student)):
        hidden.append(student.run(q, hidden[-1], trunk))
    scored = places.take(hidden[-1])  # [B, T, d] -> [B * P, d]
    pieces = []
    chunk = chunk_rows(student)
    for targets, valid, final in zip(
        places.targets.split(chunk), places.valid.flatten().split(chunk), scored.detach().split(chunk), strict=True
    ):
        # The graph of one chunk of logits at a time. `autograd.grad` leaves nothing in a parameter's `.grad`.
        final.requires_grad_()
        nll = nll_per_token(log_probabilities(student.logits(final)), targets)
        pieces += torch.autograd.grad(torch.where(valid, nll, 0.0).sum(), final)
    gradients = torch.autograd.grad(scored, hidden[1:], torch.cat(pieces))  # L of [B, T, d]
    with torch.no_grad():
        effects = [
            -(g.float() * (after - before).float()).sum((1, 2))  # [B, T, d] -> [B]
            for g, before, after in zip(gradients, hidden, hidden[1:], strict=False)
        ]
        return torch.stack(effects, 1) / places.weights[:, None]  # [B, L]


@torch.no_grad()
def _magnitude(student: LayerStack) -> list[float]:
    """Sum of |w| over the weight matrices of each layer."""
    sums = []
    for layer in student.layers:
        with resident(layer):
            parts = [p.abs().sum(dtype=torch.float32) for p in layer.parameters() if p.dim() >= 2]
            sums.append(in_fp64(torch.stack(parts)).sum())
    return [float(v) for v in torch.stack(sums).cpu()]
