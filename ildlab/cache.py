"""Where things lie on disk: the cache, the shipped data, and writes that are whole or absent."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from ildlab.errors import IldlabError, JournalError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cache_dir(*parts: str) -> Path:
    """Folder for what can be made again: the prepared model, tokenised text.

    Parameters
    ----------
    *parts : str
        Sub-folders, made where they do not exist.

    Returns
    -------
    Path
        ``$ILDLAB_CACHE`` where that is set, else ``~/.cache/ildlab``; it exists when this returns.

    Raises
    ------
    JournalError
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


def disk_error(path: str | os.PathLike, error: OSError) -> JournalError:
    """Put an OSError met while writing `path` into words for a person."""
    if error.errno in _FULL:
        return JournalError(
            f"The disk is full (or over quota): {path} could not be written. What was there before is "
            "untouched. Free some space, or point the run folder or ILDLAB_CACHE elsewhere, and try again."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return JournalError(f"No permission to write {path}. Choose a folder that you may write to.")
    return JournalError(f"{path} could not be written: {error.strerror or error}.")


def write_atomic(path: str | os.PathLike, content: bytes | str) -> Path:
    """Write a file so that a reader, or a killed process, sees the old content or the new, never a part.

    The bytes go to a temporary file in the same folder, are fsynced, and the file is renamed; then
    the folder is fsynced, so that the rename itself survives a power cut.

    Parameters
    ----------
    path : path
        Its folder is made where it does not exist.
    content : bytes or str
        A str is written as UTF-8 with its line ends as they are.

    Returns
    -------
    Path

    Raises
    ------
    JournalError
        The disk is full, or the file cannot be written; an existing file is left as it was.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes 0600; a result file should be as readable as any other file of its owner.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        fsync_dir(path.parent)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return path


def fsync_dir(folder: str | os.PathLike) -> None:
    """Flush a folder's entries to disk, where the system can do that (not on Windows)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    """Return the process's umask; reading it means setting it, so set it straight back."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
