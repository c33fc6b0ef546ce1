"""Suites, aggregates, quality loss, kept results, and the ablation of a suite's score."""

import gzip
import json
import time

import numpy as np
import pytest
import torch

from ildlab import measure
from ildlab.errors import MeasureError, SuiteError
from ildlab.evaluate.results import SuiteResult, TaskResult, compare, quality_loss
from ildlab.evaluate.suites import Suite, load_suite, score_suite
from ildlab.evaluate.tasks import Task
from ildlab.model.stack import LayerStack


@pytest.fixture(scope="module")
def stack(tiny, teacher):
    return LayerStack(tiny(4, vocab=len(teacher.tokenizer)))


def result(name="s", fingerprint="f", **values) -> SuiteResult:
    tasks = {k: TaskResult(k, "cloze", "exact", list(v), chance=0.25) for k, v in values.items()}
    return SuiteResult(name, fingerprint, tasks)


def test_shipped_suites_load_and_have_seven_tasks():
    mini = load_suite("mini7")
    assert len(mini.tasks) == 7
    assert all(len(task.rows) >= 120 for task in mini.tasks)
    assert load_suite(mini, limit=3).tasks[0].rows == mini.tasks[0].rows[:3]
    assert mini.fingerprint != mini.take(3).fingerprint
    assert load_suite("mini7").fingerprint == mini.fingerprint
    assert {task.name for task in load_suite("canaries").tasks} == {"copying", "arithmetic", "brackets"}


def test_aggregate_is_the_mean_over_tasks_not_examples():
    found = result(a=[1, 1, 1, 1], b=[0, 1])
    assert found.aggregate == pytest.approx(0.75)
    assert found.aggregate_corrected == pytest.approx((1 + (0.5 - 0.25) / 0.75) / 2)
    low = TaskResult("bits", "bits_per_byte", "bits_per_byte", [1.0, 2.0], [3.0, 1.0], 8.0, "lower")
    assert low.score == pytest.approx(1.25)
    assert low.share == low.corrected == pytest.approx(1 - 1.25 / 8)


def test_quality_loss_and_its_intervals():
    rng = np.random.default_rng(0)
    teacher = result(a=rng.random(200) < 0.8, b=rng.random(200) < 0.8)
    student = result(**{k: np.array(t.values) * (rng.random(200) < 0.75) for k, t in teacher.tasks.items()})
    loss = quality_loss(student, teacher)
    assert loss.value == pytest.approx(1 - student.aggregate / teacher.aggregate)
    assert loss.low < loss.value < loss.high
    assert loss.high - loss.low < 0.15  # paired: the teacher's own noise drops out
    assert quality_loss(teacher, teacher).value == quality_loss(teacher, teacher).high == 0
    assert quality_loss(student, teacher, corrected=True).value > loss.value
    with pytest.raises(SuiteError, match="not of the same tasks"):
        quality_loss(result(fingerprint="g", a=[1]), teacher)


def test_rows_that_chose_layers_can_be_left_out():
    student, teacher = result(a=[0, 0, 1, 1], b=[0, 1, 1, 1]), result(a=[1, 1, 1, 1], b=[1, 1, 1, 1])
    assert student.aggregate == 0.625
    assert student.after(2).aggregate == 1 and student.after(0).aggregate == student.aggregate
    assert quality_loss(student.after(2), teacher.after(2)).value == 0
    with pytest.raises(SuiteError, match="not of the same tasks and rows"):
        quality_loss(student.after(2), teacher)
    with pytest.raises(SuiteError, match="task a has 4 examples; none is left"):
        student.after(4)


def test_bootstrap_interval_against_the_binomial():
    found = result(a=[1] * 80 + [0] * 20).interval()
    spread = 1.96 * np.sqrt(0.8 * 0.2 / 100)
    assert found.low == pytest.approx(0.8 - spread, abs=0.02)
    assert found.high == pytest.approx(0.8 + spread, abs=0.02)


def test_intervals_of_few_examples_are_as_wide_as_students_t():
    from ildlab.stats import expansion, means, resamples

    values = [0.2, 0.4, 0.9, 0.5]
    found = result(a=values).tasks["a"].interval()
    plain = np.percentile(means(resamples(4), np.array(values)[:, None], np.ones(4))[:, 0], 97.5)
    assert found.high - found.value == pytest.approx((plain - found.value) * expansion(4, 0.025), rel=1e-6)
    assert np.isnan(result(a=[0.5], b=[0.2]).interval().low)  # one example a task says nothing of its spread
    several, one = (result(**{k: values for k in names}).interval() for names in ("abcdefg", "a"))
    assert (one.high - one.low) / (several.high - several.low) > 7**0.5  # each task adds its degrees of freedom


def test_results_survive_json_and_show_themselves():
    found = result(a=[1, 0, 1], b=[0.5])
    again = SuiteResult.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    assert "aggregate" in found._repr_html_() and "<table" in found._repr_html_()
    table = compare(teacher=found, pruned=again)
    assert table.loc["aggregate", "pruned - teacher"] == 0


def test_results_are_kept_by_model_and_suite(stack, teacher, tmp_path, monkeypatch):
    suite = load_suite("mini7", limit=2)
    first = score_suite(stack, teacher.tokenizer, suite, cache=tmp_path)
    import ildlab.evaluate.suites as module

    monkeypatch.setattr(module, "score_steps", None)  # a second scoring would fail
    again = score_suite(stack, teacher.tokenizer, suite, cache=tmp_path)
    assert {k: t.score for k, t in again.tasks.items()} == pytest.approx(
        {k: t.score for k, t in first.tasks.items()}, abs=1e-5
    )


def test_local_files_are_suites(tmp_path):
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"query": "q", "choices": ["a", "b", "c"], "gold": 1}) + "\n")
    pair = {"context_options": ["Ann was", "Ann were"], "continuation": "here.", "gold": 0}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    suite = load_suite(f"file:{tmp_path / 'quiz.jsonl'},{tmp_path / 'pairs.jsonl'}")
    assert [task.kind for task in suite.tasks] == ["multiple_choice", "multiple_choice"]
    assert [task.chance for task in suite.tasks] == pytest.approx([1 / 3, 1 / 2])
    assert suite.swept


CLOZE = {"context": "Où est le café", "continuation": "là"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_suites_and_their_rows_in_what_a_byte_order_mark_says(tmp_path, encoding):
    (tmp_path / "q.jsonl").write_bytes((json.dumps(CLOZE, ensure_ascii=False) + "\r\n").encode(encoding))
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress((tmp_path / "q.jsonl").read_bytes()))
    (tmp_path / "s.yaml").write_bytes("name: été\ntasks: [{name: a, file: q.jsonl}]\n".encode(encoding))
    suite = load_suite(tmp_path / "s.yaml")
    assert suite.name == "été" and suite.tasks[0].rows == (CLOZE,)
    assert load_suite(f"file:{tmp_path}/q.jsonl,{tmp_path}/q.jsonl.gz").tasks[1].rows == (CLOZE,)


def test_suites_and_rows_in_another_encoding_are_refused_by_name(tmp_path):
    (tmp_path / "s.yaml").write_bytes("name: été\ntasks: [{name: a, file: q.jsonl}]".encode("latin1"))
    with pytest.raises(SuiteError, match="s.yaml cannot be read: byte 0xE9 at offset 6 .*'été' in windows-1252"):
        load_suite(tmp_path / "s.yaml")
    row = json.dumps(CLOZE, ensure_ascii=False)
    for encoding, message in {"latin1": "byte 0xF9 at offset 14", "utf-16le": "iconv -f utf-16le -t utf-8"}.items():
        (tmp_path / "q.jsonl").write_bytes(row.encode(encoding))
        with pytest.raises(SuiteError, match=f"q.jsonl cannot be read: .*{message}"):
            load_suite(f"file:{tmp_path}/q.jsonl")
    (tmp_path / "q.jsonl").write_text(json.dumps(CLOZE | {"context": "\ud800"}))
    with pytest.raises(SuiteError, match="q.jsonl line 1: it holds half a character"):
        load_suite(f"file:{tmp_path}/q.jsonl")


def test_a_comma_in_a_path_that_is_there_separates_nothing(tmp_path):
    (tmp_path / "mine, all").mkdir()
    files = [tmp_path / name for name in ("a.jsonl", "a.jsonl,b.jsonl", "mine, all/c,d.jsonl", "e@3")]
    for file in files:
        file.write_text(json.dumps({"context": file.name, "continuation": "x"}) + "\n")

    def read(names):
        return [task.rows[0]["context"] for task in load_suite(f"file:{names}").tasks]

    for file in files:
        assert read(file) == [file.name]
    assert read(f"{files[2]}, {files[0]}") == ["c,d.jsonl", "a.jsonl"]
    assert read(f"{files[3]},{files[2]}@1") == ["e@3", "c,d.jsonl"]
    with pytest.raises(SuiteError, match="absent.jsonl cannot be read"):
        load_suite(f"file:{files[2]},{tmp_path}/absent.jsonl,{files[0]}")


@pytest.mark.parametrize(
    "text, message",
    [
        ("tasks: [", "not YAML"),
        ("name: x", "list `tasks:`"),
        ("tasks: [{name: a}]", "task 1: a task needs"),
        ("tasks: [{name: a, file: q.jsonl, weigth: 2}]", "unknown setting weigth"),
        ("tasks: [{name: a, file: q.jsonl, kind: quiz}]", "kind 'quiz' does not exist"),
        ("tasks: [{name: a, file: absent.jsonl}]", "absent.jsonl cannot be read"),
        ("tasks: [{name: a, file: q.jsonl, chance: 1/4}]", "'a': chance='1/4': it must be a number"),
        ("tasks: [{name: a, file: q.jsonl, fewshot: 1.5}]", "'a': fewshot=1.5: it must be a whole number"),
        ("tasks: [{name: a, file: q.jsonl}, {name: a, file: q.jsonl}]", "different names"),
    ],
)
def test_bad_suite_files(tmp_path, text, message):
    (tmp_path / "q.jsonl").write_text(json.dumps({"context": "a", "continuation": "b"}) + "\n")
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(SuiteError, match=message):
        load_suite(tmp_path / "suite.yaml")


def test_settings_of_a_suite_file(tmp_path):
    rows = [{"context": f"{n} and 1 is", "continuation": str(n + 1), "source": "mine"} for n in range(6)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = "tasks: [{name: a, file: q.jsonl, fewshot: 4}]"
    (tmp_path / "suite.yaml").write_text(spec)
    (task,) = load_suite(f"{tmp_path / 'suite.yaml'}@2").tasks
    assert len(task.rows) == 2 and task.prompt(0, "").count("\n\n") == 4  # the shots come from all rows
    assert set(task.rows[0]) == {"context", "continuation"}  # what its kind does not know is left out


def test_a_column_too_many_changes_no_score(tmp_path, stack, teacher):
    """Rows are asked by their kind: a cloze row with choices beside it is a cloze row."""
    row = {"context": "2 and 2 is", "continuation": "4", "choices": ["4", "5"], "gold": "4"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    suite = load_suite(f"file:{tmp_path / 'q.jsonl'}")
    assert score_suite(stack, teacher.tokenizer, suite).tasks["q"].kind == "cloze"
    assert measure(stack, None, "task", suite=suite, tokenizer=teacher.tokenizer).details["whole"] >= 0


def test_unknown_suite_names_those_that_ship():
    with pytest.raises(SuiteError, match="canaries, mini7"):
        load_suite("mini8")
    with pytest.raises(SuiteError, match="at least one example"):
        load_suite("mini7", limit=0)


def test_contexts_that_do_not_fit_are_reported(tiny, teacher):
    stack = LayerStack(tiny(3, vocab=len(teacher.tokenizer)))  # a window of 256 tokens
    rows = ({"context": "word " * 400, "continuation": "end"}, {"context": "word", "continuation": "end"})
    found = score_suite(stack, teacher.tokenizer, Suite("long", (Task("far", "cloze", rows),)))
    assert found.tasks["far"].truncated == 1
    assert found.notes == ["far: 1 contexts were cut from the left to 256 tokens."]


def test_a_smaller_suite_keeps_its_few_shot_examples():
    rows = tuple({"context": f"{n} and 1 is", "continuation": str(n + 1)} for n in range(8))
    task = Task("sums", "cloze", rows, fewshot=3)
    small = task.take(1)
    assert small.prompt(0, "x") == task.prompt(0, "x") and small.prompt(0, "x").count("\n\n") == 3
    with pytest.raises(SuiteError, match="only 7 examples"):  # itself aside
        Task("sums", "cloze", rows, fewshot=8)


def test_a_teacher_that_can_do_nothing_is_an_error():
    zero = SuiteResult("s", "f", {"t": TaskResult("t", "cloze", "exact", [0.0, 0.0])})
    with pytest.raises(SuiteError, match="no quality to lose"):
        quality_loss(zero, zero)


# -------------------------------------------------------- task ablation


def test_task_ablation_equals_separate_runs_of_pruned_models(stack, teacher):
    suite = load_suite("mini7", limit=2)
    started = time.perf_counter()
    scores = measure(stack, None, "task", suite=suite, tokenizer=teacher.tokenizer)
    took = time.perf_counter() - started
    assert took / 2 < scores.seconds < took  # the work, not the arithmetic at its end
    assert set(scores.details["truncated"]) == {task.name for task in suite.tasks}
    whole = score_suite(stack, teacher.tokenizer, suite)
    assert scores.details["whole"] == pytest.approx(whole.aggregate, abs=1e-12)
    for layer_id in stack.layer_ids:
        pruned = stack.share()
        pruned.remove(layer_id)
        want = score_suite(pruned, teacher.tokenizer, suite)
        assert scores.table.score[layer_id] == pytest.approx(whole.aggregate - want.aggregate, abs=1e-12)


def test_race_keeps_the_least_important_layer(tiny, teacher):
    model = tiny(4, vocab=len(teacher.tokenizer))
    for name, parameter in model.model.layers[2].named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.zero_()  # layer 2 does nothing: no other can be less important
    stack = LayerStack(model)
    rows = []
    for i in range(64):  # what the model itself says is right, so that every change hurts
        ids = torch.tensor([[i + 300, i + 900]])
        best = int(stack.model(input_ids=ids).logits[0, -1].argmax())
        rows.append((teacher.tokenizer.decode(ids[0]), teacher.tokenizer.decode([best])))
    task = Task(
        "own", "cloze", tuple({"context": c, "continuation": a or "x"} for c, a in rows if a.strip()), delimiter=""
    )
    suite = Suite("own", (task,))
    raced = measure(stack, None, "task", suite=suite, tokenizer=teacher.tokenizer, race=True, tie=0.0)
    full = measure(stack, None, "task", suite=suite, tokenizer=teacher.tokenizer)
    assert full.least_important == raced.least_important == 2
    assert raced.table.n.min() < full.table.n.min()
    assert raced.details["dropped"]


def test_task_ablation_needs_suite_and_tokenizer(stack):
    with pytest.raises(MeasureError, match="needs the tokenizer"):
        measure(stack, None, "task", suite="mini7")
    with pytest.raises(MeasureError, match="needs a suite"):
        measure(stack, None, "task")
