"""Greedy decoding: the one way in which ildlab lets a model go on with a text."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def greedy(model, ids: Tensor, *, tokens: int = 24, exactly: bool = False, use_cache: bool = True) -> Tensor:
    """Greedy continuation of `ids` by the model's own `generate`, prompt included.

    Decoding starts from a config of its own: what a checkpoint's `generation_config` asks for (beams, several
    sequences, a least length, dictionaries in place of tokens, penalties) would change or break a greedy answer.
    Of it only the ids that end and fill a sequence are taken.

    Parameters
    ----------
    model : nn.Module
        A causal LM of transformers.
    ids : Tensor [B, T] of int64
        Without padding.
    tokens : int
        New tokens, at most.
    exactly : bool
        All of them, also past an end of text: for timing.

    Returns
    -------
    Tensor [B, T + new] of int64
    """
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    end = getattr(own, "eos_token_id", None)
    end = model.config.get_text_config().eos_token_id if end is None else end
    pad = getattr(own, "pad_token_id", None)
    first_end = end[0] if isinstance(end, (list, tuple)) else end
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=tokens,
        min_new_tokens=tokens if exactly else None,
        use_cache=use_cache,
        eos_token_id=end,
        pad_token_id=pad if pad is not None else 0 if first_end is None else first_end,
    )
    ids = ids.to(model.get_input_embeddings().weight.device)
    # `generate` fills what a given config leaves open from the model's own config, so that one is set aside.
    model.generation_config = GenerationConfig()
    try:
        return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    finally:
        model.generation_config = own
