"""A step of a run as it lies on disk: a line of JSON, and a file with the weights that it changed, each with its sha256."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ildlab.errors import JournalError
from ildlab.files import atomic_file, sha256_of

_SEAL = re.compile(rb'(.*), "sha256": "([^"]*)"\}\n', re.DOTALL)


@dataclass(frozen=True)
class Step:
    """One journaled action, a line of JSON."""

    step: int  # its number; 0 is the teacher as it was loaded
    parent: int | None  # the step it was taken from
    action: str  # create, measure, remove, distill, failed, evaluate, export, run or undo
    layer_ids: list[int]  # the student's layers after it
    args: dict[str, Any] = field(default_factory=dict)  # what was asked for
    result: dict[str, Any] = field(default_factory=dict)  # what came out
    weights: str | None = None  # name of the file with the tensors that it changed
    weights_sha256: str | None = None  # of that file, as it was written; an older ildlab took none
    seed: int = 0
    seconds: float = 0.0
    time: str = ""  # when it was written, ISO 8601 UTC
    versions: dict[str, str] = field(default_factory=dict)  # of what decides the numbers

    @property
    def whole(self) -> bool:
        """Whether it is no distillation that was stopped part-way."""
        return "stopped_at" not in self.result


# ---- its line -----------------------------------------------------------------------------------


def sealed(step: Step) -> bytes:
    """A step's line, which ends in the sha256 of what stands before; JournalError where a value is not finite."""
    try:
        body = json.dumps(asdict(step), allow_nan=False, default=lambda number: number.item())  # numpy's, torch's
    except ValueError as error:
        raise JournalError(f"A value of this {step.action} is NaN or infinite: it would hide a failure.") from error
    return f'{body[:-1]}, "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"}}\n'.encode()


def unsealed(line: bytes, number: int) -> Step:
    """The step of a line; ValueError or TypeError where it is not what was written as step `number`."""
    if not line.endswith(b"\n"):
        raise ValueError("it has no end")
    seal = _SEAL.fullmatch(line)
    if seal and seal[2] != hashlib.sha256(seal[1] + b"}").hexdigest().encode():
        raise ValueError("its sha256 is not that of what was written")
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    known = Step.__dataclass_fields__
    if not seal and (
        odd := sorted(set(record) - set(known))
    ):  # an older ildlab sealed none, and had these fields alone
        raise ValueError(f"it has {odd[0]!r}, and no sha256")
    step = Step(**{name: value for name, value in record.items() if name in known})
    if step.step != number or not (step.parent is None if number == 0 else 0 <= step.parent < number):
        raise ValueError(f"it is not that of step {number}")
    return step


# ---- its weights --------------------------------------------------------------------------------


def save_weights(folder: Path, number: int, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write the tensors that a step changed into a run folder; returns what its `Step` says of the file."""
    from safetensors.torch import save_file

    name = f"{number:03d}.safetensors"
    packed = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with atomic_file(folder / "weights" / name) as temporary:
        save_file(packed, temporary)
        digest = sha256_of(temporary)
    return {"weights": name, "weights_sha256": digest}


def load_weights(folder: Path, step: Step) -> dict[str, Tensor]:
    """The tensors that a step changed; JournalError where they are not what was written."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if step.weights is None:
        return {}
    path = folder / "weights" / step.weights
    try:
        if Path(step.weights).name != step.weights:  # a journal is no reason to read what lies elsewhere
            raise ValueError("it does not lie in the run folder")
        if step.weights_sha256 not in (None, sha256_of(path)):
            raise ValueError("its sha256 is not that of what was written")
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise JournalError(
            f"Step {step.step} needs {path}, which cannot be read: {error}. Restore it from a backup, or go back to the "
            f"last step before it: session.undo(to={step.parent}), or where the run does not open "
            f"PruningSession.open({str(folder)!r}, step={step.parent})."
        ) from error
