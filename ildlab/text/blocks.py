"""Text to token blocks: pack documents of any source end to end and cut them to one length.

`ildlab.text.sources` says where text comes from and how splits are kept apart; here it is tokenised,
packed, cached and fingerprinted.
"""

from __future__ import annotations

import hashlib
import html
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ildlab.errors import TextError
from ildlab.files import atomic_file, cache_dir
from ildlab.text.sources import SPLITS, Documents, exists, find_documents

_MAPPED = 16 * 2**20  # tokens (64 MB as int32) from which on blocks live in a memory-mapped file


@dataclass(frozen=True, eq=False)
class TextBlocks:
    """Packed token blocks of one split of a text, with where they came from.

    Parameters
    ----------
    tokens : torch.Tensor
        int32 ``[blocks, block]`` on the CPU; memory-mapped from the cache when large. No padding.
    source, split, seed
        What `load_text` was called with.
    fingerprint : str
        sha256 (hex) of the tokens as little-endian int32 and of the block length.
    note : str
        What a person should know of it, such as that there was less text than asked for.
    """

    tokens: torch.Tensor
    source: str
    split: str
    seed: int
    fingerprint: str
    note: str = ""

    def __len__(self) -> int:
        """Return the number of blocks."""
        return self.tokens.shape[0]

    @property
    def block(self) -> int:
        """Tokens in one block."""
        return self.tokens.shape[1]

    @property
    def n_tokens(self) -> int:
        """Tokens in all blocks."""
        return self.tokens.numel()

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """Yield the blocks in order as int64 tensors ``[b, block]``; the last may hold fewer than `size`."""
        if size < 1:
            raise TextError(f"A batch needs at least 1 block, not {size}.")
        for start in range(0, len(self), size):
            yield self.tokens[start : start + size].long()

    def take(self, n_blocks: int) -> TextBlocks:
        """Return the first `n_blocks` blocks (a view, nothing is copied).

        Raises
        ------
        TextError
            There are fewer, or `n_blocks` is below 1.
        """
        if not 1 <= n_blocks <= len(self):
            raise TextError(f"take({n_blocks}): this text has {len(self)} blocks; take from 1 to {len(self)}.")
        tokens = self.tokens[:n_blocks]
        return replace(self, tokens=tokens, fingerprint=_fingerprint(tokens))

    def __repr__(self) -> str:
        return (
            f"TextBlocks({self.source!r}, split={self.split!r}, seed={self.seed}, {len(self)} blocks of "
            f"{self.block} tokens, {self.fingerprint[:12]})"
        )

    def _repr_html_(self) -> str:
        rows = {
            "source": self.source,
            "split": f"{self.split}, seed {self.seed}",
            "blocks": f"{len(self):,} × {self.block} = {self.n_tokens:,} tokens",
            "fingerprint": self.fingerprint[:12],
        }
        if self.note:
            rows["note"] = self.note
        left = "style='text-align:left'"
        cells = "".join(
            f"<tr><th {left}>{name}</th><td {left}>{html.escape(value)}</td></tr>" for name, value in rows.items()
        )
        return f"<table aria-label='Text blocks'><tbody>{cells}</tbody></table>"


def load_text(
    source: str | os.PathLike | Sequence[str],
    tokenizer: Any,
    *,
    block: int = 256,
    tokens: int | None = None,
    split: str = "calibration",
    seed: int = 0,
    text_column: str | None = None,
) -> TextBlocks:
    """Tokenise a split of a text source and pack it into blocks of one length.

    Documents come in an order set by `seed`. Between two of them stands the tokenizer's EOS token
    (and its BOS, where the tokenizer opens texts with one); BOS where it has no EOS.

    Parameters
    ----------
    source : str, path or sequence of str
        - ``"python-docs"``: Python's own help topics, and the docstrings of the standard library and
          of packages that every install of ildlab has. Needs no network.
        - ``"teacher-samples"``: texts sampled from a teacher, which ship with ildlab.
        - a .txt, .md, .jsonl, .jsonl.gz or .parquet file, or a folder of them.
        - a Hub data set, ``"owner/name"`` or ``"owner/name:configuration"``, of which the train rows are read
          as a stream (and kept in the cache: a later change on the Hub is not noticed).
        - a list of str, each a document.
        - two or more joined by ``+``: equal shares, block by block.
    tokenizer
        A transformers tokenizer.
    block : int
        Tokens in a block.
    tokens : int, optional
        Tokens wanted in all; whole blocks up to that number are made. By default all there are.
        Where there are fewer, they are given with a `TextBlocks.note`, if they fill 2 blocks or more.
    split : {"calibration", "train", "eval"}
        15%, 70% and 15% of the documents, by a hash of each, so that the splits never overlap.
    seed : int
        Sets the order of the documents.
    text_column : str, optional
        Column or key of .jsonl, .parquet and Hub sources; by default "text", or the only one that
        holds strings.

    Returns
    -------
    TextBlocks

    Raises
    ------
    TextError
        The source is missing, empty, unreadable or too short for the block length.

    Examples
    --------
    >>> from transformers import AutoTokenizer  # doctest: +SKIP
    >>> load_text("python-docs", tokenizer, tokens=4096, split="eval")  # doctest: +SKIP
    TextBlocks('python-docs', split='eval', seed=0, 16 blocks of 256 tokens, ...)
    """
    if split not in SPLITS:
        raise TextError(f"There is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    if block < 2:
        raise TextError(f"block={block}: a block needs at least 2 tokens, since the first is never predicted.")
    if tokens is not None and tokens < block:
        raise TextError(f"tokens={tokens} do not fill one block of {block}; raise tokens or lower block.")

    if isinstance(source, str) and "+" in source and not exists(Path(source).expanduser()):
        return _mixture(source, tokenizer, block, tokens, split, seed, text_column)
    documents = find_documents(source, split=split, seed=seed, text_column=text_column)
    if documents.endless and tokens is None:
        raise TextError(f"A Hub data set may be endless: say how many tokens of {documents.source!r} to read.")

    wanted = None if tokens is None else tokens // block * block
    stream = _token_stream(documents, tokenizer, split, seed, wanted)
    blocks = len(stream) // block
    note = ""
    if wanted is not None and blocks * block < wanted:
        note = f"{wanted:,} tokens were asked for; the {split} split of {documents.source} has {len(stream):,}."
    if blocks < (2 if note else 1):
        raise TextError(
            f"The {split} split of {documents.source} is too short: {len(stream)} tokens, where "
            f"{'two blocks' if note else 'one block'} of {block} {'are' if note else 'is'} needed. "
            "Give more text, or lower block."
        )
    packed = torch.from_numpy(stream[: blocks * block]).view(blocks, block)
    return TextBlocks(packed, documents.source, split, seed, _fingerprint(packed), note)


def _mixture(source, tokenizer, block, tokens, split, seed, text_column) -> TextBlocks:
    """Take turns between the sources, block by block, for as long as each has one."""
    names = [name.strip() for name in source.split("+")]
    total = None if tokens is None else tokens // block
    share = None if total is None else -(-total // len(names)) * block
    parts = [
        load_text(name, tokenizer, block=block, tokens=share, split=split, seed=seed, text_column=text_column)
        for name in names
    ]
    each = min(map(len, parts))
    packed = torch.stack([part.tokens[:each] for part in parts], dim=1).flatten(0, 1)[:total]
    note = " ".join(part.note for part in parts if part.note)
    if len(packed) * block < (total or 0) * block:
        note += f" Shares stay equal, so {len(packed) * block:,} tokens are given."
    return TextBlocks(packed, source, split, seed, _fingerprint(packed), note)


def _token_stream(documents: Documents, tokenizer, split: str, seed: int, wanted: int | None) -> np.ndarray:
    """Return at least `wanted` tokens of the packed documents (all, for None), from the cache if it can.

    A stream depends on source, tokenizer, split and seed alone: fewer tokens are a prefix of more.
    """
    before, between = _separators(tokenizer)
    stem = None
    if documents.identity is not None:
        identity = f"1|{documents.identity}|{tokenizer_fingerprint(tokenizer)}|{split}|{seed}"
        stem = "tokens-" + hashlib.sha256(identity.encode()).hexdigest()[:24]
        # -all: the source ends here; -part: there is more of it.
        for file in (cache_dir("text") / f"{stem}-all.npy", cache_dir("text") / f"{stem}-part.npy"):
            stream = _read_stream(file)
            if stream is not None and (file.stem.endswith("all") or wanted is not None and len(stream) >= wanted):
                return stream[:wanted]

    pieces, have, ended = [np.asarray(before, dtype=np.int32)], len(before), False
    texts = documents.stream()
    while not ended and (wanted is None or have < wanted):
        # About 4 characters a token: tokenise no more documents than the tokens wanted call for.
        batch = _batch(texts, 4_000_000 if wanted is None else min(4_000_000, 4 * (wanted - have)))
        ended = not batch
        for ids in _encode(tokenizer, batch):
            pieces.append(np.asarray([*ids, *between], dtype=np.int32))
            have += len(pieces[-1])
    if have == len(before):
        raise TextError(
            f"The {split} split of {documents.source} is empty: a source has to hold some dozens of "
            "paragraphs or rows for each split to get its share. Give more text."
        )
    stream = np.concatenate(pieces)
    if stem is not None and (have >= _MAPPED or not documents.identity.startswith("files:")):
        file = cache_dir("text") / f"{stem}-{'all' if ended else 'part'}.npy"
        with atomic_file(file) as temporary:
            np.save(temporary, stream)
        stream = _read_stream(file)
    return stream[:wanted]


def _read_stream(file: Path) -> np.ndarray | None:
    """Read a cached stream, memory-mapped where it is large; None where it is absent or damaged."""
    try:
        # Mode c: torch wants writable memory; what is written stays private to this process.
        large = file.stat().st_size >= 4 * _MAPPED
        return np.load(file, mmap_mode="c" if large else None)
    except (FileNotFoundError, ValueError, EOFError):
        return None


def _batch(texts: Iterator[str], characters: int) -> list[str]:
    batch: list[str] = []
    while characters > 0 and len(batch) < 4096 and (text := next(texts, None)) is not None:
        batch.append(text)
        characters -= len(text)
    return batch


def _encode(tokenizer, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: documents are longer than the model's window on purpose; they are cut to blocks.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _separators(tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that open the first document, and those that stand after each."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None and bos is None:
        raise TextError(
            f"The tokenizer ({type(tokenizer).__name__}) has neither an EOS nor a BOS token to put between "
            "documents. Set tokenizer.eos_token to one of its tokens."
        )
    opened = list(islice(tokenizer("a", verbose=False)["input_ids"], 1))
    opening = opened if bos is not None and opened == [bos] else []
    # BOS again after EOS where the model has always seen texts open with it (Llama, Gemma).
    return opening, [eos if eos is not None else bos] + (opening if eos not in (None, bos) else [])


def tokenizer_fingerprint(tokenizer) -> str:
    """Return sha256 (hex) of all that decides which ids a text becomes."""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # What the latest call asked for (padding, truncation) stands before the rest and is not part of it.
        state = backend.to_str()
        digest.update(state[state.index(',"added_tokens":') :].encode())
    else:
        digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(repr((tokenizer.bos_token_id, tokenizer.eos_token_id)).encode())
    return digest.hexdigest()


def _fingerprint(tokens: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tokens.shape[1]}|".encode())
    digest.update(np.ascontiguousarray(tokens.numpy(), dtype="<i4").data)
    return digest.hexdigest()
