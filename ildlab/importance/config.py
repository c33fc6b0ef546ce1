"""What a measurement takes: the metrics, and `MeasureConfig` with all of their options."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from ildlab.errors import MeasureError
from ildlab.typed import read_fields

Metric = Literal[
    "block_influence", "angular_distance", "mse", "relative_l2", "lrp", "magnitude", "taylor", "nll", "kl", "task"
]
METRICS: tuple[str, ...] = get_args(Metric)
ONE_PASS = METRICS[:7]
ABLATION = METRICS[7:9]
TIES = {"nll": 0.02, "kl": 0.02, "task": 0.005}


def _option(default: Any, *metrics: str) -> Any:
    """A field that only these metrics have."""
    return field(default=default, metadata={"metrics": metrics})


@dataclass(frozen=True)
class MeasureConfig:
    """The options of `ildlab.measure`, checked here once, before any work.

    Parameters
    ----------
    metric : str
        "block_influence", "angular_distance", "mse", "relative_l2", "lrp", "magnitude", "taylor": see
        `ildlab.importance.one_pass`. By exact ablation, "nll", the increase of the negative log-likelihood per token
        when the layer is skipped, and "kl", KL(teacher || student without the layer) per token, both in nats; "task",
        the drop of a suite's aggregate.
    race : bool
        nll, kl, task: stop scoring layers that surely are not the least important one (`ildlab.importance.race`).
    layers : sequence of int, optional
        nll, kl: score these layers alone, two or more; the others have no score. By default all.
    medians : dict, optional
        nll, kl: a median layer's damage to each kind of text, by default that of the layers scored (`details["medians"]`).
    positions : int, optional
        taylor, nll, kl: score a seeded random sample of so many positions of each sequence, so that the head is paid
        only there (unbiased; the layers still see the whole sequence). By default all.
    batch_size : int
        All but task: sequences in a batch; it is halved on an out-of-memory error, and `details["notes"]` says so.
    seed : int
        Of the sampled positions, and of the order of a suite's examples in a race.
    confidence : float
        Of the intervals, and of a race.
    tie : float, optional
        nll, kl, task: what may be lost by picking one of two near layers, at which a race ends (the indifference zone
        of Bechhofer 1954). By default 0.02 nats per token (of a median layer's damage, on text of several kinds), and
        0.005 of a suite's aggregate.
    max_branch_bytes : int
        Memory for the branches' hidden states; more of them go in waves. With offloaded layers as many sequences as
        fit go through each layer while it is loaded.
    suite : str or Suite
        task: what `ildlab.evaluate.suites.load_suite` takes.
    limit : int, optional
        task: rows of each task at most.

    Raises
    ------
    MeasureError
        A value is none that its option takes, or the metric has no such option.
    """

    metric: Metric = "block_influence"
    race: bool = _option(False, *ABLATION, "task")
    layers: tuple[int, ...] | None = _option(None, *ABLATION)
    medians: dict[str, float] | None = _option(None, *ABLATION)
    positions: int | None = _option(None, "taylor", *ABLATION)
    batch_size: int = _option(8, *ONE_PASS, *ABLATION)
    seed: int = 0
    confidence: float = 0.95
    tie: float | None = _option(None, *ABLATION, "task")
    max_branch_bytes: int = 2 * 2**30
    suite: Any = _option(None, "task")
    limit: int | None = _option(None, "task")

    def __post_init__(self):
        known = options_of(self.metric)
        read_fields(self, MeasureError)
        for each in fields(self):
            # What says "as always" (race=False, positions=None) any metric can be given.
            if each.name not in {*known, "metric"} and getattr(self, each.name) != each.default:
                raise _no_option(self.metric, each.name)
        for name in ("positions", "batch_size", "max_branch_bytes", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MeasureError(f"{name}={value}: it must be at least 1.")
        if self.layers is not None and len(set(self.layers)) < 2:
            raise MeasureError(f"layers={list(self.layers)}: name at least two, of which one is the less important.")
        for kind, level in (self.medians or {}).items():
            if not level > 0:
                raise MeasureError(f"medians: that of {kind!r} is {level}: it must be above 0.")
        for name in ("seed", "tie"):
            if (getattr(self, name) or 0) < 0:
                raise MeasureError(f"{name}={getattr(self, name)}: it must not be negative.")
        if not 0.5 <= self.confidence < 1:
            raise MeasureError(f"confidence={self.confidence}: a probability from 0.5 up to, and without, 1.")
        if self.tie is None:
            object.__setattr__(self, "tie", TIES.get(self.metric))

    def told(self) -> dict[str, Any]:
        """The options of this metric as `LayerScores.details` keeps them: JSON-able, without the suite."""
        return {name: getattr(self, name) for name in sorted(options_of(self.metric) - {"suite"})}


def options_of(metric: str) -> set[str]:
    """Names of the options that `measure` takes for a metric; MeasureError where there is no such metric."""
    if metric not in METRICS:
        raise MeasureError(f"There is no metric {metric!r}. Choose one of: {', '.join(METRICS)}.")
    return {f.name for f in fields(MeasureConfig) if metric in f.metadata.get("metrics", METRICS)} - {"metric"}


def check_options(metric: str, options: dict[str, Any]) -> MeasureConfig:
    """The config of a metric with these options; MeasureError as `MeasureConfig`."""
    for name in sorted(set(options) - {f.name for f in fields(MeasureConfig)[1:]}, key=str):
        raise _no_option(metric, name)
    return MeasureConfig(metric=metric, **options)


def _no_option(metric: str, name: str) -> MeasureError:
    known = ", ".join(sorted(options_of(metric)))
    return MeasureError(f"measure({metric!r}) has no option {name!r}. It has: {known}.")
