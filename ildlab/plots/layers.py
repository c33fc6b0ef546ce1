"""What is known of every layer, as columns on the stack: the picture by which scores and sessions show themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from ildlab.drawing.columns import Column, columns_of, unit_of
from ildlab.drawing.stack import Picture
from ildlab.errors import PlotError


@dataclass(frozen=True)
class Stack:
    """A picture of the stack as a notebook shows it."""

    picture: Picture
    theme: str

    def _repr_html_(self) -> str:
        return self.picture.html(self.theme)

    def __repr__(self) -> str:
        return f"[stack: {self.picture.title}]"


def stack(found: Any, title: str = "", *, unit: str = "", theme: str = "") -> Stack:
    """Columns of a value by layer, on a logarithmic axis with intervals.

    Parameters
    ----------
    found : LayerScores or DataFrame
        A table is indexed by layer id (and, last, "out"); its first column is drawn, with `ci_low` and `ci_high`. Layers
        between those that it has are gone.
    title, unit : str
        By default what the scores are, and their unit.
    theme : str
        "lecture" for the back of a room.
    """
    if theme not in ("", "lecture"):
        raise PlotError(f"theme={theme!r}: 'lecture', or none.")
    if not isinstance(found, pd.DataFrame):
        if not hasattr(found, "separation"):
            raise PlotError(
                f"A {type(found).__name__} has no value by layer: give scores (measure first), or a table."
            )
        columns = columns_of(range(max(found.layer_ids) + 1), found, here=found.layer_ids)
        title = title or f"Importance by {found.metric}"
        return Stack(Picture(columns, title, unit or unit_of(found), probability=found.separation()), theme)
    table, name = found[[i != "out" for i in found.index]], found.columns[0]
    columns = []
    for layer_id in range(int(max(table.index)) + 1):
        if layer_id not in table.index:
            columns.append(Column(layer_id, "removed", words=f"layer {layer_id} (removed)"))
            continue
        row = table.loc[layer_id]
        ends = {"low": float(row.get("ci_low", row[name])), "high": float(row.get("ci_high", row[name]))}
        words = f"layer {layer_id}; {name} {row[name]:.4g} [{ends['low']:.4g}, {ends['high']:.4g}]"
        columns.append(Column(layer_id, score=float(row[name]), **ends, words=words))
    return Stack(Picture(columns, title or name, unit), theme)
