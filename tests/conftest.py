"""Shared fixtures: the real teacher, loaded once, and tiny random models of many families."""

from __future__ import annotations

import os

import pytest
import torch

# Under pytest-xdist the workers share the cores: with a full set of threads each, they would spend
# their time waiting for one another. Child processes of the tests inherit it.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if _WORKERS > 1:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


def pytest_collection_modifyitems(items):
    """Long files first, so that no worker is left alone with one of them at the end."""
    long = [
        "browser/",
        "test_distill.py",
        "test_session.py",
        "iterate.ipynb",
        "04_",
        "02_",
        ".ipynb",
        "test_goldens.py",
    ]
    rank: dict = {}
    for item in items:
        found = next((i for i, name in enumerate(long) if name in item.nodeid), len(long))
        rank[item.path] = min(found, rank.get(item.path, found))
    items.sort(key=lambda item: rank[item.path])  # stable: the order within a file stays


@pytest.fixture(scope="session")
def teacher():
    """SmolLM2-135M in fp32. Shared by all tests: do not change it (`copy.deepcopy` first)."""
    from ildlab.model.load import load_model

    return load_model("smollm2-135m", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def tiny():
    """Factory of tiny random llama-like models: `tiny(layers=5, dtype=torch.float32, seed=0)`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(layers: int = 5, *, dtype=torch.float32, seed: int = 0, vocab: int = 97, hidden: int = 32):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)

    return make


@pytest.fixture
def short_speed(monkeypatch):
    """Generation is timed over a few tokens: what it gives is not what is tested."""
    import ildlab.evaluate.text_quality as module

    real = module.generation_speed
    monkeypatch.setattr(module, "generation_speed", lambda *a: real(*a, new_tokens=2, rounds=1))


@pytest.fixture(scope="session")
def blocks(teacher):
    """A few real token blocks [16, 64] of Python's docs (calibration split)."""
    from ildlab.text.blocks import load_text

    return load_text("python-docs", teacher.tokenizer, block=64, tokens=16 * 64, split="calibration")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Half a megabyte of Python's documentation in one .txt file, paragraphs apart."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:500_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_folder(tiny, text_file, tmp_path_factory):
    """A checkpoint folder with a random 6-layer model and a byte-level tokenizer of 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([text_file.read_text()[:50_000]], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    folder = tmp_path_factory.mktemp("tiny")
    tiny(6, vocab=320, hidden=32).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded_tiny(tiny_folder):
    """The tiny folder's model in fp32: the teacher of many runs. Do not change it."""
    from ildlab.model.load import load_model

    return load_model(tiny_folder, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def short_text(text_file, tmp_path_factory):
    """60 kB of Python's documentation in one .txt file."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(text_file.read_text()[:60_000])
    return path


@pytest.fixture(scope="session")
def small_settings(short_text):
    """Settings of the quickest runs."""
    distill = {"batch_size": 2, "checkpoint_every": 1, "learning_rate": 1e-3}
    tokens = {"block": 16, "calibration_tokens": 64, "train_tokens": 128, "eval_tokens": 64}
    return {"text": str(short_text), **tokens, "distill": distill}


@pytest.fixture
def small_run(tmp_path, loaded_tiny, small_settings, short_speed):
    """Factory of the quickest runs, in `tmp_path`: `small_run("name", **settings)`."""
    from ildlab.session.session import PruningSession

    made = []

    def make(name: str = "run", **changes):
        made.append(PruningSession.create(tmp_path / name, loaded_tiny, **{**small_settings, **changes}))
        return made[-1]

    yield make
    for session in made:
        session.close()
