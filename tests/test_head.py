"""The head against plain fp64 arithmetic, in chunks of any size."""

from __future__ import annotations

import pytest
import torch

from ildlab.model import head
from ildlab.model.shared import both_final
from ildlab.model.stack import LayerStack


@pytest.fixture
def pair(tiny):
    teacher = LayerStack(tiny(4))
    student = teacher.share()
    student.remove(2)
    return student, teacher


def in_fp64(stack, hidden):
    return stack.logits(hidden).double().log_softmax(-1)


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_scores_equal_plain_arithmetic_in_chunks_of_any_size(pair, monkeypatch, rows):
    student, teacher = pair
    monkeypatch.setattr(head, "chunk_rows", lambda stack: rows)
    ids = torch.arange(20)[None] % 97
    mine, theirs, _ = both_final(student, teacher, ids)
    mine, theirs, targets = mine[0, :-1], theirs[0, :-1], ids[0, 1:]
    q, p = in_fp64(student, mine), in_fp64(teacher, theirs)
    nll = [-x.gather(1, targets[:, None])[:, 0] for x in (q, p)]
    kl = (p.exp() * (p - q)).sum(-1)
    found = head.beside_teacher(student, teacher, mine, theirs, targets).double()
    torch.testing.assert_close(found[:3], torch.stack([*nll, kl]), rtol=1e-5, atol=1e-6)
    assert torch.equal(found[3].bool(), q.argmax(-1) == p.argmax(-1))
    branches = head.branch_kl(student, [mine, mine.roll(1, 0)], teacher, theirs).double()
    torch.testing.assert_close(branches[0], kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.branch_nll(student, [mine], targets).double()[0], nll[0], rtol=1e-5, atol=1e-6)


def test_one_and_the_same_state_is_a_model_beside_itself(pair):
    student, teacher = pair
    hidden = teacher.final(torch.arange(9)[None])[0]
    found = head.beside_teacher(teacher, teacher, hidden, hidden, torch.arange(9))
    assert torch.equal(found[0], found[1])
    assert float(found[2].abs().max()) == 0 and float(found[3].min()) == 1


def test_log_probabilities_of_a_large_vocabulary_are_exact():
    """torch's own fp32 log_softmax errs by 3e-5 on a CPU: as much as the damage of a layer that does nothing."""
    logits = 4 * torch.randn(64, 49_152, generator=torch.Generator().manual_seed(0))
    exact = logits.double().log_softmax(-1)
    assert float((head.log_probabilities(logits) - exact).abs().max()) < 5e-6
    other = logits + 0.01 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    kl = head.kl_per_token(head.log_probabilities(logits), head.log_probabilities(other))
    wanted = (exact.exp() * (exact - other.double().log_softmax(-1))).sum(-1)
    torch.testing.assert_close(kl.double(), wanted, rtol=2e-3, atol=1e-7)
    before, whole = logits.clone(), head.log_probabilities(logits)
    assert torch.equal(logits, before) and torch.equal(head.log_probabilities(before, in_place=True), whole)
    assert head.log_probabilities(logits.bfloat16()).dtype == torch.float32
    assert head.log_probabilities(logits[:1].double()).dtype == torch.float64


def test_the_chunk_is_sized_by_the_device(tiny, monkeypatch):
    stack = LayerStack(tiny(2))
    assert head.chunk_rows(stack) == head.CPU_CHUNK // (4 * 97)
    monkeypatch.setattr(LayerStack, "device", torch.device("cuda", 0))
    for free, budget in ((80 << 30, head.MOST_CHUNK), (4 << 30, 512 << 20), (1 << 20, head.LEAST_CHUNK)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 << 30))
        assert head.chunk_rows(stack) == budget // (4 * 97)
