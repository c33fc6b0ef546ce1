"""Which kind of text the strip and the figure of importance show, where the scores at hand are of several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as w

from ildlab.widgets.words import score_words

ALL = "all kinds"


class KindOfText:
    """A dropdown, `view`, of the kinds of text that scores have; hidden where they have none."""

    def __init__(self):
        self.view = w.Dropdown(options=[ALL], description="kind of text", style={"description_width": "initial"})
        self.view.layout.display = "none"
        self._offering = False

    @property
    def chosen(self) -> str | None:
        """The kind that is chosen; None for all of them."""
        return None if self.view.value == ALL else self.view.value

    def on_choose(self, callback: Callable[[], Any]) -> None:
        """Call back where a person chooses."""
        self.view.observe(lambda _: self._offering or callback(), names="value")

    def offer(self, scores: Any) -> None:
        """Offer the kinds of these `LayerScores` (or of None); what is chosen stays where they have it."""
        kinds = dict.fromkeys(scores.kinds) if scores else ()
        self.view.layout.display = None if kinds else "none"
        options = (ALL, *kinds)
        if options == self.view.options:
            return
        kept = self.view.value
        self._offering = True  # new options select the first of them: nobody chose that
        self.view.options = options
        self.view.value = kept if kept in options else ALL
        self._offering = False

    def of(self, scores: Any) -> Any:
        """The scores on the kind chosen; these scores themselves where that is all of them, or none of theirs."""
        return scores.of_kind(self.chosen) if scores and self.chosen in scores.kinds else scores

    def words(self, scores: Any, layer_id: int) -> str:
        """What the kind chosen alone says of a layer, as a sentence to add; empty where it says nothing."""
        alone = self.of(scores)
        if alone is scores or layer_id not in alone.table.index:
            return ""
        return f" On {self.chosen} alone: {score_words(alone, layer_id)}."
