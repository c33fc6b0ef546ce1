"""The run folder is the truth: an append-only journal, the weights each step changed, one writer.

```
config.json            what the run is of: teacher, text, seed, settings
journal.jsonl          one line a step
weights/NNN.safetensors    only the tensors that step NNN changed
lock                   held by the one process that writes
```

The student at a step is the teacher, minus the layers removed, plus the weights of the steps on the
way there. Steps form a tree (each names its parent), so that undo and branch delete nothing.
"""

from __future__ import annotations

import json
import os
import time
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ildlab.errors import FileError, JournalError
from ildlab.files import atomic_file, disk_error, write_atomic

CHANGES_STUDENT = ("remove", "distill")


@dataclass(frozen=True)
class Step:
    """One journaled action.

    Attributes
    ----------
    step : int
        Its number; 0 is the teacher as it was loaded.
    parent : int or None
        The step it was taken from.
    action : str
        `create`, `measure`, `remove`, `distill`, `evaluate`, `export`, `run` or `undo`.
    layer_ids : list of int
        The student's layers after it.
    args, result : dict
        What was asked for and what came out; JSON-able.
    weights : str or None
        Name of the file with the tensors that it changed.
    seed : int
    seconds : float
    time : str
        When it was written, ISO 8601 UTC.
    versions : dict
        Of Python and of the packages that decide the numbers.
    """

    step: int
    parent: int | None
    action: str
    layer_ids: list[int]
    args: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    seed: int = 0
    seconds: float = 0.0
    time: str = ""
    versions: dict[str, str] = field(default_factory=dict)


class Journal:
    """The run folder of one `PruningSession`. Made by `Journal.create` or `Journal.open`."""

    def __init__(self, folder: Path, config: dict[str, Any], lock):
        self.folder, self.config, self._lock = folder, config, lock
        self.steps: list[Step] = []
        _OPEN[folder.resolve()] = self

    # ------------------------------------------------------- making, opening

    @classmethod
    def create(cls, folder: str | Path, config: dict[str, Any]) -> Journal:
        """Start a run in a folder that is new or empty, and lock it.

        Raises
        ------
        JournalError
            The folder already holds a run or other files, is locked, or cannot be written.
        """
        folder = Path(folder).expanduser()
        if (folder / "config.json").exists():
            raise JournalError(
                f"{folder} already holds a run of teacher {_read_config(folder).get('teacher')!r}. "
                "Use PruningSession.open(folder) to go on with it, or choose another folder."
            )
        if folder.exists() and (not folder.is_dir() or any(p.name != "lock" for p in folder.iterdir())):
            raise JournalError(f"{folder} is not an empty folder: choose a new one for the run.")
        try:
            (folder / "weights").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(folder, error) from error
        journal = cls(folder, config, _acquire(folder))
        write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
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
        held = _OPEN.get(folder.resolve())
        if held is not None:
            held.close()
        journal = cls(folder, config, _acquire(folder))
        try:
            journal._read()
        except JournalError:
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
        if not path.exists():
            return
        raw = path.read_bytes()
        lines = raw.split(b"\n")
        good = 0
        for number, line in enumerate(lines):
            if not line.strip():
                good += len(line) + 1
                continue
            whole = number < len(lines) - 1
            try:
                if not whole:
                    raise ValueError("no line end")
                record = json.loads(line)
                step = Step(**{k: v for k, v in record.items() if k in Step.__dataclass_fields__})
            except (ValueError, TypeError) as error:
                if any(rest.strip() for rest in lines[number + 1 :]):
                    raise JournalError(
                        f"{path}, line {number + 1} cannot be read ({error}), and more lines follow: the journal was "
                        "edited or the disk is damaged. Restore it from a backup, or cut it before that line."
                    ) from error
                # Only the last line can be torn, by a process killed in the middle of writing it.
                write_atomic(self.folder / "journal.torn", line)
                write_atomic(path, raw[:good])
                return
            self.steps.append(step)
            good += len(line) + 1

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
        chain = []
        at: int | None = step
        while at is not None:
            chain.append(self.steps[at])
            at = self.steps[at].parent
        return chain[::-1]

    def append(
        self,
        action: str,
        *,
        layer_ids: Iterable[int],
        args: dict[str, Any] | None = None,
        result: dict[str, Any] | None = None,
        tensors: dict[str, Tensor] | None = None,
        seed: int = 0,
        seconds: float = 0.0,
    ) -> Step:
        """Write one step: its weights first, then its line, each whole or not at all.

        Raises
        ------
        JournalError
            The disk is full or the folder cannot be written; the journal is as it was before.
        """
        if self._lock is None:
            raise JournalError(f"The session on {self.folder} is closed: open it again with PruningSession.open.")
        number = len(self.steps)
        weights = None
        if tensors is not None:
            from safetensors import SafetensorError
            from safetensors.torch import save_file

            weights = f"{number:03d}.safetensors"
            packed = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            try:
                with atomic_file(self.folder / "weights" / weights) as temporary:
                    save_file(packed, temporary)
            except SafetensorError as error:  # safetensors wraps the system's error
                raise FileError(
                    f"The weights of step {number} could not be written to {self.folder} ({error}). Is the disk full? "
                    "The journal is as it was; free some space and run the step again."
                ) from error
        step = Step(
            step=number,
            parent=self.head.step if self.steps else None,
            action=action,
            layer_ids=list(layer_ids),
            args=args or {},
            result=result or {},
            weights=weights,
            seed=seed,
            seconds=round(seconds, 3),
            time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            versions=versions(),
        )
        line = (json.dumps(asdict(step), allow_nan=False) + "\n").encode()
        path = self.folder / "journal.jsonl"
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with open(path, "r+b") as file:  # take back the part that was written
                file.truncate(size)
            raise disk_error(path, error) from error
        self.steps.append(step)
        return step

    def tensors_at(self, step: int) -> dict[str, Tensor]:
        """The changed tensors of the student at `step`: for each the newest on the way there."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = {}
        for record in self.path_to(step):
            if record.weights is None:
                continue
            path = self.folder / "weights" / record.weights
            try:
                tensors.update(load_file(path))
            except (OSError, SafetensorError) as error:
                raise JournalError(
                    f"Step {record.step} needs {path}, which cannot be read: {error}. Go back to a step before it."
                ) from error
        return tensors


_OPEN: weakref.WeakValueDictionary[Path, Journal] = weakref.WeakValueDictionary()


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("ildlab", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


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
            f"{folder} is open in another session (a notebook, perhaps, whose kernel still runs). "
            "A run folder has one writer: close that one, or shut its kernel down, and try again."
        ) from None
    return lock
