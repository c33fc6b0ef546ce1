"""`accelerate launch -m ildlab.distill CONFIG`: one distillation from a JSON file, on any number of processes.

The file names the teacher, the student's removed layers (or an exported student), the text and the
`DistillConfig`; the weights that trained and the metrics are written where it says. A notebook follows
the JSONL.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cache import atomic_file
from .distill_config import DistillConfig
from .errors import DistillError

_KEYS = {
    "teacher": "name or folder of the teacher (needed)",
    "student": "folder of an exported student; by default the teacher",
    "removed": "layer ids to remove from the student before training",
    "gap": "layer ids just removed; by default `removed`",
    "text": "a source of ildlab.load_text (needed)",
    "block": "tokens in a block",
    "text_tokens": "tokens of text to load",
    "dtype": "dtype to load in",
    "device": "device to load on",
    "config": "fields of DistillConfig",
    "metrics": "JSONL file to write",
    "checkpoint": "file for exact resume",
    "out": "safetensors file for the trained weights, named <layer id>.<name in the layer> (needed)",
}


def main(argv: Sequence[str]) -> int:
    """Run a distillation from a JSON file; returns the exit status."""
    import argparse

    listed = "\n".join(f"  {key:12s} {what}" for key, what in _KEYS.items())
    parser = argparse.ArgumentParser(
        prog="python -m ildlab.distill",
        description=__doc__,
        epilog="Keys of the file:\n" + listed,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="a JSON file")
    given = parser.parse_args(argv)
    run(_read(given.config))
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DistillError(f"{path} cannot be read as JSON: {error}.") from error
    unknown = set(values) - set(_KEYS)
    missing = {"teacher", "text", "out"} - set(values)
    if unknown or missing:
        raise DistillError(
            f"{path}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}. Known: {', '.join(_KEYS)}."
        )
    return values


def run(values: dict[str, Any]) -> None:
    """Distill as a config file says, in this process (one of several under `accelerate launch`)."""
    import os

    import torch
    from accelerate import PartialState
    from safetensors.torch import save_file

    from .distill import distill_steps
    from .models import load_model
    from .progress import drive
    from .stack import LayerStack
    from .text import load_text

    device = values.get("device", "auto")
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    options = {"dtype": values.get("dtype", "auto"), "device": device}
    state = PartialState(cpu=not str(device).startswith("cuda"))
    with state.local_main_process_first():  # the first one downloads and prepares, the others find it
        loaded = load_model(values["teacher"], **options)
        blocks = load_text(
            values["text"],
            loaded.tokenizer,
            block=values.get("block", 256),
            tokens=values.get("text_tokens"),
            split="train",
        )
    teacher = LayerStack(loaded.model)
    student = (
        LayerStack(load_model(values["student"], **options).model)
        if values.get("student")
        else teacher.share()
    )
    for layer_id in values.get("removed", []):
        student.remove(layer_id)
    config = DistillConfig.from_dict(values.get("config", {}))
    work = distill_steps(
        student,
        teacher,
        blocks,
        config,
        gap=values.get("gap", values.get("removed", [])),
        checkpoint=values.get("checkpoint"),
        metrics_path=values.get("metrics"),
    )
    result = drive(work, desc="distill")
    if state.is_main_process:
        tensors = {
            f"{i}.{name}": tensor.contiguous()
            for i in result.trained
            for name, tensor in student.layers[student.position(i)].state_dict().items()
        }
        with atomic_file(values["out"]) as temporary:
            save_file(tensors, temporary)
        print(result)
    state.wait_for_everyone()
