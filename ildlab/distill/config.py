"""What to distill with: `DistillConfig`, which layers it trains, and what came out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

import pandas as pd

from ildlab.distill.losses import HIDDEN_LOSSES, Divergence
from ildlab.errors import DistillError
from ildlab.model.stack import LayerStack


@dataclass
class DistillConfig:
    """How a student is distilled. Everything that changes the result is here, and nothing else.

    The defaults follow the runs in docs/distillation.md, which says how far they go;
    `DistillConfig.paper()` is the published loss and scope to the letter.
    """

    scope: str | Sequence[int] = "window(2)"
    """Layers that train: "neighbours" (the one below and the one above each gap), "window(k)" (k on each
    side), "suffix" (all above the lowest gap, earlier removals' included), "suffix(k)" (and k below it),
    "all", or layer ids."""

    divergence: str = "forward_kl"
    """"forward_kl" KL(teacher || student), "reverse_kl", or "jsd"."""
    temperature: float = 1.0
    """Temperature of the divergence; it is multiplied by T^2."""
    beta: float = 0.5
    """Weight of the teacher in "jsd"."""
    kl_weight: float = 1.0
    """Weight of the divergence; 0 leaves it out."""
    kl_positions: int | None = None
    """Positions sampled in each sequence for divergence and cross entropy; None is all of them."""

    hidden_loss: str = "relative_mse"
    """"mse" (the paper), "relative_mse" (over the teacher's squared norm, token by token) or "cosine"."""
    hidden_weight: float = 1.0
    """Weight of the hidden-state loss; 0 leaves it out."""
    hidden_at: str | Sequence[int] = "last_trainable+last"
    """Where hidden states are matched, by layer id: after the last trainable layer and after the last
    layer (the paper), "last", "all" (every student layer from the first trainable up), or layer ids."""
    hidden_after_norm: bool = False
    """Match the last hidden state after the final norm instead of before it."""

    ce_weight: float = 0.0
    """Weight of the cross entropy with the data's own next tokens."""
    reduction: str = "token"
    """"token": sums over valid tokens of the global batch, divided by their number. "paper": KL summed over
    everything, padding too, and divided by 100; MSE averaged over everything."""

    tokens: int | None = None
    """Tokens to train on, passing over the text as often as needed; None is one pass."""
    batch_size: int = 4
    """Sequences in an optimizer step, over all processes."""
    micro_batch: int | None = None
    """Sequences in one forward pass of one process; gradients are accumulated. None is all of a process's."""
    learning_rate: float = 2e-4
    """Peak learning rate of AdamW."""
    warmup: float = 0.1
    """Part of the steps over which the learning rate rises linearly."""
    schedule: str = "cosine"
    """After the warm-up: "constant", "linear" (to 0) or "cosine" (to 0)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's running averages."""
    clip: float | None = 1.0
    """Largest norm of the whole gradient; None leaves it as it is."""
    seed: int | None = None
    """Sets data order and sampled positions, both functions of (seed, step) alone. None: 0, or, in a session, what
    follows from the run's seed and the layers removed so far."""

    fused: bool = True
    """Divergence in chunks with the gradient in the forward pass; False holds full logits."""
    chunk: int = 256
    """Tokens in a chunk of the fused divergence."""
    lora_rank: int | None = None
    """Train low-rank updates of the scope's linear maps instead (needs peft); merged at the end."""
    bottom_bytes: int = 2**30
    """Most memory (bytes) to keep the hidden states of frozen bottom layers in, from the first pass over the text
    on; where they do not fit, every pass runs these layers again."""
    grad_checkpointing: bool = False
    """Recompute trained layers in the backward pass instead of keeping their activations."""
    compile: bool = False
    """torch.compile the trained layers."""
    checkpoint_every: int | None = None
    """Optimizer steps between checkpoints; None is a minute of work."""
    tracker: str | None = None
    """A tracker of accelerate as well as the JSONL, such as "tensorboard"; it writes beside the metrics."""

    def __post_init__(self):
        if isinstance(self.scope, list):
            self.scope = tuple(self.scope)
        if isinstance(self.hidden_at, list):
            self.hidden_at = tuple(self.hidden_at)
        self.adam_betas = tuple(self.adam_betas)

    @classmethod
    def paper(cls, **changes) -> DistillConfig:
        """The published setting: sum KL / 100 + MSE(last trainable) + MSE(last), neighbours of the gap.

        Source: arXiv 2511.05085. KL and MSE run over padding too, so the loss depends on the batch size.
        """
        return replace(
            cls(
                scope="neighbours",
                hidden_loss="mse",
                hidden_at="last_trainable+last",
                reduction="paper",
                learning_rate=1e-4,
                kl_positions=None,
                kl_weight=1.0,
                hidden_weight=1.0,
            ),
            **changes,
        )

    @property
    def spec(self) -> Divergence:
        """The divergence as `losses` takes it."""
        return Divergence(self.divergence, self.temperature, self.beta)

    def check(self) -> None:
        """Raise DistillError, naming the field, where the config asks for something impossible."""
        for each in fields(self):
            _check_type(each.name, each.type, getattr(self, each.name))
        self.spec  # noqa: B018  (raises)
        if isinstance(self.scope, str):
            _parsed(self.scope)
        _choice("hidden_loss", self.hidden_loss, HIDDEN_LOSSES)
        _choice("reduction", self.reduction, ("token", "paper"))
        _choice("schedule", self.schedule, ("constant", "linear", "cosine"))
        if isinstance(self.hidden_at, str):
            _choice("hidden_at", self.hidden_at, ("last_trainable+last", "last", "all"))
        if self.kl_weight == self.hidden_weight == self.ce_weight == 0:
            raise DistillError("kl_weight, hidden_weight and ce_weight are all 0: there is nothing to learn from.")
        for name in ("kl_weight", "hidden_weight", "ce_weight", "weight_decay", "bottom_bytes"):
            if not getattr(self, name) >= 0:
                raise DistillError(f"{name}={getattr(self, name)}: it cannot be negative.")
        for name in ("batch_size", "chunk"):
            if getattr(self, name) < 1:
                raise DistillError(f"{name}={getattr(self, name)}: it must be at least 1.")
        for name in ("tokens", "micro_batch", "kl_positions", "lora_rank", "checkpoint_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise DistillError(f"{name}={getattr(self, name)}: it must be at least 1, or None.")
        if not self.learning_rate > 0:
            raise DistillError(f"learning_rate={self.learning_rate}: it must be above 0.")
        if not 0 <= self.warmup <= 1:
            raise DistillError(f"warmup={self.warmup}: it is a part of the steps, from 0 to 1.")
        if self.clip is not None and not self.clip > 0:
            raise DistillError(f"clip={self.clip}: it must be above 0, or None.")
        if self.reduction == "paper" and (
            self.hidden_loss != "mse" or self.ce_weight or self.kl_positions or self.temperature != 1
        ):
            raise DistillError(
                "reduction='paper' is the published loss to the letter: hidden_loss='mse', ce_weight=0, "
                "temperature=1, kl_positions=None. For anything else use reduction='token'."
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict of every field."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DistillConfig:
        """The config that `to_dict` wrote.

        Raises
        ------
        DistillError
            A name that is no field.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise DistillError(
                f"DistillConfig has no {', '.join(sorted(unknown))}. "
                f"Its fields: {', '.join(f.name for f in fields(cls))}."
            )
        return cls(**values)


_TYPES = {"float": Real, "int": Integral, "bool": bool, "str": str, "None": type(None)}


def _check_type(name: str, annotation: str, value: Any) -> None:
    """Refuse a value of another type: YAML, for one, reads 5e-4 as a text."""
    known = tuple(_TYPES[part] for part in annotation.split(" | ") if part in _TYPES)
    if len(known) < len(annotation.split(" | ")):
        return  # sequences are looked at where they are used
    if not isinstance(value, known) or (isinstance(value, bool) and bool not in known):
        hint = ""
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value, re.I):
            hint = f" (YAML takes {value} for a text: write {value.lower().replace('e', '.0e')})"
        raise DistillError(f"{name}={value!r}: it must be of type {annotation}{hint}.")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise DistillError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}.")


def _parsed(scope: str) -> tuple[str, int]:
    """Name of a scope, and how many layers it reaches."""
    match = re.fullmatch(r"(window|suffix)\((\d+)\)", scope)
    name, reach = (match[1], int(match[2])) if match else (scope, 1 if scope == "neighbours" else 0)
    if name not in ("neighbours", "window", "suffix", "all") or (name == "window" and reach < 1):
        raise DistillError(
            f"scope={scope!r}: choose 'neighbours', 'window(k)', 'suffix', 'suffix(k)', 'all' or a list of layer ids."
        )
    return name, reach


def resolve_scope(scope: str | Sequence[int], student: LayerStack, gap: int | Sequence[int]) -> list[int]:
    """Layer ids that train, bottom first.

    Parameters
    ----------
    scope : str or sequence of int
        See `DistillConfig.scope`.
    student : LayerStack
        Already without the removed layers.
    gap : int or sequence of int
        The layer ids just removed.

    Raises
    ------
    DistillError
        An unknown scope, a layer that is not in the student, or a scope around a gap where there is none.
    """
    ids = student.layer_ids
    gaps = sorted({gap} if isinstance(gap, int) else set(gap))
    still = [g for g in gaps if g in ids]
    if still:
        raise DistillError(f"Layer {still[0]} is named as a gap, but it is still in the student: remove it first.")
    if not isinstance(scope, str):
        missing = [i for i in scope if i not in ids]
        if missing or not scope:
            raise DistillError(f"scope={list(scope)}: layers {missing or 'none'} cannot train; the student has {ids}.")
        return sorted(set(scope), key=ids.index)
    if scope == "all":
        return ids
    name, reach = _parsed(scope)
    if not gaps:
        raise DistillError(f"scope={scope!r} needs to know which layer was removed (gap): give it, or scope='all'.")
    chosen: set[int] = set()
    # Earlier gaps go on healing: every later removal changes what the layers above them should do.
    lowest = min({*gaps, *range(ids[-1])} - set(ids))
    for g in gaps if name != "suffix" else [lowest]:
        below = [i for i in ids if i < g]
        above = [i for i in ids if i > g]
        if name == "suffix":
            # Where the gap is at the very top, the layer below it is all that can take over.
            chosen.update(above + (below[-reach:] if reach else []) or below[-1:])
        else:
            chosen.update(below[-reach:] + above[:reach])
    return [i for i in ids if i in chosen]


def check_reach(config: DistillConfig, points: Sequence[int], trained: Sequence[int]) -> None:
    """Raise DistillError where a layer would train that no term of the loss reaches."""
    if config.kl_weight or config.ce_weight or not points:
        return
    beyond = [i for i in trained if i > max(points)]
    if beyond:
        raise DistillError(
            f"Layers {beyond} lie above the last matched hidden state (layer {max(points)}), and there is no divergence: "
            "nothing would train them. Leave them out of the scope, or match a higher layer."
        )


def match_points(config: DistillConfig, student: LayerStack, trained: Sequence[int]) -> list[int]:
    """Layer ids after which hidden states are matched, bottom first; the last one always means h[L].

    A student's layer is matched with the teacher's of the same layer id. The student's last layer feeds
    the head, so it meets the teacher's last hidden state even where higher layers were removed.
    """
    if config.hidden_weight == 0:
        return []
    ids = student.layer_ids
    first = ids.index(trained[0])
    if config.hidden_at == "last":
        points = {ids[-1]}
    elif config.hidden_at == "last_trainable+last":
        points = {trained[-1], ids[-1]}
    elif config.hidden_at == "all":
        points = set(ids[first:])
    else:
        points = set(config.hidden_at)
        wrong = [i for i in points if i not in ids[first:]]
        if wrong or not points:
            raise DistillError(
                f"hidden_at={list(config.hidden_at)}: no gradient reaches layers {wrong}; choose among {ids[first:]}."
            )
    found = [i for i in ids if i in points]
    check_reach(config, found, trained)
    return found


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
        Work done, resumed parts included.
    memory : dict of str to int
        Bytes: weights, masters, gradients, optimizer, activations, logits (estimated) and peak (measured for
        the process on a CPU, for the device on CUDA).
    config : DistillConfig
    """

    history: pd.DataFrame
    trained: list[int]
    gap: list[int]
    tokens: int
    steps: int
    seconds: float
    memory: dict[str, int] = field(default_factory=dict)
    config: DistillConfig = field(default_factory=DistillConfig)

    @property
    def tokens_per_second(self) -> float:
        """Training tokens a second."""
        return self.tokens / self.seconds if self.seconds else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict, for the journal."""
        return {
            "history": self.history.to_dict("list"),
            "trained": self.trained,
            "gap": self.gap,
            "tokens": self.tokens,
            "steps": self.steps,
            "seconds": self.seconds,
            "memory": self.memory,
            "config": self.config.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DistillResult:
        """The result that `to_dict` wrote."""
        values = dict(values)
        history = pd.DataFrame(values.pop("history"))
        return cls(history=history, config=DistillConfig.from_dict(values.pop("config")), **values)

    def __repr__(self) -> str:
        return f"DistillResult(trained={self.trained}, {self.steps} steps, {self.tokens} tokens, {self.seconds:.1f} s)"

    def _repr_html_(self) -> str:
        if self.history.empty:
            return f"<code>{self!r}</code>"
        ends = self.history.iloc[[0, -1]]
        shown = [c for c in ("step", "loss", "kl", "hidden", "agreement", "learning_rate") if c in ends]
        return f"<p>{self!r}</p>" + ends[shown].to_html(index=False, float_format=lambda x: f"{x:.4g}", border=0)
