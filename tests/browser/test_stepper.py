"""The stepper in a real JupyterLab, driven by mouse and keyboard in a real Chromium, on SmolLM2.

`ILDLAB_SCREENSHOTS=folder` keeps a picture of each state; `ILDLAB_THEME="JupyterLab Dark"` changes the theme.
"""

from __future__ import annotations

import os
import re

import pytest

from .lab import CHROMIUM, browser, column, jupyterlab, pane, press, ready, run_all, status, violations, wait_status

IMAGES = os.environ.get("ILDLAB_SCREENSHOTS")
THEME = os.environ.get("ILDLAB_THEME", "JupyterLab Light")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
]

SMALL = """text="python-docs", block=32, calibration_tokens=128, train_tokens=1536, eval_tokens=128, metric="block_influence",
    distill={"kl_positions": 8, "batch_size": 2, "scope": "neighbours", "local_tokens": 0, "hidden_weight": 1.0,
             "learning_rate": 2e-4}"""
CELLS = [
    f"""from ildlab.widgets import step_through
step_through("run", "smollm2-135m", {SMALL})""",
    "import time; time.sleep(2); print('second cell', 'ran')",
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab with one notebook: (its address, its folder)."""
    with jupyterlab(tmp_path_factory.mktemp("lab"), CELLS, THEME) as served:
        yield served


@pytest.fixture
def page(tmp_path):
    with browser(tmp_path / "profile", 1500 if IMAGES else 1250) as opened:
        yield opened


def own_errors(page) -> list[str]:
    """What the console called an error, without what it says of files that a server may lack.

    Until its cell has run again, JupyterLab looks for the widget that a saved page shows, and may say that the old
    kernel's is gone.
    """
    allowed = ("favicon", "ERR_", "404", "widget model not found")
    return [e for e in page.errors if not any(word in e for word in allowed)]


def shot(page, name: str) -> None:
    if IMAGES:
        page.mouse.move(0, 0)
        page.wait_for_timeout(400)  # what moves has arrived
        page.locator(".ildlab-stepper").first.screenshot(path=f"{IMAGES}/{name}.png")


def begin(page, address: str) -> None:
    ready(page, address)
    run_all(page)
    page.wait_for_selector(".ildlab-stepper svg.columns", timeout=180_000)
    wait_status(page, "Ready", 180)


def proceed(page, label: str, said: str, seconds: float = 300) -> None:
    """Click the one button, which must be for this phase."""
    page.locator(".ildlab-stepper button.mod-primary").filter(has_text=label).click()
    wait_status(page, said, seconds)


def figures(page) -> None:
    """Keep a picture of every figure, those that run the model too."""
    from ildlab.widgets.figures import FIGURES

    kinds = page.locator(".ildlab-stepper select").filter(has_text=next(iter(FIGURES))).first
    for kind, figure in FIGURES.items():
        kinds.select_option(kind)
        if figure.heavy:
            press(page, "Draw")
            wait_status(page, f"Drawn: {re.escape(kind)}")
        page.wait_for_timeout(500)
        shot(page, "figure_" + kind.replace(" ", "_").replace("×", "x"))


def test_the_whole_flow(lab, page):
    address, work = lab
    begin(page, address)
    shot(page, "ready")

    # Measure, and stop one in the middle; then measure to the end.
    page.locator(".ildlab-stepper select").filter(has_text="block_influence").first.select_option("kl")
    page.locator(".ildlab-stepper input[type=checkbox]").first.check()  # a race has more places to stop at
    proceed(page, "Measure importance", r"Measure: \d")
    shot(page, "measuring")
    press(page, "Stop")
    wait_status(page, "Measure stopped; nothing was changed")
    proceed(page, "Measure importance", "least important")
    shot(page, "measured")
    assert page.locator(".ildlab-stepper .col.suggested").count() == 1
    suggested = int(page.locator(".ildlab-stepper .col.suggested").get_attribute("data-id"))
    assert column(page, suggested).get_attribute("aria-selected") == "true"

    # Pointing tells all that is known of a layer.
    column(page, 0).locator(".hit").hover()
    tip = page.locator(".ildlab-stepper .tip").first
    assert "layer 0\ndepth 1 of 30\nkl " in tip.inner_text() and "n=" in tip.inner_text()

    # What if: the words change when layers go, and fast clicks end in the last state.
    pane(page, "What if")
    press(page, "Compare")
    wait_status(page, "Student beside teacher")
    assert page.locator(".ildlab-stepper mark").count() == 0
    column(page, 5).locator(".hit").click()
    column(page, 8).locator(".hit").click(modifiers=["Shift"])
    assert page.locator(".ildlab-stepper [aria-selected=true]").count() == 4
    for _ in range(3):
        page.keyboard.press("x")
    wait_status(page, "Without 5, 6, 7, 8")
    assert page.locator(".ildlab-stepper mark").count() > 0
    assert page.locator(".ildlab-stepper .col.off").count() == 4
    shot(page, "what_if")
    press(page, "All layers on")
    wait_status(page, "All layers are on")

    # Remove the suggestion, distill while another cell runs, with the click answered at once.
    proceed(page, f"Remove layer {suggested}", "removed; undo brings it back")
    assert page.locator(".ildlab-stepper .col.removed").count() == 1
    assert page.locator(".ildlab-stepper .row").count() == 1
    proceed(page, "Evaluate the removal", "Evaluate: done")
    proceed(page, "Distill", r"Distill: \d")
    page.evaluate(
        "() => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = 1;"
        " window.jupyterapp.commands.execute('notebook:run-cell'); }"
    )
    press(page, "Pause")
    wait_status(page, "Paused|paused")
    shot(page, "paused")
    press(page, "Resume")
    wait_status(page, r"Distill: \d")
    page.wait_for_selector(".ildlab-stepper .col.trains")
    shot(page, "distilling")
    wait_status(page, "Distill: done in .*KL", 300)
    shot(page, "distilled")
    proceed(page, "Evaluate", "Evaluate: done")
    assert "perplexity" in page.locator(".ildlab-stepper .ildlab-header").inner_text()
    shot(page, "evaluated")
    if IMAGES:
        figures(page)

    # The run itself is below the stack: a click on an iteration shows its student.
    page.get_by_role("button", name=re.compile("^Undo: distill")).click()
    wait_status(page, "Back at step")
    page.locator(".ildlab-stepper .row").first.click()
    page.wait_for_selector("text=As it was at step")
    shot(page, "history")
    for box, value, button in (("new run", "branch", "Branch"), ("checkpoint", "out", "Export")):
        page.locator(".ildlab-stepper").get_by_label(box).fill(value)
        page.locator(".ildlab-stepper").get_by_label(box).blur()
        press(page, button)
        wait_status(page, "Branched into branch" if button == "Branch" else "Exported to .*out")
    assert (work / "out" / "model.safetensors").is_file() and (work / "branch" / "journal.jsonl").is_file()
    before = status(page)
    assert not own_errors(page), page.errors

    # A restarted kernel and a reloaded page stand at the same step.
    page.errors.clear()
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    begin(page, address)
    words = wait_status(page, "Ready. 29 of 30 layers")
    assert re.search(r"step (\d+)", words)[1] == re.search(r"step (\d+)\.$", before.strip())[1]
    assert page.locator(".ildlab-stepper .col.removed").first.get_attribute("data-id") == str(suggested)
    assert not own_errors(page), page.errors


def test_the_keyboard_alone_does_the_loop(lab, page, tmp_path):
    address, _ = lab
    begin(page, address)
    unreachable = page.evaluate(
        """() => [...document.querySelectorAll('.ildlab-stepper button, .ildlab-stepper select, '
             + '.ildlab-stepper input, .ildlab-stepper textarea, .ildlab-stepper svg.columns, .ildlab-stepper .row, '
             + '.ildlab-stepper .jupyter-widget-Collapse-header')]
             .filter(e => e.tabIndex < 0 && !e.disabled).map(e => e.outerHTML.slice(0, 120))"""
    )
    assert unreachable == []
    page.locator(".ildlab-stepper svg.columns").first.focus()
    heard = page.locator(".ildlab-stepper .heard").first
    page.keyboard.press("Home")
    page.wait_for_function("document.querySelector('.ildlab-stepper .heard').textContent.startsWith('layer 0')")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    page.wait_for_function("document.querySelectorAll('.ildlab-stepper [aria-selected=true]').length === 2")
    assert heard.inner_text().startswith("layer 2")
    page.keyboard.press("?")
    page.wait_for_selector(".ildlab-stepper dialog[open]")
    page.keyboard.press("Escape")
    layers = int(re.search(r"(\d+) of 30", status(page))[1])
    for key, said in (
        ("m", "least important"),
        ("r", "removed; undo brings it back"),
        ("d", "Distill: done"),
        ("e", "Evaluate: done"),
        ("u", "Back at step"),
    ):
        page.locator(".ildlab-stepper svg.columns").first.focus()
        page.keyboard.press(key)
        wait_status(page, said, 300)
    held = violations(page, tmp_path)
    print("axe-core is out of reach" if held is None else "axe-core finds no violation")
    assert not held, held
    assert f"{layers - 1} of 30" in status(page)  # the distillation is undone, the removal is not
    assert not own_errors(page), page.errors


def test_the_loop_runs_live_to_an_exported_checkpoint(tmp_path):
    """From "run all" to a checkpoint, by who reads the page alone: run to 28 layers, open history, export."""
    with jupyterlab(tmp_path, CELLS[:1], THEME) as (address, work), browser(tmp_path / "profile", 1500) as page:
        begin(page, address)
        page.locator(".ildlab-stepper button").filter(has_text="Run to 28 layers").click()
        wait_status(page, r"Run: 1/2.*Distill|Run: 1/2.*distill", 400)
        page.wait_for_selector(".ildlab-stepper .row")
        press(page, "Pause")
        wait_status(page, "Paused|paused")
        press(page, "Resume")
        wait_status(page, r"Run: 1/2")
        shot(page, "mid_run")
        wait_status(page, "Run to 28 layers; now Export writes a checkpoint", 600)
        pane(page, "History and export")
        press(page, "Export")
        wait_status(page, "Exported to .*generation is the same")
        assert (work / "run" / "checkpoint-28-layers" / "model.safetensors").is_file()
        assert page.locator(".ildlab-stepper .row").count() == 2
        assert not own_errors(page), page.errors


FAKE = """
import numpy as np
import ipywidgets as w
from ildlab import plots
from ildlab.importance import LayerScores
from ildlab.widgets.stack_view import StackView
rng = np.random.default_rng(0)
views = []
for count in (30, 80):
    x = np.exp(rng.normal(-2, 0.7, count)) + rng.normal(0, 0.02, (12, count))
    x[2:, 0] = np.nan
    scores = LayerScores.from_samples("kl", "a text", range(count), x, np.ones(12), details={"dropped": {"0": 2}})
    views.append(StackView(lambda: None))
    views[-1].picture = plots.stack(scores).picture.html()
    views[-1].selected = [3]
w.VBox(views).add_class("ildlab-stepper")
"""


def test_the_stack_is_one_row_at_any_width_and_depth_in_both_themes(tmp_path):
    with jupyterlab(tmp_path, [FAKE], THEME) as (address, _), browser(tmp_path / "profile", 900) as page:
        ready(page, address)
        page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
        run_all(page)
        page.wait_for_selector(".ildlab-stepper svg.columns", timeout=120_000)
        for theme in ("JupyterLab Light", "JupyterLab Dark"):
            page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
            for width in (1440, 1024, 640):
                page.set_viewport_size({"width": width, "height": 900})
                page.wait_for_timeout(700)
                for number, count in enumerate((30, 80)):
                    boxes = page.evaluate(GEOMETRY, number)
                    assert boxes["columns"] == count
                    assert len(set(boxes["tops"])) == 1  # one row
                    assert boxes["left"] >= 0 and boxes["right"] <= boxes["width"] + 1  # no bar to scroll sideways
                    assert boxes["overlaps"] == [], (width, count)
                    assert min(boxes["contrast"]) >= 4.5, (theme, min(boxes["contrast"]))
                if IMAGES:
                    name = f"{IMAGES}/stack_{width}_{theme.split()[1].lower()}.png"
                    page.locator(".ildlab-stepper").first.screenshot(path=name)


# Where the columns of a stack are, which of its layer ids touch, and how well its letters read on the page.
GEOMETRY = """number => {
  const svg = document.querySelectorAll('.ildlab-stepper svg.columns')[number], frame = svg.getBoundingClientRect();
  const hits = [...svg.querySelectorAll('.col .hit')].map(e => e.getBoundingClientRect());
  const ids = [...svg.querySelectorAll('.col .id')].map(e => e.getBoundingClientRect()).filter(b => b.width);
  const overlaps = ids.slice(1).map((b, i) => b.left - ids[i].right).filter(gap => gap < 1);
  let ground = svg;
  while (ground && /rgba\\(0, 0, 0, 0\\)|transparent/.test(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;
  const rgb = colour => colour.match(/[\\d.]+/g).map(Number);
  const back = rgb(getComputedStyle(ground).backgroundColor);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const contrast = [...svg.querySelectorAll('text')].map(e => {
    const [r, g, b, a = 1] = rgb(getComputedStyle(e).fill);
    const ink = [r, g, b].map((c, i) => c * a + back[i] * (1 - a));
    const [high, low] = [light(ink), light(back)].sort((x, y) => y - x);
    return (high + .05) / (low + .05);
  });
  return {columns: hits.length, tops: hits.map(b => Math.round(b.top)), left: hits[0].left - frame.left,
          right: hits.at(-1).right - frame.left, width: frame.width, overlaps, contrast};
}"""
