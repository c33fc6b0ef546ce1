"""What a student is distilled with: divergences of next-token distributions, distances of hidden states.

All of it in fp32 log space, by plain differentiable operations; `ildlab.distill.fused` is the same with the head in
front, in chunks of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ildlab.errors import DistillError
from ildlab.model.head import kl_per_token, log_probabilities, wide
from ildlab.typed import read_fields

DivergenceKind = Literal["forward_kl", "reverse_kl", "jsd"]
HiddenLoss = Literal["mse", "relative_mse", "cosine"]


@dataclass(frozen=True)
class Divergence:
    """Which divergence of the teacher's distribution p and the student's q.

    Parameters
    ----------
    kind : {"forward_kl", "reverse_kl", "jsd"}
        KL(p || q), which covers every mode of the teacher; KL(q || p), which keeps to its main modes;
        the Jensen-Shannon divergence `(KL(p || m) + KL(q || m)) / 2` with `m = (p + q) / 2`.
    temperature : float
        Both logits are divided by T, and the divergence is multiplied by T^2, so that its gradient keeps
        its size (Hinton et al. 2015).
    """

    kind: DivergenceKind = "forward_kl"
    temperature: float = 1.0

    def __post_init__(self):
        read_fields(self, DistillError)
        if not self.temperature > 0:
            raise DistillError(f"temperature={self.temperature}: it must be above 0.")


def divergence(student_logits: Tensor, teacher_logits: Tensor, spec: Divergence = Divergence()) -> Tensor:
    """Divergence per token, in nats (times T^2).

    Parameters
    ----------
    student_logits, teacher_logits : Tensor [..., V]
        Any floating dtype; computed in fp32, or in fp64 where that is what comes in.
    spec : Divergence

    Returns
    -------
    Tensor [...], fp32 or fp64
    """
    logq = log_probabilities(wide(student_logits) / spec.temperature)  # [..., V]
    logp = log_probabilities(wide(teacher_logits) / spec.temperature)
    if spec.kind == "forward_kl":
        value = kl_per_token(logp, logq)  # [..., V] -> [...]
    elif spec.kind == "reverse_kl":
        value = kl_per_token(logq, logp)
    else:
        logm = torch.logaddexp(logp, logq) - math.log(2)  # [..., V]
        value = (kl_per_token(logp, logm) + kl_per_token(logq, logm)) / 2
    return value * spec.temperature**2


def hidden_distance(student: Tensor, teacher: Tensor, kind: HiddenLoss = "mse") -> Tensor:
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
    student, teacher = wide(student), wide(teacher)  # [..., d]
    if kind == "mse":
        return (student - teacher).square().mean(-1)  # [..., d] -> [...]
    if kind == "relative_mse":
        return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)
    if kind == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
    raise DistillError(f"There is no hidden loss {kind!r}; choose 'mse', 'relative_mse' or 'cosine'.")
