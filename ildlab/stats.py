"""The statistics of scores: one bootstrap with intervals as wide as Student's t, and ranks.

A bootstrap here is a matrix of draws: `resamples` says how often each sequence (example, block) is drawn, `means`
makes weighted means of it, and `interval` turns them into bounds. Figures that are compared take the same draws (paired).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def resamples(count: int, seed: int = 0, strata: Sequence[str] = ()) -> np.ndarray:
    """How often each of `count` sequences is drawn, [RESAMPLES, count] float64; of each of the strata as many as it has.

    Drawing n of a stratum's n shrinks its spread by (n - 1) / n: draws of several strata are drawn out about 1 by the
    root of that, so that some may be below 0. `expansion` does the same for one stratum.
    """
    rng = np.random.default_rng(seed)
    drawn, names = np.empty((RESAMPLES, count)), np.array(strata or [""] * count)
    for name in dict.fromkeys(names.tolist()):
        at = np.flatnonzero(names == name)
        times = rng.multinomial(len(at), np.full(len(at), 1 / len(at)), size=RESAMPLES)
        drawn[:, at] = times if len(at) in (1, count) else 1 + (times - 1) * math.sqrt(len(at) / (len(at) - 1))
    return drawn


def means(draws: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Weighted means [draws, L] of x [N, L] under `draws` [draws, N] and weights w [N]; NaN where nothing was drawn."""
    scored = ~np.isnan(x)
    above = (draws * w) @ np.where(scored, x, 0.0)
    below = (draws * w) @ scored.astype(float)
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def mean(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Weighted mean [L] of x [N, L], each column over its own scored (not NaN) rows."""
    return means(np.ones((1, len(x))), x, w)[0]


def percentiles(values: np.ndarray, at: tuple[float, ...]) -> np.ndarray:
    """Percentiles over the first axis, [len(at), L]; NaN where a column has none."""
    if not np.isnan(values).any():
        return np.percentile(values, at, axis=0)
    out = np.full((len(at), *values.shape[1:]), np.nan)
    some = ~np.isnan(values).all(0)
    if some.any():
        out[:, some] = np.nanpercentile(values[:, some], at, axis=0)
    return out


def t_quantile(p: float, dof: int) -> float:
    """Quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(p, dof))


def expansion(n: np.ndarray | int, tail: float) -> np.ndarray:
    """How much wider than its percentile interval a bootstrap of n values has to be; of the shape of n.

    Resampling draws from a spread with n in the place of n - 1, and its percentiles are a normal's where the
    mean of few values follows Student's t: sqrt(n / (n - 1)) t / z (Hesterberg 2015, doi 10.1080/00031305.2015.1089789).
    """
    from scipy.stats import norm, t

    n = np.maximum(np.asarray(n, float), 2)
    return np.sqrt(n / (n - 1)) * t.ppf(1 - tail, n - 1) / norm.ppf(1 - tail)


def interval(
    estimate: np.ndarray | float, draws: np.ndarray, n: np.ndarray | int, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided bounds of `estimate` [...] from its bootstrap `draws` [draws, ...] of n values.

    The percentile interval (Efron 1979) is too narrow for few values: it is expanded about the estimate to the width
    of a t interval (`expansion`). Bounds are NaN where n is below 2: one value says nothing of its spread.
    """
    tail = (1 - confidence) / 2
    low, high = percentiles(np.asarray(draws, float), (100 * tail, 100 * (1 - tail)))
    wider = np.where(np.asarray(n) < 2, np.nan, expansion(n, tail))
    return estimate + (low - estimate) * wider, estimate + (high - estimate) * wider


def over_runs(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of a few runs (seeds, say) and its bounds by Student's t; the bounds are NaN for one run."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return float(x.mean()), math.nan, math.nan
    reach = t_quantile((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean()), float(x.mean() - reach), float(x.mean() + reach)


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks within each row of x [n, L] (or of x [L]); ties share their mean rank."""
    from scipy.stats import rankdata

    return rankdata(x, axis=-1)


def listed(values, digits: int | None = None) -> list:
    """Numbers as JSON takes them: NaN is None, the others floats (to `digits` digits)."""
    return [
        None if math.isnan(v) else float(f"{v:.{digits}g}") if digits else float(v) for v in np.asarray(values, float)
    ]
