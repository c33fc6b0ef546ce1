"""Suites: named sets of tasks, of YAML and JSONL files or of lm-eval, and scoring a model on them.

A suite file says, for each task: `name`, `file` (JSONL, beside the suite file), and optionally `kind`, `normalise`,
`chance`, `weight`, `fewshot`, `delimiter` (`ildlab.evaluate.tasks.Task` says what they are). A YAML file of
lm-eval's (`task:` or `group:`) is a suite too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ildlab.errors import SuiteError
from ildlab.evaluate.loglikelihood import ENGINE, check_requests, score_steps, window
from ildlab.evaluate.plan import Plan
from ildlab.evaluate.results import SuiteResult, TaskResult
from ildlab.evaluate.tasks import KINDS, Task, options, read_jsonl
from ildlab.files import data_dir, exists, for_later, open_text, parted, write_atomic
from ildlab.model.fingerprints import fingerprint
from ildlab.model.stack import LayerStack
from ildlab.progress import Work, drive
from ildlab.text.blocks import tokenizer_fingerprint
from ildlab.typed import reading


@dataclass(frozen=True)
class Suite:
    """A named set of tasks that are decided by log-likelihoods, so that an ablation sweep can score it (`swept`)."""

    name: str
    tasks: tuple[Task, ...]
    swept = True

    def __post_init__(self):
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise SuiteError(f"Suite {self.name!r} needs tasks with different names; it has: {names}.")

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides the scores: tasks, rows, settings."""
        content = [[ENGINE, *(getattr(task, f.name) for f in fields(task))] for task in self.tasks]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def take(self, limit: int) -> Suite:
        """Return the suite with at most `limit` rows a task: quicker, and with wider intervals."""
        return Suite(self.name, tuple(task.take(limit) for task in self.tasks))

    def plan(self, tokenizer: Any, length: int) -> Plan:
        """Encode all requests for a model's window of `length` tokens."""
        return Plan.of(self.tasks, tokenizer, length)

    def steps(self, stack: LayerStack, tokenizer: Any) -> Work[SuiteResult]:
        """Score a model; `suite_steps` is the way to call it."""
        length = window(stack, tokenizer)
        plan = self.plan(tokenizer, length)
        check_requests(stack, plan.encoded, tokenizer)
        values = plan.example_values((yield from score_steps(stack, plan.encoded, plan.groups, note=self.name)))
        results, notes = {}, []
        for task, rows in zip(self.tasks, plan.task_rows()):
            cut, found = plan.truncated[task.name], values[rows].tolist()
            results[task.name] = TaskResult(
                task.name, task.kind, task.measure, found, chance=task.chance, weight=task.weight, truncated=cut
            )
            if cut:
                notes.append(f"{task.name}: {cut} contexts were cut from the left to {length} tokens.")
        return SuiteResult(self.name, self.fingerprint, results, notes=notes)

    def __repr__(self) -> str:
        return f"Suite({self.name}: {', '.join(f'{task.name} ({len(task.rows)})' for task in self.tasks)})"


# ------------------------------------------------------------------- loading


@reading(SuiteError)
def load_suite(suite: Any, *, limit: int | None = None) -> Any:
    """Load a suite, and check every row of it.

    Parameters
    ----------
    suite : str, Path or Suite
        - a name of those that ship: `"mini7"`, `"canaries"`, `"paper7"`;
        - a `.yaml` file, of ours or of lm-eval's;
        - `"file:rows.jsonl"`, several with commas: each file is a task. A comma in a path that is there separates
          nothing: from the left, the longest stretch that is a path is one;
        - `"lm-eval:arc_easy,piqa"`: tasks of lm-eval (see `ildlab.evaluate.lm_eval`);
        - any of these with `@n`, such as `"mini7@40"`.
    limit : int, optional
        At most so many rows a task.

    Returns
    -------
    Suite or LmEvalSuite

    Raises
    ------
    SuiteError
        Unknown name, unreadable file, malformed row (names file and line).
    """
    if limit is not None and limit < 1:
        raise SuiteError(f"limit={limit}: a task needs at least one example.")
    if isinstance(suite, (str, os.PathLike)):
        name, mark, rows = str(suite).rpartition("@")
        named = str(suite).startswith("file:") and exists(str(suite)[5:])  # as a whole
        if mark and rows.isdigit() and not named:
            return load_suite(name, limit=min(int(rows), limit or int(rows)))
        loaded = _load(str(suite))
    elif hasattr(suite, "fingerprint"):
        loaded = suite
    else:
        raise SuiteError(f"A suite is a name, a path or a Suite, not {type(suite).__name__}.")
    return loaded if limit is None else loaded.take(limit)


def _load(name: str) -> Any:
    prefix, mark, names = name.partition(":")
    if mark and prefix == "lm-eval":
        return _of_lm_eval([part.strip() for part in names.split(",")])
    if mark and prefix == "file":
        paths = [Path(part).expanduser() for part in parted(names, ",")]
        tasks = tuple(_read(path, {"name": path.stem}) for path in paths)
        return Suite("+".join(task.name for task in tasks), tasks)
    path = Path(name).expanduser()
    return _from_yaml(path) if path.suffix in (".yaml", ".yml") else _shipped(name)


def _of_lm_eval(names, folder: Path | None = None) -> Any:
    from ildlab.evaluate.lm_eval import LmEvalSuite  # an extra, and slow to import

    return LmEvalSuite(tuple(names), folder)


@cache
def _shipped(name: str) -> Any:
    # Its files do not change, and a session asks for its suite at every evaluation.
    folder = data_dir() / "suites"
    known = {path.stem: path for path in [*folder.glob("*.yaml"), *folder.glob("*/*.yaml")]}
    known = {stem: path for stem, path in known.items() if path.parent.name in (folder.name, stem)}
    if name not in known:
        raise SuiteError(
            f"There is no suite {name!r}. Those that ship: {', '.join(sorted(known))}. Or give a .yaml file, "
            "'file:rows.jsonl', or 'lm-eval:task,task'."
        )
    return _from_yaml(known[name])


def _from_yaml(path: Path) -> Any:
    try:
        with open_text(path) as file:
            text = file.read()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise SuiteError(f"The suite file {path} cannot be read: {why}.") from error
    theirs = re.search(r"^group: *(\S+)", text, re.M) or re.search(r"^task: *(\S+)", text, re.M)
    if theirs:
        return _of_lm_eval([theirs[1]], path.parent)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SuiteError(f"The suite file {path} is not YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), list):
        raise SuiteError(f"The suite file {path} needs `name:` and a list `tasks:`.")
    tasks = tuple(_task(path, number, spec) for number, spec in enumerate(content["tasks"], 1))
    return Suite(str(content.get("name", path.stem)), tasks)


def _task(path: Path, number: int, spec: Any) -> Task:
    """One task of a suite file."""
    if not isinstance(spec, dict) or not {"name", "file"} <= spec.keys():
        raise SuiteError(f"{path.name}, task {number}: a task needs `name:` and `file:`.")
    where, settings = f"{path.name}, task {spec['name']!r}", {k: v for k, v in spec.items() if k != "file"}
    unknown = settings.keys() - ({each.name for each in fields(Task)} - {"rows", "shots"})
    if unknown:
        raise SuiteError(f"{where}: unknown setting {', '.join(sorted(map(str, unknown)))}.")
    if spec.get("kind", KINDS[0]) not in KINDS:
        raise SuiteError(f"{where}: kind {spec['kind']!r} does not exist; choose one of {', '.join(KINDS)}.")
    return _read(path.parent / str(spec["file"]), settings)


def _read(path: Path, settings: dict) -> Task:
    kind, rows = read_jsonl(path, settings.get("kind"))
    guesser = float(np.mean([1 / len(options(row)) for row in rows])) if kind == "multiple_choice" else 0.0
    return Task(**{"chance": guesser} | settings | {"kind": kind, "rows": tuple(rows)})


# ------------------------------------------------------------------- scoring


def suite_steps(
    stack: LayerStack, tokenizer: Any, suite: Any, *, cache: str | Path | None = None
) -> Work[SuiteResult]:
    """Score a model on a suite (what `load_suite` takes), step by step.

    `cache` is a folder where results are kept, by the fingerprints of model, tokenizer and suite (not of an
    offloaded model).
    """
    suite = load_suite(suite)
    kept = None
    # Weights that accelerate keeps elsewhere would all have to be loaded to name the model.
    if cache is not None and not any(p.is_meta for p in stack.model.parameters()):
        names = fingerprint(stack), tokenizer_fingerprint(tokenizer), suite.fingerprint
        kept = Path(cache) / f"{'-'.join(name[:16] for name in names)}.json"
        # One of another version, or damaged, is made again and written over.
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            return SuiteResult.from_dict(json.loads(kept.read_text(encoding="utf-8")))
    start = time.perf_counter()
    result = yield from suite.steps(stack, tokenizer)
    result.seconds = time.perf_counter() - start
    if kept is not None:
        with for_later():
            write_atomic(kept, json.dumps(result.to_dict()))
    return result


def score_suite(
    stack: LayerStack, tokenizer: Any, suite: Any, *, cache: str | Path | None = None, show: bool | None = None
) -> SuiteResult:
    """Score a model on a suite; `suite_steps` says what the arguments are."""
    suite = load_suite(suite)
    return drive(suite_steps(stack, tokenizer, suite, cache=cache), desc=f"suite {suite.name}", show=show)
