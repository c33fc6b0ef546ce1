"""Life without some layers, before deciding: next words, perplexity and KL, with nothing copied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape

import torch
from torch import Tensor

from ildlab.errors import SessionError
from ildlab.limits import check_input
from ildlab.model.generate import greedy
from ildlab.model.head import beside_teacher, wide
from ildlab.model.shared import both_final
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, Work
from ildlab.session.run import Run
from ildlab.text.blocks import encode_prompts
from ildlab.typed import at_least_one, reading

CARD = "flex:1 1 18em;border:1px solid #858585;border-radius:4px;padding:4px 8px"
WORDS = "display:inline-block;text-align:center;vertical-align:top;white-space:pre-wrap;line-height:1.25"


@dataclass(frozen=True)
class WhatIf:
    """What the student says and how far it is from the teacher, with some layers switched off."""

    prompt: str
    off: tuple[int, ...]  # layer ids switched off
    student: str  # continuations of the prompt
    teacher: str
    perplexity: float  # of the text that they were judged on
    teacher_perplexity: float
    kl: float  # KL(teacher || student) in nats per token on it
    tokens: tuple[str, ...] = ()  # of the student's continuation,
    kls: tuple[float, ...] = ()  # and KL(teacher || student) in nats where each of them was chosen
    teacher_tokens: tuple[str, ...] = ()
    sampled: bool = False  # with the same noise for both; else each takes its likeliest word

    def _repr_html_(self) -> str:
        off = f", {'layers' if len(self.off) > 1 else 'layer'} {', '.join(map(str, self.off))} off" if self.off else ""
        how = "one sample" if self.sampled else "likeliest words"
        cards = (
            ("teacher", f"perplexity {self.teacher_perplexity:.2f}", self._marked(self.teacher_tokens, self.tokens)),
            (
                f"student{off}",
                f"perplexity {self.perplexity:.2f} ({self.perplexity / self.teacher_perplexity - 1:+.1%}), "
                f"KL {self.kl:.4f} nats/token; below each word the KL where it was chosen",
                self._marked(self.tokens, self.teacher_tokens, self.kls),
            ),
        )
        body = "".join(
            f'<div style="{CARD}"><b>{who}</b> <small>{figures}</small><div>{words}</div></div>'
            for who, figures, words in cards
        )
        head = f"after “{escape(self.prompt)}”, {how}; marked: where the two differ"
        return (
            f'<div class="ildlab-note" role="group" aria-label="what if"><div>{head}</div>'
            f'<div style="display:flex;flex-wrap:wrap;gap:8px">{body}</div></div>'
        )

    @staticmethod
    def _marked(own: Sequence[str], other: Sequence[str], kls: Sequence[float] = ()) -> str:
        """Tokens as HTML, those marked that the other has not there; below each its KL."""
        same = SequenceMatcher(a=own, b=other, autojunk=False).get_matching_blocks()
        kept = {block.a + k for block in same for k in range(block.size)}
        out = []
        for i, token in enumerate(own):
            words = escape(token.replace("\n", "⏎"))
            words = words if i in kept else f'<mark style="background:#ffe08a;color:#000">{words}</mark>'
            below = f'<br><small style="font-size:.72em">{kls[i]:.2f}</small>' if kls else ""
            out.append(f'<span style="{WORDS}">{words}{below}</span>')
        return "".join(out)


@reading(SessionError)
@torch.no_grad()
def what_if_steps(
    run: Run, prompt: str, off: Sequence[int] = (), *, tokens: int = 16, blocks: int = 2, sample: int | None = None
) -> Work[WhatIf]:
    """Compare student and teacher on a prompt and a little of the eval text, with layers switched off.

    `tokens` are generated, the likeliest ones, or with `sample` (a seed) drawn, by both with the same noise; `blocks` of
    the eval text are judged. The student is whole again afterwards.
    """
    at_least_one(SessionError, tokens=tokens, blocks=blocks)
    ids = torch.tensor(encode_prompts(run.tokenizer, [prompt]))  # [1, T]
    if ids.shape[1] == 0:
        raise SessionError("The prompt is empty: type at least one word.")
    check_input(run.teacher.model, ids, new=tokens, tokenizer=run.tokenizer)
    length = ids.shape[1]
    with run.acting("ask what if", writes=False):
        student, teacher = run.student, run.teacher
        text = run.text("eval").tokens[:blocks].long()  # [B, T]
        yield Progress(0, 2, "teacher")
        theirs = yield from _continued(teacher, ids, tokens, sample)
        yield Progress(1, 2, "student")
        with student.without(list(off)):
            mine = yield from _continued(student, ids, tokens, sample)
            nll, teacher_nll, kl, _ = _beside(student, teacher, text).mean(1).tolist()
            new = range(length - 1, mine.shape[1] - 1)  # where each new token was chosen
            kls = _beside(student, teacher, mine)[2, list(new)].tolist() if len(new) else []
    said, answer = ([run.tokenizer.decode([i]) for i in row[0, length:].tolist()] for row in (theirs, mine))
    whole = [run.tokenizer.decode(row[0, length:]) for row in (mine, theirs)]
    figures = (perplexity_of(nll), perplexity_of(teacher_nll), kl)
    return WhatIf(
        prompt, tuple(off), *whole, *figures, tuple(answer), tuple(kls), tuple(said), sampled=sample is not None
    )


def perplexity_of(nll: float) -> float:
    """Perplexity of a mean loss in nats; infinite where it is beyond a float, as of a stack with its first layer off."""
    return math.exp(nll) if nll < 709 else math.inf


def _continued(stack: LayerStack, ids: Tensor, tokens: int, sample: int | None) -> Work[Tensor]:
    """A prompt [1, T] with its continuation [1, T + new]."""
    if sample is None:
        return greedy(stack.model, ids, tokens=tokens)
    generator = torch.Generator().manual_seed(sample)
    ids = ids.to(stack.device)
    for done in range(tokens):
        logits = wide(stack.logits(stack.final(ids)[:, -1])).cpu()  # [1, V]
        # The largest of logits with Gumbel noise is a draw from their softmax (Gumbel 1954).
        noise = -torch.empty_like(logits).exponential_(generator=generator).log()
        ids = torch.cat([ids, (logits + noise).argmax(-1, keepdim=True).to(ids)], 1)
        yield Progress(done, tokens, "drawing words")
    return ids


def _beside(student: LayerStack, teacher: LayerStack, batch: Tensor) -> Tensor:
    """NLL of both, KL and agreement [4, B (T-1)] float64 at each next token of a batch [B, T]."""
    ours, reference, _ = both_final(student, teacher, batch)
    # [B, T, d] -> [B (T-1), d], one tensor where the two are one model
    flat = {id(h): h[:, :-1].flatten(0, 1) for h in (ours, reference)}
    gold = batch[:, 1:].flatten().to(student.device)  # [B (T-1)]
    return beside_teacher(student, teacher, flat[id(ours)], flat[id(reference)], gold).double().cpu()
