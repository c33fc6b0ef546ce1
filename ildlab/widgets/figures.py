"""The stepper's figures: what each shows of a session, and the library calls that make it."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ildlab import plots
from ildlab.evaluate.record import Evaluation
from ildlab.session.diagnosis import diagnose
from ildlab.session.tables import history_table


@dataclass(frozen=True)
class Drawn:
    """A figure as HTML, its Axes (None where there is nothing to draw yet), its data, and its code."""

    html: str
    axes: Any
    data: pd.DataFrame | None
    code: str


def _importance(session, text):
    scores = session.latest_scores
    if scores is None:
        return None
    gone = [i for i in session.removed if i not in scores.table.index]
    axes = plots.importance(scores, chosen=scores.least_important, removed=gone, tied=scores.tied[1:])
    return axes, scores.table, f"Importance ({scores.metric}) of each layer, least: {scores.least_important}."


def _iterations(session, text):
    measured = [step.step for step in session.path if step.action == "measure"]
    if not measured:
        return None
    scores = [session.scores_at(step) for step in measured]
    # A layer measured twice before one removal counts once: the last measure decided.
    by_depth = {len(s.table): s for s in scores}
    tables = [by_depth[depth] for depth in sorted(by_depth, reverse=True)]
    data = pd.concat({i + 1: s.table for i, s in enumerate(tables)}, names=["iteration"])
    first = len(session.teacher) - len(tables[0].table)
    axes = plots.importance_by_iteration(tables, session.removed[first:][: len(tables)])
    return axes, data, f"Importance by iteration and layer id; removed: {session.removed}."


def _losses(session, text):
    losses = session.losses()
    if losses.empty:
        return None
    return plots.loss_curves(losses), losses, "Losses of every distillation, end to end."


def _quality(session, text):
    table = session.history()
    if table["perplexity"].count() + table["perplexity_pruned"].count() < 2:
        return None
    before = table["perplexity_undistilled"].fillna(table["perplexity_pruned"]).fillna(table["perplexity"])
    curves = table.assign(perplexity_before=before, perplexity_after=table["perplexity"])
    teacher = table["perplexity"].iloc[0]
    axes = plots.quality(curves.drop(columns="perplexity"), teacher=None if pd.isna(teacher) else teacher)
    return axes, table, "Perplexity against layers removed, with and without distillation."


def _branches(session, text):
    parents = {step.parent for step in session.steps if step.action != "undo"}
    leaves = [s.step for s in session.steps if s.step not in parents and s.action not in ("undo", "create")]
    here = session.journal.head.step
    tables = {f"step {leaf}": history_table(session, leaf) for leaf in leaves if leaf != here}
    tables["today's student"] = history_table(session, here)
    tables = {name: t for name, t in tables.items() if t["perplexity"].fillna(t["perplexity_pruned"]).count() > 1}
    if not tables:
        return None
    data = pd.concat(tables, names=["branch"])
    return plots.branches(tables), data, "Perplexity against layers removed, one line a branch."


def _drift(session, text):
    from ildlab.importance.hidden_states import drift

    blocks = session.text("calibration").tokens[:8]
    after = drift(session.student, session.teacher, blocks)
    changes = [step for step in session.path if step.action == "distill"]
    before = None
    if changes:
        before = drift(session.student_at(changes[-1].parent), session.teacher, blocks)
    return plots.drift_by_layer(after, before), after, "Drift from the teacher by layer id."


def _token_drift(session, text):
    from ildlab.importance.hidden_states import token_drift

    table = token_drift(session.student, session.teacher, text, session.tokenizer)
    return plots.token_drift_map(table), table, "Drift by token and layer."


def _redundancy(session, text):
    from ildlab.importance.hidden_states import redundancy

    matrix = redundancy(session.student, session.text("calibration").tokens[:8], "cosine")
    return (plots.redundancy_heatmap(matrix, "cosine"), matrix, "Cosine between hidden states of every two layers.")


def _lens(session, text):
    from ildlab.importance.hidden_states import logit_lens

    table = logit_lens(session.student, text, session.tokenizer, teacher=session.teacher)
    return plots.logit_lens_map(table), table, "What each layer's hidden state would predict."


_CODE = {
    "importance": "plots.importance(session.latest_scores)",
    "importance over iterations": "plots.importance_by_iteration([session.scores_at(s) for s in steps], session.removed)",
    "losses": "plots.loss_curves(session.losses())",
    "quality against layers": "plots.quality(session.history())",
    "branches": "plots.branches({f'step {s}': history_table(session, s) for s in leaves})",
    "drift by layer": 'plots.drift_by_layer(drift(session.student, session.teacher, session.text("calibration")))',
    "token × layer drift": "plots.token_drift_map(token_drift(session.student, session.teacher, text, session.tokenizer))",
    "redundancy": 'plots.redundancy_heatmap(redundancy(session.student, session.text("calibration")))',
    "logit lens": "plots.logit_lens_map(logit_lens(session.student, text, session.tokenizer, teacher=session.teacher))",
}
_LIGHT: dict[str, Callable] = {
    "importance": _importance,
    "importance over iterations": _iterations,
    "losses": _losses,
    "quality against layers": _quality,
    "branches": _branches,
}
_HEAVY: dict[str, Callable] = {
    "drift by layer": _drift,
    "token × layer drift": _token_drift,
    "redundancy": _redundancy,
    "logit lens": _lens,
}
FIGURES = (*_LIGHT, *_HEAVY)


def draw(kind: str, session, *, text: str = "", heavy: bool = False) -> Drawn:
    """Draw one of `FIGURES`; those that take a forward pass only with `heavy`."""
    if kind in _HEAVY and not heavy:
        return undrawn(kind, "This figure runs the model: press Draw.")
    drawn = (_HEAVY if kind in _HEAVY else _LIGHT)[kind](session, text)
    if drawn is None:
        return undrawn(kind, f"Nothing to draw yet for “{kind}”.")
    axes, data, alt = drawn
    return Drawn(plots.to_html(axes, alt), axes, data, _code(kind))


def undrawn(kind: str, words: str) -> Drawn:
    """Words in the place of a figure."""
    return Drawn(f'<div class="ildlab-note">{html.escape(words)}</div>', None, None, _code(kind))


def _code(kind: str) -> str:
    return f"from ildlab import plots\nfrom ildlab.importance.hidden_states import *\n\n{_CODE[kind]}"


def live_losses(records: list[dict]) -> str:
    """The curves of the distillation in hand."""
    return plots.to_html(plots.loss_curves(pd.DataFrame(records)), "Losses of the distillation in hand.", scale=1.0)


def evaluation_html(session) -> str:
    """Today's student beside the teacher, and below it the evaluation before that on the same way."""
    found = session.evaluation
    if found is None:
        return ""
    done = [step for step in session.path if step.action == "evaluate"]
    if len(done) < 2:
        return found._repr_html_()
    earlier = Evaluation.from_dict(done[-2].result["evaluation"])
    return (
        f"{found._repr_html_()}<details open><summary>the last evaluation before it, step {done[-2].step}</summary>"
        f"{earlier._repr_html_()}</details>"
    )


def warnings_html(session) -> str:
    """Failure signatures that the journal shows, in plain words."""
    items = "".join(
        f"<li><b>{html.escape(f.signature)}</b>: {html.escape(f.seen)} {html.escape(f.advice)}</li>"
        for f in diagnose(session)
    )
    return f'<ul class="ildlab-note">{items}</ul>' if items else ""


def step_labels(session) -> list[tuple[str, int]]:
    """The tree of steps as lines for a list: indented by branch, the present one marked."""
    on_path = {step.step for step in session.path}
    depth: dict[int, int] = {}
    labels = []
    last_child: dict[int | None, int] = {}
    for step in session.steps:
        branches = step.parent is not None and step.parent in last_child
        depth[step.step] = depth.get(step.parent, 0) + branches
        last_child[step.parent] = step.step
        if step.action == "undo":
            continue
        what = step.action
        if step.action == "remove":
            what += f" layer {step.args['layer_id']}"
        elif step.action == "evaluate":
            what += f": perplexity {step.result['evaluation']['perplexity']:.2f}"
        mark = "●" if step.step in on_path else "○"
        labels.append((f"{'  ' * depth[step.step]}{mark} {step.step}: {what} ({step.seconds:.0f} s)", step.step))
    return labels
