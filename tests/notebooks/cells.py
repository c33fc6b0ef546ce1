"""Cells of a batch notebook in this process: the same code as under papermill, without the start of a kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

BATCH = Path(__file__).resolve().parents[2] / "notebooks" / "batch"


def run_cells(name: str, given: dict[str, Any]) -> None:
    """Run the code cells of a notebook, with papermill's own cell of these parameters, in today's folder."""
    notebook = parameterize_notebook(load_notebook_node(str(BATCH / f"{name}.ipynb")), given)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{name}.ipynb", "exec"), names)
