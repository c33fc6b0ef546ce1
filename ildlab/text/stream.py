"""Documents to one stream of tokens, and the cache that keeps it, with a sum of all it holds."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ildlab.files import atomic_file, cache_dir, for_later
from ildlab.text.sources import Documents

_MAPPED = 16 * 2**20  # tokens (64 MB as int32) from which on a stream lives in a memory-mapped file
_PIECE = 2**20  # tokens under one sum: of a large stream, only what is used has to be read to be proven


def token_stream(
    documents: Documents, encode: Callable[[list[str]], list[list[int]]], after: int, key: str, wanted: int | None
) -> tuple[np.ndarray, str]:
    """Return `wanted` tokens of the packed documents (fewer where they end; all, for None), from the cache if it can.

    `after` stands behind each document; `key` names what decides the tokens beside the source: tokenizer, split and
    seed. Fewer tokens are a prefix of more, and blocks of any length are cut from one stream. Returns what a person
    is told of rows left out, too.
    """
    stem = None
    if documents.identity is not None:
        # The number counts changes of what a stream holds, and of how it is kept.
        stem = "tokens-" + hashlib.sha256(f"3|{documents.identity}|{key}".encode()).hexdigest()[:24]
        with for_later():
            for ending in ("all", "part"):  # the source ends there, or there is more of it
                kept = _kept(cache_dir("text") / f"{stem}-{ending}.int32", wanted, whole=ending == "all")
                if kept is not None:
                    return kept

    pieces, have, ended = [np.zeros(0, np.int32)], 0, False
    texts = documents.stream()
    while not ended and (wanted is None or have < wanted):
        # About 4 characters a token: tokenise no more documents than the tokens wanted call for.
        batch = _batch(texts, 4_000_000 if wanted is None else min(4_000_000, 4 * (wanted - have)))
        ended = not batch
        for ids in encode(batch) if batch else []:
            pieces.append(np.asarray([*ids, after], dtype=np.int32))
            have += len(pieces[-1])
    stream, note = np.concatenate(pieces), documents.tally.note(documents.source)
    if have and stem is not None and (have >= _MAPPED or not documents.identity.startswith("files:")):
        told = json.dumps({"sha256": [*_sums(stream, note)], "note": note}).encode()
        with for_later():
            file = cache_dir("text") / f"{stem}-{'all' if ended else 'part'}.int32"
            with atomic_file(file) as temporary, open(temporary, "wb") as out:
                stream.tofile(out)
                out.write(told + len(told).to_bytes(8, "little"))
            return _kept(file, wanted, whole=True) or (stream[:wanted], note)
    return stream[:wanted], note


def _kept(file: Path, wanted: int | None, *, whole: bool) -> tuple[np.ndarray, str] | None:
    """Read a cached stream, memory-mapped where it is large; None where it is absent, too short or damaged."""
    if not file.exists():
        return None
    try:
        with open(file, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(size - 8, 0))
            tail = int.from_bytes(opened.read(8), "little")
            n, rest = divmod(size - 8 - tail, 4)
            if n < 1 or rest:
                raise ValueError
            opened.seek(4 * n)
            told = json.loads(opened.read(tail))
        if not whole and (wanted is None or n < wanted):
            return None
        # Mode c: torch wants writable memory; what is written stays private to this process.
        stream = np.memmap(file, np.int32, "c", shape=n) if n >= _MAPPED else np.fromfile(file, np.int32, n)
        used = stream[:wanted]
        pieces = -(-len(used) // _PIECE)
        if [*_sums(stream[: pieces * _PIECE], told["note"])] == told["sha256"][:pieces]:
            return used, told["note"]
    except (ValueError, KeyError, TypeError):
        pass
    warnings.warn(f"{file} is damaged: it is made again.", stacklevel=2)
    return None


def _sums(stream: np.ndarray, note: str) -> Iterator[str]:
    """sha256 (hex) of each piece of a stream, and of the note with it."""
    for start in range(0, len(stream), _PIECE):
        yield hashlib.sha256(note.encode("utf-8", "replace") + stream[start : start + _PIECE].tobytes()).hexdigest()


def _batch(texts: Iterator[str], characters: int) -> list[str]:
    batch: list[str] = []
    while characters > 0 and len(batch) < 4096 and (text := next(texts, None)) is not None:
        batch.append(text)
        characters -= len(text)
    return batch
