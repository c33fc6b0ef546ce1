"""The loop as journaled steps: resume, undo, branch, stop rules, refusals; on a tiny model, then the real one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch

from ildlab.distill.config import DistillConfig
from ildlab.distill.scope import resolve_scope
from ildlab.errors import DistillError, ExportError, JournalError, MeasureError, SessionError, SuiteError, TextError
from ildlab.model.load import LoadedModel
from ildlab.session import actions
from ildlab.session.config import SessionConfig
from ildlab.session.diagnosis import diagnose
from ildlab.session.forecast import forecast
from ildlab.session.loop import next_phase
from ildlab.session.picture import iterations, picture_of
from ildlab.session.session import PruningSession
from ildlab.session.tables import history_table, task_table

pytestmark = pytest.mark.usefixtures("short_speed")

SETTINGS = {
    "block": 32,
    "calibration_tokens": 8 * 32,
    "train_tokens": 32 * 32,
    "eval_tokens": 8 * 32,
    "metric": "kl",
    "distill": {"learning_rate": 1e-3},
}


@pytest.fixture
def make(tmp_path, tiny_folder, text_file):
    sessions = []

    def create(name="run", **changes):
        settings = {"text": str(text_file), **SETTINGS, **changes}
        sessions.append(PruningSession.create(tmp_path / name, str(tiny_folder), dtype="float32", **settings))
        return sessions[-1]

    yield create
    for session in sessions:
        session.close()


def logits(stack, tokenizer):
    ids = tokenizer("def f(x): return", return_tensors="pt").input_ids
    with torch.no_grad():
        return stack.model(ids, use_cache=False).logits


def same(one, other) -> bool:
    return torch.equal(logits(one.student, one.tokenizer), logits(other.student, other.tokenizer))


def test_whole_run(make):
    session = make()
    teacher = logits(session.teacher, session.tokenizer)
    work, notes = session.run_steps(target_layers=4), []
    try:
        while True:
            notes.append(next(work).note)
    except StopIteration as stop:
        table = stop.value
    with_and_without = [note for note in notes if "never distilled:" in note]
    assert len(with_and_without) == 2  # one a distilled iteration
    for note, (_, row) in zip(with_and_without, table.iloc[1:].iterrows()):
        assert f"perplexity {row['perplexity']:.2f}, KL {row['kl']:.4f}" in note
        assert f"(never distilled: {row['perplexity_undistilled']:.2f}, {row['kl_undistilled']:.4f})" in note
    assert len(session.student) == 4 and len(session.removed) == 2
    assert [s.action for s in session.steps] == ["create", "run", "evaluate"] + 2 * [
        "measure",
        "remove",
        "evaluate",
        "distill",
        "evaluate",
    ]
    assert list(table["n_removed"]) == [0, 1, 2]
    assert table["kl"].iloc[0] == pytest.approx(0, abs=1e-6)
    assert (table["kl"].iloc[1:] > 0).all()
    assert table["perplexity_undistilled"].iloc[1:].notna().all()
    # Distillation, not the removal, is what the teacher's weights must survive.
    assert torch.equal(logits(session.teacher, session.tokenizer), teacher)
    # The removed layer was the least important one by the journal's own scores.
    for step in session.steps:
        if step.action == "remove":
            scores = session.scores_at(step.parent)
            assert step.args["layer_id"] == scores.table["score"].idxmin()
    losses = session.losses()
    assert losses["iteration"].unique().tolist() == [1, 2]
    assert losses["step"].is_monotonic_increasing


def test_what_was_judged_before_any_distillation_is_not_judged_again(make, monkeypatch):
    session = make()
    session.remove(2)
    before = session.evaluate(False)
    session.distill()
    judged, real = [], actions.judge_steps
    monkeypatch.setattr(
        actions, "judge_steps", lambda student, *a, **k: judged.append(student) or real(student, *a, **k)
    )
    after = session.evaluate(False)
    assert judged == [session.student] and after.kl != before.kl
    bare = session.steps[-1].result["undistilled"]
    assert bare == {name: getattr(before, name) for name in ("perplexity", "kl", "agreement")}
    # Two layers gone, and never judged together without a distillation before: another pass.
    session.remove(3)
    session.evaluate(False)
    assert [stack.layer_ids for stack in judged[1:]] == [session.student.layer_ids] * 2
    assert judged[2] is not session.student and session.steps[-1].result["undistilled"]["kl"] != bare["kl"]
    # Nor is what was found on another text.
    session.undo(next(step.step for step in session.steps if step.action == "evaluate"))
    session.distill()
    other = session.text("calibration")
    monkeypatch.setattr(session, "text", lambda split: other)
    session.evaluate(False)
    assert len(judged) == 5


def test_prune_only_then_one_final_distillation(make):
    session = make()
    final = {"tokens": 40 * 32, "local_tokens": 48 * 32, "learning_rate": 2e-3}
    table = session.run(target_layers=4, distill=False, final=final)
    actions = [s.action for s in session.steps if s.action in ("measure", "remove", "distill", "evaluate")]
    assert actions == ["evaluate"] + 2 * ["measure", "remove", "evaluate"] + ["distill", "evaluate"]
    (step,) = [s for s in session.steps if s.action == "distill"]
    assert step.args["gap"] == session.removed and step.args["config"]["learning_rate"] == 2e-3
    # It draws more text than the run's train_tokens, and trains around every gap.
    assert step.result["tokens"] == 88 * 32  # of both stages
    assert session.text("train", tokens=48 * 32).n_tokens == 48 * 32 > session.config.train_tokens
    assert step.result["text"]["fingerprint"] == session.text("train", tokens=48 * 32).fingerprint
    assert step.args["trained"] == resolve_scope("window(3)", session.student, session.removed)
    assert table["perplexity"].iloc[-1] < table["perplexity_undistilled"].iloc[-1]
    # The journal says that it is done: the same run has nothing left to do.
    before = len(session.steps)
    session.run(target_layers=4, distill=False, final=final)
    assert len(session.steps) == before


def test_tasks_are_scored_at_the_start_and_the_end_alone(make):
    session = make(suite="mini7@1", metric="block_influence")
    final = {"tokens": 4 * 32, "local_tokens": 4 * 32}
    table = session.run(4, distill=False, final=final, suite_each=False)
    judged = [step for step in session.steps if step.action == "evaluate"]
    assert [step.args["suite"] for step in judged] == ["mini7@1", None, None, "mini7@1"]
    found = [step.result["evaluation"] for step in judged]
    assert [each["canaries"] is not None for each in found] == [True, False, False, True]
    assert [each["tokens_per_second"] is not None for each in found] == [True, False, False, True]
    assert table["loss"].notna().tolist() == [True, False, True]  # by tasks, and by nothing else
    assert table["aggregate"].notna().tolist() == [True, False, True]
    pruned = make("pruned", suite="mini7@1", metric="block_influence")
    assert pruned.run(4, distill=False, suite_each=False)["loss"].notna().tolist() == [True, False, True]
    each = make("each", suite="mini7@1", metric="block_influence")
    assert each.run(5, suite_each=False)["loss"].notna().tolist() == [True, True]
    for wrong in ({"max_loss": 0.5}, {"max_loss": 0.5, "target_layers": 3}):
        with pytest.raises(SessionError, match="suite_each|target_layers"):
            session.run(**wrong, suite_each=False)


def test_two_layers_on_one_measurement(make):
    session = make(metric="block_influence")
    session.run(3, distill=False, at_once=2)
    acted = [step for step in session.steps if step.action in ("measure", "remove", "evaluate")]
    actions = [step.action for step in acted]
    assert actions == ["evaluate", "measure", "remove", "remove", "evaluate", "measure", "remove", "evaluate"]
    first = session.scores_at(acted[1].step).ranking[:2]
    removals = [step.args for step in session.steps if step.action == "remove"]
    assert [each["layer_id"] for each in removals[:2]] == first and all(each["score"] is not None for each in removals)
    with pytest.raises(SessionError, match="at_once=0"):
        session.run(2, at_once=0)


def test_a_shortlist_is_what_scored_least_before_and_stands_next_to_a_gap(make):
    session = make()
    session.run(3, distill=False, shortlist=2)
    measured = [step for step in session.steps if step.action == "measure"]
    assert len(measured) == 3 and measured[0].args.get("layers") is None
    latest = {}
    for earlier, later in zip(measured, measured[1:], strict=False):
        score = session.scores_at(earlier.step).table["score"]
        latest |= (score - score.min()).to_dict()  # the score itself grows with every removal
        here = later.layer_ids
        gone = [i for i in range(len(session.teacher)) if i not in here]
        wanted = {*sorted(here, key=latest.get)[:2]}
        for i in gone:
            wanted |= {*[k for k in here if k < i][-1:], *[k for k in here if k > i][:1]}
        assert later.args["layers"] == sorted(wanted) == session.scores_at(later.step).layer_ids
    assert session.removed == [session.scores_at(step.step).least_important for step in measured]
    assert len(iterations(session.journal)) == 3
    states = {c.layer_id: c.state for c in picture_of(session.journal, measured[-1].step).columns}
    assert {i for i, state in states.items() if state == "unscored"} == set(here) - set(measured[-1].args["layers"])
    assert {i for i, state in states.items() if state == "removed"} == set(gone)
    whole = measured[0].seconds * (3 / 6) ** 2  # what all layers take is told from a measurement of all
    assert forecast(session, "measure", "kl") == pytest.approx(whole)
    with pytest.raises(SessionError, match="shortlist=1"):
        session.run(2, shortlist=1)
    one_pass = make("one pass", metric="block_influence")
    one_pass.run(4, distill=False, shortlist=2)  # one pass has them all
    assert [len(one_pass.scores_at(s.step).layer_ids) for s in one_pass.steps if s.action == "measure"] == [6, 5]


def test_a_loss_over_the_limit_undoes_all_that_went_on_one_measurement(make):
    session = make(metric="block_influence")
    session.run(max_loss=1e-9, distill=False, at_once=2)
    assert len(session.student) == len(session.teacher)


def test_a_run_made_when_distillation_had_one_stage_stays_what_it_was(make):
    session = make(distill={"learning_rate": 1e-3})
    session.run(5, distill=False, final={"tokens": 8 * 32, "local_tokens": 0})
    session.close()
    file = session.folder / "config.json"
    older = json.loads(file.read_text())
    assert older.pop("distill_stages") == 2
    file.write_text(json.dumps(older))
    lines = (session.folder / "journal.jsonl").read_text().splitlines()
    for number, line in enumerate(lines):
        step = json.loads(line)
        step.pop("sha256")
        if step["action"] == "distill":
            for name in ("local_tokens", "local_rate"):
                del step["args"]["config"][name]
            step["args"]["config"] |= {"scope": "window(2)", "hidden_weight": 1.0, "batch_size": 4}
        lines[number] = json.dumps(step)
    (session.folder / "journal.jsonl").write_text("\n".join(lines) + "\n")
    again = PruningSession.open(session.folder, dtype="float32")
    assert again.config.distill["scope"] == "window(2)" and again.config.distill["learning_rate"] == 1e-3
    before = len(again.steps)
    again.run(5, distill=False, final={"tokens": 8 * 32, "local_tokens": 0})  # it is done, and stays so
    assert len(again.steps) == before
    again.close()


@pytest.mark.parametrize("rate, done", [(2e-3, True), (1e-3, False)])
def test_a_final_distillation_journaled_when_local_stages_had_one_rate_is_known_as_done(make, rate, done):
    session = make()
    session.run(5, distill=False, final={"tokens": 8 * 32, "local_tokens": 8 * 32})
    session.close()
    file = session.folder / "journal.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for step in lines:
        del step["sha256"]
        if step["action"] == "distill":
            assert step["args"]["config"]["local_rate"] is None
            step["args"]["config"]["local_rate"] = rate
    file.write_text("".join(json.dumps(step) + "\n" for step in lines))
    again = PruningSession.open(session.folder, dtype="float32")
    again.run(5, distill=False, final={"tokens": 8 * 32, "local_tokens": 8 * 32})
    assert (len(again.steps) == len(lines)) == done
    again.close()


@pytest.mark.parametrize("short", ["calibration_tokens", "train_tokens", "eval_tokens"])
def test_each_kind_of_a_text_needs_its_blocks_before_anything_is_made(make, tmp_path, short):
    enough = {"calibration_tokens": 12 * 128, "train_tokens": 6 * 128, "eval_tokens": 6 * 128}
    with pytest.raises(SessionError, match=f"{short}.*6 kinds of text"):
        make(text="mix", block=128, **{**enough, short: 5 * 128})
    assert not (tmp_path / "run").exists()


def test_a_run_on_text_of_many_kinds(make):
    session = make(text="mix", block=128, calibration_tokens=12 * 128, train_tokens=24 * 128, eval_tokens=6 * 128)
    scores = session.measure(positions=8)
    assert scores.kinds.count("copies") == 2 and session.scores.of_kind("copies").kinds == ()
    session.remove()
    session.distill(tokens=8 * 128, local_tokens=8 * 128)
    kept = session.scores_at(1)  # as the journal has them
    assert kept.details["medians"] == pytest.approx(scores.details["medians"], rel=1e-5) and kept.kinds == scores.kinds
    assert session.losses()["stage"].tolist() == ["local", "joint"]


def test_a_final_distillation_follows_those_of_each_step_and_resumes(make):
    session = make()
    final = {"tokens": 16 * 32, "local_tokens": 0}
    work = session.run_steps(4, final=final)
    for progress in work:
        if "final distillation" in progress.note and progress.done > 1:
            work.close()
            break
    assert "stopped_at" in session.journal.head.result  # kept, but not the whole of it
    session.run()  # goes on with the settings of the run
    gaps = [s.args["gap"] for s in session.path if s.action == "distill"]
    assert gaps == [session.removed[:1], session.removed[1:], session.removed, session.removed]
    assert session.path[-1].action == "evaluate"
    whole = [s for s in session.path if s.action == "distill"][-1]
    assert whole.result["tokens"] == 16 * 32


@pytest.mark.parametrize(
    "target, final, match",
    [(None, {"tokens": 64}, "target_layers"), (4, {"learning_rate": -1}, "learning_rate"), (4, {"x": 1}, "x")],
)
def test_bad_final_settings_are_refused_before_anything_runs(make, target, final, match):
    session = make()
    with pytest.raises((SessionError, DistillError), match=match):
        session.run(target_layers=target, max_loss=None if target else 0.5, final=final)
    assert [s.action for s in session.steps] == ["create"]


def test_the_gap_of_a_distillation_is_made_of_removed_layers(make):
    session = make()
    session.measure()
    session.remove()
    with pytest.raises(SessionError, match="removed so far"):
        session.distill(gap=[next(i for i in session.student.layer_ids)], tokens=64)


def test_reopen_gives_the_same_student(make):
    session = make()
    session.run(target_layers=5)
    before = logits(session.student, session.tokenizer)
    session.close()
    again = PruningSession.open(session.folder, dtype="float32")
    assert torch.equal(logits(again.student, again.tokenizer), before)
    assert again.removed == session.removed
    pd.testing.assert_frame_equal(again.history(), history_table(again))
    again.close()


def test_undo_and_redo_by_step(make):
    session = make()
    whole = logits(session.student, session.tokenizer)
    session.remove(2)
    session.distill()
    trained = logits(session.student, session.tokenizer)
    distilled_at = session.journal.head.step
    session.undo()
    assert session.removed == [2]
    pruned = logits(session.student, session.tokenizer)
    assert not torch.equal(pruned, trained)
    session.undo()
    assert session.removed == []
    assert torch.equal(logits(session.student, session.tokenizer), whole)
    with pytest.raises(SessionError, match="nothing to undo"):
        session.undo()
    session.undo(to=distilled_at)
    assert torch.equal(logits(session.student, session.tokenizer), trained)
    session.remove(4)
    assert session.removed == [2, 4]
    # Nothing was ever deleted.
    assert sum(step.action == "distill" for step in session.steps) == 1
    with pytest.raises(SessionError, match="itself an undo"):
        session.undo(to=next(s.step for s in session.steps if s.action == "undo"))


def test_branch_has_a_life_of_its_own(make, tmp_path):
    session = make()
    session.remove(1)
    session.distill()
    session.undo()
    session.remove(2)
    session.distill()  # as a step of another number in the branch
    branch = session.branch(tmp_path / "branch")
    assert same(session, branch)
    pd.testing.assert_frame_equal(branch.losses(), session.losses())
    assert len(branch.losses()) > 0
    branch.remove(3)
    session.remove(4)
    assert (branch.removed, session.removed) == ([1, 2, 3], [1, 2, 4])
    branch.close()


def test_max_loss_undoes_the_step(make):
    session = make()
    session.run(target_layers=2, max_loss=0.0001, distill=False)
    # A random model without a layer is surely another model.
    assert session.removed == [] and len(session.student) == 6
    assert session.steps[-1].action == "undo" and session.steps[-1].args["reason"] == "max_loss"
    session.export(session.folder / "checkpoint")  # what follows the verdict does not lift it
    count = len(session.steps)
    session.run(target_layers=2, max_loss=0.0001, distill=False)
    assert len(session.steps) == count


def test_a_run_stopped_before_its_verdict_gets_it_when_it_goes_on(make):
    session = make()
    work = session.run_steps(target_layers=2, max_loss=0.0001, distill=False)
    for progress in work:
        if progress.stage == "result":  # the first student is over the limit, but not undone yet
            break
    work.close()
    assert len(session.removed) == 1
    session.run()
    assert session.removed == [] and session.steps[-1].args["reason"] == "max_loss"


def test_the_verdict_is_that_of_the_runs_own_suite(make, monkeypatch):
    import ildlab.evaluate.record as evaluation

    said = evaluation.Estimate(0.0, 0.0, 0.0)
    monkeypatch.setattr(evaluation, "quality_loss", lambda *_, **__: said)
    session = make(metric="block_influence")
    session.run(target_layers=5, max_loss=1e-6, suite="mini7@1", distill=False)
    assert len(session.removed) == 1
    session.evaluate(speed=False)  # of the text alone: a loss of another kind
    assert session.steps[-1].result["loss"] != 0
    session.run()
    assert len(session.removed) == 1


def test_a_stopped_distillation_is_done_again_around_every_gap(make):
    session = make()
    session.remove(1)
    session.remove(4)
    work = session.distill_steps()
    next(work)
    work.close()
    session.distill()
    assert session.journal.head.args["gap"] == [1, 4]


def test_offloaded_layers_can_be_measured_and_removed(tiny, teacher, text_file, tmp_path):
    from transformers import LlamaForCausalLM

    tiny(5, vocab=len(teacher.tokenizer)).save_pretrained(tmp_path / "model")
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {f"model.layers.{i}": "disk" for i in range(5)}
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=where, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    away = LoadedModel(model.eval().requires_grad_(False), teacher.tokenizer, "tiny")
    here = LoadedModel(
        LlamaForCausalLM.from_pretrained(tmp_path / "model").eval().requires_grad_(False), teacher.tokenizer, "tiny"
    )
    found = []
    for name, loaded in (("away", away), ("here", here)):
        settings = {"text": str(text_file), **SETTINGS, "suite": "mini7@1"}
        with PruningSession.create(tmp_path / name, loaded, **settings) as session:
            session.measure()
            session.remove()
            scored = session.evaluate(speed=False, canaries=False)
            found.append((session.journal.config["fingerprint"], session.removed, scored.kl, scored.aggregate))
            if loaded is away:
                with pytest.raises(DistillError, match="offloaded"):
                    session.distill()
                with pytest.raises(ExportError, match="offloaded"):
                    session.export(tmp_path / "out")
    assert found[0][:2] == found[1][:2]
    assert found[0][2:] == pytest.approx(found[1][2:], rel=1e-4, abs=1e-6)
    assert found[0][2] > 0  # student and teacher are not taken for one because neither has an address


def test_the_limit_undoes_nothing_that_a_person_removed(make):
    session = make()
    session.remove(3)
    session.evaluate(speed=False)
    session.run(target_layers=4, max_loss=0.0001, distill=False)
    assert session.removed[0] == 3


def test_the_aggregate_decides_where_there_is_a_suite(make, monkeypatch):
    """Perplexity says that all is lost, the aggregate that nothing is: the run goes on; and the other way round."""
    import ildlab.evaluate.record as evaluation

    for loss, kept in ((0.0, 1), (0.9, 0)):
        said = evaluation.Estimate(loss, loss, loss)
        monkeypatch.setattr(evaluation, "quality_loss", lambda *_, said=said, **__: said)
        session = make(f"run{kept}", suite="mini7@1", metric="block_influence")
        session.run(target_layers=5, max_loss=0.5 if kept else 0.89, distill=False)
        assert len(session.removed) == kept
        found = next(s.result for s in session.steps[::-1] if s.action == "evaluate")
        by_text = 1 - found["evaluation"]["teacher_perplexity"] / found["evaluation"]["perplexity"]
        assert found["loss"] == loss != by_text


def test_canaries_and_tasks_are_in_the_tables(make):
    session = make(suite="mini7@1", metric="block_influence")
    session.run(target_layers=5)
    table = session.history()
    names = ["canary_copying", "canary_arithmetic", "canary_brackets"]
    assert table[names].notna().all().all() and table["loss"].notna().all()
    tasks = task_table(session)
    assert set(tasks.index.get_level_values("of")) == {"suite", "canaries"}
    assert tasks.loc[("canaries", "copying"), "teacher"] == table["canary_copying"].iloc[0]
    assert {"teacher", "pruned", "student", "pruned - teacher", "student - teacher"} <= set(tasks.columns)
    assert tasks.loc["suite"]["pruned"].isna().all()  # the loop scores tasks at the end of an iteration
    session.measure("task", suite="mini7@1", race=True)  # whatever the run's own metric inherits
    with pytest.raises(MeasureError, match="positions"):
        session.measure("task", suite="mini7@1", positions=8)


def test_task_as_metric_of_a_run_that_samples_positions(make):
    session = make(measure={"positions": 8, "race": True}, suite="mini7@1")
    assert session.measure("task").metric == "task"


def test_metrics_inherit_only_the_options_that_they_have(make):
    session = make(measure={"positions": 8, "race": True})
    for metric in ("block_influence", "angular_distance", "nll"):
        assert session.measure(metric).metric == metric
    assert session.steps[-1].args == {"metric": "nll", "positions": 8, "race": True}
    with pytest.raises(MeasureError, match="no option 'race'"):
        session.measure("block_influence", race=True)


def test_one_action_at_a_time(make):
    """A cell must not change the student that a distillation is training, in the stepper or in another thread."""
    session = make()
    session.remove(2)
    work = session.distill_steps()
    next(work)
    steps = len(session.steps)
    for action in (
        session.undo,
        session.measure,
        session.evaluate,
        session.distill,
        lambda: session.remove(3),
        lambda: session.generate("def"),
        lambda: session.export("nowhere"),
    ):
        with pytest.raises(SessionError, match="in the middle of distill"):
            action()
    assert len(session.steps) == steps and session.removed == [2]
    work.close()
    session.undo()
    assert session.removed == [2]  # the half distillation was a step of its own
    session.undo()
    assert session.removed == []


def test_an_interrupted_distillation_survives_a_mistake(make):
    session = make("interrupted")
    session.remove(2)
    work = session.distill_steps(checkpoint_every=1)
    for _ in range(3):
        next(work)
    with pytest.raises(ZeroDivisionError):
        work.throw(ZeroDivisionError())
    (checkpoint,) = (session.folder / "checkpoint").glob("*.safetensors")
    with pytest.raises(DistillError, match="scope"):
        session.distill(scope="everything")
    session.evaluate(speed=False)  # a look at the student in between changes nothing either
    # Settings that leave the result as it is do not begin it anew.
    session.close()
    session = PruningSession.open(session.folder, dtype="float32")
    first = next(session.distill_steps(micro_batch=2, checkpoint_every=1))
    assert first.done > 3
    session.undo()
    assert not checkpoint.exists()  # stopped, and so journaled
    session.close()


def test_a_resumed_distillation_equals_an_unbroken_one(make):
    whole, session = make("whole"), make("interrupted")
    for each in (whole, session):
        each.remove(2)
    whole.distill()
    work = session.distill_steps(checkpoint_every=1)
    for _ in range(3):
        next(work)
    with pytest.raises(ZeroDivisionError):
        work.throw(ZeroDivisionError())
    session.close()
    again = PruningSession.open(session.folder, dtype="float32")
    again.distill()
    assert same(again, whole)
    assert len(again.losses()) == len(whole.losses())
    assert not (again.folder / "checkpoint").exists()
    again.close()


def test_seeds_of_a_distillation(make):
    session = make()
    session.remove(2)
    found = []
    for seed in (1, 2, 1, None):
        session.distill(DistillConfig(seed=seed, learning_rate=1e-3))
        found.append(logits(session.student, session.tokenizer))
        assert session.journal.head.args["config"]["seed"] == (1000 if seed is None else seed)
        session.undo()
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], found[3])


def test_phases_follow_what_a_person_did(make):
    session = make()
    assert next_phase(session.path) == "measure"
    session.measure()
    assert next_phase(session.path) == "remove"
    session.remove()
    assert next_phase(session.path) == "evaluate removal"
    session.evaluate(speed=False)
    work = session.distill_steps()
    next(work)
    work.close()
    assert next_phase(session.path) == "distill"  # what was stopped part-way is not done
    session.distill()
    assert next_phase(session.path) == "evaluate"
    session.evaluate()
    assert next_phase(session.path) == "measure"


def test_stopping_keeps_what_was_trained(make):
    session = make()
    session.remove(2)
    pruned = logits(session.student, session.tokenizer)
    work = session.distill_steps()
    for _ in range(3):
        next(work)
    work.close()
    step = session.journal.head
    assert step.action == "distill" and step.result["stopped_at"] == 3
    assert not torch.equal(logits(session.student, session.tokenizer), pruned)
    assert not any(p.requires_grad for p in session.student.model.parameters())
    assert torch.equal(
        logits(session.student_at(step.step), session.tokenizer), logits(session.student, session.tokenizer)
    )


def test_closing_a_measure_leaves_everything(make):
    session = make()
    work = session.measure_steps()
    next(work)
    work.close()
    assert len(session.steps) == 1 and session.scores is None and len(session.student) == 6


def test_nan_loss_leaves_the_last_good_student(make, monkeypatch):
    from ildlab.errors import DistillError

    session = make()
    session.remove(2)
    before = logits(session.student, session.tokenizer)
    with pytest.raises(DistillError):
        session.distill(learning_rate=1e30, clip=None, warmup=0.0)
    assert torch.equal(logits(session.student, session.tokenizer), before)
    head = session.journal.head
    assert (head.action, head.args) == ("failed", {"action": "distill"}) and "finite" in head.result["error"]
    assert [f.signature for f in diagnose(session)] == ["not finite"]
    with pytest.raises(DistillError, match="scope"):  # a mistake is no failure of the run
        session.distill(scope="everything")
    assert session.journal.head == head
    session.distill()
    assert diagnose(session) == []
    session.undo()
    assert session.removed == [2]


def test_refusals_change_nothing(make, tmp_path, tiny_folder, text_file):
    session = make()
    with pytest.raises(SessionError, match="measure"):
        session.remove()
    with pytest.raises(SessionError, match="Layer 9 is not in the student"):
        session.remove(9)
    session.remove(0)
    with pytest.raises(SessionError, match="was removed"):
        session.remove(0)
    for goal in (0, 5, 6, -1):
        with pytest.raises(SessionError, match="target_layers"):
            session.run(target_layers=goal)
    with pytest.raises(SessionError, match="max_loss"):
        session.run(max_loss=1.5)
    with pytest.raises(SessionError, match="when to stop"):
        session.run()
    with pytest.raises(SuiteError, match="no suite 'mini77'"):
        session.run(target_layers=2, suite="mini77")
    with pytest.raises(SessionError, match="no step 99"):
        session.undo(to=99)
    assert [s.action for s in session.steps] == ["create", "remove"]

    def create(**changes):
        settings = {"text": str(text_file), **SETTINGS, **changes}
        return PruningSession.create(tmp_path / "other", str(tiny_folder), **settings)

    with pytest.raises(SessionError, match="has no 'layers'"):
        create(layers=3)
    with pytest.raises(SessionError, match="at least 2 blocks"):
        create(train_tokens=10)
    with pytest.raises(TextError):
        create(text=str(tmp_path / "nowhere.txt"))
    with pytest.raises(SuiteError, match="no suite 'mini77'"):
        create(suite="mini77")
    with pytest.raises(MeasureError, match="no metric 'magic'"):
        create(metric="magic")
    with pytest.raises(MeasureError, match="no option 'rase'"):
        create(measure={"rase": True})
    for wrong in ({"weights_dtype": "int8"}, {"block": "many"}, {"processes": 0}):
        with pytest.raises(SessionError, match=f"{next(iter(wrong))}="):
            create(**wrong)
    for distill, match in (
        ({"schedule": "cosin"}, "schedule"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"scope": "windw(2)"}, "scope"),
        ({"tokens": 1.5}, "tokens"),
    ):
        with pytest.raises(DistillError, match=match):
            create(distill=distill)
    assert not (tmp_path / "other").exists()
    with pytest.raises(JournalError, match="already holds a run"):
        make()


def test_nothing_to_distill_before_a_removal(make):
    session = make()
    with pytest.raises(SessionError, match="Nothing was removed"):
        session.distill()


def test_a_family_whose_config_cannot_describe_a_cut_is_refused_at_once(teacher, text_file, tmp_path):
    """Jamba's kinds of layers follow from a period: without one layer, all above it would be of another kind."""
    from transformers import JambaConfig, JambaForCausalLM

    config = JambaConfig(
        vocab_size=len(teacher.tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=2,
        mamba_d_state=4,
    )
    loaded = LoadedModel(JambaForCausalLM(config).eval().requires_grad_(False), teacher.tokenizer, "jamba")
    with pytest.raises(ExportError, match="by a rule, not by a list"):
        PruningSession.create(tmp_path / "run", loaded, text=str(text_file), **SETTINGS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("asked, stored", [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_a_teacher_that_bf16_does_not_hold(tiny, tiny_folder, text_file, tmp_path, asked, stored):
    from transformers import AutoTokenizer

    loaded = LoadedModel(tiny(5, vocab=320), AutoTokenizer.from_pretrained(tiny_folder), "fp32")
    settings = {"text": str(text_file), **SETTINGS, "weights_dtype": asked}
    with PruningSession.create(tmp_path / "run", loaded, **settings) as session:
        session.remove(1)
        session.distill(tokens=128)
        folder = session.export(tmp_path / "out")
        error = session.journal.head.result["logits_error"]
        assert error < (1e-5 if asked == "auto" else 5e-2)
        assert json.loads((folder / "config.json").read_text())["dtype"] == stored
        assert same(PruningSession.open(session.folder, loaded), session)


def test_another_teacher_is_refused(make, tiny, tiny_folder, tmp_path):
    from transformers import AutoTokenizer

    session = make()
    session.close()
    other = tmp_path / "other-teacher"
    tiny(6, vocab=320, hidden=32, seed=1).save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(other)
    with pytest.raises(JournalError, match="another teacher"):
        PruningSession.open(session.folder, str(other))
    PruningSession.open(session.folder).close()


def test_export_is_a_plain_checkpoint(make, tmp_path):
    from transformers import AutoModelForCausalLM

    session = make()
    session.run(target_layers=4)
    path = session.export(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert model.config.num_hidden_layers == 4
    ids = session.tokenizer("import os", return_tensors="pt").input_ids
    want = session.student.model(ids, use_cache=False).logits
    assert torch.allclose(model(ids, use_cache=False).logits, want, atol=1e-5)
    assert "Removed, in order" in (path / "README.md").read_text()
    assert json.loads((path / "ildlab.json").read_text())["removed"] == session.removed
    assert session.steps[-1].result["verdict"].startswith("4 layers")
    # An exported student may itself be a teacher, and remembers its layer ids.
    from ildlab.model.load import load_model
    from ildlab.model.stack import LayerStack

    assert LayerStack(load_model(path).model).layer_ids == session.student.layer_ids
    with pytest.raises(ExportError, match="not an empty folder"):
        session.export(path)


def test_the_verdict_on_the_cache_allows_for_rounding_alone(tiny):
    from ildlab.session.doctor import same_but_for_rounding

    model = tiny(3)
    one = torch.tensor([5, 6, 7, 8])
    logits = model(input_ids=one[None, :2]).logits[0, -1].float()
    best, worst = int(logits.argmax()), int(logits.argmin())
    parted = [torch.tensor([5, 6, token, 9]) for token in (best, worst)]
    assert same_but_for_rounding(model, one, one, 1e-5)
    assert not same_but_for_rounding(model, *parted, 2e-2)
    second = int(logits.topk(2).indices[1])
    gap = float((logits[best] - logits[second]) / logits.abs().max())
    close = [torch.tensor([5, 6, token, 9]) for token in (best, second)]
    assert same_but_for_rounding(model, *close, 1.01 * gap) and not same_but_for_rounding(model, *close, 0.99 * gap)
    assert not same_but_for_rounding(model, one, one[:3], 1e-5)


def test_export_refuses_a_checkpoint_that_is_not_the_student(make, tmp_path, monkeypatch):
    from ildlab.session import export

    session = make()
    session.remove(2)
    plain = export.save

    def forgetful(stack, tokenizer, folder, dtype, **kwargs):
        plain(stack, tokenizer, folder, dtype, **kwargs)
        config = json.loads((folder / "config.json").read_text())
        config["num_hidden_layers"] += 1
        (folder / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(export, "save", forgetful)
    with pytest.raises(ExportError, match="missing_keys"):
        session.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]


KILLER = """
import json, os, re, signal, sys
import accelerate, transformers.models.llama  # once, for all children
from ildlab.model.load import LoadedModel
from ildlab.session.session import PruningSession

for folder, phase, times in json.loads(sys.argv[1]):
    out, into = os.pipe()
    child = os.fork()
    if not child:
        session = PruningSession.open(folder, dtype="float32")
        for progress in session.run_steps(target_layers=4):
            os.write(into, (progress.note + chr(10)).encode())
        os._exit(0)
    os.close(into)
    for line in os.fdopen(out):  # the child goes on meanwhile: it dies wherever it is
        times -= re.search(f": {phase} [0-9]", line) is not None
        if not times:
            os.kill(child, signal.SIGKILL)
            break
    status = os.waitpid(child, 0)[1]
    print(phase, "killed" if os.WIFSIGNALED(status) else "ended", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigkill_in_each_phase(make):
    """A killed process loses the step in hand; the run ends as an unbroken one does."""
    each_step = {
        "distill": {"learning_rate": 1e-3, "checkpoint_every": 1},
        "train_tokens": 16 * 32,
        "eval_tokens": 4 * 32,
    }
    session = make("unbroken", **each_step)
    work = session.run_steps(target_layers=4)
    next(progress for progress in work if "5 layers: measure" in progress.note)  # there is something to lose by now
    work.close()
    phases = {"measure": 1, "evaluate removal": 1, "distill": 3, "evaluate": 1}
    folders = {phase: session.folder.parent / phase for phase in phases}
    for folder in folders.values():
        shutil.copytree(session.folder, folder)
    session.run()
    plan = json.dumps([(str(folders[phase]), phase, times) for phase, times in phases.items()])
    done = subprocess.run(
        [sys.executable, "-c", KILLER, plan],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.stdout.split("\n")[:-1] == [f"{phase} killed" for phase in phases], done.stderr[-3000:]
    for folder in folders.values():
        steps = len((folder / "journal.jsonl").read_text().splitlines())
        again = PruningSession.open(folder, dtype="float32")
        assert len(again.steps) == steps  # every whole step is there
        again.run()  # goes on with the earlier settings
        assert again.removed == session.removed
        assert len(again.losses()) == len(session.losses())
        # The child had one thread: sums come out in another order.
        torch.testing.assert_close(
            logits(again.student, again.tokenizer), logits(session.student, session.tokenizer), rtol=0, atol=0.05
        )
        again.close()


def test_create_costs_one_proof_and_undo_no_pass(make, monkeypatch):
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    calls = {"model": 0, "layer": 0}
    for cls, name in ((LlamaForCausalLM, "model"), (LlamaDecoderLayer, "layer")):
        plain = cls.forward

        def forward(self, *args, name=name, plain=plain, **kwargs):
            calls[name] += name == "model" or self.self_attn.layer_idx == 0
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", forward)
    session = make()
    # The replay is proven (3), and that the whole, and a student without its middle layer, can be saved.
    assert 0 < calls["model"] <= 12 and 0 < calls["layer"] <= 12
    session.remove(2)
    calls.update(model=0, layer=0)
    session.undo()
    branch = session.branch(session.folder.parent / "branch", 1)
    assert branch.removed == [2] and calls == {"model": 0, "layer": 0}
    for each in (session, branch):
        each.close()
    PruningSession.open(session.folder, dtype="float32").close()
    assert 0 < calls["model"] <= 4


def test_a_plain_call_has_the_signature_and_the_words_of_its_generator():
    import inspect

    for name in ("measure", "distill", "evaluate", "run"):
        call, steps = getattr(PruningSession, name), getattr(PruningSession, f"{name}_steps")
        own, theirs = inspect.signature(call), inspect.signature(steps)
        assert call.__name__ == name and call.__doc__ == steps.__doc__
        assert set(own.parameters) == {*theirs.parameters, "show"}
        assert f"Work[{own.return_annotation}]" == theirs.return_annotation


def test_the_journal_names_the_text_of_each_step(make):
    session = make()
    session.measure()
    session.remove()
    session.distill(tokens=64)
    session.evaluate(speed=False, canaries=False)
    used = {step.action: step.result["text"] for step in session.steps if "text" in step.result}
    assert used["create"]["calibration"] == used["measure"]
    for action, split in (("measure", "calibration"), ("distill", "train"), ("evaluate", "eval")):
        blocks = session.text(split, tokens=64)
        opened = list(getattr(blocks, "bos", ()))
        assert used[action] == {"source": blocks.source, "fingerprint": blocks.fingerprint, "bos": opened}
    assert len({text["fingerprint"] for action, text in used.items() if action != "create"}) == 3


def test_none_is_the_runs_suite_false_is_none_and_a_name_is_another(make):
    session = make(suite="mini7@1")
    found = []
    for suite in (None, False, "mini7@2"):
        scored = session.evaluate(suite, speed=False, canaries=False).suite
        found.append((session.steps[-1].args["suite"], scored and scored.name))
    assert found == [("mini7@1", "mini7"), (None, None), ("mini7@2", "mini7")]


def test_the_teacher_is_timed_anew_beside_each_student(make, monkeypatch):
    from ildlab.evaluate import record

    session = make()
    session.evaluate(canaries=False)
    session.remove(2)
    earlier = session.steps[1].result["evaluation"]
    monkeypatch.setitem(earlier, "teacher_tokens_per_second", 1e9)  # as of another machine
    found = session.evaluate(canaries=False)
    assert found.teacher_tokens_per_second < 1e8
    assert not [name for name in record.Evaluation.from_dict(earlier).teacher_record() if "second" in name]


def test_both_tables_call_a_student_the_same(make):
    """Pruned until it is distilled, and after the next removal again; a distillation that was stopped counts."""
    session = make()
    session.evaluate(speed=False)

    def said():
        row = session.history().iloc[-1]
        told = {"student": row["perplexity"], "pruned": row["perplexity_pruned"]}
        names = set(task_table(session).columns) & set(told)
        assert names == {name for name, perplexity in told.items() if perplexity == perplexity}
        return names

    for layer_id in (1, 3):
        session.remove(layer_id)
        session.evaluate(speed=False)
        assert said() == {"pruned"}
    work = session.distill_steps()
    next(work)
    work.close()
    session.evaluate(speed=False, undistilled=False)
    assert said() == {"pruned", "student"}


def test_two_processes_give_the_curve_of_one(make, monkeypatch):
    from ildlab.distill import processes

    launched, real = [], processes._launch
    monkeypatch.setattr(processes, "_launch", lambda folder, count: launched.append(count) or real(folder, count))
    one, two = make("one"), make("two", processes=2)
    for session in (one, two):
        session.remove(2)
        session.distill(tokens=4 * 4 * 32, local_tokens=0)
    assert launched == [2]  # one process is this one
    assert list(two.losses()["kl"]) == pytest.approx(list(one.losses()["kl"]), rel=1e-3)
    assert [session.journal.head.args.pop("processes") for session in (one, two)] == [1, 2]
    assert two.journal.head.args == one.journal.head.args
    assert two.journal.head.result["tokens"] == one.journal.head.result["tokens"] == 4 * 4 * 32
    assert two.journal.tensors_at(2).keys() == one.journal.tensors_at(2).keys()
    assert not any(p.requires_grad for p in two.student.model.parameters())
    two.close()
    with PruningSession.open(two.folder, dtype="float32") as again:
        assert same(again, two)
        again.undo()
        again.distill(processes=1, tokens=4 * 32)
        assert launched == [2] and again.journal.head.args["processes"] == 1
    with pytest.raises(SessionError, match="processes=0"):
        one.distill(processes=0)


def test_a_run_of_an_older_version_opens_with_a_word_on_its_teacher(make):
    session = make()
    session.close()
    file = session.folder / "config.json"
    config = json.loads(file.read_text())
    config |= {"ildlab_run": 1, "fingerprint": "another way to name it"}
    config["settings"]["heal"] = True  # a setting that is no more
    file.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="older ildlab"):
        PruningSession.open(session.folder, dtype="float32").close()
    config["layers"] = 5
    file.write_text(json.dumps(config))
    with pytest.raises(JournalError, match="another teacher"):
        PruningSession.open(session.folder, dtype="float32")


def test_settings_survive(make):
    session = make(seed=7, metric="block_influence", measure={}, suite=None)
    assert isinstance(session.config, SessionConfig)
    session.close()
    again = PruningSession.open(session.folder)
    assert again.config == session.config
    again.close()
