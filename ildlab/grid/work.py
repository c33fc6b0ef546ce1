"""What a worker does: it runs the notebook with a point's parameters, in the point's folder, and says how that ended.

A point's folder has one writer. Worker and kernel hold its lock together, through one open file that the kernel inherits:
it is free when the last of the two is gone, whichever was killed, so the next worker never writes beside a kernel that was
left over. (On Linux such a kernel is killed with its worker.) The state of a point is read and written under the lock.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ildlab
from ildlab.errors import GridError, first_line
from ildlab.files import write_atomic, writing

NOTEBOOK, PARAMETERS, STATE, RUN = "notebook.ipynb", "parameters.json", "state.json", "run_folder"
ENDED = ("done", "failed")
NEEDS = (
    "A worker needs the driver's ildlab with its extra `grid`, and the same paths to the grid's folder, models, texts."
)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_PDEATHSIG = 1  # of prctl


def state_of(folder: Path) -> dict[str, Any]:
    """What is known of a point: `state` is "waiting", "running" (by a worker that may be gone), "done" or "failed"."""
    try:
        return json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"state": "waiting"}


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Keep what is known of a point; only under its lock."""
    write_atomic(folder / STATE, json.dumps(state, indent=2) + "\n")


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """Hold a point's lock, waiting for it; yields the open file, by which a child process holds it too."""
    with writing(folder / "lock"):
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while not _locked(handle, exclusive=True):
            time.sleep(0.1)
        yield handle
    finally:
        os.close(handle)


def is_held(folder: Path) -> bool:
    """Whether a worker, or a kernel, has a point in hand."""
    try:
        handle = os.open(folder / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _locked(handle, exclusive=False)
    finally:
        os.close(handle)


def _locked(handle: int, exclusive: bool) -> bool:
    import fcntl  # Linux and macOS have it

    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def own_version() -> str:
    """The version of ildlab on a worker that has what starts kernels."""
    import ipykernel  # noqa: F401
    import papermill  # noqa: F401

    return ildlab.__version__


def run_point(folder: str, version: str) -> str:
    """Run one point, unless it has ended already; returns the state that it is in then.

    What goes wrong in the notebook is the point's result, with its traceback; what is wrong with the worker is raised.

    Raises
    ------
    GridError
        The worker has another ildlab than the driver, or does not see the folder.
    """
    point = Path(folder)
    if version != ildlab.__version__ or not (point / PARAMETERS).is_file():
        here = f"{socket.gethostname()} has ildlab {ildlab.__version__}, the driver {version}"
        raise GridError(f"{here}; it sees {point}: {(point / PARAMETERS).is_file()}.")
    with held(point) as lock:
        known = state_of(point)
        if known["state"] in ENDED:  # by a worker that was thought lost, or for another driver
            return known["state"]
        told = {"state": "running", "attempts": known.get("attempts", 0) + 1}
        told |= {"worker": f"{socket.gethostname()}:{os.getpid()}", "began": time.time()}
        write_state(point, told)
        try:
            _execute(point, lock)
            told["state"] = "done"
        except Exception as error:
            lines = getattr(error, "traceback", None) or traceback.format_exception(error)
            why = f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else first_line(error)
            why, lines = (_COLOURS.sub("", text) for text in (why, "\n".join(lines)))
            told |= {"state": "failed", "error": why, "traceback": lines}
        write_state(point, told | {"seconds": round(time.time() - told["began"], 2), "peak_bytes": _peak()})
        return told["state"]


def _peak() -> int:
    """The most bytes that a kernel of this worker had in memory, of those that have ended."""
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _execute(point: Path, lock: int) -> None:
    import papermill

    notebook = str(point.parent / NOTEBOOK)
    parameters = json.loads((point / PARAMETERS).read_text(encoding="utf-8"))
    if RUN in papermill.inspect_notebook(notebook):
        parameters[RUN] = str(point / "run")
    papermill.execute_notebook(
        notebook,
        str(point / NOTEBOOK),
        parameters,
        kernel_name="python3",  # of the worker's own Python, whatever the author's is called
        progress_bar=False,
        extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # else it tells of its transport, and its last interrupt
        kernel_manager_class=_kernel_manager(point, lock),
    )


def _kernel_manager(point: Path, lock: int) -> type:
    """A manager whose kernel works in a point's folder, holds its lock, and dies with the worker."""
    from jupyter_client import AsyncKernelManager

    worker, libc = os.getpid(), ctypes.CDLL(None)

    def with_its_worker() -> None:
        # ipykernel looks for its parent too, but only once it has started, and once a second.
        if sys.platform == "linux":
            libc.prctl(_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != worker:
            os._exit(1)

    class Manager(AsyncKernelManager):
        async def start_kernel(self, **options: Any) -> None:
            options |= {"cwd": str(point), "pass_fds": (lock,), "preexec_fn": with_its_worker}
            await super().start_kernel(**options)

    return Manager
