"""Judge a student: perplexity, distance from the teacher, size, speed, and a suite of tasks.

Student and teacher go down their common bottom layers once. Every figure over the vocabulary is
computed in fp32 log space, a few hundred positions at a time, so that logits never fill the memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ildlab.errors import SuiteError, TextError
from ildlab.evaluate.record import Evaluation
from ildlab.model.capture import Trunk
from ildlab.model.head import in_fp64
from ildlab.model.shared import shared_prefix
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, drive
from ildlab.stats import expansion

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
) -> Generator[Progress, None, Evaluation]:
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
        Measure generation.
    batch_size : int
        Blocks in one pass.
    teacher_record : dict or Evaluation, optional
        An earlier evaluation (or its `teacher_record()`) beside the same teacher: its suite and
        canary scores are taken over where they stand for the same tasks, and its generation speed.
    cache : path, optional
        Folder where suite results are kept by model fingerprint.
    seed : int
        Of the bootstrap.

    Yields
    ------
    Progress

    Returns
    -------
    Evaluation

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
    wanted = []
    if suite is not None or canaries:
        if tokenizer is None:
            raise SuiteError("Scoring a suite needs the tokenizer: pass tokenizer=loaded.tokenizer.")
        from ildlab.evaluate.suites import load_suite

        # Read (and so checked) before the minutes that the rest takes.
        wanted = [("suite", load_suite(suite))] if suite is not None else []
        wanted += [("canaries", load_suite("canaries", limit=CANARIES))] if canaries else []
    record = _as_record(teacher_record)

    sums = np.zeros((tokens.shape[0], 5))
    for done, rows in _text_steps(student, teacher, tokens, batch_size, sums):
        seen = sums[:done].sum(0)
        note = f"perplexity {math.exp(seen[1] / max(seen[0], 1)):.2f}, KL {seen[3] / max(seen[0], 1):.4f}"
        yield Progress(done, tokens.shape[0], f"text: {note}")
    count, nll, teacher_nll, kl, same = sums.sum(0).tolist()
    low, high = _bootstrap_ratio(sums[:, 3], sums[:, 0], seed)

    rate = teacher_rate = None
    if speed:
        from ildlab.evaluate.generation import generation_speed

        yield Progress(0, 1, "generation speed")
        same_model = student.model is teacher.model
        known = record.get("teacher_tokens_per_second")
        rate, teacher_rate = generation_speed(student, None if same_model or known else teacher, tokens)
        teacher_rate = known or (rate if same_model else teacher_rate)

    results: dict[str, Any] = {}
    for name, loaded in wanted:
        from ildlab.evaluate.suites import suite_steps

        results[name] = yield from suite_steps(student, tokenizer, loaded, cache=cache)
        results[f"teacher_{name}"] = _recorded(record.get(f"teacher_{name}"), loaded)
        if results[f"teacher_{name}"] is None:
            same_model = shared_prefix(student, teacher) == len(student) == len(teacher)
            results[f"teacher_{name}"] = (
                results[name] if same_model else (yield from suite_steps(teacher, tokenizer, loaded, cache=cache))
            )
    return Evaluation(
        perplexity=math.exp(nll / count),
        teacher_perplexity=math.exp(teacher_nll / count),
        kl=kl / count,
        kl_low=low,
        kl_high=high,
        agreement=same / count,
        tokens=int(count),
        text={} if blocks is tokens else {n: getattr(blocks, n) for n in ("source", "split", "fingerprint")},
        layers=len(student),
        teacher_layers=len(teacher),
        **_sizes(student, ""),
        **_sizes(teacher, "teacher_"),
        tokens_per_second=rate,
        teacher_tokens_per_second=teacher_rate,
        **results,
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
    hidden = theirs.h0
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
def _text_steps(student, teacher, tokens: Tensor, batch_size: int, sums: np.ndarray):
    """Fill `sums` [N, 5], block by block, with: count, nll, teacher nll, KL, same top token."""
    for start in range(0, tokens.shape[0], batch_size):
        batch = tokens[start : start + batch_size].long()
        ours, reference, trunk = both_final(student, teacher, batch)
        target = trunk.input_ids[:, 1:]
        # Of a model over several devices the last layer's may be another than the input's.
        same, reference = ours is reference, reference.to(target.device)
        ours = reference if same else ours.to(target.device)
        valid = torch.ones_like(target, dtype=torch.bool)
        if trunk.attention_mask is not None:
            valid = (trunk.attention_mask[:, 1:] * trunk.attention_mask[:, :-1]).bool()
        row, column = valid.nonzero(as_tuple=True)
        figures = in_fp64(torch.zeros(batch.shape[0], 5, device=target.device))
        for part in torch.arange(len(row), device=row.device).split(CHUNK):
            r, c = row[part], column[part]
            figures.index_add_(0, r, _position_figures(student, teacher, ours, reference, target, r, c))
        sums[start : start + batch.shape[0]] = figures.cpu().numpy()
        yield start + batch.shape[0], batch.shape[0]


def _position_figures(student, teacher, ours, reference, target, r, c) -> Tensor:
    """Return [P, 5] of one chunk of positions, in fp64 where the device has it."""
    gold = target[r, c][:, None]
    theirs = torch.log_softmax(teacher.logits(reference[r, c]).to(gold.device).float(), -1)
    out = in_fp64(torch.zeros(len(r), 5, device=gold.device))
    out[:, 0] = 1
    out[:, 2] = -theirs.gather(1, gold)[:, 0]
    if ours is reference:  # the whole stack is shared, and so is the tail
        out[:, 1], out[:, 4] = out[:, 2], 1
        return out
    mine = torch.log_softmax(student.logits(ours[r, c]).to(gold.device).float(), -1)
    out[:, 1] = -mine.gather(1, gold)[:, 0]
    out[:, 3] = torch.nn.functional.kl_div(mine, theirs, reduction="none", log_target=True).sum(-1)
    out[:, 4] = mine.argmax(-1) == theirs.argmax(-1)
    return out


def _bootstrap_ratio(values: np.ndarray, counts: np.ndarray, seed: int, samples: int = 1000) -> tuple[float, float]:
    """95% interval of sum(values)/sum(counts) over resampled blocks; of few, as wide as Student's t."""
    rng = np.random.default_rng(seed)
    pick = rng.integers(0, len(values), (samples, len(values)))
    ratios = values[pick].sum(1) / np.maximum(counts[pick].sum(1), 1)
    if len(values) == 1:
        return float(ratios[0]), float(ratios[0])
    whole = values.sum() / max(counts.sum(), 1)
    low, high = whole + (np.quantile(ratios, [0.025, 0.975]) - whole) * expansion(len(values), 0.025)
    return max(0.0, float(low)), float(high)


def _sizes(stack: LayerStack, prefix: str) -> dict[str, int]:
    parameters = list(stack.model.parameters())
    return {
        f"{prefix}parameters": sum(p.numel() for p in parameters),
        f"{prefix}bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


def _as_record(record: dict[str, Any] | Evaluation | None) -> dict[str, Any]:
    if isinstance(record, Evaluation):
        return record.teacher_record()
    return record or {}


def _recorded(kept: Any, suite: Any):
    """The teacher's kept result, where it stands for the same tasks; else None."""
    if not kept:
        return None
    from ildlab.evaluate.results import SuiteResult

    result = SuiteResult.from_dict(kept) if isinstance(kept, dict) else kept
    return result if result.fingerprint == suite.fingerprint else None
