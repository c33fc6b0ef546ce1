"""The run folder: whole lines or none, one writer, a tree of steps."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest
import torch

from ildlab.errors import FileError, JournalError
from ildlab.session import journal as module
from ildlab.session.journal import Journal


@pytest.fixture
def run(tmp_path):
    journal = Journal.create(tmp_path / "run", {"teacher": "t"})
    journal.append("create", layer_ids=[0, 1, 2])
    yield journal
    journal.close()


def test_append_and_reopen(run):
    run.append("remove", layer_ids=[0, 2], args={"layer_id": 1}, seed=3)
    run.append("distill", layer_ids=[0, 2], tensors={"layer.0.w": torch.ones(2)})
    run.close()
    again = Journal.open(run.folder)
    assert [s.action for s in again.steps] == ["create", "remove", "distill"]
    assert again.steps == run.steps
    assert again.head.step == 2
    assert torch.equal(again.tensors_at(2)["layer.0.w"], torch.ones(2))
    assert again.tensors_at(1) == {}
    again.close()


def test_undo_makes_a_tree(run):
    run.append("remove", layer_ids=[0, 2], args={"layer_id": 1})
    run.append("distill", layer_ids=[0, 2], tensors={"layer.0.w": torch.ones(2)})
    run.append("undo", layer_ids=[0, 1, 2], args={"to": 0})
    run.append("remove", layer_ids=[0, 1], args={"layer_id": 2})
    assert [s.step for s in run.path_to(4)] == [0, 4]
    assert [s.step for s in run.path_to(2)] == [0, 1, 2]
    assert run.tensors_at(4) == {}


def test_newest_tensor_wins(run):
    run.append("distill", layer_ids=[0, 1, 2], tensors={"a": torch.zeros(1), "b": torch.zeros(1)})
    run.append("distill", layer_ids=[0, 1, 2], tensors={"a": torch.ones(1)})
    tensors = run.tensors_at(2)
    assert tensors["a"] == 1 and tensors["b"] == 0


@pytest.mark.parametrize("torn", ['{"step": 1, "par', '{"step": 1}'])
def test_torn_last_line_is_set_aside(run, torn):
    path = run.folder / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    run.close()
    again = Journal.open(run.folder)
    assert [s.action for s in again.steps] == ["create"]
    assert path.read_bytes() == whole
    assert (run.folder / "journal.torn").read_text() == torn
    again.append("remove", layer_ids=[0], args={"layer_id": 1})
    again.close()
    third = Journal.open(run.folder)
    assert len(third.steps) == 2
    third.close()


def test_damage_in_the_middle_is_an_error(run):
    run.append("remove", layer_ids=[0, 2], args={"layer_id": 1})
    path = run.folder / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("{broken\n" + lines[1])
    run.close()
    with pytest.raises(JournalError, match="line 1 cannot be read"):
        Journal.open(run.folder)
    # and the refusal let go of the lock
    with pytest.raises(JournalError, match="line 1 cannot be read"):
        Journal.open(run.folder)


def test_one_writer(run):
    run.close()
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(run.folder / "lock")], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(JournalError, match="one writer"):
            Journal.open(run.folder)
        other.communicate("\n")
    Journal.open(run.folder).close()


def test_a_folder_of_a_process_killed_while_creating_is_new(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(path, content):
        (path.parent / f".{path.stem}.1-2.tmp.json").write_text(content[:3])
        raise Killed

    monkeypatch.setattr(module, "write_atomic", killed)
    with pytest.raises(Killed):
        Journal.create(tmp_path / "run", {"teacher": "t"})
    monkeypatch.undo()
    assert (tmp_path / "run" / "lock").exists() and not (tmp_path / "run" / "config.json").exists()
    Journal.create(tmp_path / "run", {"teacher": "t"}).close()
    Journal.open(tmp_path / "run").close()
    other = tmp_path / "other"
    (other / "weights").mkdir(parents=True)
    (other / "weights" / "mine.safetensors").write_text("somebody's")
    with pytest.raises(JournalError, match="not an empty folder"):
        Journal.create(other, {})


def test_the_same_process_takes_over(run):
    again = Journal.open(run.folder)
    with pytest.raises(JournalError, match="closed"):
        run.append("remove", layer_ids=[0], args={"layer_id": 1})
    again.append("remove", layer_ids=[0, 2], args={"layer_id": 1})
    again.close()


def test_closed_journal_refuses(run):
    run.close()
    with pytest.raises(JournalError, match="closed"):
        run.append("remove", layer_ids=[0], args={"layer_id": 1})


def test_disk_full_while_writing_the_line(run, monkeypatch):
    path = run.folder / "journal.jsonl"
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(FileError, match="full"):
        run.append("remove", layer_ids=[0, 2], args={"layer_id": 1})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert len(run.steps) == 1
    run.append("remove", layer_ids=[0, 2], args={"layer_id": 1})
    assert run.head.step == 1


def test_disk_full_while_writing_weights(run, monkeypatch):
    import safetensors.torch

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(FileError, match="full"):
        run.append("distill", layer_ids=[0], tensors={"a": torch.ones(1)})
    assert len(run.steps) == 1
    assert list((run.folder / "weights").iterdir()) == []


def test_nan_never_reaches_the_journal(run):
    with pytest.raises(JournalError, match="NaN"):
        run.append("evaluate", layer_ids=[0], result={"kl": float("nan")})
    assert len((run.folder / "journal.jsonl").read_text().splitlines()) == 1


def test_create_refuses_what_is_there(run, tmp_path):
    with pytest.raises(JournalError, match="already holds a run"):
        Journal.create(run.folder, {})
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(JournalError, match="not an empty folder"):
        Journal.create(other, {})
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]
    with pytest.raises(JournalError, match="holds no run"):
        Journal.open(other)


def test_lines_are_plain_json(run):
    record = json.loads((run.folder / "journal.jsonl").read_text())
    assert record["action"] == "create" and record["versions"]["torch"] == torch.__version__
