"""Text that a teacher writes itself."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch

from ildlab.errors import TextError
from ildlab.files import data_dir
from ildlab.progress import drive
from ildlab.text import teacher_text
from ildlab.text.blocks import load_text
from tools import sample_teacher
from tools.sample_teacher import main, prompts, sample_steps


@pytest.fixture
def openings(monkeypatch):
    """Openings alone: no chat, no empty prompt."""
    monkeypatch.setattr(sample_teacher, "CHAT", 0.0)
    monkeypatch.setattr(sample_teacher, "BARE", 0.0)


def drawn(tokenizer, seed, n):
    return list(itertools.islice(prompts(tokenizer, random.Random(seed)), n))


def sampled(*arguments, **options):
    return drive(sample_steps(*arguments, **options), show=False)


def test_openings_vary_and_repeat_by_seed(teacher, openings):
    first = drawn(teacher.tokenizer, 0, 3000)
    assert first == drawn(teacher.tokenizer, 0, 3000)
    assert len(set(first)) == 3000  # none twice before all were used
    assert first[:50] != drawn(teacher.tokenizer, 1, 50)
    assert not any("{}" in text for text in first)
    assert all(text[0].isupper() or not text[0].isalpha() for text in first)


def test_kinds_of_prompts(teacher):
    some = drawn(teacher.tokenizer, 0, 2000)
    chat = [text for text in some if text.startswith("<|im_start|>")]
    assert len(chat) / 2000 == pytest.approx(0.15, abs=0.03)
    assert some.count("") / 2000 == pytest.approx(0.1, abs=0.03)
    assert all(text.endswith("<|im_start|>assistant\n") for text in chat)
    bare = copy.deepcopy(teacher.tokenizer)
    bare.chat_template = None
    assert not any(text.startswith("<|im_start|>") for text in drawn(bare, 0, 200))


def test_samples_repeat_by_seed_and_open_with_their_prompts(tiny, teacher, openings):
    model = tiny(2, vocab=49152, hidden=16)
    options = {"tokens": 300, "rows": 6, "length": 40, "seed": 3}
    state = torch.get_rng_state()
    texts = sampled(model, teacher.tokenizer, **options)
    assert len(texts) >= 6 and texts == sampled(model, teacher.tokenizer, **options)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers stay its own
    assert texts != sampled(model, teacher.tokenizer, **{**options, "seed": 4})
    opened = [text.strip() for text in drawn(teacher.tokenizer, 3, 6)]
    assert all(text.startswith(opening) for text, opening in zip(texts[:6], opened, strict=True))
    steps = list(sample_steps(model, teacher.tokenizer, **options))
    assert steps[-1].done == steps[-1].total == 300 and steps[-1].partial == texts


def test_rows_go_on_as_they_would_alone(teacher, monkeypatch):
    """Padding on the left, the end of a row and the filling behind it change no document."""
    monkeypatch.setattr(teacher_text, "SAMPLING", {"do_sample": False})
    end = teacher.tokenizer.eos_token_id
    batch = [
        [end, *teacher.tokenizer(text)["input_ids"]] for text in ("One two three", "The capital of France is the")
    ]
    together = teacher_text.continued(teacher.model, teacher.tokenizer, batch, 24, 0)
    for ids, found in zip(batch, together, strict=True):
        assert [found] == teacher_text.continued(teacher.model, teacher.tokenizer, [ids], 24, 0)
        assert len(found) > 4 and end not in found


def test_a_document_ends_at_its_end_of_text(tiny, teacher, openings, monkeypatch):
    tokenizer = teacher.tokenizer
    model, end = tiny(2, vocab=49152, hidden=16), tokenizer.eos_token_id
    own = model.generation_config

    def generate(ids, *, attention_mask, generation_config):
        assert model.generation_config is not own  # the checkpoint's settings do not reach the sampling
        assert not {end} & set(generation_config.suppress_tokens)
        tail = torch.tensor([[5] * 30 + [end] * 3, [5] + [end] * 32])
        return torch.cat([ids, tail], 1)

    monkeypatch.setattr(model, "generate", generate)
    whole, *none = sampled(model, tokenizer, tokens=1, rows=2)
    assert whole.endswith(tokenizer.decode([5] * 30)) and not none  # the scrap is left out
    assert model.generation_config is own


def test_the_command_writes_what_load_text_reads(tiny_folder, tmp_path, teacher, capsys):
    files = [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"]
    for file in files:
        main([str(tiny_folder), str(file), "--tokens", "600", "--rows", "8", "--length", "80"])
    assert "of 600 tokens" in capsys.readouterr().out
    assert files[0].read_bytes() == files[1].read_bytes()  # the bytes depend on the texts alone, not on name or time
    assert load_text(files[0], teacher.tokenizer, block=16, split="train").n_tokens > 100


def test_no_end_of_text_token(tiny, teacher):
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
