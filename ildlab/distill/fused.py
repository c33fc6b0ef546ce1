"""The frozen head and the divergence in one pass over chunks of tokens.

Logits of both models, the divergence and its gradient with respect to the student's final hidden state are
computed chunk by chunk in the forward pass, so that logits of a whole batch, [B, T, V], never exist.
Below, N is tokens, n those of a chunk, d the width of a hidden state, V the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ildlab.distill.losses import Divergence, divergence
from ildlab.model.head import chunk_rows, log_probabilities, nll_per_token, wide
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
    forward pass. Logits come from the models' own tails, so norms, soft-caps and scalings are theirs.

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
        gradient = torch.empty_like(hidden) if want_grad else None  # [N, d]
        sums = torch.zeros(4, dtype=wide(hidden[:0]).dtype, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            at = slice(start, start + chunk)
            with torch.set_grad_enabled(want_grad):
                x = hidden[at].detach().requires_grad_(want_grad)  # [n, d]
                logits = student.logits(x)  # [n, V], with a graph of this chunk's own
            with torch.no_grad():
                gold = None if labels is None else (labels[at], label_weights[at])  # [n] each
                part, slope = _chunk(logits.detach(), teacher.logits(teacher_hidden[at]), spec, weights[at], gold)
                sums += part
            if want_grad:
                (gradient[at],) = torch.autograd.grad(logits, x, slope.to(logits.dtype))  # [n, V] -> [n, d]
            del logits, slope  # before the next chunk's are made
        ctx.save_for_backward(gradient)
        loss, stats = sums[0].clone(), sums[1:].clone()  # [4] -> [], [3]
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, grad_loss, _grad_stats):
        (gradient,) = ctx.saved_tensors  # [N, d]
        return (gradient * grad_loss.to(gradient.dtype), *[None] * 8)


def _chunk(
    logits: Tensor, target: Tensor, spec: Divergence, weights: Tensor, gold: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Of logits [n, V]: loss, divergence, cross entropy and agreeing tokens [4]; the loss's derivative [n, V]."""
    logits, target = wide(logits), wide(target)  # [n, V] each
    counted = weights != 0  # [n]
    agree = ((logits.argmax(-1) == target.argmax(-1)) & counted).sum()
    each, slope = _divergence_and_slope(logits, target, spec)  # [n], [n, V]
    loss, kl, ce = (each * weights).sum(), (each * counted).sum(), torch.zeros_like(each[0])
    slope *= weights[:, None]  # [n, V] * [n, 1]
    if gold is not None:
        labels, label_weights = gold  # [n] each
        logq = log_probabilities(logits)  # [n, V]
        each = nll_per_token(logq, labels)  # [n]
        loss, ce = loss + (each * label_weights).sum(), (each * (label_weights != 0)).sum()
        # The derivative of a cross entropy by the logits is softmax - one-hot.
        slope.addcmul_(logq.exp_(), label_weights[:, None])  # [n, V] * [n, 1]
        slope.scatter_add_(1, labels[:, None], -label_weights[:, None].to(slope))  # [n, V] at [n, 1]
    return torch.stack([loss, kl, ce, agree.to(loss)]), slope


def _divergence_and_slope(logits: Tensor, target: Tensor, spec: Divergence) -> tuple[Tensor, Tensor]:
    """`divergence` per token [n], and its derivative by the student's logits [n, V]."""
    if spec.kind != "forward_kl":
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            each = divergence(logits, target, spec)  # [n]
            (slope,) = torch.autograd.grad(each.sum(), logits)  # [n, V]
        return each.detach(), slope
    # T^2 KL(p || q) has the derivative T (q - p). Autograd, which keeps a tensor [n, V] for each operation, takes
    # half as long again with the head's products.
    t = spec.temperature
    logq, logp = (log_probabilities(x if t == 1 else x / t) for x in (logits, target))  # [n, V] each
    p = logp.exp()
    each = logp.sub_(logq).mul_(p).sum(-1)  # [n, V] -> [n]
    slope = logq.exp_().sub_(p)
    each = each + slope.sum(-1)  # see kl_per_token
    return each * t**2, slope.mul_(t) if t != 1 else slope
