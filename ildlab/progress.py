"""Long work is a generator: it yields `Progress` and returns its result.

A blocking call drives it here, with a tqdm bar; the stepper drives it from a worker thread and may
close it at any yield. Nothing else knows about threads or bars.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = 1.0  # seconds of work from which on a notebook shows a bar


@dataclass(frozen=True)
class Progress:
    """How far a piece of long work is."""

    done: int
    total: int
    note: str = ""  # one short line for a person
    partial: Any = None  # the result so far, where it is worth showing (scores, a loss record)
    stage: str = ""  # what part of longer work this is, where it has parts


Work = Generator[Progress, None, T]


def relabel(work: Work[T], label: str, of: tuple[int, int] | None = None) -> Work[T]:
    """Pass a generator's progress on, a label before each note.

    With `of`, the done and total of longer work, it is a stage of that, and its own counts go into the note.
    """
    try:
        while True:
            progress = next(work)
            if of is None:
                yield Progress(progress.done, progress.total, f"{label}{progress.note}", progress.partial)
            else:
                note = f"{label} {progress.done}/{progress.total} {progress.note}".strip()
                yield Progress(*of, note, progress.partial, label)
    except StopIteration as stop:
        return stop.value
    finally:
        work.close()


def lines(work: Work[T], *, every: float = 10.0) -> T:
    """Run a generator of `Progress` to its end, printing plain lines; for logs and batch notebooks.

    `every` is the seconds between two lines; a change of `done` or of the stage is printed at once.
    """
    start = last = time.perf_counter()
    place = None
    try:
        while True:
            progress = next(work)
            now = time.perf_counter()
            if (progress.done, progress.stage) != place or now - last >= every:
                print(f"{now - start:6.0f} s  {progress.done}/{progress.total}  {progress.note}", flush=True)
                place, last = (progress.done, progress.stage), now
    except StopIteration as stop:
        return stop.value
    finally:
        work.close()


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this: its stderr is no terminal, but a line that is drawn anew shows."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def drive(work: Work[T], *, desc: str = "", show: bool | None = None) -> T:
    """Run a generator of `Progress` to its end and return what it returns.

    `desc` labels a tqdm bar; `show` it or not: by default only where stderr is a terminal, or in a notebook.
    """
    from tqdm import tqdm

    notebook = _in_notebook()
    if show is None:
        show = sys.stderr.isatty() or notebook
    # A line of text in a notebook too: a widget that is closed while the page still draws it is an error there.
    # Short work leaves no trace in the cell's output.
    place = sys.stdout if notebook else sys.stderr
    begin = time.perf_counter() + (PATIENCE if notebook else 0)
    bar = None
    try:
        while True:
            progress = next(work)
            if show and time.perf_counter() >= begin:
                if bar is None:
                    bar = tqdm(total=progress.total, desc=desc, leave=False, file=place)
                bar.total = progress.total
                bar.n = progress.done
                bar.set_postfix_str(progress.note, refresh=True)
    except StopIteration as stop:
        return stop.value
    finally:
        work.close()
        if bar is not None:
            bar.close()


def blocking(steps: Callable[..., Work[T]]) -> Callable[..., T]:
    """Make the plain call `x` of a generator `x_steps`: it runs to the end, with a bar (`show`), and returns the result.

    Signature and documentation are those of the generator, so that they are written once.
    """
    name = steps.__name__.removesuffix("_steps")

    @wraps(steps)
    def call(*args, show: bool | None = None, **options):
        return drive(steps(*args, **options), desc=name, show=show)

    call.__name__, call.__qualname__ = name, steps.__qualname__.removesuffix("_steps")
    signature = inspect.signature(steps)
    bar = inspect.Parameter("show", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="bool | None")
    call.__signature__ = signature.replace(
        parameters=sorted([*signature.parameters.values(), bar], key=lambda each: each.kind),  # **options stay last
        return_annotation=str(signature.return_annotation).removeprefix("Work[").removesuffix("]"),
    )
    return call
