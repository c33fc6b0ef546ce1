"""Grids of a small notebook on real workers: each point once and whole, whatever is killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import yaml

import ildlab
from ildlab import PruningSession, plots
from ildlab.errors import IldlabError
from ildlab.grid import load_grid, run_grid, run_grid_steps
from ildlab.grid.points import Plan
from ildlab.grid.run import _settle
from ildlab.grid.work import held, is_held, run_point, state_of, write_state

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = """from typing import Optional
metric: str = "kl"  # what decides
seed: int = 0  # of the run
rate: Optional[float] = None  # of learning
ticks: int = 3  # how long it takes
model: str = ""  # a file
break_if: str = ""  # fails where this file is
run_folder: str = "run"  # where to write
"""
# Its lines tell who wrote when: never two kernels by turns, and one end.
BODY = """import os, time
from pathlib import Path
from types import SimpleNamespace
Path(run_folder).mkdir(exist_ok=True)
get_ipython().kernel.log.error("as a kernel says that is interrupted at its end")
for tick in range(ticks):
    with open(Path(run_folder) / "log", "a") as log:
        log.write(f"{os.getpid()} {tick}\\n")
    time.sleep(0.2)
if break_if and Path(break_if).exists():
    raise ValueError(f"seed {seed} \\x1b[31mcannot\\x1b[0m be")
with open(Path(run_folder) / "log", "a") as log:
    log.write(f"{os.getpid()} end\\n")
print(type(seed).__name__, type(rate).__name__, Path.cwd().name)
"""
CUBE = {"metric": ["kl", "nll"], "seed": range(2), "rate": [0.5, 1]}


@pytest.fixture
def notebook(tmp_path):
    return write_notebook(tmp_path / "small.ipynb")


def write_notebook(path: Path, body: str = BODY, parameters: str = PARAMETERS, tags=("parameters",)) -> Path:
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": list(tags)}), nbformat.v4.new_code_cell(body)]
    kernel = {"name": "of-the-author", "language": "python", "display_name": "mine"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def check_once(out: Path, points: int) -> None:
    """Each point has ended, once an attempt at most, and no kernel wrote after the next had begun."""
    logs = list(out.glob("*/run/log"))
    assert len(logs) == points
    for log in logs:
        lines = [line.split() for line in log.read_text().splitlines()]
        ends, attempts = [pid for pid, word in lines if word == "end"], state_of(log.parents[1])["attempts"]
        # One that was killed after its last cell, before it was marked done, has an end more.
        assert lines[-1][1] == "end" and 1 <= len(ends) == len(set(ends)) <= attempts
        writers = [pid for pid, _ in lines]
        turns = [pid for number, pid in enumerate(writers) if number == 0 or writers[number - 1] != pid]
        assert len(turns) == len(set(turns)), lines


def early(out: Path) -> list[Path]:
    """Points whose kernel has begun to write, and is far from its end."""
    logs = [log for log in out.glob("*/run/log") if 1 <= len(log.read_text().splitlines()) <= 3]
    return [log.parents[1] for log in logs if state_of(log.parents[1])["state"] == "running"]


def test_a_worker_is_killed_midway_and_all_points_are_done_once(notebook, tmp_path, capfd):
    out, killed, notes = tmp_path / "out", [], []
    for progress in run_grid_steps(notebook, CUBE | {"ticks": 6}, out, workers=2):
        notes.append(progress.note)
        if not killed and progress.done >= 2 and (begun := early(out)):
            killed.append(begun[0].name)
            os.kill(int(state_of(begun[0])["worker"].rpartition(":")[2]), signal.SIGKILL)
    table = load_grid(out)
    assert killed and table["state"].tolist() == ["done"] * 8 and progress.done == 8
    check_once(out, 8)
    assert table.at[killed[0], "attempts"] == 2 and table["attempts"].sum() == 9
    assert {tuple(row) for row in table[["metric", "seed", "rate"]].to_numpy()} == {
        (metric, seed, rate) for metric in ("kl", "nll") for seed in (0, 1) for rate in (0.5, 1.0)
    }
    assert any("2 running: metric-" in note for note in notes) and notes[-1] == "8 done"
    # Typed, and in a folder of its own whose name says what it is of.
    point = next(out.glob("metric-nll_seed-1_rate-1.0*"))
    assert json.loads((point / "parameters.json").read_text()) == {"metric": "nll", "seed": 1, "rate": 1.0, "ticks": 6}
    made = nbformat.read(point / "notebook.ipynb", 4)
    assert made.cells[-1].outputs[-1].text == f"int float {point.name}\n"
    # All of it again: nothing runs. One value more: that alone does.
    before = {log: log.read_bytes() for log in out.glob("*/run/log")}
    assert run_grid(notebook, CUBE | {"ticks": 6}, out).equals(table)
    assert {log: log.read_bytes() for log in out.glob("*/run/log")} == before
    assert "IPKernelApp" not in capfd.readouterr().err  # no word of a kernel itself on the driver's screen


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "ildlab.grid", *map(str, arguments)]


def test_the_driver_is_killed_and_the_grid_goes_on_on_a_scheduler(notebook, tmp_path):
    out, grid = tmp_path / "out", tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump({"metric": "kl", "seed": [0, 1, 2], "ticks": 7}))
    driver = subprocess.Popen(command(notebook, grid, "--out", out, "--workers", 2), cwd=tmp_path)
    try:
        wait_for(lambda: any(is_done(p.parent) for p in out.glob("*/state.json")) and early(out))
        stopped = early(out)
    finally:
        driver.kill()
        driver.wait()
    wait_for(lambda: not any(map(is_held, stopped)))  # workers and kernels go with their driver
    table = load_grid(out)
    assert "stopped" in set(table["state"]) and 1 <= (table["state"] == "done").sum() < 3
    address = tmp_path / "scheduler.json"
    where = f"--scheduler-file {address} --host 127.0.0.1 --no-dashboard".split()
    dask = [sys.executable, "-m", "dask"]
    scheduler = subprocess.Popen([*dask, "scheduler", *where, "--port", "0"], cwd=tmp_path)
    worker = subprocess.Popen([*dask, "worker", *where, "--nthreads", "1", "--nworkers", "2"], cwd=tmp_path)
    try:
        wait_for(lambda: address.exists() and address.read_text().rstrip().endswith("}"))  # made, and written
        tcp = json.loads(address.read_text())["address"]
        done = subprocess.run(
            command(notebook, grid, "--out", out, "--scheduler", tcp), capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "3/3  3 done" in done.stdout and "metric-kl_seed-2" in done.stdout
    finally:
        for process in (worker, scheduler):
            process.terminate()
            process.wait()
    check_once(out, 3)
    assert load_grid(out)["state"].tolist() == ["done"] * 3


def is_done(folder: Path) -> bool:
    return state_of(folder)["state"] == "done"


def wait_for(condition, seconds: float = 60) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it did not come about"
        time.sleep(0.1)


def test_a_failed_point_is_kept_with_its_traceback_and_run_again_on_request(notebook, tmp_path):
    stone, out = tmp_path / "stone", tmp_path / "out"
    stone.touch()
    grid = [{"seed": 1, "ticks": 1}, {"seed": "2", "ticks": 1, "break_if": [stone]}]
    table = run_grid(notebook, grid, out, workers=2)
    assert table["state"].tolist() == ["done", "failed"] and table["seed"].tolist() == [1, 2]
    bad = out / table.index[1]
    assert table["error"].tolist()[1] == "ValueError: seed 2 cannot be"
    assert "raise ValueError" in state_of(bad)["traceback"] and "\x1b" not in state_of(bad)["traceback"]
    assert "ValueError" in (bad / "notebook.ipynb").read_text()
    stone.unlink()
    assert run_grid(notebook, grid, out)["state"].tolist() == ["done", "failed"]  # not asked for
    table = run_grid(notebook, grid, out, retry=True)  # as many workers as memory holds
    assert table["state"].tolist() == ["done", "done"] and table["error"].isna().all()
    assert json.loads((bad / "failed-1.json").read_text())["error"].startswith("ValueError")
    with pytest.raises(IldlabError, match="begun with another notebook"):
        run_grid(write_notebook(tmp_path / "other.ipynb", BODY + "1"), grid, out)


@pytest.mark.parametrize(
    "grid, words",
    [
        ({"sede": [1]}, "no parameter 'sede'. There are: metric, seed"),
        ({"seed": [1, "two"]}, "seed='two': it must be a whole number"),
        ({"seed": [1, "1"]}, "'seed': 1} twice"),
        ({"seed": []}, "seed has no values"),
        ([], "no points"),
        ("seed", "is no grid"),
        ([{"seed": 1}, 3], "3 is no grid"),
        ({"run_folder": ["a"]}, "a run folder of its own"),
        ({"rate": [float("nan")]}, "rate=nan: it must be a number"),
        ({"metric": [" "]}, "metric=' ': it must not be empty"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_is_written(grid, words, notebook, tmp_path):
    with pytest.raises(IldlabError, match=words):
        run_grid(notebook, grid, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_notebook_or_folder_that_is_none_is_refused(notebook, tmp_path):
    with pytest.raises(IldlabError, match="is no notebook: FileNotFoundError"):
        run_grid(tmp_path / "none.ipynb", CUBE, tmp_path / "out")
    with pytest.raises(IldlabError, match="has no parameters"):
        run_grid(write_notebook(tmp_path / "plain.ipynb", tags=()), CUBE, tmp_path / "out")
    with pytest.raises(IldlabError, match="is no notebook: JSONDecodeError"):
        run_grid(Path(__file__), CUBE, tmp_path / "out")
    with pytest.raises(IldlabError, match="holds no grid, and is not an empty folder"):
        run_grid(notebook, CUBE, tmp_path)
    with pytest.raises(IldlabError, match="workers=0"):
        run_grid(notebook, CUBE, tmp_path / "out", workers=0)
    with pytest.raises(IldlabError, match="give a dask.distributed.Client"):
        run_grid(notebook, CUBE, tmp_path / "out", client="tcp://127.0.0.1:1")
    with pytest.raises(IldlabError, match="holds no grid"):
        load_grid(tmp_path)
    assert not (tmp_path / "out").exists()


class Workers:
    """A client as `run_grid` asks it, whose workers tell other versions or have several threads."""

    def __init__(self, version, threads=1):
        self.version, self.threads = version, threads

    def submit(self, *_, **__):
        raise AssertionError("nothing may run there")

    def run(self, function, on_error):
        return {"tcp://there:1": self.version}

    def nthreads(self):
        return {"tcp://there:1": self.threads}


@pytest.mark.parametrize(
    "client, words",
    [
        (Workers("0.0.9"), "there:1 has ildlab 0.0.9; here it is .* A worker needs"),
        (
            Workers(ModuleNotFoundError("No module named 'ildlab'")),
            "has ModuleNotFoundError: No module .* A worker needs",
        ),
        (Workers(ildlab.__version__, threads=4), "dask worker --nthreads 1"),
    ],
)
def test_workers_that_lack_something_are_refused_before_anything_is_written(client, words, notebook, tmp_path):
    with pytest.raises(IldlabError, match=words):
        run_grid(notebook, CUBE, tmp_path / "out", client)
    assert not (tmp_path / "out").exists()


def test_a_worker_that_came_late_is_asked_too(notebook, tmp_path):
    point = Plan.of(notebook, {"seed": 1}).lay_out(tmp_path / "out")[0]
    with pytest.raises(IldlabError, match="the driver 0.0.9; it sees .*: True"):
        run_point(str(point), "0.0.9")
    with pytest.raises(IldlabError, match="it sees .*: False"):
        run_point(str(tmp_path / "elsewhere" / point.name), ildlab.__version__)
    assert state_of(point) == {"state": "waiting"}


def asked_to_run(point: Path) -> list[str]:
    """A worker's part, as a process."""
    ask = f"from ildlab.grid.work import run_point; print(run_point({str(point)!r}, {ildlab.__version__!r}))"
    return [sys.executable, "-c", ask]


def test_a_point_that_another_holds_waits_and_is_not_run_again(notebook, tmp_path):
    """As after a worker was thought lost: the second finds it done."""
    point = Plan.of(notebook, {"seed": 1}).lay_out(tmp_path / "out")[0]
    with held(point):
        second = subprocess.Popen(asked_to_run(point), stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(3)
        assert is_held(point)
        write_state(point, {"state": "done", "attempts": 1})
    assert second.communicate(timeout=30)[0] == "done\n"
    assert not (point / "run").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc, and for Linux's way to die with a parent")
def test_a_kernel_holds_its_point_and_dies_with_its_worker(notebook, tmp_path):
    point = Plan.of(notebook, {"ticks": 1000}).lay_out(tmp_path / "out")[0]
    worker = subprocess.Popen(asked_to_run(point))
    try:
        log = point / "run" / "log"
        wait_for(lambda: log.exists() and log.read_text().strip())
        kernel = int(log.read_text().split()[0])
        assert kernel != worker.pid
        files = [os.readlink(file) for file in Path(f"/proc/{kernel}/fd").iterdir()]
        assert str(point / "lock") in files  # so even one that lived on would keep its point
        os.kill(kernel, signal.SIGSTOP)  # it cannot look for its parent by itself
    finally:
        worker.kill()
        worker.wait()
    wait_for(lambda: not is_held(point), 20)
    table = load_grid(tmp_path / "out")
    assert table["state"].tolist() == ["stopped"] and table["attempts"].tolist() == [1]


class Task:
    """A future that ended with an error, or was lost."""

    def __init__(self, error=None):
        self.status, self.exception = "error" if error else "cancelled", lambda: error


def test_how_a_task_ended_is_told(notebook, tmp_path):
    from distributed import KilledWorker

    point = Plan.of(notebook, {"seed": 1}).lay_out(tmp_path / "out")[0]
    with pytest.raises(IldlabError, match="gave .* up .cancelled.: call again to go on"):
        _settle(Task(), point)
    with pytest.raises(IldlabError, match="could not run seed-1_.*ModuleNotFoundError: No module.* A worker needs"):
        _settle(Task(ModuleNotFoundError("No module named 'ildlab'")), point)
    assert state_of(point) == {"state": "waiting"}
    killed = KilledWorker("a point", SimpleNamespace(address="tcp://there:1"), 3)
    _settle(Task(killed), point)
    assert state_of(point)["state"] == "failed" and state_of(point)["error"].startswith("KilledWorker: ")
    write_state(point, {"state": "done"})
    _settle(Task(killed), point)
    assert state_of(point) == {"state": "done"}


def test_the_figures_of_a_run_are_read_from_its_journal(tiny_folder, short_text, small_settings, tmp_path):
    small = {name: small_settings[name] for name in ("block", "calibration_tokens", "train_tokens", "eval_tokens")}
    grid = {"metric": "block_influence", "model": tiny_folder, "text": short_text, "target_layers": [5], **small}
    table = run_grid(ROOT / "notebooks" / "batch" / "iterate.ipynb", grid, tmp_path / "out")
    assert table["state"].tolist() == ["done"], table["error"].tolist()
    point = tmp_path / "out" / table.index[0]
    session = PruningSession.open(point / "run", read_only=True)
    last, row = session.history().iloc[-1], table.iloc[0]
    assert row["layers"] == 5 and row["removed"] == session.removed and len(session.removed) == 1
    for name in ("perplexity", "kl", "loss", "agreement", "parameters", "canary_copying"):
        assert row[name] == last[name], name
    assert row["block"] == 16 and (point / "run" / "checkpoint-5-layers").is_dir()
    assert 50e6 < state_of(point)["peak_bytes"] < 20e9


POINTS = pd.DataFrame(
    {
        "metric": ["kl", "kl", "nll", "nll", "nll"],
        "target_layers": [4, 5, 4, 5, 5],
        "distill": [{}, {}, {}, {}, {}],
        "seed": [0, 0, 0, 0, 1],
        "loss": [0.5, 0.25, 0.75, 0.5, None],
    }
)


def test_a_grid_is_drawn_in_facets():
    figure = plots.grid(POINTS, "loss", x="target_layers", by="metric", columns="seed")
    assert [ax.get_title() for ax in figure.axes] == ["seed 0"]  # the point of seed 1 has no loss
    lines = {
        line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_label()[0] != "_"
    }
    assert lines == {"metric kl": [[4, 0.5], [5, 0.25]], "metric nll": [[4, 0.75], [5, 0.5]]}
    figure = plots.grid(POINTS, "loss", x="metric", rows="target_layers", columns="distill")
    assert [ax.get_title() for ax in figure.axes] == ["target layers 4, distill {}", "target layers 5, distill {}"]
    assert [text.get_text() for text in figure.axes[1].get_xticklabels()] == ["kl", "nll"]
    means = [ax.lines[1].get_ydata().tolist() for ax in figure.axes]
    assert means == [[0.5, 0.75], [0.25, 0.5]]
    with pytest.raises(IldlabError, match="has no 'perplexity'"):
        plots.grid(POINTS, "perplexity", x="metric")
    with pytest.raises(IldlabError, match="No point of the grid has 'loss'"):
        plots.grid(POINTS[4:], "loss", x="metric")
