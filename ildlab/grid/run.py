"""A grid on workers: a task a point, on processes of this machine or on any cluster that a client of dask's speaks for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import pandas as pd

import ildlab
from ildlab.errors import GridError, first_line
from ildlab.grid.frame import load_grid, states
from ildlab.grid.points import Plan, Values
from ildlab.grid.work import ENDED, NEEDS, STATE, held, own_version, run_point, state_of, write_state
from ildlab.progress import Progress, Work, blocking, in_notebook
from ildlab.typed import at_least_one

_SHARE = 0.9  # of the free memory that points may have together
_WORKER = 300 * 2**20  # bytes of a worker beside its kernel


def run_grid_steps(
    notebook: str | os.PathLike,
    grid: Values | Iterable[Values],
    out: str | os.PathLike,
    client: Any = None,
    *,
    workers: int | None = None,
    retry: bool = False,
) -> Work[pd.DataFrame]:
    """Run a notebook with every point of a grid of parameters, each in a folder of its own; returns `load_grid(out)`.

    Points that are done are not run again, those that were stopped are, and failed ones where `retry` says so. Called
    again after whatever ended it, it goes on.

    Parameters
    ----------
    notebook : path
        With a cell tagged `parameters`. One of them, `run_folder`, is given here: `run/` in the point's folder.
    grid : mapping, or list of mappings
        Parameter -> list of its values, or one value; all combinations are run. A list is run as one grid.
    out : path
        Folder of the grid, which all workers see.
    client : dask.distributed.Client, optional
        Of any cluster, with one thread a worker; by default processes of this machine.
    workers : int, optional
        How many processes of this machine. By default a first point is run alone, and then as many as its peak memory
        goes into what is free, as there are cores; one where there is a GPU.
    retry : bool
        Run failed points again; what is known of the failure is kept as `failed-N.json`.

    Raises
    ------
    GridError, ParameterError
        The grid is none of the notebook, the folder is another's, or a worker lacks something; in the first two cases
        nothing is written.
    """
    if workers is not None:
        at_least_one(GridError, workers=workers)
    if client is not None:
        _check(client, workers)
    elif find_spec("distributed") is None:
        raise GridError("A grid runs on dask: pip install 'ildlab[grid]'.")
    folders = Plan.of(notebook, grid).lay_out(out)
    for folder in folders if retry else ():
        _forget(folder)
    if client is not None:
        yield from _through(client, folders, _left(folders))
    while client is None and (left := _left(folders)):
        many = workers or _fitting(folders)  # nothing is known before one is done: then the next one runs alone
        with _local(min(many or 1, len(left))) as here:
            yield from _through(here, folders, left if many else left[:1])
    return load_grid(out)


run_grid = blocking(run_grid_steps)


def _check(client: Any, workers: int | None) -> None:
    """Refuse a client whose workers could not run a point; those that come later are asked by each point."""
    if workers is not None or not hasattr(client, "submit") or getattr(client, "asynchronous", False):
        raise GridError(
            f"client={client!r}: give a dask.distributed.Client that is not asynchronous, and no workers=."
        )
    for worker, found in client.run(own_version, on_error="return").items():
        if found != ildlab.__version__:
            found = f"{type(found).__name__}: {found}" if isinstance(found, BaseException) else f"ildlab {found}"
            raise GridError(f"The worker {worker} has {found}; here it is {ildlab.__version__}. {NEEDS}")
    if many := [worker for worker, threads in client.nthreads().items() if threads > 1]:
        raise GridError(
            f"{many[0]} runs several tasks at once, so several points would share its memory: start workers with one "
            "thread (`dask worker --nthreads 1`), and as many as there is memory for."
        )


@contextmanager
def _local(workers: int) -> Iterator[Any]:
    """A client of so many processes here, which share the cores; dask's own limit of memory sees no kernel."""
    from dask.system import CPU_COUNT
    from distributed import Client, LocalCluster

    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, CPU_COUNT // workers))
    options = {"threads_per_worker": 1, "memory_limit": 0, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=workers, env={"OMP_NUM_THREADS": threads}, **options) as cluster:
        with Client(cluster) as client:
            yield client


def _fitting(folders: list[Path]) -> int | None:
    """How many points this machine holds at once, by the most memory that one took; None where none is done yet."""
    import torch
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT
    from psutil import virtual_memory

    if torch.accelerator.is_available():
        return 1
    peaks = [s["peak_bytes"] for s in map(state_of, folders) if s["state"] == "done"]
    if not peaks:
        return None
    free = _SHARE * min(virtual_memory().available, MEMORY_LIMIT)
    return max(1, min(CPU_COUNT, int(free // (max(peaks) + _WORKER))))


def _left(folders: list[Path]) -> list[Path]:
    return [folder for folder in folders if state_of(folder)["state"] not in ENDED]


def _forget(folder: Path) -> None:
    """Have a failed point wait again, and keep what is known of the failure."""
    if state_of(folder)["state"] == "failed":
        with held(folder):
            number = sum(1 for _ in folder.glob("failed-*.json")) + 1
            (folder / STATE).rename(folder / f"failed-{number}.json")


def _through(client: Any, folders: list[Path], left: list[Path]) -> Work[None]:
    """Have a client's workers run what is left of some points."""
    version = ildlab.__version__
    tasks = {client.submit(run_point, str(f), version, key=f"{f.name}-{uuid4().hex}", pure=False): f for f in left}
    table = _live_table()
    try:
        while tasks:
            for future in [each for each in tasks if each.done()]:
                _settle(future, tasks.pop(future))
            now = states(folders)
            table(now)
            yield Progress(int(now["state"].isin(ENDED).sum()), len(folders), _words(now), now)
            time.sleep(0.3 if tasks else 0)
    finally:  # on a cluster what is running goes on to its end, and is found done
        client.cancel(list(tasks))


def _settle(future: Any, folder: Path) -> None:
    """Take note of how a task ended; GridError where that says something of the workers, not of the point."""
    from distributed import KilledWorker

    if future.status == "finished":
        return
    error = future.exception() if future.status == "error" else None
    if error is None:
        raise GridError(f"The scheduler gave {folder.name} up ({future.status}): call again to go on.")
    if not isinstance(error, KilledWorker):
        raise GridError(f"A worker could not run {folder.name}: {type(error).__name__}: {error} {NEEDS}") from error
    with held(folder):
        if (known := state_of(folder))["state"] not in ENDED:
            why = f"KilledWorker: {first_line(error)} Too little memory is the first thing to look for."
            write_state(folder, known | {"state": "failed", "error": why, "traceback": str(error), "seconds": None})


def _words(now: pd.DataFrame) -> str:
    """What a line says of a grid: how many are in which state, and the point that runs longest."""
    counts = ", ".join(f"{count} {state}" for state, count in now["state"].value_counts().items())
    running = now[now["state"] == "running"].sort_values("seconds", ascending=False)
    return counts + "".join(f": {at} {row['seconds']:.0f} s" for at, row in running[:1].iterrows())


def _live_table() -> Callable[[pd.DataFrame], None]:
    """In a notebook, a table of points below the cell that stays true; elsewhere the bar's line says it all."""
    if not in_notebook():
        return lambda now: None
    from IPython.display import HTML, display

    shown = display(HTML(""), display_id=True)
    return lambda now: shown.update(HTML(now.round(1).to_html(na_rep="", border=0)))
