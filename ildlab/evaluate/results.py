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
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pandas as pd

from ildlab.errors import SuiteError
from ildlab.stats import interval, means, resamples


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval; NaN ends where the examples say nothing of their spread."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: np.ndarray, *tasks: TaskResult) -> Estimate:
        """Interval of bootstrap `draws` [draws] over the examples of tasks.

        Each task has n - 1 degrees of freedom.
        """
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
    """What one task found.

    Attributes
    ----------
    name, kind, measure : str
    values : list of float
        The measure, example by example.
    weights : list of float or None
        How much each example counts (bits per byte: its bytes); None: all alike.
    chance : float
        Score of a guesser; of a loss, that of a model that knows nothing.
    direction : {"higher", "lower"}
        Whether a higher score is better.
    weight : float
        In the aggregate.
    others : dict of str to float
        Means of the task's other measures.
    truncated : int
        Contexts that were cut from the left to fit the model's window.
    """

    name: str
    kind: str
    measure: str
    values: list[float]
    weights: list[float] | None = None
    chance: float = 0.0
    direction: str = "higher"
    weight: float = 1.0
    others: dict[str, float] = field(default_factory=dict)
    truncated: int = 0

    @property
    def n(self) -> int:
        """Examples."""
        return len(self.values)

    @property
    def score(self) -> float:
        """Mean of the measure over examples (bits per byte: of all text together)."""
        return float(np.average(self.values, weights=self.weights))

    @property
    def share(self) -> float:
        """Score from 0 to 1, higher = better, not corrected for chance."""
        return float(self.oriented(self.score))

    @property
    def corrected(self) -> float:
        """Score with chance at 0 and the best possible at 1."""
        return float(self.oriented(self.score, corrected=True))

    def oriented(self, score: Any, corrected: bool = False) -> Any:
        """Map scores of this task (numbers or arrays) to higher = better."""
        if self.direction == "lower":
            return 1 - np.asarray(score) / self.chance
        return (np.asarray(score) - self.chance) / (1 - self.chance) if corrected else np.asarray(score)

    def resampled(self, seed: int) -> np.ndarray:
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
    """What a suite found of one model.

    Attributes
    ----------
    name : str
    fingerprint : str
        Of the tasks and their rows: results compare only where it is the same.
    tasks : dict of str to TaskResult
    seconds : float
    notes : list of str
        What a person should know, such as contexts that did not fit the window.
    """

    name: str
    fingerprint: str
    tasks: dict[str, TaskResult]
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

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

    def resampled(self, corrected: bool = False, seed: int = 0) -> np.ndarray:
        """Aggregates [draws] of bootstrap samples; the same examples for the same seed."""
        draws = {
            name: task.oriented(task.resampled(seed + 7919 * number), corrected)
            for number, (name, task) in enumerate(self.tasks.items())
        }
        return self._mean(lambda task: draws[task.name])

    def interval(self, corrected: bool = False, seed: int = 0) -> Estimate:
        """Aggregate with its interval."""
        value = self.aggregate_corrected if corrected else self.aggregate
        return Estimate.of(value, self.resampled(corrected, seed), *self.tasks.values())

    @property
    def table(self) -> pd.DataFrame:
        """One row a task: score, its interval, chance, corrected score, examples."""
        rows = []
        for number, task in enumerate(self.tasks.values()):
            found = asdict(task.interval(7919 * number))
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
        body = table.to_html(border=0, float_format="{:.3f}".format, index_names=False)
    return f"<div role='group' aria-label='{label}'>{html.escape(caption)}{body}</div>"


def quality_loss(student: SuiteResult, teacher: SuiteResult, *, corrected: bool = False, seed: int = 0) -> Estimate:
    """Share of the teacher's aggregate that the student has lost, 1 - student / teacher.

    Parameters
    ----------
    student, teacher : SuiteResult
        Of the same suite.
    corrected : bool
        Use chance-corrected scores: a student that guesses has then lost all of it. The paper's own
        form does not.
    seed : int
        Of the paired bootstrap.

    Returns
    -------
    Estimate
        NaN where the teacher's *corrected* aggregate is not above 0: it guesses.

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
    if theirs <= 0:
        if not corrected:
            raise SuiteError(
                f"The teacher's aggregate on {teacher.name} is {theirs:.3f}: there is no quality to lose. Use a suite "
                "that the teacher can do."
            )
        return Estimate(math.nan, math.nan, math.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = 1 - student.resampled(corrected, seed) / teacher.resampled(corrected, seed)
    return Estimate.of(1 - mine / theirs, draws, *student.tasks.values())


def compare(**results: SuiteResult) -> pd.DataFrame:
    """Scores task by task, a column a model, the aggregates last; for each but the first its change.

    Examples
    --------
    >>> compare(teacher=a, pruned=b, distilled=c)  # doctest: +SKIP
    """
    table = pd.DataFrame({name: {t.name: t.score for t in r.tasks.values()} for name, r in results.items()})
    for label, of in (("aggregate", "aggregate"), ("aggregate, corrected", "aggregate_corrected")):
        table.loc[label] = [getattr(result, of) for result in results.values()]
    first, *rest = results
    for name in rest:
        table[f"{name} - {first}"] = table[name] - table[first]
    return table.rename_axis("task")
