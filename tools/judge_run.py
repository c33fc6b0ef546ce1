"""Judge students of runs on mini7 and on held-out files: what was lost, and how much of it was won back.

    python tools/judge_run.py ../shared/heldout runs/demo-1 [runs/another ...] [--layers 26 24]

Beside each student stand the teacher and the teacher without the same layers, never distilled. All of mini7; the second
halves of the held-out sets (their mean, corrected for chance) and of WikiText-2's validation text, in bits per byte.
"Won back" is (pruned - student) / (pruned - teacher), in nats a token.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import heldout
import pandas as pd

from ildlab.evaluate.results import quality_loss
from ildlab.evaluate.suites import load_suite, score_suite
from ildlab.model.load import load_model
from ildlab.model.stack import LayerStack
from ildlab.session.session import PruningSession

HALF = 2  # nothing was chosen on the second half


def main() -> None:
    """Print a line a model as it is judged, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heldout", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument(
        "--layers", type=int, nargs="*", help="depths of the runs to judge; by default where each ended"
    )
    parser.add_argument("--suite", default="mini7")
    parser.add_argument(
        "--chosen", type=int, help="first rows of each of its tasks that chose layers: without them, too"
    )
    parser.add_argument("--rows", type=int, help="of each held-out set; by default all of the half")
    parser.add_argument("--tokens", type=int, default=16_384, help="of WikiText-2")
    args = parser.parse_args()
    loaded = load_model("smollm2-135m")
    suites = [load_suite(args.suite), heldout.questions(args.heldout, HALF, args.rows)]
    blocks = heldout.wikitext(args.heldout, loaded.tokenizer, HALF, args.tokens)
    judged: dict[str, dict] = {}

    def judge(label: str, stack: LayerStack) -> dict:
        if label not in judged:
            nats = heldout.nats(stack, blocks)
            scores = [score_suite(stack, loaded.tokenizer, suite, show=False) for suite in suites]
            bits = heldout.bits_per_byte(nats, blocks, loaded.tokenizer)
            judged[label] = {"nats": nats, "bits per byte": bits, "scores": scores}
        return judged[label]

    table = []
    for folder in args.runs:
        with PruningSession.open(folder, loaded) as session:
            whole = judge("teacher", session.teacher)
            ends = {
                len(step.layer_ids): step.step for step in session.path
            }  # at each depth the last: distilled, if it is
            for depth in args.layers or [len(session.student)]:
                student = session.student_at(ends[depth])
                gone = sorted(set(session.teacher.layer_ids) - set(student.layer_ids))
                pruned = judge(f"without {gone}", session.teacher.share(without=gone))
                found = judge(f"{folder} at {depth}", student)
                table.append({"run": folder.name, "removed": gone} | _row(whole, pruned, found, args))
                print(json.dumps(table[-1]), flush=True)
            seconds = pd.Series([s.seconds for s in session.path]).groupby([s.action for s in session.path]).sum()
            print(f"{folder}: {seconds.sum():.0f} s in the journal: {seconds.round(0).to_dict()}", flush=True)
    print(pd.DataFrame(table).T.to_string())


def _row(whole: dict, pruned: dict, found: dict, args: argparse.Namespace) -> dict:
    """One student's figures beside the teacher's, and beside those of the teacher without the same layers."""
    row = {}
    for name, at, corrected in ((args.suite, 0, False), ("held out", 1, True)):
        form = "aggregate_corrected" if corrected else "aggregate"
        models = {"teacher": whole, "pruned": pruned, "student": found}
        row |= {f"{name}, {label}": round(getattr(m["scores"][at], form), 4) for label, m in models.items()}
        lost = quality_loss(found["scores"][at], whole["scores"][at], corrected=corrected)
        row[f"{name}, loss"] = f"{lost.value:.1%} [{lost.low:.1%}, {lost.high:.1%}]"
    if args.chosen:
        lost = quality_loss(*(m["scores"][0].after(args.chosen) for m in (found, whole)))
        row[f"{args.suite} without rows that chose, loss"] = f"{lost.value:.1%} [{lost.low:.1%}, {lost.high:.1%}]"
    for label, model in (("teacher", whole), ("pruned", pruned), ("student", found)):
        row[f"WikiText-2 bits per byte, {label}"] = round(model["bits per byte"], 4)
    won = (pruned["nats"] - found["nats"]) / (pruned["nats"] - whole["nats"])
    return row | {"WikiText-2, won back": f"{won:.1%}"}


if __name__ == "__main__":
    main()
