"""Low-rank updates of a layer's linear maps, through peft, and their merge into plain weights."""

from __future__ import annotations

import torch
from torch import nn

from ildlab.errors import DistillError


def add_lora(layer: nn.Module, rank: int, seed: int = 0) -> None:
    """Wrap every linear map of a layer so that only a low-rank update of it trains.

    Parameters
    ----------
    layer : nn.Module
        A decoder layer; it is changed in place, its output is not (the update starts at 0).
    rank : int
    seed : int
        Of the updates' random half.

    Raises
    ------
    DistillError
        peft is not installed, or the layer holds no linear map that peft can wrap.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise DistillError(
            "lora_rank needs the package peft: pip install 'ildlab[lora]' or pip install peft."
        ) from error

    names = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise DistillError(f"{type(layer).__name__} holds no nn.Linear: lora_rank cannot be used with this model.")
    # lora_alpha = 2 rank is the usual scaling of 2, whatever the rank.
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, layer)
    for name, param in layer.named_parameters():
        param.requires_grad_("lora_" in name)


def merge_lora(layer: nn.Module) -> None:
    """Fold the updates into the weights and put the plain linear maps back in place."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(layer.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent = layer.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.get_base_layer())
    # peft leaves a note of its config on the module it wrapped.
    layer.__dict__.pop("peft_config", None)
