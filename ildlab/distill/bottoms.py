"""Hidden states of frozen bottom layers, kept in memory from the first pass over the text on.

Below the lowest trained layer nothing changes while a student distills, so a second epoch need not run it again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ildlab.model.capture import sent


class BottomStore:
    """Hidden states [rows, T, d] at a few depths, filled row by row.

    Each name has a tensor of its own, in the model's dtype: what comes back is what was put in, bit for bit.
    """

    def __init__(self, rows: int, block: int, width: int, names: list[str], dtype: torch.dtype, device: torch.device):
        # Memory that is not touched yet costs nothing, so rows of other processes take none.
        self.states = {
            name: torch.empty(rows, block, width, dtype=dtype, device=device) for name in names
        }  # [rows, T, d]
        self.filled = {name: torch.zeros(rows, dtype=torch.bool) for name in names}  # [rows]

    def at(self, name: str, rows: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Hidden states [B, T, d] of these rows [B]: where they are kept if all are, else made, and kept."""
        states = self.states[name]
        at = sent(rows, states.device)
        if bool(self.filled[name][rows].all()):
            return states[at]  # [rows, T, d] -> [B, T, d]
        hidden = make()
        states[at] = hidden.detach().to(states.device)
        self.filled[name][rows] = True
        return hidden
