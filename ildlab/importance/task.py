"""`measure(metric="task")`: how much a suite's aggregate drops without each layer, exactly.

All requests of the suite go down the trunk-shared sweep of `ildlab.importance.ablation`, in the same batches that
`ildlab.evaluate.suites` scores a model in, so that each number is the one of a model with the layer removed. The
head is computed at continuation positions alone.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch

from ildlab.errors import MeasureError
from ildlab.evaluate.loglikelihood import Outcomes, batch_tokens, largest_tree, model_inputs, read_out, window
from ildlab.evaluate.packing import make_batches
from ildlab.evaluate.suites import load_suite
from ildlab.importance.ablation import MAX_BRANCH_BYTES, branches
from ildlab.importance.scores import LayerScores
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress
from ildlab.stats import t_quantile

FIRST = 1 / 16  # share of the examples that a race scores without every layer


@torch.no_grad()
def task_steps(
    student: LayerStack,
    *,
    suite: Any,
    tokenizer: Any = None,
    race: bool = False,
    limit: int | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    tie: float = 0.005,
    max_branch_bytes: int = MAX_BRANCH_BYTES,
) -> Generator[Progress, None, LayerScores]:
    """Score each layer by the drop of the suite's aggregate when it is skipped.

    Parameters
    ----------
    student : LayerStack
    suite : str or Suite
        What `ildlab.evaluate.suites.load_suite` takes; every task must be decided by log-likelihoods.
    tokenizer
        The student's.
    race : bool
        Score the suite in growing parts (1/16, 1/16, 1/8, 1/4, 1/2), each with examples of all tasks, and
        after each part drop the layers that are surely more important than the least important one
        (one-sided t on paired per-example differences, `confidence` for all layers together, Bonferroni),
        and, where more than half are left, the worse half (successive halving, Jamieson and Talwalkar
        2016). Right and wrong say little about a layer on a few examples, so halves are told by the sum
        of two ranks: drop of the aggregate, and log-likelihood that the right answers lose.
    limit : int, optional
        Rows a task.
    seed : int
        Order of the examples in a race.
    confidence : float
    tie : float
        A race also ends when all layers left surely lie within `tie` (of the aggregate) of the best.
    max_branch_bytes : int
        Memory for the branches' hidden states.

    Returns
    -------
    LayerScores
        One "sequence" an example: aggregate of the whole student minus that without the layer, so
        that the weighted mean is the drop of the aggregate. `details["whole"]` is the student's own
        aggregate, `details["truncated"]` the contexts that lost their beginning, by task, and
        `details["layer_passes"]` the work: layers run, in tokens, over the tokens of the suite.

    Raises
    ------
    MeasureError
        No tokenizer, a task that has to generate text, or a log-likelihood that is NaN or infinite.
    """
    started = time.perf_counter()
    if tokenizer is None:
        raise MeasureError("The metric 'task' needs the tokenizer: pass tokenizer=loaded.tokenizer.")
    suite = load_suite(suite, limit=limit)
    if not suite.swept:
        raise MeasureError(
            f"The metric 'task' scores log-likelihoods, but lm-eval runs {suite.name} by itself. Use a suite of your "
            "own rows, such as 'mini7'."
        )
    plan = suite.plan(tokenizer, window(student, tokenizer))
    job = _Sweep(student, plan, max_branch_bytes)
    rng = np.random.default_rng(seed)
    parts = _parts(plan, rng) if race else [np.arange(plan.examples)]
    dropped, stopped, seen = {}, "every example was scored", np.zeros(plan.examples, bool)
    alive, scores = student.layer_ids, None
    for number, part in enumerate(parts):
        for done, total in job.run(part, alive):
            note = f"part {number + 1} of {len(parts)}, {len(alive)} layers" if race else suite.name
            yield Progress(int(seen.sum() * total + done * len(part)), plan.examples * total, note, scores)
        seen[part] = True
        details = {
            "suite": suite.name,
            "suite_fingerprint": suite.fingerprint,
            "race": race,
            "seed": seed,
            "whole": float(job.weights[seen] @ job.whole[seen] / job.weights[seen].sum()),
            "layer_passes": job.passes / max(job.tokens, 1),
            "dropped": dropped,
            "truncated": plan.truncated,
        }
        scores = _scores(job, suite, seen, confidence, details, time.perf_counter() - started)
        if not race:
            break
        gone = leavers(job, seen, alive, confidence)
        dropped.update({str(layer_id): int(seen.sum()) for layer_id in gone})
        alive = [i for i in alive if i not in gone]
        if len(alive) == 1 or _tied(job, seen, alive, confidence, tie):
            stopped = "one layer is left" if len(alive) == 1 else f"{len(alive)} layers lie within {tie:g}"
            break
    scores.details["stopped"] = stopped
    return scores


class _Sweep:
    """Values of each example, whole and without each layer; filled part by part."""

    def __init__(self, student: LayerStack, plan, max_branch_bytes: int):
        self.student, self.plan, self.limit = student, plan, max_branch_bytes
        self.layer_ids = student.layer_ids
        self.weights = plan.example_weights()
        self.whole = np.full(plan.examples, np.nan)
        self.without = np.full((plan.examples, len(self.layer_ids)), np.nan)
        self.lost = np.full_like(self.without, np.nan)  # log-likelihood of the right answer, per example
        self.owner = np.asarray(plan.example_of_request())
        self.outcomes = {i: Outcomes.empty(plan.encoded) for i in (None, *self.layer_ids)}
        self.passes = self.tokens = 0

    def run(self, part: np.ndarray, alive: Sequence[int]):
        """Score these examples for these layers; yields (batches done, batches)."""
        student = self.student
        chosen = np.flatnonzero(np.isin(self.owner, part))
        batches = make_batches(
            [self.plan.encoded[i] for i in chosen],
            [self.plan.groups[i] for i in chosen],
            largest_tree=largest_tree(student),
            tokens_per_batch=batch_tokens(student),
        )
        for done, batch in enumerate(batches, 1):
            batch.requests = chosen[batch.requests]
            final: dict[int, torch.Tensor] = {}

            def on_trunk(position: int, _: int, hidden: torch.Tensor, final=final) -> None:
                final[0] = hidden  # the last one is the whole student's

            def count(passes: int, size: int = batch.tokens) -> None:
                self.passes += passes * size

            self.tokens += batch.tokens
            trunk = student.trunk(model_inputs(student, batch))
            waves = branches(
                student,
                [trunk],
                alive,
                reach=len(student),
                on_trunk=on_trunk,
                count=count,
                max_branch_bytes=self.limit,
            )
            for layer_ids, hidden in waves:
                for layer_id, (state,) in zip(layer_ids, hidden):
                    read_out(student, batch, state, self.outcomes[layer_id])
            read_out(student, batch, final[0], self.outcomes[None])
            yield done, len(batches)
        if not self.outcomes[None].finite(chosen):
            raise MeasureError(
                "A log-likelihood of the whole student is not a finite number: the model overflows. "
                "Load it in float32 or bfloat16."
            )
        self.whole[part] = self._values(None)[part]
        for layer_id in alive:
            column = self.layer_ids.index(layer_id)
            if not self.outcomes[layer_id].finite(chosen):
                raise MeasureError(
                    f"Without layer {layer_id} a log-likelihood is not a finite number: the model overflows. "
                    "Load it in float32 or bfloat16."
                )
            self.without[part, column] = self._values(layer_id)[part]
            change = self.outcomes[None].loglikelihood - self.outcomes[layer_id].loglikelihood
            sums = np.bincount(self.owner[chosen], change[chosen] * self.plan.is_gold()[chosen], len(self.whole))
            self.lost[part, column] = sums[part]

    def _values(self, layer_id: int | None) -> np.ndarray:
        return self.plan.example_values(self.outcomes[layer_id])


def _parts(plan, rng: np.random.Generator) -> list[np.ndarray]:
    """Split the examples into parts of 1/16, 1/16, 1/8, 1/4 and 1/2, each with its share of every task."""
    ends = np.array([FIRST, 2 * FIRST, 4 * FIRST, 8 * FIRST, 1.0])
    parts: list[list[np.ndarray]] = [[] for _ in ends]
    for rows in plan.task_rows():
        order = rng.permutation(rows)
        cuts = np.ceil(ends * len(order)).astype(int)
        for part, piece in zip(parts, np.split(order, cuts[:-1])):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts if any(len(piece) for piece in part)]


def _scores(job: _Sweep, suite, seen: np.ndarray, confidence: float, details: dict, seconds: float) -> LayerScores:
    drop = job.whole[:, None] - job.without
    return LayerScores.from_samples(
        "task",
        f"suite {suite.name}, {int(seen.sum())} examples",
        job.layer_ids,
        drop[seen],
        job.weights[seen],
        seconds=seconds,
        confidence=confidence,
        details=details,
    )


def _gaps(job: _Sweep, seen: np.ndarray, alive: Sequence[int], confidence: float):
    """Weighted mean of each layer's paired difference to the best, and its one-sided bound."""
    columns = [job.layer_ids.index(i) for i in alive]
    x, w = -job.without[np.ix_(seen, columns)], job.weights[seen]
    mean = w @ x / w.sum()
    best = int(mean.argmin())
    gap = x - x[:, [best]]
    above = mean - mean[best]
    share = w / w.sum()
    # Variance of a weighted mean of independent examples.
    spread = np.sqrt((share[:, None] ** 2 * (gap - above) ** 2).sum(0) * len(w) / (len(w) - 1)) + 1e-12
    bound = t_quantile(1 - (1 - confidence) / max(1, len(columns) - 1), len(w) - 1) * spread
    return above, bound, best, columns


def leavers(job: Any, seen: np.ndarray, alive: Sequence[int], confidence: float) -> set[int]:
    """Layers that a race drops after the examples `seen`: what is surely worse, and the worse half."""
    above, bound, best, columns = _gaps(job, seen, alive, confidence)
    drop = above - bound > 0
    lost = np.nanmean(job.lost[np.ix_(seen, columns)], axis=0)
    worse_first = np.argsort(-(_ranks(above) + _ranks(lost)), kind="stable")
    keep = max(1, (len(columns) + 1) // 2)
    for place in worse_first:
        if len(drop) - drop.sum() <= keep:
            break
        drop[place] |= place != best
    drop[best] = False
    return {i for i, gone in zip(alive, drop) if gone}


def _ranks(values: np.ndarray) -> np.ndarray:
    """Average ranks: equal values share theirs."""
    order = np.sort(values)
    return (np.searchsorted(order, values, "left") + np.searchsorted(order, values, "right")) / 2


def _tied(job: _Sweep, seen, alive, confidence: float, tie: float) -> bool:
    above, bound, best, _ = _gaps(job, seen, alive, confidence)
    within = above + bound <= tie
    within[best] = True
    return bool(within.all())
