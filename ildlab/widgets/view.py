"""What the stepper shows of a session, drawn anew after each step: nothing here acts on it."""

from __future__ import annotations

import html
from dataclasses import replace
from functools import partial
from typing import Any

from IPython.display import HTML, display

from ildlab.drawing.columns import score_words
from ildlab.importance.config import options_of
from ildlab.session.forecast import forecast, iteration, tokens_of
from ildlab.session.loop import next_phase
from ildlab.session.picture import picture_of
from ildlab.session.session import PruningSession
from ildlab.session.story import compare_html, header_html, step_labels, undo_words
from ildlab.session.tables import history_html
from ildlab.widgets import figures, words
from ildlab.widgets.controls import ALL_KINDS, PANES, Controls
from ildlab.widgets.stack_view import StackView


class View(Controls):
    """The controls, and what they show: header, stack, next phase, history, figure. `view` holds all widgets."""

    def __init__(self, session: PruningSession):
        self.session = session
        self.failed: BaseException | None = None
        self._off: set[int] = set()  # layers switched off in the what-if
        self._static: Any = None
        self._drawn = figures.Drawn("")
        self._kept: tuple = (None, None, None)
        self._phase, self._working, self._refreshing, self._seen = "", False, False, 0
        self.stack = StackView(self._describe, self._asked)
        super().__init__(session.config, self.stack, len(session.teacher))
        for control in (self.metric, self.suite, self.tokens, self.goal):
            control.observe(lambda _: self._offer_next(), names="value")
        self.figure_kind.observe(lambda _: self._show_figure(), names="value")
        for control in (self.steps, self.beside):
            control.observe(lambda _: self._look_back(), names="value")
        self.kind_of_text.observe(lambda _: (self._show_stack(), self._describe()), names="value")

    def _asked(self, message: dict) -> None:
        """A key, or a click on an iteration: what acts is elsewhere."""

    def _say(self, said: str) -> None:
        self.stack.status = said

    def refresh(self, said: str = "Ready.") -> None:
        """Draw everything anew from the session."""
        session = self.session
        self._seen = len(session.steps)
        here, scores, head = session.student.layer_ids, session.scores, session.journal.head.step
        self._off &= set(here)
        self._offer(session.latest_scores)
        self._refreshing = True  # new options select others on the way
        self.steps.options = step_labels(session)
        self.beside.options = [("none", None), *((f"{n}", n) for _, n in self.steps.options)]
        self.steps.value, self._refreshing = head, False
        kept = [i for i in self.stack.selected if i in here]
        self.stack.selected = kept or ([scores.least_important] if scores else [])
        shut = "Read only: another kernel has this run open. Shut it down to act here."
        self.header.value = header_html(session) + ("" if session.journal.writable else words.note(shut))
        self.results.value = words.evaluation_html(session) + words.warnings_html(session)
        self.history.value = history_html(session)
        self.export_to.value = str(session.folder / f"checkpoint-{len(here)}-layers")
        self.branch_to.value = f"{session.folder}-from-step-{head}"
        self.goal.max = max(1, len(here) - 1)
        self._look_back()
        self._offer_next()
        self._describe()
        self._show_figure()
        if self._static is not None:
            self._static.update(self._as_it_stands())
        self._say(f"{said} {len(here)} of {len(session.teacher)} layers, step {head}.")

    def _offer(self, scores: Any) -> None:
        """Offer what these scores, the latest, can show."""
        kinds = (ALL_KINDS, *dict.fromkeys(scores.kinds if scores else ()))
        self.kind_of_text.layout.display = None if len(kinds) > 1 else "none"
        _options(self.kind_of_text, kinds)
        _options(self.figure_kind, figures.names_for(scores))

    def _offer_next(self) -> None:
        """The next phase of the loop on the one button for it, with what it will cost."""
        session, metric, suite = self.session, self.metric.value, self.suite.value.strip() or None
        phase, standing = next_phase(session.path), session.standing()
        asked = {"tokens": self.tokens.value, "local_tokens": self.own.local_tokens}
        tokens = tokens_of(asked, session.config.train_tokens)
        cost = partial(forecast, session, metric=metric, suite=suite, tokens=tokens)
        label = f"Remove layer {session.scores.least_important}" if phase == "remove" else words.PHASES[phase]
        if phase == "distill" and standing and not standing.damage:
            label = f"Go on distilling ({standing.done} of {standing.total})"
        self.proceed.description = " · ".join(filter(None, (f"▶ {label}", words.time_words(cost(phase)))))
        self.discard.layout.display = None if standing else "none"
        self.discard.tooltip = str(standing or "")
        one, left = iteration(session, session.config.metric, session.config.suite), self.goal.value
        told = words.time_words(one and one * max(0, len(session.student) - left))
        self.run.description = f"Run to {left} layers{f' · {told}' if told else ''}"
        undone = undo_words(session).partition(", ")[0]
        self.undo.description, self.undo.disabled = f"Undo: {undone}" if undone else "Undo", not undone
        if phase != self._phase and not self._working:  # once: where a person is then stays
            self._phase = phase
            self.panes.selected_index = PANES.index({"evaluate removal": "Evaluate"}.get(phase, phase.capitalize()))
        for button in (self.stop, self.pause):
            button.layout.display = None if self._working else "none"
        blocks = session.config.calibration_tokens // session.config.block
        racing = "race" in options_of(metric)
        self.race.disabled = not racing
        how = f"{len(session.student)} branches × {blocks} blocks" if racing else f"one pass over {blocks} blocks"
        took = words.time_words(cost("measure")) or "not timed in this run yet"
        self.forecast.value = words.note(f"{how}, {took}.")

    def _show_stack(self, scores: Any = None, drifts: dict | None = None) -> None:
        journal, step, live = self.session.journal, self.steps.value, scores is not None or drifts is not None
        past = None if live or step in (None, journal.head.step) else step
        marks = {"kind": self.kind_of_text.value, "off": () if past is not None else self._off}
        picture = picture_of(journal, past, scores=scores, drifts=drifts, **marks)
        if past is not None:
            picture = replace(picture, title=f"As it was at step {past}. {picture.title}")
        self.stack.picture = picture.html()

    def _look_back(self) -> None:
        """Show the step that is chosen in the history, and beside it another one."""
        step, other = self.steps.value, self.beside.value
        if self._refreshing or step is None:
            return
        self._show_stack()
        self.go_back.description = f"Go to step {step}"
        back = undo_words(self.session, step)
        told = words.note(f"Going there takes back: {back}.") if back else ""
        self.compared.value = told + ("" if other is None else compare_html(self.session, step, other))

    def _describe(self, live: Any = None) -> None:
        """What is selected, in words; with `live`, by the scores of a measurement in hand."""
        session, selected, kind = self.session, sorted(self.stack.selected), self.kind_of_text.value
        found = live or session.latest_scores
        said = words.layer_words(session, selected, found, live is not None or session.scores is not None)
        if len(selected) == 1 and found and kind in found.kinds and selected[0] in found.layer_ids:
            said += f" On {kind} alone: {score_words(found.of_kind(kind), selected[0])}."
        said += " Switched off in the what-if." if selected and self._off.issuperset(selected) else ""
        self.about.value = words.note(said)
        self.remove.disabled, many = not selected, "s" * (len(selected) > 1)
        self.remove.description = (
            f"Remove layer{many} {words.listed(selected)}" if selected else "Remove: select a layer"
        )

    def _show_figure(self) -> None:
        name = self.figure_kind.value
        # A figure that took a forward pass stays until the student changes.
        if self._kept[:2] == (name, self.session.journal.head.step):
            self._drawn = self._kept[2]
        else:
            try:
                self._drawn = figures.draw(name, self.session)
            except Exception as error:  # one figure that fails must not hide how the step itself ended
                self.failed = error
                self._drawn = figures.Drawn(words.note(f"“{name}” could not be drawn: {words.error_words(error)}"))
        drawn, figure = self._drawn, figures.ALL[name]
        self.figure.cells, self.figure.html = drawn.cells, drawn.html + (words.note(drawn.note) if drawn.note else "")
        self.draw.layout.display = None if figure.heavy else "none"
        self.text.layout.display = None if figure.most else "none"
        code = f"<details><summary>show me the code</summary><pre>{html.escape(drawn.code)}</pre></details>"
        self.code.value = code if drawn.code else ""

    # ---------------------------------------------------------- static, live

    def _as_it_stands(self) -> HTML:
        """What stays on the page without a kernel; beside the live view its style sheet hides it."""
        return HTML(f'<div class="ildlab-static">{self._repr_html_()}</div>')

    def _ipython_display_(self) -> None:
        display(self.view)
        self._static = display(self._as_it_stands(), display_id=True)

    def _repr_html_(self) -> str:
        """What a reopened notebook, nbconvert or GitHub shows: the session as it stands, without widgets."""
        return f"{self.session._repr_html_()}{self.figure.html}"


def _options(choice: Any, options: tuple[str, ...]) -> None:
    """Offer these; what is chosen stays where they have it."""
    if options != choice.options:  # new ones select the first
        kept = choice.value
        choice.options = options
        choice.value = kept if kept in options else options[0]
