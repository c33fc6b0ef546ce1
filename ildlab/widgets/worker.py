"""One job at a time, on one daemon thread: the stepper's engine.

A job is a generator of `Progress`. Stop closes it at its next yield, pause holds it there. Nothing here
knows about widgets; callbacks are called on the worker's thread (in the caller, with `inline=True`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ildlab.progress import Progress, Work


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `state` is "done", "stopped" or "failed"; `value` its result or exception."""

    state: str
    value: Any = None


class Worker:
    """Runs jobs; `busy` while one runs, `paused` while it is held."""

    def __init__(self, inline: bool = False):
        self.inline = inline
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._busy = threading.Lock()
        self._stop = threading.Event()
        self._go = threading.Event()
        self._go.set()
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is running or held."""
        return self._busy.locked()

    @property
    def paused(self) -> bool:
        """Whether the job is held at a yield."""
        return not self._go.is_set()

    def start(
        self, make: Callable[[], Work], on_progress: Callable[[Progress], None], on_end: Callable[[Outcome], None]
    ) -> bool:
        """Run `make()` to its end; False, and nothing else, where a job is running already."""
        if not self._busy.acquire(blocking=False):
            return False
        self._stop.clear()
        self._go.set()
        if self.inline:
            self._run(make, on_progress, on_end)
        else:
            # A callback that raised ended the thread, with its traceback in the kernel's log.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._loop, name="ildlab-worker", daemon=True)
                self._thread.start()
            self._jobs.put((make, on_progress, on_end))
        return True

    @contextmanager
    def hold(self) -> Iterator[bool]:
        """Keep jobs from starting while the block runs; gives False where one is running already."""
        held = self._busy.acquire(blocking=False)
        try:
            yield held
        finally:
            if held:
                self._busy.release()

    def stop(self) -> None:
        """Close the job at its next yield, held or not."""
        self._stop.set()
        self._go.set()

    def pause(self) -> None:
        """Hold the job at its next yield."""
        if self.busy:
            self._go.clear()

    def resume(self) -> None:
        """Let a held job go on."""
        self._go.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no job runs; False where that took longer than `timeout` seconds."""
        if not self._busy.acquire(timeout=-1 if timeout is None else timeout):
            return False
        self._busy.release()
        return True

    def _loop(self) -> None:
        while True:
            self._run(*self._jobs.get())

    def _run(self, make, on_progress, on_end) -> None:
        try:
            outcome = self._drive(make, on_progress)
        finally:
            self._go.set()
        # The callback runs while the job still counts as running, so that no second one overtakes it.
        try:
            on_end(outcome)
        finally:
            self._busy.release()

    def _drive(self, make, on_progress) -> Outcome:
        work = None
        try:
            work = make()
            while True:
                progress = next(work)
                on_progress(progress)
                self._go.wait()
                if self._stop.is_set():
                    work.close()
                    return Outcome("stopped")
        except StopIteration as stop:
            return Outcome("done", stop.value)
        except Exception as error:  # shown to the person in words, and kept for the traceback
            if work is not None:
                work.close()
            return Outcome("failed", error)
