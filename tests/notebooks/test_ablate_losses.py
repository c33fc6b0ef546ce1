"""`ablate_losses.ipynb` under papermill, with tiny parameters on a tiny model."""

from __future__ import annotations

import math
import re
from pathlib import Path

import papermill
import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "batch" / "ablate_losses.ipynb"


def test_papermill_runs_every_loss_for_every_seed(tmp_path, tiny_folder, text_file):
    parameters = {
        "model": str(tiny_folder), "text": str(text_file), "removed": [2], "tokens": 256, "eval_tokens": 128,
        "block": 32, "seeds": [3, 4], "dtype": "float32", "learning_rate": 1e-3,
    }
    made = papermill.execute_notebook(
        str(NOTEBOOK), str(tmp_path / "out.ipynb"), parameters=parameters, cwd=str(tmp_path), progress_bar=False
    )
    text = "\n".join(
        str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        for cell in made.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    before = float(text.split("without distillation: KL ")[1].split(",")[0])
    assert math.isfinite(before) and before > 0
    rows = re.findall(r"^\d +(KL only|hidden only|both) +([34]) ", text, re.MULTILINE)
    assert len(rows) == len(set(rows)) == 6  # three losses, two seeds
    images = [o for c in made.cells if c.cell_type == "code" for o in c.outputs if "alt=" in str(o.get("data", ""))]
    assert len(images) == 2


def test_its_parameters_explain_themselves():
    inspected = papermill.inspect_notebook(str(NOTEBOOK))
    assert {"model", "removed", "seeds", "learning_rate"} <= set(inspected)
    assert all(each["help"] for each in inspected.values()), inspected


@pytest.mark.parametrize("removed", [[99]])
def test_a_layer_that_is_not_there_is_refused(tmp_path, tiny_folder, text_file, removed):
    parameters = {"model": str(tiny_folder), "text": str(text_file), "removed": removed, "block": 32}
    with pytest.raises(papermill.PapermillExecutionError, match="99"):
        papermill.execute_notebook(
            str(NOTEBOOK), str(tmp_path / "out.ipynb"), parameters=parameters, cwd=str(tmp_path), progress_bar=False
        )
