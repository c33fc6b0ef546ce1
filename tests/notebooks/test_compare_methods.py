"""The comparison of methods through papermill, with sizes of a few seconds."""

from __future__ import annotations

from pathlib import Path

import nbformat

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "batch" / "compare_methods.ipynb"


def test_papermill_runs_it(tiny_folder, text_file, tmp_path):
    import papermill

    parameters = {
        "model": str(tiny_folder),
        "text": str(text_file),
        "suite": "mini7@2",
        "ablation_suite": "mini7@1",
        "methods": ["iterative_block_influence", "iterative_layerwise_distillation"],
        "remove": 1,
        "evaluate_every": 1,
        "block": 32,
        "calibration_tokens": 256,
        "train_tokens": 256,
        "eval_tokens": 256,
        "positions": 8,
        "run_folder": str(tmp_path / "run"),
    }
    papermill.execute_notebook(NOTEBOOK, tmp_path / "a.ipynb", parameters, progress_bar=False)
    cells = nbformat.read(tmp_path / "a.ipynb", 4).cells
    outputs = [o for c in cells if c.cell_type == "code" for o in c.outputs]
    assert "evaluating at 1 removed" in "".join(o.get("text", "") for o in outputs)
    html = "".join(o.data.get("text/html", "") for o in outputs if "data" in o)
    assert html.count('alt="') == 3
