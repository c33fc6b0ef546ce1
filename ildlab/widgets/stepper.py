"""Step through pruning in JupyterLab: widgets, nothing but view; every action is a `PruningSession` call.

Long work runs on one worker thread, that writes leaf traits only, a few times a second. Without a
browser (papermill, tests) `Stepper(session, inline=True)` runs every action in the caller.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from IPython.display import HTML, display
from ipywidgets import Button

from ildlab import plots
from ildlab.errors import SessionError
from ildlab.importance.config import options_of
from ildlab.progress import Progress, Work
from ildlab.session.session import PruningSession
from ildlab.session.whatif import what_if_steps
from ildlab.widgets import figures
from ildlab.widgets.controls import Controls
from ildlab.widgets.strip import Strip
from ildlab.widgets.words import error_words, evaluation_html, layer_words, note, step_labels, warnings_html
from ildlab.widgets.worker import Outcome, Worker

SHOW_EVERY = 0.3  # seconds between two updates of the widgets while a job runs
DRAWING_SHARE = 1 / 30  # of a job's time may go into its live figure, however slow the machine draws
BUSY = "Busy: one thing at a time. Stop the work in hand first, or wait for it."
ACTIONS = "measure suggest toggle reset what_if remove distill evaluate undo go_back branch export draw save".split()


class Stepper(Controls):
    """The live view of one session; `inline` runs its actions in the caller instead of on the worker thread.

    The button `remove` does what the method `_remove` says, and so on: at once, where that returns what to say; where it
    is a generator of `Progress`, as the job in hand. `view` holds all widgets; `failed` is what the last action failed
    with.
    """

    def __init__(self, session: PruningSession, *, inline: bool = False):
        self.session, self.worker = session, Worker(inline)
        self.failed: BaseException | None = None
        self._off: set[int] = set()
        self._static: Any = None
        self._drawn = figures.Drawn("")
        self._kept: tuple = (None, None, None)
        self._live: list[dict] = []
        self._next_figure = self._shown = self._started = 0.0
        self.strip = Strip(session.teacher.layer_ids, lambda _: self._describe(), lambda: self.toggle.click())
        super().__init__(session.config, self.strip)
        for name in ACTIONS:
            getattr(self, name).on_click(partial(self._do, getattr(self, f"_{name}")))
        self.stop.on_click(lambda _: self.worker.stop())
        self.pause.on_click(lambda _: self._pause())
        self.metric.observe(lambda _: self._forecast(), names="value")
        self.figure_kind.observe(lambda _: self._show_figure(), names="value")
        self.kind_of_text.on_choose(self._show_kind)
        self.refresh()

    def _do(self, action: Callable[[], str | Work[str | None]], button: Button) -> None:
        """Do what a button asks for; while it does, no job can begin beside it."""
        try:
            with self.worker.hold() as held:
                asked = action() if held else None
                if isinstance(asked, str):
                    self.refresh(asked)
            if asked is None or not (isinstance(asked, str) or self._start(button.description, asked)):
                self._say(BUSY)
        except Exception as error:  # a kernel's log is no place for what a person has to know
            self.failed = error
            self._say(f"Not done: {error_words(error)}")

    # --------------------------------------------------------------- showing

    def _say(self, words: str) -> None:
        self.status.value = note(words, role="status")

    def refresh(self, words: str = "Ready.") -> None:
        """Draw everything anew from the session."""
        session = self.session
        here, scores = session.student.layer_ids, session.scores
        self._off &= set(here)
        self._offer(scores or session.latest_scores)
        if scores and not self.strip.chosen:
            self.strip.suggest(scores.least_important)
        self._show_strip()
        self._forecast()
        self._describe()
        table = session.history().drop(columns=["kl_undistilled"]).dropna(axis=1, how="all")
        self.history.value = table.to_html(index=False, float_format=lambda v: f"{v:.4g}", na_rep="", border=0)
        self.steps.options = step_labels(session)
        self.steps.value = session.journal.head.step
        self.results.value = evaluation_html(session) + warnings_html(session)
        self._show_figure()
        where = f"{len(here)} of {len(session.teacher)} layers, step {session.journal.head.step}."
        self._say(f"{words} {where}")
        if self._static is not None:
            self._static.update(self._as_it_stands())

    def _offer(self, scores: Any) -> None:
        """Offer what these scores, the latest, can show."""
        self.kind_of_text.offer(scores)
        names = figures.names_for(scores)
        if names != self.figure_kind.options:  # new ones select the first
            kept = self.figure_kind.value
            self.figure_kind.options = names
            self.figure_kind.value = kept if kept in names else names[0]

    def _show_strip(self) -> None:
        session, scores = self.session, self.session.scores
        suggested = scores.least_important if scores else None  # by all kinds of text, whichever is shown
        marks = {"off": self._off, "trained": session.trained, "suggested": suggested}
        shown = self.kind_of_text.of(scores or session.latest_scores)
        self.strip.show(shown, here=session.student.layer_ids, **marks)

    def _show_kind(self) -> None:
        self._show_strip()
        self._describe()
        self._show_figure()

    def _describe(self) -> None:
        selected = self.strip.selected
        words = layer_words(self.session, selected) + self.kind_of_text.words(self.session.scores, selected)
        off = " Switched off in the what-if." if selected in self._off else ""
        self.about.value = note(words + off)

    def _forecast(self) -> None:
        session = self.session
        blocks = session.config.calibration_tokens // session.config.block
        racing = "race" in options_of(self.metric.value)
        self.race.disabled = not racing
        kind = f"{len(session.student)} branches × {blocks} blocks" if racing else f"one pass over {blocks} blocks"
        past = [s for s in session.steps if s.action == "measure" and s.args["metric"] == self.metric.value]
        took = f"≈ {past[-1].seconds:.0f} s, as last time" if past else "not timed on this machine yet"
        self.forecast.value = note(f"{kind}; {took}.")

    def _show_figure(self) -> None:
        name = self.figure_kind.value
        # A figure that took a forward pass stays until the student changes.
        if self._kept[:2] == (name, self.session.journal.head.step):
            self._drawn = self._kept[2]
        else:
            try:
                self._drawn = figures.draw(name, self.session, self.text.value, kind=self.kind_of_text.chosen)
            except Exception as error:  # one figure that fails must not hide how the step itself ended
                self.failed = error
                self._drawn = figures.Drawn(note(f"“{name}” could not be drawn: {error_words(error)}"))
        self.figure.value = self._drawn.html
        code = f"<details><summary>show me the code</summary><pre>{html.escape(self._drawn.code)}</pre></details>"
        self.code.value = code if self._drawn.code else ""

    # ------------------------------------------------------------------ jobs

    def _start(self, name: str, work: Work[str | None]) -> bool:
        self.failed, self._live = None, []
        self._next_figure, self._started = 0.0, time.perf_counter()
        self._say(f"{name} ...")
        return self.worker.start(work, partial(self._progress, name), partial(self._end, name))

    def _progress(self, name: str, p: Progress) -> None:
        now = time.perf_counter()
        if now - self._shown < SHOW_EVERY and p.done < p.total:
            return
        self._shown = now
        self.bar.value = p.done / max(p.total, 1)
        left = f", {(now - self._started) * (p.total - p.done) / p.done:.0f} s left" if p.done else ""
        held = " (paused)" if self.worker.paused else ""
        self._say(f"{name}: {p.done}/{p.total}{left}{held}. {p.note}")
        self._partial(p.partial)

    def _end(self, name: str, outcome: Outcome) -> None:
        self.bar.value = 0
        self.pause.description = "Pause"
        words = outcome.value or f"{name}: done in {time.perf_counter() - self._started:.0f} s."
        if outcome.state == "failed":
            self.failed = outcome.value
            words = f"{name} failed, and nothing is lost: {error_words(outcome.value)}"
        elif outcome.state == "stopped":
            words = f"{name} stopped."
        self.refresh(words)

    def _partial(self, found: Any) -> None:
        if hasattr(found, "least_important"):
            shown, here = self.kind_of_text.of(found), self.session.student.layer_ids
            self.strip.show(shown, here=here, suggested=found.least_important)
        elif isinstance(found, dict) and "kl" in found:
            self._live.append(found)
            start = time.perf_counter()
            if len(self._live) > 1 and start >= self._next_figure:
                self.figure.value = figures.live_losses(self._live)
                end = time.perf_counter()
                self._next_figure = end + (end - start) / DRAWING_SHARE

    def _pause(self) -> None:
        paused = self.worker.paused
        if self.worker.busy:
            self.worker.pause(not paused)
            self.pause.description = "Pause" if paused else "Resume"
            self._say("Going on." if paused else "Paused at the next step.")

    # --------------------------------------------------------------- actions

    def _measure(self) -> Work[str]:
        metric, race = self.metric.value, self.race.value
        # Only what a person changed is said: all else is the run's own.
        changed = not self.race.disabled and race != bool(self.session.config.measure.get("race"))
        scores = yield from self.session.measure_steps(metric, **({"race": race} if changed else {}))
        least = scores.least_important
        self.strip.suggest(least)
        return f"Measured {metric}: layer {least} is the least important (probability {scores.separation():.2f})."

    def _suggest(self) -> str:
        if self.session.scores is None:
            raise SessionError("There is no suggestion: the student was not measured since it changed. Measure first.")
        self.strip.suggest(self.session.scores.least_important)
        return f"Layer {self.strip.selected} is selected."

    def _toggle(self) -> Work[str]:
        self.session.student.position(self.strip.selected)  # raises where it was removed
        self._off ^= {self.strip.selected}
        return (yield from self._what_if())

    def _reset(self) -> str:
        self._off.clear()
        self.answers.value = ""
        return "All layers are on."

    def _what_if(self) -> Work[str]:
        off = sorted(self._off)
        found = yield from what_if_steps(self.session, self.prompt.value, off)
        self.answers.value = found._repr_html_()
        return f"Without {', '.join(map(str, off))}:" if off else "Student beside teacher:"

    def _remove(self) -> str:
        return f"Layer {self.session.remove(self.strip.selected)} removed; undo brings it back."

    def _distill(self) -> Work[None]:
        preset = self.preset.value
        changes: dict[str, Any] = {**self.loss.value, **self.scope.value}
        if preset or self.tokens.value != self.own.tokens:
            changes["tokens"] = self.tokens.value
        if not preset and "tokens" in changes:
            changes["local_tokens"] = self.tokens.value  # a person who asks for few means both stages
        if self.rate.value != self.own.learning_rate:
            changes["learning_rate"] = self.rate.value
        source = self.source.value.strip()
        text = source if source != self.session.config.text else None
        yield from self.session.distill_steps(preset, text=text or None, **changes)

    def _evaluate(self) -> Work[None]:
        # An empty box is no suite, and not the run's.
        yield from self.session.evaluate_steps(self.suite.value.strip() or False)

    def _undo(self) -> str:
        return f"Back at step {self.session.undo().step}."

    def _go_back(self) -> str:
        return f"At step {self.session.undo(to=self.steps.value).step}."

    def _branch(self) -> str:
        folder = self._folder()
        self.session.branch(folder, self.steps.value).close()
        return f"Branched into {folder}: open it with PruningSession.open."

    def _export(self) -> Work[str]:
        yield Progress(0, 1)  # what follows cannot be stopped in the middle
        where = self.session.export(self._folder())
        return f"Exported to {where}. {self.session.steps[-1].result['verdict']}."

    def _folder(self) -> Path:
        if not self.folder.value.strip():
            raise SessionError("Type the name of a new folder first.")
        return Path(self.folder.value.strip())

    def _draw(self) -> Work[str]:
        name = self.figure_kind.value
        yield Progress(0, 1)
        drawn = figures.draw(name, self.session, self.text.value, heavy=True, kind=self.kind_of_text.chosen)
        if figures.ALL[name].heavy:  # the others cost little, and change with the kind of text
            self._kept = (name, self.session.journal.head.step, drawn)
        return f"Drawn: {name}."

    def _save(self) -> str:
        if self._drawn.axes is None:
            raise SessionError("There is no figure to save yet.")
        name = self.figure_kind.value.replace(" ", "_").replace("×", "x")
        path = self.session.folder / "figures" / f"{name}.{self.save_as.value.lower()}"
        path.parent.mkdir(exist_ok=True)
        if self.save_as.value == "CSV":
            self._drawn.data.to_csv(path)
        else:
            plots.save(self._drawn.axes, path)
        return f"Saved {path}."

    # ---------------------------------------------------------- static, live

    def _as_it_stands(self, opened: str = "") -> HTML:
        return HTML(f"<details {opened}><summary>as it stands</summary>{self._repr_html_()}</details>")

    def _ipython_display_(self) -> None:
        display(self.view)
        self._static = display(self._as_it_stands("open"), display_id=True)

    def _repr_html_(self) -> str:
        """What a reopened notebook, nbconvert or GitHub shows: the session as it stands, without widgets."""
        return f"{self.session._repr_html_()}{self.figure.value}"
