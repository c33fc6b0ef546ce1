"""Make a config true of a stack with fewer layers, and put it back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

_INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
_NAMING = ("full_attn_idxs", "moe_layers", "mlp_only_layers", "attn_layer_indices", "cross_attention_layers")
_THRESHOLDS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_FROM_ONE = ("ple_layer_ids",)  # these name layers counting from 1
BY_NUMBER = (*_NAMING, *_THRESHOLDS, *_FROM_ONE, "moe_layer_end_index")  # entries that name layers by their numbers


def layer_indices(layers: Iterable[nn.Module]) -> list[tuple[nn.Module, str, int]]:
    """Every attribute in the layers by which a submodule knows its layer's position."""
    found = []
    for layer in layers:
        for module in layer.modules():
            for name in _INDEX_NAMES:
                value = module.__dict__.get(name)
                if isinstance(value, int) and value >= 0:  # a block that layers share has -1
                    found.append((module, name, value))
    return found


def number_by_position(layers: nn.ModuleList) -> None:
    """Tell the modules of each layer the position that it has now, whatever they had."""
    for place, layer in enumerate(layers):
        found = layer_indices([layer])
        # A layer that counts its parts apart (2 i, 2 i + 1) goes by a rule of its own.
        if len({value for _, _, value in found}) == 1:
            for module, name, _ in found:
                setattr(module, name, place)


def config_entries(config) -> dict[str, Any]:
    return {k: (list(v) if isinstance(v, list) else v) for k, v in config.__dict__.items()}


def restore_config(config, entries: dict[str, Any]) -> None:
    for name in list(config.__dict__):
        if name not in entries:
            del config.__dict__[name]
    config.__dict__.update(entries)


def layer_lists(config) -> frozenset[str]:
    """Names of the config's lists that hold an entry for each layer. Asked for once, of the whole model.

    A list may have that length by chance (a range of two numbers, in a model of two layers): where the class's own
    default has a list of another length than its default depth, it is none of layers.
    """
    count = config.num_hidden_layers
    found = {
        name
        for name, value in config.__dict__.items()
        if isinstance(value, (list, tuple))
        and len(value) == count
        and name not in _NAMING + _FROM_ONE
        and not name.endswith(("_ids", "_id"))
    }
    try:
        default = type(config)()
        depth = default.num_hidden_layers
    except Exception:  # a class without defaults says nothing
        return frozenset(found)
    own = {name: getattr(default, name, None) for name in found}
    return frozenset(name for name in found if not isinstance(own[name], (list, tuple)) or len(own[name]) == depth)


def cut_config(config, positions: list[int], lists: frozenset[str]) -> None:
    """Make the config true of a stack that keeps `positions`; `lists` are those of `layer_lists`."""
    renumber = {old: new for new, old in enumerate(positions)}
    for name, value in list(config.__dict__.items()):
        if name in _NAMING and isinstance(value, (list, tuple)):
            config.__dict__[name] = [renumber[v] for v in value if v in renumber]
        elif name in _FROM_ONE and isinstance(value, (list, tuple)):
            config.__dict__[name] = [renumber[v - 1] + 1 for v in value if v - 1 in renumber]
        elif name in _THRESHOLDS and isinstance(value, int):
            config.__dict__[name] = sum(1 for p in positions if p < value)
        elif name == "moe_layer_end_index" and isinstance(value, int) and value >= 0:  # the last one, itself included
            config.__dict__[name] = sum(1 for p in positions if p <= value) - 1
        elif name in lists:
            config.__dict__[name] = type(value)(value[p] for p in positions)
    if (spec := config.__dict__.get("_heterogeneity_spec")) is not None:  # what single layers have of their own
        own = {renumber[old]: value for old, value in spec.per_layer_overrides.items() if old in renumber}
        config.__dict__["_heterogeneity_spec"] = replace(spec, per_layer_overrides=own)
    if getattr(config, "attention_layers", None) and getattr(config, "attention_types", None):
        # GPT-Neo writes the same list a second time, folded: [[[types], repeats]].
        config.attention_types = [[list(config.attention_layers), 1]]
    config.num_hidden_layers = len(positions)
