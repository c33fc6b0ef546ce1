"""Greedy generation: in batches, the scores that compare it with references, and its speed."""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ildlab.errors import SuiteError
from ildlab.evaluate.loglikelihood import encode_all, prefix_token
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress


@torch.no_grad()
def greedy_steps(
    stack: LayerStack,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    max_length: int,
    batch_size: int = 8,
    as_is: bool = False,
    note: str = "",
) -> Generator[Progress, None, tuple[list[str], int]]:
    """Continue each prompt greedily with the KV cache.

    Prompts of like length go together, padded on the left; one too long for the window loses its
    beginning, and an empty one is the BOS (or EOS) token. The checkpoint's own penalties do not apply.

    Parameters
    ----------
    as_is : bool
        Answers as lm-eval takes them: white space stays, and a stop string counts at the very beginning too.

    Returns
    -------
    answers : list of str
        In the order of the prompts, cut before the first stop string, and stripped.
    truncated : int
        Prompts that lost their beginning.
    """
    room = max_length - max_new_tokens
    if room < 1:
        raise SuiteError(f"max_new_tokens={max_new_tokens} does not fit the model's window of {max_length} tokens.")
    known = encode_all(tokenizer, [prompt for prompt in prompts if prompt], True)
    ids = [list(known[prompt]) if prompt else [prefix_token(tokenizer)] for prompt in prompts]
    truncated = sum(len(row) > room for row in ids)
    ids = [row[-room:] for row in ids]
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    answers: list[str] = [""] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(ids[i]) for i in chosen)
        batch = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in chosen])
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in chosen])
        out = stack.model.generate(
            batch.to(stack.device),
            attention_mask=mask.to(stack.device),
            do_sample=False,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            stopping_criteria=[_Stopped(tokenizer, stop, width, as_is)] if stop else None,
        )
        for i, row in zip(chosen, out[:, width:]):
            answers[i] = cut(tokenizer.decode(row, skip_special_tokens=True), stop, as_is)
        yield Progress(start + len(chosen), len(order), note)
    return answers, truncated


class _Stopped:
    """Ends a row's generation once its answer holds a stop string: behind its first word, or (`as_is`) anywhere."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int, as_is: bool = False):
        self.tokenizer, self.stop, self.width, self.as_is = tokenizer, stop, width, as_is

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(ids[:, self.width :], skip_special_tokens=True)
        texts = texts if self.as_is else [text.lstrip() for text in texts]
        done = [any(mark in text for mark in self.stop) for text in texts]
        return torch.tensor(done, device=ids.device)


def cut(text: str, stop: Sequence[str], as_is: bool = False) -> str:
    """Cut a text before the first stop string, and strip it; `as_is` leaves its white space."""
    if as_is:
        for mark in stop:
            text = text.split(mark, 1)[0]
        return text
    for mark in stop:
        # A mark at the very beginning would leave nothing: models often open with a line break.
        text = text.lstrip() if text.strip() else text
        text = text.split(mark, 1)[0]
    return text.strip()


def chrf(answer: str, references: Sequence[str]) -> float:
    """chrF2 of sacrebleu, from 0 to 1 (Popovic 2015)."""
    sacrebleu = _need("sacrebleu")
    return sacrebleu.sentence_chrf(answer, list(references)).score / 100


class _Words:
    """Words of any script: rouge-score's own tokenizer drops all but a-z."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words; the best over references (Lin 2004)."""
    scorer = _need("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=_Words())
    return max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in references)


def _need(module: str):
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise SuiteError(
            f"Scoring generated text needs {module.split('.')[0]}: pip install 'ildlab[eval]'."
        ) from error


@torch.no_grad()
def generation_speed(
    student: LayerStack, teacher: LayerStack | None, tokens: Tensor, *, new_tokens: int = 24, rounds: int = 3
) -> tuple[float, float | None]:
    """Tokens a second that each generates, greedily, for one prompt of 16 tokens.

    The two take turns, and the median of the rounds counts, so that a busy machine slows both.

    Returns
    -------
    student's, teacher's (None without one)
    """
    prompt = tokens[:1, :16].long()
    times: dict[int, list[float]] = {}
    for turn in range(rounds + 1):
        for which, stack in enumerate([student, teacher]):
            if stack is None:
                continue
            amount = 2 if turn == 0 else new_tokens  # the first turn warms up
            start = time.perf_counter()
            _generate(stack, prompt, amount)
            if turn:
                times.setdefault(which, []).append(time.perf_counter() - start)
    rates = {which: new_tokens / float(np.median(taken)) for which, taken in times.items()}
    return rates[0], rates.get(1)


def _generate(stack: LayerStack, prompt: Tensor, new_tokens: int) -> Tensor:
    prompt = prompt.to(stack.device)
    pad = stack.config.eos_token_id
    pad = pad[0] if isinstance(pad, (list, tuple)) else pad
    out = stack.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0 if pad is None else pad,
        use_cache=True,
    )
    if stack.device.type == "cuda":
        torch.cuda.synchronize(stack.device)
    return out
