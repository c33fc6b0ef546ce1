"""The batch notebook through papermill, and the state in which notebooks are committed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
BATCH = ROOT / "notebooks" / "batch"
COMMITTED = sorted([*ROOT.glob("notebooks/*.ipynb"), *BATCH.glob("*.ipynb")])


@pytest.fixture
def parameters(tiny_folder, text_file, tmp_path):
    return {
        "model": str(tiny_folder),
        "text": str(text_file),
        "target_layers": 5,
        "block": 32,
        "calibration_tokens": 256,
        "train_tokens": 512,
        "eval_tokens": 256,
        "positions": 8,
        "run_folder": str(tmp_path / "run"),
    }


def text_of(notebook) -> str:
    return "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)


def test_the_demo_and_papermill_that_goes_on_with_its_run(parameters, tmp_path):
    import papermill

    from tools.demo import run_folder

    folder = tmp_path / "demo"
    parameters["run_folder"] = str(folder)
    arguments = [f"{k}={v}" for k, v in parameters.items()]
    out = subprocess.run([sys.executable, ROOT / "tools" / "demo.py", *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stdout + out.stderr
    for name in ("report.html", "report.ipynb", "journal.jsonl", "checkpoint-5-layers"):
        assert (folder / name).exists() and str(folder / name) in out.stdout
    assert "6 layers: measure" in out.stdout  # live progress
    assert "<img" in (folder / "report.html").read_text()
    first = nbformat.read(folder / "report.ipynb", 4)
    assert "5 layers" in text_of(first)
    html = [o.data["text/html"] for c in first.cells if c.cell_type == "code" for o in c.outputs if "data" in o
            and "text/html" in o.data]
    assert sum('alt="' in page for page in html) == 5
    assert (folder / "checkpoint-5-layers" / "model.safetensors").is_file()
    # The same folder again, one layer further: nothing that was done is done twice.
    papermill.execute_notebook(
        BATCH / "iterate.ipynb", tmp_path / "b.ipynb", {**parameters, "target_layers": 4}, progress_bar=False
    )
    steps = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert [s["args"]["layer_id"] for s in steps if s["action"] == "remove"].__len__() == 2
    assert sum(s["action"] == "measure" for s in steps) == 2
    assert (folder / "checkpoint-4-layers").is_dir()
    # The next demo takes a new folder; one that was stopped half-way would be gone on with.
    (tmp_path / "x-1").mkdir()
    assert run_folder(tmp_path / "x") == tmp_path / "x-1"
    (tmp_path / "x-1" / "report.html").touch()
    assert run_folder(tmp_path / "x") == tmp_path / "x-2"


def test_a_run_whose_first_removal_costs_too_much_still_reports(parameters, tmp_path):
    import papermill

    metric = {"metric": "angular_distance", "max_loss": 1e-4, "text": parameters["text"]}
    papermill.execute_notebook(
        BATCH / "iterate.ipynb", tmp_path / "a.ipynb", {**parameters, **metric}, progress_bar=False
    )
    notebook = nbformat.read(tmp_path / "a.ipynb", 4)
    assert "No layer was removed" in text_of(notebook)
    assert (tmp_path / "run" / "checkpoint-6-layers" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "preset, notebook",
    [
        ("demo", "iterate"),
        ("six_layers", "iterate"),
        ("eight_layers", "iterate"),
        ("paper", "iterate"),
        ("qwen2.5-3b", "compare_methods"),
    ],
)
def test_presets_set_parameters_that_exist(preset, notebook):
    import papermill
    import yaml

    from ildlab.distill.config import DistillConfig
    from ildlab.evaluate import load_suite
    from ildlab.session.config import SessionConfig
    from ildlab.session.loop import RunSettings

    values = yaml.safe_load((BATCH / "presets" / f"{preset}.yaml").read_text())
    assert values.keys() <= papermill.inspect_notebook(BATCH / f"{notebook}.ipynb").keys()
    DistillConfig.from_dict({**values.get("distill", {}), **values.get("final", {})})
    if notebook == "iterate":
        known = SessionConfig.__dataclass_fields__.keys() & values.keys()
        SessionConfig.of("smollm2-135m", {name: values[name] for name in known})
        stops = RunSettings.__dataclass_fields__.keys() & values.keys() - {"distill"}  # there, whether it does
        RunSettings(**{name: values[name] for name in stops})
    by_task = values.get("ablation") == "task"
    if by_task and not load_suite(values.get("ablation_suite") or values["suite"]).swept:
        assert values["race"] is False  # what is evaluated as a whole cannot stop early


@pytest.mark.parametrize("arguments", [["preset=demos"], ["target_layers"]])
def test_demo_refuses_what_it_does_not_know(arguments):
    from tools.demo import main
    from ildlab.errors import IldlabError

    with pytest.raises(IldlabError, match="demo"):
        main(arguments)


def test_parameters_explain_themselves():
    command = [sys.executable, "-m", "papermill", "--help-notebook", str(BATCH / "iterate.ipynb")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for words in ("target_layers: int", "stop at this many layers", "max_loss: float", "run_folder: str"):
        assert words in out


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_notebooks_are_committed_executed(path):
    notebook = nbformat.read(path, 4)
    cells = [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]
    assert all(c.execution_count for c in cells), "a cell was never run"
    assert any(c.outputs for c in cells)
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    assert "widgets" not in notebook.metadata
    raw = path.read_text()
    assert len(raw) < 1_000_000
    for place in ("/root/", "/tmp/", "/home/"):
        assert place not in raw, f"holds a path of one machine: {place}"
