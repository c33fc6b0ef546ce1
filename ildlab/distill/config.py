"""What to distill with: `DistillConfig`; and what came out: `DistillResult`."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pandas as pd

from ildlab.distill.losses import Divergence, DivergenceKind, HiddenLoss
from ildlab.errors import DistillError
from ildlab.typed import known_fields, read_fields


@dataclass(frozen=True)
class DistillConfig:
    """How a student is distilled; checked where it is made.

    The defaults follow the runs in docs/distillation.md, which says how far they go;
    `DistillConfig.paper()` is the published loss and scope to the letter.

    Raises DistillError where a field asks for something impossible.
    """

    scope: str | tuple[int, ...] = "window(3)"
    """Layers that train: "neighbours" (the one below and the one above each gap), "window(k)" (k on each
    side), "suffix" (all above the lowest gap, earlier removals' included), "suffix(k)" (and k below it),
    "all", or layer ids."""
    divergence: DivergenceKind = "forward_kl"
    """"forward_kl" KL(teacher || student), "reverse_kl", or "jsd"."""
    temperature: float = 1.0
    """Temperature of the divergence; it is multiplied by T^2."""
    kl_weight: float = 1.0
    """Weight of the divergence; 0 leaves it out."""
    kl_positions: int | None = None
    """Positions sampled in each sequence for divergence and cross entropy; None is all of them."""

    hidden_loss: HiddenLoss = "relative_mse"
    """"mse" (the paper), "relative_mse" (over the teacher's squared norm, token by token) or "cosine"."""
    hidden_weight: float | None = None
    """Weight of the hidden-state loss, after the last layer that trains and after the last, beside the divergence; 0
    leaves it out (the local stage has it whatever this says). None: 0, or 1 where the paper's reduction is asked for or
    nothing else is left to learn from."""

    ce_weight: float = 0.0
    """Weight of the cross entropy with the data's own next tokens."""
    reduction: Literal["token", "paper"] = "token"
    """"token": sums over valid tokens of the global batch, divided by their number. "paper": KL summed over
    everything, padding too, and divided by 100; MSE averaged over everything."""

    tokens: int | None = None
    """Tokens to train on, passing over the text as often as needed; None is one pass."""
    local_tokens: int | None = None
    """Tokens of a stage before that: each run of neighbouring layers that train learns to give the teacher's hidden
    state after it, by `hidden_loss`. Nothing above the highest of them runs, so a token costs a fraction. None is one
    pass over the text; 0 leaves it out."""
    local_rate: float | None = None
    """Peak learning rate of the local stage. None: 2e-3, and of fewer than 100 steps 2e-5 times their number."""
    batch_size: int = 8
    """Sequences in an optimizer step, over all processes."""
    micro_batch: int | None = None
    """Sequences in one forward pass of one process; gradients are accumulated. None is all of a process's."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW. It and `local_rate` are right for SmolLM2-135M; wider models want lower ones."""
    warmup: float = 0.1
    """Part of the steps over which the learning rate rises linearly."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """After the warm-up: "constant", "linear" (to 0) or "cosine" (to 0)."""
    clip: float | None = 1.0
    """Largest norm of the whole gradient; None leaves it as it is."""
    seed: int | None = None
    """Sets data order and sampled positions, both functions of (seed, step) alone. None: 0, or, in a session, what
    follows from the run's seed and the layers removed so far."""
    checkpoint_every: int | None = None
    """Optimizer steps between checkpoints; None is a minute of work."""

    def __post_init__(self):
        read_fields(self, DistillError)
        if self.reduction == "paper" and self.local_tokens is None:  # the paper has no such stage
            object.__setattr__(self, "local_tokens", 0)
        if self.hidden_weight is None:
            alone = self.reduction == "paper" or not (self.kl_weight or self.ce_weight)
            object.__setattr__(self, "hidden_weight", float(alone))
        self.spec  # noqa: B018  (raises)
        if isinstance(self.scope, str):
            scope_parts(self.scope)
        if self.kl_weight == self.hidden_weight == self.ce_weight == 0:
            raise DistillError("kl_weight, hidden_weight and ce_weight are all 0: there is nothing to learn from.")
        for name in ("kl_weight", "hidden_weight", "ce_weight", "local_tokens"):
            self._require(name, (getattr(self, name) or 0) >= 0, "it cannot be negative")
        for name in ("batch_size", "tokens", "micro_batch", "kl_positions", "checkpoint_every"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "it must be at least 1")
        self._require("learning_rate", self.learning_rate > 0, "it must be above 0")
        for name in ("local_rate", "clip"):
            self._require(name, getattr(self, name) is None or getattr(self, name) > 0, "it must be above 0, or None")
        self._require("warmup", 0 <= self.warmup <= 1, "it is a part of the steps, from 0 to 1")
        if self.reduction == "paper" and (
            self.hidden_loss != "mse"
            or self.ce_weight
            or self.kl_positions
            or self.temperature != 1
            or self.local_tokens != 0
        ):
            raise DistillError(
                "reduction='paper' is the published loss to the letter: hidden_loss='mse', ce_weight=0, "
                "temperature=1, kl_positions=None, local_tokens=0. For anything else use reduction='token'."
            )

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise DistillError(f"{name}={getattr(self, name)}: {wanted}.")

    @classmethod
    def paper(cls, **changes) -> DistillConfig:
        """The published setting: sum KL / 100 + MSE(last trainable) + MSE(last), neighbours of the gap.

        Source: arXiv 2511.05085. KL and MSE run over padding too, so the loss depends on the batch size.
        """
        published = {"scope": "neighbours", "hidden_loss": "mse", "reduction": "paper", "local_tokens": 0}
        return cls(**{**published, "learning_rate": 1e-4, **changes})

    @property
    def spec(self) -> Divergence:
        """The divergence as `losses` takes it."""
        return Divergence(self.divergence, self.temperature)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict of every field."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DistillConfig:
        """The config of these fields; a name that is no field is refused."""
        return cls(**known_fields(cls, values, DistillError))


def scope_parts(scope: str) -> tuple[str, int]:
    """Name of a scope, and how many layers it reaches; DistillError where there is none such."""
    match = re.fullmatch(r"(window|suffix)\((\d+)\)", scope)
    name, reach = (match[1], int(match[2])) if match else (scope, 1 if scope == "neighbours" else 0)
    if name not in ("neighbours", "window", "suffix", "all") or (name == "window" and reach < 1):
        raise DistillError(
            f"scope={scope!r}: choose 'neighbours', 'window(k)', 'suffix', 'suffix(k)', 'all' or a list of layer ids."
        )
    return name, reach


@dataclass
class DistillResult:
    """What a distillation did.

    Parameters
    ----------
    history : DataFrame
        One row an optimizer step: step, tokens, loss, kl (nats a token), hidden and hidden_<layer id>, ce,
        agreement (part of top tokens that equal the teacher's), grad_norm (of the trained weights, before
        clipping), grad_kl and grad_hidden (norms at the hidden states where each term attaches; a cross entropy
        counts with the divergence), kl_share, learning_rate, seconds, tokens_per_second. A term that is not part
        of the loss was not computed: None.
    trained, gap : list of int
        Layer ids.
    tokens, steps, seconds
        Resumed parts included.
    peak : int
        Most memory in use, in bytes: of the process on a CPU, of the device on CUDA; of the first of several processes.
    """

    history: pd.DataFrame
    trained: list[int]
    gap: list[int]
    tokens: int
    steps: int
    seconds: float
    peak: int = 0
    config: DistillConfig = field(default_factory=DistillConfig)

    def __repr__(self) -> str:
        return f"DistillResult(trained={self.trained}, {self.steps} steps, {self.tokens} tokens, {self.seconds:.1f} s)"

    def _repr_html_(self) -> str:
        ends = self.history.iloc[[0, -1]]
        shown = [c for c in ("step", "loss", "kl", "hidden", "agreement", "learning_rate") if c in ends]
        return f"<p>{self!r}</p>" + ends[shown].to_html(index=False, float_format=lambda x: f"{x:.4g}", border=0)
