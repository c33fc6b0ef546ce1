"""lm-eval's tasks on the model in memory, through ildlab's log-likelihood engine.

`StackLM` is an lm-eval model: its requests go through `ildlab.evaluate.loglikelihood`, which shares what they have
in common. `LmEvalSuite` makes a suite of lm-eval tasks (`suite="lm-eval:arc_easy,piqa"`); the tasks that
ship with ildlab can be named as well (`mini7`, `mini7_knowledge`, ...).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ildlab.errors import SuiteError, first_line
from ildlab.evaluate.loglikelihood import ENGINE, Outcomes, encode, encode_rolling, score_steps, window
from ildlab.evaluate.packing import Encoded
from ildlab.evaluate.results import SuiteResult, TaskResult
from ildlab.files import data_dir
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, drive

try:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise SuiteError("Suites of lm-eval need it: pip install 'ildlab[eval]' (lm-eval 0.4.13 is tested).") from error

# The measure that counts, where a task has several: lm-eval's own leaderboards prefer the normalised one.
PREFERRED = ("acc_norm", "acc_bytes", "acc", "exact_match", "f1", "rougeL", "chrf", "bits_per_byte")


class StackLM(LM):
    """An lm-eval model over a `LayerStack`.

    Parameters
    ----------
    stack : LayerStack
    tokenizer
    max_length : int, optional
        By default the model's window.
    """

    def __init__(self, stack: LayerStack, tokenizer: Any, max_length: int | None = None):
        super().__init__()
        self.stack, self.tokenizer = stack, tokenizer
        self.max_length = max_length or window(stack, tokenizer)
        self.truncated = 0  # contexts that lost their beginning, so far

    @property
    def tokenizer_name(self) -> str:
        """Name that lm-eval keys its own caches by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each request's continuation."""
        pairs = [request.args for request in requests]
        contexts = {context: number for number, context in enumerate(dict.fromkeys(c for c, _ in pairs))}
        encoded = encode(self.tokenizer, pairs, self.max_length)
        self.truncated += sum(each.truncated for each in encoded)
        found = drive(score_steps(self.stack, encoded, [contexts[c] for c, _ in pairs]))
        greedy = found.matched == found.length
        return [(float(ll), bool(hit)) for ll, hit in zip(found.loglikelihood, greedy)]

    def loglikelihood_rolling(self, requests) -> list[float]:
        """Log-likelihood of each whole text."""
        cut = [
            encode_rolling(self.tokenizer, request.args[0], self.max_length, special_tokens=True)
            for request in requests
        ]
        owner = [index for index, windows in enumerate(cut) for _ in windows]
        found = drive(score_steps(self.stack, [e for windows in cut for e in windows], range(len(owner))))
        return np.bincount(owner, found.loglikelihood, minlength=len(cut)).tolist()

    def generate_until(self, requests) -> list[str]:
        """Greedy continuations, cut before the first of each request's `until` strings."""
        from ildlab.evaluate.generation import greedy_steps

        answers = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        for settings, chosen in kinds.items():
            asked = json.loads(settings)
            if asked.get("do_sample") and asked.get("temperature", 1.0) > 0:
                raise SuiteError("This lm-eval task samples its answers; ildlab generates greedily only.")
            wanted = normalize_gen_kwargs(asked)  # max_gen_toks has three other names
            texts, truncated = drive(
                greedy_steps(
                    self.stack,
                    self.tokenizer,
                    [requests[i].args[0] for i in chosen],
                    max_new_tokens=wanted["max_gen_toks"],
                    stop=[mark for mark in wanted["until"] if mark],
                    max_length=self.max_length,
                    as_is=True,
                )
            )
            self.truncated += truncated
            for index, text in zip(chosen, texts):
                answers[index] = text
        return answers


@dataclass(frozen=True)
class LmEvalSuite:
    """A suite of lm-eval tasks.

    Attributes
    ----------
    names : tuple of str
        Tasks, groups or tags of lm-eval.
    limit : int or None
        Examples a task.
    """

    names: tuple[str, ...]
    limit: int | None = None

    @classmethod
    def of(cls, names: str) -> LmEvalSuite:
        """Split `"arc_easy,piqa"` up.

        Raises
        ------
        SuiteError
            No names, or one that lm-eval does not know.
        """
        wanted = tuple(name.strip() for name in names.split(",") if name.strip())
        known = set(_manager(wanted).all_tasks)
        unknown = [name for name in wanted if name not in known]
        if unknown or not wanted:
            raise SuiteError(
                f"lm-eval {lm_eval.__version__} has no task {', '.join(unknown) or '(no name was given)'}. "
                "`lm-eval ls tasks` lists those that it has."
            )
        return cls(wanted)

    @property
    def name(self) -> str:
        """As it is asked for."""
        return f"lm-eval:{','.join(self.names)}"

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of task names, limit, lm-eval's version, our scoring's, and the tasks that ship."""
        digest = hashlib.sha256(repr((self.names, self.limit, lm_eval.__version__, ENGINE)).encode())
        if any(name.startswith("mini7") for name in self.names):
            folder = data_dir() / "suites"
            for file in sorted([*folder.glob("lm_eval/*"), *folder.glob("mini7/*.jsonl")]):
                digest.update(file.read_bytes() if file.is_file() else b"")
        return digest.hexdigest()

    @property
    def tasks(self) -> list:
        """Nothing that ildlab would have to generate: `plan` refuses tasks that need that."""
        return []

    def take(self, limit: int) -> LmEvalSuite:
        """Return the suite with at most `limit` examples a task."""
        if limit < 1:
            raise SuiteError(f"limit={limit}: a task needs at least one example.")
        return LmEvalSuite(self.names, limit)

    def steps(self, stack: LayerStack, tokenizer: Any) -> Generator[Progress, None, SuiteResult]:
        """Run `lm_eval.simple_evaluate` on the model in memory."""
        yield Progress(0, 1, f"{self.name} (lm-eval shows its own progress)")
        model = StackLM(stack, tokenizer)
        with _quiet(), self._hub():
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=list(self.names),
                limit=self.limit,
                bootstrap_iters=0,
                task_manager=_manager(self.names),
            )
        tasks, notes = {}, []
        for name, samples in found["samples"].items():
            # lm-eval has a sample for each document *and* filter of the answer: the first filter counts.
            filters = list(dict.fromkeys(sample.get("filter", "none") for sample in samples))
            samples = [sample for sample in samples if sample.get("filter", "none") == filters[0]]
            if len(filters) > 1:
                notes.append(f"{name}: answers by the filter {filters[0]!r} of {', '.join(filters)}.")
            chance = float(np.mean([1 / max(1, len(sample["arguments"])) for sample in samples]))
            several = any(len(sample["arguments"]) > 1 for sample in samples)
            tasks[name] = _task_result(name, samples, chance if several else 0.0)
        if model.truncated:
            notes.append(f"{model.truncated} contexts were cut from the left to {model.max_length} tokens.")
        return SuiteResult(self.name, self.fingerprint, tasks, notes=notes)

    @contextlib.contextmanager
    def _hub(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not _no_hub(error):
                raise
            raise SuiteError(
                f"lm-eval could not load the data of {self.name}: {first_line(error)}\n"
                "Its tasks come from the Hub: run this where there is network access, or use 'mini7'."
            ) from error

    def plan(self, tokenizer: Any, length: int) -> LmEvalPlan:
        """Collect the tasks' log-likelihood requests, for an ablation sweep."""
        with _quiet(), self._hub():
            tasks = _manager(self.names).load(list(self.names))["tasks"]
            for task in tasks.values():
                task.build_all_requests(limit=self.limit, rank=0, world_size=1)
        return LmEvalPlan.of(tasks, tokenizer, length)


@dataclass
class LmEvalPlan:
    """Requests of lm-eval tasks as one list; the counterpart of `ildlab.evaluate.plan.Plan`."""

    docs: list[list[tuple[Any, dict, list[int]]]]
    encoded: list[Encoded]
    owner: np.ndarray
    gold: np.ndarray
    names: list[str]

    @classmethod
    def of(cls, tasks: dict[str, Any], tokenizer: Any, length: int) -> LmEvalPlan:
        """Encode the requests of built tasks.

        Raises
        ------
        SuiteError
            A task that needs more than log-likelihoods of continuations.
        """
        docs, pairs, owner, gold = [], [], [], []
        example = 0
        for name, task in tasks.items():
            if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
                raise SuiteError(f"{name} of lm-eval is a {task.OUTPUT_TYPE} task: it cannot be scored in a sweep.")
            by_doc: dict[int, list] = {}
            for instance in task.instances:
                by_doc.setdefault(instance.doc_id, []).append(instance)
            docs.append([])
            for instances in by_doc.values():
                right = task.doc_to_target(instances[0].doc) if task.OUTPUT_TYPE == "multiple_choice" else None
                places = []
                for number, instance in enumerate(sorted(instances, key=lambda one: one.idx)):
                    places.append(len(pairs))
                    pairs.append(instance.args)
                    owner.append(example)
                    gold.append(1.0 if not isinstance(right, int) or number == right else 0.0)
                docs[-1].append((task, instances[0].doc, places))
                example += 1
        encoded = encode(tokenizer, pairs, length)
        return cls(docs, encoded, np.array(owner), np.array(gold), list(tasks))

    @property
    def truncated(self) -> dict[str, int]:
        """Contexts of each task that lost their beginning."""
        return {
            name: sum(any(self.encoded[p].truncated for p in places) for _, _, places in docs)
            for name, docs in zip(self.names, self.docs)
        }

    @property
    def groups(self) -> list[int]:
        """Example of each request."""
        return self.owner.tolist()

    @property
    def examples(self) -> int:
        """Examples of all tasks."""
        return sum(map(len, self.docs))

    def task_rows(self) -> list[np.ndarray]:
        """Indices of each task's examples among all."""
        ends = np.cumsum([len(docs) for docs in self.docs])
        return [np.arange(end - len(docs), end) for docs, end in zip(self.docs, ends)]

    def example_of_request(self) -> np.ndarray:
        """Index of the example that each request belongs to."""
        return self.owner

    def is_gold(self) -> np.ndarray:
        """1 where a request is the right answer of its example, else 0."""
        return self.gold

    def example_weights(self) -> np.ndarray:
        """Weights [examples] with which the mean of the values is the mean over tasks."""
        return np.concatenate([np.full(len(docs), 1 / len(docs) / len(self.docs)) for docs in self.docs])

    def example_values(self, outcomes: Outcomes) -> np.ndarray:
        """Score of each example, by the task's own `process_results`."""
        greedy = outcomes.matched == outcomes.length
        values = []
        for task, doc, places in (one for docs in self.docs for one in docs):
            answers = [(float(outcomes.loglikelihood[p]), bool(greedy[p])) for p in places]
            found = task.process_results(doc, answers)
            values.append(float(found[_measure(found)]))
        return np.array(values)


def _task_result(name: str, samples: list[dict], chance: float) -> TaskResult:
    measure = _measure(samples[0])
    values = [sample[measure] for sample in samples]
    if measure == "bits_per_byte":
        sizes = [float(size) for _, size in values]
        bits = [-ll / size / math.log(2) for ll, size in values]
        return TaskResult(name, "lm-eval", measure, bits, sizes, 8.0, "lower")
    others = {m: float(np.mean([s[m] for s in samples])) for m in PREFERRED[:4] if m in samples[0] and m != measure}
    return TaskResult(name, "lm-eval", measure, [float(v) for v in values], None, chance, others=others)


def _measure(found: dict) -> str:
    for name in PREFERRED:
        if name in found and (name == "bits_per_byte" or isinstance(found[name], (int, float, np.number))):
            return name
    raise SuiteError(f"None of lm-eval's measures here has a value for each example: {', '.join(found)}.")


def _manager(names: Sequence[str]):
    """lm-eval's task manager: of our tasks alone where they are enough."""
    own = _index(False)
    return own if set(names) <= set(own.all_tasks) else _index(True)


@cache
def _index(defaults: bool):
    # With lm-eval's own tasks it reads the headers of 14,000 files, which takes 20 s.
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(data_dir() / "suites" / "lm_eval"), include_defaults=defaults)


def _no_hub(error: Exception) -> bool:
    """Whether an error means that a data set on the Hub is out of reach, or not there."""
    if isinstance(error, ConnectionError) or type(error).__module__.startswith(("huggingface_hub", "httpx")):
        return True
    return type(error).__name__ in ("DatasetNotFoundError", "OfflineModeIsEnabled")


class _quiet:
    """lm-eval logs warnings of its own while it loads tasks; errors still show."""

    def __enter__(self):
        self.logger = logging.getLogger("lm_eval")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_):
        self.logger.setLevel(self.level)
