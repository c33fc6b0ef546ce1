"""Execute notebooks in place as they are committed: real outputs, no widget state, no run left over.

`python tools/execute_notebooks.py notebooks/01_step_through_pruning.ipynb ...`
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path) -> None:
    """Run a notebook in an empty folder, strip what belongs to one machine or session, write it back."""
    notebook = nbformat.read(path, 4)
    with tempfile.TemporaryDirectory() as scratch:
        NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": scratch}}).execute()
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            # A live widget cannot be shown again: its static form stands beside it.
            cell.outputs = [o for o in cell.outputs if not is_only_widget(o)]
    nbformat.write(notebook, path)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def is_only_widget(output) -> bool:
    """Tell whether an output is a widget with nothing but its plain text beside it."""
    kinds = set(output.get("data", {}))
    return "application/vnd.jupyter.widget-view+json" in kinds and kinds <= {
        "application/vnd.jupyter.widget-view+json",
        "text/plain",
    }


if __name__ == "__main__":
    for name in sys.argv[1:]:
        execute(Path(name))
