"""The twin of a student: the model that its config describes, with its weights. A checkpoint will be that model.

A family may make of an index, of the depth or of a period what no list in the config tells: a scale that falls from
layer to layer, attention in every fourth layer. After a removal the student in memory and its checkpoint would then
be two models. The twin is built from the config anew, without copying a weight, and asked for the same logits.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ildlab.errors import ExportError
from ildlab.model.generate import greedy
from ildlab.model.stack import LayerStack
from ildlab.model.whole import quiet

_NEW = 2  # tokens generated with the KV cache and without: the second comes from the cache


def twin_of(stack: LayerStack) -> nn.Module:
    """The model that the stack's config describes, in evaluation mode, with the stack's own weights (not copies).

    Raises whatever the family's constructor says of its config, and RuntimeError where the weights do not fit it.
    """
    model = stack.model
    config = type(model.config).from_dict(model.config.to_dict())
    config._attn_implementation = model.config._attn_implementation
    with _no_memory(), quiet():
        twin = type(model)(config)
    twin.load_state_dict(model.state_dict(), strict=True, assign=True)
    return twin.to(stack.device).eval() if not _elsewhere(model) else twin.eval()


@contextlib.contextmanager
def _no_memory() -> Iterator[None]:
    """Let modules that are made keep their parameters on no memory; buffers, which are computed, are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        empty = None if param is None else nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, empty)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@torch.no_grad()
def difference(stack: LayerStack) -> str:
    """What the model of the stack's config computes otherwise than the stack, in words; empty where they are one."""
    try:
        twin = twin_of(stack)
        if _elsewhere(stack.model):  # offloaded: nothing can be run but layer by layer
            return ""
        want, got = (m(input_ids=stack.probe(), use_cache=False).logits.float() for m in (stack.model, twin))
    except Exception as error:  # whatever a family's constructor says of a config, or its forward
        return _in_words(error)
    error = float((want - got).abs().max() / want.abs().max())
    if error <= (1e-4 if stack.model.dtype == torch.float32 else 2e-2):
        return ""
    return f"its logits differ by {error:.2g} of the largest{_constant(stack.model, twin)}"


def cache_difference(stack: LayerStack) -> str:
    """What goes wrong where the stack's model goes on with a text with its KV cache, in words; empty where nothing does."""
    model, ids = stack.model, stack.probe()
    if _elsewhere(model) or not model.can_generate():
        return ""
    try:
        with_cache, without = (
            greedy(model, ids, tokens=_NEW, exactly=True, use_cache=cached) for cached in (True, False)
        )
    except Exception as error:
        return f"with the KV cache: {_in_words(error)}"
    rounding = 1e-4 if model.dtype == torch.float32 else 2e-2
    same = all(same_but_for_rounding(model, a, b, rounding) for a, b in zip(with_cache, without, strict=True))
    return "" if same else "its text differs with the KV cache"


def same_but_for_rounding(model: nn.Module, one: Tensor, other: Tensor, rounding: float) -> bool:
    """Whether two greedy continuations [T] are one, or part at two tokens that are equally likely in this dtype."""
    length = min(len(one), len(other))
    apart = (one[:length] != other[:length]).nonzero()
    if not len(apart):
        return len(one) == len(other)
    at = int(apart[0])
    logits = model(input_ids=one[None, :at], use_cache=False).logits[0, -1].float()  # [V]
    return bool((logits[one[at]] - logits[other[at]]).abs() <= rounding * logits.abs().max())


def check_savable(stack: LayerStack) -> None:
    """Raise ExportError where a model cannot be saved and read again as it is, before anything is done to it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model, name = stack.model, type(stack.model).__name__
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        raise ExportError(
            f"{name} carries an adapter (LoRA or its like): a student would be saved without it. Merge it first "
            "(model = model.merge_and_unload()), and give the merged model."
        )
    if getattr(model.config, "quantization_config", None) is not None or getattr(model, "hf_quantizer", None):
        raise ExportError(
            f"{name} is quantised: its layers can be looked at, but not trained and saved as a plain checkpoint. Load "
            "the original, or dequantise it first (model.dequantize(), or dtype=torch.bfloat16 from its unquantised "
            "checkpoint), and save that."
        )
    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            model.config.save_pretrained(folder)
            if model.generation_config is not None:
                without_sampling(model.generation_config).save_pretrained(folder)
            again = AutoConfig.from_pretrained(folder)
            with torch.device("meta"):
                known = type(AutoModelForCausalLM.from_config(again))
        if known is not type(model):
            raise ValueError(f"for its config transformers loads a {known.__name__}")
    except Exception as error:
        raise ExportError(
            f"{name} cannot be saved as a checkpoint that transformers loads again: {_in_words(error)}. Correct that in "
            "the teacher (config.json, generation_config.json), and load it anew."
        ) from error
    if odd := difference(stack):
        raise ExportError(
            f"{name}, saved and loaded again, would be another model before any layer is removed: {odd}."
        )


def check_cuts(stack: LayerStack) -> None:
    """Raise ExportError where a family's config cannot describe a stack without its middle layer, nor without an outer one.

    A family may have one layer that is like no other (the first of ModernBERT has no norm): only that one stays then.
    """
    ids = stack.layer_ids
    if len(ids) < 2 or not (odd := cut_difference(stack, ids[len(ids) // 2])):
        return
    if any(cut_difference(stack, layer_id) for layer_id in (ids[0], ids[-1])):
        raise ExportError(
            f"{type(stack.model).__name__} cannot lose a layer: its config tells by a rule, not by a list, what a layer is, "
            f"so that a checkpoint of what is left would be another model ({odd})."
        )


def cut_difference(stack: LayerStack, layer_ids: int | Iterable[int]) -> str:
    """What would be otherwise in a checkpoint of the stack without these layers, in words; empty where nothing would."""
    with stack.without(layer_ids):
        odd = difference(stack) or cache_difference(stack)
    # Some families part with and without the cache, or have none, as they are: that is none of the removal's.
    return "" if "KV cache" in odd and cache_difference(stack) else odd


def without_sampling(config: Any) -> Any:
    """A generation config as it works, so that it can be saved: what only sampling uses goes where nothing is sampled.

    Many checkpoints (Llama 2) come with a temperature and no `do_sample`, which transformers does not save.
    """
    config = copy.deepcopy(config)
    if not config.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(config, name, None)
    return config


def _in_words(error: Exception, most: int = 200) -> str:
    """What an error says, on one line: the first of torch's and of huggingface_hub's names only who says it."""
    said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return said if len(said) <= most else f"{said[:most]} ..."


def _elsewhere(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _constant(model: nn.Module, twin: nn.Module) -> str:
    """The first number that the two models' modules hold otherwise: what the class makes of an index or of the depth."""
    others = dict(twin.named_modules())
    for place, module in model.named_modules():
        for name, value in vars(module).items():
            if name == "training":
                continue
            other = vars(others[place]).get(name) if place in others else None
            if isinstance(value, (int, float)) and isinstance(other, (int, float)) and value != other:
                return f" ({place}.{name} is {value:.4g}, and {other:.4g} when it is built anew)"
    return ""
