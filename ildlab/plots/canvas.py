"""What every figure shares: a canvas without pyplot, colours, marks, labels, and the way out (PNG, SVG, HTML).

A figure is a function of data and of an optional `ax`, its own by default; it returns the Axes that it drew on, and
tells nothing by colour alone: marks, hatches, dashes and numbers say it too. In a notebook, end a cell with
`show(ax, alt)`.

Figures have a transparent background and grey text, so that the same picture reads on a light and on
a dark page. A single grey reaches 4.5:1 (WCAG AA) on white or on JupyterLab's dark `#111`, never on
both: `to_html` therefore brightens the picture a little where JupyterLab says that its theme is dark.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text

from ildlab.errors import PlotError
from ildlab.files import writing

TEXT = "#707070"  # 4.95:1 on white; brightened, 6.9:1 on #111
LINE = "#858585"  # spines and ticks: 3:1 on both
DARK_BRIGHTNESS = 1.4
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#B5629A"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE)  # Okabe-Ito; its yellow, orange and sky blue fade on white
DASHES = ("-", "--", ":", "-.")
ABOVE = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}  # where a legend hides nothing
MAP = "cividis"  # even in lightness, the same to colour-blind eyes
DPI = 100  # CSS pixels of an inch of figure; PNGs have twice as many


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of its own canvas (no pyplot); sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes(ax: Axes | None, width: float = 8.0, height: float = 3.2) -> Axes:
    """Return `ax`, or the one Axes of a new figure of so many inches, styled for both themes."""
    return style(new_figure(width, height).add_subplot() if ax is None else ax)


def need(table: pd.DataFrame, source: str, *columns: str) -> None:
    """Raise PlotError where a table lacks columns that a figure is drawn from."""
    if lacking := [name for name in columns if name not in table]:
        raise PlotError(f"The table has no {', '.join(map(repr, lacking))}: give {source}.")


def style(ax: Axes) -> Axes:
    """Make one Axes transparent, with grey spines, ticks and text."""
    ax.figure.patch.set_alpha(0)
    ax.patch.set_alpha(0)
    for side, spine in ax.spines.items():
        spine.set_color(LINE)
        spine.set_visible(side in ("left", "bottom"))
    ax.tick_params(which="both", color=LINE, labelcolor=TEXT, labelsize=9)
    for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
        text.set_color(TEXT)
        text.set_fontsize(10)
    return ax


def legend(ax: Axes, **kwargs: Any) -> None:
    """Add a legend with grey text on no background, if anything in `ax` has a label."""
    handles = kwargs.pop("handles", None) or ax.get_legend_handles_labels()[0]
    if handles:
        ax.legend(handles=handles, frameon=False, labelcolor=TEXT, fontsize=9, **kwargs)


def note(
    ax: Axes, text: str, xy: tuple[float, float], offset: tuple[float, float], size: float = 8, **look: Any
) -> None:
    """Write grey text beside a point; `offset` in points (1/72 inch)."""
    ax.annotate(text, xy, offset, textcoords="offset points", color=TEXT, fontsize=size, **look)


def hatch(ax: Axes, x: float, y: float | None = None, marks: str = "xxx", alpha: float | None = 0.45) -> None:
    """Hatch the column at `x`, or the cell of a heatmap at (`x`, `y`)."""
    if y is None:
        box = Rectangle((x - 0.4, 0), 0.8, 1, transform=ax.get_xaxis_transform())
    else:
        box = Rectangle((x - 0.5, y - 0.5), 1, 1)
    box.set(fill=False, hatch=marks, edgecolor=LINE, linewidth=0, alpha=alpha)
    ax.add_patch(box)


def removed_key() -> Patch:
    """What a legend shows for a hatched column."""
    return Patch(fill=False, edgecolor=LINE, hatch="xxx", linewidth=0, label="removed")


def second_axis(ax: Axes, label: str) -> Axes:
    """An axis on the right of `ax`, drawn below it: what the figure is about stays on top."""
    second = style(ax.twinx())
    second.spines["right"].set_visible(True)
    second.set_ylabel(label)
    ax.set_zorder(second.get_zorder() + 1)
    ax.patch.set_visible(False)
    return second


def heatmap(ax: Axes, values: np.ndarray, label: str, norm: Normalize | None = None, **look: Any) -> AxesImage:
    """Draw `values` [rows, columns], the first row lowest, with a colour bar labelled `label`; NaN stays empty."""
    look = {"origin": "lower", "aspect": "auto", **look}
    image = ax.imshow(values, cmap=MAP, norm=norm or norm_of(values), interpolation="nearest", **look)
    for spine in ax.spines.values():
        spine.set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.01, fraction=0.05)
    bar.set_label(label, color=TEXT, fontsize=9)
    bar.outline.set_edgecolor(LINE)
    bar.ax.tick_params(which="both", color=LINE, labelcolor=TEXT, labelsize=8)
    return image


def ink_of(image: AxesImage, value: float) -> str:
    """Black or white, whichever reads better in a cell of that value; black in one that has none."""
    return ink_on(image.cmap(image.norm(value)) if np.isfinite(value) else "white")


def in_cell(image: AxesImage, x: float, y: float, value: float, text: str, size: float = 7, **look: Any) -> None:
    """Write plain text into a cell of a heatmap, in the ink that reads on its colour."""
    look = {"ha": "center", "va": "center", "fontsize": size, "color": ink_of(image, value), **look}
    image.axes.text(x, y, text, parse_math=False, clip_on=True, **look)


def spread_out(values: np.ndarray) -> bool:
    """Whether one of these values dwarfs the rest and all are positive: a logarithmic scale then shows more."""
    return bool(values.min() > 0 and values.max() > 8 * np.median(values))


def norm_of(values: np.ndarray, decades: float = np.inf) -> Normalize:
    """Pick a logarithmic colour scale, of so many decades at most, where all values are positive and span more than one."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    low = max(low, high / 10**decades) if low > 0 else low
    if low > 0 and high / low > 10:
        return LogNorm(low, high)
    return Normalize(low, high if high > low else low + 1e-12)


@lru_cache(maxsize=1)
def _drawable() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def token_label(token: str, limit: int = 14) -> str:
    """Make one token readable as an axis label, on one line.

    A leading space shows as `␣`, a line break as `⏎`, and a character that the font lacks as its code
    point. Nothing is interpreted: give the label to text with `parse_math=False`.
    """
    marks = {" ": "␣", "\n": "⏎", "\r": "⏎", "\t": "⇥", "Ġ": "␣", "▁": "␣", "Ċ": "⏎"}
    out = []
    for char in token[: limit + 1]:
        char = marks.get(char, char)
        out.append(char if ord(char) in _drawable() and char.isprintable() else f"U+{ord(char):04X}")
    return "".join(out[:limit]) + ("…" if len(out) > limit else "")


def token_ticks(axis: Any, tokens: Iterable[str], rotation: float = 90) -> None:
    """Label positions 0, 1, ... of an axis with tokens, as plain text (no mathtext)."""
    labels = [token_label(t) for t in tokens]
    axis.set_ticks(range(len(labels)), labels, rotation=rotation, fontsize=8)
    for text in axis.get_ticklabels():
        text.set_parse_math(False)


def contrast(first: Any, second: Any) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2, relative luminance)."""

    def luminance(colour: Any) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def ink_on(colour: Any) -> str:
    """Black or white, whichever reads better on `colour`."""
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, colour))


# ------------------------------------------------------------------ the way out


def _figure(figure: Figure | Axes) -> Figure:
    return figure.figure if isinstance(figure, Axes) else figure


def to_png(figure: Figure | Axes, scale: float = 2.0) -> bytes:
    """Draw a figure (or the figure of an Axes) as a transparent PNG of `scale` pixels to one CSS pixel."""
    out = io.BytesIO()
    _figure(figure).savefig(out, format="png", dpi=DPI * scale, transparent=True)
    return out.getvalue()


def save(figure: Figure | Axes, path: str | Path) -> Path:
    """Write a figure as .png (at twice the size on screen), .svg or what else matplotlib can; returns the path."""
    try:
        with writing(path):
            _figure(figure).savefig(path, dpi=2 * DPI, transparent=True)
    except ValueError as error:
        raise PlotError(f"{path}: {error}") from error
    return Path(path)


def cells(ax: Axes, tips: list[list[str]]) -> dict[str, Any]:
    """Where a heatmap lies in its picture, for who points at it: `box` in parts (left, top, right, bottom), and `tips`.

    `tips` [rows][columns] say what is in each cell, as the axes count; they come back from the top down.
    """
    figure = _figure(ax)
    figure.draw_without_rendering()
    box = ax.get_window_extent().transformed(figure.transFigure.inverted())
    down = ax.get_ylim()[0] > ax.get_ylim()[1]
    return {"box": [box.x0, 1 - box.y1, box.x1, 1 - box.y0], "tips": tips if down else tips[::-1]}


def larger(figure: Figure | Axes, by: float = 1.45) -> None:
    """Make letters, lines and marks larger, and the figure with them a little, to be read from the back of a room."""
    figure = _figure(figure)
    for text in figure.findobj(Text):
        text.set_fontsize(text.get_fontsize() * by)
    for line in figure.findobj(Line2D):
        line.set_linewidth(line.get_linewidth() * by)
        line.set_markersize(line.get_markersize() * by)
    for ax in figure.axes:
        ax.tick_params(labelsize=9 * by)
    figure.set_size_inches(*(side * 1.2 for side in figure.get_size_inches()))


def to_html(figure: Figure | Axes, alt: str, scale: float = 2.0) -> str:
    """Draw a figure as an `<img>` with the PNG (see `to_png`) inside it.

    `alt` says what the picture shows to those who do not see it, as plain text.
    """
    figure = _figure(figure)
    data = base64.b64encode(to_png(figure, scale)).decode("ascii")
    width = round(figure.get_figwidth() * DPI)
    return (
        f'<style>[data-jp-theme-light="false"] .ildlab-figure{{filter:brightness({DARK_BRIGHTNESS})}}</style>'
        f'<img class="ildlab-figure" alt="{html.escape(alt, quote=True)}" width="{width}" '
        f'style="max-width:100%;height:auto" src="data:image/png;base64,{data}">'
    )


@dataclass(frozen=True)
class Shown:
    """A figure as a notebook shows it: a picture with a text alternative, on dark and light themes."""

    figure: Figure | Axes
    alt: str

    def _repr_html_(self) -> str:
        return to_html(self.figure, self.alt)

    def __repr__(self) -> str:
        return f"[figure: {self.alt}]"


def show(figure: Figure | Axes, alt: str, theme: str = "") -> Shown:
    """Let a notebook cell end in a figure; `alt` as in `to_html`, `theme="lecture"` for the back of a room."""
    if theme == "lecture":
        larger(figure)
    return Shown(figure, alt)
