"""Where things lie on disk: the cache, the shipped data, and writes that are whole or absent."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from ildlab.errors import FileError, IldlabError

_COUNT = count()
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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
    if error.errno in _FULL:
        return FileError(
            f"The disk is full (or over quota): {path} could not be written. What was there before is "
            "untouched. Free some space, or point the run folder or ILDLAB_CACHE elsewhere, and try again."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return FileError(f"No permission to write {path}. Choose a folder that you may write to.")
    return FileError(f"{path} could not be written: {error.strerror or error}.")


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
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_dir(path.parent)
    except OSError as error:
        raise disk_error(path, error) from error
    except Exception as error:
        # Writers in Rust (safetensors) wrap the system's error in a type of their own.
        if "os error 28" in str(error) or "No space left" in str(error):
            raise disk_error(path, OSError(errno.ENOSPC, "No space left on device")) from error
        raise
    finally:
        # After a failure only; best effort, so that it never hides the error that brought us here.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


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
