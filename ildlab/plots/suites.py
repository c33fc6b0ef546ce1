"""Figures of suites: aggregate by method, and one small panel a task, against layers removed."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ildlab.errors import SuiteError
from ildlab.plots.canvas import (
    BLUE,
    COLOURS,
    DPI,
    GREEN,
    LINE,
    PURPLE,
    TEXT,
    VERMILLION,
    label_of,
    legend,
    new_axes,
    style,
)

# Dash and marker tell the methods apart without colour.
STYLES = {
    "shortgpt": (LINE, ":", "x"),
    "iterative_block_influence": (PURPLE, "-.", "v"),
    "iterative_layerwise_pruning": (VERMILLION, "--", "s"),
    "iterative_block_influence_distillation": (GREEN, (0, (5, 1)), "^"),
    "iterative_layerwise_distillation": (BLUE, "-", "o"),
}


def methods(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    value: str = "aggregate",
    over: str = "layers_removed",
    teacher: float | None = None,
    labels: dict[str, str] | None = None,
    parameters: bool = True,
) -> Axes:
    """Draw a curve a method against layers removed, with intervals where the table has them.

    Parameters
    ----------
    table : DataFrame
        `method`, `over`, `value`, and optionally `low`, `high`, `parameters`.
    value : str
    over : str
        "layers_removed", or "share_removed" to lay models of other depths beside each other.
    teacher : float, optional
        The teacher's value, as a dotted line; by default that at 0 removed.
    labels : dict, optional
        Method -> name in the legend.
    parameters : bool
        Show parameters on a second axis, where the table has them.
    """
    ax = new_axes(ax, 7.5, 4.2)
    if teacher is None and (table[over] == 0).any():
        teacher = float(table.loc[table[over] == 0, value].iloc[0])
    names = [name for name in STYLES if name in set(table["method"])]
    for name in names + sorted(set(table["method"]) - set(names)):
        own = table[table["method"] == name].sort_values(over)
        colour, dash, marker = STYLES.get(name, (TEXT, "-", "."))
        label = (labels or {}).get(name, name.replace("_", " "))
        ax.plot(own[over], own[value], linestyle=dash, color=colour, marker=marker, label=label, linewidth=1.8)
        if value == "aggregate" and {"low", "high"} <= set(own.columns):
            ax.fill_between(own[over], own["low"], own["high"], color=colour, alpha=0.12, linewidth=0)
    if teacher is not None:
        ax.axhline(teacher, color=TEXT, linestyle=(0, (1, 2)), linewidth=1.2, label=f"teacher ({teacher:.3f})")
    if parameters and "parameters" in table.columns:
        sizes = table.groupby(over)["parameters"].first() / 1e6
        second = style(ax.twinx())
        second.spines["right"].set_visible(True)
        second.plot(sizes.index, sizes, color=LINE, linewidth=0.8, marker=".", markersize=4)
        second.set_ylabel("parameters (millions), thin line")
        ax.set_zorder(second.get_zorder() + 1)
        ax.patch.set_visible(False)
    if over == "layers_removed":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel({"layers_removed": "layers removed", "share_removed": "share of layers removed"}.get(over, over))
    ax.set_ylabel("KL to the teacher (nats/token)" if value == "kl" else label_of(value))
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

    Raises
    ------
    SuiteError
        No tasks.
    """
    if not tasks:
        raise SuiteError("There are no tasks to draw panels of: name columns of the table.")
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(2.3 * columns, 1.9 * rows + 0.6), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    for ax, task in zip(panels, tasks, strict=False):
        style(ax)
        for name, own in table.groupby("method", sort=False):
            colour, dash, marker = STYLES.get(name, (TEXT, "-", "."))
            own = own.sort_values("layers_removed")
            label = (labels or {}).get(name, str(name).replace("_", " "))
            ax.plot(
                own["layers_removed"],
                own[task],
                linestyle=dash,
                color=colour,
                marker=marker,
                markersize=4,
                label=label,
            )
        if chance and chance.get(task):
            ax.axhline(chance[task], color=LINE, linewidth=0.8, linestyle=":")
        ax.set_title(task.replace("_", " "), color=TEXT, fontsize=9)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for number, ax in enumerate(panels):
        ax.set_visible(number < len(tasks))
        if number % columns == 0:
            ax.set_ylabel("score", fontsize=9)
        if len(tasks) - columns <= number < len(tasks):  # nothing below it
            ax.set_xlabel("layers removed", fontsize=9)
            ax.tick_params(labelbottom=True)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, labelcolor=TEXT, fontsize=8)
    return figure


def branches(tables: dict[str, pd.DataFrame], ax: Axes | None = None, *, value: str = "perplexity") -> Axes:
    """Draw several branches of one run on one figure: quality against layers removed.

    Parameters
    ----------
    tables : dict of str to DataFrame
        For each branch a table as of `ildlab.session.tables.history_table`. Where an iteration was not
        distilled, the value right after its removal stands in.
    value : str
        "perplexity" or "kl".

    Returns
    -------
    Axes
    """
    ax = new_axes(ax, 6.5, 3.4)
    for number, (name, table) in enumerate(tables.items()):
        drawn = table[value].fillna(table[f"{value}_pruned"])
        ax.plot(
            table["n_removed"],
            drawn,
            label=name,
            color=COLOURS[number % len(COLOURS)],
            marker="osD^v"[number % 5],
            linestyle=("-", "--", "-.", ":")[number % 4],
            linewidth=1.8,
        )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layers removed")
    ax.set_ylabel("KL to the teacher (nats/token)" if value == "kl" else label_of(value))
    legend(ax)
    return ax
