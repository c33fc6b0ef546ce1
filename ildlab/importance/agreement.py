"""Agreement of metrics: how far their rankings of the same layers go together."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from ildlab.errors import MeasureError
from ildlab.importance.scores import LayerScores
from ildlab.stats import means, percentiles, ranks, resamples


def rank_agreement(scores: dict[str, LayerScores], k: int = 5) -> pd.DataFrame:
    """Compare scores of the same layers by several metrics.

    Returns
    -------
    DataFrame, one row for each pair of metrics `a`, `b`
        `spearman` and `kendall` (tau-b) rank correlations, and `top`: the share of the k least important layers that
        both name.

    Raises
    ------
    MeasureError
        Fewer than two, of different layers, or k out of range.
    """
    if len(scores) < 2:
        raise MeasureError("A comparison needs at least two metrics.")
    layers = {tuple(s.layer_ids) for s in scores.values()}
    if len(layers) > 1:
        raise MeasureError("The scores are of different students: measure all metrics on the same layers.")
    if not 1 <= k <= len(next(iter(layers))):
        raise MeasureError(f"k={k}: choose from 1 to {len(next(iter(layers)))}, the number of layers.")
    table = pd.DataFrame({name: s.table["score"] for name, s in scores.items()})
    spearman, kendall = table.corr("spearman"), table.corr("kendall")
    lowest = {name: set(s.ranking[:k]) for name, s in scores.items()}
    rows = [
        (a, b, spearman.loc[a, b], kendall.loc[a, b], len(lowest[a] & lowest[b]) / k)
        for a, b in itertools.combinations(scores, 2)
    ]
    return pd.DataFrame(rows, columns=["a", "b", "spearman", "kendall", "top"])


def rank_correlation(a: LayerScores, b: LayerScores) -> tuple[float, float, float]:
    """Spearman's rank correlation of scores of the same layers on two texts, and its 95% interval.

    The bounds are percentiles of a bootstrap that draws the sequences of both anew. Each draw is noisier than what was
    measured, so that the interval lies somewhat low: what it says of a difference errs on the side of caution.

    Raises
    ------
    MeasureError
        They are of different layers, raced, or of one sequence.
    """
    if a.layer_ids != b.layer_ids:
        raise MeasureError("The scores are of different students: measure both on the same layers.")
    for each in (a, b):
        if len(each.per_sequence) < 2 or np.isnan(each.per_sequence).any():
            raise MeasureError(
                f"{each.metric} on {each.source}: two sequences or more are needed, with every layer scored on each. "
                "Measure without a race."
            )
    ranked = []
    for seed, each in enumerate((a, b)):  # two seeds: their sequences have nothing to do with each other
        drawn = means(resamples(len(each.per_sequence), seed, each.kinds), each.per_sequence, each.weights)
        of = ranks(np.vstack([each.table["score"].to_numpy(), drawn]))  # [1 + draws, L]
        ranked.append(of - of.mean(1, keepdims=True))
    one, other = ranked
    found = (one * other).sum(1) / np.sqrt((one**2).sum(1) * (other**2).sum(1))
    low, high = percentiles(found[1:], (2.5, 97.5))
    return float(found[0]), float(low), float(high)


def redundant_depth(scores: LayerScores, share: float = 0.25) -> tuple[float, float, float]:
    """Mean relative depth (0: first layer, 1: last) of the least important `share` of layers, and its 95% interval.

    By chance it is 0.5, as it is where the middle goes first: `scores.ranking` tells the two apart. The bounds are
    percentiles of a bootstrap over sequences; NaN where scores have none.
    """
    count = round(share * len(scores.layer_ids))
    if not 1 <= count < len(scores.layer_ids):
        raise MeasureError(
            f"share={share}: of {len(scores.layer_ids)} layers that is {count}; take some, and not all."
        )
    depth = np.linspace(0, 1, len(scores.layer_ids))

    def of(values: np.ndarray) -> np.ndarray:  # [n, L] -> [n]
        return depth[np.argsort(values, axis=-1)[:, :count]].mean(-1)

    value = float(of(scores.table["score"].to_numpy()[None])[0])
    if len(scores.per_sequence) < 2 or np.isnan(scores.per_sequence).any():
        return value, np.nan, np.nan
    drawn = means(resamples(len(scores.per_sequence), 0, scores.kinds), scores.per_sequence, scores.weights)
    low, high = percentiles(of(drawn), (2.5, 97.5))
    return value, float(low), float(high)
