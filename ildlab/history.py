"""A session's journal as tables: one row an iteration, and the losses of every distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from .session import PruningSession


def history_table(session: PruningSession, step: int | None = None) -> pd.DataFrame:
    """One row an iteration, the teacher first: what was removed and what quality was, before and after.

    `step` is where the way ends; by default today's student.

    Columns: `n_removed`, `layer_id`, `score`, `layers`, `parameters`, `perplexity_pruned`,
    `kl_pruned`, `aggregate_pruned` (right after the removal), `perplexity`, `kl` (nats per token, after distillation),
    `perplexity_undistilled`, `kl_undistilled` (the teacher without the same layers, never
    distilled), `agreement`, `aggregate`, `loss` (the quality loss that `max_loss` limits), `seconds`.
    """
    columns = (
        "n_removed layer_id score layers parameters perplexity_pruned kl_pruned aggregate_pruned "
        "perplexity kl "
        "perplexity_undistilled kl_undistilled agreement aggregate loss seconds"
    ).split()
    rows: list[dict] = [{"n_removed": 0, "layers": len(session.teacher), "seconds": 0.0}]
    pending = 0.0
    distilled = True
    at = session.journal.head.step if step is None else step
    for step in session.journal.path_to(at):
        row = rows[-1]
        if step.action == "measure":
            pending += step.seconds
            continue
        if step.action == "remove":
            distilled = False
            row = {
                "n_removed": row["n_removed"] + 1,
                "layer_id": step.args["layer_id"],
                "score": step.args.get("score"),
                "layers": len(step.layer_ids),
                "seconds": pending,
            }
            pending = 0.0
            rows.append(row)
        row["seconds"] += step.seconds
        distilled = distilled or step.action == "distill"
        if step.action == "evaluate":
            found = step.result["evaluation"]
            row["parameters"] = found["parameters"]
            if distilled:
                row.update(perplexity=found["perplexity"], kl=found["kl"], agreement=found["agreement"])
                row["loss"] = step.result["loss"]
                row["aggregate"] = step.result.get("aggregate")
            else:
                row.update(perplexity_pruned=found["perplexity"], kl_pruned=found["kl"])
                row["aggregate_pruned"] = step.result.get("aggregate")
            bare = step.result.get("undistilled")
            if bare:
                row.update(perplexity_undistilled=bare["perplexity"], kl_undistilled=bare["kl"])
    return pd.DataFrame(rows, columns=columns)


def losses_table(session: PruningSession) -> pd.DataFrame:
    """Losses of every distillation on the way to today's student, end to end.

    The columns are those of the metrics files (`metrics/NNN.jsonl`), with `iteration` (layers removed
    by then) and a running `step`.
    """
    parts = []
    removed = 0
    for step in session.path:
        removed += step.action == "remove"
        file = session.folder / "metrics" / f"{step.step:03d}.jsonl"
        if step.action == "distill" and file.is_file():
            parts.append(pd.read_json(file, lines=True).assign(iteration=removed))
    if not parts:
        return pd.DataFrame({"iteration": [], "step": [], "kl": []})
    table = pd.concat(parts, ignore_index=True)
    table["step"] = range(1, len(table) + 1)
    return table
