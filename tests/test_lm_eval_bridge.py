"""The bridge to lm-eval: equal log-likelihoods, equal scores, and its tasks in an ablation sweep."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from ildlab import measure
from ildlab.errors import SuiteError
from ildlab.evaluate.lm_eval import LmEvalSuite, StackLM, _manager
from ildlab.evaluate.suites import load_suite, score_suite
from ildlab.model.stack import LayerStack

HELDOUT = Path(__file__).resolve().parents[2] / "shared" / "heldout"


@pytest.fixture(scope="module")
def stack(tiny, teacher):
    return LayerStack(tiny(3, vocab=len(teacher.tokenizer)))


def requests(pairs):
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


def hflm(model, tokenizer):
    # A log-softmax in fp64: HFLM's default sums fp32 terms in an order that is off by some 1e-5 a token.
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, softmax_dtype="float64")


def test_log_likelihoods_equal_hflm_on_the_real_model(teacher):
    pairs = [
        ("Question: Which gas do plants take in?\nAnswer:", f" {choice}")
        for choice in ("carbon dioxide", "oxygen", "helium", "carbon monoxide")
    ]
    pairs += [("", "An empty context."), ("The woman sat down because ", "she was tired.")]
    mine = StackLM(LayerStack(teacher.model), teacher.tokenizer).loglikelihood(requests(pairs))
    theirs = hflm(teacher.model, teacher.tokenizer).loglikelihood(requests(pairs), disable_tqdm=True)
    for (a, hit), (b, greedy) in zip(mine, theirs):
        assert a == pytest.approx(b, abs=1e-4)
        assert hit == greedy


@pytest.mark.skipif(not HELDOUT.is_dir(), reason="needs the held-out files")
@pytest.mark.parametrize("file, count", [("arc_easy", 6), ("copa", 6)])
def test_log_likelihoods_equal_hflm_on_held_out_requests(teacher, file, count):
    rows = [json.loads(line) for line in (HELDOUT / f"{file}.jsonl").read_text().splitlines()[:count]]
    tail = "\nAnswer:" if file == "arc_easy" else ""
    pairs = [(row["query"] + tail, " " + choice) for row in rows for choice in row["choices"]]
    mine = StackLM(LayerStack(teacher.model), teacher.tokenizer).loglikelihood(requests(pairs))
    theirs = hflm(teacher.model, teacher.tokenizer).loglikelihood(requests(pairs), disable_tqdm=True)
    np.testing.assert_allclose([a for a, _ in mine], [b for b, _ in theirs], atol=1e-4, rtol=0)


def test_rolling_log_likelihood_and_generation_equal_hflm(teacher):
    ours, theirs = (StackLM(LayerStack(teacher.model), teacher.tokenizer), hflm(teacher.model, teacher.tokenizer))
    ours.max_length = theirs._max_length = 16
    rolling = [Instance("loglikelihood_rolling", {}, ("A text that is longer than one window. " * 4,), 0)]
    assert ours.loglikelihood_rolling(rolling)[0] == pytest.approx(
        theirs.loglikelihood_rolling(rolling, disable_tqdm=True)[0], abs=1e-3
    )
    ours.max_length = theirs._max_length = 64
    # White space counts, at both ends; a stop at the very beginning leaves nothing; other names of the length.
    asked = [
        Instance("generate_until", {}, (prompt, settings), number)
        for number, (prompt, settings) in enumerate(
            [
                ("One, two, three,", {"until": [","], "max_gen_toks": 4}),
                ("Question: What is the capital of France?\nAnswer:", {"until": ["\n"], "max_new_tokens": 6}),
                ("List:\n1. apples\n2. pears\n3.", {"until": ["\n", " "], "max_gen_toks": 5}),
            ]
        )
    ]
    mine, their = ours.generate_until(asked), theirs.generate_until(asked, disable_tqdm=True)
    assert mine == their
    assert mine[0].startswith(" ") and mine[2] == ""


def test_shipped_yaml_gives_our_scores_under_plain_hflm(teacher):
    stack = LayerStack(teacher.model)  # a random model scores 0 in most tasks, and 0 = 0 shows nothing
    names = ["knowledge", "commonsense", "grammar", "cloze", "copy_paragraph", "copy_document", "summary"]
    suite = load_suite("mini7", limit=2)
    ours = score_suite(stack, teacher.tokenizer, suite)
    found = simple_evaluate(
        model=hflm(stack.model, teacher.tokenizer),
        tasks=["mini7"],
        limit=2,
        bootstrap_iters=0,
        task_manager=_manager(["mini7"]),
    )["results"]
    scores = []
    for name in names:
        task, theirs = ours.tasks[name], found[f"mini7_{name}"]
        measures = {task.measure: task.score, **task.others}
        pairs = {"accuracy_raw": "acc", "accuracy_bytes": "acc_bytes", "exact": "acc"}
        compared = [
            (measures[m], theirs[f"{lm},none"]) for m, lm in pairs.items() if m in measures and f"{lm},none" in theirs
        ]
        assert compared
        # The measure that decides is the one that lm-eval has too; of copying it has the exact answers alone.
        assert name.startswith("copy") or compared[0][0] == task.score
        for mine, their in compared:
            assert mine == pytest.approx(their, abs=1e-6), name
        scores += [mine for mine, _ in compared]
    assert sum(0 < score for score in scores) >= 5


def test_lm_eval_tasks_are_suites(stack, teacher, tmp_path):
    suite = load_suite("lm-eval:mini7_knowledge,mini7_cloze", limit=5)
    found = score_suite(stack, teacher.tokenizer, suite, cache=tmp_path)
    ours = score_suite(stack, teacher.tokenizer, load_suite("mini7", limit=5))
    assert found.tasks["mini7_knowledge"].score == ours.tasks["knowledge"].score
    assert found.tasks["mini7_knowledge"].chance == 0.25
    assert found.tasks["mini7_cloze"].score == ours.tasks["cloze"].score
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_lm_eval_requests_go_through_the_sweep(stack, teacher):
    suite = LmEvalSuite.of("mini7_knowledge,mini7_cloze").take(4)
    scores = measure(stack, None, "task", suite=suite, tokenizer=teacher.tokenizer)
    whole = score_suite(stack, teacher.tokenizer, suite).aggregate
    assert scores.details["whole"] == pytest.approx(whole, abs=1e-12)
    pruned = stack.share()
    pruned.remove(1)
    want = score_suite(pruned, teacher.tokenizer, suite).aggregate
    assert scores.table.score[1] == pytest.approx(whole - want, abs=1e-12)


def test_unknown_and_unreachable_tasks(stack, teacher, monkeypatch):
    with pytest.raises(SuiteError, match="no task arc_eazy"):
        load_suite("lm-eval:arc_eazy")

    def offline(**_):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub")

    monkeypatch.setattr("lm_eval.simple_evaluate", offline)
    with pytest.raises(SuiteError, match="come from the Hub"):
        score_suite(stack, teacher.tokenizer, load_suite("lm-eval:arc_easy", limit=1))
