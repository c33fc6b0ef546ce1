"""Shared fixtures: the real teacher, loaded once, and tiny random models of many families."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def teacher():
    """SmolLM2-135M in fp32. Shared by all tests: do not change it (`copy.deepcopy` first)."""
    from ildlab.models import load_model

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


@pytest.fixture(scope="session")
def blocks(teacher):
    """A few real token blocks [16, 64] of Python's docs (calibration split)."""
    from ildlab.text import load_text

    return load_text("python-docs", teacher.tokenizer, block=64, tokens=16 * 64, split="calibration")
