"""Long work is a generator: it yields `Progress` and returns its result.

A blocking call drives it here, with a tqdm bar; the stepper drives it from a worker thread and may
close it at any yield. Nothing else knows about threads or bars.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = 1.0  # seconds of work from which on a notebook shows a bar


@dataclass(frozen=True)
class Progress:
    """How far a piece of long work is.

    `partial` is the result so far, where the work has one worth showing (scores, a loss record).
    """

    done: int  # units so far,
    total: int  # and in all
    note: str = ""  # one short line for a person
    partial: Any = None
    stage: str = ""  # what part of longer work this is, where it has parts


Work = Generator[Progress, None, T]


def relabel(work: Work[T], label: str, of: tuple[int, int] | None = None) -> Work[T]:
    """Pass a generator's progress on, `label` before each note.

    As a stage of longer work where `of` gives the longer work's (done, total); the stage's own counts go into the note.
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
    except BaseException as error:
        _end(work, error)
        raise


def _run(work: Work[T], see: Callable[[Progress], Any]) -> T:
    """Run a generator to its end, showing each of its `Progress` to `see`."""
    try:
        while True:
            see(next(work))
    except StopIteration as stop:
        return stop.value
    except BaseException as error:
        _end(work, error)
        raise


def _end(work: Work[Any], error: BaseException) -> None:
    """End a generator by what ended who drives it: Ctrl-C is the same in the middle of the work and between two parts."""
    with suppress(StopIteration, type(error)):  # it comes out again; what comes from the cleaning up instead is told
        if not isinstance(error, GeneratorExit):  # only that says that a person chose to stop
            work.throw(error)
    work.close()


def lines(work: Work[T], *, every: float = 10.0) -> T:
    """Run a generator of `Progress` to its end, printing plain lines; for logs and batch notebooks.

    `every` is the seconds between two lines; a change of `done` or of the stage is printed at once.
    """
    start = last = time.perf_counter()
    place = None

    def see(progress: Progress) -> None:
        nonlocal place, last
        now = time.perf_counter()
        if (progress.done, progress.stage) != place or now - last >= every:
            print(f"{now - start:6.0f} s  {progress.done}/{progress.total}  {progress.note}", flush=True)
            place, last = (progress.done, progress.stage), now

    return _run(work, see)


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this: its stderr is no terminal, but a line that is drawn anew shows."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def drive(work: Work[T], *, desc: str = "", show: bool | None = None) -> T:
    """Run a generator of `Progress` to its end and return what it returns.

    A tqdm bar labelled `desc` is drawn where `show` asks for it; by default where stderr is a terminal, or in a notebook.
    """
    from tqdm import tqdm

    notebook = in_notebook()
    if show is None:
        show = sys.stderr.isatty() or notebook
    # A line of text in a notebook too: a widget that is closed while the page still draws it is an error there.
    # Short work leaves no trace in the cell's output.
    place = sys.stdout if notebook else sys.stderr
    begin = time.perf_counter() + (PATIENCE if notebook else 0)
    bar = None

    def see(progress: Progress) -> None:
        nonlocal bar
        if show and time.perf_counter() >= begin:
            if bar is None:
                bar = tqdm(total=progress.total, desc=desc, leave=False, file=place)
            bar.total, bar.n = progress.total, progress.done
            bar.set_postfix_str(progress.note, refresh=True)

    try:
        return _run(work, see)
    finally:
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
