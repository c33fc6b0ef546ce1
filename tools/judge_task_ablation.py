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
from ildlab.evaluate.suites import load_suite, score_suite
from ildlab.importance import task as task_ablation
from ildlab.model.stack import LayerStack


def replay(job, seed: int, confidence: float = 0.95, tie: float = 0.005) -> tuple[int, float]:
    """Race on known values; returns the layer chosen and the share of the work done."""
    seen, alive, work = np.zeros(job.plan.examples, bool), list(job.layer_ids), 0
    for part in task_ablation._parts(job.plan, np.random.default_rng(seed)):
        seen[part] = True
        work += len(part) * len(alive)
        gone = task_ablation.leavers(job, seen, alive, confidence)
        alive = [i for i in alive if i not in gone]
        if len(alive) == 1 or task_ablation._tied(job, seen, alive, confidence, tie):
            break
    columns = [job.layer_ids.index(i) for i in alive]
    weights = job.weights[seen]
    means = weights @ job.without[np.ix_(seen, columns)]
    return alive[int(means.argmax())], work / job.without.size


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
    jobs = []
    sweep = task_ablation._Sweep

    class Kept(sweep):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            jobs.append(self)

    task_ablation._Sweep = Kept
    ask = {"suite": load_suite(args.suite), "tokenizer": loaded.tokenizer, "show": False}
    alone: dict[int, tuple[float, float]] = {}
    chosen = student.layer_ids[:: args.separate] if args.separate else []
    separate(student, loaded.tokenizer, ask["suite"], chosen[::2], alone)
    scores = measure(student, None, "task", **ask)
    print(f"full ablation: {scores.seconds:.0f} s; least important {scores.ranking[:6]}")
    print(scores.table["score"].round(4).to_dict(), flush=True)
    task_ablation._Sweep = sweep
    found = [replay(jobs[0], seed) for seed in range(args.seeds)]
    best = scores.table["score"].min()
    regret = np.array([scores.table["score"][layer] - best for layer, _ in found])
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
        apart = max(abs(scores.table["score"][i] - (whole - found)) for i, (_, found) in alone.items())
        every = float(np.mean([seconds for seconds, _ in alone.values()])) * len(student)
        print(
            f"{len(student)} separate evaluations: {every:.0f} s, {len(alone)} of them run; scores {apart:.1e} apart"
        )
        print(f"sweep / separate {scores.seconds / every:.3f}, race / separate {raced / every:.3f}")


if __name__ == "__main__":
    main()
