"""The race: after each look at the layers' damage, those that surely are not the least important drop out.

One rule for every metric that races. `nll` and `kl` look after each batch of sequences, `task` after each part of a
suite's examples.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ildlab.stats import ranks, t_quantile

COMMON = 4  # observations' worth of faith in the variance that the layers have in common
TINY = 1e-12  # so that equal values drop nothing


@dataclass
class Race:
    """Which layers are left, and why it ended."""

    alive: list[int]  # layer ids that are still scored
    confidence: float  # that no look drops the best layer, for all layers together
    tie: float
    dropped: dict[str, int] = field(default_factory=dict)  # layer id -> observations that it was dropped on
    stopped: str = "the text ran out"  # why it ended
    over: bool = False

    def look(
        self,
        values: np.ndarray,
        weights: np.ndarray,
        *,
        prior: np.ndarray | None = None,
        halve: np.ndarray | None = None,
    ) -> None:
        """Drop what is surely above the best so far; over when one layer is left, or all that are left tie with it.

        Parameters
        ----------
        values, weights : ndarray [n, A], [n]
            Damage of each layer of `alive` on each observation (sequence, example).
        prior : ndarray [A], optional
            A second opinion: a layer that both rate far above the others goes at once.
        halve : ndarray [A], optional
            A finer measure of damage, by which, together with the mean of `values`, the worse half goes
            (successive halving, Jamieson and Talwalkar 2016).
        """
        if len(values) < 2 or len(self.alive) < 2:
            return
        gap, above, bound, best = standing(values, weights, self.confidence)
        drop = above - bound > 0
        if prior is not None:
            drop |= _outlying(prior) & (gap.min(0) > 0) & (above > np.median(above))
        if halve is not None:
            drop |= _worse_half(above, halve, drop, best)
        drop[best] = False
        settled = bool((drop | (above - bound >= -self.tie)).all())
        self.dropped.update({str(i): len(values) for i, out in zip(self.alive, drop, strict=True) if out})
        self.alive = [i for i, out in zip(self.alive, drop, strict=True) if not out]
        self.over = settled or len(self.alive) == 1
        if len(self.alive) == 1:
            self.stopped = "one layer is left"
        elif settled:
            self.stopped = f"{len(self.alive)} layers are left, none better than the best by more than {self.tie:g}"


def standing(
    values: np.ndarray, weights: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """How far each layer lies above the best so far, and how sure that is.

    One-sided t over all layers (Bonferroni), for values [n, A], n >= 2, and weights [n]. The variance of few
    observations is a guess: it is drawn towards the layers' median, as in Smyth 2004 (doi 10.2202/1544-6115.1027).

    Returns
    -------
    gap : ndarray [n, A]
        Paired differences to the best layer.
    above, bound : ndarray [A]
        Their weighted means, and how far below them the truth may surely lie.
    best : int
        Column of the layer with the least mean.
    """
    n, share = len(values), weights / weights.sum()
    mean = share @ values  # [n] @ [n, A] -> [A]
    best = int(mean.argmin())
    gap, above = values - values[:, [best]], mean - mean[best]
    # Variance of a weighted mean of independent observations: [n, 1] * [n, A] -> [A]
    spread = (share[:, None] ** 2 * (gap - above) ** 2).sum(0) * n / (n - 1)
    common = np.median(np.delete(spread, best))
    spread = (COMMON * common + (n - 1) * spread) / (COMMON + n - 1)
    quantile = t_quantile(1 - (1 - confidence) / max(1, len(mean) - 1), n - 1 + COMMON)
    return gap, above, quantile * np.sqrt(spread) + TINY, best


def _outlying(prior: np.ndarray) -> np.ndarray:
    """Which of the values [A] lie three robust standard deviations above their median."""
    middle = np.median(prior)
    return prior > middle + 3 * 1.4826 * np.median(np.abs(prior - middle))


def _worse_half(above: np.ndarray, finer: np.ndarray, gone: np.ndarray, best: int) -> np.ndarray:
    """Which layers [A] go so that, with those gone already, no more than half are left; the best stays."""
    # Right and wrong say little about a layer on a few examples: halves are told by the sum of two ranks.
    spare = max(0, len(above) // 2 - int(gone.sum()))
    order = np.argsort(-(ranks(above) + ranks(finer)), kind="stable")
    order = [place for place in order if place != best and not gone[place]]
    out = np.zeros(len(above), bool)
    out[order[:spare]] = True
    return out
