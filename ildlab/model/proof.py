"""Why the proof of a stack failed: what is told before a model is called one that ildlab cannot replay."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def what_is_odd(model: nn.Module, *logits: Tensor) -> str:
    """What is wrong with a model as it is, and what to do; empty where nothing is, so that it is the model's kind.

    `logits` are those of the model, or of its replay, where there are some.
    """
    name, dtype = type(model).__name__, str(model.dtype).removeprefix("torch.")
    if not all(bool(each.isfinite().all()) for each in logits):
        weights = ((n, p) for n, p in model.named_parameters() if p.is_floating_point() and not p.is_meta)
        broken = next((n for n, p in weights if not bool(p.float().isfinite().all())), None)
        if broken is not None:
            return (
                f"{name} has weights that are not finite (NaN or infinite) in {dtype}, such as {broken}: the checkpoint is "
                "damaged, or holds values that this dtype does not. Load it in float32, or fetch it again."
            )
        narrow = model.dtype == torch.float16
        advice = "Load it in bfloat16 or float32" if narrow else "Check its config, or fetch the checkpoint again"
        return f"The logits of {name} are not finite (NaN or infinite): values overflow in {dtype}. {advice}."
    if any(module.training for module in model.modules()):
        return f"{name} is in training mode, where dropout makes every pass another one: call model.eval() first."
    return ""
