"""What a model takes: token ids that its embedding has rows for, in sequences no longer than its window."""

from __future__ import annotations

from typing import Any

from ildlab.errors import ModelError

_NAMES = "n_positions", "max_position_embeddings", "n_ctx", "max_seq_len"  # as lm-eval looks for it; the last is MPT's


def model_window(model: Any) -> int | None:
    """Longest sequence that a model was made for, as its config says; None where it says nothing (BLOOM, Mamba).

    A sliding window is no limit: it says how far back a layer looks.
    """
    config = model.config.get_text_config()
    return next((n for name in _NAMES if isinstance(n := getattr(config, name, None), int) and n > 0), None)


def fitting(model: Any, prompt: Any, new: int) -> tuple[Any, int]:
    """A prompt, int Tensor [B, T], and how many tokens are to follow it: both cut where the window is too short for them."""
    limit = model_window(model)
    if limit is None or prompt.shape[1] + new <= limit:
        return prompt, new
    prompt = prompt[:, : max(1, limit // 2)]
    return prompt, min(new, limit - prompt.shape[1])


def check_length(model: Any, tokens: int, new: int = 0) -> None:
    """Raise ModelError where a sequence, or a prompt and the tokens that are to follow it, is longer than the window.

    With learned positions a model would crash there; with others it would run as it was never trained to.
    """
    limit = model_window(model)
    if limit is None or tokens + new <= limit:
        return
    if new:
        raise ModelError(
            f"A prompt of {tokens} tokens and {new} new ones are {tokens + new}, more than the model's window of {limit}: "
            "shorten the prompt, or ask for fewer tokens."
        )
    raise ModelError(
        f"A sequence has {tokens} tokens, and the model's window is {limit} (its config says so): give a shorter one, "
        f"or for a text block={limit} at most."
    )


def check_ids(model: Any, ids: Any, tokenizer: Any = None) -> None:
    """Raise ModelError where one of the token ids, an int Tensor of any shape, has no row in the model's embedding.

    A tokenizer may have more tokens than that (padding that was added and never learned): what counts is what occurs.
    On a GPU this waits for the device: look while ids are on the CPU. `tokenizer` tells the token's text.
    """
    if not ids.numel():
        return
    rows = model.get_input_embeddings().weight.shape[0]
    ids = ids.detach().cpu().numpy()
    low, high = int(ids.min()), int(ids.max())
    if 0 <= low and high < rows:
        return
    odd = high if high >= rows else low
    text = tokenizer.convert_ids_to_tokens(odd) if tokenizer is not None and odd >= 0 else None
    raise ModelError(
        f"Token id {odd}{f' ({text!r})' if text is not None else ''} has no row in the model's embedding, whose ids are "
        f"0 to {rows - 1}: take that token out of the text, or load the tokenizer that the model was trained with."
    )


def check_input(model: Any, ids: Any, *, new: int = 0, tokenizer: Any = None) -> None:
    """Raise ModelError where a model cannot take token ids [..., T], or go on with them for `new` tokens."""
    check_length(model, ids.shape[-1], new)
    check_ids(model, ids, tokenizer)
