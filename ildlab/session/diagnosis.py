"""Failure signatures: what a session's figures say is going wrong, and what to try.

The signatures are those that the method's authors name (arXiv 2511.05085); thresholds are parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Thresholds:
    """When a signature is seen.

    Parameters
    ----------
    aggregate_floor : float
        An aggregate below this, after `many_removed` removals without distillation, is collapse.
    many_removed : int
    sharp_drop : float
        Part of the teacher's aggregate (or, without a suite, nats of KL) that one removal may cost.
    sharp_kl : float
        Nats of KL that one removal may add, where there is no aggregate to go by.
    recovery : float
        Part of the KL added by a removal that distillation should win back.
    """

    aggregate_floor: float = 0.3
    many_removed: int = 4
    sharp_drop: float = 0.15
    sharp_kl: float = 0.7
    recovery: float = 0.25


@dataclass(frozen=True)
class Finding:
    """A failure signature that was seen.

    Parameters
    ----------
    signature : str
        `"pruning without distillation"`, `"essential layer"`, `"not finite"` or `"no recovery"`.
    n_removed : int or None
        Layers removed when it was seen.
    layer_id : int or None
        The layer removed last.
    seen, advice : str
        The figures it was told from; what to try.
    """

    signature: str
    n_removed: int | None
    layer_id: int | None
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
        One row an iteration, the teacher first, with the columns of `ildlab.session.tables.history_table`:
        `n_removed`, `layer_id`, `kl`, `kl_pruned`, `aggregate`, `aggregate_pruned`. What is missing is not judged.
    errors : sequence of str or exceptions
        Errors that steps ended with, beside those in a session's journal.
    thresholds : Thresholds, optional

    Returns
    -------
    list of Finding, in the order of the iterations; empty where nothing is wrong
    """
    limits = thresholds or Thresholds()
    rows = [_clean(row) for row in _rows(history)]
    found: list[Finding] = []
    teacher_aggregate = next((r["aggregate"] for r in rows if r.get("n_removed") == 0 and "aggregate" in r), None)
    for before, row in zip([{}, *rows], rows, strict=False):
        n = int(row.get("n_removed", 0))
        if n == 0:
            continue
        at = {"n_removed": n, "layer_id": int(row["layer_id"]) if "layer_id" in row else None}
        distilled = "kl" in row or "perplexity" in row
        aggregate = _aggregate(row)
        if aggregate is not None and aggregate < limits.aggregate_floor and n >= limits.many_removed:
            if not distilled or row.get("distilled") is False:
                found.append(
                    Finding(
                        "pruning without distillation",
                        **at,
                        seen=f"the aggregate is {aggregate:.3f} after {n} removals that were not distilled.",
                        advice="Distill after every removal; go back to before the collapse with undo.",
                    )
                )
        drop = _drop(before, row, teacher_aggregate, limits)
        if drop:
            found.append(
                Finding(
                    "essential layer",
                    **at,
                    seen=f"removing layer {at['layer_id']} alone cost {drop}.",
                    advice="Undo it, keep that layer, and take the next least important one; late layers often cannot "
                    "be spared whatever a one-pass metric says (compare it with metric='kl').",
                )
            )
        pruned, after, floor = row.get("kl_pruned"), row.get("kl"), before.get("kl", 0.0)
        if pruned is not None and after is not None and pruned - floor > 0.02:
            won = (pruned - after) / (pruned - floor)
            if won < limits.recovery:
                found.append(
                    Finding(
                        "no recovery",
                        **at,
                        seen=f"distillation won back {max(won, 0):.0%} of the KL that the removal added "
                        f"({pruned:.3f} -> {after:.3f} nats a token).",
                        advice="The student lacks capacity, or the text is too little or too unlike what it is judged on: "
                        "give more and more general text (text='teacher-samples'), train more layers (scope='all'), "
                        "or stop here.",
                    )
                )
    for error in [*_failures(history), *errors]:
        text = str(error)
        if "finite" in text or "nan" in text.lower():
            found.append(
                Finding(
                    "not finite",
                    None,
                    None,
                    seen=text.splitlines()[0],
                    advice="Logits are scaled too high for the dtype: lower the learning rate, or use bf16 or fp32.",
                )
            )
    return found


def _rows(history: Any) -> Iterable[Mapping[str, Any]]:
    if hasattr(history, "path") and hasattr(history, "teacher"):
        from ildlab.session.tables import history_table

        history = history_table(history)
    return history.to_dict("records") if isinstance(history, pd.DataFrame) else history


def _failures(history: Any) -> list[str]:
    """Errors that distillations of a session ended with, and that no later one made good."""
    failed: list[str] = []
    for step in getattr(history, "path", ()):
        if step.action == "failed":
            failed.append(step.result["error"])
        elif step.action in ("distill", "remove"):
            failed.clear()
    return failed


def _clean(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if v is not None and not (isinstance(v, float) and v != v)}


def _aggregate(row: Mapping[str, Any]) -> float | None:
    """Of the student that the next iteration starts from: distilled, or else as pruned."""
    return row.get("aggregate", row.get("aggregate_pruned"))


def _drop(before, row, teacher_aggregate, limits) -> str | None:
    """What a single removal cost, in words, where it is too much."""
    a, b = _aggregate(before), _aggregate(row)
    if a is not None and b is not None and teacher_aggregate:
        part = (a - b) / teacher_aggregate
        return f"{part:.0%} of the teacher's aggregate" if part > limits.sharp_drop else None
    # Right after the removal where that was measured, else after healing.
    added = row.get("kl_pruned", row.get("kl"))
    if added is None:
        return None
    added -= before.get("kl", before.get("kl_pruned", 0.0))
    return f"{added:.2f} nats of KL a token" if added > limits.sharp_kl else None
