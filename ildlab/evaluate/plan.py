"""All requests of a suite as one list, and the way back from their outcomes to each task's examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ildlab.evaluate.loglikelihood import Outcomes
from ildlab.evaluate.packing import Encoded
from ildlab.evaluate.tasks import Task, measures, requests


@dataclass
class Plan:
    """All requests of a suite in one list, so that batches mix tasks of like length.

    Attributes
    ----------
    tasks : tuple of Task
    encoded : list of Encoded
    groups : list of int
        The example that each request belongs to, counted through all tasks.
    owners : dict of str to list of int
        For each task, the row of each of its requests.
    truncated : dict of str to int
        Examples of each task whose context was cut from the left to fit the window.
    """

    tasks: tuple[Task, ...]
    encoded: list[Encoded]
    groups: list[int]
    owners: dict[str, list[int]]
    truncated: dict[str, int]

    @classmethod
    def of(cls, tasks: Sequence[Task], tokenizer: Any, length: int) -> Plan:
        """Encode the requests of tasks for a model's window of `length` tokens."""
        plan = cls(tuple(tasks), [], [], {}, {})
        first = 0
        for task in plan.tasks:
            encoded, owner = requests(task, tokenizer, length)
            plan.encoded += encoded
            plan.groups += [first + row for row in owner]
            plan.owners[task.name] = owner
            plan.truncated[task.name] = len({row for row, one in zip(owner, encoded) if one.truncated})
            first += len(task.rows)
        return plan

    def measures(self, outcomes: Outcomes) -> dict[str, dict[str, np.ndarray]]:
        """Split outcomes up into each task's measures."""
        found, start = {}, 0
        for task in self.tasks:
            part = slice(start, start + len(self.owners[task.name]))
            of_task = Outcomes(outcomes.loglikelihood[part], outcomes.matched[part], outcomes.length[part])
            found[task.name] = measures(task, self.owners[task.name], of_task)
            start = part.stop
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
        """Index of the example that each request belongs to, [requests]."""
        return np.asarray(self.groups)

    def is_gold(self) -> np.ndarray:
        """1 where a request is the right answer of its example, else 0; [requests]."""
        owner = self.example_of_request()
        gold = np.array([row.get("gold", 0) for task in self.tasks for row in task.rows])  # [examples]
        place = np.arange(len(owner)) - np.searchsorted(owner, owner)  # of each request among its example's
        return (place == gold[owner]).astype(float)

    def example_weights(self) -> np.ndarray:
        """Weights [examples] with which the mean of `example_values` is the suite's aggregate; they sum to 1."""
        parts = [np.full(len(task.rows), task.weight / len(task.rows)) for task in self.tasks]
        return np.concatenate(parts) / sum(task.weight for task in self.tasks)

    def example_values(self, outcomes: Outcomes) -> np.ndarray:
        """Score [examples] of each example; without meaning where its requests were not scored."""
        found = self.measures(outcomes)
        return np.concatenate([found[task.name][task.measure] for task in self.tasks])
