"""Kinds of tasks: what a row asks of the model, and what its answer is worth.

| kind | row | measures (per example) |
| --- | --- | --- |
| `multiple_choice` | `{query, choices, gold}` or `{context_options, continuation, gold}` | `accuracy_raw`, `accuracy_bytes` |
| `cloze` | `{context, continuation}` | `exact` (greedy decoding gives it), `loglikelihood` |
| `copy` | `{context, continuation}` | `prefix` (share of its tokens before the first miss), `exact`, `loglikelihood` |

All are decided by log-likelihoods: greedy decoding would give a continuation exactly where each of its tokens is
the most likely one, so that nothing has to be generated.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ildlab.errors import SuiteError
from ildlab.evaluate.loglikelihood import Outcomes, encode
from ildlab.evaluate.packing import Encoded

# The first is the default. A log-likelihood is no share: it is reported beside the score.
METRICS = {"multiple_choice": ("accuracy",), "cloze": ("exact",), "copy": ("prefix", "exact")}
KINDS = tuple(METRICS)


@dataclass(frozen=True)
class Task:
    """A named list of rows of one kind, and how they are asked and scored.

    Attributes
    ----------
    name, kind : str
    rows : tuple of dict
        Of the kind's shape.
    metric : str
        Which measure is the score; by default the kind's first.
    normalise : {"raw", "bytes"}
        For choices: compare log-likelihoods as they are, or divided by the choice's UTF-8 bytes.
    chance : float
        Score of a guesser.
    weight : float
        In the suite's aggregate.
    fewshot : int
        Solved examples before each prompt: the first of `shots`, else of the task's other rows.
    shots : tuple of dict
    delimiter : str
        Between a prompt and its answer (as lm-eval's `target_delimiter`).
    separator : str
        Between solved examples.
    """

    name: str
    kind: str
    rows: tuple[dict, ...]
    metric: str = ""
    normalise: str = "raw"
    chance: float = 0.0
    weight: float = 1.0
    fewshot: int = 0
    shots: tuple[dict, ...] = ()
    delimiter: str = " "
    separator: str = "\n\n"

    def __post_init__(self):
        problem = ""
        if self.kind not in KINDS:
            problem = f"kind {self.kind!r} does not exist; choose one of {', '.join(KINDS)}"
        elif self.metric and self.metric not in METRICS[self.kind]:
            problem = f"a {self.kind} task has no metric {self.metric!r}, but {' and '.join(METRICS[self.kind])}"
        elif self.normalise not in ("raw", "bytes"):
            problem = f"normalise: {self.normalise!r} is neither raw nor bytes"
        elif not 0 <= self.chance < 1:
            problem = f"chance: {self.chance} is not a share from 0 up to, and without, 1"
        elif self.weight <= 0 or self.fewshot < 0:
            problem = "weight must be above 0, and fewshot not below 0"
        elif not self.rows:
            problem = "it has no rows"
        elif self.fewshot and self.fewshot > self._fewest_shots():
            problem = f"fewshot: {self.fewshot}, but there are only {self._fewest_shots()} examples"
        if problem:
            raise SuiteError(f"Task {self.name!r}: {problem}.")

    def _fewest_shots(self) -> int:
        """Solved examples that the row with the fewest can have: neither itself nor a copy of it."""
        # A row that stands among the shots by chance has one fewer; that is no reason to refuse all the others.
        copies = 0 if self.shots else max(Counter(json.dumps(row, sort_keys=True) for row in self.rows).values())
        return len(self.shots or self.rows) - copies

    def take(self, limit: int) -> Task:
        """Return the task with at most `limit` rows; few-shot examples still come from all of them."""
        shots = self.shots or (self.rows if self.fewshot and limit < len(self.rows) else ())
        return replace(self, rows=self.rows[:limit], shots=shots)

    @property
    def measure(self) -> str:
        """Name of the measure that is the score."""
        metric = self.metric or METRICS[self.kind][0]
        return f"accuracy_{self.normalise}" if metric == "accuracy" else metric

    def prompt(self, index: int, context: str) -> str:
        """Put the few-shot examples of row `index` before its context."""
        if not self.fewshot:  # else every row would be compared with every other, for nothing
            return context
        row = self.rows[index]
        others = (shot for shot in self.shots or self.rows if shot != row)  # nor a copy of it: it holds the answer
        shown = islice(others, self.fewshot)
        return "".join(self._solved(shot) + self.separator for shot in shown) + context

    def _solved(self, row: dict) -> str:
        before, after = options(row)[row.get("gold", 0)]
        return before + self.delimiter + after if before else after


def options(row: dict) -> list[tuple[str, str]]:
    """(context, continuation) pairs of a row: one for each of its choices."""
    if "context_options" in row:
        return [(option, row["continuation"]) for option in row["context_options"]]
    if "choices" in row:
        return [(row["query"], choice) for choice in row["choices"]]
    return [(row["context"], row["continuation"])]


def pairs(task: Task, index: int) -> list[tuple[str, str]]:
    """(prompt, continuation) pairs that decide row `index`, few-shot examples and delimiter included."""
    made = ((task.prompt(index, context), answer) for context, answer in options(task.rows[index]))
    return [(prompt, task.delimiter + answer if prompt else answer) for prompt, answer in made]


def requests(task: Task, tokenizer: Any, max_length: int) -> tuple[list[Encoded], list[int]]:
    """All requests of a task as tokens, and the row that each belongs to.

    Raises
    ------
    SuiteError
        An answer that is longer than the model's window, or has no token; names the task.
    """
    asked = [pairs(task, index) for index in range(len(task.rows))]
    owner = [index for index, made in enumerate(asked) for _ in made]
    try:
        return encode(tokenizer, [pair for made in asked for pair in made], max_length), owner
    except SuiteError as error:
        raise SuiteError(f"Task {task.name!r}: {error}") from error


def measures(task: Task, owner: Sequence[int], outcomes: Outcomes) -> dict[str, np.ndarray]:
    """Every measure of a task, [examples] float64 each, in the order of its rows."""
    if task.kind != "multiple_choice":  # a request a row
        exact = (outcomes.matched == outcomes.length).astype(float)
        found = {"exact": exact, "loglikelihood": outcomes.loglikelihood / outcomes.length}
        return found if task.kind == "cloze" else {"prefix": outcomes.matched / outcomes.length, **found}
    raw, by_bytes = np.empty(len(task.rows)), np.empty(len(task.rows))
    starts = np.searchsorted(owner, np.arange(len(task.rows)))
    for index, (row, start) in enumerate(zip(task.rows, starts)):
        sizes = np.array([len(answer.encode("utf-8")) for _, answer in options(row)], float)
        found = outcomes.loglikelihood[start : start + len(sizes)]
        raw[index] = float(int(found.argmax()) == row["gold"])
        by_bytes[index] = float(int((found / sizes).argmax()) == row["gold"])
    return {"accuracy_raw": raw, "accuracy_bytes": by_bytes}


# -------------------------------------------------------------------- rows

_CHOICE = {"query": str, "choices": list, "gold": int}
_PAIRS = {"context_options": list, "continuation": str, "gold": int}
_PLAIN = {"context": str, "continuation": str}


def check_row(row: Any, where: str, kind: str | None = None) -> tuple[str, dict]:
    """Check a row; return its kind (guessed by its fields, where none is given) and the fields that this kind has.

    Raises
    ------
    SuiteError
        Says what is wrong with the row, and where it stands.
    """
    if not isinstance(row, dict):
        raise SuiteError(f"{where}: a row is a JSON object, not {type(row).__name__}.")
    if kind is None:
        choices = {"query", "choices"} <= row.keys() or "context_options" in row
        kind = "multiple_choice" if choices else "cloze" if row.keys() >= _PLAIN.keys() else None
    if kind is None:
        raise SuiteError(
            f"{where}: the fields {', '.join(row) or '(none)'} are of no known kind. A row is "
            "{query, choices, gold}, {context_options, continuation, gold} or {context, continuation}."
        )
    shape = _PLAIN if kind != "multiple_choice" else _PAIRS if "context_options" in row else _CHOICE
    for problem in _problems(row, shape):  # the first one says enough
        raise SuiteError(f"{where}: {problem}.")
    return kind, {name: row[name] for name in shape}


def _problems(row: dict, shape: dict[str, type]) -> Iterator[str]:
    for name, wanted in shape.items():
        if name not in row:
            yield f"the field {name!r} is missing; a row of this kind needs {', '.join(shape)}"
        if not isinstance(row[name], wanted) or isinstance(row[name], bool):
            yield f"{name!r} must be {wanted.__name__}, not {type(row[name]).__name__}"
        for number, option in enumerate(row[name] if wanted is list else ()):
            if not isinstance(option, str) or not option.strip():
                yield f"{name}[{number}] is empty or not a text"
        if wanted is list and len(row[name]) < 2:
            yield f"{name!r} has {len(row[name])} entries, too few"
    if "gold" in shape and not 0 <= row["gold"] < len(options(row)):
        yield f"gold is {row['gold']}, but there are {len(options(row))} choices (0 is the first)"
    if "continuation" in shape and not row["continuation"].strip():
        yield "'continuation' is empty"


def read_jsonl(path: Path, kind: str | None = None) -> tuple[str, list[dict]]:
    """Read and check a task file.

    Parameters
    ----------
    path : Path
        One JSON object a line.
    kind : str, optional
        By default guessed by the first row.

    Returns
    -------
    kind, rows

    Raises
    ------
    SuiteError
        The file is missing or empty, a line is not JSON, or a row is malformed (names file and line).
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"The task file {path} cannot be read: {error}.") from error
    rows = []
    # Not splitlines(): a JSON string may hold U+2028 and its like.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            kind, row = check_row(json.loads(line), where, kind)
        except json.JSONDecodeError as error:
            raise SuiteError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from error
        rows.append(row)
    if not rows:
        raise SuiteError(f"{path} holds no examples.")
    return kind, rows
