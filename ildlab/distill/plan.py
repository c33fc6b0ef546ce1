"""What a distillation will do, settled and checked before anything changes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ildlab.distill.config import DistillConfig, DistillResult
from ildlab.distill.scope import match_points, resolve_scope, runs
from ildlab.errors import DistillError
from ildlab.limits import check_input
from ildlab.model.stack import LayerStack
from ildlab.text.rows import Rows


@dataclass(frozen=True)
class Plan:
    """A distillation that can be done: what was asked for, checked against the models and the text."""

    config: DistillConfig
    text: Rows
    gaps: list[int]
    trained: list[int]
    points: list[int]
    local_points: list[int]

    @classmethod
    def of(cls, student: LayerStack, teacher: LayerStack, blocks: Any, config: DistillConfig | None, gap) -> Plan:
        """Check everything that can be wrong before anything changes; raises DistillError, TextError or ModelError."""
        config, text = config or DistillConfig(), Rows.of(blocks)
        check_input(student.model, text.tokens)
        if student.model is teacher.model:
            raise DistillError("Student and teacher are the same model: make the student with teacher.share().")
        if student.hidden_size != teacher.hidden_size:
            raise DistillError(
                f"The student is {student.hidden_size} wide, the teacher {teacher.hidden_size}: they do not match."
            )
        missing = [i for i in student.layer_ids if i not in teacher.layer_ids]
        if missing:
            raise DistillError(f"The student has layers that the teacher lacks: {missing}.")
        gaps = [gap] if isinstance(gap, int) else sorted(gap)
        trained = resolve_scope(config.scope, student, gaps)
        points = match_points(config, student, trained)
        elsewhere = [i for i in trained if any(p.is_meta for p in student.layers[student.position(i)].parameters())]
        if elsewhere:
            raise DistillError(
                f"The weights of layers {elsewhere} are offloaded (device_map): they can be measured, but not trained. "
                "Load the model without device_map, or with these layers on a device."
            )
        return cls(config, text, gaps, trained, points, list(runs(student, trained)))

    def check_processes(self, count: int) -> None:
        """Raise DistillError where the global batch cannot be shared by so many processes."""
        if self.config.batch_size % count:
            raise DistillError(f"batch_size={self.config.batch_size} cannot be shared evenly by {count} processes.")

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.config.batch_size * self.text.tokens.shape[1]

    @property
    def local_steps(self) -> int:
        """Optimizer steps of the local stage."""
        tokens = self.config.local_tokens
        return math.ceil((self.text.tokens.numel() if tokens is None else tokens) / self.step_tokens)

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.local_steps + math.ceil((self.config.tokens or self.text.tokens.numel()) / self.step_tokens)

    def points_at(self, step: int) -> list[int]:
        """Layer ids after which hidden states are matched in a step."""
        return self.local_points if step < self.local_steps else self.points

    def result(self, history: list[dict], seconds: float, peak: int) -> DistillResult:
        """What this plan came to."""
        tokens = self.steps * self.step_tokens
        return DistillResult(
            pd.DataFrame(history), self.trained, self.gaps, tokens, self.steps, seconds, peak, self.config
        )
