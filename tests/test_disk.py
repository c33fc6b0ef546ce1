"""Faults of the disk: full, not ours to write, damaged, shared with another process. They are told, and nothing is lost."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ildlab import plots
from ildlab.distill.checkpoint import load_checkpoint
from ildlab.errors import DistillError, FileError, JournalError
from ildlab.model.gguf import kept
from ildlab.session.session import PruningSession
from ildlab.session.whatif import what_if_steps
from ildlab.text import sources
from ildlab.text.blocks import load_text


def logits(stack, tokenizer):
    ids = tokenizer("def f(x): return", return_tensors="pt").input_ids
    with torch.no_grad():
        return stack.model(ids, use_cache=False).logits


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Disk:
    """A small disk of its own, in memory."""

    def __init__(self, folder: Path):
        self.folder, self.filler = folder, folder / "filler"

    def fill(self) -> None:
        with open(self.filler, "ab", buffering=0) as file:
            for size in (2**16, 2**12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass

    def free(self) -> None:
        self.filler.unlink()

    def read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield Disk(folder)
    subprocess.run(["umount", "-l", folder], check=True)


# ---- full ----------------------------------------------------------------------------------------------


def test_a_full_disk_at_each_step_of_a_distillation(small_run, disk):
    want, session = small_run("unbroken"), small_run("disk/run")
    for each in (want, session):
        each.remove(2)
    want.distill()
    before, pruned = content(session.folder), logits(session.student, session.tokenizer)

    def fails(work) -> None:
        disk.fill()
        with pytest.raises(FileError, match="disk is full"):
            next(work)
        assert torch.equal(logits(session.student, session.tokenizer), pruned)
        now = content(session.folder)
        assert {name: now[name] for name in before} == before  # what was there before is untouched
        disk.free()

    for done in range(1, 8):  # losses or checkpoint cannot be written; each goes on from the one before
        work = session.distill_steps()
        assert next(work).done == done
        fails(work)
    shutil.rmtree(session.folder / "checkpoint")
    work = session.distill_steps()
    while next(work).done < 8:
        pass
    fails(work)  # the weights
    with pytest.raises(StopIteration):
        next(session.distill_steps())  # all of it is in the checkpoint
    assert torch.equal(logits(session.student, session.tokenizer), logits(want.student, want.tokenizer))
    assert session.losses()["loss"].tolist() == want.losses()["loss"].tolist()


def _told(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_a_full_disk_while_a_line_is_written(small_run, disk):
    session = small_run("disk/run")
    scores = session.measure()
    disk.fill()
    with pytest.raises(FileError, match="journal.jsonl could not be written"):
        for _ in range(9):  # the last page of the file still has some room
            before = content(session.folder)["journal.jsonl"], len(session.steps)
            session.measure()
    assert (content(session.folder)["journal.jsonl"], len(session.steps)) == before
    assert session.scores.table.equals(scores.table)
    disk.free()
    session.remove()
    session.close()
    assert len(PruningSession.open(session.folder, session.loaded).removed) == 1


@pytest.mark.parametrize("action", ["create", "branch", "export"])
def test_a_full_disk_leaves_no_half_folder(small_run, disk, action):
    session = small_run()
    session.remove(2)
    session.distill()

    def act():
        if action == "create":
            small_run("disk/sub/new")
        else:
            getattr(session, action)(disk.folder / "sub" / "new")

    disk.fill()
    with pytest.raises(FileError, match="disk is full"):
        act()
    left = [path.name for path in disk.folder.rglob("*") if path.is_file() and path != disk.filler]
    assert left == ["lock"] * (action == "create")  # with which a folder is still a new one
    disk.free()
    act()
    assert (disk.folder / "sub" / "new" / "config.json").is_file()


def test_a_full_or_read_only_cache_costs_time_and_no_work(loaded_tiny, disk, monkeypatch):
    """What can be made again is made, and not kept."""
    monkeypatch.setenv("ILDLAB_CACHE", str(disk.folder / "cache"))
    texts = [f"A paragraph about the number {n}, with some words after it." for n in range(400)]
    monkeypatch.setattr(sources, "_SOURCES", type(sources._SOURCES)())  # of this test alone
    monkeypatch.setattr(sources, "read_python_docs", lambda: (yield from ()) or texts)
    want = load_text("python-docs", loaded_tiny.tokenizer, block=16)
    assert content(disk.folder)
    shutil.rmtree(disk.folder / "cache")
    disk.fill()
    with pytest.warns(UserWarning, match="Not kept for the next time: The disk is full.*ILDLAB_CACHE"):
        full = load_text("python-docs", loaded_tiny.tokenizer, block=16)
    disk.free()
    disk.read_only()
    with pytest.warns(UserWarning, match="Not kept for the next time: No permission.*ILDLAB_CACHE"):
        denied = load_text("python-docs", loaded_tiny.tokenizer, block=16)
    assert full.fingerprint == denied.fingerprint == want.fingerprint


def model_in(cache, loaded):
    return kept(cache / "models" / "tiny", lambda scratch: (loaded.model, loaded.tokenizer))


def test_a_model_that_the_cache_cannot_hold_says_what_to_do(loaded_tiny, disk):
    (disk.folder / "models").mkdir()
    disk.fill()
    with pytest.raises(FileError, match="disk is full.*ILDLAB_CACHE"):
        model_in(disk.folder, loaded_tiny)
    assert not [path for path in (disk.folder / "models").rglob("*") if path.suffix != ".lock"]
    disk.free()
    assert (model_in(disk.folder, loaded_tiny) / "model.safetensors").is_file()
    shutil.rmtree(disk.folder / "models")
    (disk.folder / "models").mkdir()
    disk.read_only()
    with pytest.raises(FileError, match="No permission.*ILDLAB_CACHE"):
        model_in(disk.folder, loaded_tiny)


# ---- not ours to write ---------------------------------------------------------------------------------


def test_a_colleagues_run_is_read_and_refuses_to_be_changed(small_run, disk, tmp_path):
    session = small_run("disk/run")
    session.measure()
    session.remove()
    session.distill()
    session.evaluate(canaries=False)
    session.close()
    disk.read_only()
    before = content(disk.folder)
    with pytest.warns(UserWarning, match="opened to read only"):
        theirs = PruningSession.open(disk.folder / "run", session.loaded)
    assert theirs.history().equals(session.history()) and theirs.removed == session.removed
    assert theirs.losses()["loss"].tolist() == session.losses()["loss"].tolist()
    assert theirs.evaluation.kl == session.evaluation.kl and theirs.latest_scores is not None
    assert torch.equal(logits(theirs.student, theirs.tokenizer), logits(session.student, session.tokenizer))
    assert len(theirs.student_at(0)) == 6
    assert theirs.generate("def f(x):", tokens=3) and "<svg" in theirs._repr_html_()
    *_, progress = what_if_steps(theirs, "def f(x):", theirs.student.layer_ids[:1], tokens=2)
    assert progress.total == 2
    assert plots.importance(theirs.latest_scores) is not None
    for name, call in {
        "measure": theirs.measure,
        "remove": lambda: theirs.remove(0),
        "distill": theirs.distill,
        "evaluate": theirs.evaluate,
        "undo": theirs.undo,
        "export": lambda: theirs.export(tmp_path / "out"),
        "run": lambda: theirs.run(3),
    }.items():
        with pytest.raises(JournalError, match="read only.*session.branch"):
            call()
        assert content(disk.folder) == before, name
    with theirs.branch(tmp_path / "mine") as mine:
        mine.remove(0)
    theirs.close()
    with pytest.raises(JournalError, match="is closed"):
        theirs.measure()


def test_a_look_at_a_run_at_any_step_while_another_session_works_on_it(small_run):
    session = small_run()
    session.remove(2)
    session.remove(3)
    with PruningSession.open(session.folder, session.loaded, step=1, read_only=True) as looked:
        assert looked.removed == [2] and len(looked.student) == 5 and len(looked.steps) == 3
        with pytest.raises(JournalError, match="read only"):
            looked.remove(0)
    session.remove(0)
    assert session.removed == [2, 3, 0]


# ---- damaged -------------------------------------------------------------------------------------------


def flip(path: Path, at: int = -9) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 8
    path.write_bytes(damaged)


def test_a_run_with_damaged_weights_goes_on_from_the_step_that_the_message_names(small_run):
    session = small_run()
    session.remove(2)
    session.distill()
    good = logits(session.student, session.tokenizer)
    session.remove(3)
    session.distill()
    session.close()
    flip(session.folder / "weights" / "004.safetensors")
    with pytest.raises(JournalError, match=r"Step 4 needs .*004.safetensors.*PruningSession.open\(.*, step=3\)"):
        PruningSession.open(session.folder, session.loaded)
    again = PruningSession.open(session.folder, session.loaded, step=3)
    assert again.removed == [2, 3] and again.steps[-1].action == "undo" and len(again.steps) == 6
    again.undo(to=2)
    assert torch.equal(logits(again.student, again.tokenizer), good)
    with pytest.raises(JournalError, match=r"Step 4 needs .*undo\(to=3\)"):
        again.undo(to=4)
    assert again.journal.head.step == 2 and torch.equal(logits(again.student, again.tokenizer), good)
    again.close()
    PruningSession.open(session.folder, session.loaded).close()  # it stands before the damage now


def test_a_run_with_a_damaged_line_goes_on_from_the_last_whole_step(small_run):
    session = small_run()
    for layer_id in (2, 3, 0):
        session.remove(layer_id)
    session.close()
    flip(session.folder / "journal.jsonl", -200)
    with pytest.raises(JournalError, match="line 4 cannot be read.*step=2"):
        PruningSession.open(session.folder, session.loaded)
    with PruningSession.open(session.folder, session.loaded, step=2) as again:
        assert again.removed == [2, 3]
    assert (session.folder / "damaged-1" / "journal.jsonl").is_file()


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_checkpoint_is_told_and_can_be_deleted(small_run, damage):
    session = small_run()
    session.remove(2)
    work = session.distill_steps()
    next(work)
    with pytest.raises(KeyboardInterrupt):
        work.throw(KeyboardInterrupt)
    (file,) = (session.folder / "checkpoint").glob("*.safetensors")
    if damage == "flipped":
        flip(file)
    else:
        file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DistillError, match=f"{file.name} cannot be read as a checkpoint .*Delete it to start anew"):
        session.distill()
    assert len(session.steps) == 2
    file.unlink()
    session.distill()


def test_a_checkpoint_of_an_older_version_has_no_sum(small_run):
    from safetensors.torch import save_file

    session = small_run()
    session.remove(2)
    work = session.distill_steps()
    next(work)
    with pytest.raises(KeyboardInterrupt):
        work.throw(KeyboardInterrupt)
    (file,) = (session.folder / "checkpoint").glob("*.safetensors")
    told = _told(file)
    del told["sha256"]
    save_file(load_file(file), file, metadata=told)
    assert load_checkpoint(file, told["identity"]) is not None


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "sha256.json"])
def test_a_damaged_model_in_the_cache_is_made_again(loaded_tiny, tmp_path, name):
    folder = model_in(tmp_path, loaded_tiny)
    want = content(folder)
    flip(folder / name, 40 if name != "model.safetensors" else -9)
    with pytest.warns(UserWarning, match="tiny is damaged.*made again"):
        assert model_in(tmp_path, loaded_tiny) == folder
    assert content(folder) == want
    (folder / "sha256.json").unlink()  # of an older version: as it is
    model_in(tmp_path, loaded_tiny)
    assert not (folder / "sha256.json").exists()


# ---- shared --------------------------------------------------------------------------------------------

SECOND = """
import sys
from ildlab.errors import JournalError
from ildlab.session.session import PruningSession
try:
    PruningSession.open(sys.argv[1])
except JournalError as error:
    print(error)
with PruningSession.open(sys.argv[1], read_only=True) as session:
    print(session.removed)
"""


def test_a_second_process_is_refused_in_words_and_may_look(small_run):
    session = small_run()
    session.remove(2)
    command = [sys.executable, "-c", SECOND, str(session.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    refused, removed = done.stdout.splitlines()
    assert "open in another session, and a run folder has one writer" in refused and "read_only=True" in refused
    assert removed == "[2]"
    session.remove(3)


PREPARE = """
import os, sys, time
from pathlib import Path
from ildlab.model.gguf import kept
from ildlab.model.load import load_model
loaded, cache = load_model(sys.argv[1], dtype="float32"), Path(sys.argv[2])

def make(scratch):
    with open(cache / "made", "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(0.5)
    return loaded.model, loaded.tokenizer

(cache / f"ready{os.getpid()}").touch()
while len(list(cache.glob("ready*"))) < 2:
    time.sleep(0.01)
print(sorted(path.name for path in kept(cache / "tiny", make).iterdir()))
"""


def test_of_two_processes_that_prepare_a_model_at_once_one_does(tiny_folder, tmp_path):
    command = [sys.executable, "-c", PREPARE, str(tiny_folder), str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    one, other = (each.communicate(timeout=120)[0] for each in both)
    assert one == other and "model.safetensors" in one
    assert len((tmp_path / "made").read_text().splitlines()) == 1


# ---- the page that says all this -----------------------------------------------------------------------


def test_each_promise_is_held_by_tests_that_there_are():
    here = Path(__file__).parent
    page = (here.parent / "docs" / "reliability.md").read_text()
    rows = [
        line for line in page.splitlines() if line.startswith("| ") and "promise |" not in line and "---" not in line
    ]
    assert len(rows) >= 20
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)(?:::([\w*]+))?`", row)
        assert named, row
        for file, pattern in named:
            found = fnmatch.filter(re.findall(r"^def (test_\w+)", (here / file).read_text(), re.M), pattern or "*")
            assert found, (file, pattern)
