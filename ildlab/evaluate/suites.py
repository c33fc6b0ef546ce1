"""Suites: named sets of tasks in YAML, files and Hub data sets, and scoring a model on them.

A suite file says, for each task: `name`, `kind` (see `ildlab.evaluate.tasks`), where its rows come from, and
optionally `metric`, `normalise`, `chance`, `direction`, `weight`, `fewshot`, `limit`, `delimiter`,
`separator`, `max_new_tokens`, `stop`. Rows come from `file:` (beside the suite file; `shots_file:` for
few-shot examples) or from `hub:` with `path`, `name`, `split`, `shots_split`, and `fields:` that say how
a row of the kind's shape is made of the data set's columns.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ildlab.errors import SuiteError
from ildlab.evaluate.loglikelihood import ENGINE, score_steps, window
from ildlab.evaluate.plan import Plan
from ildlab.evaluate.results import SuiteResult, TaskResult
from ildlab.evaluate.tasks import KINDS, Task, read_jsonl, weights
from ildlab.files import data_dir, write_atomic
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, drive


@dataclass(frozen=True)
class Suite:
    """A named set of tasks.

    Attributes
    ----------
    name, description : str
    tasks : tuple of Task
    """

    name: str
    tasks: tuple[Task, ...]
    description: str = ""
    _digest: list[str] = field(default_factory=list, compare=False, repr=False)

    def __post_init__(self):
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise SuiteError(f"Suite {self.name!r} needs tasks with different names; it has: {names}.")

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides the scores: tasks, rows, settings."""
        if not self._digest:
            content = [[ENGINE, *(getattr(task, f.name) for f in fields(task))] for task in self.tasks]
            self._digest.append(hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest())
        return self._digest[0]

    def take(self, limit: int) -> Suite:
        """Return the suite with at most `limit` rows a task: quicker, and with wider intervals.

        Raises
        ------
        SuiteError
            `limit` is below 1.
        """
        if limit < 1:
            raise SuiteError(f"limit={limit}: a task needs at least one example.")
        return Suite(self.name, tuple(task.take(limit) for task in self.tasks), self.description)

    def plan(self, tokenizer: Any, length: int) -> Plan:
        """Encode all log-likelihood requests for a model's window of `length` tokens."""
        return Plan.of(self, tokenizer, length)

    def __repr__(self) -> str:
        return f"Suite({self.name}: {', '.join(f'{task.name} ({len(task.rows)})' for task in self.tasks)})"


def load_suite(suite: Any, *, limit: int | None = None, hub_root: str | Path | None = None) -> Any:
    """Load a suite, and check every row of it.

    Parameters
    ----------
    suite : str, Path or Suite
        - a name of those that ship: `"mini7"`, `"canaries"`, `"paper7"`;
        - a `.yaml` file;
        - `"file:rows.jsonl"` (or `.txt`), several with commas: each file is a task;
        - `"lm-eval:arc_easy,piqa"`: tasks of lm-eval (see `ildlab.evaluate.lm_eval`);
        - any of these with `@n`, such as `"mini7@40"`: at most n rows a task.
    limit : int, optional
        At most so many rows a task.
    hub_root : path, optional
        Folder with local copies `owner/name` of Hub data sets, used in place of the Hub; by default the
        environment variable ILDLAB_HUB_ROOT.

    Returns
    -------
    Suite (or LmEvalSuite)

    Raises
    ------
    SuiteError
        Unknown name, unreadable file, malformed row (names file and line), Hub out of reach.
    """
    if isinstance(suite, (str, os.PathLike)):
        name, mark, rows = str(suite).rpartition("@")
        if mark and rows.isdigit():
            return load_suite(name, limit=min(int(rows), limit or int(rows)), hub_root=hub_root)
        loaded = _load(str(suite), hub_root or os.environ.get("ILDLAB_HUB_ROOT"))
    elif hasattr(suite, "fingerprint"):
        loaded = suite
    else:
        raise SuiteError(f"A suite is a name, a path or a Suite, not {type(suite).__name__}.")
    return loaded if limit is None else loaded.take(limit)


def _load(name: str, hub_root) -> Any:
    if name.startswith("lm-eval:"):
        from ildlab.evaluate.lm_eval import LmEvalSuite

        return LmEvalSuite.of(name.removeprefix("lm-eval:"))
    if name.startswith("file:"):
        tasks = []
        for part in name.removeprefix("file:").split(","):
            path = Path(part.strip()).expanduser()
            kind, rows = read_jsonl(path)
            tasks.append(Task(path.stem, kind, tuple(rows), **_defaults(kind, rows)))
        return Suite("+".join(task.name for task in tasks), tuple(tasks))
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = data_dir() / "suites" / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
            raise SuiteError(
                f"There is no suite {name!r}. Those that ship: {known}. Or give a .yaml file, "
                "'file:rows.jsonl', or 'lm-eval:task,task'."
            )
        if hub_root is None:
            return _shipped(path)
    return _from_yaml(path, hub_root)


@cache
def _shipped(path: Path) -> Suite:
    # Its files do not change, and a session asks for its suite at every evaluation.
    return _from_yaml(path, None)


def _defaults(kind: str, rows: Sequence[dict]) -> dict[str, Any]:
    """Chance level and direction of a file that says nothing of them."""
    if kind == "bits_per_byte":
        return {"chance": 8.0, "direction": "lower"}
    if kind in ("multiple_choice", "minimal_pairs"):
        return {"chance": float(np.mean([1 / len(r.get("choices") or r["context_options"]) for r in rows]))}
    return {}


_NUMBER = (int, float)
_PLAIN = {
    "metric": str,
    "normalise": str,
    "chance": _NUMBER,
    "direction": str,
    "weight": _NUMBER,
    "fewshot": int,
    "delimiter": str,
    "separator": str,
    "max_new_tokens": int,
}


def _from_yaml(path: Path, hub_root) -> Suite:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SuiteError(f"The suite file {path} cannot be read: {error.strerror or error}.") from error
    except yaml.YAMLError as error:
        raise SuiteError(f"The suite file {path} is not YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), list):
        raise SuiteError(f"The suite file {path} needs `name:` and a list `tasks:`.")
    tasks = []
    for number, spec in enumerate(content["tasks"], 1):
        where = f"{path.name}, task {number}"
        if not isinstance(spec, dict) or "name" not in spec or ("file" in spec) == ("hub" in spec):
            raise SuiteError(f"{where}: a task needs `name:` and either `file:` or `hub:`.")
        where = f"{path.name}, task {spec['name']!r}"
        unknown = spec.keys() - {"name", "kind", "file", "shots_file", "hub", "fields", "limit", "stop", *_PLAIN}
        if unknown:
            raise SuiteError(f"{where}: unknown settings {', '.join(sorted(unknown))}.")
        kind = spec.get("kind")
        if kind is not None and kind not in KINDS:
            raise SuiteError(f"{where}: kind {kind!r} does not exist; choose one of {', '.join(KINDS)}.")
        if "hub" in spec:
            from ildlab.evaluate.hub_tasks import load_rows

            rows, shots = load_rows(spec, where, hub_root)
        else:
            kind, rows = read_jsonl(path.parent / spec["file"], kind)
            shots = read_jsonl(path.parent / spec["shots_file"], kind)[1] if "shots_file" in spec else ()
        settings = {**_defaults(kind, rows), **_settings(spec, where)}
        task = Task(str(spec["name"]), kind, tuple(rows), shots=tuple(shots), **settings)
        tasks.append(task if spec.get("limit") is None else task.take(spec["limit"]))
    return Suite(str(content.get("name", path.stem)), tuple(tasks), str(content.get("description", "")))


def _settings(spec: dict[str, Any], where: str) -> dict[str, Any]:
    """The task's settings out of its entry in the suite file, each checked for its type."""
    given = {name: value for name, value in spec.items() if name != "limit" or value is not None}
    for name, kind in {**_PLAIN, "limit": int}.items():
        if name in given and (not isinstance(given[name], kind) or isinstance(given[name], bool)):
            told = {str: "a text", int: "a whole number"}.get(kind, "a number")
            raise SuiteError(f"{where}: {name}: {given[name]!r} is not {told}.")
    if given.get("limit", 1) < 1:
        raise SuiteError(f"{where}: limit: {given['limit']} leaves no example.")
    settings = {name: given[name] for name in _PLAIN if name in given}
    if "stop" in spec:
        stop = [spec["stop"]] if isinstance(spec["stop"], str) else spec["stop"]
        if not isinstance(stop, list) or not all(isinstance(mark, str) and mark for mark in stop):
            raise SuiteError(f"{where}: stop: {spec['stop']!r} is not a text or a list of texts.")
        settings["stop"] = tuple(stop)
    return settings


# ------------------------------------------------------------------- scoring


def suite_steps(
    stack: LayerStack, tokenizer: Any, suite: Any, *, cache: str | Path | None = None
) -> Generator[Progress, None, SuiteResult]:
    """Score a model on a suite, step by step.

    Parameters
    ----------
    stack : LayerStack
    tokenizer
    suite : Suite, or what `load_suite` takes
    cache : path, optional
        Folder where results are kept, by the fingerprints of model, tokenizer and suite (not of an offloaded model).

    Returns
    -------
    SuiteResult
    """
    suite = load_suite(suite)
    kept = None
    # Weights that accelerate keeps elsewhere would all have to be loaded to name the model.
    if cache is not None and not any(p.is_meta for p in stack.model.parameters()):
        kept = Path(cache) / f"{model_fingerprint(stack, tokenizer)[:24]}-{suite.fingerprint[:24]}.json"
        found = _read_kept(kept)
        if found is not None:
            return found
    start = time.perf_counter()
    if isinstance(suite, Suite):
        result = yield from _own_steps(stack, tokenizer, suite)
    else:
        result = yield from suite.steps(stack, tokenizer)
    result.seconds = time.perf_counter() - start
    if kept is not None:
        write_atomic(kept, json.dumps(result.to_dict()))
    return result


def score_suite(
    stack: LayerStack, tokenizer: Any, suite: Any, *, cache: str | Path | None = None, show: bool | None = None
) -> SuiteResult:
    """Score a model on a suite; `suite_steps` says what the arguments are."""
    suite = load_suite(suite)
    return drive(suite_steps(stack, tokenizer, suite, cache=cache), desc=f"suite {suite.name}", show=show)


def _own_steps(stack, tokenizer, suite: Suite) -> Generator[Progress, None, SuiteResult]:
    length = window(stack, tokenizer)
    plan = suite.plan(tokenizer, length)
    outcomes = yield from score_steps(stack, plan.encoded, plan.groups, note=suite.name)
    found = plan.measures(outcomes)
    results, notes = {}, []
    for task in suite.tasks:
        if task.generates:
            values, truncated = yield from _generated(stack, tokenizer, task, length)
        else:
            values, truncated = found[task.name], plan.truncated[task.name]
        if truncated:
            notes.append(f"{task.name}: {truncated} contexts were cut from the left to {length} tokens.")
        results[task.name] = task_result(task, values, truncated)
    return SuiteResult(suite.name, suite.fingerprint, results, notes=notes)


def task_result(task: Task, values: dict[str, np.ndarray], truncated: int = 0) -> TaskResult:
    """Put the measures of a task's examples into a result.

    Raises
    ------
    SuiteError
        A measure is NaN or infinite: the model's logits are broken.
    """
    for name, array in values.items():
        if not np.isfinite(array).all():
            bad = int(np.flatnonzero(~np.isfinite(array))[0])
            raise SuiteError(
                f"Task {task.name!r}: {name} of example {bad + 1} is not a finite number. The model's logits are "
                "NaN or infinite: load it in float32 or bfloat16 rather than float16."
            )
    sizes = weights(task)
    return TaskResult(
        task.name,
        task.kind,
        task.measure,
        [float(v) for v in values[task.measure]],
        None if (sizes == 1).all() else sizes.tolist(),
        task.chance,
        task.direction,
        task.weight,
        {name: float(np.average(v, weights=sizes)) for name, v in values.items() if name != task.measure},
        truncated,
    )


def _generated(stack, tokenizer, task: Task, length: int):
    from ildlab.evaluate.generation import chrf, greedy_steps, rouge_l

    prompts = [task.prompt(index, row["context"]) for index, row in enumerate(task.rows)]
    answers, truncated = yield from greedy_steps(
        stack,
        tokenizer,
        prompts,
        max_new_tokens=task.max_new_tokens,
        stop=task.stop,
        max_length=length,
        note=task.name,
    )
    both = {"chrf": chrf, "rouge_l": rouge_l}
    rows = list(zip(answers, task.rows))
    return {name: np.array([of(a, row["references"]) for a, row in rows]) for name, of in both.items()}, truncated


def model_fingerprint(stack: LayerStack, tokenizer: Any) -> str:
    """sha256 (hex) of every weight, of config, generation config and tokenizer."""
    from ildlab.text.blocks import tokenizer_fingerprint

    digest = hashlib.sha256(tokenizer_fingerprint(tokenizer).encode())
    settings = {k: v for k, v in stack.config.to_dict().items() if not k.startswith("_")}
    decoding = getattr(stack.model, "generation_config", None)
    settings["decoding"] = {} if decoding is None else decoding.to_diff_dict()
    settings["decoding"].pop("transformers_version", None)
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in stack.model.state_dict().items():
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        digest.update(flat.cpu().numpy().data)
    return digest.hexdigest()


def _read_kept(path: Path) -> SuiteResult | None:
    try:
        return SuiteResult.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return None  # of another version, or damaged: it is made again and written over
