"""A run as a page that leads with what a person asks first, and an index over a folder of runs; no model is loaded.

`python -m ildlab.session.report FOLDER` writes `FOLDER/index.html`, and a `report.html` for each run below it that has an
executed notebook and no page yet. All pages stand alone: figures inside, no scripts, nothing fetched.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from ildlab.errors import IldlabError, SessionError
from ildlab.evaluate.record import Evaluation
from ildlab.files import whole_path, write_atomic
from ildlab.session.config import SessionConfig
from ildlab.session.diagnosis import diagnose
from ildlab.session.journal import CHANGES_STUDENT, Journal, Step
from ildlab.session.tables import table_of

GOOD = 0.95  # part of the quality that has to be kept, by the lower end of its interval, for a run to be sent further
WIDE = 0.05  # width of that interval from which on more rows are asked for

STYLE = """<style>
.ildlab-lead{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:1.5em auto;padding:0 1em}
.ildlab-lead table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.ildlab-lead th,.ildlab-lead td{text-align:left;padding:.3em .9em .3em 0;border-bottom:1px solid #8586;vertical-align:top}
.ildlab-code>summary{cursor:pointer;color:#707070;font:12px system-ui,sans-serif}
</style>"""
# Code is folded away; and of what JupyterLab's page would fetch (RequireJS, MathJax, Mermaid) nothing is left.
TEMPLATE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js %}{% endblock %}{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block input_group %}<details class="ildlab-code"><summary>code</summary>{{ super() }}</details>{% endblock %}
"""


@dataclass(frozen=True)
class Lead:
    """What a person asks of a run first, in words; "" where nothing is known."""

    title: str
    layers: str
    size: str = ""
    speed: str = ""
    kept: str = ""
    text: str = ""
    advice: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: str | Path) -> Lead:
        """Read a run folder's journal; SessionError or JournalError where it is none."""
        folder = whole_path(folder)
        journal = Journal.open(folder, read_only=True)
        config, path = SessionConfig.stored(journal.config, folder), journal.path_to(journal.head.step)
        gone = [str(step.args["layer_id"]) for step in path if step.action == "remove"]
        left, whole = len(path[-1].layer_ids), len(path[0].layer_ids)
        layers = f"{left} of {whole}" + (f" (removed, in order: {', '.join(gone)})" if gone else "")
        title = config.teacher.rstrip("/").rpartition("/")[2]
        judged = [step for step in path if step.action == "evaluate"]
        found = Evaluation.from_dict(judged[-1].result["evaluation"]) if judged else None
        advice = tuple(_advice(path, found, config.suite, folder))
        if found is None:
            return cls(title, layers, advice=advice)
        size = f"{found.bytes / 2**20:,.0f} of {found.teacher_bytes / 2**20:,.0f} MiB"
        size += f" ({found.parameters / found.teacher_parameters - 1:+.1%} parameters)"
        speed = (
            f"{found.speed_ratio:.2f} × the teacher's ({found.tokens_per_second:.0f} tokens/s)"
            if found.speed_ratio
            else ""
        )
        text = f"perplexity {found.perplexity:.2f} (teacher {found.teacher_perplexity:.2f}), KL {found.kl:.3f} "
        text += f"[{found.kl_low:.3f}, {found.kl_high:.3f}] nats a token"
        if any(step.action in CHANGES_STUDENT for step in path[path.index(judged[-1]) :]):
            text += "; of an earlier student: it changed since"
        return cls(title, layers, size, speed, _kept(found), text, advice)

    def html(self) -> str:
        """The lead as a part of a page."""
        told = {"Layers": self.layers, "Size": self.size, "Speed": self.speed, "Quality kept": self.kept}
        told |= {"On text": self.text}
        rows = "".join(
            f"<tr><th scope='row'>{name}</th><td>{escape(words or 'not measured')}</td></tr>"
            for name, words in told.items()
        )
        todo = "".join(f"<li>{escape(each)}</li>" for each in self.advice)
        head = f"<h1>{escape(self.title)}: {escape(self.layers.partition(' (')[0])} layers</h1>"
        return f"<section class='ildlab-lead'>{head}<table>{rows}</table><h2>What to do next</h2><ul>{todo}</ul></section>"


def _kept(found: Evaluation) -> str:
    if found.suite is None:
        return f"{1 - found.loss:.1%} by perplexity (teacher's / student's); no task was scored, so no interval"
    lost = found.quality_loss_estimate()
    return f"{1 - lost.value:.1%} [{1 - lost.high:.1%}, {1 - lost.low:.1%}] of the aggregate of {found.suite.name}"


def _advice(path: list[Step], found: Evaluation | None, suite: str | None, folder: Path) -> Iterator[str]:
    """What the journal says should be done next, the most pressing first; `found` is the latest evaluation."""
    table = table_of(path, suite)
    seen = [each for each in diagnose(table) if each.n_removed == table["n_removed"].iloc[-1]]
    yield from (f"After the last removal, {each.seen} {each.advice}" for each in seen)
    actions = [step.action for step in path if step.whole]
    if "remove" in actions and "distill" not in actions:
        yield "The student was never distilled: session.distill() heals a part of what the removals cost."
    if found is None:
        yield "Nothing was judged yet: session.evaluate()."
    elif found.suite is None:
        yield "No task was scored, and perplexity can look fine where tasks are lost: evaluate(suite='mini7')."
    else:
        lost = found.quality_loss_estimate()
        if lost.high - lost.low > WIDE:
            yield f"The interval is {lost.high - lost.low:.1%} wide: score more rows of each task before you rely on it."
        if 1 - lost.high >= GOOD and not seen:
            yield f"At least {GOOD:.0%} is kept: try fewer layers, run(target_layers={found.layers - 1}); undo() takes it back."
    if (checkpoint := folder / f"checkpoint-{len(path[-1].layer_ids)}-layers").is_dir():
        yield f"Use it: AutoModelForCausalLM.from_pretrained('{checkpoint.name}'), in the run's folder."
    else:
        yield "session.export('checkpoint') writes it as a plain Hugging Face checkpoint."


def write_report(folder: str | Path, notebook: str | Path) -> Path:
    """Write a run's `report.html`: its lead, then the executed notebook with its code folded; returns the page."""
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(extra_loaders=[DictLoader({"ildlab.html.j2": TEMPLATE})], template_file="ildlab.html.j2")
    page, _ = exporter.from_filename(str(notebook))
    head, main, rest = page.partition("<main>")
    return write_atomic(Path(folder) / "report.html", f"{head}{main}{STYLE}{Lead.of(folder).html()}{rest}")


def write_index(folder: str | Path) -> Path:
    """Write `index.html` over the runs in a folder (a grid's too), with a link to each one's page, made where it lacks."""
    folder = whole_path(folder)
    runs = sorted(path.parent for path in folder.rglob("journal.jsonl") if (path.parent / "config.json").is_file())
    if not runs:
        raise SessionError(f"{folder} holds no run: give a folder in which runs lie.")
    rows = []
    for run in runs:
        name, page = str(run.relative_to(folder)), run / "report.html"
        try:
            # A run's own notebook, or that of a grid's point, which stands beside it.
            own = next((n for n in (run / "report.ipynb", run.parent / "notebook.ipynb") if n.is_file()), None)
            if own and not page.is_file():
                write_report(run, own)
            lead = Lead.of(run)
            told = [lead.title, lead.layers, lead.size, lead.speed, lead.kept, lead.text, next(iter(lead.advice), "")]
        except IldlabError as error:
            told = ["cannot be read", str(error), *[""] * 5]
        link = quote(os.path.relpath(page, folder))
        shown = f'<a href="{link}">{escape(name)}</a>' if page.is_file() else escape(name)
        rows.append(f"<tr><td>{shown}</td>{''.join(f'<td>{escape(each)}</td>' for each in told)}</tr>")
    heads = ("run", "model", "layers", "size", "speed", "quality kept", "on text", "next")
    head = "".join(f"<th scope='col'>{each}</th>" for each in heads)
    page = (
        f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<meta name="viewport" content="width=device-width"><title>Runs</title>{STYLE}<main class="ildlab-lead">'
        f'<h1>Runs in {escape(folder.name)}</h1><div style="overflow-x:auto">'
        f"<table><tr>{head}</tr>{''.join(rows)}</table></div></main></html>"
    )
    return write_atomic(folder / "index.html", page)


if __name__ == "__main__":
    try:
        print(write_index(sys.argv[1] if len(sys.argv) > 1 else "runs"))
    except IldlabError as error:
        sys.exit(str(error))
