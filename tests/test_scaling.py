"""Costs on paper, against what the library does: layer calls, logits and operations of matrices are counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ildlab.distill.config import DistillConfig
from ildlab.distill.train import distill
from ildlab.errors import SessionError
from ildlab.importance.dispatch import measure
from ildlab.model.stack import LayerStack
from ildlab.session.scaling import Cost, ModelShape, distilling, measuring, memory


@pytest.fixture
def stack(tiny):
    return LayerStack(tiny(6))


@pytest.fixture
def text():
    return torch.randint(3, 97, (8, 16), generator=torch.Generator().manual_seed(0))


def counted(work, *stacks):
    """Layer calls of some work, and operations of its products of matrices (without attention's, on a CPU)."""
    calls = []
    first = [next(m for m in layer.modules() if isinstance(m, nn.Linear)) for s in stacks for layer in s.layers]
    hooks = [each.register_forward_hook(lambda *_: calls.append(1)) for each in first]
    with FlopCounterMode(display=False) as counter:
        work()
    for hook in hooks:
        hook.remove()
    products = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op) and "bmm" not in str(op)
    )
    return len(calls), products


def without_attention(stack):
    return replace(ModelShape.of(stack), mixed=0)


@pytest.mark.parametrize(
    "way, metric, options",
    [("one pass", "block_influence", {}), ("sweep", "nll", {"positions": 4}), ("sweep", "kl", {})],
)
def test_measuring_costs_what_is_counted(stack, text, way, metric, options):
    teacher = [stack] if metric == "kl" else []
    found = counted(lambda: measure(stack, text[:4], metric, *teacher, batch_size=2, **options), stack)
    cost = measuring(without_attention(stack), way, 64, 16, 2, **options)
    assert found == (cost.layer_calls, pytest.approx(cost.operations, rel=1e-3))


@pytest.mark.parametrize("removed, scope", [([2], "window(1)"), ([1, 4], "neighbours"), ([3], "suffix"), ([5], "all")])
@pytest.mark.parametrize("local", [False, True])
def test_distilling_costs_what_is_counted(stack, text, removed, scope, local):
    student = stack.share(without=removed)
    config = DistillConfig(scope=scope, local_tokens=64 if local else 0, tokens=64, batch_size=2)
    found = counted(lambda: distill(student, stack, text, config, gap=removed), student, stack)
    shape = without_attention(stack)
    cost = distilling(shape, removed, 64, 16, 2, scope=scope)
    if local:
        cost += distilling(shape, removed, 64, 16, 2, scope=scope, local=True)
    assert found[0] == cost.layer_calls
    assert found[1] == pytest.approx(cost.operations, rel=1e-3)


def test_shapes_and_sums(stack):
    shape = ModelShape.of(stack)
    config = stack.model.config
    told = ModelShape.gated(
        6,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size,
        config.tie_word_embeddings,
    )
    assert shape == told
    matrices = sum(p.numel() for p in stack.model.parameters() if p.ndim > 1)
    assert shape.weights == matrices
    llama = ModelShape.gated(32, 4096, 11008, 32, 32, 32000, tied=False)
    assert llama.weights == pytest.approx(6.74e9, rel=1e-3)
    assert memory(llama)["weights"] == 2 * llama.weights and memory(llama, trained=2)["training"] > 0
    total = Cost(1, 2, 3e12, 4e9) + Cost(1, 2, 3e12, 4e9)
    assert total == Cost(2, 4, 6e12, 8e9) and total.seconds(1e12, 1e9) == 8
    with pytest.raises(SessionError, match="choose from 'one pass'"):
        measuring(llama, "all", 64, 16, 2)
