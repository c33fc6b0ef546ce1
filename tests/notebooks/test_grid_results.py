"""`05_grid_results.ipynb` on a finished grid of a tiny model; as committed, it makes one of SmolLM2 (minutes)."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

from ildlab.grid import run_grid

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def test_it_reads_a_finished_grid(tiny_folder, short_text, small_settings, tmp_path):
    small = {name: small_settings[name] for name in ("block", "calibration_tokens", "train_tokens", "eval_tokens")}
    small |= {"metric": "block_influence", "model": tiny_folder, "text": short_text, "target_layers": 5}
    grid = [small | {"distill_each": [False, True]}, small | {"metric": "blok_influence", "distill_each": False}]
    table = run_grid(NOTEBOOKS / "batch" / "iterate.ipynb", grid, tmp_path / "mine", show=False)
    assert sorted(table["state"]) == ["done", "done", "failed"]
    notebook = nbformat.read(NOTEBOOKS / "05_grid_results.ipynb", 4)
    before = notebook.cells[1].source
    notebook.cells[1].source = before.replace("runs/small-grid", "mine")  # any other name is read as it is
    assert notebook.cells[1].source != before
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    text = "".join(o.get("text", "") for o in outputs)
    assert "There is no metric 'blok_influence'" in text
    assert "mine/index.html" in text and (tmp_path / "mine" / "index.html").is_file()
    assert text.count("report.html") == 2 == len(list((tmp_path / "mine").rglob("report.html")))
    html = "".join(o.data.get("text/html", "") for o in outputs if "data" in o)
    assert html.count('alt="') == 2
