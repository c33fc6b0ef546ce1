"""The frozen head and the divergence in one pass over chunks of tokens.

Logits of both models, the divergence and its gradient with respect to the student's final hidden state are
computed chunk by chunk in the forward pass, so that logits of a whole batch, [B, T, V], never exist.
Below, N is tokens, n those of a chunk, d the width of a hidden state, V the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ildlab.distill.losses import Divergence, log_mixture
from ildlab.model.head import chunk_rows, kl_per_token, log_probabilities, nll_per_token, normed, plain_head
from ildlab.model.stack import LayerStack


def fused_divergence(
    student: LayerStack,
    teacher: LayerStack,
    hidden: Tensor,
    teacher_hidden: Tensor,
    spec: Divergence = Divergence(),
    *,
    weights: Tensor,
    labels: Tensor | None = None,
    label_weights: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted divergence (and cross entropy) of the next-token distributions, in chunks of tokens.

    Both heads must be frozen: the only gradient is the one to `hidden`, and it is computed in the
    forward pass. Logits come from the models' own tails, so norms, soft-caps and scalings are theirs; where a
    tail is just a norm and a matrix, its product is written to buffers that all chunks share (on a CPU, new
    memory costs as much as the arithmetic).

    Parameters
    ----------
    student, teacher : LayerStack
    hidden, teacher_hidden : Tensor [N, d]
        Final hidden states h[L], pre-norm, of N tokens.
    spec : Divergence
    weights : Tensor [N] fp32
        Weight of each token's divergence in the loss; 0 leaves a token out.
    labels : Tensor [N] int64, optional
        Next tokens of the data, for a cross entropy.
    label_weights : Tensor [N] fp32
        Weight of each token's cross entropy; needed with `labels`.
    chunk : int, optional
        Most rows of logits that exist at a time; by default what the device holds (`chunk_rows`).

    Returns
    -------
    loss : Tensor, scalar
        `sum(weights * divergence) + sum(label_weights * cross entropy)`.
    stats : Tensor [3]
        Without gradient: the unweighted sums, over tokens whose weight is not 0, of the divergence and of
        the cross entropy, in nats; and how many top tokens agree with the teacher's.
    """
    chunk = min(chunk or chunk_rows(student), len(hidden))
    return _FusedHead.apply(hidden, teacher_hidden, weights, labels, label_weights, student, teacher, spec, chunk)


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, teacher_hidden, weights, labels, label_weights, student, teacher, spec, chunk):
        want_grad = ctx.needs_input_grad[0]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        stats = torch.zeros(3, dtype=dtype, device=hidden.device)
        mine, theirs = _tail(student, hidden, chunk, want_grad), _tail(teacher, teacher_hidden, chunk, False)
        spare = None
        for start in range(0, len(hidden), chunk):
            at = slice(start, start + chunk)
            with torch.no_grad():
                target, logits = theirs.logits(at), mine.logits(at)  # [n, V] each, to be written over
                spare = torch.empty_like(logits) if spare is None else spare[: len(logits)]  # [n, V]
                weight = weights[at]  # [n]
                counted = weight != 0
                (top, best), (target_top, target_best) = logits.max(-1), target.max(-1)  # [n] each
                stats[2] += ((best == target_best) & counted).sum()
                ce_slope = None
                if labels is not None:
                    ce, ce_slope = _cross_entropy(logits, labels[at], want_grad)  # [n], [n, V]
                    loss += (ce * label_weights[at]).sum()
                    stats[1] += (ce * (label_weights[at] != 0)).sum()
                if spec.temperature != 1:
                    logits, target = logits.div_(spec.temperature), target.div_(spec.temperature)
                    top, target_top = top / spec.temperature, target_top / spec.temperature
                _to_log_probabilities(logits, top, spare)
                _to_log_probabilities(target, target_top, spare)
                each, slope = _value_and_slope(logits, target, spec, want_grad, spare)  # [n], [n, V]
                loss += (each * weight).sum()
                stats[0] += (each * counted).sum()
                if want_grad:
                    slope *= weight[:, None]  # [n, V] * [n, 1]
                    if ce_slope is not None:
                        slope.addcmul_(ce_slope, label_weights[at, None])  # [n, V] * [n, 1]
            if want_grad:
                mine.backward(at, slope)
        ctx.save_for_backward(mine.gradient() if want_grad else None)  # [N, d]
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, grad_loss, _grad_stats):
        (gradient,) = ctx.saved_tensors  # [N, d]
        return (gradient * grad_loss.to(gradient.dtype), *[None] * 8)


def _cross_entropy(logits: Tensor, labels: Tensor, want_slope: bool) -> tuple[Tensor, Tensor | None]:
    """NLL [n] of the labels [n], and its derivative by the logits, softmax - one-hot: [n, V]."""
    logq = log_probabilities(logits)  # [n, V]
    each = nll_per_token(logq, labels)  # [n]
    if not want_slope:
        return each, None
    slope = logq.exp_()
    slope.scatter_add_(1, labels[:, None], torch.full_like(slope[:, :1], -1.0))  # [n, V] at [n, 1]
    return each, slope


def _to_log_probabilities(logits: Tensor, top: Tensor, spare: Tensor) -> None:
    """Turn logits [n, V] into log-probabilities in place; `top` [n] is the largest of each row."""
    torch.sub(logits, top[:, None], out=spare)  # [n, V] - [n, 1]
    logits.sub_((spare.exp_().sum(-1).log_() + top)[:, None])  # [n, V] - [n, 1]


def _value_and_slope(logq: Tensor, logp: Tensor, spec: Divergence, want_slope: bool, spare: Tensor):
    """Divergence per token [n] and its derivative by the student's logits [n, V], T^2 in both.

    With q = softmax(z / T): forward KL gives (q - p) / T; a divergence whose derivative by q is g (up to
    a constant) gives q (g - sum q g) / T, with g = log q / p for the reverse KL and
    (1 - beta) log q / m for the Jensen-Shannon divergence. All three tensors [n, V] are written over.
    """
    if spec.kind == "forward_kl":
        p = torch.exp(logp, out=spare)
        each = logp.sub_(logq).mul_(p).sum(-1)  # [n, V] -> [n]
        slope = logq.exp_().sub_(p)
        each = each + slope.sum(-1)  # see kl_per_token
    else:
        if spec.kind == "reverse_kl":
            share, logm, each = 1.0, logp, kl_per_token(logq, logp)
        else:
            share, logm = 1 - spec.beta, log_mixture(logp, logq, spec.beta)
            each = spec.beta * kl_per_token(logp, logm) + share * kl_per_token(logq, logm)  # [n]
        q = torch.exp(logq, out=spare)
        ratio = logq.sub_(logm)
        mean = (q * ratio).sum(-1, keepdim=True)  # [n, 1]
        slope = ratio.sub_(mean).mul_(q).mul_(share) if want_slope else None  # [n, V]
    if spec.temperature != 1:
        each = each * spec.temperature**2
        slope = slope.mul_(spec.temperature) if want_slope else None  # T^2 / T
    return each, slope


# ---------------------------------------------------------------------- tails


def _tail(stack: LayerStack, hidden: Tensor, chunk: int, want_grad: bool) -> _OwnTail | _MatrixTail:
    matrix = plain_head(stack, hidden[:1].detach())  # [V, d], seen on [1, d]
    if matrix is None:
        return _OwnTail(stack, hidden, want_grad)
    return _MatrixTail(stack, hidden, matrix, chunk, want_grad)


class _OwnTail:
    """Logits by the model's own code, with a small graph for each chunk."""

    def __init__(self, stack: LayerStack, hidden: Tensor, want_grad: bool):
        self.stack, self.hidden, self.want_grad = stack, hidden.detach(), want_grad
        self.total = torch.empty_like(self.hidden) if want_grad else None  # [N, d]

    def logits(self, at: slice) -> Tensor:
        with torch.set_grad_enabled(self.want_grad):
            self.x = self.hidden[at].clone().requires_grad_(self.want_grad)  # [n, d]
            self.raw = self.stack.logits(self.x)  # [n, V]
        # The graph may hold its own result (a soft-cap's tanh does), and the caller writes over what it is given.
        raw = self.raw.detach()
        return raw.clone() if raw.dtype == torch.float64 else raw.to(torch.float32, copy=True)

    def backward(self, at: slice, slope: Tensor) -> None:
        (self.total[at],) = torch.autograd.grad(self.raw, self.x, slope.to(self.raw.dtype))  # [n, V] -> [n, d]

    def gradient(self) -> Tensor:
        return self.total


class _MatrixTail:
    """Logits by one product into a buffer; the norm's gradient is taken once, at the end."""

    def __init__(self, stack: LayerStack, hidden: Tensor, matrix: Tensor, chunk: int, want_grad: bool):
        self.matrix = matrix  # [V, d]
        with torch.set_grad_enabled(want_grad):
            self.x = hidden.detach().requires_grad_(want_grad)  # [N, d]
            self.normed = normed(stack, self.x)  # [N, d]
        self.inputs = self.normed.detach()
        self.buffer = matrix.new_empty(chunk, matrix.shape[0])  # [chunk, V]
        self.total = torch.empty_like(self.inputs) if want_grad else None  # [N, d]

    def logits(self, at: slice) -> Tensor:
        rows = self.inputs[at]  # [n, d]
        return torch.mm(rows, self.matrix.T, out=self.buffer[: len(rows)])  # [n, d] @ [d, V] -> [n, V]

    def backward(self, at: slice, slope: Tensor) -> None:
        torch.mm(slope, self.matrix, out=self.total[at])  # [n, V] @ [V, d] -> [n, d]

    def gradient(self) -> Tensor:
        return torch.autograd.grad(self.normed, self.x, self.total)[0]  # [N, d]
