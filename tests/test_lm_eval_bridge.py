"""lm-eval: log-likelihoods equal to its own, its tasks of any kind as suites, and the paper's suite on stand-ins."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

import datasets
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from ildlab import measure
from ildlab.errors import MeasureError, SuiteError
from ildlab.evaluate.lm_eval import load_tasks
from ildlab.evaluate.loglikelihood import encode, score_steps, window
from ildlab.evaluate.results import quality_loss
from ildlab.evaluate.suites import Suite, load_suite, score_suite
from ildlab.files import data_dir
from ildlab.model.generate import greedy
from ildlab.model.stack import LayerStack
from ildlab.progress import drive

HELDOUT = Path(__file__).resolve().parents[2] / "shared" / "heldout"


@pytest.fixture(scope="module")
def stack(tiny, teacher):
    return LayerStack(tiny(3, vocab=len(teacher.tokenizer)))


@pytest.fixture(autouse=True)
def data_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def hflm(model, tokenizer):
    # A log-softmax in fp64: HFLM's default sums fp32 terms in an order that is off by some 1e-5 a token.
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, softmax_dtype="float64")


def write_task(folder: Path, name: str, rows: list[dict], **settings) -> None:
    """A task of lm-eval's whose rows lie beside it."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
    config = {"task": name, **data, "test_split": "test", **settings}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


def metric(name: str) -> dict:
    return {"metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True}]}


def equal_to_hflm(teacher, pairs):
    stack = LayerStack(teacher.model)
    contexts = list(dict.fromkeys(context for context, _ in pairs))
    encoded = encode(teacher.tokenizer, pairs, window(stack, teacher.tokenizer))
    mine = drive(score_steps(stack, encoded, [contexts.index(context) for context, _ in pairs]))
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    theirs = hflm(teacher.model, teacher.tokenizer).loglikelihood(requests, disable_tqdm=True)
    np.testing.assert_allclose(mine.loglikelihood, [ll for ll, _ in theirs], atol=1e-4, rtol=0)
    assert (mine.matched == mine.length).tolist() == [hit for _, hit in theirs]


def test_log_likelihoods_equal_hflm_on_the_real_model(teacher):
    pairs = [
        ("Question: Which gas do plants take in?\nAnswer:", f" {choice}")
        for choice in ("carbon dioxide", "oxygen", "helium", "carbon monoxide")
    ]
    equal_to_hflm(teacher, [*pairs, ("", "An empty context."), ("The woman sat down because ", "she was tired.")])


@pytest.mark.skipif(not HELDOUT.is_dir(), reason="needs the held-out files")
@pytest.mark.parametrize("file, count", [("arc_easy", 6), ("copa", 6)])
def test_log_likelihoods_equal_hflm_on_held_out_requests(teacher, file, count):
    rows = [json.loads(line) for line in (HELDOUT / f"{file}.jsonl").read_text().splitlines()[:count]]
    tail = "\nAnswer:" if file == "arc_easy" else ""
    equal_to_hflm(teacher, [(row["query"] + tail, " " + choice) for row in rows for choice in row["choices"]])


def test_our_tasks_have_the_same_scores_under_lm_eval(teacher, tmp_path):
    stack = LayerStack(teacher.model)  # a random model scores 0 in most tasks, and 0 = 0 shows nothing
    tasks = load_suite("mini7", limit=2).tasks
    # Of copying lm-eval has the share of rows that are copied whole, which is our cloze.
    suite = Suite("mini7", tuple(replace(t, kind="cloze") if t.kind == "copy" else t for t in tasks))
    for task in suite.tasks:
        if task.kind == "multiple_choice":
            texts = {"doc_to_text": "{{query}}", "doc_to_choice": "choices", "doc_to_target": "gold"}
            delimiter = " " if task.rows[0]["query"] else ""
            settings = {"output_type": "multiple_choice", "target_delimiter": delimiter, **texts}
            settings |= metric("acc_bytes" if task.normalise == "bytes" else "acc")
        else:  # lm-eval puts no delimiter before the answer of a loglikelihood task
            texts = {"doc_to_text": "{{context}}", "doc_to_target": "{{' ' + continuation}}"}
            settings = {"output_type": "loglikelihood", "target_delimiter": "", **texts, **metric("acc")}
        write_task(tmp_path / "tasks", f"of_{task.name}", task.rows, **settings)
    group = {"group": "of_mini7", "task": [f"of_{task.name}" for task in suite.tasks]}
    (tmp_path / "tasks" / "of_mini7.yaml").write_text(yaml.safe_dump(group))
    ours = score_suite(stack, teacher.tokenizer, suite)
    theirs = score_suite(stack, teacher.tokenizer, tmp_path / "tasks" / "of_mini7.yaml")
    scores = []
    for name, task in ours.tasks.items():
        found = theirs.tasks[f"of_{name}"]
        assert found.score == pytest.approx(task.score, abs=1e-6), name
        assert found.chance == pytest.approx(task.chance)
        scores.append(task.score)
    assert sum(0 < score for score in scores) >= 5


@pytest.fixture
def generating(tmp_path):
    """A task that generates: the first words after a prompt."""
    rows = [{"question": "One, two, three,", "answer": "four"}, {"question": "The sky is", "answer": "x"}]
    settings = {"until": [","], "max_gen_toks": 6, "do_sample": False}
    write_task(
        tmp_path / "tasks",
        "goes_on",
        rows,
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="answer",
        generation_kwargs=settings,
        filter_list=[
            {"name": "bare", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]},
            {"name": "as_is", "filter": [{"function": "take_first"}]},
        ],
        **metric("exact_match"),
    )
    return tmp_path / "tasks" / "goes_on.yaml"


def test_generation_is_greedy_whatever_the_checkpoint_says(teacher, generating):
    model = copy.deepcopy(teacher.model)
    model.generation_config.update(num_beams=2, num_return_sequences=2, return_dict_in_generate=True, do_sample=True)
    before, tokenizer = model.generation_config, copy.deepcopy(teacher.tokenizer)
    tokenizer.pad_token = None
    stack = LayerStack(model)
    found = score_suite(stack, tokenizer, generating)
    assert found.tasks["goes_on"].values == [1.0, 0.0]
    assert found.notes == ["goes_on: answers by the filter 'bare' of bare, as_is."]
    assert model.generation_config is before and tokenizer.pad_token is None  # nothing is left behind
    ids = tokenizer("One, two, three,", return_tensors="pt").input_ids
    assert tokenizer.decode(greedy(model, ids, tokens=1)[0, -1]).strip() == "four"


def test_a_student_is_scored_as_it_is_and_stays_so(stack, teacher, generating, tmp_path):
    student = stack.share()
    student.remove(1)
    ids = torch.tensor([[5, 6, 7]])
    before = student.model(ids).logits
    suite = load_suite(f"{generating}@1")
    found = score_suite(student, teacher.tokenizer, suite, cache=tmp_path / "kept")
    assert found.tasks["goes_on"].n == 1
    assert torch.equal(student.model(ids).logits, before)
    assert student.model.get_output_embeddings().weight is stack.model.get_output_embeddings().weight
    assert len(list((tmp_path / "kept").glob("*.json"))) == 1
    assert score_suite(student, teacher.tokenizer, suite, cache=tmp_path / "kept").fingerprint == suite.fingerprint


def test_bits_per_byte_are_of_all_text_together(teacher, tmp_path):
    rows = [{"text": "The mill stood by the river."}, {"text": "An old oak."}]
    write_task(
        tmp_path / "tasks",
        "text",
        rows,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    found = score_suite(LayerStack(teacher.model), teacher.tokenizer, tmp_path / "tasks" / "text.yaml").tasks["text"]
    nats = 0.0
    for row in rows:
        ids = teacher.tokenizer(row["text"], return_tensors="pt").input_ids
        given = torch.cat([torch.tensor([[teacher.tokenizer.bos_token_id]]), ids], 1)
        logp = teacher.model(given).logits[0, :-1].double().log_softmax(-1)
        nats -= float(logp.gather(1, ids[0, :, None]).sum())
    size = sum(len(row["text"].encode()) for row in rows)
    assert found.score == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert found.share == pytest.approx(1 - found.score / 8)


def test_cut_contexts_are_noted_and_a_nan_is_an_error(stack, teacher, tmp_path):
    rows = [{"context": "word " * 400, "answer": " end"}]
    texts = {"doc_to_text": "{{context}}", "doc_to_target": "{{answer}}", "target_delimiter": ""}
    write_task(tmp_path / "tasks", "far", rows, output_type="loglikelihood", **texts, **metric("acc"))
    found = score_suite(stack, teacher.tokenizer, tmp_path / "tasks" / "far.yaml")
    assert found.tasks["far"].truncated == 1 and "cut from the left" in found.notes[0]
    broken = stack.share()
    broken.own([1])
    with torch.no_grad():
        for parameter in broken.layers[1].parameters():
            parameter.fill_(float("nan"))
    write_task(
        tmp_path / "tasks",
        "nan",
        [{"text": "A text."}],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    with pytest.raises(SuiteError, match="not a finite number"):
        score_suite(broken, teacher.tokenizer, tmp_path / "tasks" / "nan.yaml")


def test_layers_are_measured_by_really_evaluating_without_each(stack, teacher, generating):
    suite = load_suite(generating)
    assert not suite.swept and suite.name == "goes_on"
    scores = measure(stack, None, "task", suite=suite, tokenizer=teacher.tokenizer, limit=1)
    assert scores.details["way"] == "separate evaluations" and len(scores.table) == len(stack)
    with pytest.raises(MeasureError, match="Use race=False"):
        measure(stack, None, "task", suite=suite, tokenizer=teacher.tokenizer, race=True)


def test_its_name_follows_its_files(generating):
    suite = load_suite(generating)
    assert load_suite(generating).fingerprint == suite.fingerprint != suite.take(1).fingerprint
    for name in ("goes_on.jsonl", "_included"):
        before = load_suite(generating).fingerprint
        (generating.parent / name).write_text("{}")
        assert load_suite(generating).fingerprint != before


def test_unknown_and_unreachable_tasks(stack, teacher, tmp_path, monkeypatch):
    with pytest.raises(SuiteError, match="no task arc_eazy"):
        load_suite("lm-eval:arc_eazy")
    write_task(tmp_path / "tasks", "away", [], output_type="loglikelihood")

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(SuiteError, match="(?s)could not load.*come from the Hub"):
        score_suite(stack, teacher.tokenizer, tmp_path / "tasks" / "away.yaml")


# ------------------------------------------------------------- paper7


def stand_in(name: str, configs: dict) -> None:
    """A copy of a Hub data set below the working directory: jsonl files and the card that names them."""
    folder = Path(name)
    folder.mkdir(parents=True)
    card = ["---", "configs:"]
    for config, splits in configs.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            file = f"{config}-{split}.jsonl"
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
            card += [f"  - split: {split}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


def test_paper7_on_local_stand_ins_of_the_same_schema(tmp_path, tiny, teacher, monkeypatch):
    from lm_eval.tasks._yaml_loader import load_yaml

    monkeypatch.chdir(tmp_path)
    rows = load_yaml(data_dir() / "suites" / "paper7" / "mmlu_en.yaml")["custom_dataset"].__globals__
    assert len(rows["SUBJECTS"]) == 57
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
    examples = [{**row, "question_en": f"Example {i}?"} for i, row in enumerate(question)]
    for name in ("mmlu_en", "mmlu_ru"):
        for subject in rows["SUBJECTS"]:
            for split, made in (("test", question), ("dev", examples)):
                file = Path("NLPCoreTeam", name, subject, split, "0000.parquet")
                file.parent.mkdir(parents=True)
                datasets.Dataset.from_list(made).to_parquet(file)
    summary = [{"src_sents": ["Одно.", "Два."], "summary_sents": ["Три."]}] * 6
    stand_in("dichspace/daru_treeway_eval", {"default": {"test": summary[:1], "prompt": summary}})
    text = [{"inputs": {"text": f"Текст номер {i} для копии."}} for i in range(6)]
    flores = [{"inputs": {"en": "A cat.", "ru": "Кот."}}] * 6
    made = {"cp_doc_ru": text, "cp_para_ru": text, "flores": flores}
    stand_in("RefalMachine/darumeru", {config: {"test": r[:1], "prompt": r} for config, r in made.items()})

    model = tiny(2, vocab=len(teacher.tokenizer))
    model.config.max_position_embeddings = 2048
    model.generation_config.eos_token_id = list(range(len(teacher.tokenizer)))  # any token ends an answer
    suite = load_suite("paper7", limit=2)
    found = score_suite(LayerStack(model), teacher.tokenizer, suite)
    names = "mmlu_en mmlu_ru summary_ru copy_document_ru copy_paragraph_ru en_ru ru_en".split()
    assert list(found.tasks) == [f"paper7_{name}" for name in names]
    assert [task.measure for task in found.tasks.values()] == [
        "acc",
        "acc",
        "rougeL",
        "acc",
        "acc",
        "rougeL",
        "rougeL",
    ]
    assert found.tasks["paper7_mmlu_en"].chance == 0.25 and 0 <= found.aggregate <= 1

    tasks = load_tasks(suite.names, suite.folder, suite.fingerprint)
    docs = list(tasks["paper7_mmlu_en"].test_docs())
    assert len(docs) == 6 * 57
    prompt = docs[1]["prompt"]  # of the second subject
    assert prompt.startswith("The following are multiple choice questions (with answers) about anatomy.\n\nExample 0?")
    assert prompt.count("Answer:") == 6 and prompt.endswith("Question 0?\nA. w\nB. x\nC. y\nD. z\nAnswer:")
    assert "Answer: B\n\nExample 2?" in prompt
    asked = tasks["paper7_copy_document_ru"].instances[0].args
    assert asked[0].count("Копия:") == 6 and asked[0].endswith("Копия:") and asked[1] == " Текст номер 0 для копии."
    asked = tasks["paper7_ru_en"].instances[0].args
    assert asked[0].count("Кот.\nПеревод: A cat.") == 5 and asked[0].endswith("Перевод:")
    doc = next(iter(tasks["paper7_en_ru"].test_docs()))
    assert rows["rouge_l"](doc, ["большой кот"])["rougeL"] == pytest.approx(2 / 3)
    assert quality_loss(found, found).value == 0 if found.aggregate else True
