"""Perplexity, KL and agreement against a naive fp64 run; what is shared, stored and shown."""

import json
import math

import pytest
import torch

from ildlab.errors import SuiteError, TextError
from ildlab.evaluate.text_quality import Evaluation, evaluate, evaluate_steps
from ildlab.model.stack import LayerStack


@pytest.fixture(scope="module")
def pair(tiny):
    teacher = LayerStack(tiny(5))
    student = teacher.share()
    student.remove(3)
    student.own([4])
    with torch.no_grad():
        for parameter in student.layers[3].parameters():
            parameter += 0.02
    return student, teacher


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 97, (6, 20), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


def naive(stack, tokens):
    return torch.log_softmax(stack.model.double()(input_ids=tokens.long(), use_cache=False).logits[:, :-1], -1)


def test_figures_equal_a_naive_fp64_run(pair, tokens, monkeypatch):
    import copy

    from ildlab.model import head

    monkeypatch.setattr(head, "chunk_rows", lambda stack: 7)
    student, teacher = pair
    found = evaluate(student, teacher, tokens, speed=False, batch_size=4)
    mine, theirs = (naive(LayerStack(copy.deepcopy(s.model), s.layer_ids), tokens) for s in pair)
    gold = tokens[:, 1:, None].long()
    assert found.tokens == 6 * 19
    assert found.perplexity == pytest.approx(math.exp(-mine.gather(-1, gold).mean()), rel=1e-5)
    assert found.teacher_perplexity == pytest.approx(math.exp(-theirs.gather(-1, gold).mean()), rel=1e-5)
    kl = (theirs.exp() * (theirs - mine)).sum(-1)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.kl_low < found.kl < found.kl_high
    assert found.agreement == pytest.approx(float((mine.argmax(-1) == theirs.argmax(-1)).double().mean()))
    assert found.layers == 4 and found.teacher_layers == 5
    assert found.parameters == sum(p.numel() for p in student.model.parameters())
    assert found.bytes == 4 * found.parameters


def test_common_layers_run_once(pair, tokens, monkeypatch):
    student, teacher = pair
    runs = []
    plain = LayerStack.run
    monkeypatch.setattr(LayerStack, "run", lambda self, p, h, t: runs.append(p) or plain(self, p, h, t))
    evaluate(student, teacher, tokens, speed=False, batch_size=6)
    assert len(runs) == 3 + 2 + 1  # 0, 1, 2 for both; then 3 and 4 of the teacher, 4 of the student


def test_the_teacher_beside_itself(pair, tokens):
    _, teacher = pair
    found = evaluate(teacher.share(), teacher, tokens, speed=False)
    assert found.kl == 0 and found.agreement == 1
    assert found.perplexity == found.teacher_perplexity


def test_models_loaded_apart_share_nothing(tiny, tokens):
    found = evaluate(LayerStack(tiny(3, seed=1)), LayerStack(tiny(3, seed=2)), tokens, speed=False)
    assert found.kl > 0.01


def test_speed_is_measured_in_turns_every_time(pair, tokens, monkeypatch):
    import ildlab.evaluate.speed as speed

    student, teacher = pair
    first = evaluate(student, teacher, tokens)
    assert first.tokens_per_second > 0 and first.speed_ratio > 0
    order, clock = [], iter(range(1000))
    monkeypatch.setattr(speed, "greedy", lambda model, *_, **__: order.append(model))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))  # a turn of each takes a second
    # An earlier evaluation, perhaps of another machine, says nothing of today's speed.
    again = evaluate(student, teacher, tokens, teacher_record=first)
    assert order == [student.model, teacher.model] * 4
    assert again.tokens_per_second == again.teacher_tokens_per_second == 24
    assert not any("per_second" in name for name in first.teacher_record())


def test_suites_are_scored_and_the_teacher_s_scores_kept(tiny, teacher, tokens, monkeypatch):
    stack = LayerStack(tiny(3, vocab=len(teacher.tokenizer)))
    student = stack.share()
    student.remove(1)
    from ildlab.evaluate.suites import load_suite

    suite = load_suite("mini7", limit=1)
    first = evaluate(student, stack, tokens, tokenizer=teacher.tokenizer, suite=suite, speed=False)
    assert first.suite.name == "mini7" and first.teacher_suite.fingerprint == first.suite.fingerprint
    assert first.aggregate == first.suite.aggregate
    calls = []
    import ildlab.evaluate.text_quality as module

    plain = module.suite_steps
    monkeypatch.setattr(module, "suite_steps", lambda stack, *a, **k: calls.append(stack) or plain(stack, *a, **k))
    record = json.loads(json.dumps(first.teacher_record()))
    again = evaluate(
        student, stack, tokens, tokenizer=teacher.tokenizer, suite=suite, speed=False, teacher_record=record
    )
    assert calls == [student]
    assert again.teacher_suite.aggregate == pytest.approx(first.teacher_suite.aggregate, abs=1e-5)
    for form in (first, Evaluation.from_dict(json.loads(json.dumps(first.to_dict())))):
        assert (
            form.loss
            == form.quality_loss
            == pytest.approx(1 - first.suite.aggregate / first.teacher_suite.aggregate, abs=1e-5)
        )
    assert "mini7: knowledge" in first._repr_html_()


def test_json_form_and_table(pair, tokens):
    found = evaluate(*pair, tokens, speed=False)
    assert Evaluation.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert "perplexity" in found._repr_html_() and "<table" in found._repr_html_()
    assert len(str(found).splitlines()) == 1 + len(found.summary())
    assert found.quality_loss is None and found.aggregate is None
    assert found.loss == 1 - found.teacher_perplexity / found.perplexity


def test_closing_it_early_leaves_the_student_whole(pair, tokens):
    student, teacher = pair
    before = student.model(input_ids=tokens[:1].long()).logits
    work = evaluate_steps(student, teacher, tokens, batch_size=2)
    assert next(work).done == 2
    work.close()
    assert torch.equal(student.model(input_ids=tokens[:1].long()).logits, before)


def test_padding_does_not_count(pair, tokens):
    """Blocks as a mapping: the figures of the same text without its padding."""
    mask = torch.ones_like(tokens)
    mask[:, 15:] = 0
    padded = evaluate(*pair, {"input_ids": tokens, "attention_mask": mask}, speed=False)
    bare = evaluate(*pair, tokens[:, :15], speed=False)
    assert padded.tokens == bare.tokens == 6 * 14
    assert (padded.kl, padded.perplexity) == pytest.approx((bare.kl, bare.perplexity), rel=1e-5)


def test_bad_input(pair, tokens):
    with pytest.raises(TextError, match="1 sequence of 2 tokens"):
        evaluate(*pair, tokens[:, :1])
    with pytest.raises(SuiteError, match="needs the tokenizer"):
        evaluate(*pair, tokens, suite="mini7")
