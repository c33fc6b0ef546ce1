"""`PruningSession`: the loop measure -> remove -> distill -> evaluate as journaled, undoable steps.

Every action that takes long is a generator of `Progress` (`measure_steps`, ...), which the stepper drives from a worker
thread; the plain call of it (`measure`, ...) draws a bar.
"""

from __future__ import annotations

from typing import Literal

import torch

from ildlab.errors import SessionError
from ildlab.limits import check_input
from ildlab.model.generate import greedy
from ildlab.progress import blocking
from ildlab.session import actions, loop, opening
from ildlab.session.export import export_student
from ildlab.session.picture import picture_of
from ildlab.session.run import Run
from ildlab.session.story import header_html
from ildlab.session.tables import history_html, history_table, losses_table
from ildlab.text.blocks import encode_prompts
from ildlab.typed import at_least_one, reading


class PruningSession(Run):
    """One run: a frozen teacher, the student it is pruned to, and the journal of how.

    Make one with `create`, `open`, or `resume`, which is either. Attributes: `teacher` and `student` (`LayerStack`), `tokenizer`,
    `config` (`SessionConfig`), `folder`, `scores` (the latest `LayerScores` of today's student, or None).
    """

    create, open, resume = map(classmethod, (opening.create, opening.open_run, opening.resume))
    measure_steps, measure = actions.measure_steps, blocking(actions.measure_steps)
    distill_steps, distill = actions.distill_steps, blocking(actions.distill_steps)
    evaluate_steps, evaluate = actions.evaluate_steps, blocking(actions.evaluate_steps)
    run_steps, run = loop.run_steps, blocking(loop.run_steps)
    remove, undo, export = actions.remove, actions.undo, export_student
    standing = actions.standing
    history, losses = history_table, losses_table

    @reading(SessionError)
    def generate(self, prompt: str, *, who: Literal["student", "teacher"] = "student", tokens: int = 40) -> str:
        """Greedy continuation of a prompt by today's `"student"` or by the `"teacher"`, prompt included."""
        stack = self.teacher if who == "teacher" else self.student
        at_least_one(SessionError, tokens=tokens)
        ids = torch.tensor(encode_prompts(self.tokenizer, [prompt]))  # [1, T]
        if ids.shape[1] == 0:
            raise SessionError("The prompt is empty: give it at least one word.")
        check_input(stack.model, ids, new=tokens, tokenizer=self.tokenizer)
        with self.acting("generate", writes=False):
            return self.tokenizer.decode(greedy(stack.model, ids, tokens=tokens)[0])

    def __repr__(self) -> str:
        return (
            f"PruningSession({str(self.folder)!r}, teacher {self.config.teacher!r}, "
            f"{len(self.student)} of {len(self.teacher)} layers, step {self.journal.head.step})"
        )

    def _repr_html_(self) -> str:
        return f"{header_html(self)}{picture_of(self.journal).html()}{history_html(self)}"
