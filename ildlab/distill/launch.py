"""`accelerate launch -m ildlab.distill CONFIG`: one distillation from a JSON file, on any number of processes.

The file names the teacher, the student's removed layers (or an exported student), the text and the
`DistillConfig`; the weights that trained and the metrics are written where it says. From a notebook, `launch`
starts it and follows its JSONL.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ildlab.distill.config import DistillConfig
from ildlab.errors import DistillError
from ildlab.files import atomic_file
from ildlab.progress import Progress, Work, drive

if TYPE_CHECKING:
    import pandas as pd

_KEYS = {
    "teacher": "name or folder of the teacher (needed)",
    "student": "folder of an exported student; by default the teacher",
    "removed": "layer ids to remove from the student before training",
    "gap": "layer ids just removed; by default `removed`",
    "text": "a source of ildlab.load_text (needed)",
    "text_column": 'column of a .jsonl, .parquet or Hub text; by default "text", or the only one that holds strings',
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
    try:
        values = json.loads(given.config.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DistillError(f"{given.config} cannot be read as JSON: {error}.") from error
    _check(values, str(given.config))
    run(values)
    return 0


def _check(values: dict[str, Any], where: str) -> None:
    unknown = set(values) - set(_KEYS)
    missing = {"teacher", "text", "out"} - set(values)
    if unknown or missing:
        raise DistillError(
            f"{where}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}. Known: {', '.join(_KEYS)}."
        )


def launch(values: dict[str, Any], *, processes: int = 1, show: bool | None = None) -> pd.DataFrame:
    """Run `launch_steps` to its end, with a bar."""
    return drive(launch_steps(values, processes=processes), desc="distill", show=show)


def launch_steps(values: dict[str, Any], *, processes: int = 1, poll: float = 0.5) -> Work[pd.DataFrame]:
    """Distill in processes of their own, and follow the metrics that they write.

    Parameters
    ----------
    values : dict
        Keys as in the file of `python -m ildlab.distill`. The file, the log of the processes and, where `metrics`
        is not given, the JSONL are written beside `out`.
    processes : int
        More than one are started by `accelerate launch`: one a GPU, or on the CPU where there is none.
    poll : float
        Seconds between two looks at the JSONL.

    Yields
    ------
    Progress
        `partial` is the step's record. Closing the generator ends the processes; a `checkpoint` is kept.

    Returns
    -------
    DataFrame
        One row a step, as in `DistillResult.history`.

    Raises
    ------
    DistillError
        An unknown key, or processes that failed: with the end of their log.
    """
    import pandas as pd
    import torch

    from ildlab.distill.train import step_note

    _check(values, "launch")
    out = Path(values["out"])
    out.parent.mkdir(parents=True, exist_ok=True)
    values = {"metrics": f"{out}.jsonl", **values}
    metrics = Path(values["metrics"])
    plan, log = Path(f"{out}.json"), Path(f"{out}.log")
    plan.write_text(json.dumps(values))
    metrics.unlink(missing_ok=True)  # written anew; a checkpoint holds the records of the steps before it
    command = [sys.executable, "-m"]
    if processes > 1:
        on_cpu = str(values.get("device", "auto")) == "cpu" or not torch.cuda.is_available()
        command += ["accelerate.commands.launch", *(["--cpu"] if on_cpu else ["--multi_gpu"])]
        command += ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", "--main_process_port", "0", "-m"]
    config = DistillConfig.from_dict(values.get("config", {}))
    tokens = config.tokens or values.get("text_tokens") or 0
    total = math.ceil(tokens / (config.batch_size * values.get("block", 256)))
    records: list[dict[str, float]] = []
    with open(log, "w") as written:
        job = subprocess.Popen([*command, "ildlab.distill.train", str(plan)], stdout=written, stderr=written)
        try:
            ended = False
            while not ended:
                ended = job.poll() is not None  # asked first, so that the last lines are read after the end
                for record in _new_records(metrics, len(records)):
                    records.append(record)
                    yield Progress(record["step"], max(total, record["step"]), step_note(record), record)
                if not ended:
                    time.sleep(poll)
        finally:
            if job.poll() is None:
                job.terminate()  # accelerate ends its workers
                job.wait()
    if job.returncode:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise DistillError(f"The processes failed with exit status {job.returncode} (log: {log}):\n{end}")
    return pd.DataFrame(records)


def _new_records(metrics: Path, known: int) -> list[dict[str, float]]:
    """Whole lines of the JSONL behind the `known` first ones."""
    if not metrics.exists():
        return []
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]  # the last piece is a line not yet whole
    return [json.loads(line) for line in lines[known:]]


def run(values: dict[str, Any]) -> None:
    """Distill as a config file says, in this process (one of several under `accelerate launch`)."""
    import torch
    from accelerate import PartialState
    from safetensors.torch import save_file

    from ildlab.distill.train import distill_steps
    from ildlab.model.load import load_model
    from ildlab.model.stack import LayerStack
    from ildlab.text.blocks import load_text

    # What can be wrong is found out before minutes of loading and hours of training.
    config = DistillConfig.from_dict(values.get("config", {}))
    config.check()
    out = Path(values["out"])
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise DistillError(f"out={str(out)!r}: its folder cannot be written to.")
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
            text_column=values.get("text_column"),
        )
    teacher = LayerStack(loaded.model)
    student = LayerStack(load_model(values["student"], **options).model) if values.get("student") else teacher.share()
    for layer_id in values.get("removed", []):
        student.remove(layer_id)
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
