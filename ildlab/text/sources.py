"""Find text and keep its splits apart: what counts as a source, what is a document, which split it is in.

A document's split is decided by a hash of its own text, so the same document is in the same split whatever
source, seed or machine it came by, and splits never overlap. Documents that differ in white space
or case alone count as one.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ildlab.errors import TextError
from ildlab.files import cache_dir, data_dir, write_atomic
from ildlab.progress import drive
from ildlab.text.python_docs import python_docs_key, read_python_docs

SPLITS = ("calibration", "train", "eval")
SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet")

_MAX_CHUNK = 2000  # characters of a .txt or .md file that travel together


@dataclass(frozen=True)
class Documents:
    """Documents of one split in a seeded order."""

    source: str  # the name to load them by again
    identity: str | None  # changes whenever the documents may have changed; None where that cannot be told cheaply
    stream: Callable[[], Iterator[str]]  # returns a fresh iterator
    endless: bool = False  # may be too large to read whole (a Hub data set): a number of tokens has to be given


def find_documents(
    source: str | os.PathLike | Sequence[str], *, split: str, seed: int = 0, text_column: str | None = None
) -> Documents:
    """Find a source and describe its documents; files are checked here, read when first streamed.

    `ildlab.text.blocks.load_text` says what the parameters are. Raises TextError where there is no such source.
    """
    if not isinstance(source, str | os.PathLike):
        texts = list(source)
        if not all(isinstance(text, str) for text in texts):
            raise TextError("A list of documents must hold str only; for token ids there is no need of load_text.")
        return Documents(f"list of {len(texts)} texts", None, lambda: _in_split(texts, split, seed))

    name = str(source)
    if name == "python-docs":
        key = python_docs_key()
        return Documents(name, key, lambda: _in_order(_python_docs(key, split), seed))
    path = Path(name).expanduser()
    if name == "teacher-samples":
        # The folder also holds the data card and the openings, which are no samples.
        path = data_dir() / "teacher_samples" / "samples.jsonl.gz"
        if not path.is_file():
            raise TextError(
                f"The teacher's samples are not part of this copy of ildlab ({path} does not exist). "
                'Use "python-docs", or your own file or folder of text.'
            )
    if exists(path):
        files = _text_files(path)
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        identity = f"files:{text_column}:{hashlib.sha256(repr(stats).encode()).hexdigest()}"
        return Documents(name, identity, lambda: _in_split(_file_texts(files, text_column), split, seed))
    # owner/name[:configuration]; anything that looks like a path is taken for a missing file.
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", name) and not name.lower().endswith(SUFFIXES):
        identity = f"hub:{name}:{text_column}"
        return Documents(name, identity, lambda: _distinct(_hub_texts(name, seed, text_column), split), endless=True)
    raise TextError(
        f"There is no text source {name[:80]!r}: no such file or folder (looked in {Path.cwd()}). Give "
        '"python-docs", "teacher-samples", a file or folder of ' + "/".join(SUFFIXES) + ", a Hub data set id "
        "(owner/name or owner/name:configuration), a list of str, or two sources joined by +."
    )


def exists(path: Path) -> bool:
    """Whether a file or folder is there; False for what cannot be a name of one."""
    try:
        return path.exists()
    except (OSError, ValueError):  # a whole text given as a source: too long a name, or with a NUL
        return False


# ---- order and splits ------------------------------------------------------------------------------


def split_of(text: str) -> str:
    """Return the split a document belongs to: 15% calibration, 15% eval, 70% train."""
    bucket = int(_key(text), 16) % 100
    return "calibration" if bucket < 15 else "eval" if bucket < 30 else "train"


def _key(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).lower().encode("utf-8", "replace")).hexdigest()


def _distinct(texts: Iterable[str], split: str) -> Iterator[str]:
    seen: set[str] = set()
    for text in texts:
        # JSON and docstrings can hold lone surrogates, which no tokenizer and no file takes.
        text = text.encode("utf-8", "replace").decode("utf-8").strip()
        if text and split_of(text) == split and (key := _key(text)) not in seen:
            seen.add(key)
            yield text


def _in_order(texts: Iterable[str], seed: int) -> Iterator[str]:
    """Yield texts in an order that depends on the seed and the texts alone, not on where they lay."""
    return iter(sorted(texts, key=lambda text: hashlib.sha256(f"{seed}:{_key(text)}".encode()).digest()))


def _in_split(texts: Iterable[str], split: str, seed: int) -> Iterator[str]:
    return _in_order(_distinct(texts, split), seed)


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


def _file_texts(files: list[Path], text_column: str | None) -> Iterator[str]:
    prose = [file for file in files if file.name.lower().endswith((".txt", ".md"))]
    pages = []
    for file in prose:
        with expecting("UTF-8 text (iconv -f latin1 -t utf-8 converts it, if it is latin1)", file):
            pages.append(file.read_text(encoding="utf-8-sig"))
    # A short text is cut finer, so that each split gets its share of it.
    chunk = min(_MAX_CHUNK, max(200, sum(map(len, pages)) // 100))
    for page in pages:
        yield from _chunks(page, chunk)
    for file in files:
        if file.name.lower().endswith(".parquet"):
            yield from _parquet_texts(file, text_column)
        elif file not in prose:
            yield from _jsonl_texts(file, text_column)


@contextmanager
def expecting(kind: str, file: Path) -> Iterator[None]:
    """Name the file in whatever a reader of text, JSON, gzip or parquet says of one that it cannot read."""
    try:
        yield
    except (ValueError, EOFError, OSError, NotImplementedError, zlib.error) as error:
        raise TextError(f"{file} cannot be read as {kind}: {error}.") from error


def _chunks(page: str, size: int) -> Iterator[str]:
    """Gather paragraphs to documents of about `size` characters; cut what has no paragraphs at spaces."""
    gathered: list[str] = []
    for paragraph in re.split(r"\n[^\S\n]*\n\s*", page):
        for piece in _cuts(paragraph, 4 * size):
            gathered.append(piece)
            if sum(map(len, gathered)) >= size:
                yield "\n\n".join(gathered)
                gathered = []
    if gathered:
        yield "\n\n".join(gathered)


def _cuts(paragraph: str, limit: int) -> Iterator[str]:
    while len(paragraph) > limit:
        at = max(paragraph.rfind("\n", limit // 2, limit), paragraph.rfind(" ", limit // 2, limit))
        at = at if at > 0 else limit
        yield paragraph[:at].strip()
        paragraph = paragraph[at:]
    yield paragraph.strip("\n")


def _jsonl_texts(file: Path, text_column: str | None) -> Iterator[str]:
    opener = gzip.open if file.name.lower().endswith(".gz") else open
    with expecting("JSON lines (one JSON value a line, in UTF-8)", file):
        with opener(file, "rt", encoding="utf-8-sig") as lines:
            # A blank line is a row without text, so that a row's number is its line's.
            yield from _texts(file, (json.loads(line) if line.strip() else None for line in lines), text_column)


def _parquet_texts(file: Path, text_column: str | None) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise TextError(f"Reading {file} needs pyarrow: pip install 'ildlab[data]'.") from error
    with expecting("parquet", file), pq.ParquetFile(file) as table:
        # The schema as a row: the column is chosen without reading the others.
        types = {field.name: field.type for field in table.schema_arrow}
        types = {name: kind.value_type if pa.types.is_dictionary(kind) else kind for name, kind in types.items()}
        row = {name: "" if kind in (pa.string(), pa.large_string()) else 0 for name, kind in types.items()}
        column = _column(file, row, text_column)
        for batch in table.iter_batches(columns=[column]):
            yield from filter(None, batch.column(0).to_pylist())


# ---- rows of tables --------------------------------------------------------------------------------


def _texts(where: object, rows: Iterable[Any], text_column: str | None) -> Iterator[str]:
    """Yield the text of each row, which is a str, a dict with one, or None."""
    column = None
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            column = column or _column(where, row, text_column)
            row = row.get(column)
        if isinstance(row, str):
            yield row
        elif row is not None:
            raise TextError(f"Row {number} of {where} holds {type(row).__name__} where text was expected.")


def _column(where: object, row: dict[str, Any], wanted: str | None) -> str:
    """Choose the column to read by one row: the one asked for, else "text", else the only one that holds a str."""
    strings = [name for name, value in row.items() if isinstance(value, str)]
    name = "text" if wanted is None else wanted
    if name in strings or row.get(name, 0) is None:  # a null may be a text in the next row
        return name
    if wanted is None and len(strings) == 1:
        return strings[0]
    named = f"these hold text: {', '.join(strings)}" if strings else "no column holds text"
    if wanted is None:
        raise TextError(f"Say which column of {where} to read (text_column=...): {named}.")
    if wanted in row:
        raise TextError(f"The column {wanted!r} of {where} does not hold text; {named}.")
    raise TextError(f"{where} has no column {wanted!r}; it has {', '.join(row) or 'none'}.")


def _hub_texts(name: str, seed: int, text_column: str | None) -> Iterator[str]:
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
        yield from _texts(f"the data set {name}", rows.shuffle(seed=seed, buffer_size=2000), text_column)
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


def _python_docs(key: str, split: str) -> list[str]:
    """Read a split from the cache; the first call reads every docstring and fills it, in some 20 s."""
    folder = cache_dir("text")
    file = folder / f"{key}-{split}.json"
    if not file.exists():
        with FileLock(folder / f"{key}.lock"):  # of several processes one reads, and the others wait
            if not file.exists():
                found = sorted(drive(read_python_docs(), desc="reading docstrings"))
                for each in SPLITS:
                    texts = list(_distinct(found, each))
                    write_atomic(folder / f"{key}-{each}.json", json.dumps(texts, ensure_ascii=False))
    return json.loads(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    next(iter(find_documents("python-docs", split="train").stream()))  # fills the cache
