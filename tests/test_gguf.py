"""GGUF files of several families and formats: read rightly, checked against their header, dequantised once."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import MODEL_ARCH
from gguf import GGMLQuantizationType as Q
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ildlab import LayerStack
from ildlab.errors import ModelError
from ildlab.model import gguf as reading
from ildlab.model import load_model

LAYERS, HEADS, KV, HIDDEN = 3, 8, 4, 256
FAMILIES = {
    "llama": ("LlamaConfig", MODEL_ARCH.LLAMA, {}),
    "qwen2": ("Qwen2Config", MODEL_ARCH.QWEN2, {}),
    "qwen3": ("Qwen3Config", MODEL_ARCH.QWEN3, {"head_dim": 128}),
    "gemma2": ("Gemma2Config", MODEL_ARCH.GEMMA2, {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", MODEL_ARCH.GEMMA3, {"head_dim": 32, "tie_word_embeddings": True}),
}
ERROR = {Q.F16: 0.01, Q.Q8_0: 0.05, Q.Q4_0: 0.6}  # of the largest logit, in a small random model


def make(family: str):
    name, _, more = FAMILIES[family]
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": HIDDEN, "intermediate_size": 512, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV, "max_position_embeddings": 256}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    config = getattr(transformers, name)(**sizes, **heads, **(special | more))
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.05) if parameter.dim() > 1 else None
    return model


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order of llama.cpp's rotary embedding."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def values(writer, family: str, config, layers: int) -> None:
    writer.add_block_count(layers)
    for add, value in (
        (writer.add_context_length, 256),
        (writer.add_embedding_length, HIDDEN),
        (writer.add_feed_forward_length, 512),
        (writer.add_head_count, HEADS),
        (writer.add_head_count_kv, KV),
        (writer.add_layer_norm_rms_eps, config.rms_norm_eps),
        (writer.add_vocab_size, 320),
        (writer.add_key_length, config.head_dim if hasattr(config, "head_dim") else 32),
        (writer.add_rope_freq_base, config.rope_parameters.get("rope_theta", 10000.0) if family != "gemma3" else 1e6),
    ):
        add(value)
    if family.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    letters = list(bytes_to_unicode().values())
    tokens = ["<pad>", "<s>", "</s>", *letters]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens + [f"<{i}>" for i in range(310 - len(tokens) - 1)] + ["he"])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write(path, family: str, kind: Q, *, layers: int = LAYERS, drop: str = "-", parts: int = 1):
    """A GGUF file of a small random model, and the model; of `layers` in its header, without tensors named `drop`."""
    model, arch = make(family), FAMILIES[family][1]
    names = gguf.get_tensor_name_map(arch, LAYERS)
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[arch])
    values(writer, family, model.config, layers)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    for name, tensor in model.state_dict().items():
        told = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if (name == "lm_head.weight" and model.config.tie_word_embeddings) or drop in told:
            continue
        x = tensor.float().numpy()
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            x = interleaved(x, HEADS if "q_proj" in name else KV)
        if family.startswith("gemma") and "norm" in name:
            x = x + 1  # llama.cpp's norms multiply by the weight alone
        if x.ndim == 1:
            writer.add_tensor(told, x.astype(np.float32))
        elif kind == Q.F16:
            writer.add_tensor(told, x.astype(np.float16))
        else:
            writer.add_tensor(told, gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ILDLAB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ERROR, ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_gives_the_model_that_it_was_made_of(family, kind, tmp_path):
    model = write(tmp_path / "model.gguf", family, kind)
    loaded = load_model(tmp_path / "model.gguf", dtype="float32", device="cpu")
    ids = torch.arange(5, 25)[None]
    want, got = (m(input_ids=ids).logits for m in (model, loaded.model))
    assert float((want - got).abs().max() / want.abs().max()) < ERROR[kind]
    assert not hasattr(loaded.model.config, "quantization_config")
    LayerStack(loaded.model).remove(1)


def test_a_k_quant_is_read_block_by_block(tmp_path):
    """gguf writes no K-quants: one whose blocks are made by hand gives what gguf itself reads from them."""
    rng = np.random.default_rng(0)
    model = write(tmp_path / "model.gguf", "llama", Q.F16)
    block = rng.integers(0, 256, (512, 144), np.uint8)  # Q4_K: 256 values in 144 bytes; the two scales are fp16
    block[:, :4] = np.array([0.001, 0.0005], np.float16).view(np.uint8)
    arch, names = MODEL_ARCH.LLAMA, gguf.get_tensor_name_map(MODEL_ARCH.LLAMA, LAYERS)
    writer = gguf.GGUFWriter(str(tmp_path / "k.gguf"), gguf.MODEL_ARCH_NAMES[arch])
    values(writer, "llama", model.config, LAYERS)
    for name, tensor in model.state_dict().items():
        told, x = names.get_name(name, try_suffixes=(".weight",)), tensor.numpy()
        if "gate_proj" in name:  # [512, 256]
            writer.add_tensor(told, block, raw_dtype=Q.Q4_K)
        else:
            writer.add_tensor(told, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load_model(tmp_path / "k.gguf", dtype="float32", device="cpu")
    want = torch.from_numpy(gguf.quants.dequantize(block, Q.Q4_K))
    assert torch.equal(loaded.model.model.layers[1].mlp.gate_proj.weight, want)


def test_it_is_dequantised_once(tmp_path, monkeypatch):
    write(tmp_path / "MODEL.GGUF", "llama", Q.Q8_0)
    first = load_model(tmp_path / "MODEL.GGUF", dtype="bfloat16", device="cpu")
    assert first.model.dtype == torch.bfloat16 and first.name.endswith("MODEL.GGUF")
    monkeypatch.setattr(reading, "read_gguf", lambda *a: pytest.fail("it was dequantised again"))
    again = load_model(tmp_path / "MODEL.GGUF", dtype="bfloat16", device="cpu")
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"drop": "blk.2."}, "3 layers, its tensors are of 2"),
        ({"layers": 5}, "5 layers, its tensors are of 3"),
        ({"drop": "blk.1.ffn_up"}, r"it lacks model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"parts": 2}, "one of 2 parts .* --merge"),
    ],
    ids=["without a layer", "too many layers", "without a tensor", "a part"],
)
def test_a_file_that_is_not_whole_is_refused(odd, words, tmp_path):
    write(tmp_path / "model.gguf", "llama", Q.F16, **odd)
    with pytest.raises(ModelError, match=words):
        load_model(tmp_path / "model.gguf")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    "content", [b"GGUF not really", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"]
)
def test_what_is_no_gguf_is_refused(content, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(ModelError, match="LFS pointer" if b"lfs" in content else "as GGUF"):
        load_model(tmp_path / "broken.gguf")


def test_half_a_download_is_refused(tmp_path):
    write(tmp_path / "whole.gguf", "llama", Q.F16)
    content = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "half.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="as GGUF"):
        load_model(tmp_path / "half.gguf")
