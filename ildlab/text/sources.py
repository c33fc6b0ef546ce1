"""Where text comes from: every source becomes one stream of documents, in a seeded order, of one split.

A document's split is a hash of its own text, so the same document is in the same split whatever
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
from dataclasses import dataclass
from pathlib import Path

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
    """Documents of one split in a seeded order.

    Parameters
    ----------
    source : str
        The name to load them by again.
    identity : str or None
        Changes whenever the documents may have changed; None where that cannot be told cheaply.
    endless : bool
        May be too large to read whole (a Hub data set), so a number of tokens has to be given.
    stream : callable
        Returns a fresh iterator over the documents.
    """

    source: str
    identity: str | None
    endless: bool
    stream: Callable[[], Iterator[str]]


def split_of(text: str) -> str:
    """Return the split a document belongs to: 15% calibration, 15% eval, 70% train."""
    return _split_of_key(_key(text))


def _split_of_key(key: str) -> str:
    bucket = int(key, 16) % 100
    return "calibration" if bucket < 15 else "eval" if bucket < 30 else "train"


def find_documents(
    source: str | os.PathLike | Sequence[str], *, split: str, seed: int = 0, text_column: str | None = None
) -> Documents:
    """Find a source and describe its documents; files are checked here, read when first streamed.

    Parameters
    ----------
    source : str, path or sequence of str
        See `ildlab.text.blocks.load_text`.
    split : {"calibration", "train", "eval"}
    seed : int
        Sets the order of the documents.
    text_column : str, optional
        Column or key of tabular sources; by default "text", or the only one that holds strings.

    Raises
    ------
    TextError
        The source does not exist or cannot be read.
    """
    if not isinstance(source, str | os.PathLike):
        texts = list(source)
        if not all(isinstance(text, str) for text in texts):
            raise TextError("A list of documents must hold str only; for token ids there is no need of load_text.")
        return Documents(f"list of {len(texts)} texts", None, False, lambda: _in_split(texts, split, seed))

    name = str(source)
    if name == "python-docs":
        key = python_docs_key()
        return Documents(name, key, False, lambda: _order(_python_docs(key, split), seed))
    if name == "teacher-samples":
        folder = data_dir() / "teacher_samples"
        if not (folder / "samples.jsonl.gz").is_file():
            raise TextError(
                f"The teacher's samples are not part of this copy of ildlab ({folder} does not exist). "
                'Use "python-docs", or your own file or folder of text.'
            )
        # The folder also holds the data card and the openings, which are no samples.
        return _from_files(name, folder / "samples.jsonl.gz", split, seed, text_column)
    path = Path(name).expanduser()
    if exists(path):
        return _from_files(name, path, split, seed, text_column)
    # owner/name[:configuration]; anything that looks like a path is taken for a missing file.
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", name) and not name.lower().endswith(SUFFIXES):
        return Documents(
            name, f"hub:{name}:{text_column}", True, lambda: _distinct(_hub_rows(name, seed, text_column), split)
        )
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


def _key(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).lower().encode("utf-8", "replace")).hexdigest()


def _distinct(texts: Iterable[str], split: str) -> Iterator[str]:
    seen: set[str] = set()
    for text in texts:
        # JSON and docstrings can hold lone surrogates, which no tokenizer and no file takes.
        text = text.encode("utf-8", "replace").decode("utf-8").strip()
        key = _key(text)
        if text and key not in seen and _split_of_key(key) == split:
            seen.add(key)
            yield text


def _order(texts: list[str], seed: int) -> Iterator[str]:
    """Yield texts in an order that depends on the seed and the texts alone, not on where they lay."""
    return iter(sorted(texts, key=lambda text: hashlib.sha256(f"{seed}:{_key(text)}".encode()).digest()))


def _in_split(texts: Iterable[str], split: str, seed: int) -> Iterator[str]:
    return _order(list(_distinct(texts, split)), seed)


# ---- files -----------------------------------------------------------------------------------------


def _from_files(name: str, path: Path, split: str, seed: int, text_column: str | None) -> Documents:
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.name.lower().endswith(SUFFIXES)
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not files:
            raise TextError(f"The folder {path} holds no {'/'.join(SUFFIXES)} file.")
    else:
        files = [path]
        if not path.name.lower().endswith(SUFFIXES):
            raise TextError(f"{path} is not a kind of text file that ildlab reads; it reads {', '.join(SUFFIXES)}.")
    if not any(file.stat().st_size for file in files):
        raise TextError(f"{path} is empty. Give a text of at least some thousand words.")
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    identity = f"files:{text_column}:{hashlib.sha256(repr(stats).encode()).hexdigest()}"
    return Documents(name, identity, False, lambda: _in_split(_file_texts(files, text_column), split, seed))


def _file_texts(files: list[Path], text_column: str | None) -> Iterator[str]:
    prose = [file for file in files if file.name.lower().endswith((".txt", ".md"))]
    pages = [_read_prose(file) for file in prose]
    # A short text is cut finer, so that each split gets its share of it.
    chunk = min(_MAX_CHUNK, max(200, sum(map(len, pages)) // 100))
    for page in pages:
        yield from _chunks(page, chunk)
    for file in files:
        if file.name.lower().endswith(".parquet"):
            yield from _parquet_rows(file, text_column)
        elif file not in prose:
            yield from _jsonl_rows(file, text_column)


def _read_prose(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{file} is not UTF-8 text (byte {error.start} cannot be read). Convert it, for example with "
            f"iconv -f latin1 -t utf-8."
        ) from error
    except OSError as error:
        raise TextError(f"{file} cannot be read: {error.strerror}.") from error


def _chunks(page: str, size: int) -> Iterator[str]:
    """Gather paragraphs to documents of about `size` characters; cut what has no paragraphs at spaces."""
    gathered: list[str] = []
    length = 0
    for paragraph in re.split(r"\n[^\S\n]*\n\s*", page):
        for start in _cuts(paragraph, 4 * size):
            gathered.append(start)
            length += len(start)
            if length >= size:
                yield "\n\n".join(gathered)
                gathered, length = [], 0
    if gathered:
        yield "\n\n".join(gathered)


def _cuts(paragraph: str, limit: int) -> Iterator[str]:
    while len(paragraph) > limit:
        at = max(paragraph.rfind("\n", limit // 2, limit), paragraph.rfind(" ", limit // 2, limit))
        at = at if at > 0 else limit
        yield paragraph[:at].strip()
        paragraph = paragraph[at:]
    yield paragraph.strip("\n")


def _column_of_row(where: object, row: dict, wanted: str | None) -> str:
    """Choose by one row: a null may be a text in the next one."""
    strings = [key for key, value in row.items() if isinstance(value, str)]
    unknown = [key for key, value in row.items() if value is None]
    for name in (wanted, "text"):
        if name in unknown:
            return name
    return _choose_column(where, list(row), strings, wanted)


def _choose_column(where: object, columns: Sequence[str], strings: Sequence[str], wanted: str | None) -> str:
    """Return the column to read: the one asked for, else "text", else the only one that holds strings."""
    if wanted is not None:
        if wanted not in columns:
            raise TextError(f"{where} has no column {wanted!r}; it has {', '.join(columns) or 'none'}.")
        if wanted not in strings:
            raise TextError(f"The column {wanted!r} of {where} does not hold text; {_named(strings)}.")
        return wanted
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise TextError(f"Say which column of {where} to read (text_column=...): {_named(strings)}.")


def _named(strings: Sequence[str]) -> str:
    return f"these hold text: {', '.join(strings)}" if strings else "no column holds text"


def _jsonl_rows(file: Path, text_column: str | None) -> Iterator[str]:
    column = None
    opener = gzip.open if file.name.lower().endswith(".gz") else open
    try:
        with opener(file, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if isinstance(row, dict):
                    if column is None:
                        column = _column_of_row(file, row, text_column)
                    row = row.get(column)
                if isinstance(row, str):
                    yield row
                elif row is not None:
                    raise TextError(f"Line {number} of {file} holds {type(row).__name__} where text was expected.")
    except (ValueError, EOFError, zlib.error) as error:  # of json, of the encoding, of a gzip file cut short
        raise TextError(f"{file} is not JSON lines in UTF-8: {error}. Each line must be one JSON value.") from error
    except OSError as error:
        raise TextError(f"{file} cannot be read: {error.strerror or error}.") from error


def _parquet_rows(file: Path, text_column: str | None) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise TextError(f"Reading {file} needs pyarrow: pip install 'ildlab[data]'.") from error
    try:
        with pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            strings = [
                field.name
                for field in schema
                if pa.types.is_string(getattr(field.type, "value_type", field.type))
                or pa.types.is_large_string(field.type)
            ]
            strings = [name for name in strings if not pa.types.is_nested(schema.field(name).type)]
            column = _choose_column(file, schema.names, strings, text_column)
            for batch in table.iter_batches(columns=[column]):
                yield from (row for row in batch.column(0).to_pylist() if row)
    except (pa.ArrowException, OSError) as error:
        raise TextError(f"{file} cannot be read as parquet: {error}.") from error


# ---- the Hub ---------------------------------------------------------------------------------------


def _hub_rows(name: str, seed: int, text_column: str | None) -> Iterator[str]:
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
        rows = rows.shuffle(seed=seed, buffer_size=2000)
        column = None
        for row in rows:
            if column is None:
                column = _column_of_row(f"the data set {name}", row, text_column)
            if row[column]:
                yield row[column]
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
