"""Judge the students of two runs on mini7 and on held-out files: the table of docs/evaluation.md.

    python tools/judge_students.py runs/compare ../shared/heldout --removed 2 4 6

The runs are those of `notebooks/batch/compare_methods.ipynb`: layers chosen by ablation, with and without
distillation. ARC-Easy and WikiText-2 are read from the second half of their files; nothing was chosen on it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

import pandas as pd

from ildlab.evaluate.results import quality_loss
from ildlab.evaluate.suites import Suite, load_suite, score_suite
from ildlab.evaluate.tasks import Task, read_jsonl
from ildlab.evaluate.text_quality import evaluate
from ildlab.model.load import load_model
from ildlab.session.session import PruningSession
from ildlab.text.blocks import TextBlocks, load_text
from ildlab.text.sources import split_of

RUNS = {"pruned only": "iterative_layerwise_pruning", "distilled": "iterative_layerwise_distillation"}


def unspaced(text: str) -> str:
    """Undo the spacing of WikiText's tokenised text."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?)\]%]|'s|'t|n't)", r"\1", text)
    return re.sub(r"([(\[$]) ", r"\1", text)


def questions(folder: Path, examples: int) -> Suite:
    """ARC-Easy by log-likelihood per byte."""
    _, rows = read_jsonl(folder / "arc_easy.jsonl")
    rows = [{**row, "query": row["query"] + "\nAnswer:"} for row in rows[len(rows) // 2 :][:examples]]
    chance = sum(1 / len(row["choices"]) for row in rows) / len(rows)
    return Suite("held out", (Task("arc_easy", "multiple_choice", tuple(rows), normalise="bytes", chance=chance),))


def wikitext(folder: Path, tokenizer, characters: int) -> TextBlocks:
    """Raw text of WikiText-2, as blocks."""
    text = unspaced((folder / "wikitext2-valid.txt").read_text(encoding="utf-8"))
    text = text[len(text) // 2 :][:characters]
    # One document has one split, whichever it falls to.
    return load_text([text], tokenizer, block=512, tokens=characters // 5, split=split_of(text))


def main() -> None:
    """Print a line a model, the table, and the rank agreement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--removed", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--suite", default="mini7")
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--characters", type=int, default=32_000, help="of WikiText-2")
    args = parser.parse_args()
    loaded = load_model("smollm2-135m")
    suites = [load_suite(args.suite), questions(args.heldout, args.examples), load_suite("canaries@20")]
    blocks = wikitext(args.heldout, loaded.tokenizer, args.characters)
    size = len(loaded.tokenizer.decode(blocks.tokens.flatten()).encode("utf-8"))
    cache, table, teacher = args.runs / "suites", [], None

    def judge(label: str, stack) -> None:
        nonlocal teacher
        found = [score_suite(stack, loaded.tokenizer, suite, cache=cache, show=False) for suite in suites]
        teacher = teacher or found
        loss, corrected = (quality_loss(found[0], teacher[0], corrected=form) for form in (False, True))
        nats = math.log(evaluate(stack, stack, blocks, speed=False, show=False).perplexity)
        scores = {name: task.score for result in found for name, task in result.tasks.items()}
        table.append(
            {
                "student": label,
                "layers": len(stack),
                "aggregate": str(found[0].interval()),
                "loss": str(loss),
                "loss corrected": str(corrected),
                "mean": found[0].aggregate,
                **scores,
                "wikitext2": nats / math.log(2) * blocks.tokens.numel() / size,  # bits per byte
                "arc interval": str(found[1].tasks["arc_easy"].interval()),
            }
        )
        print(json.dumps(table[-1]), flush=True)

    for label, name in RUNS.items():
        with PruningSession.open(args.runs / name, loaded) as session:
            if teacher is None:
                judge("teacher", session.teacher)
            ends = {}
            for step in session.path:
                ends[len(step.layer_ids)] = step.step  # the last step at this depth: distilled, if it is
            for removed in args.removed:
                judge(f"{label}, {removed} removed", session.student_at(ends[len(session.teacher) - removed]))
    frame = pd.DataFrame(table)
    print(frame.round(3).to_string())
    print(frame[["mean", "arc_easy", "wikitext2"]].corr(method="spearman").round(2).to_string())


if __name__ == "__main__":
    main()
