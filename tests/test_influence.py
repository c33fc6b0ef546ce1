"""One-pass metrics against their oracles in fp64."""

import copy
import itertools

import numpy as np
import pytest
import torch

from ildlab.importance.dispatch import measure
from ildlab.importance.samples import Positions
from ildlab.model.stack import LayerStack
from ildlab.text.rows import Rows


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 97, (5, 16), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def small(tiny):
    stack = LayerStack(tiny(6))
    stack.remove(2)
    return stack


@pytest.fixture(scope="module")
def mask(tokens):
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    mask[3, 4:] = 0
    return mask


def cosine(x, y):
    return float(x @ y / (x.norm() * y.norm()))


PER_TOKEN = {
    "block_influence": lambda x, y: 1 - cosine(x, y),
    "angular_distance": lambda x, y: np.arccos(cosine(x, y)) / np.pi,
    "mse": lambda x, y: float(((x - y) ** 2).mean()),
    "relative_l2": lambda x, y: float((x - y).norm() / x.norm()),
}


def naive(stack, inputs, mask, value):
    """The plain loop over sequences, layers and tokens, on the model in fp64."""
    double = LayerStack(copy.deepcopy(stack.model).double(), stack.layer_ids)
    states = double.hidden_states(inputs)
    return np.array(
        [
            [
                np.mean([value(x[row, t], y[row, t]) for t in mask[row].nonzero()[:, 0]])
                for x, y in itertools.pairwise(states)
            ]
            for row in range(len(mask))
        ]
    )


@pytest.mark.parametrize("metric", PER_TOKEN)
def test_equals_the_naive_loop(small, tokens, metric):
    want = naive(small, tokens, torch.ones_like(tokens), PER_TOKEN[metric])
    got = measure(small, tokens, metric, batch_size=3)
    np.testing.assert_allclose(got.per_sequence, want, rtol=1e-5)
    np.testing.assert_allclose(got.table.score, want.mean(0), rtol=1e-5)
    assert got.layer_ids == [0, 1, 3, 4, 5] and got.table.n.tolist() == [5] * 5
    # h[L] is the last layer's output before the final norm: the norm would change this score.
    assert got.table.score[5] == pytest.approx(want.mean(0)[-1], rel=1e-5)


@pytest.mark.parametrize("metric", PER_TOKEN)
def test_padding_never_counts(small, tokens, mask, metric):
    inputs = {"input_ids": torch.where(mask.bool(), tokens, 0), "attention_mask": mask}
    want = naive(small, inputs, mask, PER_TOKEN[metric])
    got = measure(small, inputs, metric, batch_size=5)
    np.testing.assert_allclose(got.per_sequence, want, rtol=1e-4)
    weights = mask.sum(1).numpy()
    np.testing.assert_allclose(got.table.score, (want * weights[:, None]).sum(0) / weights.sum(), rtol=1e-4)


def test_nearly_equal_states_lose_no_digits(tiny, tokens):
    """Where the cosine is 1 - 1e-7, 1 - cosine in fp32 would be noise."""
    stack = LayerStack(tiny(4))
    stack.layers[1].mlp.down_proj.weight.data.mul_(1e-4)
    stack.layers[1].self_attn.o_proj.weight.data.mul_(1e-4)
    want = naive(stack, tokens, torch.ones_like(tokens), PER_TOKEN["block_influence"])
    got = measure(stack, tokens)
    assert want[:, 1].max() < 1e-6
    np.testing.assert_allclose(got.table.score, want.mean(0), rtol=2e-3)


def test_lrp(small, tokens):
    want = []
    double = LayerStack(copy.deepcopy(small.model).double(), small.layer_ids)
    states = double.hidden_states(tokens)
    for layer, hidden in zip(double.layers, states, strict=False):
        x, weight = layer.input_layernorm(hidden), layer.self_attn.q_proj.weight
        per_row = []
        for row in x:
            total = 0.0
            for token in row:
                z = weight @ token
                share = z.abs() / (z + 1e-6 * torch.where(z >= 0, 1.0, -1.0))
                total += float((token * (weight.T @ share)).abs().sum())
            per_row.append(total / len(row))
        want.append(per_row)
    got = measure(small, tokens, "lrp", batch_size=2)
    np.testing.assert_allclose(got.per_sequence, np.array(want).T, rtol=1e-5)


@pytest.mark.parametrize("positions", [None, 4])
def test_taylor_is_the_derivative(small, tokens, positions):
    """-d NLL / d s at s = 1 of each sequence, with every layer's update scaled by an s of its own, in fp64."""
    double = LayerStack(copy.deepcopy(small.model).double(), small.layer_ids)
    places = Positions.sample(Rows.of(tokens), positions, 3, predict=True)
    scale = torch.ones(len(tokens), 5, dtype=torch.float64, requires_grad=True)
    trunk = double.trunk(tokens)
    hidden = trunk.h0
    for q in range(5):
        hidden = hidden + scale[:, q, None, None] * (double.run(q, hidden, trunk) - hidden)
    log_p = double.logits(hidden).log_softmax(-1)
    at = log_p.gather(1, places.index[..., None].expand(-1, -1, 97)).gather(2, places.targets[..., None])
    (want,) = torch.autograd.grad(at.mean(1).sum(), scale)
    got = measure(small, tokens, "taylor", positions=positions, seed=3, batch_size=2)
    np.testing.assert_allclose(got.per_sequence, want, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in small.model.parameters())


def test_taylor_leaves_an_unfrozen_model_as_it_was(tiny, tokens):
    stack = LayerStack(tiny(3).requires_grad_(True))
    stack.layers[1].requires_grad_(False)
    stack.layers[2].mlp.up_proj.weight.grad = mine = torch.ones_like(stack.layers[2].mlp.up_proj.weight)
    before = {name: p.requires_grad for name, p in stack.model.named_parameters()}
    frozen = measure(LayerStack(tiny(3)), tokens, "taylor")
    np.testing.assert_allclose(measure(stack, tokens, "taylor").per_sequence, frozen.per_sequence, rtol=1e-6)
    assert before == {name: p.requires_grad for name, p in stack.model.named_parameters()}
    grads = {name: p.grad for name, p in stack.model.named_parameters() if p.grad is not None}
    assert list(grads) == ["model.layers.2.mlp.up_proj.weight"] and grads.popitem()[1] is mine
    assert bool((mine == 1).all())


def test_magnitude(small):
    got = measure(small, torch.zeros(1, 4, dtype=torch.long), "magnitude")
    want = [sum(float(p.double().abs().sum()) for p in layer.parameters() if p.dim() > 1) for layer in small.layers]
    np.testing.assert_allclose(got.table.score, want, rtol=1e-5)
    assert got.separation() == 1.0 and len(got.tied) == 1 and "magnitude" in got._repr_html_()


def test_smollm2_ranking_makes_sense(teacher, blocks):
    """The first layer and the last do most; the least important lies in the upper middle."""
    stack = LayerStack(teacher.model)
    got = measure(stack, blocks.tokens[:4, :32])
    states = stack.hidden_states(blocks.tokens[:4, :32].long())
    want = [
        1 - float(torch.cosine_similarity(x.double(), y.double(), -1).mean()) for x, y in itertools.pairwise(states)
    ]
    np.testing.assert_allclose(got.table.score, want, rtol=1e-5)
    assert got.table.score.idxmax() == 0
    assert 8 <= got.least_important <= 27
