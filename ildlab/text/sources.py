"""Find text and keep its splits apart: what counts as a source, what is a document, which split it is in.

A document's split is decided by a hash of its own text, so the same document is in the same split whatever
source, seed or machine it came by, and splits never overlap. Documents that differ in white space
or case alone count as one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from ildlab.errors import TextError
from ildlab.files import cache_dir, data_dir, exists, for_later, locked, open_text, write_atomic
from ildlab.progress import drive
from ildlab.text.python_docs import python_docs_key, read_python_docs
from ildlab.text.tables import Tally, expecting, jsonl_texts, parquet_texts, texts_of

SPLITS = ("calibration", "train", "eval")
SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet")

# Texts that ship with ildlab, in its folder of data, where cards and openings lie beside them.
SHIPPED = {"teacher-samples": "teacher_samples/samples.jsonl.gz", "encyclopedia": "encyclopedia/articles.jsonl.gz"}

_MAX_CHUNK = 2000  # characters of a .txt or .md file that travel together
_KEPT = 2**28  # bytes of documents, of the latest sources, that stay in memory to be read once a process


@dataclass(frozen=True)
class Documents:
    """Documents of one split in a seeded order."""

    source: str  # the name to load them by again
    identity: str | None  # changes whenever the documents may have changed; None where that cannot be told cheaply
    stream: Callable[[], Iterator[str]]  # returns a fresh iterator
    endless: bool = False  # may be too large to read whole (a Hub data set): a number of tokens has to be given
    tally: Tally = field(default_factory=Tally)  # of the rows of its tables, of all splits, as far as they were read


def find_documents(
    source: str | os.PathLike | Sequence[str], *, split: str, seed: int = 0, text_column: str | None = None
) -> Documents:
    """Find a source and describe its documents; files are checked here, read when first streamed.

    `ildlab.text.blocks.load_text` says what the parameters are. Raises TextError where there is no such source.
    """
    tally = Tally()

    def of(name: str, identity: str | None, read: Callable[[Tally], Iterable[str]]) -> Documents:
        return Documents(name, identity, lambda: _in_order(_split(identity, read, split, tally), seed), tally=tally)

    if not isinstance(source, str | os.PathLike):
        texts = checked_texts(source)
        return of(f"list of {len(texts)} texts", None, lambda _: texts)

    name = str(source)
    if name == "python-docs":
        key = python_docs_key()
        return of(name, key, lambda _: _python_docs(key))
    path = name
    if name in SHIPPED:
        path, text_column = data_dir() / SHIPPED[name], "text"
        if not path.is_file():
            raise TextError(
                f"The text {name!r} is not part of this copy of ildlab ({path} does not exist). "
                'Use "python-docs", or your own file or folder of text.'
            )
    if exists(path):
        files = _text_files(Path(path).expanduser())
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        identity = f"files:{text_column}:{hashlib.sha256(repr(stats).encode()).hexdigest()}"
        return of(name, identity, lambda counted: _file_texts(files, text_column, counted))
    # owner/name[:configuration]; anything that looks like a path is taken for a missing file.
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", name) and not name.lower().endswith(SUFFIXES):
        identity = f"hub:{name}:{text_column}"
        rows = lambda: _distinct(_hub_texts(name, seed, text_column, tally), split)  # noqa: E731
        return Documents(name, identity, rows, endless=True, tally=tally)
    raise TextError(
        f"There is no text source {name[:80]!r}: no such file or folder (looked in {Path.cwd()}). Give "
        '"python-docs", "teacher-samples", "encyclopedia", a file or folder of '
        + "/".join(SUFFIXES)
        + ", a Hub data set id "
        "(owner/name or owner/name:configuration), a list of str, or two sources joined by +."
    )


def checked_texts(texts: Iterable[str]) -> list[str]:
    """Documents that are given as they are; TextError where they are no list of texts."""
    listed = isinstance(texts, Iterable) and not isinstance(texts, str | Mapping)
    found = list(texts) if listed else [texts]
    wrong = next(
        (type(text).__name__ for text in found if not isinstance(text, str)), "" if listed else "a single str"
    )
    if wrong:
        raise TextError(
            f"A list of documents must hold str only, each a document; found {wrong}. For token ids there is no need of "
            "load_text."
        )
    return found


# ---- order and splits ------------------------------------------------------------------------------


def split_of(text: str) -> str:
    """Return the split a document belongs to: 15% calibration, 15% eval, 70% train."""
    return _bucket(_key(text))


def _bucket(key: str) -> str:
    bucket = int(key, 16) % 100
    return "calibration" if bucket < 15 else "eval" if bucket < 30 else "train"


def _key(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).lower().encode("utf-8", "replace")).hexdigest()


def encodable(text: str) -> str:
    """A text without lone surrogates, which JSON and docstrings can hold, and no tokenizer and no file takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _keyed(texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    for text in texts:
        if text := encodable(text).strip():
            yield _key(text), text


def _distinct(texts: Iterable[str], split: str) -> Iterator[str]:
    seen: set[str] = set()
    for key, text in _keyed(texts):
        if _bucket(key) == split and key not in seen:
            seen.add(key)
            yield text


def _in_order(texts: dict[str, str], seed: int) -> Iterator[str]:
    """Yield texts in an order that depends on the seed and the texts alone, not on where they lay."""
    for key in sorted(texts, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest()):
        yield texts[key]


# What was read last, the latest behind: the distinct texts of each split by their keys, the rows, and the bytes.
_SOURCES: dict[str, tuple[dict[str, dict[str, str]], Tally, int]] = {}
_LOCK = Lock()


def _split(identity: str | None, read: Callable[[Tally], Iterable[str]], split: str, tally: Tally) -> dict[str, str]:
    """Distinct texts of a split by their keys; the source is read once a process, if it fits `_KEPT`."""
    with _LOCK:
        found = _SOURCES.pop(identity, None)
        if found is None:
            splits, counted, size = {name: {} for name in SPLITS}, Tally(), 0
            for key, text in _keyed(read(counted)):
                into = splits.get(_bucket(key))
                if into is not None and key not in into:
                    into[key] = text
                    size += sys.getsizeof(text) + sys.getsizeof(key)
                    if size > _KEPT:  # too much to hold what was not asked for
                        splits = {split: splits[split]}
            found = splits, counted, size
        splits, counted, size = found
        if identity is not None and size <= _KEPT:
            _SOURCES[identity] = found
            while sum(size for *_, size in _SOURCES.values()) > _KEPT:
                del _SOURCES[next(iter(_SOURCES))]
    tally.rows, tally.empty = counted.rows, counted.empty
    return splits[split]


# ---- files: plain code, which reads them some times faster than the datasets library, and needs no copy on disk ----


def _text_files(path: Path) -> list[Path]:
    files = [path]
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        files = [file for file in inside if not any(p.startswith(".") for p in file.relative_to(path).parts)]
    files = [file for file in files if file.name.lower().endswith(SUFFIXES)]
    if not files:
        raise TextError(f"{path} is, or holds, no file that ildlab reads; it reads {', '.join(SUFFIXES)}.")
    if not any(file.stat().st_size for file in files):
        raise TextError(f"{path} is empty. Give a text of at least some thousand words.")
    return files


def _file_texts(files: list[Path], text_column: str | None, tally: Tally) -> Iterator[str]:
    prose = [file for file in files if file.name.lower().endswith((".txt", ".md"))]
    pages = []
    for file in prose:
        with expecting("text", file), open_text(file) as page:
            pages.append(page.read())
    # A short text is cut finer, so that each split gets its share of it.
    chunk = min(_MAX_CHUNK, max(200, sum(map(len, pages)) // 100))
    for page in pages:
        yield from _chunks(page, chunk)
    for file in files:
        if file not in prose:
            texts = parquet_texts if file.name.lower().endswith(".parquet") else jsonl_texts
            yield from texts(file, text_column, tally)


def _chunks(page: str, size: int) -> Iterator[str]:
    """Gather paragraphs to documents of about `size` characters; cut what has no paragraphs at spaces."""
    gathered: list[str] = []
    length = 0
    for paragraph in re.split(r"\n[^\S\n]*\n\s*", page):
        for piece in _cuts(paragraph, 4 * size):
            gathered.append(piece)
            length += len(piece)
            if length >= size:
                yield "\n\n".join(gathered)
                gathered, length = [], 0
    if gathered:
        yield "\n\n".join(gathered)


def _cuts(paragraph: str, limit: int) -> Iterator[str]:
    start = 0
    while len(paragraph) - start > limit:
        places = (paragraph.rfind(mark, start + limit // 2, start + limit) for mark in "\n ")
        at = max(*places, start)
        at = at if at > start else start + limit
        yield paragraph[start:at].strip()
        start = at
    yield paragraph[start:].strip("\n")


# ---- the Hub ---------------------------------------------------------------------------------------


def _hub_texts(name: str, seed: int, text_column: str | None, tally: Tally) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise TextError(
            f"{name!r} is neither a file nor a folder here, so it was taken for a Hub data set; reading "
            "those needs datasets: pip install 'ildlab[data]'."
        ) from error
    dataset, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(dataset, configuration or None, split="train", streaming=True)
        # Rows often lie sorted by topic; a buffer mixes them without reading the whole.
        rows = enumerate(rows.shuffle(seed=seed, buffer_size=2000), 1)
        yield from texts_of(f"the data set {name}", rows, text_column, tally)
    except TextError:
        raise
    except Exception as error:
        # datasets, huggingface_hub, fsspec and httpx each have error types of their own for "not there"
        # and "no network"; a person needs the same advice for all of them.
        raise TextError(
            f"{name!r} is no file or folder here, and the Hub data set {dataset!r} could not be read: "
            f"{type(error).__name__}: {error}. Check the name (owner/name:configuration) and the network; "
            'without a network, give a folder with its parquet files, or use "python-docs".'
        ) from error


# ---- Python's own documentation --------------------------------------------------------------------


def _python_docs(key: str) -> list[str]:
    """Read every docstring from the cache; the first call reads those of the packages and fills it, in some 20 s."""
    found = None
    with for_later():
        file = cache_dir("text") / f"{key}.json"
        found = _kept_texts(file)
        if found is None:
            with locked(file.with_suffix(".lock")):  # of several processes one reads, and the others wait
                found = _kept_texts(file)
                if found is None:
                    found = _read_docs()
                    write_atomic(file, json.dumps({"sha256": _sum_of(found), "texts": found}, ensure_ascii=False))
    return _read_docs() if found is None else found


def _read_docs() -> list[str]:
    texts = map(encodable, drive(read_python_docs(), desc="reading docstrings"))
    return sorted({text: None for text in texts})


def _kept_texts(file: Path) -> list[str] | None:
    """Texts that were written to the cache; None where there are none, or they are not what was written."""
    if not file.exists():
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["sha256"] == _sum_of(kept["texts"]):
            return kept["texts"]
    except (ValueError, KeyError, TypeError):
        pass
    warnings.warn(f"{file} is damaged: it is made again.", stacklevel=2)
    return None


def _sum_of(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


if __name__ == "__main__":
    next(iter(find_documents("python-docs", split="train").stream()))  # fills the cache
