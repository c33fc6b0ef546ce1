"""Results of a suite, their mean, and how much of the teacher's quality a student has lost.

Two readings of every score, both higher = better:

- *score share*: the score itself, as in the paper (arXiv 2511.05085 averages raw task scores); a loss s
  whose worst value is `chance` counts as 1 - s / chance.
- *corrected*: (s - chance) / (best - chance), 0 for a guesser, as in the Open LLM Leaderboard.

Intervals are bootstraps over examples, drawn within each task (and, for a student beside its teacher, the same
examples for both), as wide as Student's t asks for where examples are few.
"""

from __future__ import annotations

import html
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import pandas as pd

from ildlab.errors import SuiteError
from ildlab.stats import interval, means, resamples

SEED_STEP = 7919  # so that each task of a suite is resampled by draws of its own


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval; NaN ends where the examples say nothing of their spread."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: np.ndarray, *tasks: TaskResult) -> Estimate:
        """Interval of bootstrap `draws` [draws] over the examples of tasks, of n - 1 degrees of freedom each."""
        freedom = sum(task.n - 1 for task in tasks)
        if math.isnan(value) or freedom < 1:
            return cls(float(value), math.nan, math.nan)
        # `resampled` has widened each task by its own n / (n - 1); `interval` would do so once more for all of them.
        draws = value + (draws - value) * math.sqrt(freedom / (freedom + 1))
        return cls(float(value), *(float(bound) for bound in interval(value, draws, freedom + 1)))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass
class TaskResult:
    """What one task found."""

    name: str
    kind: str
    measure: str
    values: list[float]  # the measure, example by example
    weights: list[float] | None = None  # how much each example counts (bits per byte: its bytes); None: all alike
    chance: float = 0.0  # score of a guesser; of a loss, that of a model that knows nothing
    direction: str = "higher"  # or "lower": which scores are better
    weight: float = 1.0  # in the aggregate
    truncated: int = 0  # contexts that were cut from the left to fit the model's window

    @property
    def n(self) -> int:
        """Examples."""
        return len(self.values)

    @property
    def score(self) -> float:
        """Weighted mean of the values."""
        return float(np.average(self.values, weights=self.weights))

    @property
    def share(self) -> float:
        """Score share."""
        return float(self.oriented(self.score))

    @property
    def corrected(self) -> float:
        """Corrected score."""
        return float(self.oriented(self.score, corrected=True))

    def oriented(self, score: Any, corrected: bool = False) -> Any:
        """Scores of this task (numbers or arrays) as shares, or corrected for chance."""
        score = np.asarray(score)
        if self.direction == "lower":
            return 1 - score / self.chance
        return (score - self.chance) / (1 - self.chance) if corrected else score

    def resampled(self, seed: int = 0) -> np.ndarray:
        """Scores [draws] of bootstrap samples of the examples, spread as the mean of n values is."""
        weights = np.ones(self.n) if self.weights is None else np.asarray(self.weights)
        draws = means(resamples(self.n, seed), np.asarray(self.values, float)[:, None], weights)[:, 0]
        # Resampling divides by n where the spread of a mean asks for n - 1.
        return self.score + (draws - self.score) * math.sqrt(self.n / max(self.n - 1, 1))

    def interval(self, seed: int = 0) -> Estimate:
        """Score with its interval."""
        return Estimate.of(self.score, self.resampled(seed), self)


@dataclass
class SuiteResult:
    """What a suite found of one model."""

    name: str
    fingerprint: str  # of the tasks and their rows: results compare only where it is the same
    tasks: dict[str, TaskResult]
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)  # for a person, such as contexts that did not fit the window

    @property
    def aggregate(self) -> float:
        """Weighted mean of the tasks' score shares."""
        return self._mean(lambda task: task.share)

    @property
    def aggregate_corrected(self) -> float:
        """Weighted mean of the tasks' chance-corrected scores."""
        return self._mean(lambda task: task.corrected)

    def _mean(self, of) -> Any:
        total = sum(task.weight for task in self.tasks.values())
        return sum(task.weight * of(task) for task in self.tasks.values()) / total

    def after(self, rows: int) -> SuiteResult:
        """The same without the first `rows` examples of each task, such as those by which layers were chosen."""
        tasks = {}
        for name, task in self.tasks.items():
            if not 0 <= rows < task.n:
                raise SuiteError(
                    f"{self.name}: task {name} has {task.n} examples; none is left after the first {rows}."
                )
            tasks[name] = replace(task, values=task.values[rows:], weights=task.weights and task.weights[rows:])
        return replace(self, fingerprint=f"{self.fingerprint} after {rows}", tasks=tasks)

    def resampled(self, corrected: bool = False) -> np.ndarray:
        """Aggregates [draws] of bootstrap samples: the same examples at every call."""
        seeds = {name: SEED_STEP * number for number, name in enumerate(self.tasks)}
        return self._mean(lambda task: task.oriented(task.resampled(seeds[task.name]), corrected))

    def interval(self, corrected: bool = False) -> Estimate:
        """Aggregate with its interval."""
        value = self.aggregate_corrected if corrected else self.aggregate
        return Estimate.of(value, self.resampled(corrected), *self.tasks.values())

    @property
    def table(self) -> pd.DataFrame:
        """One row a task: score, its interval, chance, corrected score, examples."""
        rows = []
        for number, task in enumerate(self.tasks.values()):
            found = asdict(task.interval(SEED_STEP * number))
            rows.append([task.name, task.measure, *found.values(), task.chance, task.corrected, task.n])
        columns = ["task", "measure", "score", "low", "high", "chance", "corrected", "n"]
        return pd.DataFrame(rows, columns=columns).set_index("task")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; values to 6 digits."""
        tasks = [asdict(task) for task in self.tasks.values()]
        for task in tasks:
            task["values"] = [float(f"{value:.6g}") for value in task["values"]]
        means = {"aggregate": self.aggregate, "aggregate_corrected": self.aggregate_corrected}
        return {**asdict(self), **means, "tasks": tasks}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> SuiteResult:
        """Inverse of `to_dict`."""
        known = {each.name for each in fields(TaskResult)}
        tasks = {task["name"]: TaskResult(**{k: v for k, v in task.items() if k in known}) for task in record["tasks"]}
        return cls(record["name"], record["fingerprint"], tasks, record["seconds"], list(record["notes"]))

    def __repr__(self) -> str:
        return f"SuiteResult({self.name}, {len(self.tasks)} tasks, aggregate {self.interval()}, {self.seconds:.0f} s)"

    def _repr_html_(self) -> str:
        caption = f"{self.name}: aggregate {self.interval()}, corrected for chance {self.interval(True)}"
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self.notes)
        return html_table(self.table, "Suite result", f"{caption}, {self.seconds:.0f} s") + notes


def html_table(table: pd.DataFrame, label: str, caption: str) -> str:
    """A table as HTML, its texts escaped, with a label for screen readers."""
    with pd.option_context("display.max_colwidth", None):
        named = table.rename_axis(index=None, columns=table.index.name or "figure")  # no heading is empty
        body = named.to_html(border=0, float_format="{:.3f}".format)
    return f"<div role='group' aria-label='{label}'>{html.escape(caption)}{body}</div>"


def quality_loss(student: SuiteResult, teacher: SuiteResult, *, corrected: bool = False) -> Estimate:
    """Share of the teacher's aggregate that the student has lost, 1 - student / teacher, by a paired bootstrap.

    With `corrected` (for chance; the paper's own form is not) a student that guesses has lost all of it; NaN where
    the teacher guesses too.

    Raises
    ------
    SuiteError
        The results are not of the same tasks, or the teacher's aggregate is not above 0.
    """
    if student.fingerprint != teacher.fingerprint:
        raise SuiteError(
            f"Results of {student.name} and {teacher.name} are not of the same tasks and rows: "
            "score student and teacher on one suite."
        )
    form = "aggregate_corrected" if corrected else "aggregate"
    mine, theirs = getattr(student, form), getattr(teacher, form)
    if theirs <= 0 and corrected:
        return Estimate(math.nan, math.nan, math.nan)
    if theirs <= 0:
        raise SuiteError(
            f"The teacher's aggregate on {teacher.name} is {theirs:.3f}: there is no quality to lose. Use a suite "
            "that the teacher can do."
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = 1 - student.resampled(corrected) / teacher.resampled(corrected)
    return Estimate.of(1 - mine / theirs, draws, *student.tasks.values())


def compare(**results: SuiteResult) -> pd.DataFrame:
    """Scores task by task, a column a model, the aggregates last; for each but the first its change."""
    table = pd.DataFrame({name: {t.name: t.score for t in r.tasks.values()} for name, r in results.items()})
    for label, of in (("aggregate", "aggregate"), ("aggregate, corrected", "aggregate_corrected")):
        table.loc[label] = [getattr(result, of) for result in results.values()]
    first, *rest = results
    for name in rest:
        table[f"{name} - {first}"] = table[name] - table[first]
    return table.rename_axis("task")
