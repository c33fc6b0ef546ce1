"""Faults while a run is at work: Ctrl-C, no memory, NaN. Nothing is lost, the model is whole, and the run goes on."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

from ildlab.errors import DistillError, ExportError, IldlabError, MeasureError, NotFiniteError, SessionError
from ildlab.files import sha256_of
from ildlab.model.fingerprints import fingerprint
from ildlab.session import export as export_module
from ildlab.session.session import PruningSession
from ildlab.session.whatif import what_if_steps


def logits(session):
    ids = session.tokenizer("def f(x): return", return_tensors="pt").input_ids
    with torch.no_grad():
        return [stack.model(ids, use_cache=False).logits for stack in (session.student, session.teacher)]


class Whole:
    """What a session is before a fault; `check` that it is so after it."""

    def __init__(self, session):
        self.session, self.steps, self.layers = session, len(session.steps), session.student.layer_ids
        self.logits = logits(session)

    def check(self, steps: int = 0):
        session = self.session
        assert len(session.steps) == self.steps + steps
        assert session.student.layer_ids == self.layers
        for stack in (session.student, session.teacher):
            for module in stack.model.modules():
                assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
                assert "forward" not in vars(module)
            assert not any(p.requires_grad or p.grad is not None for p in stack.model.parameters())
        assert all(map(torch.equal, logits(session), self.logits))
        with session.acting("look"):  # it is free
            pass


# ---- Ctrl-C --------------------------------------------------------------------------------------------

WORK = {
    "measure kl": lambda s: s.measure_steps(batch_size=1),
    "measure lrp": lambda s: s.measure_steps("lrp", batch_size=1),
    "measure taylor": lambda s: s.measure_steps("taylor", batch_size=1),
    "measure nll": lambda s: s.measure_steps("nll", race=True, batch_size=1),
    "measure task": lambda s: s.measure_steps("task", suite="canaries", limit=2),
    "distill": lambda s: s.distill_steps(),
    "evaluate": lambda s: s.evaluate_steps(batch_size=2),
    "what if": lambda s: what_if_steps(s, "def f(x):", [3]),
}


@pytest.mark.parametrize("name", WORK)
def test_ctrl_c_at_every_progress_event(small_run, name):
    session = small_run()
    session.remove(2)
    whole, events = Whole(session), 0
    while True:
        work = WORK[name](session)
        try:
            # A distillation goes on from its checkpoint, so that the next event is a new one.
            for _ in range(1 if name == "distill" else events + 1):
                next(work)
        except StopIteration:
            break
        with pytest.raises(KeyboardInterrupt):
            work.throw(KeyboardInterrupt)
        events += 1
        whole.check()
    assert events >= 2
    assert [step.action for step in session.steps[whole.steps :]] == [name.split()[0]] * (name != "what if")


def test_ctrl_c_all_the_way_through_a_run(small_run):
    """Stopped at every event and begun again, it ends as one that was left alone."""
    once, often = small_run("once"), small_run("often")
    once.run(5, suite_each=False)
    work, stops, events, steps = often.run_steps(5, suite_each=False), 0, 1, 1
    while True:
        try:
            for _ in range(events):
                next(work)
        except StopIteration:
            break
        with pytest.raises(KeyboardInterrupt):
            work.throw(KeyboardInterrupt)
        with often.acting("look"):
            pass
        # A step that is not whole begins anew, a distillation from its checkpoint: on to the event after.
        events = 1 if len(often.steps) > steps else events + 1
        work, stops, steps = often.run_steps(), stops + 1, len(often.steps)
    assert stops > 20
    assert [step.action for step in often.steps] == [step.action for step in once.steps]
    assert all(map(torch.equal, logits(often), logits(once)))


def test_ctrl_c_in_an_export_leaves_nothing(small_run, tmp_path, monkeypatch):
    session = small_run()
    session.remove(2)
    whole = Whole(session)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "examine", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.export(tmp_path / "out")
    whole.check()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_ctrl_c_between_the_journal_and_the_model_of_a_removal(small_run, monkeypatch):
    session = small_run()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(session.student, "remove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.remove(2)
    assert session.removed == [2] and session.student.layer_ids == [0, 1, 3, 4, 5]


# ---- no memory -----------------------------------------------------------------------------------------


class Memory:
    """Lets no layer run on more than `rows` sequences; with `at`, fails once, at that call of a layer."""

    def __init__(self, monkeypatch, rows: int = 8, at: int = 0, error: BaseException | None = None):
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        plain, self.calls, self.failed = LlamaDecoderLayer.forward, 0, 0

        def forward(layer, hidden, *args, **kwargs):
            self.calls += 1
            if hidden.shape[0] > rows or self.calls == at:
                self.failed += 1
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return plain(layer, hidden, *args, **kwargs)

        monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)


@pytest.mark.parametrize("metric", ["kl", "nll", "block_influence", "taylor"])
def test_measure_halves_its_batch_where_memory_does_not_do(small_run, monkeypatch, metric):
    session = small_run()
    session.remove(2)
    want = session.measure(metric)
    whole = Whole(session)
    with monkeypatch.context() as patch:
        memory = Memory(patch, rows=1)
        scores = session.measure(metric)
    assert memory.failed and "out of memory: batch size lowered" in scores.details["notes"][0]
    torch.testing.assert_close(*(torch.tensor(s.table["score"].to_numpy()) for s in (scores, want)))
    whole.check(steps=1)
    with monkeypatch.context() as patch:
        Memory(patch, rows=0)
        with pytest.raises(MeasureError, match="Out of memory with a single sequence"):
            session.measure(metric)
    whole.check(steps=1)


@pytest.mark.parametrize("changes", [{}, {"local_tokens": 0, "batch_size": 4}])
def test_distill_halves_its_micro_batch_and_learns_the_same(small_run, monkeypatch, changes):
    roomy, tight = small_run("roomy"), small_run("tight")
    for session in (roomy, tight):
        session.remove(2)
    want = roomy.distill(micro_batch=1, **changes)
    with monkeypatch.context() as patch:
        memory = Memory(patch, rows=1)
        got = tight.distill(**changes)
    assert memory.failed < 4 and "out of memory: micro_batch lowered to 1" in got.history["note"].dropna().iloc[0]
    assert got.history["loss"].tolist() == want.history["loss"].tolist()
    assert all(map(torch.equal, logits(tight), logits(roomy)))


@pytest.mark.parametrize("at", [1, 9, 40, 100])
@pytest.mark.parametrize("action", ["distill", "evaluate", "export", "generate"])
def test_no_memory_at_some_layer_call_is_told_and_leaves_all_whole(small_run, monkeypatch, tmp_path, action, at):
    session = small_run(distill={"batch_size": 1, "learning_rate": 1e-3})
    session.remove(2)
    whole = Whole(session)
    calls = {
        "distill": session.distill,
        "evaluate": session.evaluate,
        "export": lambda: session.export(tmp_path / "out"),
        "generate": lambda: session.generate("def f(x):", tokens=30),
    }
    with monkeypatch.context() as patch:
        memory = Memory(patch, at=at)
        with pytest.raises((DistillError, SessionError, ExportError), match="[Oo]ut of memory"):
            calls[action]()
    assert memory.failed == 1
    whole.check()
    assert not (tmp_path / "out").exists()


# ---- NaN -----------------------------------------------------------------------------------------------


def broken(session):
    """A session whose student has a NaN in one weight, of its own."""
    session.remove(2)
    session.student.own([4])
    with torch.no_grad():
        next(session.student.layers[3].parameters())[0, 0] = float("nan")
    return session


@pytest.mark.parametrize("metric", ["kl", "nll", "block_influence", "angular_distance", "lrp", "taylor", "magnitude"])
def test_nan_weights_give_no_score(small_run, metric):
    session = broken(small_run())
    with pytest.raises(MeasureError, match="finite|is nan"):
        session.measure(metric)
    assert [step.action for step in session.steps] == ["create", "remove"]


def test_nan_weights_are_neither_judged_nor_distilled_nor_exported(small_run, tmp_path):
    session = broken(small_run())
    with pytest.raises(IldlabError, match="finite|is nan"):
        session.evaluate()
    with pytest.raises(ExportError):
        session.export(tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(session.steps) == 2
    with pytest.raises(NotFiniteError, match="finite"):
        session.distill(scope="all")
    assert session.steps[-1].action == "failed"
    session.evaluate(canaries=False)  # the student is again what the journal says


def test_a_teacher_with_nan_weights_is_refused_before_anything_is_made(small_run, loaded_tiny, tmp_path, short_text):
    from ildlab.model.load import LoadedModel

    model = copy.deepcopy(loaded_tiny.model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(IldlabError, match="finite"):
        PruningSession.create(
            tmp_path / "run", LoadedModel(model, loaded_tiny.tokenizer, "mine"), text=str(short_text)
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["between two parts", "in the work"])
def test_ctrl_c_of_a_plain_call_keeps_the_checkpoint_wherever_it_lands(small_run, monkeypatch, where):
    """The bar is drawn between two parts of the work: there too, Ctrl-C is no choice to stop and keep half."""
    once, twice = small_run("once"), small_run("twice")
    for session in (once, twice):
        session.remove(2)
    once.distill()
    whole = Whole(twice)
    with monkeypatch.context() as patch:
        if where == "in the work":
            Memory(patch, at=60, error=KeyboardInterrupt())
        else:
            patch.setattr(
                "tqdm.tqdm.set_postfix_str", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
            )
        with pytest.raises(KeyboardInterrupt):
            twice.distill(show=True)
    whole.check()
    assert len(list((twice.folder / "checkpoint").glob("*.safetensors"))) == 1
    twice.distill()
    assert all(map(torch.equal, logits(once), logits(twice)))


# ---- SIGKILL -------------------------------------------------------------------------------------------

KILLS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
import accelerate, torch._dynamo, transformers.models.llama  # once, for all children
import ildlab.evaluate.text_quality as text_quality
from ildlab.model.load import load_model
from ildlab.session.session import PruningSession

torch.set_num_threads(1)
base, tiny, settings = json.loads(sys.argv[1])
base, plain = Path(base), text_quality.generation_speed
text_quality.generation_speed = lambda *a: plain(*a, new_tokens=2, rounds=1)
loaded = load_model(tiny, dtype="float32", device="cpu")

def work(folder):
    if not (folder / "config.json").exists():
        PruningSession.create(folder, loaded, **settings).close()
    with PruningSession.open(folder, loaded) as session:
        session.run(5, suite_each=False, show=False)
        for name in ("branch", "export"):
            if not (folder.parent / f"{folder.name}-{name}").exists():
                getattr(session, name)(folder.parent / f"{folder.name}-{name}")

work(base / "warm")
started = time.perf_counter()
work(base / "unbroken")
whole, number, killed, draw = time.perf_counter() - started, 0, [], random.Random(0)
# On a busy machine one phase may take most of the blows: then it goes on until several had theirs.
while len(killed) < 40 or (len(set(killed)) < 6 and len(killed) < 120):
    child = os.fork()
    if not child:
        work(base / f"run{number}")
        os._exit(0)
    time.sleep(draw.random() * whole / 3)
    os.kill(child, signal.SIGKILL)
    if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        lines = base / f"run{number}" / "journal.jsonl"
        killed.append(len(lines.read_bytes().splitlines()) if lines.exists() else 0)
    else:  # it was done before
        number += 1
work(base / f"run{number}")
print(json.dumps([number + 1, killed]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_forty_moments_it_ends_as_one_that_was_left_alone(
    tmp_path, tiny_folder, loaded_tiny, small_settings
):
    """SIGKILL while it is made, measures, removes, distills, is judged, branched and exported."""
    told = json.dumps([str(tmp_path), str(tiny_folder), small_settings])
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLS, told], capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    runs, killed = json.loads(done.stdout.splitlines()[-1])
    assert len(killed) >= 40 and len(set(killed)) >= 6  # in many phases: the lines of the journal tell
    want = outcome(tmp_path, "unbroken", loaded_tiny)
    for number in range(runs):
        assert outcome(tmp_path, f"run{number}", loaded_tiny) == want


def outcome(folder, name, loaded):
    """What a run and its branch and export came to."""
    found = []
    for path in (folder / name, folder / f"{name}-branch"):
        with PruningSession.open(path, loaded) as session:
            drop = ["seconds", "tokens_per_second"]
            figures = [s.result["evaluation"]["kl"] for s in session.steps if s.action == "evaluate"]
            tables = [t.drop(columns=drop, errors="ignore").to_json() for t in (session.losses(), session.history())]
            actions = [step.action for step in session.steps if step.action != "export"]
            found += [actions, session.removed, figures, tables, fingerprint(session.student)]
    return [*found, sha256_of(folder / f"{name}-export" / "model.safetensors")]
