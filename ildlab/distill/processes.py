"""The same distillation in several processes: one a GPU, or several on a CPU, under torchrun and accelerate.

The parent writes to a temporary folder what a worker cannot load by the teacher's name (`given.safetensors`, `plan.json`)
and follows the metrics. Each worker builds teacher and student from it and takes the steps of `ildlab.distill.train`;
the first writes `trained.safetensors` at the end, or where a file `stop` appears, and the parent reads it in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ildlab import errors
from ildlab.distill import train
from ildlab.distill.config import DistillConfig, DistillResult
from ildlab.distill.masters import peak_memory
from ildlab.errors import DistillError, IldlabError
from ildlab.files import atomic_file, write_atomic
from ildlab.model.fingerprints import fingerprint
from ildlab.model.load import load_model
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, Work
from ildlab.text.rows import Rows

POLL = 0.2  # seconds between two looks at the metrics
STEP = 600.0  # seconds that a step under way is waited for where the work is closed
GRACE = 60.0  # seconds that processes are given to end by themselves


def distill_steps(
    student: LayerStack,
    teacher: LayerStack,
    blocks: Any,
    config: DistillConfig | None = None,
    *,
    gap: int | Sequence[int] = (),
    processes: int,
    teacher_name: str,
    checkpoint: Path | str | None = None,
    metrics_path: Path | str | None = None,
) -> Work[DistillResult]:
    """`ildlab.distill.train.distill_steps` in `processes` processes; the student in memory gets the trained weights.

    Parameters
    ----------
    processes : int
        1 is this very process. `batch_size` stays that of the whole, and has to be a multiple.
    teacher_name : str
        What `load_model` takes to load `teacher` again.

    Closing the generator ends the processes, and the student gets the weights of the last step yielded, or a later one.

    Raises
    ------
    DistillError
        As there; or a process died: the student is as it was, and the message has the end of the processes' log.
    """
    files = {"checkpoint": checkpoint, "metrics_path": metrics_path}
    if processes == 1:
        return (yield from train.distill_steps(student, teacher, blocks, config, gap=gap, **files))
    plan = train.Plan.of(student, teacher, blocks, config, gap)
    plan.check_processes(processes)
    _check_devices(teacher, processes)
    with tempfile.TemporaryDirectory(prefix="ildlab-") as name:
        folder = Path(name)
        files = {k: str(Path(v).absolute()) if v else None for k, v in files.items()}
        metrics = Path(files["metrics_path"] or folder / "metrics.jsonl")
        metrics.unlink(missing_ok=True)  # written anew; a checkpoint holds the records of the steps before it
        _give(folder, student, teacher, plan, {**files, "metrics_path": str(metrics), "teacher": str(teacher_name)})
        history: list[dict] = []
        job = _launch(folder, processes)
        try:
            ended = False
            while not ended:
                ended = job.poll() is not None  # asked first, so that the last lines are read after the end
                lines = metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.exists() else []
                for line in lines[len(history) :]:
                    history.append(json.loads(line))
                    yield Progress(len(history), plan.steps, train.step_note(history[-1]), history[-1])
                time.sleep(0 if ended else POLL)
        except GeneratorExit:
            if history:
                (folder / "stop").touch()
                end = time.monotonic() + STEP
                while not (folder / "trained.safetensors").exists() and job.poll() is None and time.monotonic() < end:
                    time.sleep(POLL)
                _take(folder, student, plan.trained)
            raise
        finally:
            _end(job)
        if job.returncode:
            raise _failure(folder, job.returncode)
        peak = _take(folder, student, plan.trained)
    return plan.result(history, history[-1]["seconds"], peak)


def _check_devices(teacher: LayerStack, processes: int) -> None:
    if any(p.is_meta for p in teacher.model.parameters()) or teacher.device.type not in ("cpu", "cuda"):
        raise DistillError("Several processes need the whole teacher on one GPU, or on the CPU: load it so.")
    if teacher.device.type == "cuda" and processes > torch.cuda.device_count():
        raise DistillError(f"processes={processes}: torch sees {torch.cuda.device_count()} GPUs, and each takes one.")


def _give(folder: Path, student: LayerStack, teacher: LayerStack, plan: train.Plan, more: dict) -> None:
    """Write what workers need: the student's tensors that are not the teacher's, the text, and how to train."""
    from safetensors.torch import save_file

    twin = _pruned(teacher, student.layer_ids)
    theirs = dict(twin.model.named_parameters())
    own = {n: p for n, p in student.model.named_parameters() if p.data_ptr() != theirs[n].data_ptr()}
    text = {"tokens": plan.text.tokens, "mask": plan.text.mask}
    tensors = {f"student/{n}": p.detach() for n, p in own.items()} | {n: t for n, t in text.items() if t is not None}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "given.safetensors")
    told = {
        "parent": os.getpid(),
        "fingerprints": [fingerprint(stack, any_dtype=True) for stack in (student, teacher)],
        "dtype": str(teacher.model.dtype).removeprefix("torch."),
        "cuda": teacher.device.type == "cuda",
        "layer_ids": student.layer_ids,
        "source": plan.text.source,
        "text": plan.text.text,
        "config": plan.config.to_dict(),
        "gap": plan.gaps,
        "trained": plan.trained,
    }
    (folder / "plan.json").write_text(json.dumps(told | more), encoding="utf-8")


def _pruned(teacher: LayerStack, layer_ids: Sequence[int]) -> LayerStack:
    student = teacher.share()
    for layer_id in set(teacher.layer_ids) - set(layer_ids):
        student.remove(layer_id)
    return student


def _launch(folder: Path, processes: int) -> subprocess.Popen:
    # torchrun, on which accelerate's own launcher stands too; with --cpu, that one would start a single process.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "ildlab.distill.processes", str(folder)]
    with open(folder / "log", "wb") as log:
        # A session of its own: an interrupt of a notebook's cell reaches the parent alone, which then ends all.
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def _end(job: subprocess.Popen) -> None:
    if job.poll() is None:
        job.terminate()  # the launcher ends its workers
        try:
            job.wait(GRACE)
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()


def _failure(folder: Path, status: int) -> IldlabError:
    told = folder / "error.json"
    if told.exists():
        kind, message = json.loads(told.read_text(encoding="utf-8"))
        return getattr(errors, kind)(message)
    tail = "\n".join((folder / "log").read_text(errors="replace").splitlines()[-20:])
    return DistillError(
        f"A process of the distillation died (exit status {status}); the student is as it was. The end of the log:\n{tail}"
    )


@torch.no_grad()
def _take(folder: Path, student: LayerStack, trained: Sequence[int]) -> int:
    """Put the trained weights into the student; returns the peak memory of the process that wrote them."""
    from safetensors import safe_open

    if not (folder / "trained.safetensors").exists():
        raise DistillError("The processes of the distillation left no weights; the student is as it was.")
    with safe_open(folder / "trained.safetensors", framework="pt") as file:
        student.own(trained)
        for layer_id in trained:
            for name, param in student.layers[student.position(layer_id)].named_parameters():
                param.copy_(file.get_tensor(f"{layer_id}.{name}"))
        return int(file.metadata()["peak"])


# ------------------------------------------------------------------ a worker


def _work(folder: Path) -> None:
    """Take the steps, in one of the processes."""
    import psutil
    from safetensors.torch import load_file, save_file

    told = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    given = load_file(folder / "given.safetensors")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if told["cuda"] else "cpu"
    teacher = LayerStack(load_model(told["teacher"], dtype=told["dtype"], device=device).model)
    student = _pruned(teacher, told["layer_ids"])
    for name in [n for n in given if n.startswith("student/")]:
        place, _, leaf = name.removeprefix("student/").rpartition(".")
        # Not written into the tensor that is there: it is the teacher's as well.
        setattr(student.model.get_submodule(place), leaf, nn.Parameter(given[name].to(device), requires_grad=False))
    if [fingerprint(stack, any_dtype=True) for stack in (student, teacher)] != told["fingerprints"]:
        raise DistillError(f"{told['teacher']!r} does not load the teacher in memory, which several processes need.")
    text = Rows(given["tokens"], given.get("mask"), told["source"], told["text"])
    config, files = DistillConfig.from_dict(told["config"]), {k: told[k] for k in ("checkpoint", "metrics_path")}
    work = train.distill_steps(student, teacher, text, config, gap=told["gap"], **files)
    first = os.environ["RANK"] == "0"
    for _ in work:
        if not psutil.pid_exists(told["parent"]):
            raise SystemExit("The notebook or program that asked for this distillation is gone.")
        if first and (folder / "stop").exists():
            break
    work.close()
    if first:
        layers = {i: student.layers[student.position(i)] for i in told["trained"]}
        tensors = {f"{i}.{n}": p.contiguous() for i, layer in layers.items() for n, p in layer.named_parameters()}
        with atomic_file(folder / "trained.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"peak": str(peak_memory(student.device))})


if __name__ == "__main__":
    try:
        _work(Path(sys.argv[1]))
    except IldlabError as error:
        write_atomic(Path(sys.argv[1]) / "error.json", json.dumps([type(error).__name__, str(error)]))
        raise
