"""Compare ways to distill at equal tokens, on one pruned student: the table of docs/distillation.md.

    python tools/try_distillation.py ../shared/heldout --tokens 12288

The same layers are removed each time; then one setting differs. Judged on the eval split of the training
text and on the *first* half of WikiText-2's validation text (the second half judges what was chosen here): nats
a token won back, (pruned - student) / (pruned - teacher), and the KL to the teacher that is left.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import pandas as pd
from judge_students import unspaced

from ildlab import load_model, load_text
from ildlab.distill.config import DistillConfig
from ildlab.distill.train import distill
from ildlab.evaluate.text_quality import evaluate
from ildlab.model.stack import LayerStack
from ildlab.text.sources import split_of

BASE = dict(scope="suffix", hidden_weight=0.0, learning_rate=7e-4)
WAYS = {
    "suffix, KL (base)": {},
    "KL + relative MSE": {"hidden_weight": 1.0},
    "KL + 0.5 CE": {"ce_weight": 0.5},
    "reverse KL": {"divergence": "reverse_kl"},
    "JSD(0.5), weight 4": {"divergence": "jsd", "kl_weight": 4.0},
    "scope all": {"scope": "all"},
    "scope window(2)": {"scope": "window(2)"},
    "scope neighbours": {"scope": "neighbours"},
    "scope window(3)": {"scope": "window(3)"},
    "scope window(5)": {"scope": "window(5)"},
    "scope suffix(3)": {"scope": "suffix(3)"},
    "window(3), KL + 0.5 CE": {"scope": "window(3)", "ce_weight": 0.5},
    "window(3), KL + relative MSE": {"scope": "window(3)", "hidden_weight": 1.0},
    "window(3), after each removal, 5e-4": {"scope": "window(3)", "spread": True, "learning_rate": 5e-4},
    "a share after each removal, 2e-4": {"spread": True, "learning_rate": 2e-4},
    "a share after each removal, 5e-4": {"spread": True, "learning_rate": 5e-4},
    "DistillConfig.paper()": {"paper": True},
}


def train(student: LayerStack, teacher: LayerStack, removed: list[int], blocks, way: dict) -> int:
    """Remove the layers and distill in one of the ways; returns how many layers trained last."""
    way = dict(way)
    spread, paper = (way.pop(name, False) for name in ("spread", "paper"))
    config = DistillConfig.paper() if paper else DistillConfig(**{**BASE, **way})
    parts = [[i] for i in removed] if spread else [removed]
    share = len(blocks) // len(parts)
    for number, gap in enumerate(parts):
        for layer_id in gap:
            student.remove(layer_id)
        rows = blocks.tokens[number * share : (number + 1) * share]
        result = distill(student, teacher, rows, config, gap=gap, show=False)
    return len(result.trained)


def main() -> None:
    """Print a line a way as it is done, and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--text", default="python-docs")
    parser.add_argument("--tokens", type=int, default=12_288)
    parser.add_argument("--removed", type=int, nargs="+", default=[25, 14, 17, 13, 16, 18])
    parser.add_argument("--ways", nargs="*", help="parts of the names of the ways to try; all by default")
    args = parser.parse_args()
    loaded = load_model("smollm2-135m", dtype="float32")
    teacher, tokenizer = LayerStack(loaded.model), loaded.tokenizer

    def text(split: str, tokens: int):
        return load_text(args.text, tokenizer, block=128, tokens=tokens, split=split)

    wiki = unspaced((args.heldout / "wikitext2-valid.txt").read_text(encoding="utf-8"))
    wiki = wiki[: len(wiki) // 2]
    judged = {
        "eval split": text("eval", 4096),
        "WikiText": load_text([wiki], tokenizer, block=128, tokens=4096, split=split_of(wiki)),
    }
    train_blocks = text("train", args.tokens)

    def judge(stack) -> dict:
        found = {}
        for name, blocks in judged.items():
            result = evaluate(stack, teacher, blocks, speed=False, show=False)
            found[name], found[f"KL, {name}"] = math.log(result.perplexity), result.kl
        return found

    whole, pruned = judge(teacher), teacher.share()
    for layer_id in args.removed:
        pruned.remove(layer_id)
    bare = judge(pruned)
    print(f"teacher {whole}\npruned {bare}", flush=True)
    rows = []
    for name, way in WAYS.items():
        if args.ways and not any(part in name for part in args.ways):
            continue
        student, start = teacher.share(), time.perf_counter()
        layers = train(student, teacher, args.removed, train_blocks, way)
        seconds, found = time.perf_counter() - start, judge(student)
        won = {f"won back, {t}": (bare[t] - found[t]) / (bare[t] - whole[t]) for t in judged}
        left = {k: v for k, v in found.items() if k.startswith("KL")}
        rows.append({"way": name, "layers": layers, "seconds": round(seconds), **won, **left})
        print(rows[-1], flush=True)
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
