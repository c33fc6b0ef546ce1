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
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import find_executable_batch_size
from torch.nn.utils.rnn import pad_sequence

from ildlab.errors import SuiteError, first_line
from ildlab.evaluate.loglikelihood import ENGINE
from ildlab.evaluate.results import SuiteResult, TaskResult
from ildlab.limits import check_ids
from ildlab.model.generate import plain_decoding
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, Work
from ildlab.text.blocks import opened, opening_ids

try:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise SuiteError("Suites of lm-eval need it: pip install 'ildlab[eval]' (lm-eval 0.4.13 is tested).") from error

TOLD = ("", ".yaml", ".py", ".json", ".jsonl", ".csv", ".txt")  # files of these kinds decide what a task is
FEWSHOT_SEED = 1234  # lm-eval's own default
# The measure that counts, where a task has several: lm-eval's own leaderboards prefer the normalised one.
PREFERRED = ("acc_norm", "acc_bytes", "acc", "exact_match", "f1", "rougeL", "bits_per_byte")


@dataclass(frozen=True)
class LmEvalSuite:
    """Tasks, groups or tags of lm-eval, at most `limit` examples each; with a folder, those of its YAML files alone.

    No ablation sweep can score it (`swept`), since lm-eval runs the model by itself.
    """

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    swept = False

    def __post_init__(self):
        if unknown := set(self.names) - set(_manager(self.folder).all_tasks):
            raise SuiteError(
                f"lm-eval {lm_eval.__version__} has no task {', '.join(sorted(unknown)) or '(no name was given)'}: "
                "see `lm-eval ls tasks`."
            )

    @property
    def name(self) -> str:
        """As it is asked for."""
        return f"{'' if self.folder else 'lm-eval:'}{','.join(self.names)}"

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of task names, limit, lm-eval's version and ours, and the files that lie in the folder."""
        digest = hashlib.sha256(repr((ENGINE, self.names, self.limit, lm_eval.__version__)).encode())
        for file in sorted(self.folder.iterdir()) if self.folder else ():
            if file.is_file() and file.suffix in TOLD:
                digest.update(file.read_bytes())
        return digest.hexdigest()

    def take(self, limit: int) -> LmEvalSuite:
        """The suite with at most `limit` examples a task."""
        return replace(self, limit=limit)

    def steps(self, stack: LayerStack, tokenizer: Any) -> Work[SuiteResult]:
        """Score a model, task by task; `suite_steps` is the way to call it."""
        yield Progress(0, 1, f"{self.name}: loading its data")
        with _in_words(self.name):
            tasks = load_tasks(self.names, self.folder, self.fingerprint)
        # Fewer, where memory runs out.
        run = find_executable_batch_size(_samples, 8 if stack.device.type == "cpu" else 64)
        results, notes = {}, []
        for done, (name, task) in enumerate(tasks.items()):
            yield Progress(done, len(tasks), f"{name} (lm-eval shows its own progress)")
            task.set_fewshot_seed(FEWSHOT_SEED)  # the same examples at every call
            with _in_words(name) as log, plain_decoding(stack.model):
                samples = run(stack, tokenizer, name, task, self.limit)
            # lm-eval has a sample for each document *and* filter of the answer: the first filter counts.
            filters = list(dict.fromkeys(sample["filter"] for sample in samples))
            if len(filters) > 1:
                notes.append(f"{name}: answers by the filter {filters[0]!r} of {', '.join(filters)}.")
            if cut := sum("runcat" in record.getMessage() for record in log.buffer):
                notes.append(f"{name}: contexts were cut from the left to fit the window ({cut} warnings).")
            results[name] = _result(name, [sample for sample in samples if sample["filter"] == filters[0]], cut)
        return SuiteResult(self.name, self.fingerprint, results, notes=notes)


class _Model(HFLM):
    """`HFLM`, but for the texts of a tokenizer that appends an EOS by itself: here they are never ended."""

    @cached_property
    def opening(self) -> tuple[int, ...]:
        return opening_ids(self.tokenizer)

    def tok_encode(self, string, add_special_tokens=None, left_truncate_len=None, **kwargs) -> list[int]:
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        ids = opened(self.opening, ids) if add_special_tokens in (None, True) else ids
        check_ids(self.model, torch.tensor(ids), self.tokenizer)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        rows = [self.tok_encode(string) for string in strings]
        longest, most = max(map(len, rows)), left_truncate_len or sys.maxsize
        if longest > most:
            logging.getLogger("lm_eval").warning(f"Left truncation from {longest} tokens to {most}.")
        rows = [torch.tensor(row[-most:], dtype=torch.long) for row in rows]
        pad = {"batch_first": True, "padding_side": padding_side}
        mask = pad_sequence([torch.ones_like(row) for row in rows], **pad)
        return pad_sequence(rows, padding_value=self.tokenizer.pad_token_id, **pad), mask  # [B, T] each


def _samples(batch_size: int, stack: LayerStack, tokenizer: Any, name: str, task: Any, limit: int | None) -> list:
    """A dict for each document of a task, with its measures."""
    own = copy.deepcopy(tokenizer)  # it is given a padding token, also where its own has no row in the embedding
    if (own.pad_token_id or 0) >= stack.model.get_input_embeddings().weight.shape[0]:
        own.pad_token = None
    # On a CPU torch's fp32 log_softmax errs by some 1e-5 a token.
    precise = "float64" if stack.device.type == "cpu" else "float32"
    model = _Model(stack.model, backend="causal", tokenizer=own, batch_size=batch_size, softmax_dtype=precise)
    return lm_eval.evaluate(model, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0)["samples"][name]


def _result(name: str, samples: list[dict], cut: int) -> TaskResult:
    first, chance, more = samples[0], 0.0, {"truncated": cut}
    known = [m for m in first["metrics"] if m == "bits_per_byte" or isinstance(first[m], (int, float, np.number))]
    measure = next((m for m in (*PREFERRED, *known) if m in known), None)
    if measure is None:
        raise SuiteError(f"{name}: none of its measures has a value for each example: {', '.join(first['metrics'])}.")
    values = np.array([sample[measure] for sample in samples], float)
    if measure == "bits_per_byte":  # each value is (log-likelihood in nats, bytes)
        nats, sizes = values.T
        values, chance = -nats / sizes / math.log(2), 8.0
        more |= {"weights": sizes.tolist(), "direction": "lower"}
    elif max(len(sample["arguments"]) for sample in samples) > 1:  # choices
        chance = float(np.mean([1 / len(sample["arguments"]) for sample in samples]))
    if not np.isfinite(values).all():
        raise SuiteError(f"{name}: {measure} of an example is not a finite number: the model's logits are broken.")
    return TaskResult(name, "lm-eval", measure, values.tolist(), chance=chance, **more)


_own_tasks = cache(TaskManager)  # reads the headers of 14,000 files, which takes 20 s


def _manager(folder: Path | None) -> TaskManager:
    return TaskManager(include_path=folder, include_defaults=False) if folder else _own_tasks()


@lru_cache(maxsize=8)  # a session scores one suite many times, and loading a task reads all of its data
def load_tasks(names: tuple[str, ...], folder: Path | None, fingerprint: str) -> dict[str, Any]:
    """Tasks of lm-eval by name."""
    return _manager(folder).load(list(names))["tasks"]


@contextmanager
def _in_words(name: str) -> Iterator[BufferingHandler]:
    """Run lm-eval with its warnings kept, and with words for people where its data or the model's window say no."""
    logger, log = logging.getLogger("lm_eval"), BufferingHandler(sys.maxsize)
    before = logger.handlers, logger.propagate, logger.level
    logger.handlers, logger.propagate, logger.level = [log], False, logging.WARNING
    try:
        yield log
    except AssertionError as error:
        raise SuiteError(f"lm-eval refuses {name}: {first_line(error)}") from error
    except OSError as error:  # those of the Hub and of `datasets` are such
        raise SuiteError(
            f"lm-eval could not load the data of {name}: {first_line(error)}\nIts tasks come from the Hub: run this "
            "where there is network access, put copies of the data sets below the working directory "
            "(`hf download --repo-type dataset OWNER/NAME --local-dir OWNER/NAME`), or use 'mini7'."
        ) from error
    finally:
        logger.handlers, logger.propagate, logger.level = before
        for record in (each for each in log.buffer if each.levelno >= logging.ERROR):
            logging.lastResort.handle(record)
