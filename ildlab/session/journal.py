"""The run folder is the truth: an append-only journal, the weights each step changed, one writer (docs/sessions.md).

The student at a step is the teacher, minus the layers removed, plus the weights of the steps on the
way there. Steps form a tree (each names its parent), so that undo and branch delete nothing.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from ildlab.errors import FileError, JournalError
from ildlab.files import atomic_file, disk_error, write_atomic

CHANGES_STUDENT = ("remove", "distill")


@dataclass(frozen=True)
class Step:
    """One journaled action, a line of JSON."""

    step: int  # its number; 0 is the teacher as it was loaded
    parent: int | None  # the step it was taken from
    action: str  # create, measure, remove, distill, failed, evaluate, export, run or undo
    layer_ids: list[int]  # the student's layers after it
    args: dict[str, Any] = field(default_factory=dict)  # what was asked for
    result: dict[str, Any] = field(default_factory=dict)  # what came out
    weights: str | None = None  # name of the file with the tensors that it changed
    seed: int = 0
    seconds: float = 0.0
    time: str = ""  # when it was written, ISO 8601 UTC
    versions: dict[str, str] = field(default_factory=dict)  # of what decides the numbers

    @property
    def whole(self) -> bool:
        """Whether it is no distillation that was stopped part-way."""
        return "stopped_at" not in self.result


class Journal:
    """The run folder of one session. Made by `Journal.create` or `Journal.open`."""

    def __init__(self, folder: Path, config: dict[str, Any], lock):
        self.folder, self.config, self._lock = folder, config, lock
        self.steps: list[Step] = []
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
        folder = Path(folder).expanduser()
        if (folder / "config.json").exists():
            raise JournalError(
                f"{folder} already holds a run of teacher {_read_config(folder).get('teacher')!r}. "
                "Use PruningSession.open(folder) to go on with it, or choose another folder."
            )
        if folder.exists() and (not folder.is_dir() or not all(map(_left_over, folder.iterdir()))):
            raise JournalError(f"{folder} is not an empty folder: choose a new one for the run.")
        try:
            (folder / "weights").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(folder, error) from error
        journal = cls(folder, config, _acquire(folder))
        try:
            write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def open(cls, folder: str | Path) -> Journal:
        """Lock a run folder and read its journal; a line that a killed process left torn is set aside.

        Raises
        ------
        JournalError
            No run there, another process writes to it, or the journal is damaged before its last line.
        """
        folder = Path(folder).expanduser()
        config = _read_config(folder)
        # Running a notebook's cell again must not lock its own kernel out: within one process the newer
        # session takes over, and the older one says that it is closed.
        if held := _OPEN.get(folder.resolve()):
            held.close()
        journal = cls(folder, config, _acquire(folder))
        try:
            journal._read()
        except BaseException:
            journal.close()
            raise
        return journal

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _read(self) -> None:
        path = self.folder / "journal.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("no line end")
                record = json.loads(line)
                self.steps.append(Step(**{k: v for k, v in record.items() if k in Step.__dataclass_fields__}))
            except (ValueError, TypeError) as error:
                if number < len(lines) - 1:
                    raise JournalError(
                        f"{path}, line {number + 1} cannot be read ({error}), and more lines follow: restore the journal "
                        "from a backup, or cut it before that line."
                    ) from error
                # Only the last line can be torn, by a process killed in the middle of writing it.
                write_atomic(self.folder / "journal.torn", line)
                write_atomic(path, b"".join(lines[:-1]))

    # ------------------------------------------------------------- the steps

    @property
    def head(self) -> Step:
        """The step that the student stands at."""
        last = self.steps[-1]
        return self.steps[last.args["to"]] if last.action == "undo" else last

    def path_to(self, step: int) -> list[Step]:
        """The steps from the beginning to `step`, by parents."""
        if not 0 <= step < len(self.steps):
            raise JournalError(f"There is no step {step}: the journal has steps 0 to {len(self.steps) - 1}.")
        chain = [self.steps[step]]
        while chain[-1].parent is not None:
            chain.append(self.steps[chain[-1].parent])
        return chain[::-1]

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
        if self._lock is None:
            raise JournalError(f"The session on {self.folder} is closed: open it again with PruningSession.open.")
        number, parent = len(self.steps), self.head.step if self.steps else None
        weights = self._save(number, tensors) if tensors else None
        fields |= {"seconds": round(fields.get("seconds", 0.0), 3), "weights": weights, "versions": versions()}
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        step = asdict(Step(number, parent, action, list(layer_ids), time=now, **fields))
        try:
            line = json.dumps(step, allow_nan=False, default=lambda number: number.item()).encode()  # numpy's, torch's
        except ValueError as error:
            raise JournalError(f"A value of this {action} is NaN or infinite: it would hide a failure.") from error
        path = self.folder / "journal.jsonl"
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "ab") as file:
                file.write(line + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            os.truncate(path, size)  # take back the part that was written
            raise disk_error(path, error) from error
        self.steps.append(Step(**json.loads(line)))  # as it would be read again
        return self.steps[-1]

    def branch(self, folder: str | Path, step: int) -> Journal:
        """Start a journal in another folder with the way to a step, its weights and losses."""
        chain = self.path_to(step)
        other = Journal.create(folder, {**self.config, "branched_from": [str(self.folder), step]})
        for old in chain:
            copied = {name: getattr(old, name) for name in ("layer_ids", "args", "result", "seed", "seconds")}
            new = other.append(old.action, tensors=self._tensors(old), **copied)
            if self.losses_of(old.step).is_file():
                other.losses_of(new.step).parent.mkdir(exist_ok=True)
                shutil.copyfile(self.losses_of(old.step), other.losses_of(new.step))
        return other

    # --------------------------------------------------------------- its files

    def losses_of(self, step: int) -> Path:
        """File with the losses of a distillation, a record a line."""
        return self.folder / "metrics" / f"{step:03d}.jsonl"

    def tensors_at(self, step: int) -> dict[str, Tensor]:
        """The changed tensors of the student at `step`: for each the newest on the way there."""
        tensors: dict[str, Tensor] = {}
        for record in self.path_to(step):
            tensors.update(self._tensors(record))
        return tensors

    def _tensors(self, record: Step) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if record.weights is None:
            return {}
        path = self.folder / "weights" / record.weights
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise JournalError(
                f"Step {record.step} needs {path}, which cannot be read: {error}. Go back to a step before it."
            ) from error

    def _save(self, number: int, tensors: dict[str, Tensor]) -> str:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        name = f"{number:03d}.safetensors"
        packed = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        try:
            with atomic_file(self.folder / "weights" / name) as temporary:
                save_file(packed, temporary)
        except SafetensorError as error:  # safetensors wraps the system's error
            raise FileError(
                f"The weights of step {number} could not be written to {self.folder} ({error}). Is the disk full? "
                "The journal is as it was."
            ) from error
        return name


_OPEN: weakref.WeakValueDictionary[Path, Journal] = weakref.WeakValueDictionary()


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for name in ("ildlab", "torch", "transformers"):
        with suppress(PackageNotFoundError):  # run from a checkout that is not installed
            found[name] = version(name)
    return found


def _left_over(path: Path) -> bool:
    """Whether a file is what `create` makes before a run folder is one: nothing of anybody's is lost with it."""
    half_written = path.name.startswith(".config.") and path.name.endswith(".tmp.json")
    empty = path.is_dir() and not any(path.iterdir())
    return path.name == "lock" or half_written or (path.name == "weights" and empty)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise JournalError(f"{folder} holds no run (no config.json): start one with PruningSession.create.")
    try:
        return json.loads(path.read_text())
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
            "down, and try again."
        ) from None
    return lock
