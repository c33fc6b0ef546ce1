"""The name of a model's weights: one fingerprint, for runs, checkpoints and kept results."""

from __future__ import annotations

import hashlib
import json

import torch

from ildlab.model.offload import named_weights
from ildlab.model.stack import LayerStack

SAMPLE = 256  # values of each tensor that are looked at: all of them would take seconds
_ELSEWHERE = ("_name_or_path", "transformers_version")  # where a model was read from, and by what


def fingerprint(stack: LayerStack, *, any_dtype: bool = False) -> str:
    """sha256 (hex) of a model: config, layer ids, and a sample of every weight.

    Kept on the stack for as long as no weight is written to or replaced.

    With `any_dtype` it is of the weights alone, as bf16 holds them: the same name for a checkpoint in bf16 and in fp32.
    """
    state = tuple((name, p.data_ptr(), p._version) for name, p in stack.model.named_parameters())
    state = (any_dtype, tuple(stack.layer_ids), str(stack.config.to_dict()) if not any_dtype else "", state)
    kept = stack.__dict__.setdefault("_fingerprints", {})
    known = kept.get(any_dtype)
    if known is None or known[0] != state:
        kept[any_dtype] = known = (state, _digest(stack, any_dtype))
    return known[1]


@torch.no_grad()
def _digest(stack: LayerStack, any_dtype: bool) -> str:
    digest = hashlib.sha256()
    if not any_dtype:
        told = {k: v for k, v in stack.model.config.to_dict().items() if k not in _ELSEWHERE}
        digest.update(f"{stack.layer_ids}{json.dumps(told, sort_keys=True, default=str)}".encode())
    for name, tensor in named_weights(stack.model):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].cpu()
        sample = (sample.to(torch.bfloat16) if any_dtype else sample).double()
        dtype = "" if any_dtype else tensor.dtype
        digest.update(f"{name}{tuple(tensor.shape)}{dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()
