"""Judge a student on text: perplexity, distance from the teacher, and agreement; sizes, speed and tasks beside them.

Student and teacher go down their common bottom layers once. Every figure over the vocabulary is
computed in fp32 log space, a few hundred positions at a time, so that logits never fill the memory.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch

from ildlab.errors import ModelError, ParameterError, SuiteError
from ildlab.evaluate.record import Evaluation
from ildlab.evaluate.results import SuiteResult
from ildlab.evaluate.speed import generation_speed
from ildlab.evaluate.suites import load_suite, suite_steps
from ildlab.limits import check_input
from ildlab.model.capture import sent
from ildlab.model.head import beside_teacher, in_fp64
from ildlab.model.shared import both_final, shared_prefix
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, Work, blocking
from ildlab.stats import interval, means, resamples
from ildlab.text.rows import Rows
from ildlab.typed import at_least_one, reading

CANARIES = 20  # rows of each probe: they are to be cheap, and a collapse shows on few


@reading(ParameterError)
def evaluate_steps(
    student: LayerStack,
    teacher: LayerStack,
    blocks: Any,
    *,
    tokenizer: Any = None,
    suite: Any = None,
    canaries: bool = False,
    speed: bool = True,
    batch_size: int = 8,
    teacher_record: dict[str, Any] | None = None,
    cache: Any = None,
) -> Work[Evaluation]:
    """Evaluate a student against its teacher.

    Parameters
    ----------
    blocks : TextBlocks, int Tensor [N, T], or mapping with `input_ids` and `attention_mask`
        Text for perplexity, KL and agreement: the eval split.
    tokenizer
        Needed for `suite` and `canaries`.
    suite : str or Suite, optional
        What `ildlab.evaluate.suites.load_suite` takes.
    canaries : bool
        Score the shipped probes as well (copying, arithmetic, brackets; 20 rows each).
    speed : bool
        Time the generation of both, in turns.
    batch_size : int
        Blocks in one pass.
    teacher_record : dict, optional
        `Evaluation.teacher_record` of an earlier evaluation beside the same teacher: its suite and canary
        scores are taken over where they stand for the same tasks.
    cache : path, optional
        As in `ildlab.evaluate.suites.suite_steps`.

    Raises
    ------
    TextError
        No block, or blocks of one token.
    ModelError
        Blocks are longer than the model's window, or hold a token that its embedding lacks; or a figure is not finite.
    SuiteError
        A suite was asked for without a tokenizer, or is malformed.
    ParameterError
        An argument is of another type, or a batch of none.
    """
    start = time.perf_counter()
    at_least_one(ParameterError, batch_size=batch_size)
    rows = Rows.of(blocks)
    check_input(student.model, rows.tokens, tokenizer=tokenizer)
    if (suite is not None or canaries) and tokenizer is None:
        raise SuiteError("Scoring a suite needs the tokenizer: pass tokenizer=loaded.tokenizer.")
    # Read (and so checked) before the minutes that the rest takes.
    wanted = {"suite": load_suite(suite)} if suite is not None else {}
    if canaries:
        wanted["canaries"] = load_suite("canaries", limit=CANARIES)

    figures = yield from _text_steps(student, teacher, rows, batch_size)
    if speed:
        yield Progress(0, 1, "generation speed")
        same = student.model is teacher.model
        rate, other = generation_speed(student, None if same else teacher, rows.tokens)
        figures |= {"tokens_per_second": rate, "teacher_tokens_per_second": rate if same else other}

    same = shared_prefix(student, teacher) == len(student) == len(teacher)
    for name, asked in wanted.items():
        mine = yield from suite_steps(student, tokenizer, asked, cache=cache)
        kept = (teacher_record or {}).get(f"teacher_{name}")
        theirs = mine if same else SuiteResult.from_dict(kept) if kept else None
        if theirs is None or theirs.fingerprint != asked.fingerprint:
            theirs = yield from suite_steps(teacher, tokenizer, asked, cache=cache)
        figures |= {name: mine, f"teacher_{name}": theirs}
    return Evaluation(
        **figures,
        text=rows.text,
        layers=len(student),
        teacher_layers=len(teacher),
        **_sizes(student, ""),
        **_sizes(teacher, "teacher_"),
        seconds=time.perf_counter() - start,
    )


evaluate = blocking(evaluate_steps)


@torch.no_grad()
def _text_steps(student, teacher, rows: Rows, batch_size: int) -> Work[dict[str, Any]]:
    """The figures of an `Evaluation` that text gives."""
    sums = np.zeros((len(rows.tokens), 5))  # per block: tokens; sums of NLL, the teacher's NLL, KL, same top token
    for start in range(0, len(rows.tokens), batch_size):
        picked = np.arange(start, min(start + batch_size, len(rows.tokens)))
        ours, reference, trunk = both_final(student, teacher, rows.batch(picked))
        target = trunk.input_ids[:, 1:].to(student.device).flatten()  # [B, T-1] -> [B (T-1)]
        valid = torch.ones(len(picked), rows.tokens.shape[1] - 1, dtype=torch.bool)
        if rows.mask is not None:  # a token that is predicted, from one that is there
            valid = rows.mask[picked, 1:] & rows.mask[picked, :-1]
        # Told on the host: a mask that lies on a GPU waits for it.
        owner, at = (sent(each, student.device) for each in (valid.nonzero()[:, 0], valid.flatten().nonzero()[:, 0]))
        reference_at = reference[:, :-1].flatten(0, 1)[at]  # [n, d]: the positions that predict
        ours_at = reference_at if ours is reference else ours[:, :-1].flatten(0, 1)[at]
        found = beside_teacher(student, teacher, ours_at, reference_at, target[at])  # [4, n]
        found = torch.cat([torch.ones_like(found[:1]), found])  # [5, n]
        figures = in_fp64(torch.zeros(len(picked), 5, device=student.device))
        sums[picked] = figures.index_add_(0, owner, in_fp64(found).T).cpu().numpy()
        _check_finite(sums, picked)
        count, nll, teacher_nll, kl, agreed = sums.sum(0).tolist()
        note = f"text: perplexity {math.exp(nll / count):.2f}, KL {kl / count:.4f}"
        yield Progress(int(picked[-1]) + 1, len(rows.tokens), note)
    low = high = kl / count
    if len(sums) > 1:
        per_block = sums[:, 3:4] / sums[:, :1]  # [N, 1]
        draws = means(resamples(len(sums)), per_block, sums[:, 0])[:, 0]
        low, high = (float(bound) for bound in interval(kl / count, draws, len(sums)))
    return {
        "perplexity": math.exp(nll / count),
        "teacher_perplexity": math.exp(teacher_nll / count),
        "kl": kl / count,
        "kl_low": max(0.0, low),
        "kl_high": high,
        "agreement": agreed / count,
        "tokens": int(count),
    }


def _check_finite(sums: np.ndarray, picked: np.ndarray) -> None:
    """Raise ModelError where a figure of these blocks is NaN, infinite, or a perplexity that no number holds."""
    for name, column, most in (("teacher", 2, 700), ("student", 1, 700), ("student", 3, np.inf)):
        bad = picked[~(np.abs(sums[picked, column]) / sums[picked, 0] < most)]  # exp(710) is too much for a float
        if len(bad):
            raise ModelError(
                f"What the {name} gives on block {bad[0]} is not finite: its weights are damaged, or values overflow in its "
                "dtype. Load it in float32 or bfloat16, or go back to a step before."
            )


def _sizes(stack: LayerStack, prefix: str) -> dict[str, int]:
    parameters = list(stack.model.parameters())
    return {
        f"{prefix}parameters": sum(p.numel() for p in parameters),
        f"{prefix}bytes": sum(p.numel() * p.element_size() for p in parameters),
    }
