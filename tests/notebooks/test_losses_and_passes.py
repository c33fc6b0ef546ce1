"""The notebooks on losses and on passes over the layers, under papermill, with tiny parameters on a tiny model."""

from __future__ import annotations

import re

import papermill
import pytest

from ildlab.errors import IldlabError

from .cells import BATCH, run_cells

NAMES = ["ablate_losses", "single_pass_vs_iterative", "cost_benefit", "loss_scale"]
RUN = {"suite": "mini7@2", "calibration_tokens": 256, "tokens": 128, "local_tokens": 256, "positions": 8}


@pytest.fixture
def tiny_parameters(tiny_folder, text_file):
    return {"model": str(tiny_folder), "text": str(text_file), "block": 32, "eval_tokens": 128, "dtype": "float32"}


@pytest.fixture
def run(tmp_path, tiny_parameters):
    """Run a notebook by its name with tiny parameters, and return what it printed and how many figures it drew."""

    def executed(name: str, **parameters):
        made = papermill.execute_notebook(
            str(BATCH / f"{name}.ipynb"),
            str(tmp_path / "out.ipynb"),
            tiny_parameters | parameters,
            cwd=str(tmp_path),
            progress_bar=False,
        )
        outputs = [o for cell in made.cells if cell.cell_type == "code" for o in cell.outputs]
        text = "\n".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs)
        return text, sum("alt=" in o.get("data", {}).get("text/html", "") for o in outputs)

    return executed


@pytest.mark.parametrize("name", NAMES)
def test_parameters_explain_themselves(name):
    inspected = papermill.inspect_notebook(str(BATCH / f"{name}.ipynb"))
    assert {"model", "text", "device", "dtype"} <= set(inspected)
    assert all(each["help"] and each["inferred_type_name"] != "None" for each in inspected.values()), inspected


def test_every_loss_runs_for_every_seed(run):
    text, figures = run("ablate_losses", removed=[2], tokens=256, seeds=[3, 4], learning_rate=1e-3)
    before = float(re.search(r"without distillation: KL ([\d.]+)", text)[1])
    assert before > 0
    rows = re.findall(r"^\d +(KL only|hidden states only|both|the paper's) +([34]) ", text, re.MULTILINE)
    assert len(rows) == len(set(rows)) == 8  # four losses, two seeds
    assert len(re.findall(r"-?[\d.]+ \[-?[\d.]+, -?[\d.]+\]", text)) >= 7  # the intervals, and those of differences
    assert figures == 2


def test_students_at_once_and_one_by_one_get_the_same_tokens(run):
    text, figures = run("single_pass_vs_iterative", remove=2, **RUN)
    assert re.findall(r"(at once|one by one)[a-z ,]*? +\[\d, \d\]", text).__len__() == 4
    assert "distilled at the end" in text and re.search(r"never distilled +[-+][\d.]+% \[", text)
    assert figures == 1


def test_costs_stand_beside_quality(run):
    text, figures = run("cost_benefit", remove=2, **RUN)
    for way in ("single pass", "every second step", "every step", "every step, raced"):
        assert re.search(rf"^{way} +\[\d, \d\]", text, re.MULTILINE), way
    assert figures == 1


def test_factors_of_the_kl_go_from_the_mse_alone_to_the_kl_alone(run):
    text, figures = run("loss_scale", removed=[[2], [2, 3]], factors=[1e-6, 1e-2, 1e6], tokens=128, learning_rate=1e-3)
    rows = re.findall(r"^\d+ +([12]) +(the paper's sum|per token) +\S+ +([\d.]+) ", text, re.MULTILINE)
    assert len(rows) == 12
    assert [float(share) for _, _, share in rows[::3]] == pytest.approx([0] * 4, abs=0.05)
    assert [float(share) for _, _, share in rows[2::3]] == pytest.approx([1] * 4, abs=0.05)
    assert "best factor" in text and figures == 1


@pytest.mark.parametrize(
    "name, wrong, words",
    [("ablate_losses", {"removed": [99]}, "99"), ("ablate_losses", {"seeds": []}, r"seeds=\[\].*: give at least one")],
)
def test_a_wrong_parameter_is_refused_in_words(name, wrong, words, tiny_parameters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, IldlabError), match=words):
        run_cells(name, tiny_parameters | wrong)
