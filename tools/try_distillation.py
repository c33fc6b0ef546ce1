"""Compare ways to distill on one pruned student: the tables of docs/distillation.md.

    python tools/try_distillation.py ../shared/heldout --ways base paper --seeds 0 1 2

The same layers are removed each time; then one setting differs from the base. Judged on the *first* halves of the held-out
files (the second judge what was chosen here): nats a token of WikiText-2 won back, (pruned - student) / (pruned - teacher),
the KL to the teacher that is left there, and the quality lost on a sample of mini7.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import heldout
import pandas as pd

from ildlab import load_model, load_text
from ildlab.distill.config import DistillConfig
from ildlab.distill.train import distill
from ildlab.evaluate.suites import load_suite, score_suite
from ildlab.evaluate.text_quality import evaluate
from ildlab.model.stack import LayerStack

KL_TOKENS = 20_480
# Fields that differ from DistillConfig()'s; `local_tokens` and `tokens` are as in the base where a way names none.
WAYS = {
    "base": {},
    "no local stage": {"local_tokens": 0},
    "local stage alone": {"tokens": 1, "learning_rate": 1e-12},
    "half the local stage": {"local_tokens": 100_000},
    "twice the local stage": {"local_tokens": 400_000},
    "twice the KL": {"tokens": 2 * KL_TOKENS},
    "neighbours": {"scope": "neighbours"},
    "window(2)": {"scope": "window(2)"},
    "window(4)": {"scope": "window(4)"},
    "local rate 1e-3": {"local_rate": 1e-3},
    "local rate 4e-3": {"local_rate": 4e-3},
    "KL rate 1e-3": {"learning_rate": 1e-3},
    "4 rows a step": {"batch_size": 4},
    "joint KL + hidden states": {"hidden_weight": 1.0},
    "reverse KL": {"divergence": "reverse_kl"},
    "JSD, weight 4": {"divergence": "jsd", "kl_weight": 4.0},
    "prose alone": {"text": "teacher-samples"},
    "docs alone": {"text": "python-docs"},
    "paper": {"paper": True},
}


def main() -> None:
    """Print a line a way as it is done, and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--removed", type=int, nargs="+", default=[3, 4, 5, 6])
    parser.add_argument("--local", type=int, default=200_000, help="tokens of the local stage")
    parser.add_argument("--tokens", type=int, default=KL_TOKENS, help="tokens of the joint stage")
    parser.add_argument("--text", default="mix")
    parser.add_argument("--ways", nargs="*", help="names of the ways to try; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    loaded = load_model("smollm2-135m")
    teacher, tokenizer = LayerStack(loaded.model), loaded.tokenizer
    wiki, suite = heldout.wikitext(args.heldout, tokenizer, 1, 4096), load_suite("mini7@24")

    def judge(stack: LayerStack) -> dict[str, float]:
        result = evaluate(stack, teacher, wiki, speed=False, show=False)
        aggregate = score_suite(stack, tokenizer, suite, show=False).aggregate
        return {"nats": heldout.nats(stack, wiki), "KL": result.kl, "mini7": aggregate}

    whole, bare = judge(teacher), judge(teacher.share(without=args.removed))
    print(f"teacher {whole}\npruned {bare}", flush=True)
    rows = []
    for name in args.ways or WAYS:
        for seed in args.seeds:
            way = {"local_tokens": args.local, "tokens": args.tokens, "text": args.text, "seed": seed} | WAYS[name]
            source, paper = way.pop("text"), way.pop("paper", False)
            if paper:  # the same tokens, all of them in its one stage
                way |= {"local_tokens": 0, "tokens": args.local + args.tokens}
            config = DistillConfig.paper(**way) if paper else DistillConfig(**way)
            tokens = max(config.tokens, config.local_tokens)
            blocks = load_text(source, tokenizer, block=128, tokens=tokens, split="train", seed=seed)
            student, start = teacher.share(without=args.removed), time.perf_counter()
            distill(student, teacher, blocks, config, gap=args.removed, show=False)
            seconds, found = time.perf_counter() - start, judge(student)
            won = (bare["nats"] - found["nats"]) / (bare["nats"] - whole["nats"])
            loss = 1 - found["mini7"] / whole["mini7"]
            rows.append({"way": name, "seed": seed, "seconds": round(seconds), "won back": won, "KL": found["KL"]})
            rows[-1]["mini7 loss"] = loss
            print(rows[-1], flush=True)
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
