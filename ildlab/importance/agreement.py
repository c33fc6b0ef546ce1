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
    squares : dict of str to DataFrame [metric, metric]
        "spearman" and "kendall" (tau-b) rank correlations, and "top": the share of the k least important layers that
        both name.
    costs : DataFrame, indexed by metric
        `seconds`, `times_cheapest`, `least` (the layer to remove), `separation`, `split_half`.
    k : int
    """

    squares: dict[str, pd.DataFrame]
    costs: pd.DataFrame
    k: int

    @property
    def table(self) -> pd.DataFrame:
        """One row for each pair of metrics `a`, `b`, with a column for each of the squares."""
        pairs = itertools.combinations(self.costs.index, 2)
        return pd.DataFrame([{"a": a, "b": b, **{n: s.loc[a, b] for n, s in self.squares.items()}} for a, b in pairs])

    def _repr_html_(self) -> str:
        parts = [
            f"<b>Rank correlation (Spearman)</b>{self.squares['spearman'].to_html(float_format='%.2f')}",
            f"<b>Overlap of the {self.k} least important</b>{self.squares['top'].to_html(float_format='%.2f')}",
            f"<b>What each cost</b>{self.costs.to_html(float_format='%.3g')}",
        ]
        return f"<div>{'<br>'.join(parts)}</div>"


def rank_agreement(scores: dict[str, LayerScores], k: int = 5) -> Comparison:
    """Compare scores of the same layers that were measured before.

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
    lowest = {name: set(s.ranking[:k]) for name, s in scores.items()}
    top = pd.DataFrame({a: {b: len(lowest[a] & lowest[b]) / k for b in lowest} for a in lowest})
    of = {"seconds": lambda s: s.seconds, "least": lambda s: s.least_important}
    of |= {"separation": LayerScores.separation, "split_half": LayerScores.split_half}
    costs = pd.DataFrame({column: {name: read(s) for name, s in scores.items()} for column, read in of.items()})
    costs.insert(1, "times_cheapest", costs["seconds"] / max(costs["seconds"].min(), 1e-9))
    squares = {"spearman": table.corr("spearman"), "kendall": table.corr("kendall"), "top": top}
    return Comparison(squares, costs, k)
