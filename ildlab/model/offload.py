"""Layers that accelerate keeps on disk or in main memory (`device_map`): bring each in once.

accelerate loads an offloaded module's weights at every call and drops them after it. A sweep calls
one layer for many batches and branches in a row: `resident` loads it once for all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn


def _hooks(module: nn.Module) -> Iterator[tuple[nn.Module, object]]:
    """Every (submodule, accelerate hook) that loads weights at each call."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):  # a SequentialHook holds several
            if getattr(each, "offload", False):
                yield part, each


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`model.named_parameters()`, with the values of those that accelerate keeps elsewhere."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            place, _, leaf = name.rpartition(".")
            owner = model.get_submodule(place)
            for part, hook in _hooks(owner):
                if part is owner and hook.weights_map is not None:
                    parameter = hook.weights_map[leaf]
        yield name, parameter


def is_offloaded(layers: nn.ModuleList) -> bool:
    """Tell whether accelerate keeps weights of any of these layers elsewhere."""
    return any(True for _ in _hooks(layers))


@contextlib.contextmanager
def resident(layer: nn.Module) -> Iterator[None]:
    """Keep a layer's weights on its device for as long as the context lasts."""
    held = []
    try:
        for part, hook in _hooks(layer):
            hook.pre_forward(part)
            hook.offload = False  # the calls inside neither load nor drop
            held.append((part, hook))
        yield
    finally:
        for part, hook in held:
            hook.offload = True
            hook.post_forward(part, None)
