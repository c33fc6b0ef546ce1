"""`python -m ildlab.grid NOTEBOOK GRID.yaml --out FOLDER`: a grid from a shell; called again, it goes on."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from ildlab.errors import GridError, IldlabError
from ildlab.progress import drive, lines


def main(arguments: list[str] | None = None) -> int:
    """Run a grid; 0 where all its points are done, 1 where some failed, 2 where it could not be run."""
    parser = argparse.ArgumentParser(prog="python -m ildlab.grid", description=__doc__.partition("\n")[0])
    parser.add_argument("notebook", type=Path, help="notebook with a cell tagged `parameters`")
    parser.add_argument("grid", type=Path, metavar="GRID.yaml", help="parameter: [values], or a list of such mappings")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a folder for all points")
    parser.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="of a dask cluster; by default processes here")
    parser.add_argument("--workers", type=int, help="processes here; by default as many as memory holds")
    parser.add_argument("--retry", action="store_true", help="run failed points again")
    asked = parser.parse_args(arguments)
    from ildlab.grid.run import run_grid_steps  # here, since each process here imports this file, and needs no torch

    try:
        with _client(asked.scheduler) as client:
            options: dict[str, Any] = {"workers": asked.workers, "retry": asked.retry}
            work = run_grid_steps(asked.notebook, _grid(asked.grid), asked.out, client, **options)
            table = drive(work, desc="grid") if sys.stderr.isatty() else lines(work)
    except IldlabError as error:
        print(error, file=sys.stderr)
        return 2
    print(table.dropna(axis=1, how="all").round(4).to_string())
    return 0 if set(table["state"]) == {"done"} else 1


def _grid(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise GridError(f"{path} cannot be read as YAML: {error}.") from error


def _client(scheduler: str | None) -> Any:
    if scheduler is None:
        return nullcontext()
    from distributed import Client

    try:
        return Client(scheduler, timeout=20)
    except (OSError, ValueError) as error:  # nobody answers; no address
        raise GridError(f"No scheduler at {scheduler}: {error}. Start one with `dask scheduler`.") from error


if __name__ == "__main__":
    sys.exit(main())
