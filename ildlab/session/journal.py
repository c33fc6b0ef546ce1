"""The run folder is the truth: an append-only journal, the weights each step changed, one writer (docs/sessions.md).

The student at a step is the teacher, minus the layers removed, plus the weights of the steps on the
way there. Steps form a tree (each names its parent), so that undo and branch delete nothing.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from ildlab.errors import JournalError, SessionError
from ildlab.files import whole_path, write_atomic, writing
from ildlab.session.steps import Step, load_weights, save_weights, sealed, unsealed

CHANGES_STUDENT = ("remove", "distill")


class Journal:
    """The run folder of one session. Made by `Journal.create` or `Journal.open`."""

    def __init__(self, folder: Path, config: dict[str, Any], lock, shut: str = ""):
        self.folder, self.config = folder, config
        self._lock, self._shut = lock, shut  # without a lock nothing is written, and `_shut` says why
        self.steps: list[Step] = []
        self.at: int | None = None  # the step to look from, where that is not the last one
        if lock is not None:
            _OPEN[folder.resolve()] = self

    # ------------------------------------------------------- making, opening

    @classmethod
    def create(cls, folder: str | Path, config: dict[str, Any]) -> Journal:
        """Start a run in a folder that is new, or holds nothing but what a process killed while creating one left.

        Raises
        ------
        JournalError, FileError
            The folder holds a run or other files, or is locked; or it cannot be written.
        """
        folder = _new(folder)
        with writing(folder):
            (folder / "weights").mkdir(parents=True, exist_ok=True)
            journal = cls(folder, config, _acquire(folder))
        try:
            write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def open(cls, folder: str | Path, *, step: int | None = None, read_only: bool = False) -> Journal:
        """Lock a run folder and read its journal; a line that a killed process left torn is set aside.

        Where it is not ours to write, or `read_only`, it is read without the lock, and nothing is written.

        Parameters
        ----------
        step : int, optional
            The step to stand at, by default the last. Where a line after it is damaged, that and what follows are moved
            to a folder `damaged-N` of the run.

        Raises
        ------
        JournalError
            No run there, another process writes to it, or the journal is damaged.
        """
        folder = whole_path(folder)
        config, lock, why = read_config(folder), None, "as it was asked"
        if not read_only:
            # Running a notebook's cell again must not lock its own kernel out: within one process the newer
            # session takes over, and the older one says that it is closed.
            if held := _OPEN.get(folder.resolve()):
                held.close()
            try:
                lock = _acquire(folder)
            except OSError as error:
                why = f"{error.strerror or error}: {folder / 'lock'}"
                warnings.warn(f"{folder} is opened to read only ({why}).", stacklevel=3)
        journal = cls(
            folder,
            config,
            lock,
            f"{folder} is open to read only ({why}), so nothing can be done to its student. To go on from it, branch it "
            "into a folder of your own: session.branch(folder).",
        )
        try:
            journal._read(step)
            journal.at = None if step is None else journal.goal(step)
        except BaseException:
            journal.close()
            raise
        return journal

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        self._shut = f"The session on {self.folder} is closed: open it again with PruningSession.open."

    @property
    def writable(self) -> bool:
        """Whether steps can be written: it is open, and not to read only."""
        return self._lock is not None

    def check_writable(self) -> None:
        """Raise JournalError, which says why, where no step can be written."""
        if not self.writable:
            raise JournalError(self._shut)

    def _read(self, step: int | None) -> None:
        path = self.folder / "journal.jsonl"
        lines = _content(path).splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines):
            try:
                self.steps.append(unsealed(line, number))
            except (ValueError, TypeError) as error:
                torn = not line.endswith(b"\n")  # only the last line can be, by a process killed while it wrote it
                if not torn and (step is None or not step < number):
                    last = f"PruningSession.open({str(self.folder)!r}, step={number - 1})" if number else ""
                    raise JournalError(
                        f"{path}, line {number + 1} cannot be read: {error}. Restore the journal from a backup"
                        + (f", or go on from the last whole step, {last}: what follows is set aside." if last else ".")
                    ) from error
                if self.writable:
                    self._set_aside(lines, number, torn)
                return

    def _set_aside(self, lines: list[bytes], number: int, torn: bool) -> None:
        """Cut the journal before a line, and lose nothing: of more than a torn line, the files of its steps are kept too."""
        path = self.folder / "journal.jsonl"
        if torn:
            write_atomic(self.folder / "journal.torn", lines[number])
            write_atomic(path, b"".join(lines[:number]))
            return
        aside = next(f for n in count(1) if not (f := self.folder / f"damaged-{n}").exists())
        write_atomic(aside / path.name, b"".join(lines))
        write_atomic(path, b"".join(lines[:number]))
        with writing(aside):
            for file in (*self.folder.glob("weights/*"), *self.folder.glob("metrics/*")):
                if file.stem.isdigit() and int(file.stem) >= number:
                    (aside / file.parent.name).mkdir(exist_ok=True)
                    file.rename(aside / file.parent.name / file.name)

    # ------------------------------------------------------------- the steps

    @property
    def head(self) -> Step:
        """The step that the student stands at."""
        if self.at is not None:
            return self.steps[self.at]
        last = self.steps[-1]
        return self.steps[last.args["to"]] if last.action == "undo" else last

    def path_to(self, step: int) -> list[Step]:
        """The steps from the beginning to `step`, by parents."""
        if not isinstance(step, int) or not 0 <= step < len(self.steps):
            raise JournalError(f"There is no step {step!r}: the journal has steps 0 to {len(self.steps) - 1}.")
        chain = [self.steps[step]]
        while chain[-1].parent is not None:
            chain.append(self.steps[chain[-1].parent])
        return chain[::-1]

    def goal(self, to: int) -> int:
        """A step that one can go to; SessionError where there is none such."""
        if isinstance(to, bool) or not isinstance(to, int) or not 0 <= to < len(self.steps):
            raise SessionError(f"There is no step {to!r}: the journal has steps 0 to {len(self.steps) - 1}.")
        if self.steps[to].action == "undo":
            raise SessionError(f"Step {to} is itself an undo: go to step {self.steps[to].args['to']} instead.")
        return to

    def append(
        self, action: str, *, layer_ids: Iterable[int], tensors: dict[str, Tensor] | None = None, **fields: Any
    ) -> Step:
        """Write one step: its weights first, then its line, each whole or not at all.

        `fields` are `args`, `result`, `seed` and `seconds` of `Step`.

        Raises
        ------
        JournalError, FileError
            The journal is closed; or it cannot be written, and is as it was before.
        """
        self.check_writable()
        number, parent = len(self.steps), self.head.step if self.steps else None
        path, fields["seconds"] = self.folder / "journal.jsonl", round(fields.get("seconds", 0.0), 3)
        size = path.stat().st_size if path.exists() else 0
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            if tensors:
                fields |= save_weights(self.folder, number, tensors)
            line = sealed(Step(number, parent, action, list(layer_ids), time=now, versions=versions(), **fields))
            with writing(path), open(path, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self.steps.append(unsealed(line, number))  # as it would be read again
        except BaseException:  # a full disk, or Ctrl-C: the step was not done, and nothing of it stays
            del self.steps[number:]
            if path.exists():
                os.truncate(path, size)
            (self.folder / "weights" / f"{number:03d}.safetensors").unlink(missing_ok=True)
            raise
        return self.steps[-1]

    def branch(self, folder: str | Path, step: int) -> Journal:
        """Start a journal in another folder with the way to a step, its weights and losses."""
        chain, folder = self.path_to(step), _new(folder)
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Made beside its place, and moved there whole: half a branch would open, and stand at another step.
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
                other = Journal.create(f"{scratch}/run", {**self.config, "branched_from": [str(self.folder), step]})
                try:
                    for old in chain:
                        copied = {n: getattr(old, n) for n in ("layer_ids", "args", "result", "seed", "seconds")}
                        new = other.append(old.action, tensors=load_weights(self.folder, old), **copied)
                        if self.losses_of(old.step).is_file():
                            other.losses_of(new.step).parent.mkdir(exist_ok=True)
                            shutil.copyfile(self.losses_of(old.step), other.losses_of(new.step))
                finally:
                    other.close()
                shutil.rmtree(folder, ignore_errors=True)  # what a process killed while creating one left there
                other.folder.rename(folder)
        return Journal.open(folder)

    # --------------------------------------------------------------- its files

    def losses_of(self, step: int) -> Path:
        """File with the losses of a distillation, a record a line."""
        return self.folder / "metrics" / f"{step:03d}.jsonl"

    def tensors_at(self, step: int) -> dict[str, Tensor]:
        """The changed tensors of the student at `step`: for each the newest on the way there."""
        tensors: dict[str, Tensor] = {}
        for record in self.path_to(step):
            tensors.update(load_weights(self.folder, record))
        return tensors


_OPEN: weakref.WeakValueDictionary[Path, Journal] = weakref.WeakValueDictionary()


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for name in ("ildlab", "torch", "transformers"):
        with suppress(PackageNotFoundError):  # run from a checkout that is not installed
            found[name] = version(name)
    return found


def _new(folder: str | Path) -> Path:
    """The whole path of a folder that a run can be made in; JournalError where something is there."""
    folder = whole_path(folder)
    if (folder / "config.json").exists():
        raise JournalError(
            f"{folder} already holds a run of teacher {read_config(folder).get('teacher')!r}. "
            "Use PruningSession.open(folder) to go on with it, or choose another folder."
        )
    with writing(folder):
        if folder.exists() and (not folder.is_dir() or not all(map(_left_over, folder.iterdir()))):
            raise JournalError(f"{folder} is not an empty folder: choose a new one for the run.")
    return folder


def _left_over(path: Path) -> bool:
    """Whether a file is what `create` makes before a run folder is one: nothing of anybody's is lost with it."""
    half_written = path.name.startswith(".config.") and path.name.endswith(".tmp.json")
    empty = path.is_dir() and not any(path.iterdir())
    return path.name == "lock" or half_written or (path.name == "weights" and empty)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise JournalError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_config(folder: Path) -> dict[str, Any]:
    """What `config.json` of a run folder says; JournalError where there is none, or it says nothing."""
    path = folder / "config.json"
    if not path.is_file():
        raise JournalError(f"{folder} holds no run (no config.json): start one with PruningSession.create.")
    try:
        config = json.loads(_content(path))
        if not isinstance(config, dict):
            raise ValueError("it is no object")
        if "settings" not in config:
            raise JournalError(f"{path} is no run's, but such as a model's checkpoint has: choose another folder.")
        return config
    except ValueError as error:
        raise JournalError(f"{path} is not JSON ({error}): restore it, or start a new run.") from error


def _acquire(folder: Path):
    from filelock import FileLock, Timeout

    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise JournalError(
            f"{folder} is open in another session, and a run folder has one writer: close that one, or shut its kernel "
            "down, and try again; or look at it with PruningSession.open(folder, read_only=True)."
        ) from None
    return lock
