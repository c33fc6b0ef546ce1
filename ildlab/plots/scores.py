"""Figures of `LayerScores`: importance by layer and by iteration, one metric or model beside another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ildlab.drawing.columns import label_of, unit_of
from ildlab.errors import PlotError
from ildlab.plots.canvas import (
    ABOVE,
    BLUE,
    COLOURS,
    DASHES,
    LINE,
    TEXT,
    VERMILLION,
    hatch,
    heatmap,
    in_cell,
    legend,
    new_axes,
    note,
    removed_key,
    spread_out,
)

UNMEASURED = "There are no scores to draw: measure first."


def importance(
    scores: Any,
    chosen: int | None = None,
    ax: Axes | None = None,
    *,
    removed: Iterable[int] = (),
    tied: Iterable[int] = (),
) -> Axes:
    """Bars of importance by layer id, with confidence intervals; the layer to go is marked.

    Parameters
    ----------
    scores : LayerScores
    chosen : int, optional
        Layer id to mark; by default the least important one.
    removed : iterable of int
        Layer ids that are gone; those that lie between scored ones are found without it.
    tied : iterable of int
        Layer ids that the scores cannot tell from the least important one; marked "≈".
    """
    if scores is None:
        raise PlotError(UNMEASURED)
    table = scores.table
    if chosen is not None and chosen not in table.index:
        raise PlotError(f"chosen={chosen!r}: these scores are of layers {[*table.index]}.")
    ax = new_axes(ax)
    values = table["score"].to_numpy(float)
    chosen = scores.least_important if chosen is None else chosen
    top = max([*table.index, *removed, *scores.unscored])
    gone = sorted(set(removed) | (set(range(top + 1)) - {*table.index, *scores.unscored}))
    bars = ax.bar(table.index, values, width=0.8, color=np.where(table.index == chosen, VERMILLION, BLUE), linewidth=0)
    if chosen in table.index:
        bars[table.index.get_loc(chosen)].set(hatch="///", edgecolor="white")
    known = table.dropna(subset=["ci_low", "ci_high"])
    spread = np.stack([known["score"] - known["ci_low"], known["ci_high"] - known["score"]]).clip(0)  # [2, layers]
    ax.errorbar(known.index, known["score"], spread, fmt="none", ecolor=LINE, elinewidth=1.2, capsize=2)
    if spread_out(values):
        ax.set_yscale("log")
    elif values.min() < 0:
        ax.axhline(0, color=LINE, linewidth=0.8)
    bottom, ceiling = ax.get_ylim()
    if ax.get_yscale() == "log":  # a bar has to stand on something: the axis says on what
        bottom = 10 ** np.floor(np.log10(values.min() * 0.999))
    for layer_id in gone:
        hatch(ax, layer_id)
    upper = table["ci_high"].fillna(table["score"])
    look = {"ha": "center", "va": "bottom", "fontweight": "bold"}
    for layer_id, text in ({i: "≈" for i in tied} | {chosen: f"▼ {chosen}"}).items():
        if layer_id in table.index:
            note(ax, text, (layer_id, max(upper[layer_id], bottom)), (0, 3), 9, **look)
    ax.set_ylim(bottom, ceiling)
    ax.margins(y=0.12)
    ax.set_xlim(-0.7, top + 0.7)
    ax.xaxis.set_major_locator(MaxNLocator(36, integer=True))
    ax.set_xlabel("layer id")
    ax.set_ylabel(unit_of(scores) + (f", log from {bottom:g}" if ax.get_yscale() == "log" else ""))
    handles = [Patch(facecolor=BLUE, label="score, with its interval")]
    handles.append(Patch(facecolor=VERMILLION, edgecolor="white", hatch="///", label=f"layer {chosen}: to be removed"))
    handles += [removed_key()] if gone else []
    handles += [Patch(alpha=0, label="≈ tied with the least")] if tied else []
    handles += [Patch(alpha=0, label="no bar: not scored")] if scores.unscored else []
    legend(ax, handles=handles, **ABOVE, ncols=len(handles))
    return ax


def importance_by_iteration(scores: Sequence[Any], removed: Sequence[int], ax: Axes | None = None) -> Axes:
    """Heatmap of importance, iteration by iteration, on layer ids; layers already removed are hatched, others not scored dotted.

    Parameters
    ----------
    scores : sequence of LayerScores
        One for each iteration, first to last.
    removed : sequence of int
        Layer id that each iteration removed; may be one shorter than `scores` (not yet decided).
    """
    if not scores:
        raise PlotError(UNMEASURED)
    if len(removed) not in (len(scores), len(scores) - 1):
        raise PlotError(f"{len(removed)} removed layers for {len(scores)} iterations: one each, or one fewer.")
    tables = [s.table["score"] for s in scores]
    top = 1 + max(i for each in (removed, *(t.index for t in tables), *(s.unscored for s in scores)) for i in each)
    grid = pd.DataFrame(tables).reindex(columns=range(top)).to_numpy(float)  # [iterations, layers]
    ax = new_axes(ax, 8.5, 1.4 + 0.36 * len(tables))
    image = heatmap(ax, grid, unit_of(scores[-1]), origin="upper")
    for row, layer_id in np.argwhere(np.isnan(grid)):
        hatch(ax, layer_id, row, ".." if layer_id in scores[row].unscored else "xxxx", None)
    for row, layer_id in enumerate(removed[: len(tables)]):
        in_cell(image, layer_id, row, grid[row, layer_id], "×", 13, fontweight="bold")
    ax.xaxis.set_major_locator(MaxNLocator(36, integer=True))
    ax.set_yticks(range(len(tables)), [str(i + 1) for i in range(len(tables))])
    dotted = ", dotted: not scored" if any(s.unscored for s in scores) else ""
    ax.set_xlabel(f"layer id (× removed in this iteration, hatched: removed before{dotted})")
    ax.set_ylabel("iteration")
    return ax


def importance_by_kind(scores: Any, ax: Axes | None = None) -> Axes:
    """Heatmap of importance by kind of text and layer id, each kind in units of its own median layer.

    The least important layer of each kind is marked "▼"; layers that were not scored are hatched.

    Parameters
    ----------
    scores : LayerScores
        Measured on a text of several kinds, such as ``"mix"``.
    """
    if scores is None:
        raise PlotError(UNMEASURED)
    if not scores.kinds:
        raise PlotError('These scores tell no kinds of text: measure on several, such as load_text("mix", ...).')
    table = scores.per_kind
    grid = table.reindex(range(int(table.index.max()) + 1)).to_numpy(float).T  # [kinds, layers]
    ax = new_axes(ax, 8.5, 1.4 + 0.36 * len(grid))
    image = heatmap(ax, grid, unit_of(scores), origin="upper")
    for row, layer_id in np.argwhere(np.isnan(grid)):
        hatch(ax, layer_id, row, "xxxx", None)
    for row, layer_id in enumerate(table.loc[scores.finalists].idxmin()):
        in_cell(image, layer_id, row, grid[row, layer_id], "▼", 9)
    ax.xaxis.set_major_locator(MaxNLocator(36, integer=True))
    ax.set_yticks(range(len(grid)), [*table.columns], parse_math=False)
    ax.set_xlabel("layer id (▼ least important on this kind, hatched: not scored)")
    ax.set_ylabel("kind of text")
    return ax


def metric_scatter(scores_a: Any, scores_b: Any, ax: Axes | None = None) -> Axes:
    """One metric against another, a point a layer with its id; Spearman's rank correlation in the corner.

    Layers that only one of them scored are left out. The least important layer of each is a triangle.
    """
    if scores_a is None or scores_b is None:
        raise PlotError(UNMEASURED)
    pair = pd.DataFrame({"a": scores_a.table["score"], "b": scores_b.table["score"]}).dropna()
    if len(pair) < 2:
        raise PlotError("The two scores share fewer than 2 layers: measure both on the same student.")
    ax = new_axes(ax, 5.4, 4.4)
    least = pair.index.isin([pair["a"].idxmin(), pair["b"].idxmin()])
    ax.scatter(pair["a"][~least], pair["b"][~least], s=18, facecolors="none", edgecolors=BLUE)
    ax.scatter(pair["a"][least], pair["b"][least], s=40, color=VERMILLION, marker="v", label="least of a metric")
    for layer_id, a, b in pair.itertuples():
        note(ax, str(layer_id), (a, b), (4, 3))
    for column, scale in (("a", ax.set_xscale), ("b", ax.set_yscale)):
        if spread_out(pair[column].to_numpy()):
            scale("log")
    words = f"Spearman ρ = {pair['a'].corr(pair['b'], method='spearman'):.2f}\n{len(pair)} layers"
    ax.text(0.02, 0.98, words, transform=ax.transAxes, va="top", color=TEXT, fontsize=9)
    ax.margins(0.1)
    ax.set_xlabel(unit_of(scores_a))
    ax.set_ylabel(unit_of(scores_b))
    legend(ax, loc="lower right")
    return ax


def profile_beside(scores: Any, published: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """A model's Block Influence beside another's, over relative depth (0: first layer, 1: last).

    Parameters
    ----------
    scores : LayerScores
    published : DataFrame
        `layer_id` and `block_influence`, such as data/published/qwen2.5-3b_block_influence.csv.
    """
    own = scores.table["score"]
    theirs = published.set_index("layer_id")["block_influence"].sort_index()
    ax = new_axes(ax, 7.5, 3.6)
    for values, name, *look in ((own, "this model", BLUE, "-", "o"), (theirs, "published", VERMILLION, "--", "s")):
        depth = int(values.index.max()) + 1
        at = values.index.to_numpy(float) / max(depth - 1, 1)
        _over_depth(ax, at, values, f"{name}, {depth} layers", *look)
    if spread_out(np.r_[own, theirs]):
        ax.set_yscale("log")
    ax.margins(y=0.15)
    ax.set_ylabel(label_of("block_influence"))
    legend(ax, **ABOVE, ncols=2)
    return ax


def _over_depth(ax: Axes, at: np.ndarray, values: pd.Series, label: str, colour: str, dash: str, marker: str) -> None:
    """A line of values by layer id over relative depths `at`, and the name of its least layer."""
    ax.plot(at, values, dash, color=colour, marker=marker, markersize=4, label=label)
    least = int(values.to_numpy().argmin())
    note(ax, f"least: {values.index[least]}", (at[least], values.iloc[least]), (0, -6), ha="center", va="top")
    ax.set_xlabel("relative depth (0: first layer, 1: last layer)")


def profiles(values: dict[str, Any], label: str, ax: Axes | None = None) -> Axes:
    """Importance over relative depth (0: first layer, 1: last) of many models, each over its own median layer.

    Parameters
    ----------
    values : dict
        Name of a model -> `LayerScores`, or a Series by layer id: the layers that it has, bottom first.
    label : str
        What was measured.
    """
    ax = new_axes(ax, 8.5, 4.2)
    for k, (name, each) in enumerate(values.items()):
        own = each if isinstance(each, pd.Series) else each.table["score"]
        look = COLOURS[k % len(COLOURS)], DASHES[k % len(DASHES)], "osv^DP"[k % 6]
        _over_depth(ax, np.linspace(0, 1, len(own)), own / own.median(), f"{name}, {len(own)} layers", *look)
    ax.axhline(1, color=TEXT, linewidth=0.8)
    ax.set_yscale("log")
    ax.margins(y=0.12)
    ax.set_ylabel(f"{label}, over the median layer")
    legend(ax, **ABOVE, ncols=2)
    return ax
