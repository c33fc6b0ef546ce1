"""All requests of a suite as one list, and the way back from their outcomes to each task's examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ildlab.evaluate.loglikelihood import Outcomes
from ildlab.evaluate.packing import Encoded
from ildlab.evaluate.tasks import Task, measures, requests, weights


@dataclass
class Plan:
    """All log-likelihood requests of a suite in one list, so that batches mix tasks of like length.

    Attributes
    ----------
    tasks : list of Task
        Those decided by log-likelihoods.
    encoded : list of Encoded
    groups : list of int
        The example that each request belongs to, counted through all tasks.
    owners : dict of str to list of int
        For each task, the row of each of its requests.
    truncated : dict of str to int
    """

    tasks: list[Task]
    encoded: list[Encoded]
    groups: list[int]
    owners: dict[str, list[int]]
    truncated: dict[str, int]

    @classmethod
    def of(cls, suite: Any, tokenizer: Any, length: int) -> Plan:
        """Encode a suite's requests for a model's window."""
        plan = cls([task for task in suite.tasks if not task.generates], [], [], {}, {})
        first = 0
        for task in plan.tasks:
            encoded, owner = requests(task, tokenizer, length)
            plan.encoded += encoded
            plan.owners[task.name] = owner
            plan.truncated[task.name] = len({o for o, e in zip(owner, encoded) if e.truncated})
            # Windows of one text have nothing in common: each is an example of its own.
            rolling = task.kind == "bits_per_byte"
            plan.groups += [first + (n if rolling else o) for n, o in enumerate(owner)]
            first += len(owner) if rolling else len(task.rows)
        return plan

    def measures(self, outcomes: Outcomes) -> dict[str, dict[str, np.ndarray]]:
        """Split outcomes up into each task's measures."""
        found, start = {}, 0
        for task in self.tasks:
            end = start + len(self.owners[task.name])
            part = Outcomes(outcomes.loglikelihood[start:end], outcomes.matched[start:end], outcomes.length[start:end])
            found[task.name] = measures(task, self.owners[task.name], part)
            start = end
        return found

    # For ablation: one number for each example of all tasks, in order.

    @property
    def examples(self) -> int:
        """Examples of all tasks."""
        return sum(len(task.rows) for task in self.tasks)

    def task_rows(self) -> list[np.ndarray]:
        """Indices of each task's examples among all."""
        ends = np.cumsum([len(task.rows) for task in self.tasks])
        return [np.arange(end - len(task.rows), end) for task, end in zip(self.tasks, ends)]

    def example_of_request(self) -> np.ndarray:
        """Index of the example that each request belongs to."""
        return np.concatenate([rows[self.owners[t.name]] for t, rows in zip(self.tasks, self.task_rows())])

    def is_gold(self) -> np.ndarray:
        """1 where a request is the right answer of its example, else 0."""
        marks = []
        for task in self.tasks:
            owner = np.asarray(self.owners[task.name])
            place = np.arange(len(owner)) - np.searchsorted(owner, owner)
            gold = np.array([task.rows[o].get("gold", -1) for o in owner])
            marks.append((gold < 0) | (place == gold))
        return np.concatenate(marks).astype(float)

    def example_weights(self) -> np.ndarray:
        """Weights [examples] with which the mean of `example_values` is the suite's aggregate; they sum to 1."""
        parts = [task.weight * weights(task) / weights(task).sum() for task in self.tasks]
        return np.concatenate(parts) / sum(task.weight for task in self.tasks)

    def example_values(self, outcomes: Outcomes) -> np.ndarray:
        """Score of each example, higher = better; without meaning where its requests were not scored."""
        found = self.measures(outcomes)
        parts = []
        for task in self.tasks:
            values = found[task.name][task.measure]
            parts.append(1 - values / task.chance if task.direction == "lower" else values)
        return np.concatenate(parts)
