"""Closed-form healing: the ridge solution, where it folds, and that it is kept only if it helps."""

from __future__ import annotations

import pytest
import torch

from ildlab.distill.heal import _projection, _solve, heal
from ildlab.errors import DistillError
from ildlab.model.stack import LayerStack


def pair(tiny, gone=2, **options):
    teacher = LayerStack(tiny(5, **options))
    student = teacher.share()
    student.remove(gone)
    return student, teacher


def rows(n=20, length=24, seed=0):
    return torch.randint(3, 97, (n, length), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def test_solution_is_the_minimum():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    left = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    weight = torch.rand(50, 1, generator=generator, dtype=torch.float64)
    gram, cross = y.T @ (y * weight), left.T @ (y * weight)
    size = 0.3 * gram.diagonal().mean()

    def objective(t):
        return (weight * (left - y @ t.T).square()).sum() + size * (t - torch.eye(6)).square().sum()

    best = _solve((gram, cross), 0.3).requires_grad_()
    (slope,) = torch.autograd.grad(objective(best), best)
    assert slope.abs().max() < 1e-9
    # A strong ridge leads back to the identity.
    assert (_solve((gram, cross), 1e9) - torch.eye(6)).abs().max() < 1e-6


def test_a_linear_gap_is_healed(tiny):
    """Where all that the student lacks is a linear mix of what the layer below writes, the map finds it."""
    student, teacher = pair(tiny)
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):  # the removed layer itself adds nothing
            teacher.layers[2].get_submodule(name).weight.zero_()
        mixing = torch.eye(32) + 0.08 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
        student.own([1])
        written = student.layers[1].mlp.down_proj.weight
        wanted = written.clone()
        written.copy_(torch.linalg.solve(mixing, written))
        apart = (written - wanted).norm()

    def kl(ids):
        mine, theirs = (s.model(ids).logits.log_softmax(-1) for s in (student, teacher))
        return (theirs.exp() * (theirs - mine)).sum(-1).mean().item()

    fresh = rows(8, seed=5).long()
    before = kl(fresh)
    result = heal(student, teacher, rows(60), 2, positions=None)
    assert result.kept and result.layer_id == 1
    # Not to 0: the ridge holds back directions in which the layer writes little.
    assert result.kl_after < 0.5 * result.kl_before
    assert kl(fresh) < 0.5 * before  # the folded student's own
    assert (student.layers[1].mlp.down_proj.weight - wanted).norm() < 0.7 * apart


def test_only_the_projection_changes_and_only_if_kept(tiny):
    student, teacher = pair(tiny)
    before = {k: v.clone() for k, v in student.model.state_dict().items()}
    whole = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    result = heal(student, teacher, rows(60), 2)
    changed = {k for k, v in student.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == ({"model.layers.1.mlp.down_proj.weight"} if result.kept else set())
    assert all(torch.equal(v, whole[k]) for k, v in teacher.model.state_dict().items())


def test_a_map_that_does_not_help_is_dropped(tiny):
    student, teacher = pair(tiny)
    before = {k: v.clone() for k, v in student.model.state_dict().items()}
    result = heal(student, teacher, rows(20), 2, least_gain=0.999)
    assert not result.kept and "dropped" in result.note and "Not healed" in result._repr_html_()
    assert all(torch.equal(v, before[k]) for k, v in student.model.state_dict().items())


def test_projection_is_proven(tiny, teacher):
    student, _ = pair(tiny)
    assert _projection(student, 1, rows(1)) == "mlp.down_proj"
    assert _projection(LayerStack(teacher.model), 4, rows(1)) == "mlp.down_proj"
    # Gemma 2 norms what the projection gives before it is added: scaling it changes nothing, so no map can go there.
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    gemma = LayerStack(Gemma2ForCausalLM(config).eval().requires_grad_(False))
    assert _projection(gemma, 1, rows(1)) is None
    student = gemma.share()
    student.remove(2)
    result = heal(student, gemma, rows(), 2)
    assert not result.kept and "projection" in result.note


def test_edges(tiny):
    student, teacher = pair(tiny, gone=0)
    assert "no layer below" in heal(student, teacher, rows(), 0).note
    student, teacher = pair(tiny, gone=4)  # the top layer: the target is h[L]
    assert heal(student, teacher, rows(), 4).layer_id == 3
    with pytest.raises(DistillError, match="rows"):
        heal(student, teacher, rows(3), 4)
    with pytest.raises(DistillError, match="were removed"):
        heal(student, teacher, rows(), 1)


def test_smollm2_first_removal(teacher, blocks):
    whole = LayerStack(teacher.model)
    student = whole.share()
    student.remove(20)
    result = heal(student, whole, blocks.tokens[:15], 20, positions=16)
    assert result.layer_id == 19 and result.kl_before > 0.01
    if result.kept:
        assert result.kl_after < result.kl_before
