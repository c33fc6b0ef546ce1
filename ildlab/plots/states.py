"""Figures of hidden states: redundancy, blocks of layers, drift from the teacher, logit lens.

As in `ildlab.plots.scores`: data and `ax=` in, the Axes out, no pyplot, and nothing told by colour alone. The
data are what `ildlab.importance.hidden_states` returns. Hidden state h[l] is the *input* of layer l and
bears its layer id; "out" is the last layer's output before the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from ildlab.plots.canvas import (
    BLUE,
    LINE,
    MAP,
    VERMILLION,
    colorbar,
    ink_on,
    label_of,
    legend,
    new_axes,
    norm_of,
    token_label,
    token_ticks,
)

DRIFT_UNITS = {
    "cosine": "drift from the teacher (1 − cosine)",
    "relative_l2": "drift from the teacher (relative L2)",
    "cka": "drift from the teacher (1 − CKA)",
}
NO_DRIFT = 1e-9  # two runs of the same fp32 layers may differ by rounding, squared


def redundancy_heatmap(matrix: pd.DataFrame, kind: str = "cosine", ax: Axes | None = None) -> Axes:
    """Heatmap of how alike every two hidden states are.

    Parameters
    ----------
    matrix : DataFrame [L+1, L+1]
        From `ildlab.importance.hidden_states.redundancy`, indexed both ways by layer id and "out".
    kind : {"cosine", "angular", "cka"}
        Names the unit. Up to 12 hidden states, each cell has its number too.

    Returns
    -------
    Axes
    """
    values = matrix.to_numpy(float)
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise ValueError(f"A redundancy matrix is square; this one is {values.shape}.")
    ax = new_axes(ax, 6.2, 5.2)
    image = ax.imshow(values, cmap=MAP, norm=norm_of(values), interpolation="nearest", origin="lower")
    if len(values) <= 12:
        for (row, column), value in np.ndenumerate(values):
            _write(ax, image, column, row, value, f"{value:.2f}")
    for axis, labels in ((ax.xaxis, matrix.columns), (ax.yaxis, matrix.index)):
        _ticks(axis, labels)
        axis.set_label_text("hidden state (input of layer id)")
    _bare(ax)
    colorbar(ax, image, label_of(kind))
    return ax


def block_triangle(triangle: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Distance across every block of n consecutive layers; the least of each row is marked.

    Parameters
    ----------
    triangle : DataFrame [n, start]
        From `ildlab.importance.hidden_states.block_distances`: angular distances, NaN where the stack ends first.

    Returns
    -------
    Axes
    """
    values = triangle.to_numpy(float)
    if not np.isfinite(values).any():
        raise ValueError("The triangle has no distances to draw.")
    ax = new_axes(ax, 6.6, 5.0)
    image = ax.imshow(values, cmap=MAP, norm=norm_of(values), interpolation="nearest", origin="lower", aspect="auto")
    rows = np.flatnonzero(np.isfinite(values).any(1))
    least = np.nanargmin(values[rows], axis=1)
    inks = [ink_on(image.cmap(image.norm(v))) for v in values[rows, least]]
    ax.scatter(least, rows, s=22, marker="D", c=inks, linewidths=0)
    _ticks(ax.xaxis, triangle.columns)
    _ticks(ax.yaxis, triangle.index)
    ax.set_xlabel("first layer of the block (layer id; ◆ least of its row: the block to drop)")
    ax.set_ylabel("layers in the block (n)")
    _bare(ax)
    colorbar(ax, image, label_of("angular"))
    return ax


def drift_by_layer(
    after: pd.DataFrame,
    before: pd.DataFrame | None = None,
    ax: Axes | None = None,
    *,
    kind: str = "cosine",
    removed: Sequence[int] = (),
) -> Axes:
    """Draw the student's drift from the teacher by layer id, after and before distillation.

    Parameters
    ----------
    after : DataFrame
        From `ildlab.importance.hidden_states.drift`; alone, it is called "student".
    before : DataFrame, optional
        The same right after the removals.
    kind : {"cosine", "relative_l2", "cka"}
        Names the unit.
    removed : sequence of int
        Layer ids that are gone; those between the student's are found without it. They are hatched.

    Returns
    -------
    Axes
    """
    ax = new_axes(ax, 8.0, 3.4)
    curves = [(after, "student" if before is None else "after distillation", BLUE, "-", "o")]
    if before is not None:
        curves.insert(0, (before, "before distillation", VERMILLION, "--", "s"))
    ids = sorted({int(i) for table, *_ in curves for i in table.index if i != "out"} | set(removed))
    end = ids[-1] + 1 if ids else 0
    gone = sorted(set(range(end)) - {int(i) for i in after.index if i != "out"})
    for table, label, colour, dash, marker in curves:
        x = np.array([end if i == "out" else int(i) for i in table.index], float)
        order = np.argsort(x)
        x, y = x[order], table["drift"].to_numpy(float)[order]
        ax.plot(x, y, linestyle=dash, color=colour, marker=marker, markersize=4, linewidth=1.8, label=label)
        if {"ci_low", "ci_high"} <= set(table.columns):
            low, high = (table[c].to_numpy(float)[order] for c in ("ci_low", "ci_high"))
            ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    for layer_id in gone:
        box = Rectangle((layer_id - 0.4, 0), 0.8, 1, transform=ax.get_xaxis_transform())
        box.set(fill=False, hatch="xxx", edgecolor=LINE, linewidth=0, alpha=0.45)
        ax.add_patch(box)
    handles = ax.get_legend_handles_labels()[0]
    if gone:
        handles.append(Patch(fill=False, edgecolor=LINE, hatch="xxx", linewidth=0, label="removed"))
    _ticks(ax.xaxis, [*range(end), "out"], most=36)
    ax.set_xlim(-0.7, end + 0.7)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("hidden state (input of layer id)")
    ax.set_ylabel(DRIFT_UNITS.get(kind, kind))
    legend(ax, handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return ax


def token_drift_map(table: pd.DataFrame, ax: Axes | None = None, *, kind: str = "cosine") -> Axes:
    """Heatmap of drift, layer by token; hidden states that are still the teacher's are hatched.

    Parameters
    ----------
    table : DataFrame [layers + 1, T]
        From `ildlab.importance.hidden_states.token_drift`; the tokens are `table.attrs["tokens"]`, else the columns.
    kind : {"cosine", "relative_l2"}
        Names the unit.

    Returns
    -------
    Axes
    """
    values = table.to_numpy(float)
    tokens = [str(t) for t in table.attrs.get("tokens", table.columns)]
    ax = new_axes(ax, max(5.0, 2.0 + 0.3 * len(tokens)), max(3.0, 1.3 + 0.13 * len(values)))
    same = values < NO_DRIFT
    shown = np.where(same, np.nan, values)
    image = ax.imshow(shown, cmap=MAP, norm=norm_of(shown), aspect="auto", interpolation="nearest", origin="lower")
    for row in np.flatnonzero(same.any(1)):
        for column in np.flatnonzero(same[row]):
            box = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="///", edgecolor=LINE)
            box.set(linewidth=0, alpha=0.6)
            ax.add_patch(box)
    token_ticks(ax.xaxis, tokens)
    _ticks(ax.yaxis, table.index)
    ax.set_xlabel("token" + (" (hatched: still the teacher's hidden state)" if same.any() else ""))
    ax.set_ylabel("hidden state (input of layer id)")
    _bare(ax)
    colorbar(ax, image, DRIFT_UNITS.get(kind, kind))
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
        From `ildlab.importance.hidden_states.logit_lens`.
    who : {"student", "teacher"}
        Whose rows to draw.
    layers : sequence, optional
        Layer ids (and "out") to draw; all by default.
    most : float, optional
        Entropy (nats) at the light end of the colours, to draw two models on one scale.

    Returns
    -------
    Axes
    """
    own = table[table["model"] == who]
    if layers is not None:
        own = own[own["layer"].isin(list(layers))]
    if own.empty:
        raise ValueError(f"The table has no rows of the {who} at these layers: ask logit_lens for them.")
    rows, width = list(dict.fromkeys(own["layer"])), int(own["position"].max()) + 1
    tokens = own.drop_duplicates("position").sort_values("position")["token"].tolist()
    grid = np.full((len(rows), width), np.nan)
    grid[[rows.index(i) for i in own["layer"]], own["position"]] = own["entropy"]
    ax = new_axes(ax, 1.8 + 0.62 * width, 1.2 + 0.2 * len(rows))
    image = ax.imshow(
        grid,
        cmap=MAP,
        vmin=0,
        vmax=most or float(np.nanmax(grid)),
        aspect="auto",
        interpolation="nearest",
        origin="lower",
    )
    for cell in own.itertuples():
        x, y = cell.position, rows.index(cell.layer)
        _write(ax, image, x, y, cell.entropy, token_label(cell.top[0], 8))
        if x + 1 < width and cell.top[0] == tokens[x + 1]:
            ink = ink_on(image.cmap(image.norm(cell.entropy)))
            ax.add_patch(Rectangle((x - 0.45, y - 0.42), 0.9, 0.84, fill=False, edgecolor=ink, linewidth=1.2))
    token_ticks(ax.xaxis, tokens, rotation=45)
    ax.set_yticks(range(len(rows)), [str(r) for r in rows])
    ax.set_xlabel("token read last (in the cells: the next token; framed: it does follow)")
    ax.set_ylabel(f"{who}: hidden state (layer id)")
    _bare(ax)
    colorbar(ax, image, "entropy of the next token (nats)")
    return ax


# ------------------------------------------------------------------ shared


def _ticks(axis: Any, labels: Sequence[Any], most: int = 20) -> None:
    """Label positions 0, 1, ... of an axis, at most `most` of them; a last "out" is always there."""
    labels = [str(i) for i in labels]
    step = -(-len(labels) // most)
    shown = list(range(0, len(labels), step))
    if labels and labels[-1] == "out" and shown[-1] != len(labels) - 1:
        shown = [i for i in shown if len(labels) - 1 - i >= step] + [len(labels) - 1]
    axis.set_ticks(shown, [labels[i] for i in shown])


def _bare(ax: Axes) -> None:
    for spine in ax.spines.values():
        spine.set_visible(False)


def _write(ax: Axes, image: Any, x: float, y: float, value: float, text: str) -> None:
    """Write into a cell of a heatmap, in the ink that reads on its colour, as plain text."""
    ink = ink_on(image.cmap(image.norm(value)))
    ax.text(x, y, text, ha="center", va="center", fontsize=7, color=ink, parse_math=False, clip_on=True)
