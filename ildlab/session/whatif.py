"""Life without some layers, before deciding: next words, perplexity and KL, with nothing copied."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from ildlab.errors import SessionError
from ildlab.model.generate import greedy
from ildlab.model.head import beside_teacher
from ildlab.model.shared import both_final
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, Work
from ildlab.session.run import Run


@dataclass(frozen=True)
class WhatIf:
    """What the student says and how far it is from the teacher, with some layers switched off."""

    prompt: str
    off: tuple[int, ...]  # layer ids switched off
    student: str  # greedy continuations of the prompt
    teacher: str
    perplexity: float  # of the text that they were judged on
    teacher_perplexity: float
    kl: float  # KL(teacher || student) in nats per token on it

    def _repr_html_(self) -> str:
        off = f", layers {', '.join(map(str, self.off))} off" if self.off else ""
        rows = [(self.teacher, self.teacher_perplexity, 0.0), (self.student, self.perplexity, self.kl)]
        columns = ["next words", "perplexity", "KL (nats/token)"]
        table = pd.DataFrame(rows, columns=columns, index=["teacher", f"student{off}"])
        style = table.style.format({"perplexity": "{:.2f}", "KL (nats/token)": "{:.4f}"}, escape="html")
        style.set_caption(f"after “{html.escape(self.prompt)}”").set_table_attributes('class="ildlab-note"')
        style.set_properties(subset=["next words"], **{"text-align": "left", "white-space": "pre-wrap"})
        return style.set_uuid("what-if").to_html()


@torch.no_grad()
def what_if_steps(
    run: Run, prompt: str, off: Sequence[int] = (), *, tokens: int = 16, blocks: int = 2
) -> Work[WhatIf]:
    """Compare student and teacher on a prompt and a little of the eval text, with layers switched off.

    `tokens` are generated; `blocks` of the eval text are judged. The student is whole again afterwards.
    """
    ids = run.tokenizer(prompt, return_tensors="pt").input_ids  # [1, T]
    if ids.shape[1] == 0:
        raise SessionError("The prompt is empty: type at least one word.")

    def words(stack: LayerStack) -> str:
        return run.tokenizer.decode(greedy(stack.model, ids, tokens=tokens)[0, ids.shape[1] :])

    with run.acting("ask what if"):
        student, teacher = run.student, run.teacher
        ids = ids.to(student.device)
        text = run.text("eval").tokens[:blocks].long()  # [B, T]
        yield Progress(0, 2, "teacher")
        said = words(teacher)
        yield Progress(1, 2, "student")
        with student.without(list(off)):
            answer = words(student)
            ours, reference, _ = both_final(student, teacher, text)
            # [B, T, d] -> [B (T-1), d], one tensor where the two are one model
            flat = {id(h): h[:, :-1].flatten(0, 1) for h in (ours, reference)}
            gold = text[:, 1:].flatten().to(student.device)  # [B (T-1)]
            figures = beside_teacher(student, teacher, flat[id(ours)], flat[id(reference)], gold)  # [4, B (T-1)]
    nll, teacher_nll, kl, _ = figures.double().mean(1).tolist()
    return WhatIf(prompt, tuple(off), answer, said, math.exp(nll), math.exp(teacher_nll), kl)
