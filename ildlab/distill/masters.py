"""What a distillation carries from step to step: masters, optimizer, checkpoint, memory."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ildlab.distill.config import DistillConfig
from ildlab.errors import DistillError
from ildlab.files import atomic_file
from ildlab.model.offload import named_weights
from ildlab.model.stack import LayerStack


class Masters:
    """The weights that train: the layers' own where they are fp32, else fp32 copies beside them.

    Parameters
    ----------
    student : LayerStack
        Its trained layers hold weights of their own.
    trained : sequence of int
        Layer ids.
    config : DistillConfig
        With `lora_rank`, low-rank updates train in place of the weights.
    """

    def __init__(self, student: LayerStack, trained: Sequence[int], config: DistillConfig):
        self.layers = {i: student.layers[student.position(i)] for i in trained}
        self.lora = config.lora_rank is not None
        self.names: list[str] = []
        self.params: list[Tensor] = []
        if self.lora:
            from ildlab.distill.lora import add_lora

            for layer in self.layers.values():
                add_lora(layer, config.lora_rank, config.seed or 0)
        else:
            for layer in self.layers.values():
                for param in layer.parameters():
                    param.requires_grad_(param.is_floating_point())
        for layer_id, layer in self.layers.items():
            for name, param in layer.named_parameters():
                if param.requires_grad:
                    self.names.append(f"{layer_id}.{name}")
                    self.params.append(param)
        if not self.params:
            raise DistillError(f"Layers {list(trained)} hold no weights that can train.")
        self.tensors = [p if p.dtype in (torch.float32, torch.float64) else p.detach().float() for p in self.params]
        self.compiled = config.compile
        if self.compiled:
            for layer in self.layers.values():
                layer.compile()

    def groups(self, weight_decay: float) -> list[dict]:
        """Parameter groups for the optimizer: norms and biases do not decay."""
        wide = [t for t in self.tensors if t.dim() > 1]
        flat = [t for t in self.tensors if t.dim() <= 1]
        groups = [{"params": wide, "weight_decay": weight_decay}, {"params": flat, "weight_decay": 0.0}]
        return [g for g in groups if g["params"]]

    def gather(self) -> None:
        """Add the working weights' gradients to the masters', in fp32."""
        for master, param in zip(self.tensors, self.params, strict=True):
            if master is param or param.grad is None:
                continue
            master.grad = param.grad.float() if master.grad is None else master.grad.add_(param.grad)
            param.grad = None

    def clear(self) -> None:
        """Forget the gradients."""
        for master in self.tensors:
            master.grad = None

    @torch.no_grad()
    def push(self) -> None:
        """Write the masters to the working weights."""
        for master, param in zip(self.tensors, self.params, strict=True):
            if master is not param:
                param.copy_(master)

    @torch.no_grad()
    def copy(self, into: list[Tensor] | None = None) -> list[Tensor]:
        """Copy the masters, into earlier copies where given."""
        if into is None:
            return [t.detach().clone() for t in self.tensors]
        for there, t in zip(into, self.tensors, strict=True):
            there.copy_(t)
        return into

    @torch.no_grad()
    def write(self, values: Sequence[Tensor]) -> None:
        """Set the masters, and the working weights with them."""
        for master, value in zip(self.tensors, values, strict=True):
            master.copy_(value)
        self.push()

    def restore(self, optimizer: torch.optim.Optimizer, resumed: dict[str, Any]) -> tuple[int, list[dict], float]:
        """Take up a checkpoint: weights, optimizer state; returns step, history and seconds so far."""
        tensors = resumed["tensors"]
        self.write([tensors[f"weight/{n}"] for n in self.names])
        for name, master in zip(self.names, self.tensors, strict=True):
            if f"step/{name}" not in tensors:
                continue
            # On CUDA the fused AdamW keeps its count on the device too.
            optimizer.state[master] = {
                key: tensors[f"{key}/{name}"].to(master.device) for key in ("step", "exp_avg", "exp_avg_sq")
            }
        return resumed["step"], resumed["history"], resumed["seconds"]

    def finish(self) -> None:
        """Leave the layers plain: no gradients, no compiled calls, low-rank updates merged."""
        for param in itertools.chain(self.params, self.tensors):
            param.grad = None
        for layer in self.layers.values():
            if self.compiled:
                layer._compiled_call_impl = None
            if self.lora:
                from ildlab.distill.lora import merge_lora

                merge_lora(layer)
            layer.requires_grad_(False)


# -------------------------------------------------------------- checkpoints


def fingerprint(ids: Tensor, mask: Tensor | None = None) -> str:
    """sha256 (hex) of token rows."""
    digest = hashlib.sha256(f"{tuple(ids.shape)}|".encode())
    digest.update(ids.cpu().to(torch.int32).contiguous().numpy().tobytes())
    if mask is not None:
        digest.update(mask.cpu().to(torch.int8).contiguous().numpy().tobytes())
    return digest.hexdigest()


# Fields of the config that leave the result as it is.
_FREE = (
    "checkpoint_every",
    "tracker",
    "grad_checkpointing",
    "compile",
    "fused",
    "chunk",
    "micro_batch",
    "bottom_bytes",
)


def decisive(config: DistillConfig) -> dict[str, Any]:
    """The fields of a config that decide what a distillation makes."""
    return {k: v for k, v in config.to_dict().items() if k not in _FREE} | {"seed": config.seed or 0}


def identity(config: DistillConfig, trained, gap, layer_ids, text: str, weights: str) -> str:
    """A name for one distillation: equal only where a checkpoint of one may be carried on by the other."""
    whole = json.dumps([decisive(config), list(trained), list(gap), list(layer_ids), text, weights], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


_ELSEWHERE = ("_name_or_path", "transformers_version")  # where a model was read from, and by what


def weights_hash(*stacks: LayerStack) -> str:
    """sha256 (hex) of the models' configs and of a sample of every weight: all of it would take seconds."""
    digest = hashlib.sha256()
    for stack in stacks:
        told = {k: v for k, v in stack.model.config.to_dict().items() if k not in _ELSEWHERE}
        told = json.dumps(told, sort_keys=True, default=str)
        digest.update(f"{stack.layer_ids}{told}".encode())
        for name, param in named_weights(stack.model):
            flat = param.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 256)][:256].float().cpu()
            digest.update(f"{name}{tuple(param.shape)}{param.dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path, name: str, masters: Masters, optimizer, step: int, history, seconds: float) -> None:
    """Write weights, optimizer state and history as one safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {}
    for at, master in zip(masters.names, masters.tensors, strict=True):
        tensors[f"weight/{at}"] = master.detach()
        # A weight that no gradient has reached has no state.
        for key, value in optimizer.state.get(master, {}).items():
            tensors[f"{key}/{at}"] = value
    told = {"identity": name, "step": str(step), "seconds": repr(seconds), "history": json.dumps(history)}
    with atomic_file(path) as temporary:
        save_file({k: t.contiguous() for k, t in tensors.items()}, temporary, metadata=told)


def load_checkpoint(path, name: str) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote, or None where there is no file.

    Raises
    ------
    DistillError
        The file belongs to another distillation, or cannot be read.
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
    except SafetensorError as error:
        raise DistillError(f"{path} cannot be read as a checkpoint ({error}). Delete it to start anew.") from error
    return {
        "tensors": tensors,
        "step": int(told["step"]),
        "seconds": float(told["seconds"]),
        "history": json.loads(told["history"]),
    }


# ------------------------------------------------------------------- memory


def memory_parts(student, teacher, masters: Masters, optimizer, config: DistillConfig, block: int) -> dict[str, int]:
    """Bytes of a step's parts; `logits` is what a chunk of the divergence holds, estimated."""
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for stack in (student, teacher)
        for p in itertools.chain(stack.model.parameters(), stack.model.buffers())
    }
    size = sum(t.numel() * t.element_size() for t in masters.tensors)
    apart = sum(
        t.numel() * t.element_size() for t, p in zip(masters.tensors, masters.params, strict=True) if t is not p
    )
    state = sum(
        v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)
    )
    vocabulary = student.model.get_input_embeddings().weight.shape[0]
    held = min(config.kl_positions or block, block) * (config.micro_batch or config.batch_size)
    return {
        "weights": sum(storages.values()),
        "masters": apart,
        "snapshot": size,
        "gradients": size,
        "optimizer": state,
        # Both models' logits, both log softmaxes and one product.
        "logits": 5 * 4 * vocabulary * (min(config.chunk, held) if config.fused else held),
    }


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
    with contextlib.suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return 0  # Windows: not known
