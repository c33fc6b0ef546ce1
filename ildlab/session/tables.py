"""A session's journal as tables: one row an iteration, and the losses of every distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from ildlab.evaluate.record import Evaluation
from ildlab.evaluate.results import compare

if TYPE_CHECKING:
    from ildlab.session.session import PruningSession


def history_table(session: PruningSession, step: int | None = None) -> pd.DataFrame:
    """One row an iteration, the teacher first: what was removed and what quality was, before and after.

    `step` is where the way ends; by default today's student.

    Columns: `n_removed`, `layer_id`, `score`, `layers`, `parameters`, `perplexity_pruned`,
    `kl_pruned`, `aggregate_pruned` (right after the removal), `perplexity`, `kl` (nats per token, after distillation),
    `perplexity_undistilled`, `kl_undistilled` (the teacher without the same layers, never
    distilled), `agreement`, `aggregate`, `loss` (the quality loss that `max_loss` limits), `seconds`, and
    `canary_copying`, `canary_arithmetic`, `canary_brackets` (of the iteration's last evaluation).
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
            row["loss"] = step.result["loss"]
            row.update(canary_scores(Evaluation.from_dict(found)))
            if distilled:
                row.update(perplexity=found["perplexity"], kl=found["kl"], agreement=found["agreement"])
                row["aggregate"] = step.result.get("aggregate")
            else:
                row.update(perplexity_pruned=found["perplexity"], kl_pruned=found["kl"])
                row["aggregate_pruned"] = step.result.get("aggregate")
            bare = step.result.get("undistilled")
            if bare:
                row.update(perplexity_undistilled=bare["perplexity"], kl_undistilled=bare["kl"])
    canaries = dict.fromkeys(name for row in rows for name in row if name.startswith("canary_"))
    return pd.DataFrame(rows, columns=[*columns, *canaries])


def canary_scores(found: Evaluation) -> dict[str, float]:
    """Scores of the canaries, as columns `canary_<name>`; none where they were not scored."""
    tasks = found.canaries.tasks if found.canaries is not None else {}
    return {f"canary_{name}": task.score for name, task in tasks.items()}


def task_table(session: PruningSession) -> pd.DataFrame:
    """Scores task by task: teacher | pruned (right after the last removal) | today's student, with the changes.

    Of the run's suite where it has been scored, and of the canaries. A model that was not scored has no column.
    """
    models: dict[str, Evaluation] = {}
    distilled = False
    for step in session.path:
        if step.action == "remove":
            models.pop("student", None)
            models.pop("pruned", None)
            distilled = False
        distilled = distilled or step.action == "distill"
        if step.action == "evaluate":
            found = Evaluation.from_dict(step.result["evaluation"])
            whole = len(step.layer_ids) == len(session.teacher)
            models["teacher" if whole else "student" if distilled else "pruned"] = found
    parts, kinds = [], []
    for kind in ("suite", "canaries"):
        scored = {name: getattr(found, kind) for name, found in models.items() if getattr(found, kind) is not None}
        if len(scored) > 1:
            parts.append(compare(**scored))
            kinds.append(kind)
    if not parts:
        return pd.DataFrame()
    return pd.concat(parts, keys=kinds, names=["of", "task"])


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
