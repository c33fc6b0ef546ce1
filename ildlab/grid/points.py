"""What a grid is of: parameters read as their types, points, and a folder for each; what is wrong is refused before that."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ildlab.errors import GridError, ParameterError
from ildlab.files import whole_path, write_atomic
from ildlab.grid.work import NOTEBOOK, PARAMETERS, RUN, state_of
from ildlab.session.places import whole
from ildlab.typed import read_parameters

Values = Mapping[str, Any]  # a parameter: its values, or the one that all points have


def read_as(known: dict[str, dict], given: dict[str, Any]) -> dict[str, Any]:
    """Parameters as their types in the notebook, which `inspect_notebook` tells; ParameterError where there is none such.

    papermill only warns of those that it does not know, and runs without them.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ParameterError(f"There is no parameter {', '.join(map(repr, unknown))}. There are: {', '.join(known)}.")
    types = {name: known[name]["inferred_type_name"] for name in given}
    read = {"__annotations__": {n: t for n, t in types.items() if t != "None"}, **given}
    if read["__annotations__"]:
        read_parameters(read)
    return {name: read[name] for name in given}


@dataclass(frozen=True)
class Plan:
    """A notebook, and the parameters of each of its points by the name of the point's folder."""

    notebook: str  # its text
    points: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, notebook: str | os.PathLike, grid: Values | Iterable[Values]) -> Plan:
        """Read a grid: all combinations of its values, or those of each mapping in a list.

        Raises
        ------
        GridError, ParameterError
            There is no such notebook, it has no parameters, or the grid is none of it.
        """
        path = whole_path(notebook)
        known = _parameters(path)
        points: dict[str, dict[str, Any]] = {}
        for each in [grid] if isinstance(grid, (Mapping, str)) or not isinstance(grid, Iterable) else grid:
            if not isinstance(each, Mapping):
                raise GridError(
                    f"{each!r} is no grid: give a mapping such as {{'metric': ['kl', 'nll'], 'seed': [0, 1]}}."
                )
            if RUN in each:
                raise GridError(f"{RUN} is not for a grid to give: each point has a run folder of its own.")
            sides = {name: _values(name, values) for name, values in each.items()}
            for values in product(*sides.values()):
                found = read_as(known, dict(zip(sides, map(_placed, values))))
                point = {name: found[name] for name in known if name in found}
                if (name := _name(point)) in points:
                    raise GridError(f"The grid has {point} twice: leave one out.")
                points[name] = point
        if not points:
            raise GridError("The grid has no points: give each parameter one value at least.")
        return cls(path.read_text(encoding="utf-8"), points)

    def lay_out(self, out: str | os.PathLike) -> list[Path]:
        """Write notebook and parameters into a grid's folder, which may get more points, and return the points' folders.

        Raises
        ------
        GridError, FileError
            The folder holds something else, or points that another notebook did.
        """
        out = whole_path(out)
        kept = out / NOTEBOOK
        if "{" in str(out):
            raise GridError(f"{out}: papermill reads braces in a path as parameters. Choose another folder.")
        if not kept.is_file() and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise GridError(f"{out} holds no grid, and is not an empty folder: choose a new one.")
        if not kept.is_file() or _code(kept.read_text(encoding="utf-8")) != _code(self.notebook):
            for folder in (file.parent for file in out.glob(f"*/{PARAMETERS}")):
                if state_of(folder)["state"] in ("running", "done"):
                    raise GridError(f"{folder} was begun with another notebook: take {kept}, or another folder.")
            write_atomic(kept, self.notebook)
        for name, point in self.points.items():
            write_atomic(out / name / PARAMETERS, json.dumps(point, indent=2) + "\n")
        return [out / name for name in self.points]


def _parameters(path: Path) -> dict[str, dict]:
    """The parameters of a notebook, as papermill tells them."""
    import papermill

    try:
        cells = json.loads(path.read_bytes())["cells"]
        tagged = any("parameters" in cell["metadata"].get("tags", []) for cell in cells)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise GridError(f"{path} is no notebook: {type(error).__name__}: {error}.") from error
    if not (known := papermill.inspect_notebook(path) if tagged else {}):
        raise GridError(f"{path} has no parameters: tag a cell that sets them with `parameters`.")
    return known


def _values(name: str, values: Any) -> list[Any]:
    """The values that a parameter takes; a text, a number, a mapping or nothing is one of them."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        return [values]
    if not (values := list(values)):
        raise GridError(f"{name} has no values: give one at least, or leave it out.")
    return values


def _placed(value: Any) -> Any:
    """A file where the driver stands by its whole path, since a point stands in its own folder; all else as it is."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    return whole(value) if isinstance(value, str) and re.search(r"[/.]", value) else value


def _name(point: dict[str, Any]) -> str:
    """A folder's name: what a person reads first, and a hash of all."""
    try:
        told = json.dumps(point, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GridError(f"{point}: a point's parameters must be what JSON holds ({error}).") from error
    words = "_".join(f"{name}-{os.path.basename(str(value))}" for name, value in point.items())
    slug = re.sub(r"[^A-Za-z0-9.-]+", "_", words).strip("._-")[:80]
    return f"{slug}_{hashlib.sha256(told.encode()).hexdigest()[:10]}"


def _code(notebook: str) -> list[str]:
    """What a notebook does: its cells of code."""
    return ["".join(c["source"]) for c in json.loads(notebook)["cells"] if c["cell_type"] == "code"]
