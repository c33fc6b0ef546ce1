"""The page of a run, which leads with what a person asks first, and the index over a folder of runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from ildlab.errors import SessionError
from ildlab.session.report import Lead, write_index, write_report
from ildlab.session.session import PruningSession

pytestmark = pytest.mark.usefixtures("short_speed")


def notebook(path, text="<b>&"):
    """A notebook as an execution leaves it: a cell of code, a picture inside its output."""
    html = '<img alt="a figure" src="data:image/png;base64,AAAA">'
    cell = nbformat.v4.new_code_cell("SECRET = 1", execution_count=1)
    cell.outputs = [
        nbformat.v4.new_output("display_data", {"text/html": html}),
        nbformat.v4.new_output("stream", text=text),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Head"), cell]), path)
    return path


@pytest.fixture(scope="module")
def runs(loaded_tiny, small_settings, tmp_path_factory):
    """A folder with a run that was pruned, judged and distilled, and one that was only begun."""
    folder = tmp_path_factory.mktemp("<runs>")
    with PruningSession.create(folder / "one", loaded_tiny, **small_settings) as session:
        session.remove(2)
        session.evaluate(suite="mini7@2", canaries=False)
        notebook(session.folder / "report.ipynb")
    PruningSession.create(folder / "deep" / "two & more", loaded_tiny, **small_settings).close()
    return folder


def test_the_lead_says_what_is_asked_first(runs):
    lead = Lead.of(runs / "one")
    assert lead.layers == "5 of 6 (removed, in order: 2)"
    assert re.fullmatch(r"\d+ of \d+ MiB \(-[\d.]+% parameters\)", lead.size)
    assert re.fullmatch(r"[\d.]+ × the teacher's \(\d+ tokens/s\)", lead.speed)
    assert re.fullmatch(r"-?[\d.]+% \[-?[\d.]+%, -?[\d.]+%\] of the aggregate of mini7", lead.kept)
    assert "nats a token" in lead.text and "changed since" not in lead.text
    assert "removing layer 2 alone cost" in lead.advice[0] and "never distilled" in lead.advice[-3]
    assert "interval is" in lead.advice[-2] and "export" in lead.advice[-1]


def test_a_student_that_changed_since_is_told(runs, loaded_tiny, tmp_path):
    shutil.copytree(runs / "one", tmp_path / "run")
    with PruningSession.open(tmp_path / "run", loaded_tiny) as session:
        session.remove(3)
        assert "changed since" in Lead.of(session.folder).text
        session.evaluate(canaries=False, speed=False)  # without tasks
        lead = Lead.of(session.folder)
    assert "by perplexity" in lead.kept and lead.speed == "" and "not measured" in lead.html()
    assert any("No task was scored" in each for each in lead.advice)


def test_nothing_was_judged_yet(runs):
    lead = Lead.of(runs / "deep" / "two & more")
    assert lead.layers == "6 of 6" and "Nothing was judged yet" in lead.advice[0]


def test_the_page_stands_alone_and_folds_code(runs, tmp_path):
    page = write_report(runs / "one", notebook(tmp_path / "n.ipynb")).read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//|<script[^>]+src|import\(""", page)
    assert page.index("Quality kept") < page.index("What to do next") < page.index('<h1 id="Head">')
    assert re.search(r'<details class="ildlab-code"><summary>code</summary>(?:(?!</details>).)*SECRET', page, re.S)
    assert "<b>&" not in page.split("</section>")[1].split("SECRET")[1]  # escaped
    (runs / "one" / "report.html").unlink()


def test_an_index_links_runs_and_grids_points(runs, tmp_path):
    folder = tmp_path / "all"
    shutil.copytree(runs, folder)
    shutil.copytree(runs / "one", folder / "grid" / "seed-0" / "run", ignore=shutil.ignore_patterns("report*"))
    notebook(folder / "grid" / "seed-0" / "notebook.ipynb")
    (folder / "ill").mkdir()
    (folder / "ill" / "config.json").write_text("{")
    (folder / "ill" / "journal.jsonl").write_text("<x>")
    done = subprocess.run(
        [sys.executable, "-m", "ildlab.session.report", folder], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(folder / "index.html")
    page = (folder / "index.html").read_text()
    links = re.findall(r'href="([^"]+)"', page)
    assert links == ["grid/seed-0/run/report.html", "one/report.html"]
    assert all((folder / link).is_file() for link in links)
    assert "two &amp; more" in page and "cannot be read" in page and "<x>" not in page
    assert page.count("<tr>") == 5 and 'content="light dark"' in page and "scope=" in page
    with pytest.raises(SessionError, match="holds no run"):
        write_index(tmp_path / "nowhere")
    assert json.loads((folder / "one" / "config.json").read_text())  # nothing of a run was changed
