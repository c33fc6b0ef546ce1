"""One job at a time, on a daemon thread: the stepper's engine, which knows nothing of widgets.

A job is a generator of `Progress`. Stop closes it at its next yield, pause holds it there. Callbacks are called on the
job's thread (in the caller, with `inline=True`).
"""

from __future__ import annotations

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
    """Runs jobs; `busy` while one runs, `paused` while it is held; `on_free()` is called when the next one may start."""

    def __init__(self, inline: bool = False, on_free: Callable[[], Any] = lambda: None):
        self.inline, self._on_free = inline, on_free
        self._busy = threading.Lock()
        self._stop, self._go = threading.Event(), threading.Event()
        self._go.set()

    @property
    def busy(self) -> bool:
        """Whether a job is running or held."""
        return self._busy.locked()

    @property
    def paused(self) -> bool:
        """Whether the job is held at a yield."""
        return not self._go.is_set()

    def start(self, work: Work, on_progress: Callable[[Progress], Any], on_end: Callable[[Outcome], Any]) -> bool:
        """Run a generator to its end; False, and nothing else, where a job is running already."""
        if not self._busy.acquire(blocking=False):
            return False
        self._stop.clear()
        self._go.set()
        run = threading.Thread(target=self._run, args=(work, on_progress, on_end), daemon=True)
        (run.run if self.inline else run.start)()
        return True

    @contextmanager
    def hold(self, timeout: float = 0) -> Iterator[bool]:
        """Keep jobs from starting while the block runs; gives False where one still runs after `timeout` seconds."""
        held = self._busy.acquire(timeout=timeout)
        try:
            yield held
        finally:
            if held:
                self._busy.release()

    def stop(self) -> None:
        """Close the job at its next yield, held or not."""
        self._stop.set()
        self._go.set()

    def pause(self, on: bool = True) -> None:
        """Hold the job at its next yield, or let it go on."""
        if on and self.busy:
            self._go.clear()
        else:
            self._go.set()

    def wait(self, timeout: float = -1) -> bool:
        """Wait until no job runs; False where that took longer than `timeout` seconds."""
        with self.hold(timeout) as ended:
            return ended

    def _run(self, work, on_progress, on_end) -> None:
        # The callback runs while the job still counts as running, so that no second one overtakes it; one that
        # raises ends the thread, with its traceback in the kernel's log, and the worker is free again.
        try:
            outcome = self._drive(work, on_progress)
            self._go.set()
            on_end(outcome)
        finally:
            self._busy.release()
        self._on_free()

    def _drive(self, work, on_progress) -> Outcome:
        try:
            while True:
                on_progress(next(work))
                self._go.wait()
                if self._stop.is_set():
                    work.close()  # here, since it may fail: it journals what was reached
                    return Outcome("stopped")
        except StopIteration as stop:
            return Outcome("done", stop.value)
        except Exception as error:  # shown to the person in words, and kept for the traceback
            return Outcome("failed", error)
        finally:
            work.close()
