"""Greedy decoding is greedy, whatever a checkpoint's generation config asks for."""

from __future__ import annotations

import math

import pytest
import torch

from ildlab.model.generate import greedy
from ildlab.session.whatif import perplexity_of


def by_hand(model, ids, tokens):
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize(
    "odd",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"min_new_tokens": 9},
        {"return_dict_in_generate": True, "output_scores": True},
        {"repetition_penalty": 3.0},
        {"do_sample": True, "temperature": 2.0, "top_k": 5},
        {"no_repeat_ngram_size": 2},
        {"max_length": 3},
    ],
    ids=lambda odd: next(iter(odd)),
)
def test_a_checkpoints_own_decoding_is_left_out(tiny, odd):
    model = tiny(3)
    ids = torch.tensor([[5, 9, 11, 3]])
    wanted = by_hand(model, ids, 6)
    assert 2 not in wanted[0, 4:]  # no end of text: the lengths are equal
    before = model.generation_config
    for name, value in odd.items():
        setattr(before, name, value)
    assert torch.equal(greedy(model, ids, tokens=6), wanted)
    assert torch.equal(greedy(model, ids, tokens=6, use_cache=False), wanted)
    assert model.generation_config is before


def test_it_ends_at_the_end_of_text_unless_asked_for_all(tiny):
    model = tiny(3)
    ids = torch.tensor([[5, 9, 11, 3]])
    model.generation_config.eos_token_id = int(by_hand(model, ids, 1)[0, -1])
    assert greedy(model, ids, tokens=6).shape[1] == 5
    assert greedy(model, ids, tokens=6, exactly=True).shape[1] == 10


def test_a_perplexity_beyond_a_float_is_infinite():
    assert perplexity_of(1.0) == math.e and perplexity_of(708.0) < math.inf == perplexity_of(5000.0)
