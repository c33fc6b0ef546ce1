"""Step through pruning in JupyterLab: widgets, nothing but view; every action is a `PruningSession` call.

```python
Stepper(PruningSession.open("runs/first"))
```

Long work runs on one worker thread, that writes leaf traits only, a few times a second. Without a
browser (papermill, tests) `Stepper(session, inline=True)` runs every action in the caller.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ildlab.importance.config import options_of
from ildlab.progress import Progress
from ildlab.session.session import PruningSession
from ildlab.session.whatif import what_if_steps
from ildlab.widgets import figures
from ildlab.widgets.controls import DEFAULTS, LOSSES, Controls
from ildlab.widgets.strip import Strip
from ildlab.widgets.worker import Outcome, Worker

SHOW_EVERY = 0.3  # seconds between two updates of the widgets while a job runs
DRAWING_SHARE = 1 / 30  # of a job's time may go into its live figure, however slow the machine draws
BUSY = "Busy: one thing at a time. Stop the work in hand first, or wait for it."


class Stepper(Controls):
    """The live view of one session.

    Parameters
    ----------
    session : PruningSession
    inline : bool
        Run actions in the caller instead of on the worker thread.
    prompt : str
        First prompt of the what-if panel.

    Attributes
    ----------
    view : ipywidgets.VBox
        All of it.
    measure, remove, distill, evaluate, stop, pause, undo, try_it, reset, go_back, branch, export : Button
    """

    def __init__(
        self,
        session: PruningSession,
        *,
        inline: bool = False,
        prompt: str = "The most important invention in history is",
    ):
        self.session = session
        self.worker = Worker(inline)
        self._off: set[int] = set()
        self._static: Any = None
        self._kept: tuple = (None, None, None)
        self._live: list[dict] = []
        self._next_figure = 0.0
        self._shown = 0.0
        self._started = 0.0
        self.failed: BaseException | None = None
        """What the last job failed with; its text stands in the status line."""
        self.strip = Strip(session.teacher.layer_ids, lambda _: self._describe(), lambda: self.toggle.click())
        super().__init__(session.config, self.strip, prompt)
        self._wire()
        self.refresh()

    def _wire(self) -> None:
        """Give every control its action; direct ones hold the worker, so that no job starts beside them."""
        for button, action in (
            (self.measure, self._measure),
            (self.toggle, self._toggle),
            (self.reset, self._reset),
            (self.try_it, self._what_if),
            (self.suggest, self._suggest),
            (self.distill, self._distill),
            (self.heal, self._heal),
            (self.evaluate, self._evaluate),
            (self.export, self._export),
            (self.draw, self._draw_heavy),
        ):
            button.on_click(lambda _, action=action: self._do(action))
        for button, action in (
            (self.remove, self._remove),
            (self.undo, self._undo),
            (self.go_back, self._go_back),
            (self.branch, self._branch),
            (self.save, self._save),
        ):
            button.on_click(lambda _, action=action: self._do(action, hold=True))
        self.stop.on_click(lambda _: self.worker.stop())
        self.pause.on_click(lambda _: self._pause())
        for control in (self.metric, self.race):
            control.observe(lambda _: self._forecast(), names="value")
        self.figure_kind.observe(lambda _: self._draw(), names="value")

    def _do(self, action: Callable[[], None], hold: bool = False) -> None:
        """Do what a button asks for; what goes wrong stands in the status line, in words."""
        try:
            if not hold:
                if self.worker.busy:
                    self._say(BUSY)
                else:
                    action()
                return
            with self.worker.hold() as held:
                if held:
                    action()
                else:
                    self._say(BUSY)
        except Exception as error:  # a kernel's log is no place for what a person has to know
            self.failed = error
            self._say(f"Not done: {error}")

    # --------------------------------------------------------------- showing

    def _say(self, words: str) -> None:
        self.status.value = (
            f'<div class="ildlab-note" role="status" aria-live="polite"><b>{html.escape(words)}</b></div>'
        )

    def refresh(self, words: str | None = None) -> None:
        """Draw everything anew from the session."""
        session = self.session
        self._off &= set(session.student.layer_ids)
        scores = session.scores
        suggested = scores.least_important if scores else None
        self.strip.show(
            scores or session.latest_scores,
            here=session.student.layer_ids,
            off=self._off,
            trained=session.trained,
            suggested=suggested,
        )
        self._forecast()
        self._describe()
        table = session.history()
        self.history.value = _table(table.drop(columns=["kl_undistilled"]).dropna(axis=1, how="all"))
        self.steps.options = figures.step_labels(session)
        self.steps.value = session.journal.head.step
        self.results.value = figures.evaluation_html(session) + figures.warnings_html(session)
        self._draw()
        where = f"{len(session.student)} of {len(session.teacher)} layers, step {session.journal.head.step}."
        self._say(f"{words} {where}" if words else f"Ready. {where}")
        self._update_static()

    def _describe(self) -> None:
        layer_id = self.strip.selected
        scores = self.session.scores
        if layer_id not in self.session.student.layer_ids:
            words = f"Layer {layer_id} was removed."
        elif scores is None or layer_id not in scores.table.index:
            words = f"Layer {layer_id}: not measured since the student last changed."
        else:
            row = scores.table.loc[layer_id]
            words = (
                f"Layer {layer_id}: {scores.metric} {row.score:.4g}, interval [{row.ci_low:.4g}, {row.ci_high:.4g}] "
                f"from {int(row.n)} sequences."
            )
            if layer_id == scores.least_important:
                words += f" The least important one, with probability {scores.separation():.2f}"
                tied = [i for i in scores.tied if i != layer_id]
                words += f"; tied with {', '.join(map(str, tied))}." if tied else "."
        if layer_id in self._off:
            words += " Switched off in the what-if."
        self.about.value = f'<div class="ildlab-note">{html.escape(words)}</div>'

    def _forecast(self) -> None:
        session = self.session
        layers = len(session.student)
        blocks = session.config.calibration_tokens // session.config.block
        racing = "race" in options_of(self.metric.value)
        self.race.disabled = not racing
        kind = f"{layers} branches × {blocks} blocks" if racing else f"one pass over {blocks} blocks"
        past = [s for s in session.steps if s.action == "measure" and s.args["metric"] == self.metric.value]
        took = f"≈ {past[-1].seconds:.0f} s, as last time" if past else "not timed on this machine yet"
        self.forecast.value = f'<div class="ildlab-note">{kind}; {took}.</div>'

    def _draw(self) -> None:
        kind = self.figure_kind.value
        # A figure that took a forward pass stays until the student changes.
        if self._kept[:2] == (kind, self.session.journal.head.step):
            drawn = self._kept[2]
        else:
            try:
                drawn = figures.draw(kind, self.session)
            except Exception as error:  # one figure that fails must not hide how the step itself ended
                self.failed = error
                drawn = figures.undrawn(kind, f"“{kind}” could not be drawn: {error}")
        self.figure.value, self._axes, self._data = drawn.html, drawn.axes, drawn.data
        self.code.value = f"<details><summary>show me the code</summary><pre>{html.escape(drawn.code)}</pre></details>"

    # ------------------------------------------------------------------ jobs

    def _job(self, name: str, make: Callable[[], Any], then: Callable[[Any], str | None] | None = None) -> None:
        """Run a generator as the job in hand; `then` turns its result into words."""
        self.failed = None
        self._started = time.perf_counter()

        def progress(p: Progress) -> None:
            now = time.perf_counter()
            if now - self._shown < SHOW_EVERY and p.done < p.total:
                return
            self._shown = now
            self.bar.value = p.done / max(p.total, 1)
            left = (now - self._started) * (p.total - p.done) / p.done if p.done else None
            eta = "" if left is None else f", {left:.0f} s left"
            held = " (paused)" if self.worker.paused else ""
            self._say(f"{name}: {p.done}/{p.total}{eta}{held}. {p.note}")
            self._partial(p.partial)

        def end(outcome: Outcome) -> None:
            self.bar.value = 0
            self.pause.description = "Pause"
            if outcome.state == "failed":
                self.failed = outcome.value
                self.refresh(f"{name} failed, and nothing is lost: {outcome.value}")
            elif outcome.state == "stopped":
                self.refresh(f"{name} stopped.")
            else:
                words = then(outcome.value) if then else None
                self.refresh(words or f"{name}: done in {time.perf_counter() - self._started:.0f} s.")

        self._say(f"{name} ...")
        self._live = []
        self._next_figure = 0.0
        if not self.worker.start(make, progress, end):
            self._say(BUSY)

    def _partial(self, partial: Any) -> None:
        if hasattr(partial, "least_important"):
            self.strip.show(partial, here=self.session.student.layer_ids, suggested=partial.least_important)
        elif isinstance(partial, dict) and "kl" in partial:
            self._live.append(partial)
            start = time.perf_counter()
            if len(self._live) > 1 and start >= self._next_figure:
                self.figure.value = figures.live_losses(self._live)
                end = time.perf_counter()
                self._next_figure = end + (end - start) / DRAWING_SHARE

    def _measure(self) -> None:
        metric = self.metric.value
        options = {"race": self.race.value} if "race" in options_of(metric) else {}

        def done(scores) -> str:
            return (
                f"Measured {metric}: layer {scores.least_important} is the least important "
                f"(probability {scores.separation():.2f})."
            )

        self._job("Measure", lambda: self.session.measure_steps(metric, **options), done)

    def _toggle(self) -> None:
        layer_id = self.strip.selected
        self.session.student.position(layer_id)
        self._off ^= {layer_id}
        self.refresh(f"Layer {layer_id} is {'off' if layer_id in self._off else 'on'} in the what-if.")
        self._what_if()

    def _reset(self) -> None:
        self._off.clear()
        self.answers.value = ""
        self.refresh("All layers are on.")

    def _what_if(self) -> None:
        prompt, off = self.prompt.value, sorted(self._off)

        def done(found) -> str:
            self.answers.value = found._repr_html_()
            return f"Without {', '.join(map(str, off))}:" if off else "Student beside teacher:"

        self._job("What if", lambda: what_if_steps(self.session, prompt, off), done)

    def _suggest(self) -> None:
        scores = self.session.scores
        if scores is None:
            self._say("Nothing to suggest: the student was not measured since it changed. Measure first.")
            return
        self.strip.select(scores.least_important)

    def _remove(self) -> None:
        layer_id = self.session.remove(self.strip.selected)
        self.refresh(f"Layer {layer_id} removed; undo brings it back.")

    def _distill(self) -> None:
        from ildlab.distill.train import DistillConfig

        changes: dict[str, Any] = {"tokens": self.tokens.value}
        changes |= LOSSES.get(self.loss.value, {})
        if self.scope.value != "as set":
            changes["scope"] = self.scope.value
        if self.use_rate.value:
            changes["learning_rate"] = self.rate.value
        config = DistillConfig.paper() if self.preset.value != DEFAULTS else None
        text = self.source.value.strip() or None
        text = None if text == self.session.config.text else text
        self._job("Distill", lambda: self.session.distill_steps(config, text=text, **changes))

    def _heal(self) -> None:
        def done(result) -> str:
            return "Healed: kept." if result.kept else f"Not healed: {result.note or 'it did not help.'}"

        self._job("Heal", lambda: self.session.heal_steps(), done)

    def _evaluate(self) -> None:
        suite = self.suite.value.strip() or None
        self._job("Evaluate", lambda: self.session.evaluate_steps(suite))

    def _pause(self) -> None:
        if not self.worker.busy:
            return
        if self.worker.paused:
            self.worker.resume()
            self.pause.description = "Pause"
        else:
            self.worker.pause()
            self.pause.description = "Resume"
            self._say("Paused at the next step.")

    def _undo(self) -> None:
        self.refresh(f"Back at step {self.session.undo().step}.")

    def _go_back(self) -> None:
        self.refresh(f"At step {self.session.undo(to=self.steps.value).step}.")

    def _folder(self) -> Path | None:
        if not self.folder.value.strip():
            self._say("Type the name of a new folder first.")
            return None
        return Path(self.folder.value.strip())

    def _branch(self) -> None:
        folder = self._folder()
        if folder is not None:
            other = self.session.branch(folder, self.steps.value)
            other.close()
            self.refresh(f"Branched into {folder}: open it with PruningSession.open.")

    def _export(self) -> None:
        folder = self._folder()
        if folder is not None:
            self._job("Export", lambda: _at_once(lambda: self.session.export(folder)), self._verdict)

    def _verdict(self, where: Path) -> str:
        return f"Exported to {where}. {self.session.steps[-1].result['verdict']}."

    def _draw_heavy(self) -> None:
        kind, text = self.figure_kind.value, self.text.value

        def done(drawn) -> str:
            self._kept = (kind, self.session.journal.head.step, drawn)
            return f"Drawn: {kind}."

        self._job(kind, lambda: _at_once(lambda: figures.draw(kind, self.session, text=text, heavy=True)), done)

    def _save(self) -> None:
        if self._axes is None:
            self._say("There is no figure to save yet.")
            return
        from ildlab import plots

        name = self.figure_kind.value.replace(" ", "_").replace("×", "x")
        path = self.session.folder / "figures" / f"{name}.{self.save_as.value.lower()}"
        path.parent.mkdir(exist_ok=True)
        if self.save_as.value == "CSV":
            self._data.to_csv(path)
        else:
            plots.save(self._axes, path)
        self._say(f"Saved {path}.")

    # ---------------------------------------------------------- static, live

    def static_html(self) -> str:
        """What a reopened notebook, nbconvert or GitHub shows: the session as it stands, without widgets."""
        return f"{self.session._repr_html_()}{self.figure.value}"

    def _update_static(self) -> None:
        if self._static is not None:
            from IPython.display import HTML

            self._static.update(HTML(f"<details><summary>as it stands</summary>{self.static_html()}</details>"))

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display

        display(self.view)
        self._static = display(
            HTML(f"<details open><summary>as it stands</summary>{self.static_html()}</details>"), display_id=True
        )

    def _repr_html_(self) -> str:
        return self.static_html()


def _table(frame) -> str:
    return frame.to_html(index=False, float_format=lambda v: f"{v:.4g}", na_rep="", border=0)


def _at_once(action: Callable[[], Any]):
    """A generator that does one thing: for actions that cannot be stopped in the middle."""
    yield Progress(0, 1)
    return action()
