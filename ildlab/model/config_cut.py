"""Make a config true of a stack with fewer layers, and put it back."""

from __future__ import annotations

from typing import Any

from torch import nn

_INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
_NAMING = ("full_attn_idxs", "moe_layers", "mlp_only_layers", "attn_layer_indices", "cross_attention_layers")
_THRESHOLDS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")


def layer_indices(layers: nn.ModuleList) -> list[tuple[nn.Module, str, int]]:
    """Every attribute in the layers by which a submodule knows its layer's position."""
    found = []
    for layer in layers:
        for module in layer.modules():
            for name in _INDEX_NAMES:
                value = module.__dict__.get(name)
                if isinstance(value, int):
                    found.append((module, name, value))
    return found


def config_entries(config) -> dict[str, Any]:
    return {k: (list(v) if isinstance(v, list) else v) for k, v in config.__dict__.items()}


def restore_config(config, entries: dict[str, Any]) -> None:
    for name in list(config.__dict__):
        if name not in entries:
            del config.__dict__[name]
    config.__dict__.update(entries)


def cut_config(config, positions: list[int], count: int) -> None:
    """Make the config true of a stack that keeps `positions` out of `count` layers."""
    renumber = {old: new for new, old in enumerate(positions)}
    for name, value in list(config.__dict__.items()):
        if name in _NAMING and isinstance(value, (list, tuple)):
            config.__dict__[name] = [renumber[v] for v in value if v in renumber]
        elif name in _THRESHOLDS and isinstance(value, int):
            config.__dict__[name] = sum(1 for p in positions if p < value)
        elif isinstance(value, (list, tuple)) and len(value) == count and not name.endswith(("_ids", "_id")):
            config.__dict__[name] = [value[p] for p in positions]
    if getattr(config, "attention_layers", None) and getattr(config, "attention_types", None):
        # GPT-Neo writes the same list a second time, folded: [[[types], repeats]].
        config.attention_types = [[list(config.attention_layers), 1]]
    config.num_hidden_layers = len(positions)
