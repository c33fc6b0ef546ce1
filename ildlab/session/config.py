"""`SessionConfig`: what a run is of, and the checks before it starts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch

from ildlab.distill.config import DistillConfig
from ildlab.errors import SessionError
from ildlab.evaluate.suites import load_suite
from ildlab.importance.config import check_options
from ildlab.model.offload import named_weights
from ildlab.model.stack import LayerStack

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class SessionConfig:
    """What a run is of. Kept in `config.json`; the same values give the same run.

    Parameters
    ----------
    teacher : str
        Name, folder, GGUF file or Hub id, as `load_model` takes it.
    text : str
        Text to calibrate and train on, as `load_text` takes it.
    eval_text : str, optional
        Text to judge on; by default the eval split of `text`.
    text_column : str, optional
        Column or key of `text` and `eval_text` where they are tables, as `load_text` takes it.
    block : int
        Tokens in a block.
    calibration_tokens, train_tokens, eval_tokens : int
        Tokens to measure on, to distill on after each removal, and to evaluate on.
    metric : str
        Importance metric of `measure`.
    measure : dict
        Further arguments of `measure`, such as `{"race": True, "positions": 64}`.
    distill : dict
        Fields of `DistillConfig` that differ from its defaults.
    suite : str, optional
        Suite whose aggregate decides; without one, perplexity does.
    seed : int
    weights_dtype : str
        dtype of stored and exported weights: "bfloat16", "float16", "float32", or "auto": bf16 where that holds
        every weight of the teacher exactly, else the dtype that it is loaded in. Trained weights are rounded to
        it when a distillation ends, so that the student in memory is the one on disk.
    """

    teacher: str
    text: str = "python-docs"
    eval_text: str | None = None
    text_column: str | None = None
    block: int = 256
    calibration_tokens: int = 8192
    train_tokens: int = 65536
    eval_tokens: int = 8192
    metric: str = "kl"
    measure: dict[str, Any] = field(default_factory=dict)
    distill: dict[str, Any] = field(default_factory=dict)
    suite: str | None = None
    seed: int = 0
    weights_dtype: str = "auto"

    @classmethod
    def of(cls, teacher: str, settings: dict[str, Any]) -> SessionConfig:
        """A config of these settings; `distill` may be a `DistillConfig`.

        Raises
        ------
        SessionError, DistillError, MeasureError, SuiteError
            An unknown setting, or one that a run would only trip over after its first removal.
        """
        known = cls.__dataclass_fields__
        unknown = set(settings) - set(known)
        if unknown:
            raise SessionError(f"Unknown setting {sorted(unknown)}. A session has: {sorted(known)}.")
        if isinstance(settings.get("distill"), DistillConfig):
            settings = {**settings, "distill": settings["distill"].to_dict()}
        config = cls(teacher=teacher, **settings)
        DistillConfig.from_dict(config.distill)
        check_options(config.metric, config.measure)
        if config.suite is not None:
            load_suite(config.suite)
        for name in ("calibration_tokens", "train_tokens", "eval_tokens"):
            if getattr(config, name) < 2 * config.block:
                raise SessionError(
                    f"{name} is {getattr(config, name)}: give at least two blocks, {2 * config.block} tokens."
                )
        if config.weights_dtype not in DTYPES:
            raise SessionError(
                f"weights_dtype {config.weights_dtype!r} is no dtype for weights: choose one of {', '.join(DTYPES)}."
            )
        return config


def storage_dtype(stack: LayerStack) -> torch.dtype:
    """bf16 where it holds every weight of the model exactly, else the dtype that the model is loaded in."""
    dtype = stack.model.dtype
    for tensor in stack.model.parameters():
        # Of an offloaded weight nothing is known: it is stored as it was loaded.
        if tensor.is_meta or not torch.equal(tensor, tensor.to(torch.bfloat16).to(tensor.dtype)):
            return dtype
    return torch.bfloat16


def fingerprint(stack: LayerStack) -> str:
    """sha256 of a model's tensor names, shapes and a sample of its values; the same in bf16 and fp32."""
    digest = hashlib.sha256()
    for name, tensor in named_weights(stack.model):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16).float()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
