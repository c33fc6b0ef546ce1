"""The one reader of `blocks`: whatever measures, trains or evaluates on text takes it through `Rows.of`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ildlab.errors import TextError
from ildlab.text.blocks import TextBlocks


@dataclass
class Rows:
    """Sequences of one length, on the CPU."""

    tokens: torch.Tensor  # [N, T] int
    mask: torch.Tensor | None  # [N, T] bool, False where a token is padding; None where nothing is
    source: str  # where they come from, for a person
    text: dict[str, str] = field(default_factory=dict)  # source, split, fingerprint of TextBlocks; else empty
    scored: torch.Tensor | None = None  # [N, T] bool, where layers are scored; None: everywhere
    kinds: tuple[str, ...] = ()  # what kind of text each sequence is, of a mixture

    @classmethod
    def of(cls, blocks: TextBlocks | torch.Tensor | Mapping[str, Any] | Rows) -> Rows:
        """Read TextBlocks, a tensor [N, T], or a mapping with `input_ids` and perhaps `attention_mask`.

        Raises TextError where it is none of them, holds nothing, or has sequences of one token or without a valid one.
        """
        if isinstance(blocks, Rows):
            return blocks
        tokens, mask, name, text, more = blocks, None, "given tokens", {}, {}
        if isinstance(blocks, TextBlocks):
            more = {"scored": blocks.scored, "kinds": blocks.kinds}
            tokens, name = blocks.tokens, f"{blocks.source} ({blocks.split})"
            text = {key: getattr(blocks, key) for key in ("source", "split", "fingerprint")}
        elif isinstance(blocks, Mapping):
            tokens, mask = blocks.get("input_ids"), blocks.get("attention_mask")
        if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
            found = tuple(tokens.shape) if hasattr(tokens, "shape") else type(tokens).__name__
            raise TextError(
                f"blocks: expected TextBlocks, an integer tensor [N, T], or a mapping with such input_ids; got {found}."
            )
        if tokens.shape[0] < 1 or tokens.shape[1] < 2:
            raise TextError(
                f"blocks: at least 1 sequence of 2 tokens is needed, got a shape of {tuple(tokens.shape)}."
            )
        if mask is not None:
            if tuple(mask.shape) != tuple(tokens.shape):
                raise TextError(f"attention_mask: {tuple(mask.shape)} where input_ids are {tuple(tokens.shape)}.")
            mask = mask.bool().cpu()
            if bool((~mask.any(1)).any()):
                raise TextError("attention_mask: a sequence has no valid token.")
            mask = None if bool(mask.all()) else mask
        first = ", BOS first" if getattr(blocks, "bos", ()) else ""
        return cls(tokens.cpu(), mask, f"{name}, {tokens.shape[0]} × {tokens.shape[1]} tokens{first}", text, **more)

    def batch(self, rows: np.ndarray) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return what `LayerStack.trunk` takes for these rows: int64 [B, T], in a mapping where there is a mask."""
        pick = torch.as_tensor(rows)
        ids = self.tokens[pick].long()
        return ids if self.mask is None else {"input_ids": ids, "attention_mask": self.mask[pick].long()}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex): that of the TextBlocks, else of token ids and mask. Made when first asked for."""
        if self.text:
            return self.text["fingerprint"]
        digest = hashlib.sha256(f"{tuple(self.tokens.shape)}|".encode())
        digest.update(self.tokens.to(torch.int32).contiguous().numpy().data)
        if self.mask is not None:
            digest.update(self.mask.to(torch.int8).contiguous().numpy().data)
        return digest.hexdigest()
