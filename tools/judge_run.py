"""Judge one run's student on held-out files: what was lost without distillation, and how much was won back.

    python tools/judge_run.py runs/six ../shared/heldout

Three models: the teacher, the teacher without the removed layers (pruned only), and the run's student. Nats a
token on the eval split of the training text (and of each of its sources) and on the second half of WikiText-2's
validation text; accuracy on ARC-Easy and COPA. "Won back" is (pruned - student) / (pruned - teacher), in nats.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pandas as pd
from judge_students import unspaced

from ildlab.evaluate.suites import Suite, score_suite
from ildlab.evaluate.tasks import Task, read_jsonl
from ildlab.evaluate.text_quality import evaluate
from ildlab.session.session import PruningSession
from ildlab.text.blocks import load_text
from ildlab.text.sources import split_of


def texts(session: PruningSession, folder: Path, tokens: int) -> dict:
    """Text blocks by name: the training text's eval split, its sources', WikiText-2."""
    source, block, tokenizer = session.config.text, session.config.block, session.tokenizer
    names = dict.fromkeys([source, *source.split("+")])
    found = {
        f"eval split of {name}": load_text(name, tokenizer, block=block, tokens=tokens, split="eval") for name in names
    }
    wiki = unspaced((folder / "wikitext2-valid.txt").read_text(encoding="utf-8"))
    wiki = wiki[len(wiki) // 2 :]  # nothing was chosen on the second half
    # One document has one split, whichever it falls to.
    found["WikiText-2"] = load_text([wiki], tokenizer, block=block, tokens=tokens, split=split_of(wiki))
    return found


def questions(folder: Path, examples: int) -> Suite:
    """ARC-Easy per byte, and COPA; the second half of each file."""
    arc, copa = (read_jsonl(folder / name)[1] for name in ("arc_easy.jsonl", "copa.jsonl"))
    arc = [{**row, "query": row["query"] + "\nAnswer:"} for row in arc[len(arc) // 2 :][:examples]]
    copa = copa[len(copa) // 2 :]
    return Suite(
        "held out",
        (
            Task("arc_easy", "multiple_choice", tuple(arc), normalise="bytes", chance=0.25),
            Task("copa", "multiple_choice", tuple(copa), chance=0.5),
        ),
    )


def main() -> None:
    """Print two tables: nats a token, and accuracy with intervals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each text")
    parser.add_argument("--examples", type=int, default=300, help="questions of ARC-Easy")
    args = parser.parse_args()
    suite = questions(args.heldout, args.examples)
    with PruningSession.open(args.run) as session:
        pruned = session.teacher.share()
        for layer_id in session.removed:
            pruned.remove(layer_id)
        models = {"teacher": session.teacher, "pruned only": pruned, "student": session.student}
        rows = []
        for name, blocks in texts(session, args.heldout, args.tokens).items():
            nats = {
                label: math.log(evaluate(stack, session.teacher, blocks, speed=False, show=False).perplexity)
                for label, stack in models.items()
            }
            won = (nats["pruned only"] - nats["student"]) / (nats["pruned only"] - nats["teacher"])
            rows.append({"text": name, "tokens": blocks.n_tokens, **nats, "won back": won})
        print(f"removed {session.removed}; {len(session.student)} of {len(session.teacher)} layers")
        seconds = sum(step.seconds for step in session.path)
        parts = pd.Series([s.seconds for s in session.path]).groupby([s.action for s in session.path]).sum()
        print(f"{seconds:.0f} s in the journal: {parts.round(0).to_dict()}")
        print(pd.DataFrame(rows).round(4).to_string(index=False), flush=True)
        scores = {}
        for label, stack in models.items():
            result = score_suite(stack, session.tokenizer, suite, show=False)
            scores[label] = {name: str(task.interval()) for name, task in result.tasks.items()}
        print(pd.DataFrame(scores).T.to_string())


if __name__ == "__main__":
    main()
