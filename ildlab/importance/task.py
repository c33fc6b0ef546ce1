"""`task`: how much a suite's aggregate drops without each layer.

Two ways, and the first `Progress` says which and at what cost. A suite that is decided by log-likelihoods goes down the
trunk-shared sweep, in the very batches that `ildlab.evaluate.suites` scores a model in, so that each number is that of
a model with the layer removed. Any other (lm-eval's, generation included) is really evaluated without each layer in
turn, which is the procedure of arXiv 2511.05085.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ildlab.errors import MeasureError
from ildlab.evaluate.loglikelihood import (
    Outcomes,
    at_head,
    batch_tokens,
    check_requests,
    largest_tree,
    model_inputs,
    take_in,
    window,
)
from ildlab.evaluate.packing import make_batches
from ildlab.evaluate.plan import Plan
from ildlab.evaluate.results import SuiteResult
from ildlab.evaluate.suites import load_suite, suite_steps
from ildlab.importance.config import MeasureConfig
from ildlab.importance.race import Race
from ildlab.importance.scores import LayerScores
from ildlab.importance.sweep import branches
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, Work, relabel

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of each task's examples, after which a race looks
# What a race looks at for the first time, at least: on fewer examples, right and wrong tell no two layers apart.
LEAST_EXAMPLES, LEAST_OF_TASK = 12, 2


def task_steps(student: LayerStack, config: MeasureConfig, tokenizer: Any) -> Work[LayerScores]:
    """Score each layer by the drop of the suite's aggregate when it is skipped; `MeasureConfig` has the options.

    A race scores the suite in growing parts, each with examples of all tasks, and after each drops what is surely more
    important than the least important layer and, where more than half are left, the worse half: by the drop of the
    aggregate and the log-likelihood that the right answers lose.

    Returns
    -------
    LayerScores
        One "sequence" an example: value of the whole student minus that without the layer, so that the weighted mean
        is the drop of the aggregate. Of its `details`, "way" is "sweep" or "separate evaluations", "whole" the student's
        own aggregate; of a sweep, "truncated" the contexts that lost their beginning, by task.
    """
    suite = load_suite(config.suite, limit=config.limit)
    if suite.swept:
        return (yield from _sweep_steps(student, suite, config, tokenizer))
    if config.race:
        raise MeasureError(
            f"race=True: {suite.name} is evaluated as a whole without each layer, and nothing can stop early. "
            "Use race=False, and limit= to score fewer examples."
        )
    if len(student) < 2:
        raise MeasureError("Without its only layer there is no model left to evaluate.")
    return (yield from _separate_steps(student, suite, config, tokenizer))


# ------------------------------------------------------------------- the sweep


@torch.no_grad()
def _sweep_steps(student: LayerStack, suite: Any, config: MeasureConfig, tokenizer: Any) -> Work[LayerScores]:
    started, depth = time.perf_counter(), len(student)
    plan = suite.plan(tokenizer, window(student, tokenizer))
    check_requests(student, plan.encoded, tokenizer)
    job = TaskSweep(student, plan, config.max_branch_bytes)
    race = Race(student.layer_ids, config.confidence, config.tie)
    parts = parts_of(plan, np.random.default_rng(config.seed)) if config.race else [np.arange(plan.examples)]
    cost = f"sweep of {suite.name}: {'at most ' * config.race}the layers of {(depth + 1) / 2:g} evaluations"
    yield Progress(0, plan.examples, f"{cost}, the head of {depth + 1}")
    scores, seen = None, np.zeros(plan.examples, bool)
    for number, part in enumerate(parts, 1):
        for done, total in job.run(part, race.alive):
            note = f"part {number} of {len(parts)}, {len(race.alive)} layers" if config.race else suite.name
            yield Progress(int(seen.sum() + done / total * len(part)), plan.examples, note, scores)
        seen[part] = True
        if config.race:
            job.look(race, seen)
        details = {"way": "sweep", "whole": float(np.average(job.whole[seen], weights=job.weights[seen]))}
        details |= {"truncated": plan.truncated, "dropped": race.dropped}
        details["stopped"] = race.stopped if race.over else "every example was scored"
        drops = (job.whole[:, None] - job.without)[seen]  # [E, L] -> [examples seen, L]
        scores = _scores(student, suite, config, drops, job.weights[seen], started, details)
        if race.over:
            break
    return scores


def _scores(student: LayerStack, suite: Any, config: MeasureConfig, drops, weights, started, details) -> LayerScores:
    """LayerScores of drops [E, L] and weights [E], with what both ways tell of suite and options."""
    source, seconds = f"suite {suite.name}, {len(drops)} examples", time.perf_counter() - started
    details = config.told() | {"suite": suite.name, "suite_fingerprint": suite.fingerprint} | details
    some = {"seconds": seconds, "confidence": config.confidence, "details": details}
    return LayerScores.from_samples("task", source, student.layer_ids, drops, weights, **some)


def parts_of(plan: Plan, rng: np.random.Generator) -> list[np.ndarray]:
    """Split the examples into the parts of a race, each with its share of every task."""
    parts: list[np.ndarray] = []
    tasks = [rng.permutation(rows) for rows in plan.task_rows()]
    taken = [0] * len(tasks)
    for share in SHARES:
        ends = [int(np.ceil(share * len(rows))) for rows in tasks]
        enough = sum(ends) >= LEAST_EXAMPLES
        enough &= all(end >= min(LEAST_OF_TASK, len(rows)) for end, rows in zip(ends, tasks, strict=True))
        if sum(ends) > sum(taken) and (enough or share == 1):
            pieces = [rows[a:b] for rows, a, b in zip(tasks, taken, ends, strict=True)]
            parts.append(np.sort(np.concatenate(pieces)))
            taken = ends
    return parts


class TaskSweep:
    """Values of each example, whole and without each layer, filled part by part; NaN where it was not scored."""

    def __init__(self, student: LayerStack, plan: Plan, max_branch_bytes: int):
        self.student, self.plan, self.max_branch_bytes = student, plan, max_branch_bytes
        self.layer_ids = student.layer_ids
        self.weights = plan.example_weights()  # [E]
        self.whole = np.full(plan.examples, np.nan)  # [E]
        self.without = np.full((plan.examples, len(self.layer_ids)), np.nan)  # [E, L]
        self.lost = np.full_like(self.without, np.nan)  # log-likelihood of the right answer, per example
        self.owner = np.asarray(plan.example_of_request())  # [R]
        self.outcomes = {i: Outcomes.empty(plan.encoded) for i in (None, *self.layer_ids)}  # None: the whole student

    def run(self, part: np.ndarray, alive: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Score these examples for these layers; yields (batches done, batches)."""
        chosen = np.flatnonzero(np.isin(self.owner, part))
        batches = make_batches(
            [self.plan.encoded[i] for i in chosen],
            [self.plan.groups[i] for i in chosen],
            largest_tree=largest_tree(self.student),
            tokens_per_batch=batch_tokens(self.student),
        )
        for done, batch in enumerate(batches, 1):
            batch.requests = chosen[batch.requests]
            self._run_batch(batch, alive)
            yield done, len(batches)
        self._take(part, chosen, alive)

    @torch.no_grad()
    def _run_batch(self, batch: Any, alive: Sequence[int]) -> None:
        student, final, found = self.student, [], {}

        def on_trunk(position: int, hidden: list[Tensor]) -> None:
            final[:] = hidden  # the last one is the whole student's, [B, T, d]

        trunk = student.trunk(model_inputs(student, batch))
        options = {"max_branch_bytes": self.max_branch_bytes, "reach": len(student)}
        for layer_ids, hidden in branches(student, [trunk], alive, on_trunk=on_trunk, **options):
            for layer_id, (state,) in zip(layer_ids, hidden):
                found[layer_id] = at_head(student, batch, state)  # [3, Q]
        found[None] = at_head(student, batch, final[0])
        for layer_id, each in zip(found, torch.stack([*found.values()]).cpu(), strict=True):  # the one host sync
            take_in(batch, each, self.outcomes[layer_id])

    def _take(self, part: np.ndarray, chosen: np.ndarray, alive: Sequence[int]) -> None:
        """Turn the outcomes of the chosen requests into the values of a part's examples."""
        for layer_id in (None, *alive):
            if not self.outcomes[layer_id].finite(chosen):
                who = "The whole student" if layer_id is None else f"The student without layer {layer_id}"
                raise MeasureError(f"{who} has a log-likelihood that is not finite. Load it in float32 or bfloat16.")
        gold = self.plan.is_gold()[chosen]
        self.whole[part] = self.plan.example_values(self.outcomes[None])[part]
        for layer_id in alive:
            column = self.layer_ids.index(layer_id)
            self.without[part, column] = self.plan.example_values(self.outcomes[layer_id])[part]
            change = self.outcomes[None].loglikelihood[chosen] - self.outcomes[layer_id].loglikelihood[chosen]
            sums = np.bincount(self.owner[chosen], change * gold, len(self.whole))  # [requests] -> [E]
            self.lost[part, column] = sums[part]

    def look(self, race: Race, seen: np.ndarray) -> None:
        """Let a race look at the examples `seen` [E] of bool; with all of them, no half has to go."""
        at = np.ix_(seen, [self.layer_ids.index(i) for i in race.alive])
        halve = None if seen.all() else self.lost[at].mean(0)  # [examples, A] -> [A]
        race.look(-self.without[at], self.weights[seen], halve=halve)


# -------------------------------------------------------- separate evaluations


def _separate_steps(student: LayerStack, suite: Any, config: MeasureConfig, tokenizer: Any) -> Work[LayerScores]:
    started, total = time.perf_counter(), len(student) + 1
    cost = f"{total}, the student's and one without each layer"
    yield Progress(0, total, f"separate evaluations of {suite.name}: {cost}")
    whole = yield from relabel(suite_steps(student, tokenizer, suite), "the whole student", (0, total))
    values, weights = _by_example(whole)
    drops = np.full((len(values), len(student)), np.nan)  # [E, L]; NaN for layers that were not evaluated yet
    details = {"way": "separate evaluations", "whole": whole.aggregate, "notes": whole.notes}
    twin = student.share()  # so that whoever looks at the student meanwhile sees it whole
    scores = None
    for done, layer_id in enumerate(student.layer_ids, 1):
        left = (time.perf_counter() - started) / done * (total - done)
        yield Progress(done, total, f"without layer {layer_id}; about {left:.0f} s to go", scores)
        with twin.without(layer_id):
            work = suite_steps(twin, tokenizer, suite)
            found = yield from relabel(work, f"without layer {layer_id}", (done, total))
        drops[:, done - 1] = values - _by_example(found)[0]
        scores = _scores(student, suite, config, drops, weights, started, details)
    yield Progress(total, total, "", scores)
    return scores


def _by_example(result: SuiteResult) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights [E] of all tasks' examples, whose weighted mean is the aggregate."""
    tasks = result.tasks.values()
    counts = [np.asarray(task.weights or np.ones(task.n), float) for task in tasks]
    weights = np.concatenate([task.weight * own / own.sum() for task, own in zip(tasks, counts, strict=True)])
    return np.concatenate([task.oriented(task.values) for task in tasks]), weights / weights.sum()
