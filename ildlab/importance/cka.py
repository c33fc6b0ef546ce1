"""Linear CKA of hidden states (Kornblith et al. 2019, arXiv 1905.00414), streaming.

From the unbiased HSIC of Song et al. 2012, summed over minibatches of tokens (Nguyen et al. 2021, arXiv 2010.15327).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ildlab.model.head import in_fp64

TOKENS = 256  # in one Gram matrix


class Cka:
    """Sums so far of the HSIC of every two of k states."""

    def __init__(self):
        self.hsic: Tensor | float = 0.0  # [k, k]
        self.order = torch.Generator().manual_seed(0)

    def add(self, states: Tensor) -> None:
        """Take states [k, tokens, d]; tokens of a batch are shuffled into minibatches."""
        states = in_fp64(states)
        self.hsic = self.hsic + states.new_zeros(len(states), len(states))
        order = torch.randperm(states.shape[1], generator=self.order).to(states.device)
        for part in order.tensor_split(max(1, -(-len(order) // TOKENS))):
            if len(part) >= 4:  # the unbiased HSIC of fewer does not exist
                self.hsic += _hsic(states[:, part])

    def matrix(self) -> Tensor:
        """CKA [k, k] so far; NaN before there were enough tokens."""
        own = self.hsic.diagonal()
        return self.hsic / torch.sqrt(own[:, None] * own)


def _hsic(states: Tensor) -> Tensor:
    """Unbiased HSIC [k, k] of every two of the states [k, n, d] (Song et al. 2012, eq. 5)."""
    n = states.shape[1]
    gram = states @ states.mT  # [k, n, d] -> [k, n, n]
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    row, flat = gram.sum(-1), gram.flatten(1)  # [k, n], [k, n * n]
    both = row.sum(-1)[:, None] * row.sum(-1) / ((n - 1) * (n - 2))
    return (flat @ flat.T + both - 2 / (n - 2) * row @ row.T) / (n * (n - 3))
