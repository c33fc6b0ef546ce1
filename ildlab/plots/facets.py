"""A figure of a grid of runs: a figure of theirs over one parameter, a line a value of a second, a panel of two others."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ildlab.drawing.columns import label_of
from ildlab.errors import PlotError
from ildlab.plots.canvas import COLOURS, DASHES, TEXT, legend, need, new_figure, style


def grid(
    table: pd.DataFrame, y: str, x: str, by: str | None = None, columns: str | None = None, rows: str | None = None
) -> Figure:
    """Draw a figure of a grid's points against a parameter: every point a mark, the means of equal ones a line.

    What no argument names (seeds, say) shows as the spread of the marks. Points without the figure are left out.

    Parameters
    ----------
    table : DataFrame
        From `ildlab.grid.load_grid`.
    y, x : str
        The figure, and the parameter along the axis.
    by, columns, rows : str, optional
        Parameters: a line a value, with a colour, dash and mark of its own; a panel a value, side by side, and below.
    """
    names = [name for name in dict.fromkeys((x, by, columns, rows)) if name is not None]
    need(table, "a grid's table, from load_grid", y, *names)
    table = table[table[y].notna()]
    if table.empty:
        raise PlotError(f"No point of the grid has {y!r}: is one done?")
    table = table.assign(**{name: _known(table[name]) for name in names})
    levels = {None: [None]} | {name: sorted(table[name].unique()) for name in names}
    drawn = new_figure(1.2 + 3.2 * len(levels[columns]), 0.6 + 2.5 * len(levels[rows]))
    panels = drawn.subplots(len(levels[rows]), len(levels[columns]), sharex=True, sharey=True, squeeze=False)
    plain = pd.api.types.is_numeric_dtype(table[x])
    for (row, column), ax in np.ndenumerate(panels):
        style(ax)
        at = {rows: levels[rows][row], columns: levels[columns][column]}
        for number, level in enumerate(levels[by]):
            wanted = [table[name] == value for name, value in {**at, by: level}.items() if name is not None]
            own = table[np.logical_and.reduce(wanted)] if wanted else table
            places = own[x] if plain else own[x].map(levels[x].index)
            look = {"color": COLOURS[number % 4], "marker": "osD^v"[number % 5]}
            ax.plot(places, own[y], linestyle="", markersize=4, alpha=0.5, **look)
            means = own[y].astype(float).groupby(places).mean()
            label = None if by is None else f"{by.replace('_', ' ')} {level}"
            ax.plot(means.index, means, linestyle=DASHES[(number + number // 4) % 4], label=label, **look)
        if not plain:
            ax.set_xticks(range(len(levels[x])), levels[x])
        ax.set_title(", ".join(f"{n.replace('_', ' ')} {v}" for n, v in at.items() if n), color=TEXT, fontsize=9)
        ax.set_ylabel(label_of(y) if column == 0 else "")
        ax.set_xlabel(x.replace("_", " ") if row == len(panels) - 1 else "")
    legend(panels[0, 0])
    return drawn


def _known(values: pd.Series) -> pd.Series:
    """Numbers as they are; lists, yes and no, and what some points have not got, by how they are written."""
    numbers = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    return values if numbers and values.notna().all() else values.map(str)
