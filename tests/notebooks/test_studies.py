"""The studies through papermill, with tiny parameters on a tiny model."""

from __future__ import annotations

from pathlib import Path

import papermill
import pytest

BATCH = Path(__file__).resolve().parents[2] / "notebooks" / "batch"
SMALL = {"block": 32, "dtype": "float32", "positions": 8}
STUDIES = {
    "baseline": {"remove": [1, 4], "suite": "mini7@2", "calibration_tokens": 128, "eval_tokens": 64},
    "dataset_sensitivity": {"suite": "mini7@1", "tokens": 128, "first": 3},
}


def run(name, tmp_path, tiny_folder, text_file, **other):
    own = {"texts": [str(text_file), "python-docs"]} if name == "dataset_sensitivity" else {"text": str(text_file)}
    given = {"model": str(tiny_folder), **SMALL, **STUDIES[name], **own, **other}
    made = papermill.execute_notebook(
        str(BATCH / f"{name}.ipynb"), str(tmp_path / "out.ipynb"), given, cwd=str(tmp_path), progress_bar=False
    )
    outputs = [o for cell in made.cells if cell.cell_type == "code" for o in cell.outputs]
    data = [o.get("data", {}) for o in outputs]
    said = "\n".join(str(o.get("text", "")) for o in outputs) + "\n".join(str(d.get("text/plain", "")) for d in data)
    return said, [str(d.get("text/html", "")) for d in data]


def test_the_baseline_removes_at_once_and_looks_for_collapse(tmp_path, tiny_folder, text_file):
    said, pages = run("baseline", tmp_path, tiny_folder, text_file)
    assert "least important: [" in said and sum("alt=" in page for page in pages) == 1
    table = next(page for page in pages if "quality lost" in page)
    assert "<td>5</td>" in table and "<td>2</td>" in table  # of six layers
    assert ("at 4 removed: the aggregate is" in said) != ("not seen: the aggregate is" in said)


def test_sensitivity_compares_every_two_kinds(tmp_path, tiny_folder, text_file):
    said, pages = run("dataset_sensitivity", tmp_path, tiny_folder, text_file)
    assert "KL on 2 kinds of text" in said and "different layers would go first on 3 kinds" in said
    assert "least alike: " in said and "among the first 3 of all kinds: " in said
    pairs = next(page for page in pages if "spearman" in page)
    assert pairs.count("<tr>") == 3 and "of the first 3" in pairs
    assert sum("alt=" in page for page in pages) == 1


@pytest.mark.parametrize("name", STUDIES)
def test_parameters_explain_themselves(name):
    inspected = papermill.inspect_notebook(str(BATCH / f"{name}.ipynb"))
    assert {"model", "dtype", "block"} <= set(inspected) and all(each["help"] for each in inspected.values())


@pytest.mark.parametrize("name, bad, said", [
    ("baseline", {"remove": [6]}, "give numbers from 1 to 5"),
    ("dataset_sensitivity", {"first": 7}, "1 to 6 layers"),
])
def test_bad_parameters_are_refused_in_words(tmp_path, tiny_folder, text_file, name, bad, said):
    with pytest.raises(papermill.PapermillExecutionError, match=said):
        run(name, tmp_path, tiny_folder, text_file, **bad)
