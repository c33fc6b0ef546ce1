"""`Explorer`: the read-only half of the stepper, for a model and a text, in the teaching notebooks."""

from __future__ import annotations

from functools import cache
from typing import Any

import ipywidgets as w
from IPython.display import HTML, display

from ildlab import plots
from ildlab.importance.config import ONE_PASS
from ildlab.importance.dispatch import measure
from ildlab.importance.hidden_states import logit_lens, redundancy
from ildlab.importance.scores import LayerScores
from ildlab.model.stack import LayerStack
from ildlab.widgets.figures import lens_tips, pair_tips
from ildlab.widgets.stack_view import FigureView, StackView
from ildlab.widgets.words import error_words, note

VIEWS = ("redundancy", "logit lens")


class Explorer:
    """The stack of a model with its importance, and figures below it; nothing is ever changed.

    Parameters
    ----------
    model : LoadedModel
    text : TextBlocks or Tensor [N, T]
        What to measure on.
    sentence : str
        What the logit lens reads.
    theme : str
        "lecture" for the back of a room.
    """

    def __init__(self, model: Any, text: Any, *, sentence: str = "The capital of France is Paris.", theme: str = ""):
        self.layers = layers = LayerStack(model.model)
        # Each is measured once, however often it is looked at.
        self._scores = cache(lambda metric: measure(layers, text, metric, show=False))
        self._redundancy = cache(lambda: redundancy(layers, text, "cosine", show=False))
        self._lens = cache(lambda sentence: logit_lens(layers, sentence, model.tokenizer, show=False))
        self._theme = theme
        self.stack, self.figure = StackView(lambda: None), FigureView()
        self.metric = w.Dropdown(options=[m for m in ONE_PASS if m not in ("lrp", "taylor")], description="metric")
        self.kind = w.Dropdown(options=VIEWS, description="figure")
        self.sentence = w.Text(value=sentence, description="sentence", layout=w.Layout(width="98%"))
        for control in (self.metric, self.kind, self.sentence):
            control.observe(lambda _: self.refresh(), names="value")
        self.view = w.VBox([self.metric, self.stack, self.kind, self.sentence, self.figure]).add_class(
            "ildlab-stepper"
        )
        self.refresh()

    @property
    def scores(self) -> LayerScores:
        """Scores of the metric chosen."""
        return self._scores(self.metric.value)

    def refresh(self) -> None:
        """Draw what the controls ask for."""
        try:
            self.stack.picture = self.scores.picture().html(self._theme)
            self.stack.selected = [self.scores.least_important]
            axes, alt, tips = self._drawn()
            if self._theme:
                plots.larger(axes)
            self.figure.cells = plots.cells(axes, tips)
            self.figure.html = plots.to_html(axes, alt)
            self.stack.status = f"Layer {self.scores.least_important} is the least important by {self.scores.metric}."
        except Exception as error:  # a widget's callback has no other place to say it; no old figure is taken for it
            self.figure.cells, self.figure.html = {}, note(error_words(error), role="status")

    def _drawn(self) -> tuple[Any, str, list[list[str]]]:
        if self.kind.value == "redundancy":
            matrix = self._redundancy()
            alt = "Cosine between hidden states of every two layers."
            return plots.redundancy_heatmap(matrix, "cosine"), alt, pair_tips(matrix)
        lens = self._lens(self.sentence.value)
        return plots.logit_lens_map(lens), "What each layer's hidden state would predict.", lens_tips(lens)

    def _ipython_display_(self) -> None:
        display(self.view)
        display(HTML(f'<div class="ildlab-static">{self._repr_html_()}</div>'))

    def _repr_html_(self) -> str:
        return self.stack.picture + self.figure.html
