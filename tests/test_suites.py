"""Suites, aggregates, quality loss, kept results, and the ablation of a suite's score."""

import json
import time

import numpy as np
import pytest
import torch

from ildlab import measure
from ildlab.errors import MeasureError, SuiteError
from ildlab.evaluate.results import SuiteResult, TaskResult, compare, quality_loss
from ildlab.evaluate.suites import Suite, load_suite, model_fingerprint, score_suite
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


def test_bootstrap_interval_against_the_binomial():
    found = result(a=[1] * 80 + [0] * 20).interval()
    spread = 1.96 * np.sqrt(0.8 * 0.2 / 100)
    assert found.low == pytest.approx(0.8 - spread, abs=0.02)
    assert found.high == pytest.approx(0.8 + spread, abs=0.02)


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
    mark = model_fingerprint(stack, teacher.tokenizer)
    with stack.without(2):
        assert model_fingerprint(stack, teacher.tokenizer) != mark
    assert model_fingerprint(stack.share(), teacher.tokenizer) == mark
    own = stack.share()
    own.own([1])
    with torch.no_grad():
        next(own.layers[1].parameters()).flatten()[0] += 1e-3
    assert model_fingerprint(own, teacher.tokenizer) != mark


def test_local_files_are_suites(tmp_path):
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"query": "q", "choices": ["a", "b", "c"], "gold": 1}) + "\n")
    (tmp_path / "book.txt").write_text("Some words of a book.\n")
    suite = load_suite(f"file:{tmp_path / 'quiz.jsonl'},{tmp_path / 'book.txt'}")
    assert [task.kind for task in suite.tasks] == ["multiple_choice", "bits_per_byte"]
    assert suite.tasks[0].chance == pytest.approx(1 / 3)
    assert suite.tasks[1].direction == "lower"


@pytest.mark.parametrize(
    "text, message",
    [
        ("tasks: [", "not YAML"),
        ("name: x", "list `tasks:`"),
        ("tasks: [{name: a}]", "task 1: a task needs"),
        ("tasks: [{name: a, file: q.jsonl, weigth: 2}]", "unknown settings weigth"),
        ("tasks: [{name: a, file: q.jsonl, kind: quiz}]", "kind 'quiz' does not exist"),
        ("tasks: [{name: a, file: absent.jsonl}]", "absent.jsonl cannot be read"),
        ("tasks: [{name: a, file: q.jsonl, chance: 1/4}]", "'a': chance: '1/4' is not a number"),
        ("tasks: [{name: a, file: q.jsonl, fewshot: 1.5}]", "'a': fewshot: 1.5 is not a whole number"),
        ("tasks: [{name: a, file: q.jsonl, limit: -1}]", "limit: -1 leaves no example"),
        ("tasks: [{name: a, file: q.jsonl, stop: [1]}]", "stop: .* is not a text"),
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
    spec = "tasks: [{name: a, file: q.jsonl, limit: 2, fewshot: 4, stop: END}]"
    (tmp_path / "suite.yaml").write_text(spec)
    (task,) = load_suite(tmp_path / "suite.yaml").tasks
    assert task.stop == ("END",)
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


# ------------------------------------------------------------- hub tasks


def parquet_branch(root, name, configs):
    """The branch that the Hub makes of a data set: config/split/0000.parquet, and no card."""
    from datasets import Dataset

    for config, splits in configs.items():
        for split, rows in splits.items():
            file = root / name / config / split / "0000.parquet"
            file.parent.mkdir(parents=True)
            Dataset.from_list(rows).to_parquet(file)


def stand_in(root, name, configs):
    """A local copy of a Hub data set: jsonl files and the card that names them."""
    folder = root / name
    folder.mkdir(parents=True)
    card = ["---", "configs:"]
    for config, splits in configs.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            file = f"{config}-{split}.jsonl"
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
            card += [f"  - split: {split}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


def test_paper7_on_local_stand_ins_of_the_same_schema(tmp_path, stack, teacher, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yaml = load_yaml("paper7")
    subjects = next(t for t in yaml["tasks"] if t["name"] == "mmlu_en")["hub"]["names"]
    assert len(subjects) == 57
    question = [
        {
            "question_en": f"Question {i}?",
            "choices_en": ["w", "x", "y", "z"],
            "answer": i % 4,
            "question_ru": f"Вопрос {i}?",
            "choices_ru": ["а", "б", "в", "г"],
        }
        for i in range(6)
    ]
    examples = [{**row, "question_en": f"Example {i}?"} for i, row in enumerate(question[:5])]
    for name in ("mmlu_en", "mmlu_ru"):
        parquet_branch(tmp_path, f"NLPCoreTeam/{name}", {s: {"test": question, "dev": examples} for s in subjects[:2]})
    summary = [{"src_sents": ["Одно.", "Два."], "summary_sents": ["Три."]}] * 6
    stand_in(tmp_path, "dichspace/daru_treeway_eval", {"default": {"test": summary[:1], "prompt": summary}})
    text = [{"inputs": {"text": f"Текст номер {i} для копии."}} for i in range(6)]
    flores = [{"inputs": {"en": "A cat.", "ru": "Кот."}}] * 6
    stand_in(
        tmp_path,
        "RefalMachine/darumeru",
        {
            n: {"test": r[:1], "prompt": r}
            for n, r in {"cp_doc_ru": text, "cp_para_ru": text, "flores": flores}.items()
        },
    )
    for task in yaml["tasks"]:
        if "names" in task["hub"]:
            task["hub"]["names"] = subjects[:2]
        task["max_new_tokens"] = 3 if "max_new_tokens" in task else None
        task = {k: v for k, v in task.items() if v is not None}
    import yaml as library

    file = tmp_path / "paper7.yaml"
    yaml["tasks"] = [{k: v for k, v in task.items() if v is not None} for task in yaml["tasks"]]
    file.write_text(library.safe_dump(yaml))
    suite = load_suite(file, hub_root=tmp_path, limit=4)
    assert [task.name for task in suite.tasks] == [
        "mmlu_en",
        "mmlu_ru",
        "summary_ru",
        "copy_document_ru",
        "copy_paragraph_ru",
        "en_ru",
        "ru_en",
    ]
    mmlu = suite.tasks[0]
    prompt = mmlu.prompt(0, mmlu.rows[0]["query"])
    assert prompt.startswith("The following are multiple choice questions (with answers) about abstract algebra.")
    assert prompt.count("Answer:") == 6 and prompt.endswith("Question 0?\nA. w\nB. x\nC. y\nD. z\nAnswer:")
    found = score_suite(stack, teacher.tokenizer, suite)
    assert set(found.tasks) == {task.name for task in suite.tasks}
    assert 0 <= found.aggregate <= 1


def load_yaml(name):
    import yaml

    from ildlab.files import data_dir

    return yaml.safe_load((data_dir() / "suites" / f"{name}.yaml").read_text(encoding="utf-8"))


def test_hub_out_of_reach_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "s.yaml").write_text(
        "tasks: [{name: a, kind: cloze, hub: {path: nobody/nothing, split: test}, "
        "fields: {context: '{a}', continuation: '{b}'}}]"
    )
    with pytest.raises(SuiteError, match="nobody/nothing.*is not in"):
        load_suite(tmp_path / "s.yaml", hub_root=tmp_path)
    monkeypatch.setenv("ILDLAB_HUB_ROOT", str(tmp_path))
    with pytest.raises(SuiteError, match="nobody/nothing.*is not in"):
        load_suite(tmp_path / "s.yaml")
    monkeypatch.delenv("ILDLAB_HUB_ROOT")
    import datasets

    def offline(*_, **__):
        raise ConnectionError  # with no message at all

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(SuiteError, match="(?s)could not be loaded: ConnectionError.*hub_root"):
        load_suite(tmp_path / "s.yaml")


def test_contexts_that_do_not_fit_are_reported(tiny, teacher):
    stack = LayerStack(tiny(3, vocab=len(teacher.tokenizer)))  # a window of 256 tokens
    rows = ({"context": "word " * 400, "continuation": "end"}, {"context": "word", "continuation": "end"})
    found = score_suite(stack, teacher.tokenizer, Suite("long", (Task("far", "cloze", rows),)))
    assert found.tasks["far"].truncated == 1
    assert found.notes == ["far: 1 contexts were cut from the left to 256 tokens."]


def test_a_smaller_suite_keeps_its_few_shot_examples():
    rows = tuple({"context": f"{n} and 1 is", "continuation": str(n + 1), "group": "ab"[n % 2]} for n in range(8))
    task = Task("sums", "cloze", rows, fewshot=3)
    small = task.take(1)
    assert small.prompt(0, "x") == task.prompt(0, "x") and small.prompt(0, "x").count("\n\n") == 3
    with pytest.raises(SuiteError, match="only 3 examples"):  # of its group, itself aside
        Task("sums", "cloze", rows, fewshot=4)


def test_a_teacher_that_can_do_nothing_is_an_error():
    zero = SuiteResult("s", "f", {"t": TaskResult("t", "cloze", "exact", [0.0, 0.0])})
    with pytest.raises(SuiteError, match="no quality to lose"):
        quality_loss(zero, zero)


# -------------------------------------------------------- task ablation


def test_task_ablation_equals_separate_runs_of_pruned_models(stack, teacher):
    text = tuple({"text": f"The {word} stood by the river for a hundred years."} for word in ("mill", "old oak"))
    # Bits per byte are numbers of their own for each layer, where right and wrong may agree by luck.
    bits = Task("text", "bits_per_byte", text, chance=24.0, direction="lower")
    suite = Suite("both", (*load_suite("mini7", limit=2).tasks, bits))
    started = time.perf_counter()
    scores = measure(stack, None, "task", suite=suite, tokenizer=teacher.tokenizer)
    took = time.perf_counter() - started
    assert took / 2 < scores.seconds < took  # the work, not the arithmetic at its end
    assert scores.table.score.nunique() == len(stack)
    assert set(scores.details["truncated"]) == {task.name for task in suite.tasks}
    whole = score_suite(stack, teacher.tokenizer, suite)
    assert scores.details["whole"] == pytest.approx(whole.aggregate, abs=1e-12)
    for layer_id in stack.layer_ids:
        pruned = stack.share()
        pruned.remove(layer_id)
        want = score_suite(pruned, teacher.tokenizer, suite)
        assert scores.table.score[layer_id] == pytest.approx(whole.aggregate - want.aggregate, abs=1e-12)
    assert scores.details["layer_passes"] == 4 + 4 * 3 / 2  # trunk, and each layer's branch above it


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
    from ildlab.evaluate.tasks import Task

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
