"""The stepper's controls and where they stand, at first at the run's own settings: nothing happens here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ipywidgets as w

from ildlab.distill.config import DistillConfig
from ildlab.importance.config import METRICS
from ildlab.session.config import SessionConfig
from ildlab.widgets.figures import FIGURES
from ildlab.widgets.kinds import KindOfText
from ildlab.widgets.strip import Strip

LOSSES = {
    "as set": {},
    "KL alone": {"kl_weight": 1.0, "hidden_weight": 0.0},
    "hidden states alone": {"kl_weight": 0.0, "hidden_weight": 1.0},
    "both": {"kl_weight": 1.0, "hidden_weight": 1.0},
}
SCOPES = ("neighbours", "window(2)", "suffix", "all")
PROMPT = "The most important invention in history is"  # of the what-if, and of figures that read a text
WIDE = w.Layout(width="98%")


class Controls:
    """All widgets of a stepper, as attributes, and `view`, that holds them; `config` has the run's settings."""

    def __init__(self, config: SessionConfig, strip: Strip):
        self.status, self.about = _html("ildlab-status"), _html()
        self.bar = w.FloatProgress(min=0, max=1, layout=w.Layout(width="100%"))
        self.stop, self.pause = _button("Stop"), _button("Pause")
        tabs = {
            "Measure": self._measuring(config),
            "What if": self._trying(),
            "Remove and distill": self._changing(config),
            "Evaluate": self._evaluating(config),
            "History and export": self._going_back(),
        }
        self.tabs = w.Tab(list(tabs.values()), titles=list(tabs))
        top = [self.status, self.bar, [self.stop, self.pause], strip.view, self.about]
        self.view = _rows(*top, self.tabs, self._figures())
        self.view.add_class("ildlab-stepper")

    def _measuring(self, config: SessionConfig) -> w.Widget:
        metrics = [m for m in METRICS if m != "task" or config.suite]
        self.metric = w.Dropdown(options=metrics, value=config.metric, description="metric")
        race = bool(config.measure.get("race"))
        self.race = w.Checkbox(value=race, description="race (stop early)", indent=False)
        self.measure, self.forecast = _button("Measure"), _html()
        return _rows([self.metric, self.race, self.measure], self.forecast)

    def _trying(self) -> w.Widget:
        self.prompt = w.Textarea(value=PROMPT, rows=2, description="prompt", layout=WIDE)
        self.toggle, self.reset = _button("Switch the selected layer off or on"), _button("All layers on")
        self.what_if, self.answers = _button("Compare"), _html()
        return _rows(self.prompt, [self.toggle, self.what_if, self.reset], self.answers)

    def _changing(self, config: SessionConfig) -> w.Widget:
        own = DistillConfig.from_dict(config.distill)
        self.own = own = replace(own, tokens=own.tokens or config.train_tokens)
        self.suggest, self.remove = _button("Select the suggestion"), _button("Remove the selected layer")
        self.source = w.Text(value=config.text, description="text")
        self.tokens = w.IntText(value=own.tokens, description="tokens")
        presets = {"the run's own": None, "the paper's": DistillConfig.paper()}
        self.preset = w.Dropdown(options=list(presets.items()), description="settings")
        self.loss = w.Dropdown(options=list(LOSSES.items()), description="loss")
        scopes = [("as set", {}), *((scope, {"scope": scope}) for scope in SCOPES)]
        self.scope = w.Dropdown(options=scopes, description="scope")
        self.rate = w.FloatText(
            value=own.learning_rate, description="learning rate", style={"description_width": "initial"}
        )
        self.distill = _button("Distill")
        text, how = [self.source, self.tokens], [self.preset, self.loss, self.scope]
        return _rows([self.suggest, self.remove], text, how, self.rate, self.distill)

    def _evaluating(self, config: SessionConfig) -> w.Widget:
        self.suite = w.Text(value=config.suite or "", description="suite", placeholder="none")
        self.evaluate, self.results = _button("Evaluate"), _html()
        return _rows([self.suite, self.evaluate], self.results)

    def _going_back(self) -> w.Widget:
        self.steps = w.Dropdown(description="step", layout=w.Layout(flex="1 1 auto"))
        self.undo, self.go_back = _button("Undo"), _button("Go to this step")
        self.folder = w.Text(value="", description="folder", placeholder="runs/branch or runs/out")
        self.branch, self.export = _button("Branch into the folder"), _button("Export to the folder")
        self.history = _html()
        return _rows([self.undo, self.steps, self.go_back], [self.folder, self.branch, self.export], self.history)

    def _figures(self) -> w.Widget:
        self.figure_kind = w.Dropdown(options=list(FIGURES), description="figure")
        self.kind_of_text = KindOfText()
        self.text = w.Textarea(value=PROMPT, rows=2, description="text", layout=WIDE)
        self.draw, self.save = _button("Draw"), _button("Save")
        self.save_as = w.Dropdown(options=["PNG", "SVG", "CSV"], description="save as", layout=w.Layout(width="180px"))
        self.figure, self.code = w.HTML(), _html()
        which, out = [self.figure_kind, self.kind_of_text.view], [self.draw, self.save_as, self.save]
        return _rows(which, self.figure, self.text, out, self.code)


def _rows(*rows: Any) -> w.VBox:
    """Widgets below one another; those of a list side by side."""
    return w.VBox([w.HBox(row) if isinstance(row, list) else row for row in rows])


def _button(label: str) -> w.Button:
    return w.Button(description=label, layout=w.Layout(width="auto", flex="0 0 auto"))


def _html(name: str = "ildlab-note") -> w.HTML:
    return w.HTML().add_class(name)
