"""`SessionConfig`: what a run is of, checked before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ildlab.distill.config import DistillConfig
from ildlab.errors import DistillError, MeasureError, SessionError
from ildlab.evaluate.suites import load_suite
from ildlab.importance.config import MeasureConfig, check_options
from ildlab.model.stack import LayerStack
from ildlab.session.places import RUN, Place, placed, whole
from ildlab.text.mix import summands
from ildlab.typed import known_fields, read_fields, read_values

# Of a distillation when it had one stage: the defaults of a run folder that names no stages.
ONE_STAGE = {"scope": "window(2)", "hidden_weight": 1.0, "batch_size": 4, "learning_rate": 2e-4, "local_tokens": 0}


@dataclass(frozen=True)
class SessionConfig:
    """What a run is of. Kept in `config.json`; the same values give the same run.

    Parameters
    ----------
    teacher : str
        Name, folder, GGUF file or Hub id, as `load_model` takes it.
    text, train_text, eval_text, text_column : str
        Text to measure on, to distill on (by default the train split of `text`), to judge on (by default its eval split),
        and their column where they are tables, as `load_text` takes them.
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
    train_text: str | None = None
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
        """A config of these settings, local files by their whole paths; all is checked that a run would trip over later."""
        config = cls(teacher, **known_fields(cls, settings, SessionError))
        for name in ("teacher", "text"):
            if not getattr(config, name).strip():
                raise SessionError(f"{name}={getattr(config, name)!r}: it must not be empty.")
        distill, _ = DistillConfig.from_dict(config.distill), check_options(config.metric, config.measure)
        if some := sorted({"layers", "medians"} & set(config.measure)):
            raise SessionError(f"measure={some}: a run's layers change. Give it to measure(), or shortlist to run().")
        nested = {
            "distill": _plain(read_values(DistillConfig, config.distill, DistillError)),
            "measure": _plain(read_values(MeasureConfig, config.measure, MeasureError)),
        }
        config = placed(replace(config, **nested), whole)
        config._check_suites()
        for name in ("calibration_tokens", "train_tokens", "eval_tokens"):
            text = config.text_of(name.removesuffix("_tokens"))
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
        if distill.batch_size % config.processes:
            raise SessionError(
                f"processes={config.processes} cannot share batch_size={distill.batch_size} evenly: change either."
            )
        if config.seed < 0:
            raise SessionError(f"seed={config.seed}: it must not be negative.")
        return config

    def text_field(self, split: str) -> str:
        """Name of the field that says a split's text: its own where that is given, else `text`."""
        own = f"{split}_text"
        return own if getattr(self, own, None) else "text"

    def text_of(self, split: str) -> str:
        """The source of a split's text."""
        return getattr(self, self.text_field(split))

    def _check_suites(self) -> None:
        """Raise where a suite cannot be loaded, or the metric "task" has none, or one that it cannot race on."""
        suite = None if self.suite is None else load_suite(self.suite)
        if self.metric != "task":
            return
        chosen = self.measure.get("suite")
        if chosen is not None and not isinstance(chosen, str):
            raise SessionError("measure: a run keeps its suite by name. Give what load_suite takes, as a text.")
        suite = suite if chosen is None else load_suite(chosen)
        if suite is None:
            raise SessionError("metric='task': it needs a suite. Give suite=.")
        if self.measure.get("race") and not suite.swept:
            raise SessionError(f"measure race=True: {suite.name} is evaluated as a whole, and cannot stop early.")

    def check_layers(self, layer_ids: Sequence[int]) -> None:
        """Raise SessionError where the distillation is to train layers that a teacher does not have."""
        scope = self.distill.get("scope", "")
        missing = [] if isinstance(scope, str) else sorted(set(scope) - set(layer_ids))
        if missing:
            raise SessionError(f"distill scope={scope}: the teacher has no layers {missing}.")

    def told(self, place: Place) -> dict[str, Any]:
        """What `config.json` says of it, with teacher, texts and suites named by `place`."""
        config = placed(self, place)
        return {"teacher": config.teacher, "settings": asdict(config)}

    @classmethod
    def stored(cls, facts: dict[str, Any], folder: Path) -> SessionConfig:
        """The config that the `config.json` of a run folder holds."""
        known = cls.__dataclass_fields__  # an older version had settings that are no more
        settings = {k: v for k, v in facts["settings"].items() if k in known}
        if "distill_stages" not in facts:
            settings["distill"] = ONE_STAGE | settings.get("distill", {})
        return placed(cls(**settings), lambda name: name.replace(RUN, str(folder), 1))

    def changes(self, given: SessionConfig, names: Iterable[str]) -> list[str]:
        """What another config has otherwise of these settings, such as "metric was 'kl', now 'nll'"."""
        ours, theirs = (placed(config, whole)._flat(names) for config in (self, given))
        return [f"{name} was {ours[name]!r}, now {theirs[name]!r}" for name in ours if ours[name] != theirs[name]]

    def _flat(self, names: Iterable[str]) -> dict[str, Any]:
        """Settings by name, nested ones each by its own; equal where two mean the same."""
        found = {name: getattr(self, name) for name in names}
        if "distill" in found:
            config = DistillConfig.from_dict(found.pop("distill"))
            values = config.to_dict() | {"seed": config.seed or 0}
            found |= {f"distill {name}": value for name, value in values.items()}
        if "measure" in found:
            values = {f.name: f.default for f in fields(MeasureConfig)[1:]} | found.pop("measure")
            found |= {f"measure {name}": value for name, value in values.items()}
        return found


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON would give them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def storage_dtype(stack: LayerStack) -> torch.dtype:
    """bf16 where it holds every weight of the model exactly, else the dtype that the model is loaded in."""
    for tensor in stack.model.parameters():
        # Of an offloaded weight nothing is known: it is stored as it was loaded.
        if tensor.is_meta or not torch.equal(tensor, tensor.to(torch.bfloat16).to(tensor.dtype)):
            return stack.model.dtype
    return torch.bfloat16
