"""The batch notebook through papermill, and the state in which notebooks are committed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from ildlab.errors import IldlabError

from .cells import BATCH, run_cells

ROOT = Path(__file__).resolve().parents[2]
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
    parameters |= {"run_folder": str(folder), "suite": "mini7@2"}
    arguments = [f"{k}={v}" for k, v in parameters.items()]
    out = subprocess.run(
        [sys.executable, ROOT / "tools" / "demo.py", *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert out.returncode == 0 and "IPKernelApp" not in out.stderr, out.stdout + out.stderr
    for name in ("report.html", "report.ipynb", "journal.jsonl", "checkpoint-5-layers"):
        assert (folder / name).exists() and str(folder / name) in out.stdout
    assert "6 layers: measure" in out.stdout  # live progress
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert settings["text"] == parameters["text"] and settings["train_text"] is None  # not the preset's
    assert "<img" in (folder / "report.html").read_text()
    first = nbformat.read(folder / "report.ipynb", 4)
    assert "5 layers" in text_of(first)
    html = [
        o.data["text/html"]
        for c in first.cells
        if c.cell_type == "code"
        for o in c.outputs
        if "data" in o and "text/html" in o.data
    ]
    assert sum('alt="' in page for page in html) == 5
    assert (folder / "checkpoint-5-layers" / "model.safetensors").is_file()
    # The same folder again, one layer further: nothing that was done is done twice.
    further = parameters | {"target_layers": 4}
    papermill.execute_notebook(BATCH / "iterate.ipynb", tmp_path / "b.ipynb", further, progress_bar=False)
    steps = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert [s["args"]["layer_id"] for s in steps if s["action"] == "remove"].__len__() == 2
    assert sum(s["action"] == "measure" for s in steps) == 2
    assert (folder / "checkpoint-4-layers").is_dir()
    # The next demo takes a new folder; one that was stopped half-way would be gone on with.
    (tmp_path / "x-1").mkdir()
    assert run_folder(tmp_path / "x") == tmp_path / "x-1"
    (tmp_path / "x-1" / "report.html").touch()
    assert run_folder(tmp_path / "x") == tmp_path / "x-2"


def test_the_bundled_model_loses_a_layer(tmp_path):
    import papermill

    small = {
        "target_layers": 29,
        "metric": "block_influence",
    }  # the rest as it stands: its texts and sizes fit each other
    papermill.execute_notebook(
        BATCH / "iterate.ipynb",
        tmp_path / "a.ipynb",
        small | {"run_folder": str(tmp_path / "run")},
        progress_bar=False,
    )
    told = text_of(nbformat.read(tmp_path / "a.ipynb", 4))
    assert "30 layers: removed layer" in told and "did harm" not in told and "logits equal" in told
    assert (tmp_path / "run" / "checkpoint-29-layers" / "model.safetensors").is_file()


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


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["preset=demos"], "There is no preset 'demos'; there are: demo"),
        (["target_layers"], "'target_layers': give parameters as name=value"),
        (["target_layer=20"], "There is no parameter 'target_layer'. There are: model, text"),
        (["preset=qwen2.5-3b"], "There is no parameter 'ablation', 'ablation_suite', 'evaluate_every', 'remove'"),
        (["race=perhaps"], "race='perhaps': it must be True or False"),
        (["block=32.5"], "block='32.5': it must be a whole number"),
        (["final=[1]"], r"final='\[1\]': it must be a mapping"),
    ],
)
def test_demo_refuses_what_it_does_not_know(arguments, words, tmp_path, monkeypatch):
    from ildlab.errors import IldlabError
    from tools.demo import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(IldlabError, match=words):
        main(arguments)
    assert not any(tmp_path.iterdir())


def test_the_demo_reads_each_parameter_as_the_notebook_does():
    import papermill

    from tools.demo import read_as

    known = papermill.inspect_notebook(BATCH / "iterate.ipynb")
    given = {"race": "false", "positions": "none", "block": "32.0", "final": "{tokens: 128}", "run_folder": "20240501"}
    assert read_as(known, given) == {
        "race": False,
        "positions": None,
        "block": 32,
        "final": {"tokens": 128},
        "run_folder": "20240501",
    }


MEANT = {
    "iterate": {
        "race": ("false", False),
        "distill_each": ("no", False),
        "suite_each": (0, False),
        "block": (32.0, 32),
        "target_layers": ("4", 4),
        "max_loss": ("None", None),
        "distill": ('{"tokens": 128}', {"tokens": 128}),
        "final": (None, {}),
        "run_folder": (20240501, "20240501"),
        "seed": ("7", 7),
        "suite": ("", None),
    },
    "compare_methods": {
        "methods": ('["shortgpt"]', ["shortgpt"]),
        "positions": ("0", 0),
        "ablation_suite": ("", None),
    },
    "ablate_losses": {"removed": ("[1, 2]", [1, 2]), "seeds": (["3"], [3]), "learning_rate": ("1e-3", 1e-3)},
}


@pytest.mark.parametrize("name", MEANT)
def test_parameters_are_read_as_their_types_in_a_kernel(name, tmp_path):
    """After papermill's own cell, which puts in what a command line says."""
    import papermill

    notebook = nbformat.read(BATCH / f"{name}.ipynb", 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "\nread_parameters(globals())" in code[1].source  # before anything is made of them
    code[1].source = "from ildlab import read_parameters\n\nread_parameters(globals())\n"
    code[1].source += f"print([{', '.join(MEANT[name])}])"
    notebook.cells = code[:2]
    nbformat.write(notebook, tmp_path / "in.ipynb")
    given = {key: value for key, (value, _) in MEANT[name].items()}
    made = papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", given, progress_bar=False)
    assert text_of(made).strip() == str([wanted for _, wanted in MEANT[name].values()])


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"race": "perhaps"}, "race='perhaps': it must be True or False"),
        ({"final": {"tokens": -1}}, "tokens=-1: it must be at least 1"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_is_written(wrong, words, parameters, tmp_path):
    with pytest.raises(IldlabError, match=words):
        run_cells("iterate", parameters | wrong)
    assert not (tmp_path / "run").exists()


def test_a_run_is_gone_on_with_only_as_it_was_begun(parameters, tmp_path):
    from ildlab import PruningSession

    settings = {
        name: parameters[name] for name in ("text", "block", "calibration_tokens", "train_tokens", "eval_tokens")
    }
    PruningSession.create(
        tmp_path / "run", parameters["model"], **settings, metric="nll", measure={"positions": 8}
    ).close()
    kept = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.json*")}
    with pytest.raises(IldlabError, match="metric was 'nll', now 'kl'; .*measure race was False"):
        run_cells("iterate", parameters)
    assert {path: path.read_bytes() for path in kept} == kept


def test_parameters_explain_themselves():
    command = [sys.executable, "-m", "papermill", "--help-notebook", str(BATCH / "iterate.ipynb")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for words in (
        "target_layers: Optional[int]",
        "stop at this many layers",
        "max_loss: Optional[float]",
        "run_folder: str",
    ):
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
