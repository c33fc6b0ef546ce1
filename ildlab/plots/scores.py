"""Figures: functions that take data and `ax=`, and return the Axes.

Each works on a DataFrame (or what `measure`, `distill`, `drift` return), draws on the Axes given or on
a new figure of its own, and never touches pyplot. In a notebook, end a cell with `ax.figure`, or show
`to_html(ax, alt)`. What is drawn is never told by colour alone: marks, hatches and numbers say it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from ildlab.plots.canvas import (
    BLUE,
    COLOURS,
    GREEN,
    LINE,
    MAP,
    TEXT,
    VERMILLION,
    colorbar,
    frame_of,
    ink_on,
    label_of,
    layer_ticks,
    legend,
    metric_of,
    new_axes,
    norm_of,
    style,
)


def importance(
    scores: Any,
    chosen: int | None = None,
    ax: Axes | None = None,
    *,
    removed: Iterable[int] = (),
    tied: Iterable[int] = (),
    metric: str | None = None,
    log: bool | None = None,
) -> Axes:
    """Bars of importance by layer id, with confidence intervals; the layer to go is marked.

    Parameters
    ----------
    scores : LayerScores, DataFrame or mapping
        By layer id: `score` and, where known, `ci_low` and `ci_high`.
    chosen : int, optional
        Layer id to mark; by default the lowest score.
    removed : iterable of int
        Layer ids that are gone; those that lie between scored ones are found without it.
    tied : iterable of int
        Layer ids that the scores cannot tell from the least important one; marked "≈".
    metric : str, optional
        Names the axis where `scores` does not.
    log : bool, optional
        Logarithmic scale; by default where all scores are positive and one dwarfs the rest.

    Returns
    -------
    Axes
    """
    table = frame_of(scores)
    ax = new_axes(ax)
    if table.empty:
        raise ValueError("There are no scores to draw: measure first.")
    values = table["score"].to_numpy(float)
    if chosen is None:
        least = getattr(scores, "least_important", None)  # a race may have dropped the lowest score early
        chosen = int(table["score"].idxmin()) if least is None else least
    top = max([*table.index, *removed])
    gone = sorted(set(removed) | (set(range(top + 1)) - set(table.index)))
    if log is None:
        log = bool(values.min() > 0 and values.max() > 8 * np.median(values))

    is_chosen = table.index == chosen
    bars = ax.bar(table.index, values, width=0.8, color=np.where(is_chosen, VERMILLION, BLUE), linewidth=0)
    for bar, mark in zip(bars, is_chosen, strict=True):
        if mark:
            bar.set(hatch="///", edgecolor="white")
    if {"ci_low", "ci_high"} <= set(table.columns):
        low, high = table["ci_low"].to_numpy(float), table["ci_high"].to_numpy(float)
        known = np.isfinite(low) & np.isfinite(high)
        spread = np.clip(np.stack([values - low, high - values]), 0, None)[:, known]
        ax.errorbar(table.index[known], values[known], spread, fmt="none", ecolor=LINE, elinewidth=1.2, capsize=2)
    if log:
        ax.set_yscale("log")
    bottom, ceiling = ax.get_ylim()
    for layer_id in gone:
        box = Rectangle((layer_id - 0.4, 0), 0.8, 1, transform=ax.get_xaxis_transform())
        box.set(fill=False, hatch="xxx", edgecolor=LINE, linewidth=0, alpha=0.45)
        ax.add_patch(box)
    above = {int(i): "≈" for i in tied if int(i) in table.index and int(i) != chosen}
    if chosen in table.index:
        above[chosen] = f"▼ {chosen}"
    for layer_id, text in above.items():
        at = table["ci_high"].get(layer_id, np.nan) if "ci_high" in table else np.nan
        at = at if np.isfinite(at) else table.at[layer_id, "score"]
        ax.annotate(
            text,
            (layer_id, max(at, bottom)),
            (0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=TEXT,
            fontsize=9,
            fontweight="bold",
        )
    ax.set_ylim(bottom, ceiling)
    ax.margins(y=0.12)
    if not log and values.min() < 0:
        ax.axhline(0, color=LINE, linewidth=0.8)
    ax.set_xlim(-0.7, top + 0.7)
    layer_ticks(ax.xaxis, range(top + 1))
    ax.set_xlabel("layer id")
    ax.set_ylabel(label_of(metric_of(scores, metric)))
    handles = [Patch(facecolor=BLUE, label="score, with its interval" if "ci_low" in table else "score")]
    handles.append(Patch(facecolor=VERMILLION, edgecolor="white", hatch="///", label=f"layer {chosen}: to be removed"))
    if gone:
        handles.append(Patch(fill=False, edgecolor=LINE, hatch="xxx", linewidth=0, label="removed"))
    if tied:
        handles.append(Patch(alpha=0, label="≈ tied with the least"))
    legend(ax, handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(handles))
    return ax


def importance_by_iteration(
    scores: Sequence[Any],
    removed: Sequence[int],
    ax: Axes | None = None,
    *,
    metric: str | None = None,
    n_layers: int | None = None,
) -> Axes:
    """Heatmap of importance, iteration by iteration, on layer ids; layers already removed are hatched.

    Parameters
    ----------
    scores : sequence of LayerScores or DataFrame
        One for each iteration, first to last.
    removed : sequence of int
        Layer id that each iteration removed; may be one shorter than `scores` (not yet decided).
    n_layers : int, optional
        Layers of the teacher, where the scores do not reach the last one.

    Returns
    -------
    Axes
    """
    if not scores:
        raise ValueError("There are no scores to draw: measure first.")
    tables = [frame_of(s)["score"] for s in scores]
    top = max([int(t.index.max()) + 1 for t in tables] + [i + 1 for i in removed] + [n_layers or 0])
    grid = np.full((len(tables), top), np.nan)
    for row, table in enumerate(tables):
        grid[row, table.index] = table.to_numpy(float)
    ax = new_axes(ax, 8.5, 1.4 + 0.36 * len(tables))
    image = ax.imshow(grid, aspect="auto", cmap=MAP, norm=norm_of(grid), interpolation="nearest")
    for row in range(len(tables)):
        for layer_id in range(top):
            if np.isnan(grid[row, layer_id]):
                box = Rectangle(
                    (layer_id - 0.5, row - 0.5), 1, 1, fill=False, hatch="xxxx", edgecolor=LINE, linewidth=0
                )
                ax.add_patch(box)
        if row < len(removed):
            at = removed[row]
            value = grid[row, at]
            colour = image.cmap(image.norm(value)) if np.isfinite(value) else "white"
            ax.text(
                at,
                row,
                "×",
                ha="center",
                va="center",
                color=ink_on(colour[:3] if len(colour) == 4 else colour),
                fontsize=13,
                fontweight="bold",
            )
    for spine in ax.spines.values():
        spine.set_visible(False)
    layer_ticks(ax.xaxis, range(top))
    ax.set_yticks(range(len(tables)), [str(i + 1) for i in range(len(tables))])
    ax.set_xlabel("layer id (× removed in this iteration, hatched: removed before)")
    ax.set_ylabel("iteration")
    colorbar(ax, image, label_of(metric_of(scores[-1], metric)))
    return ax


def loss_curves(history: pd.DataFrame, ax: tuple[Axes, Axes] | None = None) -> Axes:
    """Draw the losses of a distillation, KL on the left and hidden-state MSE on the right.

    They have different units, so that one axis for both would say nothing of either.

    Parameters
    ----------
    history : DataFrame
        Columns `step`, `kl` and any that begin with `mse` or `hidden_`.
    ax : pair of Axes, optional
        For KL and for MSE.

    Returns
    -------
    Axes
        That of KL; the other is `ax.figure.axes[1]`.
    """
    if ax is None:
        first = new_axes(None, 8.5, 3.0)
        figure = first.figure
        figure.delaxes(first)
        pair = tuple(style(a) for a in figure.subplots(1, 2))
    else:
        pair = tuple(style(a) for a in ax)
    steps = history["step"] if "step" in history else pd.Series(range(1, len(history) + 1), index=history.index)
    groups = (
        ["kl"] if "kl" in history else [c for c in ("loss",) if c in history],
        [
            c
            for c in history.columns
            if str(c).startswith(("mse", "hidden_")) and not str(c).endswith(("_grad", "_share", "_norm"))
        ],
    )
    for axes, columns, unit in zip(pair, groups, ("KL (nats per token)", "hidden-state loss"), strict=True):
        drawn = []
        for number, column in enumerate(columns):
            colour, dash = COLOURS[number % 4], ("-", "--", ":", "-.")[(number + number // 4) % 4]
            values = pd.to_numeric(history[column], errors="coerce")
            if not values.notna().any():
                continue
            drawn.append(values)
            smooth = len(values) >= 20
            if smooth:
                axes.plot(steps, values, color=colour, alpha=0.35, linewidth=0.8)
                values = values.rolling(max(5, len(values) // 20), min_periods=1, center=True).median()
            name = str(column).replace("_", " ") + (" (running median)" if smooth and len(columns) == 1 else "")
            marker = "o" if len(values) < 8 else None
            axes.plot(
                steps, values, color=colour, linestyle=dash, linewidth=1.8, label=name, marker=marker, markersize=3
            )
        if drawn and min(v.min() for v in drawn) > 0:
            low, high = min(v.min() for v in drawn), max(v.max() for v in drawn)
            if high > 3 * low:
                axes.set_yscale("log")
                axes.yaxis.set_minor_formatter(ScalarFormatter() if high < 20 * low else "")
                axes.tick_params(axis="y", which="minor", labelsize=7)
        if not drawn:
            axes.text(0.5, 0.5, "not part of this loss", transform=axes.transAxes, ha="center", color=TEXT, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        legend(axes)
    return pair[0]


def quality(
    table: pd.DataFrame, ax: Axes | None = None, *, value: str = "perplexity", teacher: float | None = None
) -> Axes:
    """Draw quality against the number of layers removed, with parameters on a second axis.

    Parameters
    ----------
    table : DataFrame
        One row a number of layers removed: `n_removed`, `{value}_before` and `{value}_after`
        distillation (or `{value}` alone), and optionally `parameters`.
    value : str
        "perplexity", "kl", "aggregate" or another pair of columns.
    teacher : float, optional
        The teacher's value, as a dotted line.

    Returns
    -------
    Axes
        That of the quality; the one of the parameters is `ax.figure.axes[-1]`.
    """
    columns = [
        (f"{value}_before", "removed only", VERMILLION, "--", "s"),
        (f"{value}_after", "removed and distilled", BLUE, "-", "o"),
        (value, value, BLUE, "-", "o"),
    ]
    columns = [c for c in columns if c[0] in table.columns and table[c[0]].notna().any()]
    if "n_removed" not in table.columns or not columns:
        raise ValueError(
            f"A quality table needs n_removed and {value}, {value}_before or {value}_after; "
            f"this one has {list(table.columns)}."
        )
    table = table.sort_values("n_removed")
    ax = new_axes(ax, 6.5, 3.4)
    units = {"kl": "KL to the teacher (nats/token)"}
    if "parameters" in table.columns and table["parameters"].notna().any():
        second = style(ax.twinx())
        second.spines["right"].set_visible(True)
        second.bar(
            table["n_removed"],
            table["parameters"] / 1e6,
            width=0.55,
            facecolor="none",
            edgecolor=LINE,
            hatch="..",
            alpha=0.5,
            linewidth=0.8,
            label="parameters",
        )
        second.set_ylabel("parameters (millions, dotted bars)")
        # The lines are what the figure is about: keep them above the bars.
        ax.set_zorder(second.get_zorder() + 1)
        ax.patch.set_visible(False)
    for column, label, colour, dash, marker in columns:
        known = table[table[column].notna()]
        ax.plot(known["n_removed"], known[column], dash, color=colour, marker=marker, label=label, linewidth=1.8)
        last = known.iloc[-1]
        ax.annotate(
            f"{last[column]:.3g}",
            (last["n_removed"], last[column]),
            (6, 4),
            textcoords="offset points",
            color=TEXT,
            fontsize=9,
        )
    if teacher is not None:
        ax.axhline(teacher, color=GREEN, linestyle=":", linewidth=1.5, label=f"teacher ({teacher:.3g})")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.margins(x=0.1, y=0.12)
    ax.set_xlabel("layers removed")
    ax.set_ylabel(f"held-out {units.get(value, label_of(value))}")
    legend(ax, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return ax
