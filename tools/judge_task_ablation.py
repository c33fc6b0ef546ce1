"""Judge `measure(metric="task")`: the sweep and the race against evaluations of really pruned models.

    python tools/judge_task_ablation.py --suite mini7 --separate 2 --seeds 200

One full ablation is run. Then the race's rule is replayed on its values over many orders of the examples: printed
are how much more aggregate its choice costs than the best layer's, and the share of (layer, example) pairs it
scored. With `--separate N`, the race is run too, and every Nth layer is removed from a copy that is evaluated on its
own: their scores are compared, and their time stands for that of all layers (N = 1 runs all of them). Half of them
run before the sweep and half after it, so that a machine whose speed drifts treats both alike.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd

from ildlab import load_model, measure
from ildlab.evaluate.loglikelihood import window
from ildlab.evaluate.suites import load_suite, score_suite
from ildlab.importance.race import Race
from ildlab.importance.task import TaskSweep, parts_of
from ildlab.model.stack import LayerStack


def replay(job: TaskSweep, seed: int, confidence: float = 0.95, tie: float = 0.005) -> tuple[int, float]:
    """Race on known values; returns the layer chosen and the share of the work done."""
    race, seen, work = Race(list(job.layer_ids), confidence, tie), np.zeros(job.plan.examples, bool), 0
    for part in parts_of(job.plan, np.random.default_rng(seed)):
        seen[part] = True
        work += len(part) * len(race.alive)
        job.look(race, seen)
        if race.over:
            break
    columns = [job.layer_ids.index(i) for i in race.alive]
    means = job.weights[seen] @ job.without[np.ix_(seen, columns)]
    return race.alive[int(means.argmax())], work / job.without.size


def full_ablation(student: LayerStack, tokenizer, suite) -> tuple[TaskSweep, pd.Series]:
    """Values of every example without each layer, and each layer's score."""
    job = TaskSweep(student, suite.plan(tokenizer, window(student, tokenizer)), 2 * 2**30)
    for done, total in job.run(np.arange(job.plan.examples), job.layer_ids):
        print(f"batch {done} of {total}", end="\r", flush=True)
    return job, pd.Series(job.weights @ (job.whole[:, None] - job.without), index=job.layer_ids)


def clock(work, *args, **options):
    """Seconds that a call takes, and what it gives."""
    start = time.perf_counter()
    found = work(*args, **options)
    return time.perf_counter() - start, found


def separate(student: LayerStack, tokenizer, suite, layers, found: dict[int, tuple[float, float]]) -> None:
    """Evaluate really pruned models; fills in {layer: (seconds, aggregate)}."""
    for layer_id in layers:
        pruned = student.share()
        pruned.remove(layer_id)
        seconds, result = clock(score_suite, pruned, tokenizer, suite, show=False)
        found[layer_id] = seconds, result.aggregate
        print(f"really without {layer_id}: {seconds:.1f} s, aggregate {result.aggregate:.4f}", flush=True)


def main() -> None:
    """Run the full ablation once and print what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="mini7@24")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--remove", type=int, nargs="*", default=[], help="layers removed beforehand")
    parser.add_argument("--separate", type=int, metavar="N", help="evaluate every Nth pruned model on its own")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    loaded = load_model("smollm2-135m", dtype=args.dtype)
    student = LayerStack(loaded.model)
    for layer_id in args.remove:
        student.remove(layer_id)
    ask = {"suite": load_suite(args.suite), "tokenizer": loaded.tokenizer, "show": False}
    alone: dict[int, tuple[float, float]] = {}
    chosen = student.layer_ids[:: args.separate] if args.separate else []
    separate(student, loaded.tokenizer, ask["suite"], chosen[::2], alone)
    swept, (job, scores) = clock(full_ablation, student, loaded.tokenizer, ask["suite"])
    print(f"full ablation: {swept:.0f} s; least important {list(scores.sort_values().index[:6])}")
    print(scores.round(4).to_dict(), flush=True)
    found = [replay(job, seed) for seed in range(args.seeds)]
    best = scores.min()
    regret = np.array([scores[layer] - best for layer, _ in found])
    print(f"suite {args.suite}, {args.seeds} orders: work {np.mean([w for _, w in found]):.3f} of the sweep's")
    print(
        f"aggregate lost beyond the best layer's: mean {regret.mean():.4f}, 90% {np.quantile(regret, 0.9):.4f}, "
        f"worst {regret.max():.4f}; within 0.01: {(regret <= 0.01).mean():.0%}, 0.02: {(regret <= 0.02).mean():.0%}"
    )
    print(pd.Series([layer for layer, _ in found]).value_counts().to_string(), flush=True)
    if args.separate:
        raced, race = clock(measure, student, None, "task", race=True, **ask)
        print(f"race: {raced:.0f} s; least important {race.least_important}; {race.details['stopped']}", flush=True)
        separate(student, loaded.tokenizer, ask["suite"], chosen[1::2], alone)
        whole = score_suite(student, loaded.tokenizer, ask["suite"], show=False).aggregate
        apart = max(abs(scores[i] - (whole - found)) for i, (_, found) in alone.items())
        every = float(np.mean([seconds for seconds, _ in alone.values()])) * len(student)
        print(
            f"{len(student)} separate evaluations: {every:.0f} s, {len(alone)} of them run; scores {apart:.1e} apart"
        )
        print(f"sweep / separate {swept / every:.3f}, race / separate {raced / every:.3f}")


if __name__ == "__main__":
    main()
