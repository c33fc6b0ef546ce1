"""The stepper's figures: a function each, whose source is also the code that a person is shown.

A figure takes the session (and the text that was typed), and uses the names of `_IMPORTS` alone. It returns its Axes,
its data, and what it shows in words.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ildlab import plots
from ildlab.importance.hidden_states import drift, logit_lens, redundancy, token_drift
from ildlab.session.tables import history_table
from ildlab.widgets.words import note

_IMPORTS = {
    "pd": "import pandas as pd",
    "plots": "from ildlab import PruningSession, plots",
    "drift|logit_lens|redundancy|token_drift": "from ildlab.importance import drift, logit_lens, redundancy, token_drift",
    "history_table": "from ildlab.session import history_table",
}


def importance(session, kind=None):
    scores = session.latest_scores
    # One kind alone is shown, and all of them decide.
    least, tied = scores.least_important, [] if kind else scores.tied[1:]
    shown = scores.of_kind(kind) if kind else scores
    gone = [i for i in session.removed if i not in scores.table.index]
    axes = plots.importance(shown, chosen=least, removed=gone, tied=tied)
    if kind:
        axes.set_xlabel(f"layer id (scores on {kind} alone)", parse_math=False)
    on = f" on {kind} alone, least on all kinds" if kind else ", least"
    return axes, shown.table, f"Importance ({scores.metric}) of each layer{on}: {least}."


def importance_by_kind(session):
    scores = session.latest_scores
    alt = f"Importance ({scores.metric}) of each layer by kind of text; least on all kinds: {scores.least_important}."
    return plots.importance_by_kind(scores), scores.per_kind, alt


def importance_by_iteration(session):
    scores = [session.scores_at(step.step) for step in session.path if step.action == "measure"]
    # A layer measured twice before one removal counts once: the last measure decided.
    by_depth = {len(s.table): s for s in scores}
    tables = [by_depth[depth] for depth in sorted(by_depth, reverse=True)]
    data = pd.concat({i + 1: s.table for i, s in enumerate(tables)}, names=["iteration"])
    first = len(session.teacher) - len(tables[0].table)
    axes = plots.importance_by_iteration(tables, session.removed[first:][: len(tables)])
    return axes, data, f"Importance by iteration and layer id; removed: {session.removed}."


def losses(session):
    table = session.losses()
    return plots.loss_curves(table), table, "Losses of every distillation, end to end."


def quality(session):
    table = session.history()
    return plots.quality(table), table, "Perplexity against layers removed, with and without distillation."


def branches(session):
    parents = {step.parent for step in session.steps if step.action != "undo"}
    here = session.journal.head.step
    ends = [s.step for s in session.steps if s.action != "undo" and s.step not in parents and s.step != here]
    tables = {f"step {end}": history_table(session, end) for end in ends}
    tables["today's student"] = history_table(session, here)
    tables = {name: t for name, t in tables.items() if t[["perplexity", "perplexity_pruned"]].notna().any(axis=None)}
    data = pd.concat(tables, names=["branch"])
    return plots.branches(tables), data, "Perplexity against layers removed, one line a branch."


def drift_by_layer(session):
    blocks = session.text("calibration").tokens[:8]
    after, before = drift(session.student, session.teacher, blocks), None
    distilled = [step for step in session.path if step.action == "distill"]
    if distilled:
        before = drift(session.student_at(distilled[-1].parent), session.teacher, blocks)
    return plots.drift_by_layer(after, before), after, "Drift from the teacher by layer id."


def token_drift_map(session, text):
    table = token_drift(session.student, session.teacher, text, session.tokenizer)
    return plots.token_drift_map(table), table, "Drift by token and layer."


def redundancy_heatmap(session):
    matrix = redundancy(session.student, session.text("calibration").tokens[:8], "cosine")
    return plots.redundancy_heatmap(matrix, "cosine"), matrix, "Cosine between hidden states of every two layers."


def logit_lens_map(session, text):
    table = logit_lens(session.student, text, session.tokenizer, teacher=session.teacher)
    return plots.logit_lens_map(table), table, "What each layer's hidden state would predict."


@dataclass(frozen=True)
class Figure:
    """A figure function, and which step it needs. One that is `heavy` runs the model, and waits to be asked."""

    make: Callable
    after: str = "create"
    any_branch: bool = False  # else on the way to today's student
    heavy: bool = False


@dataclass(frozen=True)
class Drawn:
    """A figure as HTML, its Axes and data (None where there is nothing to draw yet), and its code."""

    html: str
    axes: Any = None
    data: pd.DataFrame | None = None
    code: str = ""


FIGURES = {
    "importance": Figure(importance, "measure"),
    "importance over iterations": Figure(importance_by_iteration, "measure"),
    "losses": Figure(losses, "distill"),
    "quality against layers": Figure(quality, "evaluate"),
    "branches": Figure(branches, "evaluate", any_branch=True),
    "drift by layer": Figure(drift_by_layer, heavy=True),
    "token × layer drift": Figure(token_drift_map, heavy=True),
    "redundancy": Figure(redundancy_heatmap, heavy=True),
    "logit lens": Figure(logit_lens_map, heavy=True),
}
OF_KINDS = {"importance by kind of text": Figure(importance_by_kind, "measure")}  # where scores have kinds
ALL = FIGURES | OF_KINDS


def names_for(scores: Any) -> tuple[str, ...]:
    """Names of the figures that there are with these `LayerScores` (or with None)."""
    first, *rest = FIGURES
    return (first, *(OF_KINDS if scores and scores.kinds else ()), *rest)


def draw(name: str, session: Any, text: str, heavy: bool = False, kind: str | None = None) -> Drawn:
    """Draw one of `ALL`; those that run the model only with `heavy`.

    `text` and `kind` (of text, to show alone) are for those that take them.
    """
    figure = ALL[name]
    steps = session.steps if figure.any_branch else session.path
    if not any(step.action == figure.after for step in steps):
        return Drawn(note(f"Nothing to draw yet for “{name}”: {figure.after} first."))
    taken = inspect.signature(figure.make).parameters
    given = {k: v for k, v in {"text": text, "kind": kind}.items() if k in taken and v is not None}
    code = code_of(figure.make, session, given)
    if figure.heavy and not heavy:
        return Drawn(note("This figure runs the model: press Draw."), code=code)
    axes, data, alt = figure.make(session, **given)
    return Drawn(plots.to_html(axes, alt), axes, data, code)


def code_of(make: Callable, session: Any, given: dict[str, str]) -> str:
    """A notebook cell that opens the run and draws the figure: the function itself, with what it imports."""
    source = inspect.getsource(make)
    imports = "\n".join(line for names, line in _IMPORTS.items() if re.search(rf"\b({names})\b", source))
    dtype = str(session.teacher.model.dtype).removeprefix("torch.")
    return f"""{imports}

# A run is open in one place at a time: in this kernel it is taken from the stepper; another kernel has to be shut down.
session = PruningSession.open({str(session.folder.resolve())!r}, dtype={dtype!r})


{source}

axes, data, alt = {make.__name__}({", ".join(["session", *(f"{k}={v!r}" for k, v in given.items())])})
plots.show(axes, alt)"""


def live_losses(records: list[dict]) -> str:
    """The curves of the distillation in hand."""
    return plots.to_html(plots.loss_curves(pd.DataFrame(records)), "Losses of the distillation in hand.", scale=1.0)
