"""Kinds of tasks: what a row asks of the model, and what its answer is worth.

| kind | row | measures (per example) |
| --- | --- | --- |
| `multiple_choice` | `{query, choices, gold}` | `accuracy_raw`, `accuracy_bytes` |
| `minimal_pairs` | the same, or `{context_options, continuation, gold}` | the same |
| `cloze` | `{context, continuation}` | `exact` (greedy decoding gives it), `loglikelihood` |
| `copy` | `{context, continuation}` | `prefix` (share of its tokens before the first miss), `exact`, `loglikelihood` |
| `bits_per_byte` | `{text}` | `bits_per_byte` |
| `generation` | `{context, references}` | `chrf`, `rouge_l` |

All but `generation` are decided by log-likelihoods: greedy decoding would give a continuation exactly
where each of its tokens is the most likely one, so that nothing has to be generated. For chrF of copying give the
rows as a `generation` task, `{context, references: [the text to copy]}`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ildlab.errors import SuiteError
from ildlab.evaluate.loglikelihood import Outcomes, encode, encode_rolling
from ildlab.evaluate.packing import Encoded

KINDS = ("multiple_choice", "minimal_pairs", "cloze", "copy", "bits_per_byte", "generation")
METRICS = {
    "multiple_choice": ("accuracy",),
    "minimal_pairs": ("accuracy",),
    "cloze": ("exact",),  # a log-likelihood is no share: it is reported beside it
    "copy": ("prefix", "exact"),
    "bits_per_byte": ("bits_per_byte",),
    "generation": ("chrf", "rouge_l"),
}
UNIFORM_BYTE = 8.0  # bits per byte of a model that knows nothing


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
        Score of a guesser. For a loss (`direction="lower"`): what a model that knows nothing gets.
    direction : {"higher", "lower"}
        Whether a higher score is better.
    weight : float
        In the suite's aggregate.
    fewshot : int
        Solved examples before each prompt: the first of `shots`, else of the task's other rows.
    shots : tuple of dict
    delimiter : str
        Between a prompt and its answer (as lm-eval's `target_delimiter`).
    separator : str
        Between solved examples.
    max_new_tokens : int
        For `generation`.
    stop : tuple of str
        A generated answer ends before the first of these.
    """

    name: str
    kind: str
    rows: tuple[dict, ...]
    metric: str = ""
    normalise: str = "raw"
    chance: float = 0.0
    direction: str = "higher"
    weight: float = 1.0
    fewshot: int = 0
    shots: tuple[dict, ...] = ()
    delimiter: str = " "
    separator: str = "\n\n"
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ("\n\n",)

    def __post_init__(self):
        problem = ""
        if self.kind not in KINDS:
            problem = f"kind {self.kind!r} does not exist; choose one of {', '.join(KINDS)}"
        elif self.metric and self.metric not in METRICS[self.kind]:
            problem = f"a {self.kind} task has no metric {self.metric!r}, but {' and '.join(METRICS[self.kind])}"
        elif self.normalise not in ("raw", "bytes"):
            problem = f"normalise: {self.normalise!r} is neither raw nor bytes"
        elif self.kind == "bits_per_byte" and self.direction != "lower":
            problem = "fewer bits per byte are better: direction: lower, with chance: 8"
        elif self.direction not in ("higher", "lower"):
            problem = f"direction: {self.direction!r} is neither higher nor lower"
        elif self.direction == "lower" and self.chance <= 0:
            problem = "direction: lower needs chance: above 0, the score of a model that knows nothing"
        elif self.direction == "higher" and not 0 <= self.chance < 1:
            problem = f"chance: {self.chance} is not a share from 0 up to, and without, 1"
        elif self.weight <= 0 or self.fewshot < 0:
            problem = "weight must be above 0, and fewshot not below 0"
        elif not self.rows:
            problem = "it has no rows"
        elif self.fewshot and self.kind == "bits_per_byte":
            problem = "a bits_per_byte task takes no few-shot examples"
        elif self.fewshot > self._fewest_shots():
            problem = f"fewshot: {self.fewshot}, but there are only {self._fewest_shots()} examples"
        if problem:
            raise SuiteError(f"Task {self.name!r}: {problem}.")

    def _fewest_shots(self) -> int:
        """Solved examples that the row with the fewest can have: a group takes its own alone."""
        groups = Counter(row.get("group") for row in self.shots or self.rows)
        # A row that stands among the shots by chance has one fewer; that is no reason to refuse all the others.
        copies = Counter() if self.shots else Counter(_text(row) for row in self.rows)
        return min(groups[row.get("group")] - copies[_text(row)] for row in self.rows)

    def take(self, limit: int) -> Task:
        """Return the task with at most `limit` rows; few-shot examples still come from all of them."""
        shots = self.shots or (self.rows if self.fewshot and limit < len(self.rows) else ())
        return replace(self, rows=self.rows[:limit], shots=shots)

    @property
    def measure(self) -> str:
        """Name of the measure that is the score."""
        metric = self.metric or METRICS[self.kind][0]
        return f"accuracy_{self.normalise}" if metric == "accuracy" else metric

    @property
    def generates(self) -> bool:
        """Whether text has to be generated; such a task cannot be scored in an ablation sweep."""
        return self.kind == "generation"

    def prompt(self, index: int, context: str) -> str:
        """Put the headline and the few-shot examples of row `index` before its context."""
        row = self.rows[index]
        others = (shot for shot in self.shots or self.rows if shot != row)  # nor a copy of it: it holds the answer
        chosen = [shot for shot in others if shot.get("group") == row.get("group")][: self.fewshot]
        return row.get("headline", "") + "".join(solved(self, shot) + self.separator for shot in chosen) + context


def _text(row: dict) -> str:
    return json.dumps(row, sort_keys=True)


def solved(task: Task, row: dict) -> str:
    """Write a row with its right answer, as a few-shot example."""
    if "context_options" in row:
        before, after = row["context_options"][row["gold"]], row["continuation"]
    elif "choices" in row:
        before, after = row["query"], row["choices"][row["gold"]]
    else:
        before, after = row["context"], row.get("continuation") or row["references"][0]
    return before + task.delimiter + after if before else after


def pairs(task: Task, index: int) -> list[tuple[str, str]]:
    """(context, continuation) pairs that decide row `index`."""
    row = task.rows[index]
    if "context_options" in row:
        made = [(option, row["continuation"]) for option in row["context_options"]]
    elif "choices" in row:
        made = [(row["query"], choice) for choice in row["choices"]]
    else:
        made = [(row["context"], row["continuation"])]
    out = []
    for context, continuation in made:
        prompt = task.prompt(index, context)
        out.append((prompt, task.delimiter + continuation if prompt else continuation))
    return out


def requests(task: Task, tokenizer: Any, max_length: int) -> tuple[list[Encoded], list[int]]:
    """All requests of a task as tokens, and the row that each belongs to.

    Raises
    ------
    SuiteError
        An answer that is longer than the model's window, or has no token; names the task.
    """
    try:
        if task.kind == "bits_per_byte":
            cut = [encode_rolling(tokenizer, row["text"], max_length) for row in task.rows]
            return [e for windows in cut for e in windows], [i for i, w in enumerate(cut) for _ in w]
        asked = [pairs(task, index) for index in range(len(task.rows))]
        owner = [index for index, made in enumerate(asked) for _ in made]
        return encode(tokenizer, [pair for made in asked for pair in made], max_length), owner
    except SuiteError as error:
        raise SuiteError(f"Task {task.name!r}: {error}") from error


def measures(task: Task, owner: Sequence[int], outcomes: Outcomes) -> dict[str, np.ndarray]:
    """Every measure of a log-likelihood task, [examples] float64 each, in the order of its rows."""
    owner = np.asarray(owner)
    total = np.bincount(owner, outcomes.loglikelihood, minlength=len(task.rows))
    if task.kind == "bits_per_byte":
        return {"bits_per_byte": -total / math.log(2) / weights(task)}
    if task.kind in ("cloze", "copy"):
        exact = (outcomes.matched == outcomes.length).astype(float)
        found = {"exact": exact, "loglikelihood": total / outcomes.length}
        return found if task.kind == "cloze" else {"prefix": outcomes.matched / outcomes.length, **found}
    raw, by_bytes = np.empty(len(task.rows)), np.empty(len(task.rows))
    ends = np.cumsum(np.bincount(owner, minlength=len(task.rows)))
    for index, (row, end) in enumerate(zip(task.rows, ends)):
        choices = row.get("choices") or [row["continuation"]] * len(row["context_options"])
        found = outcomes.loglikelihood[end - len(choices) : end]
        sizes = np.array([len(choice.encode("utf-8")) for choice in choices], float)
        raw[index] = float(int(found.argmax()) == row["gold"])
        by_bytes[index] = float(int((found / sizes).argmax()) == row["gold"])
    return {"accuracy_raw": raw, "accuracy_bytes": by_bytes}


def weights(task: Task) -> np.ndarray:
    """How much each example counts in the task's score: 1, or its bytes for bits per byte."""
    if task.kind == "bits_per_byte":
        return np.array([len(row["text"].encode("utf-8")) for row in task.rows], float)
    return np.ones(len(task.rows))


# -------------------------------------------------------------------- rows

_SHAPES = {
    "query": str,
    "choices": list,
    "gold": int,
    "context_options": list,
    "continuation": str,
    "context": str,
    "text": str,
    "references": list,
}
_NEEDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "minimal_pairs": ("query", "choices", "gold"),
    "cloze": ("context", "continuation"),
    "copy": ("context", "continuation"),
    "bits_per_byte": ("text",),
    "generation": ("context", "references"),
}


def kind_of(row: dict, where: str) -> str:
    """Guess the kind of a row by its fields.

    Raises
    ------
    SuiteError
        No kind has these fields; names where the row stands.
    """
    for fields, kind in (
        ({"query", "choices"}, "multiple_choice"),
        ({"context_options"}, "minimal_pairs"),
        ({"context", "continuation"}, "cloze"),
        ({"context", "references"}, "generation"),
        ({"text"}, "bits_per_byte"),
    ):
        if fields <= row.keys():
            return kind
    raise SuiteError(
        f"{where}: the fields {', '.join(row) or '(none)'} are of no known kind. A row is {{query, choices, gold}}, "
        "{context_options, continuation, gold}, {context, continuation}, {context, references} or {text}."
    )


def check_row(kind: str, row: Any, where: str) -> dict:
    """Return the fields of the row that its kind has, or say what is wrong with it and where it stands.

    Raises
    ------
    SuiteError
    """
    if not isinstance(row, dict):
        raise SuiteError(f"{where}: a row is a JSON object, not {type(row).__name__}.")
    needs = _NEEDS[kind]
    if kind == "minimal_pairs" and "context_options" in row:
        needs = ("context_options", "continuation", "gold")
    for name in needs:
        if name not in row:
            raise SuiteError(f"{where}: the field {name!r} is missing; a {kind} row needs {', '.join(needs)}.")
        if not isinstance(row[name], _SHAPES[name]) or isinstance(row[name], bool):
            raise SuiteError(f"{where}: {name!r} must be {_SHAPES[name].__name__}, not {type(row[name]).__name__}.")
    for name in ("choices", "context_options", "references"):
        options = row.get(name, []) if name in needs else []
        for number, option in enumerate(options):
            if not isinstance(option, str) or not option.strip():
                raise SuiteError(f"{where}: {name}[{number}] is empty or not a text.")
        if name in needs and len(options) < (1 if name == "references" else 2):
            raise SuiteError(f"{where}: {name!r} has {len(options)} entries, too few.")
        if name in needs and "gold" in needs and not 0 <= row["gold"] < len(options):
            raise SuiteError(f"{where}: gold is {row['gold']}, but there are {len(options)} {name} (0 is the first).")
    for name in ("continuation", "text"):
        if name in needs and not row[name].strip():
            raise SuiteError(f"{where}: {name!r} is empty.")
    kept = {name: value for name, value in row.items() if name in needs}
    for name in ("group", "headline"):
        if row.get(name) is not None:
            kept[name] = str(row[name])
    return kept


def read_jsonl(path: Path, kind: str | None = None) -> tuple[str, list[dict]]:
    """Read and check a task file.

    Parameters
    ----------
    path : Path
        `.jsonl`, or `.txt` for bits per byte (cut at line ends into passages of about 2,000 bytes).
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
    if path.suffix == ".txt":
        if kind not in (None, "bits_per_byte"):
            raise SuiteError(f"{path}: a .txt file is a bits_per_byte task, not {kind}.")
        rows = [{"text": passage} for passage in _passages(content.splitlines(keepends=True))]
        kind = "bits_per_byte"
    else:
        rows = []
        # Not splitlines(): a JSON string may hold U+2028 and its like.
        for number, line in enumerate(content.split("\n"), 1):
            if not line.strip():
                continue
            where = f"{path.name} line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise SuiteError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from error
            if kind is None:
                kind = kind_of(row if isinstance(row, dict) else {}, where)
            rows.append(check_row(kind, row, where))
    if not rows:
        raise SuiteError(f"{path} holds no examples.")
    return kind, rows


def _passages(lines: Sequence[str], size: int = 2000) -> Iterator[str]:
    held, length = [], 0
    for line in lines:
        held.append(line)
        length += len(line.encode("utf-8"))
        if length >= size:
            yield "".join(held)
            held, length = [], 0
    if "".join(held).strip():
        yield "".join(held)
