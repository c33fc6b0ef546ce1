"""The stepper's figures: a function each, whose source is also the code that a person is shown.

A figure takes the session (and the text that was typed), and uses the names of `_IMPORTS` alone. It returns its Axes,
its data, and what it shows in words.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from ildlab import plots
from ildlab.importance.hidden_states import drift_steps, logit_lens_steps, redundancy_steps, token_drift_steps
from ildlab.progress import Work
from ildlab.session.tables import history_table, scored_models, task_table
from ildlab.text.blocks import encode_prompts
from ildlab.widgets.words import note

_IMPORTS = {
    "pd": "import pandas as pd",
    "plots": "from ildlab import PruningSession, drive, plots",
    r"\w+_steps": "from ildlab.importance import drift_steps, logit_lens_steps, redundancy_steps, token_drift_steps",
    "history_table|scored_models|task_table": "from ildlab.session import history_table, scored_models, task_table",
}


def importance_by_kind(session):
    scores = session.latest_scores
    alt = f"Importance ({scores.metric}) of each layer by kind of text; least on all kinds: {scores.least_important}."
    return plots.importance_by_kind(scores), scores.per_kind, alt


def losses(session):
    table = session.losses()
    return plots.loss_curves(table), table, "Losses of every distillation, end to end."


def quality(session):
    table = session.history()
    return plots.quality(table), table, "Perplexity against layers removed, with and without distillation."


def tasks(session):
    results = scored_models(session) or scored_models(session, "canaries")
    told = ", ".join(f"{name} {result.aggregate:.3f}" for name, result in results.items())
    return plots.task_bars(results), task_table(session), f"Scores by task; aggregates: {told}."


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
    before = None
    after = yield from drift_steps(session.student, session.teacher, blocks)
    distilled = [step for step in session.path if step.action == "distill"]
    if distilled:
        before = yield from drift_steps(session.student_at(distilled[-1].parent), session.teacher, blocks)
    return plots.drift_by_layer(after, before), after, "Drift from the teacher by layer id."


def token_drift_map(session, text):
    table = yield from token_drift_steps(session.student, session.teacher, text, session.tokenizer)
    return plots.token_drift_map(table), table.set_axis(table.attrs["tokens"], axis=1), "Drift by token and layer."


def redundancy_heatmap(session):
    matrix = yield from redundancy_steps(session.student, session.text("calibration").tokens[:8], "cosine")
    return plots.redundancy_heatmap(matrix, "cosine"), matrix, "Cosine between hidden states of every two layers."


def logit_lens_map(session, text):
    table = yield from logit_lens_steps(session.student, text, session.tokenizer, teacher=session.teacher)
    return plots.logit_lens_map(table), table, "What each layer's hidden state would predict."


def token_tips(table: pd.DataFrame) -> list[list[str]]:
    """What is in each cell of a map of drift."""
    return [
        [f"“{t}”, layer {i}\ndrift {v:.3g}" for t, v in zip(table.columns, row)]
        for i, row in zip(table.index, table.to_numpy())
    ]


def pair_tips(matrix: pd.DataFrame) -> list[list[str]]:
    """What is in each cell of a matrix of hidden states."""
    return [[f"layers {i} and {j}\ncosine {v:.4f}" for j, v in row.items()] for i, row in matrix.iterrows()]


def lens_tips(table: pd.DataFrame) -> list[list[str]]:
    """The five likeliest tokens of each cell of a logit lens."""
    rows: dict[Any, list[str]] = {}
    for cell in table[table["model"] == "student"].itertuples():
        best = "\n".join(f"{token!r} {p:.3f}" for token, p in zip(cell.top, cell.probability))
        rows.setdefault(cell.layer, []).append(
            f"after {cell.token!r}, layer {cell.layer}\n{best}\nentropy {cell.entropy:.2f} nats"
        )
    return list(rows.values())


@dataclass(frozen=True)
class Figure:
    """A figure function, which step it needs, and what to do for it. A generator is `heavy`: it runs the model, when asked."""

    make: Callable
    after: str = "create"
    any_branch: bool = False  # else on the way to today's student
    tips: Callable[[pd.DataFrame], list[list[str]]] | None = None  # words of its cells, told from its data
    most: int = 0  # tokens of a text that it reads

    @property
    def heavy(self) -> bool:
        """Whether it runs the model."""
        return inspect.isgeneratorfunction(self.make)


@dataclass(frozen=True)
class Drawn:
    """A figure as HTML, its Axes and data (None where there is nothing to draw yet), its cells, and its code."""

    html: str
    axes: Any = None
    data: pd.DataFrame | None = None
    code: str = ""
    cells: dict[str, Any] = field(default_factory=dict)
    note: str = ""  # what a person should know of it


FIGURES = {
    "losses": Figure(losses, "distill"),
    "quality against layers": Figure(quality, "evaluate"),
    "tasks": Figure(tasks, "evaluate"),
    "branches": Figure(branches, "evaluate", any_branch=True),
    "drift by layer": Figure(drift_by_layer),
    "token × layer drift": Figure(token_drift_map, tips=token_tips, most=96),
    "redundancy": Figure(redundancy_heatmap, tips=pair_tips),
    "logit lens": Figure(logit_lens_map, tips=lens_tips, most=48),
}
OF_KINDS = {"importance by kind of text": Figure(importance_by_kind, "measure")}  # where scores have kinds
ALL = FIGURES | OF_KINDS
SHOWS = {
    "losses": "the losses of every distillation, step by step: press Distill after a removal",
    "quality against layers": "perplexity against layers removed: press Evaluate",
    "tasks": "teacher, pruned and student task by task: press Evaluate",
    "branches": "perplexity of each branch against layers removed: press Evaluate, undo, take another way, evaluate again",
    "importance by kind of text": "importance on each kind of text: press Measure",
}


def names_for(scores: Any) -> tuple[str, ...]:
    """Names of the figures that there are with these `LayerScores` (or with None)."""
    return (*FIGURES, *(OF_KINDS if scores and scores.kinds else ()))


def draw(name: str, session: Any) -> Drawn:
    """Draw one of `ALL` that needs no model; of the others, and of those with nothing to draw yet, say what they wait for."""
    figure = ALL[name]
    if figure.heavy:
        return Drawn(note(f"{name.capitalize()} runs the model: press Draw."), code=code_of(figure.make, session, {}))
    steps = session.steps if figure.any_branch else session.path
    if not any(step.action == figure.after for step in steps):
        return Drawn(note(f"Here will be {SHOWS[name]}."))
    axes, data, alt = figure.make(session)
    return Drawn(plots.to_html(axes, alt), axes, data, code_of(figure.make, session, {}))


def draw_steps(name: str, session: Any, text: str) -> Work[Drawn]:
    """Draw one that runs the model, on a text (or as much of it as it takes) where it reads one."""
    figure, given, said = ALL[name], {}, ""
    if figure.most:
        ids = encode_prompts(session.tokenizer, [text])[0]
        if len(ids) > figure.most:
            text = session.tokenizer.decode(ids[: figure.most], skip_special_tokens=True)
            said = f"The first {figure.most} of {len(ids):,} tokens are shown."
        given = {"text": text}
    axes, data, alt = yield from figure.make(session, **given)
    cells = plots.cells(axes, figure.tips(data)) if figure.tips else {}
    return Drawn(plots.to_html(axes, alt), axes, data, code_of(figure.make, session, given), cells, said)


def code_of(make: Callable, session: Any, given: dict[str, str]) -> str:
    """A notebook cell that opens the run and draws the figure: the function itself, with what it imports."""
    source = inspect.getsource(make)
    imports = "\n".join(line for names, line in _IMPORTS.items() if re.search(rf"\b({names})\b", source))
    dtype = str(session.teacher.model.dtype).removeprefix("torch.")
    call = f"{make.__name__}({', '.join(['session', *(f'{k}={v!r}' for k, v in given.items())])})"
    return f"""{imports}

# A run is open in one place at a time: in this kernel it is taken from the stepper; another kernel has to be shut down.
session = PruningSession.open({str(session.folder.resolve())!r}, dtype={dtype!r})


{source}

axes, data, alt = {f"drive({call}, show=False)" if inspect.isgeneratorfunction(make) else call}
plots.show(axes, alt)"""


def live_losses(records: list[dict]) -> str:
    """The curves of the distillation in hand."""
    return plots.to_html(plots.loss_curves(pd.DataFrame(records)), "Losses of the distillation in hand.", scale=1.0)
