"""What a stack records of a forward pass, and what stands in for layers while it does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Captured(Exception):
    """Raised by the last recorder: the rest of the model's forward is not needed."""


@dataclass
class Trunk:
    """What replaying needs: the embedding output and each layer's captured arguments."""

    h0: Tensor  # [B, T, d], input of the first layer
    calls: list[tuple[tuple, dict]]  # (args, kwargs) for each position of the stack, without the hidden state
    attention_mask: Tensor | None  # [B, T], 1 where a token is valid; None where all are
    input_ids: Tensor  # [B, T]


class Stub(nn.Module):
    """Stands in for the whole stack and returns a given hidden state."""

    def __init__(self, like: nn.Module, answer: Callable[[Tensor], Any]):
        super().__init__()
        object.__setattr__(self, "_like", like)
        self._answer = answer  # a hidden state in the form in which the layer returns it
        self.hidden: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of a layer, such as its attention type.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_like"), name)

    def forward(self, *args, **kwargs):
        return self._answer(self.hidden)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; from the host by way of pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def shape_of(out: Any) -> Callable[[Tensor], Any]:
    """How a layer that returned `out` returns a hidden state: bare, or first in a tuple or list of that length."""
    if not isinstance(out, (tuple, list)):
        return lambda hidden: hidden
    kind, rest = type(out), [None] * (len(out) - 1)
    return lambda hidden: kind([hidden, *rest])


def split_hidden(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    if args:
        return args[0], args[1:], dict(kwargs)
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), (), kwargs


@contextlib.contextmanager
def forward_replaced(layer: nn.Module, forward) -> Iterator[None]:
    # accelerate's offload hooks also live in the instance's __dict__: put back exactly what was there.
    before, compiled = layer.__dict__.get("forward"), layer._compiled_call_impl
    layer.forward, layer._compiled_call_impl = forward, None  # a compiled layer would compile this stand-in
    try:
        yield
    finally:
        layer._compiled_call_impl = compiled
        if before is None:
            del layer.__dict__["forward"]
        else:
            layer.__dict__["forward"] = before
