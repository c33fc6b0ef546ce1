"""The doctor of checkpoints: what is ill is named, and what can be mended is mended in a copy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from ildlab.doctor import doctor, examine, main, mend
from ildlab.errors import ExportError


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A sound checkpoint of 6 layers, with a tokenizer."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change=None, **config):
    if change:
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def ill(folder):
    return {each.looked_at: each.words for each in examine(folder) if not each.well}


def dropped(*numbers):
    """Layers taken out of the file by hand, the others with their old numbers."""
    return lambda w: {n: t for n, t in w.items() if not any(f"layers.{i}." in n for i in numbers)}


def broken(weights):
    return weights | {"model.norm.weight": torch.full_like(weights["model.norm.weight"], float("nan"))}


def test_a_sound_checkpoint_in_a_process_of_its_own(folder):
    found = doctor(folder)
    assert all(each.well for each in found), found
    assert [each.looked_at for each in found][:3] == ["files", "layers", "lists of the config"]
    assert "KV cache" in [each.looked_at for each in found]


@pytest.mark.parametrize(
    ("change", "config", "what", "words"),
    [
        (None, {"num_hidden_layers": 8}, "layers", "config says 8, the weights are of 6"),
        (dropped(2, 4), {}, "layers", "config says 6, the weights are of 4, numbered 0, 1, 3, 5"),
        (
            None,
            {"model_type": "qwen2", "layer_types": ["full_attention"] * 9},
            "lists of the config",
            "9 entries for 6",
        ),
        (lambda w: {f"_orig_mod.{n}": t for n, t in w.items()}, {}, "weights", "torch.compile"),
        (broken, {}, "finite weights", "model.norm.weight"),
        (
            lambda w: {n: t for n, t in w.items() if "layers.3.mlp" not in n},
            {},
            "weights",
            "it lacks model.layers.3.mlp",
        ),
        (None, {"model_type": "no_such_thing"}, "config", "no_such_thing"),
    ],
)
def test_what_is_ill_is_named(folder, change, config, what, words):
    rewrite(folder, change, **config)
    assert words in ill(folder)[what]


def test_files_and_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    assert "cannot be read" in ill(folder)["tokenizer"]
    (folder / "model.safetensors").unlink()
    assert "no .safetensors" in ill(folder)["files"]


def test_a_tokenizer_with_more_ids_than_the_embedding(folder):
    rewrite(
        folder,
        lambda w: w | {n: w[n][:290].clone() for n in ("model.embed_tokens.weight", "lm_head.weight")},
        vocab_size=290,
    )
    assert "290 rows" in ill(folder)["tokenizer"]


def test_a_cut_by_hand_is_mended(folder, tmp_path):
    """Layers 2 and 4 taken out of the file alone: the copy is the model without them."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    del whole.model.layers[4], whole.model.layers[2]
    rewrite(folder, lambda w: {f"module.{n}": t for n, t in dropped(2, 4)(w).items()})
    changed = mend(folder, tmp_path / "mended")
    assert len(changed) == 3 and "0, 1, 3, 5 numbered 0 to 3" in changed[1]
    assert ill(tmp_path / "mended") == {}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mended", dtype=torch.float32)
    ids = torch.arange(5, 15)[None]
    assert torch.equal(again(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)


def test_lists_are_cut_with_the_layers(folder, tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 3
    rewrite(folder, dropped(1), model_type="mistral", layer_types=kinds, sliding_window=4)
    mend(folder, tmp_path / "mended")
    told = json.loads((tmp_path / "mended" / "config.json").read_text())
    assert told["num_hidden_layers"] == 5 and told["layer_types"] == kinds[:1] + kinds[2:]


def test_what_cannot_be_known_is_not_guessed(folder, tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 3
    rewrite(folder, dropped(4, 5), model_type="mistral", layer_types=kinds, num_hidden_layers=4)
    with pytest.raises(ExportError, match="cannot be known"):
        mend(folder, tmp_path / "mended")
    assert not (tmp_path / "mended").exists()


def test_refusals_and_exit_codes(folder, tmp_path, capsys):
    assert main([str(folder)]) == 0 and "ok   KV cache" in capsys.readouterr().out
    assert main([str(tmp_path / "nowhere")]) == 2 and "no folder" in capsys.readouterr().err
    assert main([str(folder), "--fix", str(tmp_path / "new")]) == 2 and "nothing that" in capsys.readouterr().err
    assert main([str(folder), "--fix", str(folder)]) == 2 and "exists" in capsys.readouterr().err
    rewrite(folder, broken)
    asked = [sys.executable, "-m", "ildlab.doctor", str(folder)]
    result = subprocess.run(asked, capture_output=True, text=True)
    assert result.returncode == 1 and "ILL  finite weights" in result.stdout
    with pytest.raises(ExportError, match="nothing that"):
        doctor(folder, fix=tmp_path / "new")
