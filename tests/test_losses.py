"""Losses against fp64 oracles, and the published formula restated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ildlab.distill.fused import fused_divergence
from ildlab.distill.losses import Divergence, divergence, hidden_distance
from ildlab.errors import DistillError
from ildlab.model.head import log_probabilities, nll_per_token
from ildlab.model.stack import LayerStack

SPECS = [
    Divergence(),
    Divergence(temperature=2.5),
    Divergence("reverse_kl"),
    Divergence("reverse_kl", temperature=0.7),
    Divergence("jsd"),
    Divergence("jsd", temperature=2.0),
]


def naive_divergence(
    student, teacher, hidden, teacher_hidden, spec=Divergence(), *, weights, labels=None, label_weights=None
):
    """`fused_divergence` written plainly, by full logits and autograd: the oracle."""
    logits = student.logits(hidden)
    with torch.no_grad():
        teacher_logits = teacher.logits(teacher_hidden)
    each = divergence(logits, teacher_logits, spec)
    loss = (each * weights).sum()
    ce = torch.zeros_like(loss)
    if labels is not None:
        each_ce = nll_per_token(log_probabilities(logits), labels)
        loss = loss + (each_ce * label_weights).sum()
        ce = (each_ce.detach() * (label_weights != 0)).sum()
    counted = weights != 0
    agree = ((logits.argmax(-1) == teacher_logits.argmax(-1)) & counted).sum()
    return loss, torch.stack([(each.detach() * counted).sum(), ce, agree.to(loss.dtype)])


def pair(tiny, dtype=torch.float32):
    """A teacher and a student of other hidden states but the same head."""
    return LayerStack(tiny(dtype=dtype)), LayerStack(tiny(dtype=dtype))


def hiddens(stack, n=23, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(n, stack.hidden_size, generator=generator, dtype=torch.float64)
    mine = target + 0.7 * torch.randn(n, stack.hidden_size, generator=generator, dtype=torch.float64)
    return mine.to(dtype).requires_grad_(), target.to(dtype)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("with_labels", [False, True])
def test_fused_equals_the_naive_form_in_fp64(tiny, spec, with_labels):
    teacher, student = pair(tiny)
    teacher64, student64 = pair(tiny, torch.float64)
    weights = torch.rand(23)
    weights[4] = 0
    labels = torch.randint(0, 97, (23,)) if with_labels else None
    label_weights = torch.rand(23) if with_labels else None

    mine, target = hiddens(student)
    loss, stats = fused_divergence(
        student, teacher, mine, target, spec, weights=weights, labels=labels, label_weights=label_weights, chunk=5
    )
    (3 * loss).backward()

    mine64, target64 = (x.detach().double() for x in (mine, target))
    mine64.requires_grad_()
    want, want_stats = naive_divergence(
        student64,
        teacher64,
        mine64,
        target64,
        spec,
        weights=weights.double(),
        labels=labels,
        label_weights=label_weights.double() if with_labels else None,
    )
    (3 * want).backward()
    # In fp32 the forward passes themselves differ from fp64's by a few 1e-7.
    assert abs(loss.item() - want.item()) <= 2e-6 * abs(want.item())
    assert (mine.grad.double() - mine64.grad).norm() <= 3e-6 * mine64.grad.norm()
    torch.testing.assert_close(stats.double(), want_stats, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_fused_equals_naive_exactly_in_fp64(tiny, spec):
    teacher, student = pair(tiny, torch.float64)
    grads = []
    for form, extra in ((fused_divergence, {"chunk": 4}), (naive_divergence, {})):
        mine, target = hiddens(student, dtype=torch.float64)
        loss, _ = form(
            student, teacher, mine, target, spec, weights=torch.full((23,), 0.1, dtype=torch.float64), **extra
        )
        loss.backward()
        grads.append(torch.cat([loss[None], mine.grad.flatten()]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-13)


def test_fused_keeps_a_soft_capped_head():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=89,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=3.0,
        initializer_range=0.5,
    )
    model = Gemma2ForCausalLM(config).double().eval().requires_grad_(False)
    stack = LayerStack(model)
    mine, target = hiddens(stack, dtype=torch.float64)
    weights = torch.ones(23, dtype=torch.float64)
    loss, _ = fused_divergence(stack, stack, mine, target, weights=weights, chunk=7)
    loss.backward()
    again = mine.detach().requires_grad_()
    logits, goal = (3 * torch.tanh(F.linear(model.model.norm(h), model.lm_head.weight) / 3) for h in (again, target))
    want = divergence(logits, goal).sum()
    want.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(mine.grad, again.grad)


def test_divergences_are_what_their_names_say():
    z = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
    t = torch.tensor([[0.0, 1.0, 0.5]], dtype=torch.float64)
    p, q = t.softmax(-1), z.softmax(-1)
    forward, reverse = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    torch.testing.assert_close(divergence(z, t), forward)
    torch.testing.assert_close(divergence(z, t, Divergence("reverse_kl")), reverse)
    assert abs(forward - reverse) > 0.01
    half = divergence(z, t, Divergence("jsd"))
    torch.testing.assert_close(half, divergence(t, z, Divergence("jsd")))  # symmetric at beta 1/2
    m = (p + q) / 2
    torch.testing.assert_close(half, ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2)
    assert divergence(z, z).abs().max() < 1e-12
    # With T^2, the gradient at a high temperature is that of half the squared difference of centred logits.
    z.requires_grad_()
    (g,) = torch.autograd.grad(divergence(z, t, Divergence(temperature=1e4)).sum(), z)
    centred = (z - z.mean()) - (t - t.mean())
    torch.testing.assert_close(g, centred.detach() / 3, rtol=1e-3, atol=1e-4)


def test_hidden_distances():
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    torch.testing.assert_close(hidden_distance(a, b), torch.tensor([12.5, 2.5]))
    torch.testing.assert_close(hidden_distance(a, b, "relative_mse")[1], torch.tensor(5 / 4))
    torch.testing.assert_close(hidden_distance(a, b, "cosine")[1], torch.tensor(1.0))
    with pytest.raises(DistillError, match="hidden loss"):
        hidden_distance(a, b, "l1")


class LargestLogits(TorchDispatchMode):
    """Rows of the largest tensor over the vocabulary that any operation returns."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] == self.vocabulary:
            self.rows = max(self.rows, out.shape.numel() // self.vocabulary)
        return out


def test_logits_of_a_whole_batch_never_exist(tiny):
    teacher, student = pair(tiny)
    mine, target = hiddens(student, n=200)
    with LargestLogits(97) as seen:  # the head's matrix itself has 32 such rows, transposed
        fused_divergence(student, teacher, mine, target, weights=torch.ones(200), chunk=40)[0].backward()
    assert seen.rows == 40
    with LargestLogits(97) as seen:
        naive_divergence(student, teacher, mine, target, weights=torch.ones(200))[0].backward()
    assert seen.rows == 200


def test_no_gradient_where_none_is_wanted(tiny):
    teacher, student = pair(tiny)
    mine, target = hiddens(student)
    loss, stats = fused_divergence(student, teacher, mine.detach(), target, weights=torch.ones(23))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, stats[0])


@pytest.mark.parametrize("bad", [{"kind": "kl"}, {"temperature": 0}, {"temperature": float("nan")}])
def test_bad_divergences_are_named(bad):
    with pytest.raises(DistillError):
        Divergence(**bad)


def test_real_head_in_fp32(teacher):
    stack = LayerStack(teacher.model)
    ids = teacher.tokenizer("Water freezes at zero degrees, and boils at a hundred.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        target = stack.final(ids)[0]
        with stack.without(20):
            mine = stack.final(ids)[0]
    mine.requires_grad_()
    weights = torch.full((len(mine),), 1 / len(mine))
    loss, stats = fused_divergence(stack, stack, mine, target, weights=weights, chunk=4)
    loss.backward()
    # In the same chunks: how many rows a matrix product has decides how fp32 rounds it (by 2e-5 of the KL here).
    logits, goal = (torch.cat([stack.logits(c).double() for c in x.detach().split(4)]) for x in (mine, target))
    want = F.kl_div(logits.log_softmax(-1), goal.log_softmax(-1), reduction="batchmean", log_target=True)
    assert abs(loss.item() - want.item()) < 1e-6 * want.item()
    again = mine.detach().requires_grad_()
    naive_divergence(stack, stack, again, target, weights=weights)[0].backward()
    assert (mine.grad - again.grad).norm() < 1e-5 * again.grad.norm()
    assert 0 < stats[2] <= len(mine)
