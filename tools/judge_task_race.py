"""Judge the race of `measure(metric="task", race=True)`: one full ablation, then its rule replayed over many orders.

    python tools/judge_task_race.py --suite mini7@24 --seeds 200

Each seed draws the examples in another order; the race then drops layers by `ildlab.task_ablation.leavers` on the
values that the full ablation found. Printed: how much more aggregate its choice costs than the best layer's,
and the share of (layer, example) pairs it scored.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd

from ildlab import load_model, measure, task_ablation
from ildlab.stack import LayerStack


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


def main() -> None:
    """Run the full ablation once and print the replays' table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="mini7@24")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--remove", type=int, nargs="*", default=[], help="layers removed beforehand")
    args = parser.parse_args()
    loaded = load_model("smollm2-135m", dtype="float32")
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
    scores = measure(student, None, "task", suite=args.suite, tokenizer=loaded.tokenizer, show=False)
    print(f"full ablation: {scores.seconds:.0f} s; least important {scores.ranking[:6]}")
    print(scores.table["score"].round(4).to_dict())
    found = [replay(jobs[0], seed) for seed in range(args.seeds)]
    best = scores.table["score"].min()
    regret = np.array([scores.table["score"][layer] - best for layer, _ in found])
    print(
        f"suite {args.suite}, {args.seeds} orders: work {np.mean([w for _, w in found]):.3f} of the sweep's"
    )
    print(
        f"aggregate lost beyond the best layer's: mean {regret.mean():.4f}, 90% {np.quantile(regret, 0.9):.4f}, "
        f"worst {regret.max():.4f}; within 0.01: {(regret <= 0.01).mean():.0%}, 0.02: {(regret <= 0.02).mean():.0%}"
    )
    print(pd.Series([layer for layer, _ in found]).value_counts().to_string())


if __name__ == "__main__":
    main()
