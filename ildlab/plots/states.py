"""Figures of hidden states: redundancy, blocks of layers, drift from the teacher, logit lens.

The data are what the functions of that name in `ildlab.importance` return. Hidden state h[l] is the *input* of layer l
and bears its layer id; "out" is the last layer's output before the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from ildlab.drawing.columns import label_of
from ildlab.errors import PlotError
from ildlab.plots.canvas import (
    ABOVE,
    BLUE,
    VERMILLION,
    hatch,
    heatmap,
    in_cell,
    ink_of,
    legend,
    new_axes,
    norm_of,
    removed_key,
    token_label,
    token_ticks,
)

DRIFT = "drift from the teacher (1 − cosine)"
NO_DRIFT = 1e-9  # two runs of the same fp32 layers may differ by rounding, squared


def redundancy_heatmap(matrix: pd.DataFrame, kind: str = "cosine", ax: Axes | None = None) -> Axes:
    """Heatmap of how alike every two hidden states are.

    Parameters
    ----------
    matrix : DataFrame [L+1, L+1]
        From `redundancy`, indexed both ways by layer id and "out".
    kind : {"cosine", "angular", "cka"}
        Names the unit. Up to 12 hidden states, each cell has its number too.
    """
    values = matrix.to_numpy(float)
    if not len(values) or values.shape[0] != values.shape[1]:
        raise PlotError("The matrix is empty, or not square: give one that redundancy made.")
    ax = new_axes(ax, 6.2, 5.2)
    image = heatmap(ax, values, label_of(kind), aspect="equal")
    if len(values) <= 12:
        for (row, column), value in np.ndenumerate(values):
            in_cell(image, column, row, value, f"{value:.2f}")
    for axis, labels in ((ax.xaxis, matrix.columns), (ax.yaxis, matrix.index)):
        _ticks(axis, labels)
        axis.set_label_text("hidden state (input of layer id)")
    return ax


def block_triangle(triangle: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Distance across every block of n consecutive layers; the least of each row is marked.

    Parameters
    ----------
    triangle : DataFrame [n, start]
        From `block_distances`: angular distances, NaN where the stack ends first.
    """
    values = triangle.to_numpy(float)
    ax = new_axes(ax, 6.6, 5.0)
    image = heatmap(ax, values, label_of("angular"))
    rows = np.flatnonzero(np.isfinite(values).any(1))
    least = np.nanargmin(values[rows], axis=1)
    inks = [ink_of(image, value) for value in values[rows, least]]
    ax.scatter(least, rows, s=22, marker="D", c=inks, linewidths=0)
    _ticks(ax.xaxis, triangle.columns)
    _ticks(ax.yaxis, triangle.index)
    ax.set_xlabel("first layer of the block (layer id; ◆ least of its row: the block to drop)")
    ax.set_ylabel("layers in the block (n)")
    return ax


def drift_by_layer(
    after: pd.DataFrame, before: pd.DataFrame | None = None, ax: Axes | None = None, *, removed: Sequence[int] = ()
) -> Axes:
    """Draw the student's drift from the teacher by layer id, after and before distillation.

    Parameters
    ----------
    after : DataFrame
        From `drift` by cosine; alone, it is called "student".
    before : DataFrame, optional
        The same right after the removals.
    removed : sequence of int
        Layer ids that are gone; those between the student's are found without it. They are hatched.
    """
    ax = new_axes(ax, 8.0, 3.4)
    curves = [(after, "student" if before is None else "after distillation", BLUE, "-", "o")]
    if before is not None:
        curves.insert(0, (before, "before distillation", VERMILLION, "--", "s"))
    ids = {i for table, *_ in curves for i in table.index if i != "out"} | set(removed)
    end = int(max(ids, default=-1)) + 1
    for table, label, colour, dash, marker in curves:
        drawn = table.rename(index={"out": end}).sort_index()
        ax.plot(
            drawn.index, drawn["drift"], dash, color=colour, marker=marker, markersize=4, linewidth=1.8, label=label
        )
        ax.fill_between(drawn.index, drawn["ci_low"], drawn["ci_high"], color=colour, alpha=0.15, linewidth=0)
    gone = sorted(set(range(end)) - set(after.index))
    for layer_id in gone:
        hatch(ax, layer_id)
    _ticks(ax.xaxis, [*range(end), "out"], most=36)
    ax.set_xlim(-0.7, end + 0.7)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("hidden state (input of layer id)")
    ax.set_ylabel(DRIFT)
    handles = ax.get_legend_handles_labels()[0] + [removed_key()] * bool(gone)
    legend(ax, handles=handles, **ABOVE, ncols=3)
    return ax


def token_drift_map(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Heatmap of drift, layer by token; hidden states that are still the teacher's are hatched.

    Colours are those of all tokens but the first, often an attention sink that hardly moves: it would stretch them.

    Parameters
    ----------
    table : DataFrame [layers + 1, T]
        From `token_drift` by cosine.
    """
    values = table.to_numpy(float)
    tokens = table.attrs["tokens"]
    ax = new_axes(ax, max(5.0, 2.0 + 0.3 * len(tokens)), max(3.0, 1.3 + 0.13 * len(values)))
    same = values < NO_DRIFT
    moved = np.where(same, np.nan, values)
    heatmap(ax, moved, DRIFT, norm_of(moved[:, 1:] if len(tokens) > 1 else moved, decades=2))
    for row, column in np.argwhere(same):
        hatch(ax, column, row, "///", 0.6)
    token_ticks(ax.xaxis, tokens)
    _ticks(ax.yaxis, table.index)
    ax.set_xlabel("token" + (" (hatched: still the teacher's hidden state)" if same.any() else ""))
    ax.set_ylabel("hidden state (input of layer id)")
    return ax


def logit_lens_map(
    table: pd.DataFrame,
    who: str = "student",
    ax: Axes | None = None,
    *,
    layers: Sequence[Any] | None = None,
    most: float | None = None,
) -> Axes:
    """What each layer would say next: the top token in each cell, its entropy as the colour.

    A frame marks cells whose top token is the one that does follow in the text.

    Parameters
    ----------
    table : DataFrame
        From `logit_lens`.
    who : {"student", "teacher"}
        Whose rows to draw.
    layers : sequence, optional
        Layer ids (and "out") to draw; all by default.
    most : float, optional
        Entropy (nats) at the light end of the colours, to draw two models on one scale.
    """
    own = table[table["model"] == who]
    if layers is not None:
        own = own[own["layer"].isin(list(layers))]
    if own.empty:
        raise PlotError(f"The table has no rows of the {who} at these layers: ask logit_lens for them.")
    rows, width = list(dict.fromkeys(own["layer"])), int(own["position"].max()) + 1
    tokens = own.drop_duplicates("position").sort_values("position")["token"].tolist()
    grid = np.full((len(rows), width), np.nan)
    grid[[rows.index(i) for i in own["layer"]], own["position"]] = own["entropy"]
    ax = new_axes(ax, 1.8 + 0.62 * width, 1.2 + 0.2 * len(rows))
    scale = Normalize(0, most or float(np.nanmax(grid)))
    image = heatmap(ax, grid, "entropy of the next token (nats)", scale)
    for cell in own.itertuples():
        x, y = cell.position, rows.index(cell.layer)
        in_cell(image, x, y, cell.entropy, token_label(cell.top[0], 8))
        if x + 1 < width and cell.top[0] == tokens[x + 1]:
            look = {"fill": False, "edgecolor": ink_of(image, cell.entropy), "linewidth": 1.2}
            ax.add_patch(Rectangle((x - 0.45, y - 0.42), 0.9, 0.84, **look))
    token_ticks(ax.xaxis, tokens, rotation=45)
    ax.set_yticks(range(len(rows)), [str(r) for r in rows])
    ax.set_xlabel("token read last (in the cells: the next token; framed: it does follow)")
    ax.set_ylabel(f"{who}: hidden state (layer id)")
    return ax


def _ticks(axis: Any, labels: Sequence[Any], most: int = 20) -> None:
    """Label positions 0, 1, ... of an axis, at most `most` of them; a last "out" is always there."""
    labels = [str(i) for i in labels]
    step = -(-len(labels) // most)
    shown = list(range(0, len(labels), step))
    if labels and labels[-1] == "out" and shown[-1] != len(labels) - 1:
        shown = [i for i in shown if len(labels) - 1 - i >= step] + [len(labels) - 1]
    axis.set_ticks(shown, [labels[i] for i in shown])
