"""The repository agrees with itself: dependencies, pins, conda, what ships, a light import."""

from __future__ import annotations

import ast
import errno
import importlib
import json
import re
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import ildlab
from ildlab import files
from ildlab.errors import FileError, IldlabError

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def direct_dependencies() -> set[str]:
    listed = [*PYPROJECT["project"]["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]
    names = {name_of(each) for each in listed}
    return names | ({"distributed"} if "dask" in names else set())  # dask[distributed] is a package of its own


def test_every_direct_dependency_is_pinned_and_nothing_else():
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if line)
    assert set(pins) == direct_dependencies()
    assert pins["torch"] == "2.13.0"


def test_environment_yml_equals_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert [each for each in environment["channels"] if each != "nodefaults"] == ["conda-forge"]
    conda = [each for each in environment["dependencies"] if isinstance(each, str)]
    pip = next(each["pip"] for each in environment["dependencies"] if isinstance(each, dict))
    names = {"pytorch": "torch"}
    listed = {re.sub(r"^[\w-]+", lambda m: names.get(m[0], m[0]), each) for each in conda} - {"pip"}
    wanted = {*PYPROJECT["project"]["dependencies"], f"python{PYPROJECT['project']['requires-python']}"}
    assert listed == wanted
    assert len(pip) == 1
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", pip[0])[1].split(",")
    assert set(extras) <= set(EXTRAS)
    makefile = (ROOT / "Makefile").read_text()
    assert extras == re.search(r"^EXTRAS := ([\w,]+)$", makefile, re.M)[1].split(",")


def test_every_import_is_declared():
    declared = direct_dependencies()
    module_of = {"lazy-loader": "lazy_loader", "pyyaml": "yaml", "rouge-score": "rouge_score", "lm-eval": "lm_eval"}
    allowed = {module_of.get(name, name) for name in declared} | {"ildlab", "IPython", *sys.stdlib_module_names}
    # What comes with a declared package as its own public parts.
    allowed |= {"huggingface_hub", "nbformat", "nbclient", "nbconvert", "traitlets", "tokenizers", "ipykernel"}
    allowed |= {"jupyter_client"}
    # Benchmarks measure against rivals where a person has installed them, and borrow the tests' browser.
    benchmarking = {"liger_kernel", "optipfair", "trl", "tests"}
    for file in [*ROOT.glob("ildlab/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        local = {each.stem for each in file.parent.glob("*.py")} if file.parent.name == "benchmarks" else set()
        for node in ast.walk(ast.parse(file.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for module in modules:
                known = allowed | local | (benchmarking if file.parent.name == "benchmarks" else set())
                assert module.partition(".")[0] in known, f"{file.name} imports {module}"


def test_makefile_targets_and_ci():
    text = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "lab", "bench", "lint", "setup"):
        assert re.search(rf"^{target}:", text, re.M), target
    run = ROOT / ".ci" / "run"
    assert run.stat().st_mode & stat.S_IXUSR
    assert "set -euo pipefail" in run.read_text()
    subprocess.run(["bash", "-n", str(run)], check=True)
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_import_is_light():
    code = "import json, sys, ildlab; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "numpy", "pandas", "matplotlib", "ipywidgets", "accelerate", "datasets"}
    assert not heavy & set(json.loads(done.stdout))


def test_public_names_resolve():
    """Everything that a package hands on is there, and is no module's name too."""
    for init in (ROOT / "ildlab").rglob("__init__.py"):
        package = importlib.import_module(".".join(init.parent.relative_to(ROOT).parts))
        modules = {each.stem for each in init.parent.glob("*.py")} | {
            each.name for each in init.parent.iterdir() if each.is_dir()
        }
        for name in set(package.__all__) - modules:
            assert getattr(package, name) is not None
            assert not isinstance(getattr(package, name), type(ildlab)), f"{package.__name__}.{name} is a module"
    assert not hasattr(ildlab, "no_such_name")


@pytest.mark.slow
def test_wheel_holds_code_and_data(tmp_path):
    # hatchling alone, without pip's isolation, so that no network is needed.
    pytest.importorskip("hatchling")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path / "site")
    files = [file for kind in ("py", "js", "css") for file in (ROOT / "ildlab").rglob(f"*.{kind}")]
    assert {file.relative_to(ROOT).as_posix() for file in files} <= names
    # The tests before this one import a suite's module, and so leave its compiled form beside it.
    shipped = {file.relative_to(ROOT) for file in (ROOT / "data").rglob("*") if file.is_file()}
    assert {f"ildlab/{file.as_posix()}" for file in shipped if file.parent.name != "__pycache__"} <= names
    assert not any("__pycache__" in name for name in names)
    assert not any(name.startswith(("tests/", "notebooks/")) for name in names)
    code = "import ildlab.files as c; print(c.__file__); print(c.data_dir())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(tmp_path / "site/ildlab" / name) for name in ("files.py", "data")]


# ---- ildlab.cache ----------------------------------------------------------------------------------


def test_cache_dir_honours_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ILDLAB_CACHE", str(tmp_path / "elsewhere"))
    assert files.cache_dir("a", "b") == tmp_path / "elsewhere" / "a" / "b"
    assert (tmp_path / "elsewhere" / "a" / "b").is_dir()
    monkeypatch.delenv("ILDLAB_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / ".cache" / "ildlab"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ILDLAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(FileError):
        files.cache_dir("sub")


def test_data_dir_of_a_checkout(monkeypatch, tmp_path):
    assert files.data_dir() == ROOT / "data"
    monkeypatch.setattr(files, "__file__", str(tmp_path / "ildlab" / "files.py"))
    with pytest.raises(IldlabError, match="Install ildlab again"):
        files.data_dir()


def test_write_atomic(tmp_path):
    file = tmp_path / "new" / "a.json"
    assert files.write_atomic(file, "é\r\n") == file
    assert file.read_bytes() == "é\r\n".encode()
    files.write_atomic(file, b"\x00\x01")
    assert file.read_bytes() == b"\x00\x01"
    plain = tmp_path / "plain"
    plain.write_text("")
    assert file.stat().st_mode == plain.stat().st_mode
    assert [each.name for each in file.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize(("number", "message"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "No permission")])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, number, message):
    file = tmp_path / "a.json"
    files.write_atomic(file, "old")

    def fail(handle):
        raise OSError(number, "injected")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(FileError, match=message):
        files.write_atomic(file, "new")
    assert file.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_under_safetensors_is_named(tmp_path):
    with pytest.raises(FileError, match="disk is full"):
        with files.atomic_file(tmp_path / "a.safetensors"):
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(ZeroDivisionError):
        with files.atomic_file(tmp_path / "b") as temporary:
            temporary.write_text("half")
            _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_bars_are_drawn_in_a_notebook_too(monkeypatch, capsys):
    """A kernel's stderr is no terminal, and the first example of the README runs for minutes."""
    import types

    from ildlab import progress

    def work(count):
        for done in range(count):
            yield progress.Progress(done, count, "a note")
        return "done"

    assert progress.drive(work(3)) == "done"
    assert capsys.readouterr().out == ""
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert progress.drive(work(3), desc="short") == "done"
    assert capsys.readouterr().out == ""  # over before anybody wonders
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    assert progress.drive(work(3), desc="long") == "done"
    assert "long" in capsys.readouterr().out
