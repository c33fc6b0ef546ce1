"""What a student is distilled with: divergences of next-token distributions, distances of hidden states.

All of it in fp32 log space. `naive_divergence` is the head and the divergence written plainly: the fallback for
heads that train, and the oracle of the tests. `ildlab.distill.fused` is the same in chunks of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ildlab.errors import DistillError
from ildlab.model.head import kl_per_token, log_probabilities, nll_per_token, wide
from ildlab.model.stack import LayerStack

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
            raise DistillError(f"There is no divergence {self.kind!r}; choose one of {', '.join(DIVERGENCES)}.")
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
    logq = log_probabilities(wide(student_logits) / spec.temperature)
    logp = log_probabilities(wide(teacher_logits) / spec.temperature)
    if spec.kind == "forward_kl":
        value = kl_per_token(logp, logq)
    elif spec.kind == "reverse_kl":
        value = kl_per_token(logq, logp)
    else:
        logm = log_mixture(logp, logq, spec.beta)
        value = spec.beta * kl_per_token(logp, logm) + (1 - spec.beta) * kl_per_token(logq, logm)
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
    student, teacher = wide(student), wide(teacher)
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
        each_ce = nll_per_token(log_probabilities(logits), labels)
        loss = loss + (each_ce * label_weights).sum()
        ce = (each_ce.detach() * (label_weights != 0)).sum()
    counted = weights != 0
    agree = ((logits.argmax(-1) == teacher_logits.argmax(-1)) & counted).sum()
    return loss, torch.stack([(each.detach() * counted).sum(), ce, agree.to(loss.dtype)])


def log_mixture(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(logp + math.log(beta), logq + math.log(1 - beta))
