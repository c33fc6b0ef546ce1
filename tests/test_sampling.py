"""Text sampled from a teacher."""

from __future__ import annotations

import gzip
import itertools
import json

import pytest
import torch

from ildlab.errors import TextError
from ildlab.files import data_dir
from ildlab.progress import drive
from ildlab.text.blocks import load_text
from ildlab.text.sampling import _cache, _documents, openings, questions, sample_steps, write_samples


def test_openings_vary_and_repeat_by_seed():
    first = list(itertools.islice(openings(0), 3000))
    assert first == list(itertools.islice(openings(0), 3000))
    assert len(set(first)) == 3000  # none twice before all were used
    assert first[:50] != list(itertools.islice(openings(1), 50))
    assert not any("{}" in text for text in first)
    assert all(text[0].isupper() or not text[0].isalpha() for text in first)


def test_growing_cache_equals_the_stock_one(tiny):
    model = tiny(4)
    ids = torch.randint(3, 97, (3, 10))
    whole = model(input_ids=ids).logits
    cache = _cache(model, 12)
    steps = [model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(10)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_samples(tiny, teacher):
    model = tiny(2, vocab=49152, hidden=16)
    options = {"tokens": 6 * 60, "rows": 6, "length": 60, "seed": 3}
    texts = drive(sample_steps(model, teacher.tokenizer, **options), show=False)
    assert texts == drive(sample_steps(model, teacher.tokenizer, **options), show=False)
    assert texts != drive(sample_steps(model, teacher.tokenizer, **{**options, "seed": 4}), show=False)
    chat = drive(sample_steps(model, teacher.tokenizer, **options, chat=1.0), show=False)
    asked = list(itertools.islice(questions(teacher.tokenizer, 3), 6))
    assert sum(any(text.startswith(q.strip()) for q in asked) for text in chat) >= 4
    plain = drive(sample_steps(model, teacher.tokenizer, **options, chat=0.0, bare=0.0), show=False)
    opened = list(itertools.islice(openings(3), 12))
    assert all(any(text.startswith(o.strip()) for o in opened) for text in plain)


def test_min_p_leaves_only_the_likeliest(tiny, teacher):
    model = tiny(2, vocab=49152, hidden=16)
    options = {"tokens": 2 * 48, "rows": 2, "length": 48, "chat": 0.0, "bare": 0.0}
    greedy = drive(sample_steps(model, teacher.tokenizer, **options, min_p=1.0), show=False)
    cold = drive(sample_steps(model, teacher.tokenizer, **options, min_p=0.0, temperature=(1e-4, 1e-4)), show=False)
    assert greedy == cold


def test_documents_are_cut_at_the_end_of_text(teacher):
    tokenizer = teacher.tokenizer
    end = tokenizer.eos_token_id
    a, b = (tokenizer(t * 8)["input_ids"] for t in ("One two three four. ", "Five six seven eight. "))
    texts = list(_documents([end, *a, end, 5, 6, end, *b], end, tokenizer))
    assert [t[:7] for t in texts] == ["One two", "Five si"]  # the scrap between them is dropped
    (chat,) = (questions(tokenizer, 0).__next__(),)
    whole = tokenizer(chat + "An answer of some length, so that it is kept.", add_special_tokens=False)["input_ids"]
    (text,) = _documents([end, *whole, end], end, tokenizer)
    assert text.startswith("<|im_start|>") and text.endswith("is kept.")


def test_written_bytes_depend_on_the_texts_alone(tmp_path):
    a = write_samples(["x", "ü\n"], tmp_path / "a.jsonl.gz").read_bytes()
    assert a == write_samples(["x", "ü\n"], tmp_path / "b.jsonl.gz").read_bytes()
    assert [json.loads(line)["text"] for line in gzip.decompress(a).splitlines()] == ["x", "ü\n"]


def test_no_end_of_text_token(tiny, teacher):
    import copy

    tokenizer = copy.deepcopy(teacher.tokenizer)  # a shallow copy shares its special tokens
    tokenizer.eos_token = None
    with pytest.raises(TextError, match="EOS"):
        next(sample_steps(tiny(2), tokenizer, tokens=10))


def test_what_ships(teacher):
    train = load_text("teacher-samples", teacher.tokenizer, block=128, split="train")
    held = load_text("teacher-samples", teacher.tokenizer, block=128, split="eval")
    assert train.n_tokens > 50_000 and held.n_tokens > 5_000
    card = (data_dir() / "teacher_samples" / "README.md").read_text()
    assert "SmolLM2-135M-Instruct" in card and "Apache-2.0" in card
