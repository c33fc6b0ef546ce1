"""Life without some layers, before deciding: next words, perplexity and KL, with nothing copied."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ildlab.errors import SessionError
from ildlab.model.generate import greedy
from ildlab.model.head import beside_teacher
from ildlab.model.shared import both_final
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, Work

if TYPE_CHECKING:
    from ildlab.session.session import PruningSession


@dataclass(frozen=True)
class WhatIf:
    """What the student says and how far it is from the teacher, with some layers switched off.

    Attributes
    ----------
    prompt : str
    off : tuple of int
        Layer ids switched off.
    student, teacher : str
        Greedy continuations of the prompt.
    perplexity, teacher_perplexity : float
        Of the text they were judged on.
    kl : float
        KL(teacher || student) in nats per token on it.
    """

    prompt: str
    off: tuple[int, ...]
    student: str
    teacher: str
    perplexity: float
    teacher_perplexity: float
    kl: float

    def _repr_html_(self) -> str:
        off = f", layers {', '.join(map(str, self.off))} off" if self.off else ""
        rows = [
            ("teacher", self.teacher, f"{self.teacher_perplexity:.2f}", "0"),
            (f"student{off}", self.student, f"{self.perplexity:.2f}", f"{self.kl:.4f}"),
        ]
        body = "".join(
            f"<tr><th>{html.escape(who)}</th><td style='text-align:left;white-space:pre-wrap'>{html.escape(words)}</td>"
            f"<td>{ppl}</td><td>{kl}</td></tr>"
            for who, words, ppl, kl in rows
        )
        return (
            f"<table class='ildlab-note'><caption>after “{html.escape(self.prompt)}”</caption><tr><th></th>"
            f"<th>next words</th><th>perplexity</th><th>KL (nats/token)</th></tr>{body}</table>"
        )


@torch.no_grad()
def what_if_steps(
    session: PruningSession, prompt: str, off: Sequence[int] = (), *, tokens: int = 16, blocks: int = 2
) -> Work[WhatIf]:
    """Compare student and teacher on a prompt and a little of the eval text, with layers switched off.

    Parameters
    ----------
    session : PruningSession
    prompt : str
    off : sequence of int
        Layer ids to switch off; the student is whole again afterwards.
    tokens : int
        Tokens to generate.
    blocks : int
        Blocks of the eval text to judge on.

    Raises
    ------
    SessionError
        The prompt is empty, a layer is not in the student, or the session is busy.
    """
    ids = session.tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise SessionError("The prompt is empty: type at least one word.")
    with session.acting("ask what if"):
        student, teacher = session.student, session.teacher
        ids = ids.to(student.device)
        text = session.text("eval").tokens[:blocks].long()
        yield Progress(0, 2, "teacher")
        said = _words(teacher, session.tokenizer, ids, tokens)
        yield Progress(1, 2, "student")
        with student.without(list(off)):
            answer = _words(student, session.tokenizer, ids, tokens)
            ours, reference, _ = both_final(student, teacher, text)
            ends = [h[:, :-1].flatten(0, 1) for h in (ours, reference)]  # [B, T, d] -> [B (T-1), d]
            if ours is reference:
                ends[1] = ends[0]
            figures = beside_teacher(student, teacher, *ends, text[:, 1:].flatten().to(student.device))
    nll, teacher_nll, kl, _ = figures.double().mean(1).tolist()
    return WhatIf(prompt, tuple(off), answer, said, math.exp(nll), math.exp(teacher_nll), kl)


def _words(stack: LayerStack, tokenizer, ids, tokens: int) -> str:
    return tokenizer.decode(greedy(stack.model, ids, tokens=tokens)[0, ids.shape[1] :])
