"""`Explorer`: the read-only half of the stepper, for a model and a text, in the teaching notebooks."""

from __future__ import annotations

from functools import cache
from typing import Any

import ipywidgets as w
from IPython.display import HTML, display
from matplotlib.axes import Axes

from ildlab import plots
from ildlab.importance.config import ONE_PASS
from ildlab.importance.dispatch import measure
from ildlab.importance.hidden_states import logit_lens, redundancy
from ildlab.importance.scores import LayerScores
from ildlab.model.stack import LayerStack
from ildlab.widgets.strip import Strip
from ildlab.widgets.words import error_words, note, score_words

VIEWS = ("importance", "redundancy", "logit lens")


class Explorer:
    """A strip of layers and its figures; nothing is ever changed.

    Parameters
    ----------
    model : LoadedModel
    text : TextBlocks or Tensor [N, T]
        What to measure on.
    sentence : str
        What the logit lens reads.
    """

    def __init__(self, model: Any, text: Any, *, sentence: str = "The capital of France is Paris."):
        self.stack = stack = LayerStack(model.model)
        # Each is measured once, however often it is looked at.
        self._scores = cache(lambda metric: measure(stack, text, metric, show=False))
        self._redundancy = cache(lambda: redundancy(stack, text, "cosine", show=False))
        self._lens = cache(lambda sentence: logit_lens(stack, sentence, model.tokenizer))
        self.status, self.about, self.figure = w.HTML(), w.HTML(), w.HTML()
        self.metric = w.Dropdown(options=[m for m in ONE_PASS if m not in ("lrp", "taylor")], description="metric")
        self.kind = w.Dropdown(options=VIEWS, description="figure")
        self.sentence = w.Text(value=sentence, description="sentence", layout=w.Layout(width="98%"))
        self.strip = Strip(self.stack.layer_ids, lambda _: self._describe())
        for control in (self.metric, self.kind, self.sentence):
            control.observe(lambda _: self.refresh(), names="value")
        controls = w.HBox([self.metric, self.kind])
        self.view = w.VBox([controls, self.sentence, self.strip.view, self.about, self.figure, self.status])
        self.refresh()

    @property
    def scores(self) -> LayerScores:
        """Scores of the metric chosen."""
        return self._scores(self.metric.value)

    def refresh(self) -> None:
        """Draw what the controls ask for."""
        try:
            scores = self.scores
            self.strip.show(scores, here=self.stack.layer_ids, suggested=scores.least_important)
            self.figure.value = plots.to_html(*self._drawn())
            self.status.value = ""
            self._describe()
        except Exception as error:  # a widget's callback has no other place to say it
            self.status.value = note(error_words(error), role="status")

    def _drawn(self) -> tuple[Axes, str]:
        if self.kind.value == "importance":
            return plots.importance(self.scores), f"{self.scores.metric} of each layer."
        if self.kind.value == "redundancy":
            alt = "Cosine between hidden states of every two layers."
            return plots.redundancy_heatmap(self._redundancy(), "cosine"), alt
        return plots.logit_lens_map(self._lens(self.sentence.value)), "What each layer's hidden state would predict."

    def _describe(self) -> None:
        layer_id, scores = self.strip.selected, self.scores
        rank = f"number {scores.ranking.index(layer_id) + 1} of {len(scores.table)} from the least important"
        self.about.value = note(f"Layer {layer_id}: {score_words(scores, layer_id)}, {rank}.")

    def _ipython_display_(self) -> None:
        display(self.view)
        display(HTML(f"<details><summary>as it stands</summary>{self._repr_html_()}</details>"))

    def _repr_html_(self) -> str:
        return self.figure.value
