"""Figures of rankings: ranks over iterations, one metric against another, two models' profiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ildlab.plots.canvas import (
    BLUE,
    COLOURS,
    LINE,
    TEXT,
    VERMILLION,
    frame_of,
    label_of,
    layer_ticks,
    legend,
    metric_of,
    new_axes,
)

DASHES = ("-", "--", ":", "-.")


def rank_flow(scores: Sequence[Any], removed: Sequence[int] = (), ax: Axes | None = None) -> Axes:
    """Bump chart: the rank of every layer id, iteration by iteration; rank 1 is the least important.

    Parameters
    ----------
    scores : sequence of LayerScores or DataFrame
        One for each iteration, first to last.
    removed : sequence of int
        Layer id that each iteration removed; may be one shorter than `scores` (not yet decided).

    Returns
    -------
    Axes
    """
    if not scores:
        raise ValueError("There are no scores to draw: measure first.")
    ranks = pd.DataFrame({k + 1: frame_of(s)["score"].rank(method="first") for k, s in enumerate(scores)}).sort_index()
    ax = new_axes(ax, max(4.5, 1.6 + 0.9 * len(scores)), max(3.0, 0.9 + 0.17 * len(ranks)))
    marked = list(dict.fromkeys(removed))
    for layer_id, row in ranks.iterrows():
        row = row.dropna()
        look = {"color": LINE, "linewidth": 0.9, "alpha": 0.7, "marker": ".", "markersize": 4}
        if layer_id in marked:
            k = marked.index(layer_id)
            look = {"color": COLOURS[k % len(COLOURS)], "linewidth": 2.2, "marker": "o", "markersize": 4}
            look |= {"linestyle": DASHES[k % len(DASHES)], "zorder": 3}
        ax.plot(row.index, row, **look)
        gone = marked.index(layer_id) + 1 if layer_id in marked else None
        bold = "bold" if gone else "normal"
        for at, side, align in ((row.index[0], -6, "right"), (row.index[-1], 7, "left")):
            text = f"{layer_id} ×" if align == "left" and at == gone else str(layer_id)
            ax.annotate(
                text,
                (at, row[at]),
                (side, 0),
                textcoords="offset points",
                ha=align,
                va="center",
                color=TEXT,
                fontsize=8,
                fontweight=bold,
            )
    ax.set_xticks(range(1, len(scores) + 1))
    ax.set_xlim(0.6, len(scores) + 0.4)
    ax.set_ylim(0.3, len(ranks) + 0.7)
    layer_ticks(ax.yaxis, range(1, len(ranks) + 1))
    ax.set_xlabel("iteration (labels: layer id; × removed in this iteration)")
    ax.set_ylabel("rank (1: least important)")
    return ax


def metric_scatter(scores_a: Any, scores_b: Any, ax: Axes | None = None) -> Axes:
    """One metric against another, a point a layer with its id; Spearman's rank correlation in the corner.

    Parameters
    ----------
    scores_a, scores_b : LayerScores, DataFrame or mapping {layer id: score}
        Of the same layers; layers that only one of them scored are left out. The least important
        layer of each is a triangle.

    Returns
    -------
    Axes
    """
    pair = pd.DataFrame({"a": frame_of(scores_a)["score"], "b": frame_of(scores_b)["score"]}).dropna()
    if len(pair) < 2:
        raise ValueError("The two scores share fewer than 2 layers: measure both on the same student.")
    ax = new_axes(ax, 5.4, 4.4)
    least = {pair["a"].idxmin(), pair["b"].idxmin()}
    low, rest = pair[pair.index.isin(least)], pair[~pair.index.isin(least)]
    ax.scatter(rest["a"], rest["b"], s=18, facecolors="none", edgecolors=BLUE)
    ax.scatter(low["a"], low["b"], s=40, color=VERMILLION, marker="v", label="least of a metric")
    for layer_id, a, b in pair.itertuples():
        ax.annotate(str(layer_id), (a, b), (4, 3), textcoords="offset points", color=TEXT, fontsize=8)
    for column, scale in (("a", ax.set_xscale), ("b", ax.set_yscale)):
        if _spread_out(pair[column].to_numpy()):
            scale("log")
    rho = pair["a"].rank().corr(pair["b"].rank())
    ax.text(
        0.02,
        0.98,
        f"Spearman ρ = {rho:.2f}\n{len(pair)} layers",
        transform=ax.transAxes,
        va="top",
        color=TEXT,
        fontsize=9,
    )
    ax.margins(0.1)
    ax.set_xlabel(label_of(metric_of(scores_a)))
    ax.set_ylabel(label_of(metric_of(scores_b)))
    legend(ax, loc="lower right")
    return ax


def profile_beside(
    scores: Any,
    published: pd.DataFrame,
    ax: Axes | None = None,
    *,
    names: tuple[str, str] = ("SmolLM2-135M", "Qwen2.5-3B (published)"),
    n_layers: int | None = None,
) -> Axes:
    """A model's Block Influence beside another's, over relative depth (0: first layer, 1: last).

    Parameters
    ----------
    scores : LayerScores, DataFrame or mapping
        Block Influence by layer id.
    published : DataFrame
        `layer_id` and `block_influence`, such as data/published/qwen2.5-3b_block_influence.csv.
    names : pair of str
    n_layers : int, optional
        Layers of the teacher, where the scores do not reach the last one.

    Returns
    -------
    Axes
    """
    own = frame_of(scores)["score"]
    theirs = published.set_index("layer_id")["block_influence"].sort_index()
    ax = new_axes(ax, 7.5, 3.6)
    looks = ((BLUE, "-", "o"), (VERMILLION, "--", "s"))
    depths = (n_layers or int(own.index.max()) + 1, int(theirs.index.max()) + 1)
    for values, depth, name, (colour, dash, marker) in zip((own, theirs), depths, names, looks, strict=True):
        x = values.index.to_numpy(float) / max(depth - 1, 1)
        ax.plot(x, values, dash, color=colour, marker=marker, markersize=4, label=f"{name}, {depth} layers")
        at = values.idxmin()
        ax.annotate(
            f"least: {at}",
            (at / max(depth - 1, 1), values[at]),
            (0, -6),
            textcoords="offset points",
            ha="center",
            va="top",
            color=TEXT,
            fontsize=8,
        )
    if _spread_out(np.r_[own, theirs]):
        ax.set_yscale("log")
    ax.margins(y=0.15)
    ax.set_xlabel("relative depth (0: first layer, 1: last layer)")
    ax.set_ylabel(label_of("block_influence"))
    legend(ax, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return ax


def _spread_out(values: np.ndarray) -> bool:
    return bool(values.min() > 0 and values.max() > 8 * np.median(values))
