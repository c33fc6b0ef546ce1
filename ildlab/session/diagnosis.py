"""Failure signatures that the method's authors name (arXiv 2511.05085): what a run's figures say is going wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd

from ildlab.errors import first_line
from ildlab.session.run import Run
from ildlab.session.tables import history_table

AGGREGATE_FLOOR = 0.3  # an aggregate below this, after MANY_REMOVED removals without distillation, is collapse
MANY_REMOVED = 4
SHARP_DROP = 0.15  # part of the teacher's aggregate that one removal may cost
SHARP_KL = 0.7  # nats of KL that one removal may add, where there is no aggregate to go by
RECOVERY = 0.25  # part of the KL added by a removal that distillation should win back

Row = Mapping[str, Any]
Seen = tuple[str, str] | None  # what is seen, and what to try


@dataclass(frozen=True)
class Finding:
    """A failure signature that was seen, told from which figures, and what to try."""

    signature: str
    """`"pruning without distillation"`, `"essential layer"`, `"not finite"` or `"no recovery"`."""
    n_removed: int | None
    """Layers removed when it was seen."""
    seen: str
    advice: str


def diagnose(run: Run | pd.DataFrame) -> list[Finding]:
    """Name the failure signatures of a run, or of a table as its `history()`, in the order of the iterations.

    Figures that a table lacks are not judged.
    """
    table = history_table(run) if isinstance(run, Run) else run
    rows = [{k: v for k, v in row.items() if not pd.isna(v)} for row in table.to_dict("records")]
    found: list[Finding] = []
    for before, row in pairwise(rows):
        seen = {
            "pruning without distillation": _collapse(row),
            "essential layer": _essential(before, row, _aggregate(rows[0])),
            "no recovery": _no_recovery(before, row),
        }
        found += [Finding(name, int(row["n_removed"]), *said) for name, said in seen.items() if said]
    advice = "Logits are scaled too high for the dtype: lower the learning rate, or use bf16 or fp32."
    failed = _failures(run) if isinstance(run, Run) else []
    return found + [Finding("not finite", None, first_line(error), advice) for error in failed]


def _collapse(row: Row) -> Seen:
    aggregate, n = _aggregate(row), row["n_removed"]
    distilled = "kl" in row or "perplexity" in row
    if aggregate is None or aggregate >= AGGREGATE_FLOOR or n < MANY_REMOVED or distilled:
        return None
    return (
        f"the aggregate is {aggregate:.3f} after {n:.0f} removals that were not distilled.",
        "Distill after every removal; go back to before the collapse with undo.",
    )


def _essential(before: Row, row: Row, whole: float | None) -> Seen:
    a, b = _aggregate(before), _aggregate(row)
    if a is not None and b is not None and whole:
        part = (a - b) / whole
        cost = f"{part:.0%} of the teacher's aggregate" if part > SHARP_DROP else None
    else:  # right after the removal where that was measured, else after distillation
        added = row.get("kl_pruned", row.get("kl", 0.0)) - before.get("kl", before.get("kl_pruned", 0.0))
        cost = f"{added:.2f} nats of KL a token" if added > SHARP_KL else None
    return cost and (
        f"removing layer {row.get('layer_id', math.nan):.0f} alone cost {cost}.",
        "Undo it, keep that layer, and take the next least important one; late layers often cannot be spared whatever a "
        "one-pass metric says (compare it with metric='kl').",
    )


def _no_recovery(before: Row, row: Row) -> Seen:
    if "kl_pruned" not in row or "kl" not in row:
        return None
    pruned, after = row["kl_pruned"], row["kl"]
    added = pruned - before.get("kl", 0.0)
    won = (pruned - after) / added if added > 0.02 else math.inf
    if won >= RECOVERY:
        return None
    return (
        f"distillation won back {max(won, 0):.0%} of the KL that the removal added ({pruned:.3f} -> {after:.3f} nats a "
        "token).",
        "The student lacks capacity, or the text is too little or too unlike what it is judged on: give more and more "
        "general text (text='teacher-samples'), train more layers (scope='all'), or stop here.",
    )


def _aggregate(row: Row) -> float | None:
    """Of the student that the next iteration starts from: distilled, or else as pruned."""
    return row.get("aggregate", row.get("aggregate_pruned"))


def _failures(run: Run) -> list[str]:
    """Errors that distillations of a run ended with, and that no later one made good."""
    failed: list[str] = []
    for step in run.path:
        if step.action == "failed":
            failed.append(step.result["error"])
        elif step.action in ("distill", "remove"):
            failed.clear()
    return failed
