"""Agreement of metrics: how far their rankings of the same layers go together."""

from __future__ import annotations

import itertools

import pandas as pd

from ildlab.errors import MeasureError
from ildlab.importance.scores import LayerScores


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
