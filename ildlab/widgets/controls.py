"""The stepper's controls and where they stand: nothing happens here."""

from __future__ import annotations

import ipywidgets as w

from ildlab.importance.config import METRICS
from ildlab.session.config import SessionConfig
from ildlab.widgets.strip import Strip

DEFAULTS = "the run's own"
LOSSES = {
    "KL alone": {"kl_weight": 1.0, "hidden_weight": 0.0},
    "hidden states alone": {"kl_weight": 0.0, "hidden_weight": 1.0},
    "both": {"kl_weight": 1.0, "hidden_weight": 1.0},
}


class Controls:
    """All widgets of a stepper, as attributes, and `view`, that holds them.

    Parameters
    ----------
    config : SessionConfig
        Where first values come from.
    strip : Strip
    prompt : str
    """

    def __init__(self, config: SessionConfig, strip: Strip, prompt: str):
        self.status = _note("ildlab-status")
        self.bar = w.FloatProgress(min=0, max=1, layout=w.Layout(width="100%"))
        self.stop = _button("Stop")
        self.pause = _button("Pause")
        self.about = _note()
        self.tabs = w.Tab(
            [
                self._measuring(config),
                self._trying(prompt),
                self._changing(config),
                self._evaluating(config),
                self._going_back(),
            ],
            titles=["Measure", "What if", "Remove and distill", "Evaluate", "History and export"],
        )
        below = self._figures(prompt)
        self.view = w.VBox(
            [self.status, self.bar, w.HBox([self.stop, self.pause]), strip.view, self.about, self.tabs, below]
        )
        self.view.add_class("ildlab-stepper")

    def _measuring(self, config: SessionConfig) -> w.Widget:
        self.metric = w.Dropdown(
            options=[m for m in METRICS if m != "task" or config.suite], value=config.metric, description="metric"
        )
        self.race = w.Checkbox(value=True, description="race (stop early)", indent=False)
        self.measure = _button("Measure")
        self.forecast = _note()
        return w.VBox([w.HBox([self.metric, self.race, self.measure]), self.forecast])

    def _trying(self, prompt: str) -> w.Widget:
        self.prompt = w.Textarea(value=prompt, rows=2, description="prompt", layout=w.Layout(width="98%"))
        self.toggle = _button("Switch the selected layer off or on")
        self.reset = _button("All layers on")
        self.try_it = _button("Compare")
        self.answers = _note()
        return w.VBox([self.prompt, w.HBox([self.toggle, self.try_it, self.reset]), self.answers])

    def _changing(self, config: SessionConfig) -> w.Widget:
        self.suggest = _button("Select the suggestion")
        self.remove = _button("Remove the selected layer")
        self.source = w.Text(value=config.text, description="text")
        self.tokens = w.IntText(value=config.train_tokens, description="tokens")
        self.preset = w.Dropdown(options=[DEFAULTS, "the paper's"], description="settings")
        self.loss = w.Dropdown(options=["as set", *LOSSES], description="loss")
        self.scope = w.Dropdown(options=["as set", "neighbours", "window(2)", "suffix", "all"], description="scope")
        self.use_rate = w.Checkbox(value=False, description="use this learning rate", indent=False)
        self.rate = w.FloatLogSlider(
            value=3e-4, min=-5, max=-2, step=0.25, description="learning rate", style={"description_width": "initial"}
        )
        self.distill = _button("Distill")
        self.heal = _button("Heal in closed form")
        return w.VBox(
            [
                w.HBox([self.suggest, self.remove]),
                w.HBox([self.source, self.tokens]),
                w.HBox([self.preset, self.loss, self.scope]),
                w.HBox([self.use_rate, self.rate]),
                w.HBox([self.distill, self.heal]),
            ]
        )

    def _evaluating(self, config: SessionConfig) -> w.Widget:
        self.suite = w.Text(value=config.suite or "", description="suite", placeholder="mini7@20")
        self.evaluate = _button("Evaluate")
        self.results = _note()
        return w.VBox([w.HBox([self.suite, self.evaluate]), self.results])

    def _going_back(self) -> w.Widget:
        self.steps = w.Dropdown(description="step", layout=w.Layout(flex="1 1 auto"))
        self.undo = _button("Undo")
        self.go_back = _button("Go to this step")
        self.folder = w.Text(value="", description="folder", placeholder="runs/branch or runs/out")
        self.branch = _button("Branch into the folder")
        self.export = _button("Export to the folder")
        self.history = _note()
        return w.VBox(
            [
                w.HBox([self.undo, self.steps, self.go_back]),
                w.HBox([self.folder, self.branch, self.export]),
                self.history,
            ]
        )

    def _figures(self, prompt: str) -> w.Widget:
        from ildlab.widgets.figures import FIGURES

        self.figure_kind = w.Dropdown(options=list(FIGURES), description="figure")
        self.text = w.Textarea(value=prompt, rows=2, description="text", layout=w.Layout(width="98%"))
        self.draw = _button("Draw")
        self.save_as = w.Dropdown(options=["PNG", "SVG", "CSV"], description="save as", layout=w.Layout(width="180px"))
        self.save = _button("Save")
        self.figure = w.HTML()
        self.code = _note()
        return w.VBox(
            [self.figure_kind, self.figure, self.text, w.HBox([self.draw, self.save_as, self.save]), self.code]
        )


def _button(label: str) -> w.Button:
    button = w.Button(description=label, layout=w.Layout(width="auto", flex="0 0 auto"))
    button.add_class("ildlab-" + label.lower().split()[0])
    return button


def _note(name: str = "ildlab-note") -> w.HTML:
    note = w.HTML()
    note.add_class(name)
    return note
