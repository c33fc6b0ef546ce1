"""GGUF files: checked against their own header, dequantised once, and kept in the cache as a plain checkpoint."""

from __future__ import annotations

import json
import re
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ildlab.errors import ModelError, first_line
from ildlab.files import cache_dir, locked, sha256_of, writing
from ildlab.model.whole import check_whole, quiet, refuse_pointer

SUMS = "sha256.json"  # of the files of a kept model, by name


def dequantised(path: Path, dtype: torch.dtype) -> Path:
    """Folder in the cache with the model of a GGUF file in `dtype`; made at the first call, found by the file's sha256.

    Raises
    ------
    ModelError
        The file is no GGUF, a part of a split one, or lacks weights of the model that its header describes.
    """
    refuse_pointer(path)
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    name = f"gguf-{digest[:24]}-{str(dtype).removeprefix('torch.')}"
    return kept(cache_dir("models") / name, lambda scratch: read_gguf(path, dtype))


def kept(folder: Path, make: Callable[[Path], tuple[Any, Any]]) -> Path:
    """Folder with a model and its tokenizer, whole or absent: `make(scratch)` gives them where it is not there yet.

    Of several processes one makes it, and the others wait. What is no longer as it was written is made again.
    """
    if _is_whole(folder):
        return folder
    with locked(folder.with_name(f"{folder.name}.lock")), writing(folder):
        if _is_whole(folder):
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            model, tokenizer = make(Path(temporary))
            saved = Path(temporary) / "saved"
            with quiet():
                model.save_pretrained(saved)
            tokenizer.save_pretrained(saved)
            sums = {file.name: sha256_of(file) for file in saved.iterdir() if file.is_file()}
            (saved / SUMS).write_text(json.dumps(sums))
            if folder.exists():  # a half-made folder of an older version, or a damaged one
                shutil.rmtree(folder)
            saved.rename(folder)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether a model is kept there, each file as it was written."""
    if not any((folder / name).is_file() for name in ("model.safetensors.index.json", "model.safetensors")):
        return False
    try:
        sums = json.loads((folder / SUMS).read_text()) if (folder / SUMS).exists() else {}  # an older ildlab kept none
        odd = [name for name, digest in sums.items() if sha256_of(folder / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        odd = [str(error)]
    if odd:
        warnings.warn(f"{folder} is damaged ({odd[0]}): it is made again.", stacklevel=2)
    return not odd


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model in `dtype` (plain: no quantisation config) and tokenizer of a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _check_header(path)
    # Without `dequantize` a machine with the right kernels would keep the weights packed.
    options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        with quiet():
            quantised, report = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except Exception as error:  # each of its architectures, tokenizers and block formats has errors of its own
        raise ModelError(f"Could not read {path} as GGUF: {first_line(error)}") from error
    check_whole(report, path)
    # transformers marks the model as quantised, which forbids .to() and saving it plainly: build it
    # anew from its config and weights.
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    fresh = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fresh.load_state_dict({name: tensor.to(dtype) for name, tensor in quantised.state_dict().items()})
    fresh.tie_weights()
    if quantised.generation_config is not None:
        fresh.generation_config = quantised.generation_config
    return fresh, tokenizer


def _check_header(path: Path) -> None:
    """Raise ModelError where the tensors in a file are not those of as many layers as its header names."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        told = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise ModelError(f"Could not read {path} as GGUF: {first_line(error)}") from error
    parts = told.get("split.count", 1)
    if parts > 1:
        raise ModelError(
            f"{path} is one of {parts} parts of a split GGUF: join them first "
            f"(`llama-gguf-split --merge {path.name} whole.gguf`), and give the whole file."
        )
    wanted = told.get(f"{told.get('general.architecture')}.block_count")
    found = {int(match[1]) for tensor in reader.tensors if (match := re.match(r"blk\.(\d+)\.", tensor.name))}
    if wanted is not None and len(found) != wanted:
        raise ModelError(
            f"The header of {path} names {wanted} layers, its tensors are of {len(found)}: the file is not whole, or was "
            "cut by hand. Download it again, or convert the model anew."
        )
