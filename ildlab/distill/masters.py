"""The weights that train, in fp32 whatever the model's dtype; and how much memory training takes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ildlab.errors import DistillError
from ildlab.model.stack import LayerStack


class Masters:
    """The trained layers' own weights where they are fp32, else fp32 copies beside them."""

    def __init__(self, student: LayerStack, trained: Sequence[int]):
        layers = {i: student.layers[student.position(i)] for i in trained}
        for layer in layers.values():
            for param in layer.parameters():
                param.requires_grad_(param.is_floating_point())
        found = {f"{i}.{n}": p for i, layer in layers.items() for n, p in layer.named_parameters() if p.requires_grad}
        if not found:
            raise DistillError(f"Layers {list(trained)} hold no weights that can train.")
        self.names, self.params = list(found), list(found.values())
        self.tensors = [p if p.dtype in (torch.float32, torch.float64) else p.detach().float() for p in self.params]

    def gather(self) -> None:
        """Add the working weights' gradients to the masters', in fp32."""
        for master, param in zip(self.tensors, self.params, strict=True):
            if master is param or param.grad is None:
                continue
            master.grad = param.grad.float() if master.grad is None else master.grad.add_(param.grad)
            param.grad = None

    def sum_gradients(self) -> None:
        """Add up the masters' gradients over all processes."""
        for master in self.tensors:
            if master.grad is None:  # here no token reached it (an expert), elsewhere one may have
                master.grad = torch.zeros_like(master)
            torch.distributed.all_reduce(master.grad)

    @torch.no_grad()
    def push(self) -> None:
        """Write the masters to the working weights."""
        for master, param in zip(self.tensors, self.params, strict=True):
            if master is not param:
                param.copy_(master)

    def copy(self) -> list[Tensor]:
        """Copies of the masters."""
        return [t.detach().clone() for t in self.tensors]

    @torch.no_grad()
    def write(self, values: Sequence[Tensor]) -> None:
        """Set the masters, and the working weights with them."""
        for master, value in zip(self.tensors, values, strict=True):
            master.copy_(value)
        self.push()


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from now on, where the system can (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):  # a container may forbid it: then the peak is the process's own
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Highest memory use since `reset_peak_memory` in bytes: of the device on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 0  # not known
