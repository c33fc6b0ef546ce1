"""Evaluation: log-likelihoods against lm-eval's HFLM, and a suite's ablation against separate runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

HELDOUT = Path(__file__).resolve().parents[2] / "shared" / "heldout" / "arc_easy.jsonl"


def bench() -> list[dict]:
    """Rows for `benchmarks/run.py`."""
    from ildlab.model.load import load_model
    from ildlab.model.stack import LayerStack

    loaded = load_model("smollm2-135m", dtype="float32", device="cpu")
    stack = LayerStack(loaded.model)
    return [_throughput(stack, loaded.tokenizer), *_ablation(stack, loaded.tokenizer), _mini7(stack, loaded.tokenizer)]


def _clock(work, *args, **options) -> tuple[float, object]:
    start = time.perf_counter()
    result = work(*args, **options)
    return time.perf_counter() - start, result


def _throughput(stack, tokenizer, examples: int = 60) -> dict:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from ildlab.evaluate.loglikelihood import encode, score_steps, window
    from ildlab.evaluate.suites import load_suite
    from ildlab.progress import drive

    if HELDOUT.is_file():
        rows = [json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines()[:examples]]
        name, tail = "ARC-Easy", "\nAnswer:"
    else:
        rows, name, tail = load_suite("mini7").tasks[0].rows[:examples], "mini7 knowledge", ""
    asked = [
        (number, row["query"] + tail, " " + choice) for number, row in enumerate(rows) for choice in row["choices"]
    ]
    owners, pairs = [number for number, *_ in asked], [tuple(pair) for _, *pair in asked]

    def ours(count: int | None = None) -> list[float]:
        encoded = encode(tokenizer, pairs[:count], window(stack, tokenizer))
        return drive(score_steps(stack, encoded, owners[:count]), show=False).loglikelihood.tolist()

    model = HFLM(pretrained=stack.model, tokenizer=tokenizer, batch_size=16)

    def theirs(count: int | None = None) -> list[float]:
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs[:count])]
        return [found for found, _ in model.loglikelihood(requests, disable_tqdm=True)]

    ours(8), theirs(8)  # warm up
    mine, a = _clock(ours)
    their, b = _clock(theirs)
    apart = max(abs(x - y) for x, y in zip(a, b))
    return {
        "name": f"throughput on {name} / HFLM's",
        "ratio": their / mine,
        "limit": ">= 1.5",
        "note": f"{len(pairs)} requests in {mine:.1f} s and {their:.1f} s; log-likelihoods at most {apart:.1e} apart",
    }


def _ablation(stack, tokenizer) -> list[dict]:
    from ildlab import measure
    from ildlab.evaluate.suites import load_suite, score_suite

    small = load_suite("mini7@4")
    whole = score_suite(stack, tokenizer, small).aggregate
    drops, separate = {}, 0.0

    def alone(layer_ids) -> None:
        nonlocal separate
        for layer_id in layer_ids:
            pruned = stack.share()
            pruned.remove(layer_id)
            seconds, found = _clock(score_suite, pruned, tokenizer, small)
            separate += seconds
            drops[layer_id] = whole - found.aggregate

    # Half of them before the sweep and half after it, so that a machine whose speed drifts treats both alike.
    alone(stack.layer_ids[::2])
    swept, scores = _clock(measure, stack, None, "task", suite=small, tokenizer=tokenizer)
    alone(stack.layer_ids[1::2])
    apart = max(abs(scores.table.score[layer_id] - drop) for layer_id, drop in drops.items())
    large = load_suite("mini7@24")
    raced, race = _clock(measure, stack, None, "task", suite=large, tokenizer=tokenizer, race=True)
    some = []
    for layer_id in (3, 15, 27):
        with stack.without(layer_id):
            some.append(_clock(score_suite, stack, tokenizer, large)[0])
    thirty = len(stack) * float(np.mean(some))
    left = int((race.table.n == race.table.n.max()).sum())
    return [
        {
            "name": "ablation by mini7@4 / 30 separate evaluations",
            "ratio": swept / separate,
            "limit": "<= 0.6",
            "note": f"{swept:.0f} s and {separate:.0f} s; scores at most {apart:.1e} apart",
        },
        {
            "name": "raced ablation by mini7@24 / 30 separate evaluations",
            "ratio": raced / thirty,
            "limit": "<= 0.25",
            "note": f"{raced:.0f} s; 30 runs taken as 10 times 3 of them, {thirty:.0f} s; {left} layers left, "
            f"{race.details['stopped']}",
        },
    ]


def _mini7(stack, tokenizer) -> dict:
    from ildlab.evaluate.suites import score_suite

    seconds, found = _clock(score_suite, stack, tokenizer, "mini7")
    return {
        "name": "mini7 on the teacher / 90 s",
        "ratio": seconds / 90,
        "limit": "<= 1",
        "note": f"{sum(task.n for task in found.tasks.values())} examples in {seconds:.0f} s, {found.interval()}",
    }
