"""The strip of layers: one cell a layer id, in order, with value, sign and hatch, never colour alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as w
from matplotlib import colormaps
from matplotlib.colors import to_hex

from ildlab.plots.canvas import MAP, ink_on
from ildlab.widgets.words import score_words

NOTHING = "#e8e8e8"  # the colour of a cell that has no score

CSS = """<style>
.ildlab-strip{flex-flow:row wrap}
.ildlab-strip .widget-button{width:58px;height:44px;margin:1px;padding:0;line-height:1.15;white-space:pre;
 border:2px solid transparent;font-size:12px}
.ildlab-strip .ildlab-selected{border-color:var(--jp-ui-font-color0,#000);outline:2px solid var(--jp-layout-color0,#fff)}
.ildlab-strip .ildlab-removed{border-style:dashed;border-color:#767676;background-image:repeating-linear-gradient(
 45deg,transparent 0 5px,rgba(118,118,118,.35) 5px 7px)}
.ildlab-strip .ildlab-off{text-decoration:line-through;border-style:dotted;border-color:#767676}
.ildlab-strip .widget-button:focus-visible{outline:3px solid var(--jp-brand-color1,#1976d2)}
.ildlab-status{font-weight:bold}
.ildlab-note{color:var(--jp-ui-font-color1,#333)}
.ildlab-note table{border-collapse:collapse}.ildlab-note td,.ildlab-note th{padding:1px 8px;text-align:right}
</style>"""


def shade(value: float | None, low: float, high: float) -> str:
    """Colour of a score, least to most; grey where there is none."""
    if value is None:
        return NOTHING
    return to_hex(colormaps[MAP]((value - low) / (high - low) if high > low else 0.5))


class Strip:
    """Buttons for all layer ids of the teacher; a click selects, the slider moves by arrow keys.

    `on_select(layer id)` is called for what is selected, `on_toggle()` for a click, or Enter, on the cell that a person
    selected before.
    """

    def __init__(
        self, layer_ids: list[int], on_select: Callable[[int], Any], on_toggle: Callable[[], Any] | None = None
    ):
        # The slider has to stand somewhere: until a person chooses, a click on that cell only selects it.
        self.chosen = False
        self._on_select, self._on_toggle = on_select, on_toggle
        self.cells = {}
        for layer_id in layer_ids:
            self.cells[layer_id] = w.Button().add_class(f"ildlab-cell-{layer_id}")
            self.cells[layer_id].on_click(lambda _, i=layer_id: self._clicked(i))
        self.slider = w.SelectionSlider(options=layer_ids, description="layer", layout=w.Layout(width="420px"))
        self.slider.add_class("ildlab-layer").observe(lambda change: self._selected(change["new"]), names="value")
        row = w.HBox(list(self.cells.values())).add_class("ildlab-strip")
        self.view = w.VBox([w.HTML(CSS), row, self.slider])
        _mark(self.cells[self.selected], "selected", True)

    @property
    def selected(self) -> int:
        """The layer id that is selected."""
        return self.slider.value

    def select(self, layer_id: int) -> None:
        """Select a layer, as a person does."""
        self.slider.value = layer_id

    def suggest(self, layer_id: int) -> None:
        """Select a layer until a person chooses; a first click on it then only chooses it."""
        self.slider.value = layer_id
        self.chosen = False

    def _clicked(self, layer_id: int) -> None:
        if layer_id == self.selected and self.chosen and self._on_toggle is not None:
            self._on_toggle()
        self.chosen = True
        self.select(layer_id)

    def _selected(self, layer_id: int) -> None:
        self.chosen = True
        for i, cell in self.cells.items():
            _mark(cell, "selected", i == layer_id)
        self._on_select(layer_id)

    def show(self, scores=None, *, here=(), off=(), trained=(), suggested: int | None = None) -> None:
        """Draw the present state, with the `LayerScores` that are known.

        The arguments are layer ids: `here` those of the student (the others are hatched, "×"), `off` switched off in
        the what-if (struck out), `trained` no longer the teacher's ("*"), `suggested` to be removed ("▼").
        """
        table = None if scores is None else scores.table
        low, high = (0, 1) if table is None else (float(table["score"].min()), float(table["score"].quantile(0.9)))
        for layer_id, cell in self.cells.items():
            gone = layer_id not in here
            known = not gone and table is not None and layer_id in table.index
            value = float(table.at[layer_id, "score"]) if known else None
            sign = "×" if gone else "▼" if layer_id == suggested else "*" if layer_id in trained else ""
            cell.description = f"{layer_id}{sign}\n" + (f"{value:.3g}" if known else "")
            colour = shade(min(value, high) if known else None, low, high)
            cell.style.button_color, cell.style.text_color = colour, ink_on(colour)
            words = [f"layer {layer_id}"] + ["removed"] * gone + ([score_words(scores, layer_id)] if known else [])
            words += ["trained"] * (layer_id in trained) + ["switched off"] * (layer_id in off)
            words += ["least important"] * (layer_id == suggested)
            cell.tooltip = ", ".join(words)
            _mark(cell, "removed", gone)
            _mark(cell, "off", layer_id in off)


def _mark(cell: w.Button, name: str, on: bool) -> None:
    (cell.add_class if on else cell.remove_class)(f"ildlab-{name}")
