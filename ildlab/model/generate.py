"""Greedy decoding: the one way in which ildlab lets a model go on with a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ildlab.limits import check_input


@contextmanager
def plain_decoding(model, **settings: Any) -> Iterator[None]:
    """Within the block `model.generate` decodes greedily, whatever the checkpoint's `generation_config` says.

    What that may ask for (beams, several sequences, a least length, dictionaries in place of tokens, penalties)
    would change or break a greedy answer. Of it only the ids that end and fill a sequence are taken.

    Parameters
    ----------
    **settings
        Further fields of the `GenerationConfig`.
    """
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    end = getattr(own, "eos_token_id", None)
    end = model.config.get_text_config().eos_token_id if end is None else end
    pad = getattr(own, "pad_token_id", None)
    first_end = end[0] if isinstance(end, (list, tuple)) else end
    pad = pad if pad is not None else 0 if first_end is None else first_end
    # `generate` fills what a given config leaves open from the model's own config, so that one is set aside.
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, eos_token_id=end, pad_token_id=pad, **settings
    )
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def greedy(model, ids: Tensor, *, tokens: int = 24, exactly: bool = False, use_cache: bool = True) -> Tensor:
    """Greedy continuation of `ids` by the model's own `generate` (see `plain_decoding`), prompt included.

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

    Raises
    ------
    ModelError
        Prompt and new tokens are more than the model's window, or a token has no row in its embedding.
    """
    check_input(model, ids, new=tokens)
    ids = ids.to(model.get_input_embeddings().weight.device)
    least = tokens if exactly else None
    with plain_decoding(model, max_new_tokens=tokens, min_new_tokens=least, use_cache=use_cache):
        return model.generate(ids, attention_mask=torch.ones_like(ids))
