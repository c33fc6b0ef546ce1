"""Rank layers on held-out kinds beside those of the mix: which of them does real prose, do real questions agree with?

    python tools/rank_heldout.py ../shared/heldout

KL without each layer on the mix, kind by kind, and on WikiText-2; the drop of the aggregate on the four sets of questions. First
halves. No layer is chosen by it: it says how near the mix is to what students are judged on (docs/studies.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import heldout

from ildlab import LayerStack, load_model, load_text, measure
from ildlab.importance import rank_correlation

HALF, BLOCK, POSITIONS = 1, 128, 32


def main() -> None:
    """Print each kind's first layers, and how its ranking goes with the held-out ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--rows", type=int, default=24, help="of each set of questions")
    args = parser.parse_args()
    loaded = load_model("smollm2-135m")
    stack, tokenizer = LayerStack(loaded.model), loaded.tokenizer
    mix = load_text("mix", tokenizer, block=BLOCK, tokens=args.tokens, split="calibration")
    wiki = heldout.wikitext(args.heldout, tokenizer, HALF, args.tokens, BLOCK)
    suite = heldout.questions(args.heldout, HALF, args.rows)
    whole = measure(stack, mix, "kl", stack, positions=POSITIONS)
    scores = {kind: whole.of_kind(kind) for kind in dict.fromkeys(whole.kinds)}
    real = {
        "WikiText-2": measure(stack, wiki, "kl", stack, positions=POSITIONS),
        "questions": measure(stack, None, "task", suite=suite, tokenizer=tokenizer),
    }
    for name, each in (scores | real).items():
        first = f"first to go {each.ranking[:8]}, {len(each.tied)} tied, halves agree at {each.split_half():.2f}"
        beside = [(other, *rank_correlation(each, real[other])) for other in real if other != name]
        print(f"{name}: {first}; " + ", ".join(f"{o} {v:.2f} [{a:.2f}, {b:.2f}]" for o, v, a, b in beside), flush=True)


if __name__ == "__main__":
    main()
