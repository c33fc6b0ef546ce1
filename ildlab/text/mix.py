"""Text of many kinds: weighted sums of sources, and rows that say where a student is scored.

A row is `{"kind": ..., "parts": [context, target, context, target, ...], "split": ...}`, a line of a JSONL file: what
`ildlab.text.teacher_text` makes of a teacher. Targets are what is scored; a row without a context is plain text. The
split, where a row names none, is told by a hash of its text.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ildlab.errors import TextError
from ildlab.files import data_dir, exists, open_text, parted
from ildlab.text.sources import encodable, split_of
from ildlab.text.tables import expecting

# Shares of a mix, by kind; 1 for any other. Prose is what most is lost and won back on: docs/distillation.md.
WEIGHTS = {"prose": 4, "answers": 3, "copies": 2, "lists": 0.4, "arithmetic": 0.6}
# What the shipped mix takes from other sources that ship, and what it calls them.
ALSO = {"teacher-samples": "prose", "python-docs": "docs"}


def shipped() -> Path:
    """The mix that ships with ildlab, made from SmolLM2-135M-Instruct."""
    return data_dir() / "mix" / "smollm2-135m.jsonl.gz"


def summands(source: str) -> list[tuple[str, float]]:
    """Sources and weights of a sum such as `"prose.txt*3+python-docs"`; one alone is a sum of one.

    `"mix"`, and any file of rows, is the sum of its kinds; `"mix:copies"` one of them. A file whose name holds + or *
    is that file: from the left, the longest stretch between two + that is there, with its weight, is one source.

    Raises TextError where a weight is no number above 0, or the file of rows cannot be read.
    """
    return [each for term in parted(source, "+", _is_there) for each in _kinds_of(*_weighed(term))]


def _is_there(term: str) -> bool:
    """Whether a term is a file or folder, or a kind of one, with a weight or without."""
    names = {term, re.sub(r"\*[\d.]+\s*$", "", term)}
    names |= {base for base, _, kind in (name.rpartition(":") for name in names) if _is_kind(kind)}
    return any(map(exists, names - {""}))


def _weighed(term: str) -> tuple[str, float]:
    """Name and weight of one source."""
    name, star, factor = term.rpartition("*") if re.search(r"\*[\d.]+\s*$", term) else ("", "", "")
    if not star or exists(term):
        name, factor = term, "1"
    try:
        weight = float(factor)
    except ValueError:
        weight = 0.0
    if weight <= 0 or not name:
        raise TextError(f"text source {term!r}: expected a source, or source*weight with a weight above 0.")
    return name.strip(), weight


def _kinds_of(name: str, weight: float) -> list[tuple[str, float]]:
    path = rows_file(name)
    if path is None or name != path[0]:
        return [(name, weight)]
    named = [(f"{name}:{kind}", kind) for kind in dict.fromkeys(row["kind"] for row in _read(path[1]))]
    if name == "mix":
        named += ALSO.items()
    weighed = sorted(((WEIGHTS.get(kind, 1), source) for source, kind in named), key=lambda one: (-one[0], one[1]))
    return [(source, weight * own / sum(w for w, _ in weighed)) for own, source in weighed]


def rows_file(name: str) -> tuple[str, Path] | None:
    """The part of a source's name before `:kind`, and its file, where it is one of rows; None where it is not."""
    for base in dict.fromkeys((name, name.rpartition(":")[0])):
        if base == "mix":
            if not shipped().is_file():
                raise TextError(f"The mix is not part of this copy of ildlab: {shipped()} does not exist.")
            return base, shipped()
        if base.lower().endswith((".jsonl", ".jsonl.gz")) and exists(base):
            path = Path(base).expanduser()
            if path.is_file() and _holds_rows(path):
                return base, path
    return None


def kind_of(name: str) -> str:
    """What a source is called as a kind of text: its kind in a file of rows, else its own name."""
    found = rows_file(name)
    return name[len(found[0]) + 1 :] if found and name != found[0] else ALSO.get(name, Path(name).name)


def rows_of(path: Path, kind: str, split: str, seed: int) -> list[list[str]]:
    """Parts of the rows of a kind and split, in an order set by the seed; TextError where there are none."""
    rows = [row["parts"] for row in _read(path) if row["kind"] == kind]
    if not rows:
        raise TextError(
            f"{path} has no rows of kind {kind!r}; it has {', '.join(sorted({r['kind'] for r in _read(path)}))}."
        )
    chosen = {
        "\0".join(row["parts"]): row["parts"]
        for row in _read(path)
        if row["kind"] == kind and (row.get("split") or split_of("".join(row["parts"]))) == split
    }
    return [chosen[key] for key in sorted(chosen, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())]


def packed(
    rows: Iterable[tuple[Sequence[int], Sequence[bool]]], room: int, blocks: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Pack rows of (token ids, whether each is a target) into blocks, each row whole.

    What a block has left over is filled with the beginning of the row that opens the next, unscored: no padding. Rows
    longer than a block are left out.

    Returns
    -------
    tokens : ndarray [blocks, room] int32
    scored : ndarray [blocks, room] bool
        Where the **next** token is a target.
    """
    tokens: list[list[int]] = [[]]
    targets: list[list[bool]] = [[]]
    for ids, said in rows:
        if len(ids) > room:
            continue
        left = room - len(tokens[-1])
        if len(ids) > left:
            tokens[-1] += ids[:left]
            targets[-1] += [False] * left
            if len(tokens) == blocks:
                break
            tokens.append([])
            targets.append([])
        tokens[-1] += ids
        targets[-1] += said
    whole = [i for i, row in enumerate(tokens) if len(row) == room]
    found = np.array([tokens[i] for i in whole], np.int32).reshape(-1, room)
    said = np.array([targets[i] for i in whole], bool).reshape(-1, room)
    return found, np.concatenate([said[:, 1:], np.zeros_like(said[:, :1])], 1)


def interleaved(lengths: Sequence[int], weights: Sequence[float], total: int | None) -> list[tuple[int, int]]:
    """(part, row) of a mixture: at each place the part that lags furthest behind its share, until one runs out."""
    share = np.array(weights, float) / sum(weights)
    taken, order = np.zeros(len(lengths), int), []
    while total is None or len(order) < total:
        part = int(np.argmax(share * (len(order) + 1) - taken))
        if taken[part] == lengths[part]:
            break
        order.append((part, int(taken[part])))
        taken[part] += 1
    return order


# ---- files of rows ---------------------------------------------------------------------------------


def _holds_rows(path: Path) -> bool:
    """Whether the first line of a JSONL file is a row of a kind; what it is else, who reads it as text finds out."""
    try:
        with open_text(path) as lines:
            first = json.loads(next(filter(str.strip, lines), "null"))
    except (ValueError, OSError, EOFError, RecursionError, zlib.error):
        return False
    return isinstance(first, dict) and {"kind", "parts"} <= first.keys()


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _is_kind(kind: Any) -> bool:
    return isinstance(kind, str) and bool(kind) and not set(kind) & set(":+*")  # which a source's name is read by


def _read(path: Path) -> tuple[dict[str, Any], ...]:
    stat = path.stat()
    return _rows(path.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4)
def _rows(path: Path, size: int, changed: int) -> tuple[dict[str, Any], ...]:
    """All rows of a file, checked."""
    found = []
    with expecting("rows of text (one JSON value a line)", path), open_text(path) as lines:
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for number, line in numbered:
        row = _parsed(line)
        parts = row.get("parts") if isinstance(row, dict) else None
        texts = isinstance(parts, list) and all(isinstance(part, str) for part in parts)
        if not texts or not parts or len(parts) % 2 or not _is_kind(row.get("kind")):
            raise TextError(
                f'Row {number} of {path}: expected {{"kind": "...", "parts": [context, target, ...]}} with '
                "texts in pairs, and no :, + or * in a kind."
            )
        found.append(row | {"parts": [encodable(part) for part in parts]})
    return tuple(found)
