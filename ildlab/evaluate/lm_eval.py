"""Tasks of lm-eval on the model in memory, run by lm-eval itself: its own `HFLM`, its metrics, its generation.

`"lm-eval:arc_easy,piqa"` names lm-eval's own tasks, groups or tags; a `.yaml` of lm-eval's format is a suite whose
folder is lm-eval's `include_path`. The score of each example is kept, so that intervals and quality loss are
those of any other suite.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import find_executable_batch_size

from ildlab.errors import SuiteError, first_line
from ildlab.evaluate.results import SuiteResult, TaskResult
from ildlab.model.generate import plain_decoding
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, Work

try:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise SuiteError("Suites of lm-eval need it: pip install 'ildlab[eval]' (lm-eval 0.4.13 is tested).") from error

BRIDGE = 1  # raise it when scores change, so that kept results are not mistaken for today's
TOLD = ("", ".yaml", ".py", ".json", ".jsonl", ".csv", ".txt")  # files of these kinds decide what a task is
FEWSHOT_SEED = 1234  # lm-eval's own default
# The measure that counts, where a task has several: lm-eval's own leaderboards prefer the normalised one.
PREFERRED = ("acc_norm", "acc_bytes", "acc", "exact_match", "f1", "rougeL", "bits_per_byte")


@dataclass(frozen=True)
class LmEvalSuite:
    """A suite of lm-eval tasks.

    Attributes
    ----------
    names : tuple of str
        Tasks, groups or tags of lm-eval.
    folder : Path or None
        lm-eval's `include_path`, which is then the only place where names are looked up.
    limit : int or None
        Examples a task.
    swept : bool
        Whether an ablation sweep can score it: never, since lm-eval runs the model by itself.
    """

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None

    swept = False

    @classmethod
    def of(cls, names: Iterable[str], folder: Path | None = None) -> LmEvalSuite:
        """A suite of these names.

        Raises
        ------
        SuiteError
            No names, or one that lm-eval does not know.
        """
        wanted = tuple(name for name in names if name)
        unknown = set(wanted) - set(_manager(folder).all_tasks)
        if unknown or not wanted:
            raise SuiteError(
                f"lm-eval {lm_eval.__version__} has no task {', '.join(sorted(unknown)) or '(no name was given)'}. "
                "`lm-eval ls tasks` lists those that it has."
            )
        return cls(wanted, folder)

    @property
    def name(self) -> str:
        """As it is asked for."""
        return f"{'' if self.folder else 'lm-eval:'}{','.join(self.names)}"

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of task names, limit, lm-eval's version, and the files that lie in the folder itself."""
        digest = hashlib.sha256(repr((self.names, self.limit, lm_eval.__version__, BRIDGE)).encode())
        for file in sorted(self.folder.iterdir()) if self.folder else ():
            if file.is_file() and file.suffix in TOLD:
                digest.update(file.read_bytes())
        return digest.hexdigest()

    def take(self, limit: int) -> LmEvalSuite:
        """Return the suite with at most `limit` examples a task."""
        if limit < 1:
            raise SuiteError(f"limit={limit}: a task needs at least one example.")
        return replace(self, limit=limit)

    def steps(self, stack: LayerStack, tokenizer: Any) -> Work[SuiteResult]:
        """Score a model, task by task; `suite_steps` is the way to call it."""
        yield Progress(0, 1, f"{self.name}: loading its data")
        with _quietly(self.name):
            tasks = _tasks(self.names, self.folder, self.fingerprint)
        results, notes = {}, []
        for done, (name, task) in enumerate(tasks.items()):
            yield Progress(done, len(tasks), f"{name} (lm-eval shows its own progress)")
            task.set_fewshot_seed(FEWSHOT_SEED)  # the same examples at every call
            with _quietly(name) as log:
                samples = _run(stack, tokenizer, name, task, self.limit)
            # lm-eval has a sample for each document *and* filter of the answer: the first filter counts.
            filters = list(dict.fromkeys(sample["filter"] for sample in samples))
            if len(filters) > 1:
                notes.append(f"{name}: answers by the filter {filters[0]!r} of {', '.join(filters)}.")
            if log.cut:
                notes.append(f"{name}: contexts were cut from the left to fit the window ({log.cut} warnings).")
            first = [sample for sample in samples if sample["filter"] == filters[0]]
            results[name] = _task_result(name, first, log.cut)
        return SuiteResult(self.name, self.fingerprint, results, notes=notes)


def _run(stack: LayerStack, tokenizer: Any, name: str, task: Any, limit: int | None) -> list[dict]:
    """One task's samples: a dict for each document, with its measures."""
    cuda = stack.device.type == "cuda"

    @find_executable_batch_size(starting_batch_size=64 if cuda else 8)  # less, where memory runs out
    def run(batch_size: int) -> list[dict]:
        model = HFLM(
            pretrained=stack.model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # it is given a padding token
            batch_size=batch_size,
            # On a CPU torch's fp32 log_softmax errs by some 1e-5 a token.
            softmax_dtype="float64" if stack.device.type == "cpu" else "float32",
        )
        found = lm_eval.evaluate(model, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
        return found["samples"][name]

    with plain_decoding(stack.model):
        return run()


def _task_result(name: str, samples: list[dict], truncated: int) -> TaskResult:
    measure = _measure(samples[0])
    values = [sample[measure] for sample in samples]
    weights, chance, direction = None, 0.0, "higher"
    if measure == "bits_per_byte":  # each value is (log-likelihood in nats, bytes)
        weights, chance, direction = [float(size) for _, size in values], 8.0, "lower"
        values = [-ll / size / math.log(2) for ll, size in values]
    elif max(len(sample["arguments"]) for sample in samples) > 1:  # choices
        chance = float(np.mean([1 / len(sample["arguments"]) for sample in samples]))
    if not np.isfinite(values).all():
        raise SuiteError(f"{name}: {measure} of an example is not a finite number: the model's logits are broken.")
    others = {m: float(np.mean([s[m] for s in samples])) for m in PREFERRED[:4] if m in samples[0] and m != measure}
    scores = [float(value) for value in values]
    return TaskResult(name, "lm-eval", measure, scores, weights, chance, direction, others=others, truncated=truncated)


def _measure(sample: dict) -> str:
    for name in (*PREFERRED, *sample["metrics"]):
        if name in sample and (name == "bits_per_byte" or isinstance(sample[name], (int, float, np.number))):
            return name
    raise SuiteError(f"None of lm-eval's measures here has a value for each example: {', '.join(sample['metrics'])}.")


def _manager(folder: Path | None) -> TaskManager:
    return TaskManager(include_path=folder, include_defaults=False) if folder else _theirs()


@cache
def _theirs() -> TaskManager:
    return TaskManager()  # reads the headers of 14,000 files, which takes 20 s


@lru_cache(maxsize=8)
def _tasks(names: tuple[str, ...], folder: Path | None, fingerprint: str) -> dict[str, Any]:
    # Kept: a session scores one suite many times, and loading a task reads all of its data.
    return _manager(folder).load(list(names))["tasks"]


class _Log(logging.Handler):
    """Counts lm-eval's warnings of contexts that it cuts, and shows its errors alone."""

    cut = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.cut += "runcat" in record.getMessage()
        if record.levelno >= logging.ERROR:
            logging.lastResort.handle(record)


@contextmanager
def _quietly(name: str) -> Iterator[_Log]:
    """Run lm-eval with its log kept, and with words for people where its data or the model's window say no."""
    logger, log = logging.getLogger("lm_eval"), _Log()
    before = logger.handlers, logger.propagate, logger.level
    logger.handlers, logger.propagate, logger.level = [log], False, logging.WARNING
    try:
        yield log
    except AssertionError as error:
        raise SuiteError(f"lm-eval refuses {name}: {first_line(error)}") from error
    except Exception as error:
        away = type(error).__name__ in ("ConnectionError", "DatasetNotFoundError", "OfflineModeIsEnabled")
        if not away and not type(error).__module__.startswith(("huggingface_hub", "httpx")):
            raise
        raise SuiteError(
            f"lm-eval could not load the data of {name}: {first_line(error)}\nIts tasks come from the Hub: run this "
            "where there is network access, put copies of the data sets below the working directory "
            "(`hf download --repo-type dataset OWNER/NAME --local-dir OWNER/NAME`), or use 'mini7'."
        ) from error
    finally:
        logger.handlers, logger.propagate, logger.level = before
