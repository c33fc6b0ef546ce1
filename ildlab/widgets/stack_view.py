"""The live stack and live figures: Python owns what is shown, JavaScript only points, selects and takes keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
from traitlets import Dict, Float, Int, List, Unicode

HERE = Path(__file__).parent


class StackView(anywidget.AnyWidget):
    """The picture of a stack, with what is selected on it, and the line that says what goes on.

    `on_select()` is called when the selection changes, `on_ask(message)` for keys, {"action": name of a button}, and for
    clicks on an iteration, {"step": number}.
    """

    _esm = HERE / "stack_view.js"
    _css = HERE / "stack_view.css"
    picture = Unicode().tag(sync=True)  # HTML, as `ildlab.drawing` writes it
    selected = List(Int()).tag(sync=True)  # layer ids
    status = Unicode().tag(sync=True)
    done = Float(-1.0).tag(sync=True)  # share of the work in hand; below 0 where there is none
    left = Float(-1.0).tag(
        sync=True
    )  # seconds that it may still take, counted down between updates; below 0: not known

    def __init__(self, on_select: Callable[[], Any], on_ask: Callable[[dict], Any] = lambda _: None):
        super().__init__()
        self.observe(lambda _: on_select(), names="selected")
        self.on_msg(lambda _, message, buffers: on_ask(message))


class FigureView(anywidget.AnyWidget):
    """A figure; `cells` (as `ildlab.plots.cells` finds them) are told to who points at them."""

    _esm = HERE / "figure_view.js"
    _css = HERE / "stack_view.css"
    html = Unicode().tag(sync=True)
    cells = Dict().tag(sync=True)  # "box": its place in the picture, in parts; "tips": words, row by row
