"""Find the decoder layers of any causal LM, without knowing its family."""

from __future__ import annotations

from torch import nn

from ildlab.errors import UnsupportedModelError


def text_config(model: nn.Module):
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no config: give a causal LM of transformers.")
    text = config.get_text_config()
    if getattr(text, "num_hidden_layers", None) is None:
        raise UnsupportedModelError(f"The config of {type(model).__name__} does not say num_hidden_layers.")
    return text


def find_layers(model: nn.Module, count: int) -> tuple[nn.Module, str]:
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model: ildlab compresses decoder-only causal LMs."
        )
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, nn.ModuleList)
        and len(child) == count
        and len({type(layer) for layer in child}) <= 4
        and all(any(True for _ in layer.parameters()) for layer in child)
    ]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds no list of {count} modules (its num_hidden_layers): "
            "the decoder layers were not found."
        )
    # Lists of the same length (experts, say) may lie deeper: the decoder layers hold the most weights.
    return max(found, key=lambda at: sum(p.numel() for p in at[0]._modules[at[1]].parameters()))
