"""What a student is distilled with: divergences of next-token distributions, distances of hidden states.

All of it in fp32 log space. `fused_divergence` walks over chunks of tokens and computes logits of both
models, the divergence and its gradient with respect to the student's final hidden state in one pass,
so that logits of a whole batch, [B, T, V], never exist. `naive_divergence` is the same thing written
plainly; it is the fallback for heads that train and the oracle of the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import DistillError
from .stack import LayerStack

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
HIDDEN_LOSSES = ("mse", "relative_mse", "cosine")


@dataclass(frozen=True)
class Divergence:
    """Which divergence of the teacher's distribution p and the student's q.

    Parameters
    ----------
    kind : {"forward_kl", "reverse_kl", "jsd"}
        KL(p || q), which covers every mode of the teacher; KL(q || p), which keeps to its main modes;
        the generalised Jensen-Shannon divergence `beta KL(p || m) + (1 - beta) KL(q || m)` with
        `m = beta p + (1 - beta) q` (Agarwal et al. 2024, GKD, eq. 4).
    temperature : float
        Both logits are divided by T, and the divergence is multiplied by T^2, so that its gradient keeps
        its size (Hinton et al. 2015).
    beta : float
        Weight of the teacher in "jsd", in (0, 1).
    """

    kind: str = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5

    def __post_init__(self):
        if self.kind not in DIVERGENCES:
            raise DistillError(
                f"There is no divergence {self.kind!r}; choose one of {', '.join(DIVERGENCES)}."
            )
        if not self.temperature > 0:
            raise DistillError(f"temperature={self.temperature}: it must be above 0.")
        if not 0 < self.beta < 1:
            raise DistillError(f"beta={self.beta}: it must lie between 0 and 1.")


def divergence(student_logits: Tensor, teacher_logits: Tensor, spec: Divergence = Divergence()) -> Tensor:
    """Divergence per token, in nats (times T^2), by plain differentiable operations.

    Parameters
    ----------
    student_logits, teacher_logits : Tensor [..., V]
        Any floating dtype; computed in fp32, or in fp64 where that is what comes in.
    spec : Divergence

    Returns
    -------
    Tensor [...], fp32 or fp64
    """
    logq = _log_probabilities(_wide(student_logits) / spec.temperature)
    logp = _log_probabilities(_wide(teacher_logits) / spec.temperature)
    if spec.kind == "forward_kl":
        value = _kl(logp, logq)
    elif spec.kind == "reverse_kl":
        value = _kl(logq, logp)
    else:
        logm = _log_mixture(logp, logq, spec.beta)
        value = spec.beta * _kl(logp, logm) + (1 - spec.beta) * _kl(logq, logm)
    return value * spec.temperature**2


def hidden_distance(student: Tensor, teacher: Tensor, kind: str = "mse") -> Tensor:
    """Distance of two hidden states per token.

    Parameters
    ----------
    student, teacher : Tensor [..., d]
    kind : {"mse", "relative_mse", "cosine"}
        Mean squared difference over d; squared difference over the teacher's squared norm (so that the
        few tokens with huge activations do not drown the others); 1 - cosine.

    Returns
    -------
    Tensor [...], fp32 or fp64
    """
    student, teacher = _wide(student), _wide(teacher)
    if kind == "mse":
        return (student - teacher).square().mean(-1)
    if kind == "relative_mse":
        return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)
    if kind == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
    raise DistillError(f"There is no hidden loss {kind!r}; choose one of {', '.join(HIDDEN_LOSSES)}.")


def naive_divergence(
    student: LayerStack,
    teacher: LayerStack,
    hidden: Tensor,
    teacher_hidden: Tensor,
    spec: Divergence = Divergence(),
    *,
    weights: Tensor,
    labels: Tensor | None = None,
    label_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fused_divergence` by full logits and autograd. Parameters and results are the same."""
    logits = student.logits(hidden)
    with torch.no_grad():
        teacher_logits = teacher.logits(teacher_hidden)
    each = divergence(logits, teacher_logits, spec)
    loss = (each * weights).sum()
    ce = torch.zeros_like(loss)
    if labels is not None:
        each_ce = -_log_probabilities(_wide(logits)).gather(1, labels[:, None])[:, 0]
        loss = loss + (each_ce * label_weights).sum()
        ce = (each_ce.detach() * (label_weights != 0)).sum()
    counted = weights != 0
    agree = ((logits.argmax(-1) == teacher_logits.argmax(-1)) & counted).sum()
    return loss, torch.stack([(each.detach() * counted).sum(), ce, agree.to(loss.dtype)])


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
    chunk: int = 128,
) -> tuple[Tensor, Tensor]:
    """Weighted divergence (and cross entropy) of the next-token distributions, in chunks of tokens.

    Both heads must be frozen: the only gradient is the one to `hidden`, and it is computed in the
    forward pass. At most `chunk` rows of logits exist at a time. Logits come from the models' own tails,
    so norms, soft-caps and scalings are theirs.

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
    chunk : int
        Tokens at a time.

    Returns
    -------
    loss : Tensor, scalar
        `sum(weights * divergence) + sum(label_weights * cross entropy)`.
    stats : Tensor [3]
        Without gradient: the unweighted sums, over tokens whose weight is not 0, of the divergence and of
        the cross entropy, in nats; and how many top tokens agree with the teacher's.
    """
    return _FusedHead.apply(
        hidden, teacher_hidden, weights, labels, label_weights, student, teacher, spec, chunk
    )


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, teacher_hidden, weights, labels, label_weights, student, teacher, spec, chunk):
        want_grad = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if want_grad else None
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        stats = torch.zeros(3, dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            at = slice(start, start + chunk)
            with torch.no_grad():
                target = _wide(teacher.logits(teacher_hidden[at]))
            with torch.set_grad_enabled(want_grad):
                x = hidden[at].detach().requires_grad_(want_grad)
                raw = student.logits(x)
            with torch.no_grad():
                logits = _wide(raw.detach())
                weight = weights[at]
                counted = weight != 0
                stats[2] += ((logits.argmax(-1) == target.argmax(-1)) & counted).sum()
                each, slope = _value_and_slope(logits, target, spec, want_grad)
                loss += (each * weight).sum()
                stats[0] += (each * counted).sum()
                if want_grad:
                    slope *= weight[:, None]
                if labels is not None:
                    logq = _log_probabilities(logits)
                    each_ce = -logq.gather(1, labels[at, None])[:, 0]
                    loss += (each_ce * label_weights[at]).sum()
                    stats[1] += (each_ce * (label_weights[at] != 0)).sum()
                    if want_grad:
                        q = logq.exp_()
                        q.scatter_add_(1, labels[at, None], torch.full_like(q[:, :1], -1.0))
                        slope.addcmul_(q, label_weights[at, None])
            if want_grad:
                (gradient[at],) = torch.autograd.grad(raw, x, slope.to(raw.dtype))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, grad_loss, _grad_stats):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss.to(gradient.dtype), *[None] * 8)


def _value_and_slope(logits: Tensor, target: Tensor, spec: Divergence, want_slope: bool):
    """Divergence per token and its derivative by the student's logits, T^2 in both.

    With q = softmax(z / T): forward KL gives (q - p) / T; a divergence whose derivative by q is g (up to
    a constant) gives q (g - sum q g) / T, with g = log q / p for the reverse KL and
    (1 - beta) log q / m for the Jensen-Shannon divergence.
    """
    temperature = spec.temperature
    if temperature != 1:
        logits, target = logits / temperature, target / temperature
    logq = _log_probabilities(logits)
    logp = _log_probabilities(target)
    if spec.kind == "forward_kl":
        p = logp.exp()
        each = logp.sub_(logq).mul_(p).sum(-1)
        slope = logq.exp_().sub_(p)
        each = each + slope.sum(-1)  # see _kl
    elif spec.kind == "reverse_kl":
        q, each = logq.exp(), _kl(logq, logp)
        ratio = logq.sub_(logp)
        slope = ratio.sub_((q * ratio).sum(-1, keepdim=True)).mul_(q) if want_slope else None
    else:
        beta = spec.beta
        logm = _log_mixture(logp, logq, beta)
        q, each = logq.exp(), beta * _kl(logp, logm) + (1 - beta) * _kl(logq, logm)
        ratio = logq.sub_(logm)
        slope = ratio.sub_((q * ratio).sum(-1, keepdim=True)).mul_(q).mul_(1 - beta) if want_slope else None
    if temperature != 1:
        each = each * temperature**2
        slope = slope.mul_(temperature) if want_slope else None  # T^2 / T
    return each, slope


def _log_probabilities(logits: Tensor) -> Tensor:
    # On a CPU in fp32, torch's log_softmax adds up a large vocabulary with an error of 3e-5; logsumexp does not.
    return logits - logits.logsumexp(-1, keepdim=True)


def _kl(loga: Tensor, logb: Tensor) -> Tensor:
    """KL(a || b) from log-probabilities.

    `- a + b` sums to 0 but for rounding; with it, an error in either normaliser (about 1e-6 in fp32, which
    is what is left of a logsumexp near 20) cancels to first order instead of adding to the result.
    """
    a = loga.exp()
    return (a * (loga - logb) - a + logb.exp()).sum(-1)


def _log_mixture(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(logp + math.log(beta), logq + math.log(1 - beta))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------------------------- after the norm


class _HeadReached(Exception):
    """Raised in front of the head, whose product is not wanted."""


def normed(stack: LayerStack, hidden: Tensor) -> Tensor:
    """What the head is given for a final hidden state: after the model's own final norm.

    Parameters
    ----------
    stack : LayerStack
    hidden : Tensor [..., d]
        h[L], pre-norm.

    Returns
    -------
    Tensor [..., d]. Gradients flow to `hidden`.

    Raises
    ------
    DistillError
        The model does not say which module its head is.
    """
    head: nn.Module | None = stack.model.get_output_embeddings()
    if head is None:
        raise DistillError(
            f"{type(stack.model).__name__} does not say which module its head is, so the hidden state after "
            "the final norm cannot be had: match before the norm (hidden_after_norm=False)."
        )
    seen: list[Any] = []

    def stop(module, args, kwargs):
        seen.append(args[0] if args else next(iter(kwargs.values())))
        raise _HeadReached

    handle = head.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        stack.logits(hidden)
    except _HeadReached:
        pass
    finally:
        handle.remove()
    return seen[0].reshape(*hidden.shape[:-1], -1)
