"""Failure signatures: what a session's figures say is going wrong, and what to try.

The signatures are those that the method's authors name (arXiv 2511.05085); thresholds are parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ildlab.errors import first_line
from ildlab.session.run import Run
from ildlab.session.tables import history_table

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Thresholds:
    """When a signature is seen."""

    aggregate_floor: float = 0.3
    """An aggregate below this, after `many_removed` removals without distillation, is collapse."""
    many_removed: int = 4
    sharp_drop: float = 0.15
    """Part of the teacher's aggregate that one removal may cost."""
    sharp_kl: float = 0.7
    """Nats of KL that one removal may add, where there is no aggregate to go by."""
    recovery: float = 0.25
    """Part of the KL added by a removal that distillation should win back."""


@dataclass(frozen=True)
class Finding:
    """A failure signature that was seen, told from which figures, and what to try."""

    signature: str
    """`"pruning without distillation"`, `"essential layer"`, `"not finite"` or `"no recovery"`."""
    n_removed: int | None
    """Layers removed when it was seen."""
    layer_id: int | None
    """The layer removed last."""
    seen: str
    advice: str

    def __str__(self) -> str:
        return f"{self.signature}: {self.seen} {self.advice}"


def diagnose(
    history: Any, *, errors: Sequence[str | BaseException] = (), thresholds: Thresholds | None = None
) -> list[Finding]:
    """Name the failure signatures in a session's history.

    Parameters
    ----------
    history : PruningSession, DataFrame or iterable of mappings
        Rows as of `ildlab.session.tables.history_table`; columns that are missing are not judged.
    errors : sequence of str or exceptions
        Errors that steps ended with, beside those in a session's journal.
    thresholds : Thresholds, optional

    Returns
    -------
    list of Finding, in the order of the iterations; empty where nothing is wrong
    """
    limits = thresholds or Thresholds()
    table = history_table(history) if isinstance(history, Run) else history
    rows = [_clean(row) for row in (table.to_dict("records") if isinstance(table, pd.DataFrame) else table)]
    whole = next((_aggregate(row) for row in rows if row.get("n_removed") == 0), None)
    found: list[Finding] = []
    for before, row in zip([{}, *rows], rows, strict=False):
        if row.get("n_removed", 0) > 0:
            seen = (_collapse(row, limits), _essential(before, row, whole, limits), _no_recovery(before, row, limits))
            layer_id = int(row["layer_id"]) if "layer_id" in row else None
            found += [Finding(signature, int(row["n_removed"]), layer_id, *said) for signature, said in seen if said]
    for error in [*_failures(history), *errors]:
        if "finite" in str(error) or "nan" in str(error).lower():
            advice = "Logits are scaled too high for the dtype: lower the learning rate, or use bf16 or fp32."
            found.append(Finding("not finite", None, None, first_line(error), advice))
    return found


Seen = tuple[str, tuple[str, str] | None]  # a signature, and figures with advice where it is seen


def _collapse(row: Row, limits: Thresholds) -> Seen:
    signature, aggregate, n = "pruning without distillation", _aggregate(row), row["n_removed"]
    distilled = ("kl" in row or "perplexity" in row) and row.get("distilled") is not False
    if aggregate is None or aggregate >= limits.aggregate_floor or n < limits.many_removed or distilled:
        return signature, None
    return signature, (
        f"the aggregate is {aggregate:.3f} after {n:.0f} removals that were not distilled.",
        "Distill after every removal; go back to before the collapse with undo.",
    )


def _essential(before: Row, row: Row, whole: float | None, limits: Thresholds) -> Seen:
    cost = _cost(before, row, whole, limits)
    return "essential layer", cost and (
        f"removing layer {row.get('layer_id', math.nan):.0f} alone cost {cost}.",
        "Undo it, keep that layer, and take the next least important one; late layers often cannot be spared whatever a "
        "one-pass metric says (compare it with metric='kl').",
    )


def _cost(before: Row, row: Row, whole: float | None, limits: Thresholds) -> str | None:
    """What a single removal cost, in words, where it is too much."""
    a, b = _aggregate(before), _aggregate(row)
    if a is not None and b is not None and whole:
        part = (a - b) / whole
        return f"{part:.0%} of the teacher's aggregate" if part > limits.sharp_drop else None
    # Right after the removal where that was measured, else after healing.
    added = row.get("kl_pruned", row.get("kl", 0.0)) - before.get("kl", before.get("kl_pruned", 0.0))
    return f"{added:.2f} nats of KL a token" if added > limits.sharp_kl else None


def _no_recovery(before: Row, row: Row, limits: Thresholds) -> Seen:
    pruned, after = row.get("kl_pruned"), row.get("kl")
    added = 0.0 if pruned is None or after is None else pruned - before.get("kl", 0.0)
    won = (pruned - after) / added if added > 0.02 else math.inf
    return "no recovery", None if won >= limits.recovery else (
        f"distillation won back {max(won, 0):.0%} of the KL that the removal added ({pruned:.3f} -> {after:.3f} nats a "
        "token).",
        "The student lacks capacity, or the text is too little or too unlike what it is judged on: give more and more "
        "general text (text='teacher-samples'), train more layers (scope='all'), or stop here.",
    )


def _failures(history: Any) -> list[str]:
    """Errors that distillations of a session ended with, and that no later one made good."""
    failed: list[str] = []
    for step in getattr(history, "path", ()):
        if step.action == "failed":
            failed.append(step.result["error"])
        elif step.action in ("distill", "remove"):
            failed.clear()
    return failed


def _clean(row: Row) -> Row:
    return {k: v for k, v in row.items() if v is not None and not (isinstance(v, float) and v != v)}


def _aggregate(row: Row) -> float | None:
    """Of the student that the next iteration starts from: distilled, or else as pruned."""
    return row.get("aggregate", row.get("aggregate_pruned"))
