"""Hidden states of frozen bottom layers, kept in memory from the first pass over the text on.

Below the lowest trained layer nothing changes while a student distills, so a second epoch need not run it
again. (`ildlab.distill.teacher_cache` keeps the *teacher's* hidden states on disk, across distillations.)
"""

from __future__ import annotations

import torch
from torch import Tensor


class BottomStore:
    """Hidden states [rows, T, d] at a few depths, filled row by row.

    Parameters
    ----------
    rows, block, width : int
        Rows of the text, tokens in a row, width of a hidden state.
    names : sequence of str
        One tensor each.
    dtype : torch.dtype
        The model's own: what comes back is what was put in, bit for bit.
    """

    def __init__(self, rows: int, block: int, width: int, names: list[str], dtype: torch.dtype):
        # Memory that is not touched yet costs nothing, so rows of other processes take none.
        self.states = {name: torch.empty(rows, block, width, dtype=dtype) for name in names}
        self.filled = {name: torch.zeros(rows, dtype=torch.bool) for name in names}

    @staticmethod
    def size(rows: int, block: int, width: int, names: list[str], dtype: torch.dtype) -> int:
        """Bytes that a full store takes."""
        return rows * block * width * len(names) * dtype.itemsize

    def get(self, name: str, rows: Tensor, device: torch.device) -> Tensor | None:
        """Hidden states [B, T, d] of these rows on a device, or None where one of them is missing."""
        rows = rows.cpu()  # DDP moves its inputs to the device
        if name not in self.states or not bool(self.filled[name][rows].all()):
            return None
        return self.states[name][rows].to(device)

    def put(self, name: str, rows: Tensor, hidden: Tensor) -> None:
        """Keep the hidden states [B, T, d] of these rows, where the store has this name."""
        rows = rows.cpu()
        if name in self.states:
            self.states[name][rows] = hidden.detach().to(self.states[name].device)
            self.filled[name][rows] = True
