"""Importance of every layer, with its uncertainty: `measure` and what it returns, `LayerScores`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from ildlab.errors import MeasureError
from ildlab.importance.samples import Rows
from ildlab.progress import Progress, drive
from ildlab.stats import expansion, interval, listed, mean, means, percentiles, ranks, resamples

ONE_PASS = ("block_influence", "angular_distance", "mse", "relative_l2", "lrp", "magnitude", "taylor")
ABLATION = ("nll", "kl")
METRICS = (*ONE_PASS, *ABLATION, "task")


@dataclass
class LayerScores:
    """What a metric says of every layer. Higher = more important.

    Attributes
    ----------
    table : DataFrame, indexed by layer_id
        `score`; `ci_low`, `ci_high` (bootstrap interval over sequences); `n` (sequences scored; fewer
        for a layer that a race dropped early). In the order of the stack.
    metric, source : str
        What was measured, on which text.
    seconds : float
    per_sequence : ndarray [N, L] float64
        Score of each layer on each sequence, NaN where it was not scored; [0, L] where the metric
        reads weights alone.
    weights : ndarray [N] float64
        Tokens scored in each sequence; `score` is the mean weighted by them.
    confidence : float
        Of the intervals.
    details : dict
        JSON-able settings and by-products: positions, batch size, seed, layer passes, notes,
        the whole student's own value (`whole`), and for a race `dropped` (layer id -> n) and `stopped`.
    """

    table: pd.DataFrame
    metric: str
    source: str
    seconds: float
    per_sequence: np.ndarray
    weights: np.ndarray
    confidence: float = 0.95
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_samples(
        cls, metric, source, layer_ids, per_sequence, weights, *, seconds=0.0, confidence=0.95, details=None
    ) -> LayerScores:
        """Build scores and their paired bootstrap intervals from values per sequence.

        Parameters
        ----------
        layer_ids : sequence of int [L]
        per_sequence : array [N, L], NaN where not scored
        weights : array [N]

        Notes
        -----
        Every resample draws N sequences with replacement, the same for all layers (paired), and takes
        the weighted mean; `ildlab.stats.interval` makes bounds of them.
        """
        x, w = np.asarray(per_sequence, float), np.asarray(weights, float)
        index = pd.Index([int(i) for i in layer_ids], name="layer_id")
        scored = ~np.isnan(x)
        n = scored.sum(0)
        score = mean(x, w)
        low = high = np.full(len(index), np.nan)
        if len(x) >= 2:
            low, high = interval(score, means(resamples(len(x)), x, w), n, confidence)
        table = pd.DataFrame({"score": score, "ci_low": low, "ci_high": high, "n": n}, index=index)
        return cls(table, metric, source, seconds, x, w, confidence, dict(details or {}))

    @classmethod
    def exact(cls, metric, source, layer_ids, scores, *, seconds=0.0, details=None) -> LayerScores:
        """Scores that have no sampling error, such as those of weights alone."""
        index = pd.Index([int(i) for i in layer_ids], name="layer_id")
        table = pd.DataFrame({"score": scores, "ci_low": scores, "ci_high": scores, "n": 0}, index=index)
        nothing = np.empty((0, len(index)))
        return cls(table, metric, source, seconds, nothing, np.empty(0), 1.0, dict(details or {}))

    # ---------------------------------------------------------------- reading

    @property
    def layer_ids(self) -> list[int]:
        """Layer ids scored, bottom first."""
        return [int(i) for i in self.table.index]

    @property
    def finalists(self) -> list[int]:
        """Layers scored to the end: all of them, but for a race."""
        n, dropped = self.table["n"], self.details.get("dropped", {})
        return [int(i) for i in self.table.index[n == n.max()] if str(i) not in dropped]

    @property
    def least_important(self) -> int:
        """Layer id with the lowest score (in a race, of those left at its end)."""
        return int(self.table.loc[self.finalists, "score"].idxmin())

    @property
    def ranking(self) -> list[int]:
        """Layer ids, least important first. A layer that a race dropped stands after those kept longer."""
        last = set(self.finalists)
        table = self.table
        return sorted(self.layer_ids, key=lambda i: (i not in last, -table.at[i, "n"], table.at[i, "score"]))

    @cached_property
    def _differences(self) -> np.ndarray:
        """Bootstrap of (mean of each layer) - (mean of the least important), paired, [resamples, L]."""
        least = self.layer_ids.index(self.least_important)
        if not len(self.per_sequence):
            score = self.table["score"].to_numpy(float)
            return (score - score[least])[None]
        paired = self.per_sequence - self.per_sequence[:, [least]]
        return means(resamples(len(paired)), paired, self.weights)

    def separation(self) -> float:
        """Probability, by paired bootstrap, that the least important layer is truly the least.

        The share of resamples in which every other layer scores higher than it, on the sequences
        that both were scored on.
        """
        least = self.layer_ids.index(self.least_important)
        others = np.delete(self._differences, least, axis=1)
        if not others.shape[1]:
            return 1.0
        # A resample may miss every sequence of a layer that was dropped early: it says nothing then.
        return float(np.mean(np.nanmin(np.where(np.isnan(others), np.inf, others), axis=1) > 0))

    @property
    def tied(self) -> list[int]:
        """Layers that are not surely more important than the least one; it is the first of them.

        Surely: the one-sided paired bootstrap bound of the difference, at `confidence` for all layers
        together (Bonferroni), lies above 0.
        """
        least = self.least_important
        alpha = (1 - self.confidence) / max(1, len(self.layer_ids) - 1)
        bound = percentiles(self._differences, (100 * alpha,))[0]
        if len(self.per_sequence) > 1:
            n = (~np.isnan(self.per_sequence)).sum(0)
            paired = self.per_sequence - self.per_sequence[:, [self.layer_ids.index(least)]]
            gap = mean(paired, self.weights)
            bound = gap + (bound - gap) * expansion(n, alpha)
        close = [i for i, b in zip(self.layer_ids, bound, strict=True) if i != least and not b > 0]
        return [least, *sorted(close, key=lambda i: self.table.loc[i, "score"])]

    def split_half(self, splits: int = 200, seed: int = 0) -> float:
        """Spearman correlation of the ranking on one half of the sequences with that on the other.

        The mean over random splits, of the `finalists`. 1: the ranking is
        free of noise at half of this text; NaN where there are fewer than 4 sequences or 3 layers.
        """
        columns = [self.layer_ids.index(i) for i in self.finalists]
        x = self.per_sequence[:, columns]
        x, w = x[~np.isnan(x).any(1)], self.weights[~np.isnan(x).any(1)]
        if len(x) < 4 or len(columns) < 3:
            return 1.0 if not len(self.per_sequence) else math.nan
        rng = np.random.default_rng(seed)
        picks = rng.permuted(np.tile(np.arange(len(x)) < len(x) // 2, (splits, 1)), axis=1).astype(float)
        a, b = (ranks(means(p, x, w)) for p in (picks, 1 - picks))
        a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
        return float(np.mean((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))))

    # ---------------------------------------------------------- storing, showing

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form (values per sequence to 7 digits; NaN is None)."""
        return {
            "metric": self.metric,
            "source": self.source,
            "seconds": self.seconds,
            "confidence": self.confidence,
            "layer_ids": self.layer_ids,
            **{name: listed(self.table[name]) for name in ("score", "ci_low", "ci_high")},
            "n": [int(n) for n in self.table["n"]],
            "weights": listed(self.weights),
            "per_sequence": [listed(row, 7) for row in self.per_sequence],
            "details": self.details,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerScores:
        """Inverse of `to_dict`."""
        index = pd.Index(data["layer_ids"], name="layer_id")
        columns = {name: np.array(data[name], float) for name in ("score", "ci_low", "ci_high")}
        table = pd.DataFrame({**columns, "n": data["n"]}, index=index)
        samples = np.array(data["per_sequence"], float).reshape(len(data["weights"]), len(index))
        weights = np.array(data["weights"], float)
        return cls(
            table,
            data["metric"],
            data["source"],
            data["seconds"],
            samples,
            weights,
            data["confidence"],
            dict(data["details"]),
        )

    def __repr__(self) -> str:
        least = self.least_important
        row = self.table.loc[least]
        return (
            f"LayerScores({self.metric}, {len(self.table)} layers, least important {least}: {row.score:.4g} "
            f"[{row.ci_low:.4g}, {row.ci_high:.4g}], P={self.separation():.2f})"
        )

    def _repr_html_(self) -> str:
        tied, least = set(self.tied[1:]), self.least_important
        top = max(float(np.nanmax(self.table[["score", "ci_high"]].to_numpy(float))), 1e-30)
        rows = []
        for layer_id in self.ranking:
            r = self.table.loc[layer_id]
            width, low, high = (
                100 * min(1.0, max(0.0, v / top)) if v == v else 0 for v in (r.score, r.ci_low, r.ci_high)
            )
            bar = (
                '<svg width="160" height="12" role="img" aria-label="score with interval">'
                f'<rect x="0" y="2" width="{1.5 * width:.1f}" height="8" fill="currentColor" opacity=".35"/>'
                f'<path d="M{1.5 * low:.1f} 6H{1.5 * high:.1f}M{1.5 * low:.1f} 2V10M{1.5 * high:.1f} 2V10" '
                'stroke="currentColor" fill="none"/></svg>'
            )
            mark = "least important" if layer_id == least else "tied with it" if layer_id in tied else ""
            rows.append(
                f"<tr><th>{layer_id}</th><td>{r.score:.4g}</td><td>[{r.ci_low:.4g}, {r.ci_high:.4g}]</td>"
                f"<td>{int(r.n)}</td><td style='text-align:left'>{bar}</td><td style='text-align:left'>{mark}</td></tr>"
            )
        sure = f"layer {least} is the least important with probability {self.separation():.2f}"
        half = self.split_half()
        noise = "" if math.isnan(half) else f"; split-half rank correlation {half:.2f}"
        head = (
            f"<b>{escape(self.metric)}</b> on {escape(self.source)}, {self.seconds:.1f} s: {sure}{noise}. "
            f"Intervals: {100 * self.confidence:g}%."
        )
        return (
            f"<div>{head}<table aria-label='Importance by layer'><thead><tr><th>layer</th><th>score</th>"
            f"<th>interval</th><th>n</th><th></th><th></th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        )


# ----------------------------------------------------------------- measuring


def measure_steps(
    student,
    blocks,
    metric: str = "block_influence",
    teacher=None,
    *,
    race: bool = False,
    positions: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    confidence: float = 0.95,
    **options,
) -> Generator[Progress, None, LayerScores]:
    """Score every layer of the student: the generator behind `measure`, which documents it.

    Yields
    ------
    Progress
        `partial` is the `LayerScores` so far. Close it at any time: the student is untouched.
    """
    check_options(metric, options)
    if metric == "task":
        if positions is not None:
            raise MeasureError("positions=: 'task' scores the continuations of the suite's rows.")
        return (yield from _task_steps(student, race=race, seed=seed, confidence=confidence, **options))
    rows = Rows.of(blocks)
    if metric != "magnitude" and len(rows.tokens) < 2:
        raise MeasureError(
            f"{len(rows.tokens)} sequence(s): an interval needs at least 2. Give more text, or shorter blocks."
        )
    if metric == "kl" and teacher is None:
        raise MeasureError("The metric 'kl' compares with the teacher: give teacher=.")
    if positions is not None and positions < 1:
        raise MeasureError(f"positions={positions}: score at least 1 position of each sequence (None: all).")
    if batch_size < 1:
        raise MeasureError(f"batch_size={batch_size}: at least 1 sequence.")
    if not 0.5 <= confidence < 1:
        raise MeasureError(f"confidence={confidence}: a probability from 0.5 up to, and without, 1.")
    if metric in ONE_PASS:
        if race:
            raise MeasureError(f"race=True: {metric!r} scores all layers in one pass; only {ABLATION} can race.")
        if positions is not None and metric != "taylor":
            raise MeasureError(f"positions=: {metric!r} needs no head, so that all positions are scored.")
        from ildlab.importance.one_pass import one_pass_steps

        work = one_pass_steps(
            student,
            rows,
            metric,
            positions=positions,
            batch_size=batch_size,
            seed=seed,
            confidence=confidence,
            **options,
        )
    else:
        from ildlab.importance.ablation import ablation_steps

        work = ablation_steps(
            student,
            rows,
            metric,
            teacher,
            race=race,
            positions=positions,
            batch_size=batch_size,
            seed=seed,
            confidence=confidence,
            **options,
        )
    return (yield from work)


def measure(
    student,
    blocks,
    metric: str = "block_influence",
    teacher=None,
    *,
    race: bool = False,
    positions: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    confidence: float = 0.95,
    show: bool | None = None,
    **options,
) -> LayerScores:
    """Score how important each layer of the student is; the student is left as it was.

    Parameters
    ----------
    student : LayerStack
    blocks : TextBlocks, int Tensor [N, T], or mapping with `input_ids` and `attention_mask`
        Tokens to score on; each row is one sequence.
    metric : str
        One forward pass: `"block_influence"`, `"angular_distance"`, `"mse"`, `"relative_l2"`,
        `"lrp"`; weights alone: `"magnitude"`; forward and backward: `"taylor"`
        (`ildlab.importance.one_pass` defines them). Exact ablation by a trunk-shared sweep
        (`ildlab.importance.ablation`): `"nll"`, the increase of the negative log-likelihood per token when the
        layer is skipped; `"kl"`, KL(teacher || student without the layer) per token; in nats.
        `"task"`: the drop of a suite's aggregate (needs `suite=` and `tokenizer=`, reads no blocks).
    teacher : LayerStack, optional
        For `"kl"`.
    race : bool
        Sweep batch by batch and stop scoring layers that surely are not the least important one
        (options `tie`, `first`: see `ildlab.importance.ablation.ablation_steps`).
    positions : int, optional
        Score only a seeded random sample of this many positions in each sequence, so that the LM
        head is paid only there (unbiased; the layers still see the whole sequence). By default all.
    batch_size : int
        Sequences in a batch; it is halved on an out-of-memory error, and `details["notes"]` says so.
    seed : int
        Of the sampled positions.
    confidence : float
        Of the intervals, and of a race.
    show : bool, optional
        Draw a progress bar (see `ildlab.progress.drive`).

    Returns
    -------
    LayerScores

    Raises
    ------
    MeasureError
        Unknown metric, a missing teacher, fewer than 2 sequences, positions < 1, or a score that is
        NaN or infinite (names layer and batch).
    """
    work = measure_steps(
        student,
        blocks,
        metric,
        teacher,
        race=race,
        positions=positions,
        batch_size=batch_size,
        seed=seed,
        confidence=confidence,
        **options,
    )
    return drive(work, desc=f"measure {metric}", show=show)


def _work_of(metric: str):
    """The generator function that a metric is measured by.

    Raises
    ------
    MeasureError
        There is no such metric.
    """
    if metric not in METRICS:
        raise MeasureError(f"There is no metric {metric!r}. Choose one of: {', '.join(METRICS)}.")
    if metric == "task":
        from ildlab.importance.task import task_steps as work
    elif metric in ONE_PASS:
        from ildlab.importance.one_pass import one_pass_steps as work
    else:
        from ildlab.importance.ablation import ablation_steps as work
    return work


def options_of(metric: str) -> set[str]:
    """Names of the options that `measure` takes for a metric.

    Raises
    ------
    MeasureError
        There is no such metric.
    """
    known = set(inspect.signature(_work_of(metric)).parameters) - {"student", "rows", "metric", "teacher"}
    return known - {"positions"} if metric in ONE_PASS and metric != "taylor" else known


def check_options(metric: str, options: dict) -> None:
    """Raise MeasureError where `measure` has no such metric, or the metric no such option."""
    known = options_of(metric)
    for name, value in options.items():
        idle = value is None or value is False  # race=False, positions=None: any metric can leave these out
        if name not in known and not (name in ("race", "positions") and idle):
            raise MeasureError(f"measure({metric!r}) has no option {name!r}. It has: {', '.join(sorted(known))}.")


def _task_steps(student, *, suite=None, **options):
    """Hand over to the evaluation: the drop of a suite's aggregate without each layer."""
    from ildlab.importance.task import task_steps

    if suite is None:
        raise MeasureError("The metric 'task' needs a suite: give suite= (and tokenizer=).")
    return (yield from task_steps(student, suite=suite, **options))
