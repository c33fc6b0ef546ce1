"""Figures of curves: losses over steps, and quality over layers removed, by method, task or branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from ildlab.drawing.columns import label_of
from ildlab.plots.canvas import (
    ABOVE,
    BLUE,
    COLOURS,
    DASHES,
    GREEN,
    LINE,
    PURPLE,
    TEXT,
    VERMILLION,
    legend,
    need,
    new_axes,
    new_figure,
    note,
    second_axis,
    style,
)

# Colour, dash and marker; dash and marker tell the methods apart without colour.
STYLES = {
    "shortgpt": (LINE, ":", "x"),
    "iterative_block_influence": (PURPLE, "-.", "v"),
    "iterative_layerwise_pruning": (VERMILLION, "--", "s"),
    "iterative_block_influence_distillation": (GREEN, (0, (5, 1)), "^"),
    "iterative_layerwise_distillation": (BLUE, "-", "o"),
}


def loss_curves(history: pd.DataFrame) -> Axes:
    """Draw the losses of a distillation, KL on the left and hidden-state losses on the right.

    They have different units, so that one axis for both would say nothing of either. Returned is the Axes of KL; the
    other is its `figure.axes[1]`.

    Parameters
    ----------
    history : DataFrame
        A step's record a row: `step`, `kl`, and a `hidden_{layer id}` for each place where hidden states are matched.
    """
    need(history, "a session's losses()", "step", "kl")
    left, right = new_figure(8.5, 3.0).subplots(1, 2)
    table = history.set_index("step")
    _losses(style(left), table[["kl"]], "KL (nats per token)")
    _losses(style(right), table.filter(regex="^hidden_"), "hidden-state loss")
    return left


def _losses(ax: Axes, table: pd.DataFrame, unit: str) -> None:
    """Draw the columns of a table by step; from 20 steps on their running medians, the values behind them."""
    table = table.apply(pd.to_numeric, errors="coerce")
    for number, (name, values) in enumerate(table.items()):
        if not values.notna().any():
            continue
        # Each turn through the colours begins at another dash, so that no two lines look the same.
        look = {"color": COLOURS[number % 4], "linestyle": DASHES[(number + number // 4) % 4], "linewidth": 1.8}
        label = name.replace("_", " ")
        if len(values) >= 20:
            ax.plot(table.index, values, color=look["color"], alpha=0.35, linewidth=0.8)
            values = values.rolling(max(5, len(values) // 20), min_periods=1, center=True).median()
            label += " (running median)" if len(table.columns) == 1 else ""
        ax.plot(table.index, values, label=label, marker="o" if len(values) < 8 else None, markersize=3, **look)
    drawn = table.to_numpy(float)
    if not np.isfinite(drawn).any():
        ax.text(0.5, 0.5, "not part of this loss", transform=ax.transAxes, ha="center", color=TEXT, fontsize=9)
    elif 0 < 3 * np.nanmin(drawn) < np.nanmax(drawn):
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter(ScalarFormatter() if np.nanmax(drawn) < 20 * np.nanmin(drawn) else "")
        ax.tick_params(axis="y", which="minor", labelsize=7)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.set_xlabel("step")
    ax.set_ylabel(unit)
    legend(ax)


def quality(history: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw perplexity against layers removed, with and without distillation; dotted: the teacher's.

    The model's parameters stand below the layers removed.

    Parameters
    ----------
    history : DataFrame
        From `PruningSession.history`.
    """
    need(history, "a session's history()", "n_removed", "perplexity", "perplexity_undistilled", "perplexity_pruned")
    history = history.set_index("n_removed")
    after = history["perplexity"]
    # Never distilled where that was evaluated; else just pruned; the teacher, and a student not distilled, as they are.
    before = history["perplexity_undistilled"].fillna(history["perplexity_pruned"]).fillna(after)
    ax = new_axes(ax, 6.5, 3.4)
    lines = ((before, "removed only", VERMILLION, "--", "s"), (after, "removed and distilled", BLUE, "-", "o"))
    for values, label, colour, dash, marker in lines:
        known = values.dropna()
        if len(known):
            ax.plot(known.index, known, dash, color=colour, marker=marker, label=label, linewidth=1.8)
            note(ax, f"{known.iloc[-1]:.3g}", (known.index[-1], known.iloc[-1]), (6, 4), 9)
    for teacher in after[after.index == 0].dropna():
        ax.axhline(teacher, color=GREEN, linestyle=":", linewidth=1.5, label=f"teacher ({teacher:.3g})")
    ax.margins(x=0.1, y=0.12)
    _layers_removed(ax, "held-out perplexity")
    shown = history.index[:: -(-len(history) // 12)]
    sizes = history["parameters"].astype(float) / 1e6
    ax.set_xticks(shown, [f"{n}\n{sizes[n]:,.0f} M" if sizes[n] > 0 else f"{n}" for n in shown])
    ax.set_xlabel("layers removed (below: parameters)")
    legend(ax, **ABOVE, ncols=3)
    return ax


def task_bars(results: dict[str, Any], ax: Axes | None = None) -> Axes:
    """Draw scores by task, a bar a model, with intervals; above each the change from the first, "●" where it is sure.

    Sure: the 95% interval of the difference on the same examples (paired bootstrap) leaves 0 out.

    Parameters
    ----------
    results : dict of str to SuiteResult
        Of the same suite, the teacher first.
    """
    if not results:
        raise ValueError("There are no results to draw: evaluate on a suite, or with canaries.")
    first = next(iter(results.values()))
    ax = new_axes(ax, max(6.0, 1.6 + 0.42 * len(first.tasks) * (1 + len(results))), 3.4)
    width = 0.8 / len(results)
    for k, (name, result) in enumerate(results.items()):
        at = np.arange(len(first.tasks)) + width * (k - (len(results) - 1) / 2)
        found = [task.interval() for task in result.tasks.values()]
        scores = np.array([each.value for each in found])
        look = {"color": COLOURS[k % 4], "hatch": ("", "//", "..", "xx")[k % 4], "edgecolor": "white", "linewidth": 0}
        ax.bar(at, scores, width * 0.92, label=name, **look)
        spread = np.array([(e.value - e.low, e.high - e.value) for e in found]).T.clip(0)  # [2, tasks]
        ax.errorbar(at, scores, np.nan_to_num(spread), fmt="none", ecolor=TEXT, elinewidth=1.2, capsize=2)
        for x, task, each in zip(at, result.tasks.values(), found) if k else ():
            note(
                ax,
                _delta(first.tasks[task.name], task),
                (x, max(each.value, np.nan_to_num(each.high))),
                (0, 2),
                7,
                ha="center",
            )
    ax.set_xticks(range(len(first.tasks)), [name.replace("_", "\n") for name in first.tasks])
    ax.set_ylabel("score")
    ax.set_xlabel(f"{first.name} (change from the first bar; ● sure, ○ not sure)")
    ax.margins(y=0.15)
    legend(ax, **ABOVE, ncols=4)
    return ax


def _delta(before: Any, after: Any) -> str:
    """Change of a task's score, and whether it is surely one."""
    low, high = np.percentile(after.resampled() - before.resampled(), (2.5, 97.5))
    return f"{after.score - before.score:+.2f}{'●' if low > 0 or high < 0 else '○'}"


def methods(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    over: str = "layers_removed",
    labels: dict[str, str] | None = None,
    parameters: bool = True,
) -> Axes:
    """Draw a curve a method against layers removed, with intervals where the table has them; dotted: 0 removed.

    Parameters
    ----------
    table : DataFrame
        `method`, `over`, `aggregate`, and optionally `low`, `high`, `parameters`.
    over : str
        "layers_removed", or "share_removed" to lay models of other depths beside each other.
    labels : dict, optional
        Method -> name in the legend.
    parameters : bool
        Show parameters on a second axis, where the table has them.
    """
    ax = new_axes(ax, 7.5, 4.2)
    names = [name for name in STYLES if name in set(table["method"])]
    for name in names + sorted(set(table["method"]) - set(names)):
        own = table[table["method"] == name].sort_values(over)
        ax.plot(own[over], own["aggregate"], linewidth=1.8, **_look(name, labels))
        if {"low", "high"} <= set(own.columns):
            ax.fill_between(own[over], own["low"], own["high"], color=_look(name)["color"], alpha=0.12, linewidth=0)
    for teacher in table.loc[table[over] == 0, "aggregate"][:1]:
        ax.axhline(teacher, color=TEXT, linestyle=(0, (1, 2)), linewidth=1.2, label=f"teacher ({teacher:.3f})")
    if parameters and "parameters" in table.columns:
        sizes = table.groupby(over)["parameters"].first() / 1e6
        second = second_axis(ax, "parameters (millions), thin line")
        second.plot(sizes.index, sizes, color=LINE, linewidth=0.8, marker=".", markersize=4)
    _layers_removed(ax, label_of("aggregate"))
    if over == "share_removed":
        ax.set_xlabel("share of layers removed")
    legend(ax, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return ax


def task_panels(
    table: pd.DataFrame,
    tasks: Sequence[str],
    *,
    chance: dict[str, float] | None = None,
    labels: dict[str, str] | None = None,
    columns: int = 4,
) -> Figure:
    """Draw one small panel a task: its score against layers removed, a line a method.

    Parameters
    ----------
    table : DataFrame
        `method`, `layers_removed` and a column for each task.
    tasks : sequence of str
    chance : dict, optional
        Task -> score of a guesser, as a thin line.
    labels : dict, optional
        Method -> name in the legend.
    columns : int
        Panels in a row.
    """
    rows = -(-len(tasks) // columns)
    figure = new_figure(2.3 * columns, 1.9 * rows + 0.6)
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    for number, (ax, task) in enumerate(zip(panels, tasks, strict=False)):
        style(ax)
        for name, own in table.sort_values("layers_removed").groupby("method", sort=False):
            ax.plot(own["layers_removed"], own[task], markersize=4, **_look(name, labels))
        if chance and chance.get(task):
            ax.axhline(chance[task], color=LINE, linewidth=0.8, linestyle=":")
        ax.set_title(task.replace("_", " "), color=TEXT, fontsize=9)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if number % columns == 0:
            ax.set_ylabel("score", fontsize=9)
        if len(tasks) - columns <= number:  # nothing below it
            ax.set_xlabel("layers removed", fontsize=9)
            ax.tick_params(labelbottom=True)
    for ax in panels[len(tasks) :]:
        ax.set_visible(False)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, labelcolor=TEXT, fontsize=8)
    return figure


def branches(tables: dict[str, pd.DataFrame], ax: Axes | None = None) -> Axes:
    """Draw the perplexity of several branches of one run against layers removed.

    Parameters
    ----------
    tables : dict of str to DataFrame
        For each branch a table as of `ildlab.session.history_table`. Where an iteration was not distilled, the
        value right after its removal stands in.
    """
    ax = new_axes(ax, 6.5, 3.4)
    for number, (name, table) in enumerate(tables.items()):
        drawn = table["perplexity"].fillna(table["perplexity_pruned"])
        look = {"color": COLOURS[number % 4], "linestyle": DASHES[number % 4], "marker": "osD^v"[number % 5]}
        ax.plot(table["n_removed"], drawn, label=name, linewidth=1.8, **look)
    _layers_removed(ax, label_of("perplexity"))
    legend(ax)
    return ax


# ------------------------------------------------------------------ shared


def _look(name: str, labels: dict[str, str] | None = None) -> dict[str, Any]:
    """How a method's line looks, and its name in the legend."""
    colour, dash, marker = STYLES.get(name, (TEXT, "-", "."))
    label = (labels or {}).get(name, str(name).replace("_", " "))
    return {"color": colour, "linestyle": dash, "marker": marker, "label": label}


def _layers_removed(ax: Axes, unit: str) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layers removed")
    ax.set_ylabel(unit)
