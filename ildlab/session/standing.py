"""A distillation that a killed kernel left part-way: how far it was, with which settings, to go on with or to discard."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ildlab.distill.config import DistillConfig
from ildlab.files import write_atomic


@dataclass(frozen=True)
class Standing:
    """An interrupted distillation of today's student."""

    checkpoint: Path
    done: int  # optimizer steps
    total: int
    config: dict[str, Any]  # fields of `DistillConfig`,
    text: str | None  # and the text, that `distill` has to be given to go on with it
    gap: list[int]
    damage: str = ""  # why its checkpoint cannot be read, so that all there is to do is to discard it

    def discard(self) -> None:
        """Delete it; the student is as it was before."""
        self.checkpoint.unlink(missing_ok=True)
        beside(self.checkpoint).unlink(missing_ok=True)

    def __str__(self) -> str:
        changed = {k: v for k, v in self.config.items() if v != getattr(DistillConfig(), k) and k != "seed"}
        told = "".join(f", {k} {v}" for k, v in changed.items())
        stands = f"stands at {self.done} of {self.total} steps"
        if self.damage:
            stands = f"left a checkpoint that cannot be read ({self.damage})"
        return f"A distillation around layers {self.gap} {stands}{told}"


def beside(checkpoint: Path) -> Path:
    """File that says what a checkpoint is of."""
    return checkpoint.with_suffix(".json")


def remember(checkpoint: Path, total: int, config: DistillConfig, text: str | None, gap: list[int]) -> None:
    """Write what a distillation of so many steps is, so that it can be gone on with by who did not begin it."""
    told = {"total": total, "config": config.to_dict(), "text": text, "gap": gap}
    write_atomic(beside(checkpoint), json.dumps(told))


def read_standing(checkpoint: Path) -> Standing | None:
    """What stands in a checkpoint file; None where there is none, or nothing says what it is of."""
    from safetensors import SafetensorError, safe_open

    if not (checkpoint.is_file() and beside(checkpoint).is_file()):
        return None
    try:
        told = json.loads(beside(checkpoint).read_text())
    except ValueError:
        return None
    try:
        with safe_open(checkpoint, framework="pt") as file:
            done = len(json.loads((file.metadata() or {}).get("history", "")))
    except (OSError, ValueError, SafetensorError) as error:
        return Standing(checkpoint, 0, **told, damage=str(error))
    return Standing(checkpoint, done, **told)
