"""`LayerScores`: the record of how important every layer is, with its uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from ildlab.drawing.columns import columns_of, unit_of
from ildlab.drawing.stack import Picture
from ildlab.errors import MeasureError
from ildlab.stats import expansion, interval, listed, mean, means, percentiles, ranks, resamples


def by_kind(
    x: np.ndarray, w: np.ndarray, kinds: np.ndarray, medians: dict[str, float] | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Values on texts of several kinds, made one: each kind in units of its own median layer, all of one weight.

    Kinds differ in nats by an order of magnitude: a copy is nearly certain, prose is not. What counts is how much less
    than other layers one matters to each.

    Parameters
    ----------
    x, w : ndarray [N, L], [N]
        Values (NaN where a layer was not scored) and weights of N sequences.
    kinds : ndarray [N] of str
    medians : dict, optional
        Of an earlier measurement, for kinds that it has, instead of those told from `x`.

    Returns
    -------
    x, w : ndarray [N, L], [N]
        `x` over its kind's median, `w` so that those of each kind add up to 1.
    medians : dict
        Kind -> median over layers of their mean value, on the sequences that all layers were scored on.

    Raises MeasureError where a kind has no damage to be told by.
    """
    x, w, known, medians = x.copy(), w.copy(), medians or {}, {}
    for kind in dict.fromkeys(kinds.tolist()):
        rows = kinds == kind
        whole = rows & ~np.isnan(x).any(1)
        medians[kind] = level = known.get(kind) or float(np.median(mean(x[whole], w[whole])))
        if not level > 0:
            others = "+".join(other for other in dict.fromkeys(kinds.tolist()) if other != kind)
            raise MeasureError(
                f"On text of kind {kind!r} the median layer does no damage, so that no other can be told by it: take more "
                f"of it, or a sum of the other kinds ({others}) as the text."
            )
        x[rows] /= level
        w[rows] /= w[rows].sum()
    return x, w, medians


@dataclass
class LayerScores:
    """What a metric says of every layer. Higher = more important.

    `table` is indexed by layer_id, in the order of the stack: `score`; `ci_low`, `ci_high` (bootstrap interval over
    sequences); `n` (sequences scored; fewer for a layer that a race dropped early). `details` is JSON-able: the options,
    layer passes, notes, the whole student's own value (`whole`), and for a race `dropped` (layer id -> n) and `stopped`.
    """

    table: pd.DataFrame
    metric: str  # what was measured,
    source: str  # on which text
    seconds: float
    per_sequence: np.ndarray  # [N, L] float64; NaN where a layer was not scored; [0, L] for a metric of weights alone
    # [N] float64, tokens scored in each sequence (of several kinds: over those of its kind); `score` is the mean by them
    weights: np.ndarray
    confidence: float = 0.95  # of the intervals
    details: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()  # [N], of a text of several kinds: values are then of each kind's median (`by_kind`)

    @classmethod
    def from_samples(
        cls, metric, source, layer_ids, per_sequence, weights, *, seconds=0.0, confidence=0.95, details=None, kinds=()
    ) -> LayerScores:
        """Build scores and their bootstrap intervals from values per sequence [N, L] and weights [N].

        Every resample draws N sequences with replacement (of each kind as many as it has), the same for all layers
        (paired), and takes the weighted mean; `ildlab.stats.interval` makes bounds of them.
        """
        x, w = np.asarray(per_sequence, float), np.asarray(weights, float)
        details = dict(details or {})
        if kinds:
            x, w, details["medians"] = by_kind(x, w, np.array(kinds), details.get("medians"))
        index = pd.Index([int(i) for i in layer_ids], name="layer_id")
        scored = ~np.isnan(x)
        n = scored.sum(0)
        score = mean(x, w)
        free = n - max(0, len(set(kinds)) - 1)  # each kind has a mean of its own
        low, high = interval(score, means(resamples(len(x), strata=kinds), x, w), free, confidence)
        table = pd.DataFrame({"score": score, "ci_low": low, "ci_high": high, "n": n}, index=index)
        return cls(table, metric, source, seconds, x, w, confidence, details, tuple(kinds))

    def of_kind(self, kind: str) -> LayerScores:
        """The scores on one kind of text alone, in the metric's own unit; MeasureError where there is none of it."""
        rows = [i for i, each in enumerate(self.kinds) if each == kind]
        if not rows:
            known = ", ".join(dict.fromkeys(self.kinds)) or "one kind only"
            raise MeasureError(f"These scores have no kind of text {kind!r}; they have: {known}.")
        values = self.per_sequence[rows] * self.details["medians"][kind]
        told = {"seconds": self.seconds, "confidence": self.confidence, "details": self.details}
        return self.from_samples(
            self.metric, f"{kind} of {self.source}", self.layer_ids, values, self.weights[rows], **told
        )

    @property
    def per_kind(self) -> pd.DataFrame:
        """Scores of every layer (rows) on each kind of text alone (columns), in units of that kind's median layer."""
        kinds = np.array(self.kinds)
        columns = {
            kind: mean(self.per_sequence[kinds == kind], self.weights[kinds == kind])
            for kind in dict.fromkeys(self.kinds)
        }
        return pd.DataFrame(columns, index=self.table.index)

    @classmethod
    def exact(cls, metric, source, layer_ids, scores, *, seconds=0.0, details=None) -> LayerScores:
        """Scores that have no sampling error, such as those of weights alone."""
        index = pd.Index([int(i) for i in layer_ids], name="layer_id")
        table = pd.DataFrame({"score": scores, "ci_low": scores, "ci_high": scores, "n": 0}, index=index)
        nothing = np.empty((0, len(index)))
        return cls(table, metric, source, seconds, nothing, np.empty(0), 1.0, dict(details or {}))

    @property
    def layer_ids(self) -> list[int]:
        """Layer ids scored, bottom first."""
        return [int(i) for i in self.table.index]

    @property
    def unscored(self) -> list[int]:
        """Layers that were there and not asked for (`measure(..., layers=...)`)."""
        return list(self.details.get("unscored", ()))

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
        return means(resamples(len(paired), strata=self.kinds), paired, self.weights)

    def separation(self) -> float:
        """Probability, by paired bootstrap, that every other layer scores higher than the least important one.

        Of each pair, on the sequences that both were scored on.
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
        together (Bonferroni), lies above 0. A layer that a race dropped, on few sequences, is never tied.
        """
        least = self.least_important
        alpha = (1 - self.confidence) / max(1, len(self.layer_ids) - 1)
        bound = percentiles(self._differences, (100 * alpha,))[0]
        if len(self.per_sequence) > 1:
            n = (~np.isnan(self.per_sequence)).sum(0)
            paired = self.per_sequence - self.per_sequence[:, [self.layer_ids.index(least)]]
            gap = mean(paired, self.weights)
            bound = gap + (bound - gap) * expansion(n - max(0, len(set(self.kinds)) - 1), alpha)
        left = set(self.finalists) - {least}
        close = [i for i, b in zip(self.layer_ids, bound, strict=True) if i in left and not b > 0]
        return [least, *sorted(close, key=lambda i: self.table.loc[i, "score"])]

    def split_half(self) -> float:
        """Spearman correlation of the ranking on one half of the sequences with that on the other.

        The mean over 200 random splits, of the `finalists`; NaN where there are fewer than 4 sequences or 3 layers.
        """
        columns = [self.layer_ids.index(i) for i in self.finalists]
        x = self.per_sequence[:, columns]
        x, w = x[~np.isnan(x).any(1)], self.weights[~np.isnan(x).any(1)]
        if len(x) < 4 or len(columns) < 3:
            return 1.0 if not len(self.per_sequence) else math.nan
        halves = np.tile(np.arange(len(x)) < len(x) // 2, (200, 1))  # [splits, sequences]
        picks = np.random.default_rng(0).permuted(halves, axis=1).astype(float)
        a, b = (ranks(means(p, x, w)) for p in (picks, 1 - picks))
        a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
        return float(np.mean((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))))

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
            **({"kinds": list(self.kinds)} if self.kinds else {}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerScores:
        """Inverse of `to_dict`."""
        index = pd.Index(data["layer_ids"], name="layer_id")
        columns = {name: np.array(data[name], float) for name in ("score", "ci_low", "ci_high")}
        table = pd.DataFrame({**columns, "n": data["n"]}, index=index)
        weights = np.array(data["weights"], float)
        per_sequence = np.array(data["per_sequence"], float).reshape(len(weights), len(index))  # [0] -> [0, L]
        plain = {name: data[name] for name in ("metric", "source", "seconds", "confidence")}
        return cls(
            table,
            per_sequence=per_sequence,
            weights=weights,
            details=dict(data["details"]),
            kinds=tuple(data.get("kinds", ())),
            **plain,
        )

    def __repr__(self) -> str:
        least = self.least_important
        row = self.table.loc[least]
        return (
            f"LayerScores({self.metric}, {len(self.table)} layers, least important {least}: {row.score:.4g} "
            f"[{row.ci_low:.4g}, {row.ci_high:.4g}], P={self.separation():.2f})"
        )

    def _repr_html_(self) -> str:
        kept, tied, least = set(self.finalists), set(self.tied), self.least_important
        table = self.table.loc[self.ranking]
        shown = table[["score"]].assign(
            interval=[f"[{low:.4g}, {high:.4g}]" for low, high in zip(table.ci_low, table.ci_high, strict=True)],
            n=table.n,
        )
        # A kind is named by a person: it may be called as another column is.
        kinds = self.per_kind.rename(columns=lambda kind: kind + " (text)" * (kind in shown))
        shown = shown.join(kinds.map("{:.3g}".format))
        shown[""] = [
            "least important" if i == least else "tied with it" if i in tied else "" if i in kept else "dropped early"
            for i in shown.index
        ]
        half = self.split_half()
        head = (
            f"<b>{escape(self.metric)}</b> on {escape(self.source)}, {self.seconds:.1f} s: layer {least} is the least "
            f"important with probability {self.separation():.2f}"
            f"{'' if math.isnan(half) else f'; split-half rank correlation {half:.2f}'}. "
            f"Intervals: {100 * self.confidence:g}%."
        )
        head += " Scores are in units of each kind's median layer." if self.kinds else ""
        page = shown.rename_axis("layer").to_html(border=0, float_format="{:.4g}".format)
        return f"<div>{head}{self.picture().html()}<details><summary>the numbers</summary>{page}</details></div>"

    def picture(self) -> Picture:
        """The scores as columns on the stack, layers between them that are gone hatched."""
        here = [*self.layer_ids, *self.unscored]
        columns = columns_of(range(max(here) + 1), self, here=here)
        return Picture(columns, f"Importance by {self.metric}", unit_of(self), probability=self.separation())
