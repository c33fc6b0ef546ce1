"""Judge a student on text: perplexity, distance from the teacher, and agreement; sizes, speed and tasks beside them.

Student and teacher go down their common bottom layers once. Every figure over the vocabulary is
computed in fp32 log space, a few hundred positions at a time, so that logits never fill the memory.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ildlab.distill.losses import in_fp64, kl_per_token, log_probabilities, wide
from ildlab.errors import SuiteError, TextError
from ildlab.evaluate.record import Evaluation
from ildlab.evaluate.results import SuiteResult
from ildlab.evaluate.speed import generation_speed
from ildlab.evaluate.suites import load_suite, suite_steps
from ildlab.importance.samples import expansion, means, percentiles, resamples
from ildlab.model.stack import LayerStack, Trunk, shared_prefix
from ildlab.progress import Progress, Work, drive

if TYPE_CHECKING:
    from ildlab.text.blocks import TextBlocks

CANARIES = 20  # rows of each probe: they are to be cheap, and a collapse shows on few
CHUNK = 256  # positions whose logits exist at one time: 50 MB in fp32 for a vocabulary of 49,152


def evaluate_steps(
    student: LayerStack,
    teacher: LayerStack,
    blocks: TextBlocks | Tensor,
    *,
    tokenizer: Any = None,
    suite: Any = None,
    canaries: bool = False,
    speed: bool = True,
    batch_size: int = 8,
    teacher_record: dict[str, Any] | Evaluation | None = None,
    cache: Any = None,
    seed: int = 0,
) -> Work[Evaluation]:
    """Evaluate a student against its teacher, step by step.

    Parameters
    ----------
    student, teacher : LayerStack
        They may be one and the same.
    blocks : TextBlocks or int Tensor [N, T]
        Text for perplexity, KL and agreement: the eval split.
    tokenizer
        Needed for `suite` and `canaries`.
    suite : str or Suite, optional
        What `ildlab.evaluate.suites.load_suite` takes: a name, a YAML file, `"file:rows.jsonl"`,
        `"lm-eval:arc_easy,piqa"`.
    canaries : bool
        Score the shipped probes as well (copying, arithmetic, brackets; 20 rows each).
    speed : bool
        Time the generation of both, in turns.
    batch_size : int
        Blocks in one pass.
    teacher_record : dict or Evaluation, optional
        An earlier evaluation (or its `teacher_record()`) beside the same teacher: its suite and
        canary scores are taken over where they stand for the same tasks.
    cache : path, optional
        Folder where suite results are kept by model fingerprint.
    seed : int
        Of the bootstrap.

    Raises
    ------
    TextError
        No block, or blocks of one token.
    SuiteError
        A suite was asked for without a tokenizer, or is malformed.
    """
    start = time.perf_counter()
    tokens = blocks if isinstance(blocks, Tensor) else blocks.tokens
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise TextError(
            f"Evaluation needs at least one block of 2 tokens or more, got a shape of {tuple(tokens.shape)}."
        )
    if (suite is not None or canaries) and tokenizer is None:
        raise SuiteError("Scoring a suite needs the tokenizer: pass tokenizer=loaded.tokenizer.")
    # Read (and so checked) before the minutes that the rest takes.
    wanted = {"suite": load_suite(suite)} if suite is not None else {}
    if canaries:
        wanted["canaries"] = load_suite("canaries", limit=CANARIES)

    figures = yield from _text_steps(student, teacher, tokens, batch_size, seed)
    if speed:
        yield Progress(0, 1, "generation speed")
        same = student.model is teacher.model
        rate, other = generation_speed(student, None if same else teacher, tokens)
        figures |= {"tokens_per_second": rate, "teacher_tokens_per_second": rate if same else other}

    record = teacher_record.teacher_record() if isinstance(teacher_record, Evaluation) else teacher_record or {}
    same = shared_prefix(student, teacher) == len(student) == len(teacher)
    for name, asked in wanted.items():
        mine = yield from suite_steps(student, tokenizer, asked, cache=cache)
        theirs = mine if same else _recorded(record.get(f"teacher_{name}"), asked)
        if theirs is None:
            theirs = yield from suite_steps(teacher, tokenizer, asked, cache=cache)
        figures |= {name: mine, f"teacher_{name}": theirs}
    return Evaluation(
        **figures,
        text={} if blocks is tokens else {n: getattr(blocks, n) for n in ("source", "split", "fingerprint")},
        layers=len(student),
        teacher_layers=len(teacher),
        **_sizes(student, ""),
        **_sizes(teacher, "teacher_"),
        seconds=time.perf_counter() - start,
    )


def evaluate(
    student: LayerStack, teacher: LayerStack, blocks: TextBlocks | Tensor, *, show: bool | None = None, **options: Any
) -> Evaluation:
    """Evaluate a student against its teacher; `evaluate_steps` says what the options are."""
    return drive(evaluate_steps(student, teacher, blocks, **options), desc="evaluate", show=show)


@torch.no_grad()
def both_final(student: LayerStack, teacher: LayerStack, batch: Any) -> tuple[Tensor, Tensor, Trunk]:
    """Final hidden states of student and teacher, their common bottom layers run once.

    Parameters
    ----------
    batch : Tensor [B, T] of token ids, or a mapping with an attention mask

    Returns
    -------
    student's h[L], teacher's h[L] : Tensor [B, T, d], pre-norm
        One and the same tensor where the two do not differ.
    trunk : Trunk
        The teacher's.
    """
    common = shared_prefix(student, teacher)
    theirs = teacher.trunk(batch)
    if common == 0:
        return student.final(batch), teacher.final(theirs), theirs
    hidden = theirs.h0  # [B, T, d]
    for position in range(common):
        hidden = teacher.run(position, hidden, theirs)
    ours, reference = hidden, hidden
    for position in range(common, len(teacher)):
        reference = teacher.run(position, reference, theirs)
    if common < len(student):
        mine = student.trunk(batch)
        for position in range(common, len(student)):
            ours = student.run(position, ours, mine)
    return ours, reference, theirs


@torch.no_grad()
def _text_steps(student, teacher, tokens: Tensor, batch_size: int, seed: int) -> Work[dict[str, Any]]:
    """The figures of an `Evaluation` that text gives."""
    sums = np.zeros((tokens.shape[0], 5))  # per block: tokens; sums of NLL, the teacher's NLL, KL, same top token
    for start in range(0, tokens.shape[0], batch_size):
        batch = tokens[start : start + batch_size].long()  # [B, T]
        ours, reference, trunk = both_final(student, teacher, batch)
        target = trunk.input_ids[:, 1:]
        # Of a model over several devices the last layer's may be another than the input's.
        same, reference = ours is reference, reference.to(target.device)
        ours = reference if same else ours.to(target.device)
        figures = in_fp64(torch.zeros(len(batch), 5, device=target.device))
        for part in torch.arange(target.numel(), device=target.device).split(CHUNK):
            row, column = part // target.shape[1], part % target.shape[1]
            mine = None if same else ours[row, column]  # [P, d]
            found = _beside_teacher(student, teacher, mine, reference[row, column], target[row, column])
            figures.index_add_(0, row, found)
        sums[start : start + len(batch)] = figures.cpu().numpy()
        count, nll, teacher_nll, kl, agreed = sums.sum(0).tolist()
        note = f"text: perplexity {math.exp(nll / count):.2f}, KL {kl / count:.4f}"
        yield Progress(start + len(batch), len(tokens), note)
    low, high = _kl_interval(sums[:, 3] / sums[:, 0], sums[:, 0], seed)
    return {
        "perplexity": math.exp(nll / count),
        "teacher_perplexity": math.exp(teacher_nll / count),
        "kl": kl / count,
        "kl_low": low,
        "kl_high": high,
        "agreement": agreed / count,
        "tokens": int(count),
    }


def _beside_teacher(student, teacher, mine: Tensor | None, theirs: Tensor, gold: Tensor) -> Tensor:
    """Figures [P, 5] of P positions, in fp64 where the device has it.

    `mine` and `theirs` are final hidden states [P, d]; `mine` is None where the two are one.
    """
    logp = log_probabilities(wide(teacher.logits(theirs).to(gold.device)))  # [P, V]
    nll = -logp.gather(1, gold[:, None])[:, 0]
    one = torch.ones_like(nll)
    if mine is None:
        return in_fp64(torch.stack([one, nll, nll, one * 0, one], dim=1))
    logq = log_probabilities(wide(student.logits(mine).to(gold.device)))
    same = (logq.argmax(-1) == logp.argmax(-1)).to(nll.dtype)
    figures = [one, -logq.gather(1, gold[:, None])[:, 0], nll, kl_per_token(logp, logq), same]
    return in_fp64(torch.stack(figures, dim=1))


def _kl_interval(kl: np.ndarray, counts: np.ndarray, seed: int) -> tuple[float, float]:
    """95% interval of the mean of `kl` [N] of N blocks; of few, as wide as Student's t."""
    whole = np.average(kl, weights=counts)
    if len(kl) == 1:
        return float(whole), float(whole)
    draws = means(resamples(len(kl), seed), kl[:, None], counts)
    low, high = whole + (percentiles(draws, (2.5, 97.5))[:, 0] - whole) * expansion(len(kl), 0.025)
    return max(0.0, float(low)), float(high)


def _sizes(stack: LayerStack, prefix: str) -> dict[str, int]:
    parameters = list(stack.model.parameters())
    return {
        f"{prefix}parameters": sum(p.numel() for p in parameters),
        f"{prefix}bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


def _recorded(kept: Any, suite: Any) -> SuiteResult | None:
    """The teacher's kept result, where it stands for the same tasks."""
    result = SuiteResult.from_dict(kept) if kept else None
    return result if result is not None and result.fingerprint == suite.fingerprint else None
