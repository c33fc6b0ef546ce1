"""Kinds of tasks: what a row asks of the model, and what its answer is worth.

| kind | row | score of an example |
| --- | --- | --- |
| `multiple_choice` | `{query, choices, gold}` or `{context_options, continuation, gold}` | `accuracy_raw` or `accuracy_bytes` |
| `cloze` | `{context, continuation}` | `exact`: greedy decoding gives it |
| `copy` | `{context, continuation}` | `prefix`: share of its tokens before the first miss |

All are decided by log-likelihoods: greedy decoding would give a continuation exactly where each of its tokens is
the most likely one, so that nothing has to be generated.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ildlab.errors import SuiteError
from ildlab.evaluate.loglikelihood import Outcomes, encode
from ildlab.evaluate.packing import Encoded
from ildlab.files import open_text
from ildlab.typed import read_fields

Kind = Literal["multiple_choice", "cloze", "copy"]
KINDS = get_args(Kind)


@dataclass(frozen=True)
class Task:
    """A named list of rows of one kind, and how they are asked and scored."""

    name: str
    kind: Kind
    rows: tuple  # of dict, in the kind's shape
    normalise: Literal["raw", "bytes"] = "raw"  # compare log-likelihoods of choices as they are, or by UTF-8 byte
    chance: float = 0.0  # score of a guesser
    weight: float = 1.0  # in the suite's aggregate
    fewshot: int = 0  # solved examples before each prompt: the first of `shots`, else of the task's other rows
    shots: tuple = ()
    delimiter: str = " "  # between a prompt and its answer (as lm-eval's `target_delimiter`)

    def __post_init__(self):
        read_fields(self, lambda words: SuiteError(f"Task {self.name!r}: {words}"))
        problem = ""
        if not 0 <= self.chance < 1:
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
        """Name of what is scored."""
        return {"cloze": "exact", "copy": "prefix"}.get(self.kind, f"accuracy_{self.normalise}")

    def prompt(self, index: int, context: str) -> str:
        """Put the few-shot examples of row `index` before its context."""
        row = self.rows[index]
        # Lazily, or every row would be compared with every other; nor a copy of it: it holds the answer.
        others = (shot for shot in self.shots or self.rows if shot != row)
        return "".join(self._solved(shot) + "\n\n" for shot in islice(others, self.fewshot)) + context

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
    """All requests of a task as tokens, and the row that each belongs to; a SuiteError of `encode` names the task."""
    asked = [pairs(task, index) for index in range(len(task.rows))]
    owner = [index for index, made in enumerate(asked) for _ in made]
    try:
        return encode(tokenizer, [pair for made in asked for pair in made], max_length), owner
    except SuiteError as error:
        raise SuiteError(f"Task {task.name!r}: {error}") from error


def example_scores(task: Task, owner: Sequence[int], outcomes: Outcomes) -> np.ndarray:
    """Score of each example of a task, [rows] float64; `owner` is the row of each request."""
    if task.kind == "cloze":  # a request a row
        return (outcomes.matched == outcomes.length).astype(float)
    if task.kind == "copy":
        return outcomes.matched / outcomes.length
    found = outcomes.loglikelihood
    if task.normalise == "bytes":
        answers = [answer for row in task.rows for _, answer in options(row)]
        found = found / [len(answer.encode("utf-8")) for answer in answers]  # [requests]
    ends = np.searchsorted(owner, np.arange(1, len(task.rows)))  # where the next row's requests begin
    return np.array([float(part.argmax() == row["gold"]) for row, part in zip(task.rows, np.split(found, ends))])


# -------------------------------------------------------------------- rows

_CHOICE = {"query": str, "choices": list, "gold": int}
_PAIRS = {"context_options": list, "continuation": str, "gold": int}
_PLAIN = {"context": str, "continuation": str}


def check_row(row: Any, where: str, kind: str | None = None) -> tuple[str, dict]:
    """Check a row; return its kind (guessed by its fields, where none is given) and the fields that this kind has."""
    if not isinstance(row, dict):
        raise SuiteError(f"{where}: a row is a JSON object, not {type(row).__name__}.")
    if kind is None:
        choices = {"query", "choices"} <= row.keys() or "context_options" in row
        kind = "multiple_choice" if choices else "cloze" if row.keys() >= _PLAIN.keys() else None
    if kind not in KINDS:
        raise SuiteError(
            f"{where}: the fields {', '.join(row) or '(none)'} are of no known kind. A row is "
            "{query, choices, gold}, {context_options, continuation, gold} or {context, continuation}."
        )
    shape = _PLAIN if kind != "multiple_choice" else _PAIRS if "context_options" in row else _CHOICE
    for problem in _problems(row, shape):  # the first one says enough
        raise SuiteError(f"{where}: {problem}.")
    kept = {name: row[name] for name in shape}
    try:
        json.dumps(kept, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise SuiteError(
            f"{where}: it holds half a character, {error.object[error.start]!r}, which is no text."
        ) from error
    return kind, kept


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
    """Read a task file, one JSON object a line: (kind, rows), the kind guessed by the first row where none is given.

    Raises
    ------
    SuiteError
        The file is missing or empty, a line is not JSON, or a row is malformed (names file and line).
    """
    try:
        with open_text(path) as file:
            content = file.read()
    except (OSError, ValueError, EOFError, zlib.error) as error:
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
