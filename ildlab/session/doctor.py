"""The doctor: can a family's config describe a student, and is a saved checkpoint the student?"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ildlab.errors import ExportError, first_line
from ildlab.model.generate import greedy
from ildlab.model.whole import quiet
from ildlab.model.stack import LayerStack

PROBE = "The layers of a transformer refine the hidden state step by step, so that"


@dataclass(frozen=True)
class Verdict:
    """What the doctor found when it loaded a checkpoint with stock transformers."""

    logits_error: float  # largest difference of logits to the student's, relative to the largest logit
    same_with_cache: bool  # greedy generation with the KV cache and without (or parts at two equally likely tokens)
    layers: int
    text: str  # the greedy continuation of a probe

    def __str__(self) -> str:
        cache = "the same with and without the KV cache" if self.same_with_cache else "DIFFERENT with the KV cache"
        equal = f"logits equal the student's to {self.logits_error:.1e} of the largest"
        return f"{self.layers} layers; {equal}; generation is {cache}"


@torch.no_grad()
def examine(folder: str | Path, student: LayerStack, tokenizer, *, exact: bool = True) -> Verdict:
    """Load a checkpoint with stock transformers; ExportError where it is not the student.

    `exact` says that the checkpoint's dtype holds every weight; else its logits may differ by the rounding.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=student.model.dtype, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:
        raise ExportError(f"The checkpoint does not load with stock transformers: {error}") from error
    odd = {k: sorted(map(str, v)) for k, v in info.items() if v and k != "error_msgs"}
    if odd:
        raise ExportError(f"The checkpoint loads, but with {odd}: its config does not describe the student.")
    model.to(student.device).eval()
    ids = tokenizer(PROBE, return_tensors="pt").input_ids.to(student.device)  # [1, T]
    want = student.model(input_ids=ids, use_cache=False).logits.float()  # [1, T, V]
    got = model(input_ids=ids, use_cache=False).logits.float()
    error = float((want - got).abs().max() / want.abs().max())
    rounding = 1e-5 if student.model.dtype == torch.float32 else 2e-2
    if not error <= (rounding if exact else 5e-2):
        raise ExportError(f"The checkpoint's logits differ from the student's by {error:.2g} of the largest logit.")
    with_cache, without = (greedy(model, ids, use_cache=cached)[0] for cached in (True, False))  # [T + new]
    text = tokenizer.decode(with_cache[ids.shape[1] :], skip_special_tokens=True)
    same = same_but_for_rounding(model, with_cache, without, rounding)
    return Verdict(error, same, model.config.get_text_config().num_hidden_layers, text)


def same_but_for_rounding(model, one: Tensor, other: Tensor, rounding: float) -> bool:
    """Whether two greedy continuations [T] are one, or part at two tokens that are equally likely in this dtype."""
    length = min(len(one), len(other))
    apart = (one[:length] != other[:length]).nonzero()
    if not len(apart):
        return len(one) == len(other)
    at = int(apart[0])
    logits = model(input_ids=one[None, :at], use_cache=False).logits[0, -1].float()  # [V]
    return bool((logits[one[at]] - logits[other[at]]).abs() <= rounding * logits.abs().max())


def check_describable(stack: LayerStack) -> None:
    """Raise ExportError, before anything is removed, where the family's config cannot describe a stack without a layer.

    Where the kinds of layers follow from a period (Jamba), or from anything else that is no list in the config, a
    student without its first layer is another model than the config says: it could be neither saved nor run with a
    KV cache. Models are built without weights.
    """
    if len(stack) < 2:
        return
    try:
        if _shapes(_built(stack)) != _shapes(stack.model):
            return  # quantised weights, an adapter: the class alone does not make this model
    except Exception:  # it computes with weights while it is built: only `examine` can tell
        return
    name, trial, kinds = type(stack.model).__name__, stack.share(without=stack.layer_ids[:1]), _kinds(stack.config)
    wanted = _shapes(trial.model)
    try:
        found = _shapes(_built(trial))
    except Exception as error:  # whatever a family's constructor says of its config
        raise ExportError(f"{name} cannot lose a layer: its config is then refused ({first_line(error)}).") from error
    if found != wanted or _kinds(trial.config) != kinds[1:]:
        odd = sorted(set(found) ^ set(wanted)) or sorted(n for n in found if found[n] != wanted[n]) or kinds
        raise ExportError(
            f"{name} cannot lose a layer: its config tells the kinds of layers by a rule, not by a list (first difference: {odd[0]})."
        )


def _built(stack: LayerStack):
    """The model that the stack's config describes, without weights."""
    with torch.device("meta"), quiet():
        return type(stack.model)(copy.deepcopy(stack.model.config))


def _shapes(model) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _kinds(config) -> list:
    """Kinds of the layers by position, as the config tells them; empty where it tells none."""
    told = (getattr(config, name, None) for name in ("layer_types", "layers_block_type"))
    return next((list(k) for k in told if isinstance(k, (list, tuple)) and len(k) == config.num_hidden_layers), [])
