"""Branches that run as one larger batch: the same numbers as one by one, and only where that is proven."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, Qwen2Config

from ildlab.importance import sweep
from ildlab.importance.dispatch import measure
from ildlab.model.stack import LayerStack
from ildlab.model.stacked import learned, run_together

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
CONFIGS = {
    "qwen2": Qwen2Config(**SMALL, intermediate_size=64, num_key_value_heads=2, initializer_range=0.3),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4, initializer_range=0.3),
    "bloom": BloomConfig(vocab_size=97, hidden_size=32, n_layer=4, n_head=4, initializer_range=0.3),
}


@pytest.fixture
def together(monkeypatch):
    """Call with a number of tokens: branches go through a layer so many at a time."""
    return lambda tokens: monkeypatch.setattr(sweep, "tokens_together", lambda stack: tokens)


def made(family: str) -> LayerStack:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval().requires_grad_(False)
    return LayerStack(model)


def batch(padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, -4:] = mask[3, -1:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_scores_are_those_of_single_branches(family, padded, together):
    stack = made(family)
    how = learned(stack)
    assert (how is None) == (family == "bloom")  # its slopes are [B * heads, 1, T]: one by one
    found = []
    for tokens, stacking in ((0, None), (80, how), (10_000, how)):
        stack.stacking = stacking
        together(tokens)
        found.append(torch.tensor(measure(stack, batch(padded), "nll", batch_size=4).table["score"].values))
    # Products of more rows may be added up in another order; here they are not, to more than the last digit.
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)


def test_several_branches_are_one_call(tiny, together, monkeypatch):
    stack = LayerStack(tiny(5))
    assert stack.stacking is None and sweep.tokens_together(stack) == 0  # on a CPU
    stack.stacking = learned(stack)
    together(10_000)
    calls, run = [], LayerStack.run
    monkeypatch.setattr(LayerStack, "run", lambda s, q, h, t: calls.append((q, len(h))) or run(s, q, h, t))
    measure(stack, batch(False)["input_ids"], "nll", batch_size=4)
    assert calls == [(0, 4), (1, 4), (1, 4), (2, 8), (2, 4), (3, 12), (3, 4), (4, 16), (4, 4)]


def test_arguments_that_were_never_seen_go_one_by_one(tiny):
    stack = LayerStack(tiny(3))
    how, trunk = learned(stack), stack.trunk(batch(True))
    states = [trunk.h0, trunk.h0.flip(0)]
    alone = [stack.run(0, each, trunk) for each in states]
    seen: list[int] = []
    stack.layers[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for path in how.batched:
        seen.clear()
        less = dataclasses.replace(how, batched=how.batched - {path})
        for one, other in zip(alone, run_together(stack, 0, states, trunk, less), strict=True):
            assert torch.equal(one, other)
        assert seen == [4, 4]
    args, kwargs = trunk.calls[0]
    for known, value in ((False, torch.ones(4)), (False, object()), (True, None)):
        trunk.calls[0] = args, {**kwargs, "what": value}
        seen.clear()
        run_together(stack, 0, states, trunk, how)
        assert seen == ([8] if known else [4, 4])


def test_a_layer_that_mixes_its_batch_is_not_stacked(tiny):
    stack = LayerStack(tiny(3))
    assert learned(stack) is not None

    def mix(module, args, out):
        return out + 0.1 * out.mean(0, keepdim=True)

    stack.layers[1].register_forward_hook(mix)
    assert learned(stack) is None
