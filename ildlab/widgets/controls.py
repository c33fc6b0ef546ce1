"""The stepper's controls and where they stand, at first at the run's own settings: nothing happens here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ipywidgets as w

from ildlab.distill.config import DistillConfig
from ildlab.importance.config import METRICS
from ildlab.session.config import SessionConfig
from ildlab.widgets.figures import FIGURES
from ildlab.widgets.stack_view import FigureView, StackView

LOSSES = {
    "as set": {},
    "KL alone": {"kl_weight": 1.0, "hidden_weight": 0.0},
    "hidden states alone": {"kl_weight": 0.0, "hidden_weight": 1.0},
    "both": {"kl_weight": 1.0, "hidden_weight": 1.0},
}
SCOPES = ("neighbours", "window(2)", "suffix", "all")
PROMPT = "The most important invention in history is"  # of the what-if, and of figures that read a text
WHOLE = {"layout": {"width": "98%"}, "style": {"description_width": "initial"}}  # no label is cut
ALL_KINDS = "all kinds"
PANES = ("Measure", "What if", "Remove", "Distill", "Evaluate", "History and export")


class Controls:
    """All widgets of a stepper, as attributes, and `view`, that holds them; `config` has the run's settings."""

    def __init__(self, config: SessionConfig, stack: StackView, layers: int):
        self.header, self.about = _html(), _html()
        self.proceed, self.undo, self.discard = _button("Measure", "primary"), _button("Undo"), _button("Discard it")
        self.run, self.stop, self.pause = _button("Run to"), _button("Stop", "warning"), _button("Pause")
        self.goal = w.BoundedIntText(
            max(1, layers - 2), 1, max(1, layers - 1), layout=w.Layout(width="64px"), tooltip="layers to run to"
        ).add_class("ildlab-goal")
        panes = (
            self._measuring(config),
            self._trying(),
            self._removing(),
            self._distilling(config),
            self._evaluating(config),
            self._going_back(),
        )
        self.panes = w.Accordion(
            panes, titles=PANES, selected_index=0, layout=w.Layout(flex="1 1 340px", min_width="0")
        )
        left = _rows(stack, self.about, self._figures())
        left.layout.flex, left.layout.min_width = "3 1 560px", "0"
        page = w.HBox([left, self.panes], layout=w.Layout(flex_flow="row wrap"))
        acts = [self.proceed, self.discard, self.run, self.goal, self.stop, self.pause, self.undo]
        self.view = _rows(self.header, acts, page).add_class("ildlab-stepper")

    def _measuring(self, config: SessionConfig) -> w.Widget:
        metrics = [m for m in METRICS if m != "task" or config.suite]
        self.metric = w.Dropdown(options=metrics, value=config.metric, description="metric", **WHOLE)
        race = bool(config.measure.get("race"))
        self.race = w.Checkbox(value=race, description="race: stop scoring layers that cannot win", indent=False)
        self.measure, self.forecast = _button("Measure"), _html()
        return _rows(self.metric, self.race, [self.measure], self.forecast)

    def _trying(self) -> w.Widget:
        self.prompt = w.Textarea(value=PROMPT, rows=2, description="prompt", **WHOLE)
        self.toggle, self.reset = _button("Selected layers off / on"), _button("All layers on")
        self.sampled = w.Checkbox(description="draw a sample, the same luck for both", indent=False)
        self.what_if, self.answers = _button("Compare"), _html()
        return _rows(self.prompt, self.sampled, [self.toggle, self.what_if, self.reset], self.answers)

    def _removing(self) -> w.Widget:
        self.suggest, self.remove = _button("Select the suggestion"), _button("Remove")
        return _rows([self.suggest, self.remove])

    def _distilling(self, config: SessionConfig) -> w.Widget:
        own = DistillConfig.from_dict(config.distill)
        self.own = own = replace(own, tokens=own.tokens or config.train_tokens)
        presets = [("the run's own", None), ("the paper's", DistillConfig.paper())]
        self.preset = w.ToggleButtons(options=presets, description="settings", style={"button_width": "auto"})
        self.source = w.Text(value=config.text_of("train"), description="text", **WHOLE)
        self.tokens = w.IntText(value=own.tokens, description="tokens", **WHOLE)
        self.loss = w.Dropdown(options=list(LOSSES.items()), description="loss", **WHOLE)
        scopes = [("as set", {}), *((scope, {"scope": scope}) for scope in SCOPES)]
        self.scope = w.Dropdown(options=scopes, description="scope", **WHOLE)
        self.rate = w.FloatText(value=own.learning_rate, description="learning rate", **WHOLE)
        self.distill = _button("Distill")
        return _rows(self.preset, self.source, self.tokens, self.loss, self.scope, self.rate, [self.distill])

    def _evaluating(self, config: SessionConfig) -> w.Widget:
        self.suite = w.Text(value=config.suite or "", description="suite", placeholder="none: text alone", **WHOLE)
        self.evaluate, self.results = _button("Evaluate"), _html()
        return _rows(self.suite, [self.evaluate], self.results)

    def _going_back(self) -> w.Widget:
        self.steps = w.Select(rows=8, layout=w.Layout(width="98%")).add_class("ildlab-steps")
        self.beside = w.Dropdown(description="compare with step", **WHOLE)
        self.go_back, self.compared, self.history = _button("Go to this step"), _html(), _html()
        self.branch_to, self.export_to = (w.Text(description=name, **WHOLE) for name in ("new run", "checkpoint"))
        self.branch, self.export = _button("Branch"), _button("Export")
        back = (self.steps, [self.go_back], self.beside, self.compared)
        return _rows(*back, self.export_to, [self.export], self.branch_to, [self.branch], self.history)

    def _figures(self) -> w.Widget:
        self.figure_kind = w.Dropdown(options=list(FIGURES), description="figure", **WHOLE)
        self.kind_of_text = w.Dropdown(options=[ALL_KINDS], description="kind of text", **WHOLE)
        self.text = w.Textarea(value=PROMPT, rows=2, description="text", **WHOLE)
        self.draw, self.save = _button("Draw"), _button("Save")
        self.save_as = w.Dropdown(options=["PNG", "SVG", "CSV"], layout=w.Layout(width="80px"), tooltip="save as")
        self.figure, self.code = FigureView(), _html()
        out = [self.draw, self.save, self.save_as]
        return _rows(self.kind_of_text, self.figure_kind, self.text, out, self.figure, self.code)


def _rows(*rows: Any) -> w.VBox:
    """Widgets below one another; those of a list side by side, on more lines where they do not fit."""
    wrap = w.Layout(flex_flow="row wrap")
    return w.VBox([w.HBox(row, layout=wrap) if isinstance(row, list) else row for row in rows])


def _button(label: str, style: str = "") -> w.Button:
    return w.Button(description=label, button_style=style, layout=w.Layout(width="auto", flex="0 0 auto"))


def _html() -> w.HTML:
    return w.HTML().add_class("ildlab-note")
