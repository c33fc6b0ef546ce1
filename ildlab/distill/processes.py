"""The same distillation in several processes: one a GPU, or several on a CPU, under torchrun and accelerate.

The parent puts what a worker cannot load by the teacher's name (`task.pt`) into a temporary folder and follows the metrics.
Each worker builds teacher and student and takes the steps of `ildlab.distill.train`; the first writes `trained.pt` at the
end, or where a file `stop` appears, and the parent reads it in.
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
from torch import Tensor, nn

from ildlab import errors
from ildlab.distill import train
from ildlab.distill.config import DistillConfig, DistillResult
from ildlab.distill.masters import peak_memory
from ildlab.distill.plan import Plan
from ildlab.errors import DistillError, IldlabError
from ildlab.files import atomic_file, write_atomic
from ildlab.model.fingerprints import fingerprint
from ildlab.model.load import load_model
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, Work

POLL = 0.2  # seconds between two looks at the metrics


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

    `batch_size` stays that of the whole, and has to be a multiple; `teacher_name` is what `load_model` takes to load
    `teacher` again. Closing the generator ends the processes, and the student gets the weights of the last step yielded,
    or of a later one. Raises DistillError too where a process dies: the student is then as it was.
    """
    files = {"checkpoint": checkpoint, "metrics_path": metrics_path}
    if processes == 1:
        return (yield from train.distill_steps(student, teacher, blocks, config, gap=gap, **files))
    plan = Plan.of(student, teacher, blocks, config, gap)
    plan.check_processes(processes)
    _check_devices(teacher, processes)
    with tempfile.TemporaryDirectory(prefix="ildlab-") as name:
        folder = Path(name)
        metrics = Path(metrics_path or folder / "metrics.jsonl").absolute()
        metrics.unlink(missing_ok=True)  # written anew; a checkpoint holds the records of the steps before it
        files = {"checkpoint": checkpoint and str(Path(checkpoint).absolute()), "metrics_path": str(metrics)}
        torch.save(_task(student, teacher, plan, teacher_name, files), folder / "task.pt")
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
                while not (folder / "trained.pt").exists() and job.poll() is None:
                    time.sleep(POLL)
                _take(folder, student, plan.trained)
            raise
        finally:
            job.terminate()  # where it still runs: torchrun ends its workers, after 30 seconds by force
            job.wait()
        if job.returncode:
            raise _failure(folder, job.returncode)
        peak = _take(folder, student, plan.trained)
    return plan.result(history, history[-1]["seconds"], peak)


def _check_devices(teacher: LayerStack, processes: int) -> None:
    if any(p.is_meta for p in teacher.model.parameters()) or teacher.device.type not in ("cpu", "cuda"):
        raise DistillError("Several processes need the whole teacher on one GPU, or on the CPU: load it so.")
    if teacher.device.type == "cuda" and processes > torch.cuda.device_count():
        raise DistillError(f"processes={processes}: torch sees {torch.cuda.device_count()} GPUs, and each takes one.")


def _task(student: LayerStack, teacher: LayerStack, plan: Plan, name: str, files: dict) -> dict[str, Any]:
    """What a worker is told."""
    pruned = teacher.share(without=set(teacher.layer_ids) - set(student.layer_ids))
    theirs = dict(pruned.model.named_parameters())
    dtype = str(teacher.model.dtype).removeprefix("torch.")
    device = "auto" if teacher.device.type == "cuda" else "cpu"  # "auto" is the worker's own GPU
    return {
        "parent": os.getpid(),
        "load": {"name": str(name), "dtype": dtype, "device": device},
        "layer_ids": student.layer_ids,
        "own": {n: p.detach() for n, p in student.model.named_parameters() if p.data_ptr() != theirs[n].data_ptr()},
        "fingerprints": [fingerprint(stack, any_dtype=True) for stack in (student, teacher)],
        "plan": plan,
        "files": files,
    }


def _launch(folder: Path, processes: int) -> subprocess.Popen:
    # torchrun, on which accelerate's own launcher stands too; with --cpu, that one would start a single process.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with open(folder / "log", "wb") as log:
        # A session of its own: an interrupt of a notebook's cell reaches the parent alone, which then ends all.
        return subprocess.Popen(
            [*command, "-m", __name__, str(folder)], stdout=log, stderr=log, start_new_session=True
        )


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
    if not (folder / "trained.pt").exists():
        raise DistillError("The processes of the distillation left no weights; the student is as it was.")
    given = torch.load(folder / "trained.pt", map_location="cpu")
    student.own(trained)
    for name, param in _weights(student, trained).items():
        param.copy_(given["weights"][name])
    return given["peak"]


def _weights(student: LayerStack, trained: Sequence[int]) -> dict[str, Tensor]:
    layers = {i: student.layers[student.position(i)] for i in trained}
    return {f"{i}.{n}": p for i, layer in layers.items() for n, p in layer.named_parameters()}


# ------------------------------------------------------------------ a worker


def _work(folder: Path) -> None:
    """Take the steps, in one of the processes."""
    import psutil

    task = torch.load(folder / "task.pt", map_location="cpu", weights_only=False)
    plan, teacher = task["plan"], LayerStack(load_model(**task["load"]).model)
    student = teacher.share(without=set(teacher.layer_ids) - set(task["layer_ids"]))
    for name, tensor in task["own"].items():
        place, _, leaf = name.rpartition(".")
        # Not written into the tensor that is there: it is the teacher's as well.
        setattr(student.model.get_submodule(place), leaf, nn.Parameter(tensor.to(teacher.device), requires_grad=False))
    if [fingerprint(stack, any_dtype=True) for stack in (student, teacher)] != task["fingerprints"]:
        raise DistillError(
            f"{task['load']['name']!r} does not load the teacher in memory, which several processes need."
        )
    work = train.distill_steps(student, teacher, plan.text, plan.config, gap=plan.gaps, **task["files"])
    first = os.environ["RANK"] == "0"
    for _ in work:
        if not psutil.pid_exists(task["parent"]):
            raise SystemExit("The notebook or program that asked for this distillation is gone.")
        if first and (folder / "stop").exists():
            break
    work.close()
    if first:
        trained = {name: p.detach() for name, p in _weights(student, plan.trained).items()}
        with atomic_file(folder / "trained.pt") as temporary:
            torch.save({"weights": trained, "peak": peak_memory(student.device)}, temporary)


if __name__ == "__main__":
    try:
        _work(Path(sys.argv[1]))
    except IldlabError as error:
        write_atomic(Path(sys.argv[1]) / "error.json", json.dumps([type(error).__name__, str(error)]))
        raise
