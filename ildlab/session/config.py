"""`SessionConfig`: what a run is of, checked before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ildlab.distill.config import DistillConfig
from ildlab.errors import SessionError
from ildlab.evaluate.suites import load_suite
from ildlab.importance.config import check_options
from ildlab.model.stack import LayerStack
from ildlab.text.mix import summands
from ildlab.typed import known_fields, read_fields


@dataclass(frozen=True)
class SessionConfig:
    """What a run is of. Kept in `config.json`; the same values give the same run.

    Parameters
    ----------
    teacher : str
        Name, folder, GGUF file or Hub id, as `load_model` takes it.
    text, eval_text, text_column : str
        Text to calibrate and train on, to judge on (by default the eval split of `text`), and their column where they
        are tables, as `load_text` takes them.
    block, calibration_tokens, train_tokens, eval_tokens : int
        Tokens in a block, to measure on, to distill on after each removal, and to evaluate on.
    metric, measure : str, dict
        Importance metric, and further arguments of `measure`, such as `{"race": True, "positions": 64}`.
    distill : dict
        Fields of `DistillConfig` that differ from its defaults.
    processes : int
        Processes that distill together, each on a device of its own (they share a batch evenly); 1 stays in this one.
    suite : str, optional
        Suite whose aggregate decides; without one, perplexity does.
    seed : int
    weights_dtype : str
        dtype of stored and exported weights, to which trained ones are rounded when a distillation ends. "auto": bf16
        where that holds every weight of the teacher exactly, else the dtype that it is loaded in.
    """

    teacher: str
    text: str = "mix"
    eval_text: str | None = None
    text_column: str | None = None
    block: int = 256
    calibration_tokens: int = 8192
    train_tokens: int = 65536
    eval_tokens: int = 8192
    metric: str = "kl"
    measure: dict[str, Any] = field(default_factory=dict)
    distill: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    suite: str | None = None
    seed: int = 0
    weights_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"

    def __post_init__(self):
        if isinstance(self.distill, DistillConfig):
            object.__setattr__(self, "distill", self.distill.to_dict())
        read_fields(self, SessionError)

    @classmethod
    def of(cls, teacher: str, settings: dict[str, Any]) -> SessionConfig:
        """A config of these settings, each checked that a run would only trip over after its first removal."""
        config = cls(teacher, **known_fields(cls, settings, SessionError))
        DistillConfig.from_dict(config.distill)
        check_options(config.metric, config.measure)
        if config.suite is not None:
            load_suite(config.suite)
        for name in ("calibration_tokens", "train_tokens", "eval_tokens"):
            text = config.eval_text if name == "eval_tokens" and config.eval_text else config.text
            kinds = len(summands(text))
            # Of text of several kinds each needs a block, and two to be measured on.
            least = max(2, kinds * (2 if name == "calibration_tokens" and kinds > 1 else 1))
            if getattr(config, name) < least * config.block:
                of_kinds = f" ({kinds} kinds of text)" if kinds > 1 else ""
                raise SessionError(
                    f"{name} is {getattr(config, name)}: give at least {least} blocks{of_kinds}, {least * config.block}."
                )
        if config.processes < 1:
            raise SessionError(f"processes={config.processes}: at least 1 distills.")
        return config


def storage_dtype(stack: LayerStack) -> torch.dtype:
    """bf16 where it holds every weight of the model exactly, else the dtype that the model is loaded in."""
    for tensor in stack.model.parameters():
        # Of an offloaded weight nothing is known: it is stored as it was loaded.
        if tensor.is_meta or not torch.equal(tensor, tensor.to(torch.bfloat16).to(tensor.dtype)):
            return stack.model.dtype
    return torch.bfloat16
