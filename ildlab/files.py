"""Where things lie on disk: the cache, the shipped data, names, text files, and writes that are whole or absent."""

from __future__ import annotations

import codecs
import errno
import gzip
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from itertools import count
from pathlib import Path
from typing import BinaryIO, TextIO

from ildlab.errors import FileError, IldlabError

_COUNT = count()
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16"}
_MARKS |= {codecs.BOM_UTF16_BE: "utf-16"}  # tried in this order: a mark of UTF-32 begins with one of UTF-16
_COMMON = ("windows-1252", "windows-1251", "shift_jis", "gb18030")  # what else a text is often in


def cache_dir(*parts: str) -> Path:
    """Folder for what can be made again: the prepared model, tokenised text.

    ``$ILDLAB_CACHE`` where that is set, else ``~/.cache/ildlab``; with its sub-folders `parts` it exists when this returns.

    Raises
    ------
    FileError
        The folder cannot be made.
    """
    root = Path(os.environ.get("ILDLAB_CACHE") or Path.home() / ".cache" / "ildlab").expanduser()
    folder = root.joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error) from error
    return folder


def data_dir() -> Path:
    """Folder of the data that ships with ildlab, in a checkout and in an install alike.

    Raises
    ------
    IldlabError
        Neither place exists.
    """
    package = Path(__file__).resolve().parent
    # A wheel holds it inside the package; a checkout (and an editable install) beside it.
    for folder in (package / "data", package.parent / "data"):
        if folder.is_dir():
            return folder
    raise IldlabError(
        f"The data that ships with ildlab was found neither in {package / 'data'} nor in "
        f"{package.parent / 'data'}. Install ildlab again (pip install --force-reinstall)."
    )


def disk_error(path: str | os.PathLike, error: OSError) -> FileError:
    """Put an OSError met while writing `path` into words for a person."""
    if error.errno in _FULL or "requested and" in str(error):  # numpy's tofile tells no number
        return FileError(
            f"The disk is full (or over quota): {path} could not be written. What was there before is "
            "untouched. Free some space, or point the run folder or ILDLAB_CACHE elsewhere, and try again."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return FileError(
            f"No permission to write {path} ({error.strerror}). Choose a folder that you may write to; for the cache, set "
            "ILDLAB_CACHE to one."
        )
    return FileError(f"{path} could not be written: {error.strerror or error}.")


def whole_path(path: str | os.PathLike) -> Path:
    """A path from the root on, which stays the same wherever the process goes; FileError where it can be none."""
    try:
        if "\0" in os.fspath(path) or not os.fspath(path).strip():
            raise ValueError("it is empty, or holds a NUL")
        return Path(os.path.abspath(Path(path).expanduser()))
    except (TypeError, ValueError, RuntimeError) as error:  # no text, or ~nobody
        raise FileError(f"{path!r} cannot be a path ({error}): give a name of a file or folder, as a text.") from error


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Raise FileError, in words for a person, for what the system has against writing `path` in this block."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error
    except IldlabError:
        raise
    except Exception as error:
        # Writers in Rust (safetensors) wrap the system's error in a type of their own.
        if told := re.search(r"\(os error (\d+)\)", str(error)):
            raise disk_error(path, OSError(int(told[1]), os.strerror(int(told[1])))) from error
        raise


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path to write to, and put it in place of `path` once it is whole.

    For writers that take a path themselves (``safetensors.torch.save_file``). When the block ends
    well the temporary file is fsynced and renamed, and its folder fsynced, so that the rename
    survives a power cut; when it raises, the temporary file is removed and `path` stays as it was.

    The temporary path is in the same folder, which is made where it does not exist, and has the same suffix.

    Raises
    ------
    FileError
        The disk is full, or the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{next(_COUNT)}.tmp{path.suffix}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_dir(path.parent)
    finally:
        # After a failure only; best effort, so that it never hides the error that brought us here.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def for_later() -> Iterator[None]:
    """Keep, in this block, what can be made again: where the disk does not take it, a warning says so, and work goes on."""
    try:
        yield
    except FileError as error:
        warnings.warn(f"Not kept for the next time: {error}", stacklevel=4)


@contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Hold a lock file in this block, while other processes wait; FileError where there can be none."""
    from filelock import FileLock

    lock = FileLock(path)
    with writing(path):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def sha256_of(path: str | os.PathLike) -> str:
    """sha256 (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: str | os.PathLike, content: bytes | str) -> Path:
    """Write a file so that a reader, or a killed process, sees the old content or the new, never a part.

    A str is written as UTF-8 with its line ends as they are. Returns the path.

    Raises
    ------
    FileError
        The disk is full, or the file cannot be written; an existing file is left as it was.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return Path(path)


def fsync_dir(folder: str | os.PathLike) -> None:
    """Flush a folder's entries to disk, where the system can do that (not on Windows)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- names and text files that others made ---------------------------------------------------------


def exists(path: str | os.PathLike) -> bool:
    """Whether a file or folder is there; False for what cannot be a name of one."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a whole text: too long a name, or with a NUL, or like ~nobody
        return False


def parted(names: str, mark: str, known: Callable[[str], bool] = exists) -> list[str]:
    """Split names at `mark`, but none that holds it: from the left, the longest stretch that is `known` is one name."""
    found, parts = [], names.split(mark)
    while parts:
        ends = range(len(parts), 1, -1) if len(names) < 4096 else ()  # longer: a text, and no names
        end = next((end for end in ends if known(mark.join(parts[:end]).strip())), 1)
        found.append(mark.join(parts[:end]).strip())
        parts = parts[end:]
    return found


@contextmanager
def open_text(path: str | os.PathLike) -> Iterator[TextIO]:
    """Open a text file to read, gzipped where its name ends in .gz.

    It is UTF-8 (a byte-order mark is no part of the text), or UTF-16 or UTF-32 where its mark says so.

    Raises
    ------
    OSError, EOFError, zlib.error
        As from `open` and `gzip.open`.
    ValueError
        It is in another encoding: the words say which, or where the first byte is that is not UTF-8.
    """
    with (gzip.open if str(path).lower().endswith(".gz") else open)(path, "rb") as file:
        head = file.read(2**16)
        file.seek(0)
        encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8-sig")
        if encoding == "utf-8-sig" and (words := _zeros(head, 0.01)):
            raise ValueError(words)
        lines = TextIOWrapper(file, encoding)
        try:
            yield lines
        except UnicodeDecodeError as error:
            if encoding != "utf-8-sig":
                raise ValueError(f"its byte-order mark says {encoding}, and it is not: {error}") from error
            file.seek(0)
            raise ValueError(_zeros(head, 0) or _not_utf8(file)) from error


def _zeros(head: bytes, share: float) -> str:
    """Say what a file without a byte-order mark is, where more than a share of its bytes are zero; else nothing."""
    even, odd = head[::2].count(0), head[1::2].count(0)
    if even + odd <= share * len(head):
        return ""
    # In UTF-16, Latin letters, spaces and line ends have one, always on the same side; in UTF-32 they have three.
    if min(even, odd) * 9 < even + odd:
        name = "utf-16le" if odd > even else "utf-16be"
    elif even + odd >= len(head) / 2:
        name = "utf-32le" if head[::4].count(0) < head[3::4].count(0) else "utf-32be"
    else:
        return "it holds zero bytes, and a text has none"
    return f"it is {name} without a byte-order mark; convert it: iconv -f {name} -t utf-8 OLD > NEW"


def _not_utf8(file: BinaryIO) -> str:
    """Say where a file is not UTF-8, and how that place reads in other encodings."""
    before = 0
    for line in file:
        try:
            line.decode()
        except UnicodeDecodeError as error:
            at, cut = error.start, error.start + 20
            start = max(line.rfind(b" ", 0, at) + 1, at - 20, 0)
            (near, space, _), read = line[start:cut].partition(b" "), []
            for name in _COMMON:
                with suppress(UnicodeDecodeError):  # not where we only cut it off inside a character
                    word = codecs.getincrementaldecoder(name)().decode(near, bool(space) or cut >= len(line))
                    read.append(f"{word.strip()!r} in {name}")
            where = f"byte 0x{line[at]:02X} at offset {before + at:,}"
            return (
                f"{where} is not UTF-8 ({error.reason}). There it reads {', '.join(read) or 'as no text that is known'}. "
                "Convert it from the encoding in which it reads right: iconv -f ENCODING -t utf-8 OLD > NEW"
            )
        before += len(line)
    return "it was changed while it was read; try again"
