"""Agreement of metrics: how far their rankings of the same layers go together, and what each cost."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pandas as pd

from ildlab.errors import MeasureError
from ildlab.importance.scores import LayerScores


@dataclass
class Comparison:
    """Several metrics on the same tokens.

    Attributes
    ----------
    scores : dict of metric -> LayerScores
    table : DataFrame, one row for each pair of metrics
        `a`, `b`, `spearman`, `kendall` (tau-b) and `top` (share of the k least important layers that
        both name).
    costs : DataFrame, indexed by metric
        `seconds`, `times_cheapest`, `least` (the layer to remove), `separation`, `split_half`.
    k : int
    """

    scores: dict[str, LayerScores]
    table: pd.DataFrame
    costs: pd.DataFrame
    k: int

    def matrix(self, value: str = "spearman") -> pd.DataFrame:
        """Square table [metric, metric] of `"spearman"`, `"kendall"` or `"top"`."""
        names = list(self.scores)
        square = pd.DataFrame(1.0, index=names, columns=names)
        for row in self.table.itertuples():
            square.loc[row.a, row.b] = square.loc[row.b, row.a] = getattr(row, value)
        return square

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.scores)})\n{self.matrix().round(2)}"

    def _repr_html_(self) -> str:
        parts = [f"<b>Rank correlation (Spearman)</b>{self.matrix().to_html(float_format='%.2f')}"]
        parts.append(
            f"<b>Overlap of the {self.k} least important</b>{self.matrix('top').to_html(float_format='%.2f')}"
        )
        parts.append(f"<b>What each cost</b>{self.costs.to_html(float_format='%.3g')}")
        return f"<div>{'<br>'.join(parts)}</div>"


def rank_agreement(scores: dict[str, LayerScores], k: int = 5) -> Comparison:
    """Compare scores of the same layers that were measured before.

    Raises
    ------
    MeasureError
        Fewer than two, of different layers, or k out of range.
    """
    from scipy.stats import kendalltau, spearmanr

    if len(scores) < 2:
        raise MeasureError("A comparison needs at least two metrics.")
    layers = {tuple(s.layer_ids) for s in scores.values()}
    if len(layers) > 1:
        raise MeasureError("The scores are of different students: measure all metrics on the same layers.")
    if not 1 <= k <= len(next(iter(layers))):
        raise MeasureError(f"k={k}: choose from 1 to {len(next(iter(layers)))}, the number of layers.")
    rows = []
    for a, b in itertools.combinations(scores, 2):
        x, y = (scores[name].table["score"].to_numpy(float) for name in (a, b))
        lowest = [set(scores[name].ranking[:k]) for name in (a, b)]
        rows.append(
            {
                "a": a,
                "b": b,
                "spearman": float(spearmanr(x, y).statistic),
                "kendall": float(kendalltau(x, y).statistic),
                "top": len(lowest[0] & lowest[1]) / k,
            }
        )
    costs = pd.DataFrame(
        {
            name: {
                "seconds": s.seconds,
                "least": s.least_important,
                "separation": s.separation(),
                "split_half": s.split_half(),
            }
            for name, s in scores.items()
        }
    ).T
    costs.insert(1, "times_cheapest", costs["seconds"] / max(costs["seconds"].min(), 1e-9))
    costs["least"] = costs["least"].astype(int)
    return Comparison(dict(scores), pd.DataFrame(rows), costs, k)
