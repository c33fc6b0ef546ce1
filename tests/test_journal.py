"""The run folder: whole lines or none, one writer, a tree of steps."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from ildlab.errors import FileError, JournalError
from ildlab.session import journal as module
from ildlab.session.journal import Journal


@pytest.fixture
def run(tmp_path):
    journal = Journal.create(tmp_path / "run", {"teacher": "t", "settings": {}})
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


def four_steps(run):
    run.append("remove", layer_ids=[0, 2], args={"layer_id": 1})
    run.append("distill", layer_ids=[0, 2], tensors={"layer.0.w": torch.ones(2)})
    run.losses_of(2).parent.mkdir()
    run.losses_of(2).write_text("{}\n")
    run.append("distill", layer_ids=[0, 2], tensors={"layer.0.w": torch.zeros(2)})
    run.close()


def test_every_flipped_bit_of_a_line_is_told_with_its_number(run):
    four_steps(run)
    path = run.folder / "journal.jsonl"
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for at in range(second, whole.index(b"\n", second) + 1):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(JournalError, match="line 2 cannot be read.*step=0"):
            Journal.open(run.folder)
        assert path.read_bytes() == damaged  # a refusal leaves it as it is
    path.write_bytes(whole[: second + 40] + whole[second + 60 :])  # cut out of the middle
    with pytest.raises(JournalError, match="line 2 cannot be read"):
        Journal.open(run.folder)
    path.write_bytes(whole[:second] + whole[whole.index(b"\n", second) + 1 :])  # a line is gone
    with pytest.raises(JournalError, match="line 2 cannot be read: it is not that of step 1"):
        Journal.open(run.folder)


def test_a_damaged_journal_goes_on_from_a_whole_step_when_asked_and_loses_nothing(run):
    four_steps(run)
    path = run.folder / "journal.jsonl"
    damaged = path.read_bytes().replace(b'"step": 2', b'"step": 3')
    path.write_bytes(damaged)
    with pytest.raises(JournalError, match=r"line 3 cannot be read: its sha256.*step=1"):
        Journal.open(run.folder, step=2)
    looked = Journal.open(run.folder, step=0, read_only=True)
    assert len(looked.steps) == 2 and looked.head.step == 0 and path.read_bytes() == damaged
    again = Journal.open(run.folder, step=1)
    assert [s.action for s in again.steps] == ["create", "remove"] and again.head.step == 1
    aside = run.folder / "damaged-1"
    assert (aside / "journal.jsonl").read_bytes() == damaged
    assert sorted(f.name for f in aside.rglob("0*")) == ["002.jsonl", "002.safetensors", "003.safetensors"]
    again.append("distill", layer_ids=[0, 2], tensors={"layer.0.w": torch.full((2,), 5.0)})
    again.close()
    third = Journal.open(run.folder)
    assert third.tensors_at(2)["layer.0.w"].tolist() == [5, 5]
    third.close()


def test_a_line_of_an_older_version_has_no_seal(run):
    four_steps(run)
    path = run.folder / "journal.jsonl"
    older = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        del record["sha256"], record["weights_sha256"]
        older.append(json.dumps(record) + "\n")
    path.write_text("".join(older))
    again = Journal.open(run.folder)
    assert len(again.steps) == 4 and again.tensors_at(3)["layer.0.w"].tolist() == [0, 0]
    again.append("undo", layer_ids=[0, 1, 2], args={"to": 0})  # sealed, after lines that are not
    again.close()
    assert len(Journal.open(run.folder).steps) == 5


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damaged_weights_are_named_with_the_last_step_before_them(run, damage):
    four_steps(run)
    path = run.folder / "weights" / "003.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4  # in the values: safetensors itself sees nothing
    path.unlink() if damage == "gone" else path.write_bytes(content if damage == "flipped" else content[:-4])
    again = Journal.open(run.folder)
    with pytest.raises(JournalError, match=r"Step 3 needs .*003.safetensors, which cannot be read.*undo\(to=2\)"):
        again.tensors_at(3)
    with pytest.raises(JournalError, match="Step 3 needs"):
        again.branch(run.folder.parent / "other", 3)
    assert not (run.folder.parent / "other").exists()
    assert again.tensors_at(2)["layer.0.w"].tolist() == [1, 1]
    again.close()


def test_no_weights_outside_the_run_folder(run, tmp_path):
    four_steps(run)
    (run.folder / "weights" / "003.safetensors").rename(tmp_path / "elsewhere.safetensors")
    path = run.folder / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for record in lines:
        record.pop("sha256")
    for name in ("../../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors")):
        lines[3] |= {"weights": name, "weights_sha256": None}
        path.write_text("".join(json.dumps(record) + "\n" for record in lines))
        again = Journal.open(run.folder)
        with pytest.raises(JournalError, match="does not lie in the run folder"):
            again.tensors_at(3)
        again.close()


def test_a_run_stays_in_its_folder_wherever_the_process_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Journal.create("runs/one", {"settings": {}})
    run.append("create", layer_ids=[0, 1])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run.append("remove", layer_ids=[0], args={"layer_id": 1})
    run.close()
    monkeypatch.chdir(tmp_path)
    assert len(Journal.open("runs/one").steps) == 2
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_run_that_is_not_ours_to_write_is_read_without_the_lock(run, monkeypatch, number):
    four_steps(run)
    torn = run.folder / "journal.jsonl"
    torn.write_bytes(torn.read_bytes() + b'{"step": 4')
    (run.folder / "lock").unlink()
    before = {file: file.read_bytes() for file in run.folder.rglob("*.*")}
    plain = os.open

    def refused(path, *args, **kwargs):
        if str(path).endswith("lock"):
            raise OSError(number, os.strerror(number), str(path))
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refused)
    with pytest.warns(UserWarning, match=f"opened to read only \\({os.strerror(number)}: .*lock"):
        theirs = Journal.open(run.folder)
    monkeypatch.undo()
    assert len(theirs.steps) == 4 and theirs.tensors_at(3)["layer.0.w"].tolist() == [0, 0]
    with pytest.raises(JournalError, match=f"read only \\({os.strerror(number)}.*branch"):
        theirs.append("remove", layer_ids=[0], args={"layer_id": 2})
    mine = theirs.branch(run.folder.parent / "mine", 2)
    mine.append("remove", layer_ids=[0], args={"layer_id": 2})
    mine.close()
    assert {file: file.read_bytes() for file in run.folder.rglob("*.*")} == before


def test_a_look_at_a_run_that_is_being_written(run):
    run.append("remove", layer_ids=[0, 2], args={"layer_id": 1})
    looked = Journal.open(run.folder, read_only=True)
    assert len(looked.steps) == 2
    run.append("remove", layer_ids=[0], args={"layer_id": 2})  # the writer keeps its run
    with pytest.raises(JournalError, match="read only"):
        looked.append("undo", layer_ids=[0, 1, 2], args={"to": 0})


def test_ctrl_c_in_the_middle_of_a_line_takes_it_back(run, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    before = (run.folder / "journal.jsonl").read_bytes()
    for name in ("fsync", "unsealed"):  # while it is written, and after it was
        monkeypatch.setattr(module.os if name == "fsync" else module, name, lambda *a: interrupted(a))
        with pytest.raises(KeyboardInterrupt):
            run.append("remove", layer_ids=[0, 2], args={"layer_id": 1})
        monkeypatch.undo()
        assert len(run.steps) == 1 and (run.folder / "journal.jsonl").read_bytes() == before
    run.append("remove", layer_ids=[0, 2], args={"layer_id": 1})


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
        Journal.create(tmp_path / "run", {"teacher": "t", "settings": {}})
    monkeypatch.undo()
    assert (tmp_path / "run" / "lock").exists() and not (tmp_path / "run" / "config.json").exists()
    Journal.create(tmp_path / "run", {"teacher": "t", "settings": {}}).close()
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
