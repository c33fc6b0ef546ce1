"""The studies through papermill, with tiny parameters on a tiny model."""

from __future__ import annotations

import re

import papermill
import pytest
import yaml

from ildlab.distill.config import DistillConfig
from ildlab.errors import IldlabError
from ildlab.session.config import SessionConfig
from ildlab.session.scaling import ModelShape
from tools.demo import read_as

from .cells import BATCH, run_cells

SMALL = {"block": 32, "dtype": "float32", "positions": 8}
STUDIES = {
    "baseline": {"remove": [1, 4], "suite": "mini7@2", "calibration_tokens": 128, "eval_tokens": 64},
    "dataset_sensitivity": {"suite": "mini7@1", "tokens": 128, "first": 3},
    "architectures": {"student_removes": 1, "local_tokens": 128, "student_tokens": 128, "tokens": 128, "share": 0.34},
    "scaling": {"check_tokens": 128, "check_block": 32, "tokens": 1024, "train_tokens": 1024},
}


def parameters(name, tiny_folder, text_file, **other):
    own = {
        "dataset_sensitivity": {"model": str(tiny_folder), "texts": [str(text_file), "python-docs"], **SMALL},
        "architectures": {"models": [str(tiny_folder)] * 2, "text": str(text_file), **SMALL},
        "scaling": {"model": str(tiny_folder), "text": str(text_file), "dtype": "float32"},
    }.get(name, {"model": str(tiny_folder), "text": str(text_file), **SMALL})
    return own | STUDIES[name] | other


def run(name, tmp_path, tiny_folder, text_file, **other):
    given = parameters(name, tiny_folder, text_file, **other)
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
    assert re.search(r"aggregate, corrected: -?0\.", said)
    assert said.count("seen at 4 removed") + said.count("not seen") == 2


def test_sensitivity_compares_every_two_kinds(tmp_path, tiny_folder, text_file):
    said, pages = run("dataset_sensitivity", tmp_path, tiny_folder, text_file)
    assert "KL on 2 kinds of text" in said and "different layers would go first on 3 kinds" in said
    assert "least alike: " in said and "among the first 3 of all kinds: " in said
    pairs = next(page for page in pages if "spearman" in page)
    assert pairs.count("<tr>") == 3 and "of the first 3" in pairs
    assert sum("alt=" in page for page in pages) == 1


def test_architectures_lays_every_model_over_relative_depth(tmp_path, tiny_folder, text_file):
    said, pages = run("architectures", tmp_path, tiny_folder, text_file)
    assert "KL to the teacher" in said and sum("alt=" in page for page in pages) == 2
    table = next(page for page in pages if "in the middle" in page)
    for words in ("Qwen2.5-3B, published", "21, 22, 19", f"{tiny_folder.name}, distilled", str(tiny_folder), "of 2"):
        assert words in table
    assert table.count("<tr>") == 8  # a head of two rows; one published, three by each metric but the head's own


def test_scaling_counts_what_happens_before_it_reckons(tmp_path, tiny_folder, text_file):
    said, pages = run("scaling", tmp_path, tiny_folder, text_file, tokens_per_second={"Llama-2-70B": 100.0})
    checked = next(page for page in pages if "layer calls predicted" in page)
    cells = [float(cell) for cell in re.findall(r"<td>([\d.]+)</td>", checked)]
    assert len(cells) == 20 and all(cells[k] == cells[k + 1] and cells[k + 2] == cells[k + 3] for k in range(0, 20, 5))
    assert any("separate runs" in page for page in pages) and sum("alt=" in page for page in pages) == 1


@pytest.mark.parametrize("name", STUDIES)
def test_parameters_explain_themselves(name):
    inspected = papermill.inspect_notebook(str(BATCH / f"{name}.ipynb"))
    assert {"dtype", "device"} <= set(inspected) and all(each["help"] for each in inspected.values())


@pytest.mark.parametrize(
    "name, bad, said",
    [
        ("baseline", {"remove": [6]}, "give numbers from 1 to 5"),
        ("dataset_sensitivity", {"first": 7}, "1 to 6 layers"),
        ("architectures", {"student_removes": 6}, "give a number from 0 to 5"),
        ("architectures", {"models": ["nowhere.gguf"]}, "There is no file nowhere.gguf"),
        ("scaling", {"remove": 1.5}, "a part of the layers, between 0 and 1"),
        ("scaling", {"tokens_per_second": {"GPT-5": 1.0}}, "there is no shape called .'GPT-5'"),
    ],
)
def test_bad_parameters_are_refused_in_words(tmp_path, tiny_folder, text_file, name, bad, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, IldlabError), match=said):
        run_cells(name, parameters(name, tiny_folder, text_file, **bad))


LOSSES_AND_PASSES = ("ablate_losses", "loss_scale", "single_pass_vs_iterative", "cost_benefit")
PRESETS = sorted((BATCH / "presets").glob("*/*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_preset_sets_parameters_of_its_notebook(path):
    known = papermill.inspect_notebook(str(BATCH / f"{path.parent.name}.ipynb"))
    values = read_as(known, yaml.safe_load(path.read_text()))  # refuses a name or a value that the notebook would
    if "distill" in values:
        DistillConfig.from_dict(values["distill"])
    if path.parent.name == "iterate":
        SessionConfig.of("smollm2-135m", {k: v for k, v in values.items() if k in SessionConfig.__dataclass_fields__})
    if "shapes" in values:
        (shape,) = (ModelShape.gated(**each) for each in values["shapes"].values())
        assert round(shape.weights / 1e9, 1) == {"qwen2.5-3b": 3.1, "llama-2-7b": 6.7, "mistral-7b": 7.2}[path.stem]


@pytest.mark.parametrize("name", [*STUDIES, *LOSSES_AND_PASSES, "iterate"])
def test_every_study_has_a_preset_for_the_paper_s_model_and_two_more(name):
    there = {path.stem for path in PRESETS if path.parent.name == name}
    assert {"qwen2.5-3b", "llama-2-7b", "mistral-7b"} <= there
