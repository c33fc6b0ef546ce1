"""`PruningSession`: the loop measure -> remove -> distill -> evaluate as journaled, undoable steps.

Every action that takes long is a generator of `Progress` (`measure_steps`, ...), which the stepper drives from a worker
thread; the plain call of it (`measure`, ...) draws a bar.
"""

from __future__ import annotations

from html import escape

from ildlab.errors import SessionError
from ildlab.model.generate import greedy
from ildlab.progress import blocking
from ildlab.session import actions, loop
from ildlab.session.export import export_student
from ildlab.session.run import Run
from ildlab.session.tables import history_table, losses_table


class PruningSession(Run):
    """One run: a frozen teacher, the student it is pruned to, and the journal of how.

    Make one with `create` or `open`. Attributes: `teacher` and `student` (`LayerStack`), `tokenizer`,
    `config` (`SessionConfig`), `folder`, `scores` (the latest `LayerScores` of today's student, or None).
    """

    measure_steps, measure = actions.measure_steps, blocking(actions.measure_steps)
    distill_steps, distill = actions.distill_steps, blocking(actions.distill_steps)
    evaluate_steps, evaluate = actions.evaluate_steps, blocking(actions.evaluate_steps)
    run_steps, run = loop.run_steps, blocking(loop.run_steps)
    remove, undo, export = actions.remove, actions.undo, export_student
    history, losses = history_table, losses_table

    def generate(self, prompt: str, *, who: str = "student", tokens: int = 40) -> str:
        """Greedy continuation of a prompt by today's `"student"` or by the `"teacher"`, prompt included."""
        stack = self.teacher if who == "teacher" else self.student
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        if ids.shape[1] == 0:
            raise SessionError("The prompt is empty: give it at least one word.")
        with self.acting("generate"):
            return self.tokenizer.decode(greedy(stack.model, ids.to(stack.device), tokens=tokens)[0])

    def __repr__(self) -> str:
        return (
            f"PruningSession({str(self.folder)!r}, teacher {self.config.teacher!r}, "
            f"{len(self.student)} of {len(self.teacher)} layers, step {self.journal.head.step})"
        )

    def _repr_html_(self) -> str:
        table = self.history().to_html(index=False, float_format=lambda v: f"{v:.4g}", na_rep="", border=0)
        return f"<code>{escape(repr(self))}</code>{self.student._repr_html_()}{table}"
