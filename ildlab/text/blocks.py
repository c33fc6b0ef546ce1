"""Text to token blocks: tokenise documents, pack them end to end, cut them to one length, keep and name the result."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ildlab.errors import TextError
from ildlab.text.mix import interleaved, kind_of, packed, rows_file, rows_of, summands
from ildlab.text.sources import SPLITS, Documents, find_documents
from ildlab.text.stream import token_stream
from ildlab.typed import reading


@dataclass(frozen=True, eq=False)
class TextBlocks:
    """Packed token blocks of one split of a text, with where they came from: what `load_text` was called with."""

    # int32 [blocks, block] on the CPU, without padding; memory-mapped from the cache where large and without `bos`
    tokens: torch.Tensor
    source: str
    split: str
    seed: int
    # sha256 (hex) of the tokens as little-endian int32, of the block length, and of `scored` where there is some
    fingerprint: str
    note: str = ""  # for a person: that there was less text than asked for, or that rows of a table held none
    bos: tuple[
        int, ...
    ] = ()  # the ids that the tokenizer puts before a text, most often one or none: each block has them
    # bool [blocks, block], where `nll`, `kl` and `taylor` score a layer: the next token is a target. None: everywhere.
    scored: torch.Tensor | None = None
    kinds: tuple[str, ...] = ()  # what kind of text each block is, in a mixture

    block = property(lambda self: self.tokens.shape[1], doc="Tokens in one block.")
    n_tokens = property(lambda self: self.tokens.numel(), doc="Tokens in all blocks.")

    def __len__(self) -> int:
        """Return the number of blocks."""
        return self.tokens.shape[0]

    def take(self, n_blocks: int) -> TextBlocks:
        """Return the first `n_blocks` blocks. Raises TextError where there are fewer."""
        if not 1 <= n_blocks <= len(self):
            raise TextError(f"take({n_blocks}): this text has {len(self)} blocks; take from 1 to {len(self)}.")
        return self.pick(range(n_blocks))

    def pick(self, rows: Sequence[int]) -> TextBlocks:
        """Return these blocks, in this order."""
        rows = list(rows)
        tokens, scored = self.tokens[rows], None if self.scored is None else self.scored[rows]
        kinds = tuple(self.kinds[i] for i in rows) if self.kinds else ()
        return replace(self, tokens=tokens, scored=scored, kinds=kinds, fingerprint=_fingerprint(tokens, scored))

    def __repr__(self) -> str:
        opened = f", each opened by BOS {', '.join(map(str, self.bos))}" if self.bos else ""
        return (
            f"TextBlocks({self.source!r}, split={self.split!r}, seed={self.seed}, {len(self)} blocks of "
            f"{self.block} tokens{opened}, {self.fingerprint[:12]}){self.note and f'; {self.note}'}"
        )


@reading(TextError)
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

    Documents come in an order set by `seed`, an EOS token after each (BOS where the tokenizer has no EOS). Where
    the tokenizer puts a BOS before a text, each block begins with one.

    Parameters
    ----------
    source : str, path or sequence of str
        - ``"python-docs"``: Python's help topics, and the docstrings of packages that every install has.
        - ``"teacher-samples"``: texts sampled from a teacher, which ship with ildlab.
        - ``"encyclopedia"``: articles of the English Wikipedia, which ship with ildlab (to distill on, mostly).
        - a .txt, .md, .jsonl, .jsonl.gz or .parquet file, or a folder of them: UTF-8, or what a byte-order mark says.
        - a Hub data set, ``"owner/name"`` or ``"owner/name:configuration"``, of which the train rows are read
          as a stream (and kept in the cache: a later change on the Hub is not noticed).
        - a list of str, each a document.
        - ``"mix"``: texts of six kinds, most of them in the teacher's own words; layers are scored where they answer
          (`ildlab.text.mix`); a file of such rows, which `ildlab.text.make_mix` makes for any teacher; ``"mix:copies"``
          for one kind.
        - two or more joined by ``+``, such as ``"mix*3+mine.txt"``: a mixture, by blocks and weights. To calibrate, all kinds
          have as many blocks.
    tokenizer
        A transformers tokenizer.
    block : int
        Tokens in a block, BOS included.
    tokens : int, optional
        Tokens wanted in all, in whole blocks; by default all there are. Where there are fewer, they are given with
        a `TextBlocks.note`, if they fill 2 blocks or more.
    split : {"calibration", "train", "eval"}
        15%, 70% and 15% of the documents, by a hash of each, so that the splits never overlap.
    seed : int
        Sets the order of the documents.
    text_column : str, optional
        Column or key of .jsonl, .parquet and Hub sources; by default "text", or the only one that holds strings, where
        they read as text. Rows that hold none are left out, and counted in `TextBlocks.note`.

    Raises
    ------
    TextError
        The source is missing, empty, unreadable or too short for the block length.
    """
    bos = opening_ids(tokenizer)
    if split not in SPLITS:
        raise TextError(f"There is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    if block < 2 or block <= len(bos):
        raise TextError(f"block={block}: a block needs at least 2 tokens, since the first is never predicted.")
    if tokens is not None and tokens < block:
        raise TextError(f"tokens={tokens} do not fill one block of {block}; raise tokens or lower block.")

    source = os.fspath(source) if isinstance(source, os.PathLike) else source
    terms = summands(source) if isinstance(source, str) else []
    if len(terms) > 1:
        return _mixture(source, terms, tokenizer, tokens, block=block, split=split, seed=seed, text_column=text_column)
    # A weight says nothing where there is one source.
    found, left_out = _one(terms[0][0] if terms else source, tokenizer, tokens, block, split, seed, text_column)
    return replace(found, note=f"{found.note} {left_out}".strip())


def _one(
    source, tokenizer, tokens: int | None, block: int, split: str, seed: int, text_column: str | None
) -> tuple[TextBlocks, str]:
    """Blocks of one source, whose name is not taken apart any more, and what is told of rows left out."""
    bos = opening_ids(tokenizer)
    if isinstance(source, str) and (file := rows_file(source)):
        rows = rows_of(file[1], kind_of(source), split, seed)
        if any(context for parts in rows for context in parts[::2]):
            return _of_rows(rows, source, tokenizer, tokens, block=block, split=split, seed=seed), ""
        documents = Documents(source, None, lambda: iter("".join(parts) for parts in rows))
    else:
        documents = find_documents(source, split=split, seed=seed, text_column=text_column)
    if documents.endless and tokens is None:
        raise TextError(f"A Hub data set may be endless: say how many tokens of {documents.source!r} to read.")

    most = None if tokens is None else tokens // block
    room = block - len(bos)  # tokens of text in a block
    key = f"{tokenizer_fingerprint(tokenizer)}|{split}|{seed}"
    encode, wanted = partial(_encode, tokenizer), None if most is None else most * room
    stream, left_out = token_stream(documents, encode, _separator(tokenizer), key, wanted)
    if not len(stream):
        raise TextError(
            f"The {split} split of {documents.source} is empty: a source has to hold some dozens of paragraphs or rows "
            f"for each split to get its share. Give more text. {left_out}".strip()
        )
    blocks = len(stream) // room
    note = ""
    if most is not None and blocks < most:
        note = f"{most * block:,} tokens were asked for; the {split} split of {documents.source} has {len(stream):,}."
    if blocks < (2 if note else 1):
        needed = "two blocks" if note else "one block"
        raise TextError(
            f"The {split} split of {documents.source} is too short: {len(stream)} tokens do not fill {needed} of {block}. "
            f"Give more text, or lower block. {left_out}".strip()
        )
    packed = torch.from_numpy(stream[: blocks * room]).view(blocks, room)  # [blocks, block - len(bos)]
    if bos:  # without, the blocks stay a view of the stream, which may be a file
        packed = torch.cat([torch.tensor(bos, dtype=torch.int32).expand(blocks, -1), packed], 1)  # [blocks, block]
    return TextBlocks(packed, documents.source, split, seed, _fingerprint(packed), note, bos), left_out


def _mixture(source: str, terms, tokenizer, tokens: int | None, **options: Any) -> TextBlocks:
    """Blocks of several sources, each at its place behind its share; the whole ends where one of them runs out."""
    names, weights = zip(*terms, strict=True)
    if options["split"] == "calibration":  # there each kind has one say, however much text it is
        weights = (1.0,) * len(names)
    total = None if tokens is None else tokens // options["block"]
    if total is not None and total < len(names):
        raise TextError(
            f"tokens={tokens}: {source!r} has {len(names)} kinds of text, and needs a block of {options['block']} for "
            f"each; give at least {len(names) * options['block']} tokens, or shorter blocks."
        )
    parts, told = [], []
    for name, weight in zip(names, weights, strict=True):
        share = None if total is None else (int(total * weight / sum(weights)) + 2) * options["block"]
        part, left_out = _one(name, tokenizer, share, **options)
        parts.append(part)
        told += [left_out] if left_out else []
    order = interleaved([len(part) for part in parts], weights, total)
    tokens_ = torch.stack([parts[p].tokens[row] for p, row in order])  # [blocks, block]
    scored = None
    if any(part.scored is not None for part in parts):
        everywhere = torch.ones(options["block"], dtype=torch.bool)
        scored = torch.stack([everywhere if (s := parts[p].scored) is None else s[row] for p, row in order])
    kinds = tuple(kind_of(names[p]) for p, _ in order)
    if len(order) < (total or 0):
        short = f"{tokens:,} tokens were asked for; shares stay as they are, so {tokens_.numel():,} are given:"
        told = [short, *(part.note for part in parts if part.note), *told]
    more = {"tokens": tokens_, "scored": scored, "kinds": kinds, "note": " ".join(told)}
    return replace(parts[0], source=source, fingerprint=_fingerprint(tokens_, scored), **more)


def _of_rows(rows: list[list[str]], source: str, tokenizer, tokens: int | None, **options: Any) -> TextBlocks:
    """Blocks of rows with targets, each row whole, an EOS after it."""
    bos, block, lengths = opening_ids(tokenizer), options["block"], []
    most = None if tokens is None else tokens // block
    encoded = _encoded_rows(rows, tokenizer, lengths)  # no more of them than the blocks wanted call for
    found, scored = (torch.from_numpy(each) for each in packed(encoded, block - len(bos), most))
    note = f"{tokens:,} tokens were asked for; {source} has {found.numel():,}." if len(found) < (most or 0) else ""
    long = sum(length > block - len(bos) for length in lengths)
    if long and note:
        note += f" {long} of its {len(lengths)} rows are longer than a block, and left out."
    if len(found) < 1:
        longest = max(lengths, default=0)
        advice = (
            f"its rows have up to {longest} tokens: raise block"
            if longest > block
            else "give more rows, or lower block"
        )
        raise TextError(f"The {options['split']} split of {source} does not fill one block of {block}; {advice}.")
    if bos:
        found = torch.cat([torch.tensor(bos, dtype=torch.int32).expand(len(found), -1), found], 1)  # [blocks, block]
        scored = torch.cat([torch.zeros(len(found), len(bos), dtype=torch.bool), scored], 1)
    kinds = (kind_of(source),) * len(found)
    print_ = _fingerprint(found, scored)
    return TextBlocks(found, source, options["split"], options["seed"], print_, note, bos, scored, kinds)


def _encoded_rows(rows: list[list[str]], tokenizer, lengths: list[int]) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids of each row, as a text in one piece, and which of them end in a target; `lengths` grows with them."""
    how = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    after = _separator(tokenizer)
    for start in range(0, len(rows), 256):
        batch = rows[start : start + 256]
        found = tokenizer(["".join(parts) for parts in batch], return_offsets_mapping=True, **how)
        for parts, ids, places in zip(batch, found["input_ids"], found["offset_mapping"], strict=True):
            ends = np.cumsum([len(part) for part in parts])  # context, target, context, ... end here
            said = np.searchsorted(ends, [end - 1 for _, end in places], side="right") % 2 == 1
            lengths.append(len(ids) + 1)
            yield [*ids, after], [*said.tolist(), False]


def _encode(tokenizer, texts: list[str]) -> list[list[int]]:
    # verbose=False: documents are longer than the model's window on purpose; they are cut to blocks.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


# ---- what a tokenizer does -------------------------------------------------------------------------


def opening_ids(tokenizer) -> tuple[int, ...]:
    """Ids that a tokenizer puts before a text by itself: its BOS, or none.

    Read off a text that it encodes: a `bos_token` may be set and never put (Qwen, SmolLM2).
    """
    if not callable(tokenizer):
        raise TextError(f"tokenizer={tokenizer!r}: give the model's, such as load_model(name).tokenizer.")
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer("a", verbose=False)["input_ids"]
    start = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return tuple(whole[:start])


def opened(opening: Sequence[int], ids: list[int]) -> list[int]:
    """Token ids with what opens a sequence before them; a chat template, or the text itself, may have put it there."""
    return ids if tuple(ids[: len(opening)]) == tuple(opening) else [*opening, *ids]


def encode_prompts(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that a model is to go on with: each opened as the tokenizer opens a text, and never ended.

    Whatever a tokenizer appends by itself (an EOS, in some) says that the text is over: what follows would be another.
    """
    opening = opening_ids(tokenizer)
    return [opened(opening, ids) for ids in _encode(tokenizer, list(texts))]


def _separator(tokenizer) -> int:
    """Return the id that stands after each document.

    No BOS follows it inside a block: there it would be a target, and what is scored is text. The block's own BOS is
    the one that a model leans on; that another document begins, EOS says. Only without an EOS does BOS say it.
    """
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return token
    raise TextError(
        f"The tokenizer ({type(tokenizer).__name__}) has neither an EOS nor a BOS token to put between documents. "
        "Set tokenizer.eos_token to one of its tokens."
    )


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


def _fingerprint(tokens: torch.Tensor, scored: torch.Tensor | None = None) -> str:
    digest = hashlib.sha256(f"{tokens.shape[1]}|".encode())
    digest.update(np.ascontiguousarray(tokens.numpy(), dtype="<i4").data)
    if scored is not None:
        digest.update(np.packbits(scored.numpy()).data)
    return digest.hexdigest()
