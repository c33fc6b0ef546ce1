"""The comparison of methods through papermill, with sizes of a few seconds."""

from __future__ import annotations

from pathlib import Path

import nbformat

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "batch" / "compare_methods.ipynb"


def test_papermill_runs_it_and_goes_on_with_it(tiny_folder, text_file, tmp_path):
    import papermill

    parameters = {
        "model": str(tiny_folder),
        "text": str(text_file),
        "suite": "mini7@1",
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
    for name in ("a", "b"):
        papermill.execute_notebook(NOTEBOOK, tmp_path / f"{name}.ipynb", parameters, progress_bar=False)
    outputs = [
        [
            o
            for c in nbformat.read(tmp_path / f"{name}.ipynb", 4).cells
            if c.cell_type == "code"
            for o in c.outputs
        ]
        for name in ("a", "b")
    ]
    text = ["".join(o.get("text", "") for o in out) for out in outputs]
    assert "evaluating at 1 removed" in text[0]
    assert "evaluating" not in text[1]  # the second time everything was there
    html = "".join(o.data.get("text/html", "") for o in outputs[0] if "data" in o)
    assert html.count('alt="') == 3
