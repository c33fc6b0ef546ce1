"""The doctor: can what a run will make be saved, and is a saved checkpoint the student?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ildlab.errors import ExportError
from ildlab.limits import fitting
from ildlab.model.generate import greedy
from ildlab.model.stack import LayerStack
from ildlab.model.twin import check_cuts, check_savable, same_but_for_rounding
from ildlab.model.whole import quiet
from ildlab.text.blocks import encode_prompts

PROBE = "The layers of a transformer refine the hidden state step by step, so that"
NEW = 24  # tokens that are to follow it


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
    ids, new = fitting(model, torch.tensor(encode_prompts(tokenizer, [PROBE])), NEW)
    ids = ids.to(student.device)  # [1, T]
    want = student.model(input_ids=ids, use_cache=False).logits.float()  # [1, T, V]
    got = model(input_ids=ids, use_cache=False).logits.float()
    error = float((want - got).abs().max() / want.abs().max())
    rounding = 1e-5 if student.model.dtype == torch.float32 else 2e-2
    if not error <= (rounding if exact else 5e-2):
        raise ExportError(f"The checkpoint's logits differ from the student's by {error:.2g} of the largest logit.")
    made = (greedy(model, ids, tokens=new, use_cache=cached)[0] for cached in (True, False))
    with_cache, without = made  # [T + new] each
    text = tokenizer.decode(with_cache[ids.shape[1] :], skip_special_tokens=True)
    same = same_but_for_rounding(model, with_cache, without, rounding)
    return Verdict(error, same, model.config.get_text_config().num_hidden_layers, text)


def check_describable(stack: LayerStack) -> None:
    """Raise ExportError, before anything is done, where what a run would make could not be saved and read again."""
    check_savable(stack)
    check_cuts(stack)
