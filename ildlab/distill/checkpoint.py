"""Exact resume: one safetensors file with weights, optimizer state and records, and the name of what it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ildlab.distill.config import DistillConfig
from ildlab.distill.masters import Masters
from ildlab.errors import DistillError
from ildlab.files import atomic_file
from ildlab.model.fingerprints import fingerprint
from ildlab.model.stack import LayerStack

_FREE = ("checkpoint_every", "micro_batch")  # fields of the config that leave the result as it is


@dataclass
class Checkpoint:
    """A distillation after some of its steps."""

    tensors: dict[str, Tensor]
    history: list[dict[str, Any]]  # a record a step
    seconds: float

    def restore(self, masters: Masters, optimizer: Optimizer) -> None:
        """Take up weights and optimizer state."""
        masters.write([self.tensors[f"weight/{n}"] for n in masters.names])
        for name, master in zip(masters.names, masters.tensors, strict=True):
            if f"step/{name}" in self.tensors:
                # On CUDA the fused AdamW keeps its count on the device too.
                optimizer.state[master] = {
                    key: self.tensors[f"{key}/{name}"].to(master.device) for key in ("step", "exp_avg", "exp_avg_sq")
                }


def decisive(config: DistillConfig) -> dict[str, Any]:
    """The fields of a config that decide what a distillation makes."""
    return {k: v for k, v in config.to_dict().items() if k not in _FREE} | {"seed": config.seed or 0}


def identity(
    student: LayerStack,
    teacher: LayerStack,
    text: str,
    config: DistillConfig,
    trained: Sequence[int],
    gaps: Sequence[int],
) -> str:
    """A name for one distillation: equal only where a checkpoint of one may be carried on by the other."""
    models = [fingerprint(student), fingerprint(teacher)]
    whole = json.dumps([decisive(config), list(trained), list(gaps), text, models], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def save_checkpoint(
    path: Path | str, name: str, masters: Masters, optimizer: Optimizer, history: list[dict], seconds: float
) -> None:
    """Write the file, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {}
    for at, master in zip(masters.names, masters.tensors, strict=True):
        tensors[f"weight/{at}"] = master.detach()
        # A weight that no gradient has reached has no state.
        for key, value in optimizer.state.get(master, {}).items():
            tensors[f"{key}/{at}"] = value
    tensors = {k: t.contiguous().cpu() for k, t in tensors.items()}
    told = {"identity": name, "seconds": repr(seconds), "history": json.dumps(history)}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=told | {"sha256": _sum_of(tensors, told)})


def _sum_of(tensors: dict[str, Tensor], told: dict[str, str]) -> str:
    """sha256 (hex) of what a checkpoint holds."""
    digest = hashlib.sha256(f"{told['identity']}{told['seconds']}{told['history']}".encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_checkpoint(path: Path | str, name: str) -> Checkpoint | None:
    """What `save_checkpoint` wrote, or None where there is no file.

    Raises DistillError where the file belongs to another distillation, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            if told.get("identity") != name:
                raise DistillError(
                    f"{path} is a checkpoint of another distillation (other settings, layers or text). Delete it to "
                    "start anew, or give the settings it was made with."
                )
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  (not a dict)
            if told.get("sha256", "") not in ("", _sum_of(tensors, told)):  # an older ildlab took none
                raise ValueError("its sha256 is not that of what was written")
    except (OSError, ValueError, SafetensorError) as error:
        raise DistillError(f"{path} cannot be read as a checkpoint ({error}). Delete it to start anew.") from error
    return Checkpoint(tensors, json.loads(told["history"]), float(told["seconds"]))
