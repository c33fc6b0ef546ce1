"""Linear CKA of hidden states (Kornblith et al. 2019, arXiv 1905.00414), streaming.

From the unbiased HSIC of Song et al. 2012, summed over minibatches of tokens (Nguyen et al. 2021, arXiv 2010.15327).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ildlab.model.head import in_fp64

TOKENS = 256  # in one Gram matrix


class Cka:
    """Sums of HSIC so far, of k states with m others."""

    def __init__(self):
        self.cross = self.mine = self.theirs = 0.0
        self.order = torch.Generator().manual_seed(0)

    def add(self, mine: Tensor, theirs: Tensor) -> None:
        """Take states [k, tokens, d] and [m, tokens, d]; tokens of a batch are shuffled into minibatches."""
        count = mine.shape[1]
        order = torch.randperm(count, generator=self.order).to(mine.device)
        for part in order.tensor_split(max(1, -(-count // TOKENS))):
            if len(part) < 4:
                continue
            a, b = self._gram(mine[:, part]), self._gram(theirs[:, part])
            self.cross = self.cross + self._hsic(a, b)
            self.mine = self.mine + torch.stack([self._hsic(g[None], g[None])[0, 0] for g in a])
            self.theirs = self.theirs + torch.stack([self._hsic(g[None], g[None])[0, 0] for g in b])

    @staticmethod
    def _gram(states: Tensor) -> Tensor:
        states = in_fp64(states)
        gram = states @ states.mT  # [k, tokens, d] -> [k, tokens, tokens]
        gram.diagonal(dim1=-2, dim2=-1).zero_()
        return gram

    @staticmethod
    def _hsic(a: Tensor, b: Tensor) -> Tensor:
        """Unbiased HSIC [k, m] of Gram matrices without diagonals (Song et al. 2012, eq. 5)."""
        n = a.shape[-1]
        row_a, row_b = a.sum(-1), b.sum(-1)
        trace = a.flatten(1) @ b.flatten(1).T  # [k, n * n] @ [n * n, m] -> [k, m]
        both = row_a.sum(-1)[:, None] * row_b.sum(-1) / ((n - 1) * (n - 2))
        return (trace + both - 2 / (n - 2) * row_a @ row_b.T) / (n * (n - 3))

    def matrix(self) -> Tensor:
        """CKA [k, m] so far."""
        if isinstance(self.cross, float):
            return torch.tensor([[torch.nan]])
        return self.cross / torch.sqrt(self.mine[:, None] * self.theirs)
