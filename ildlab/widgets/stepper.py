"""Step through pruning in JupyterLab: widgets, nothing but view; every action is a `PruningSession` call.

Long work runs on one worker thread, that writes leaf traits only, a few times a second. Without a
browser (papermill, tests) `Stepper(session, inline=True)` runs every action in the caller.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ildlab import plots
from ildlab.distill.config import DistillConfig
from ildlab.errors import JournalError, SessionError
from ildlab.progress import Progress, Work
from ildlab.session.journal import Step
from ildlab.session.loop import next_phase
from ildlab.session.session import PruningSession
from ildlab.session.story import undo_words, what
from ildlab.session.tables import losses_of
from ildlab.session.whatif import what_if_steps
from ildlab.widgets import figures, words
from ildlab.widgets.controls import PANES
from ildlab.widgets.view import View
from ildlab.widgets.worker import Outcome, Worker

SHOW_EVERY = 0.3  # seconds between two updates of the widgets while a job runs
DRAWING_SHARE = 1 / 30  # of a job's time may go into its live pictures, however slow the machine draws
BUSY = "Busy: one thing at a time. Stop the work in hand first, or wait for it."
ACTIONS = (
    "proceed run measure suggest reset what_if remove distill discard evaluate undo go_back branch export draw save"
)
NEXT = {"remove": "remove_suggested", "evaluate removal": "evaluate_removal"}  # phases that no other button does
ANSWERS = 4  # of the what-if are kept


class Stepper(View):
    """The live view of one session; `inline` runs its actions in the caller instead of on the worker thread.

    The button `remove` does what the method `_remove` says, and so on: at once, where that returns what to say; where it
    is a generator of `Progress`, as the job in hand. `failed` is what the last action failed with.
    """

    def __init__(self, session: PruningSession, *, inline: bool = False):
        self.worker = Worker(inline, self._settle)
        self._live: list[dict] = []
        self._answers: dict[tuple, str] = {}
        self._job, self._again, self._begin = "", False, (0.0, 0)
        self._next_picture = self._shown = self._started = 0.0
        super().__init__(session)
        for name in ACTIONS.split():
            getattr(self, name).on_click(partial(self._do, name))
        self.toggle.on_click(lambda _: self._toggle())
        self.stop.on_click(lambda _: self._stop())
        self.pause.on_click(lambda _: self._pause())
        self.refresh()

    def wait(self, timeout: float = -1) -> PruningSession:
        """Wait until the work in hand has ended, and return the session."""
        self.worker.wait(timeout)
        return self.session

    def _do(self, name: str, _: Any = None) -> None:
        """Do what a button asks for; while it does, no job can begin beside it."""
        if name == "proceed":
            phase = next_phase(self.session.path)
            name = NEXT.get(phase, phase)
        if name == "what_if" and self.worker.busy and self._job == "What if":
            self._again = True  # the last state that was asked for wins
            self.worker.stop()
            return None if self.worker.busy else self._settle()
        try:
            with self.worker.hold(0 if self._working else 30) as held:  # one that has ended is only shown yet
                asked = getattr(self, f"_{name}")() if held else None
                if isinstance(asked, str):
                    self.refresh(asked)
            label = "What if" if name == "what_if" else name.partition("_")[0].capitalize()
            if asked is None or not (isinstance(asked, str) or self._start(label, asked)):
                self._say(BUSY)
        except Exception as error:  # a kernel's log is no place for what a person has to know
            self.failed = error
            self._say(f"Not done: {words.error_words(error)}")

    def _asked(self, message: dict) -> None:
        """A key, or a click on an iteration."""
        if "step" in message:
            self.steps.value = message["step"]
            self.panes.selected_index = PANES.index("History and export")
        elif message["action"] in (*ACTIONS.split(), "toggle"):
            getattr(self, message["action"]).click()

    # ------------------------------------------------------------------ jobs

    def _start(self, name: str, work: Work[str | None]) -> bool:
        self.failed, self._live, self._job = None, [], name
        self._next_picture, self._started, self._begin = 0.0, time.perf_counter(), (0.0, 0)
        self._working = True
        self._offer_next()
        self._say(f"{name} ...")
        return self.worker.start(
            work, partial(self._progress, name), partial(self._end, name, len(self.session.steps))
        )

    def _progress(self, name: str, p: Progress) -> None:
        now = time.perf_counter()
        if not self._begin[0]:  # what a checkpoint had done took no time of this job
            self._begin = (now, p.done)
        if now - self._shown < SHOW_EVERY and p.done < p.total:
            return
        self._shown = now
        since, first = self._begin
        self.stack.done = p.done / max(p.total, 1)
        going = p.done > first and not self.worker.paused
        self.stack.left = (now - since) * (p.total - p.done) / (p.done - first) if going else -1.0
        ended = len(self.session.steps) != self._seen  # a phase of the loop
        (self.refresh if ended else self._say)(f"{name}: {p.done}/{p.total}. {p.note}")
        self._partial(p.partial)
        if self.worker.paused:  # said last, so that a click on Pause during the above is not talked over
            self._say(f"{name}: {p.done}/{p.total} (paused). {p.note}")

    def _end(self, name: str, steps: int, outcome: Outcome) -> None:
        self.stack.done = self.stack.left = -1.0
        self.pause.description = "Pause"
        self._working = False
        new = [step for step in self.session.steps[steps:] if step.action != "failed"]
        seconds = time.perf_counter() - self._started
        said = outcome.value or f"{name}: done in {seconds:.0f} s{self._before_and_after(new)}."
        if outcome.state == "failed":
            self.failed = outcome.value
            said = f"{name} failed, and nothing is lost: {words.error_words(outcome.value)}"
        elif outcome.state == "stopped":
            kept = f"kept: step {new[-1].step}, {what(new[-1])}" if new else "nothing was changed"
            said = "Asking anew ..." if self._again else f"{name} stopped; {kept}."
        for action, figure in (("distill", "losses"), ("evaluate", "tasks")):
            if new and new[-1].action == action:
                self.figure_kind.value = figure
        self.refresh(said)

    def _settle(self) -> None:
        """Once no job runs: ask the what-if that was asked for meanwhile."""
        if self._again:
            self._again = False
            self.what_if.click()

    def _before_and_after(self, new: list[Step]) -> str:
        """Of a distillation, its KL on the training text at first and at last."""
        if not new or new[-1].action != "distill":
            return ""
        kls = losses_of(self.session, new[-1]).get("kl", pd.Series(dtype=float)).dropna()
        return f", KL {kls.iloc[0]:.3f} to {kls.iloc[-1]:.3f} nats/token on its text" if len(kls) > 1 else ""

    def _partial(self, found: Any) -> None:
        start = time.perf_counter()
        losing = isinstance(found, dict) and "kl" in found
        if losing:
            self._live.append(found)
        if start < self._next_picture:
            return
        if hasattr(found, "least_important"):
            self._show_stack(found)
            self._describe(found)
        elif losing:
            student = self.session.student
            at = dict(zip(student.layer_ids, student.layers))
            training = [i for i, layer in at.items() if any(p.requires_grad for p in layer.parameters())]
            self._show_stack(drifts={i: found.get(f"hidden_{i}") for i in training})
            if len(self._live) > 1:
                self.figure.html = figures.live_losses(self._live)
        end = time.perf_counter()
        self._next_picture = end + (end - start) / DRAWING_SHARE

    def _stop(self) -> None:
        self._again = False
        self.worker.stop()

    def _pause(self) -> None:
        paused = self.worker.paused
        if self.worker.busy:
            self.worker.pause(not paused)
            self.pause.description = "Pause" if paused else "Resume"
            self._say("Going on." if paused else "Paused at the next step.")

    # --------------------------------------------------------------- actions

    def _remove_suggested(self) -> str:
        return f"Layer {self.session.remove()} removed; undo brings it back."

    def _evaluate_removal(self) -> Work[None]:
        yield from self.session.evaluate_steps(False, speed=False, undistilled=False)

    def _run(self) -> Work[str]:
        yield from self.session.run_steps(self.goal.value)
        return f"Run to {len(self.session.student)} layers; now Export writes a checkpoint."

    def _measure(self) -> Work[str]:
        metric, race = self.metric.value, self.race.value
        # Only what a person changed is said: all else is the run's own.
        changed = not self.race.disabled and race != bool(self.session.config.measure.get("race"))
        scores = yield from self.session.measure_steps(metric, **({"race": race} if changed else {}))
        least = scores.least_important
        self.stack.selected = [least]
        return f"Measured {metric}: layer {least} is the least important (probability {scores.separation():.2f})."

    def _suggest(self) -> str:
        if self.session.scores is None:
            raise SessionError("There is no suggestion: the student was not measured since it changed. Measure first.")
        self.stack.selected = [self.session.scores.least_important]
        return f"Layer {self.stack.selected[0]} is selected."

    def _toggle(self) -> None:
        """Switch the selected layers off or on, at once, and ask the what-if; where one runs, the last state wins."""
        selected = set(self.stack.selected) & set(self.session.student.layer_ids)
        if not selected:
            self._say("Not done: select a layer that the student has.")
            return
        self._off = self._off - selected if selected <= self._off else self._off | selected
        self._show_stack()
        self._describe()
        self.what_if.click()

    def _reset(self) -> str:
        self._off.clear()
        self._answers.clear()
        self.answers.value = ""
        return "All layers are on."

    def _what_if(self) -> Work[str]:
        off, prompt, sampled = sorted(self._off), self.prompt.value, self.sampled.value
        found = yield from what_if_steps(self.session, prompt, off, sample=self.session.seed if sampled else None)
        self._answers.pop((prompt, sampled), None)
        self._answers[prompt, sampled] = found._repr_html_()
        self.answers.value = "<hr>".join([*self._answers.values()][: -ANSWERS - 1 : -1])  # the newest first
        return f"Without {words.listed(off)}:" if off else "Student beside teacher:"

    def _remove(self) -> str:
        selected = sorted(self.stack.selected)
        if not selected:
            raise SessionError("No layer is selected: click its column, or measure.")
        for layer_id in selected:
            self.session.student.position(layer_id)  # raises where it was removed, before anything is
        for layer_id in selected:
            self.session.remove(layer_id)
        named = words.listed(selected)
        return f"Layer{'s' * (len(selected) > 1)} {named} removed; undo brings {'them' if len(selected) > 1 else 'it'} back."

    def _distill(self) -> Work[None]:
        if standing := self.session.standing():  # a damaged one is refused there, in words
            config = DistillConfig.from_dict(standing.config)
            yield from self.session.distill_steps(config, text=standing.text, gap=standing.gap)
            return
        preset = self.preset.value
        changes: dict[str, Any] = {**self.loss.value, **self.scope.value}
        if preset or self.tokens.value != self.own.tokens:
            changes["tokens"] = self.tokens.value
        if not preset and "tokens" in changes:
            changes["local_tokens"] = self.tokens.value  # a person who asks for few means both stages
        if self.rate.value != self.own.learning_rate:
            changes["learning_rate"] = self.rate.value
        source = self.source.value.strip()
        text = source if source != self.session.config.text_of("train") else None
        yield from self.session.distill_steps(preset, text=text or None, **changes)

    def _discard(self) -> str:
        if standing := self.session.standing():
            standing.discard()
        return "Discarded: the student is as it was before that distillation."

    def _evaluate(self) -> Work[None]:
        # An empty box is no suite, and not the run's.
        yield from self.session.evaluate_steps(self.suite.value.strip() or False)

    def _undo(self) -> str:
        undone = undo_words(self.session)
        return f"Back at step {self.session.undo().step}; taken back: {undone}."

    def _go_back(self) -> str:
        to, head = self.steps.value, self.session.journal.head.step
        if to == head:
            return f"Nothing to do: today's student is that of step {to}."
        undone = undo_words(self.session, to)
        at = self.session.undo(to=to).step
        return f"At step {at}" + (f"; taken back: {undone}." if undone else ", which was undone before.")

    def _branch(self) -> str:
        folder = _folder(self.branch_to)
        self.session.branch(folder, self.steps.value).close()
        return f"Branched into {folder}: open it with PruningSession.open."

    def _export(self) -> Work[str]:
        yield Progress(0, 1, "this cannot be stopped in the middle")
        where = self.session.export(_folder(self.export_to))
        return f"Exported to {where}. {self.session.steps[-1].result['verdict']}."

    def _draw(self) -> Work[str] | str:
        name = self.figure_kind.value
        return self._draw_heavy(name) if figures.ALL[name].heavy else f"Drawn: {name}."

    def _draw_heavy(self, name: str) -> Work[str]:
        drawn = yield from figures.draw_steps(name, self.session, self.text.value)
        self._kept = (name, self.session.journal.head.step, drawn)
        return f"Drawn: {name}. {drawn.note}".strip()

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


def step_through(
    folder: str | Path, teacher: str = "smollm2-135m", *, inline: bool = False, **settings: Any
) -> Stepper:
    """Begin a run, or go on with the one in the folder; where another kernel has it open, look at it.

    Arguments are those of `PruningSession.resume`.
    """
    try:
        session = PruningSession.resume(folder, teacher, **settings)
    except JournalError:
        if not (Path(folder) / "config.json").is_file():
            raise
        session = PruningSession.open(folder, read_only=True)
    return Stepper(session, inline=inline)


def _folder(box: Any) -> Path:
    if not box.value.strip():
        raise SessionError("Type the name of a new folder first.")
    return Path(box.value.strip())
