"""The stepper in a real JupyterLab, driven by mouse and keyboard in a real Chromium, on SmolLM2.

`ILDLAB_SCREENSHOTS=folder` keeps a picture of each state; `ILDLAB_THEME="JupyterLab Dark"` changes the theme.
"""

from __future__ import annotations

import os
import re

import pytest

from .lab import CHROMIUM, browser, jupyterlab, press, ready, run_all, status, tab, wait_status

IMAGES = os.environ.get("ILDLAB_SCREENSHOTS")
THEME = os.environ.get("ILDLAB_THEME", "JupyterLab Light")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
]

CELLS = [
    """from pathlib import Path
from ildlab import PruningSession
from ildlab.widgets.stepper import Stepper
folder = Path("run")
if (folder / "config.json").exists():
    session = PruningSession.open(folder)
else:
    session = PruningSession.create(folder, "smollm2-135m", text="python-docs", block=32, calibration_tokens=128,
                                    train_tokens=4096, eval_tokens=128, metric="block_influence",
                                    distill={"kl_positions": 8, "batch_size": 2, "scope": "neighbours", "local_tokens": 0,
                                             "hidden_weight": 1.0, "learning_rate": 2e-4})
Stepper(session)""",
    "import time; time.sleep(2); print('second cell', 'ran')",
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab with one notebook: (its address, its folder)."""
    with jupyterlab(tmp_path_factory.mktemp("lab"), CELLS, THEME) as served:
        yield served


@pytest.fixture
def page(tmp_path):
    with browser(tmp_path / "profile", 1800 if IMAGES else 1250) as opened:
        yield opened


def own_errors(page) -> list[str]:
    """What the console called an error, without what it says of files that a server may lack."""
    return [e for e in page.errors if not any(word in e for word in ("favicon", "ERR_", "404"))]


def shot(page, name: str) -> None:
    if IMAGES:
        page.locator(".ildlab-stepper").first.screenshot(path=f"{IMAGES}/{name}.png")


def figures(page) -> None:
    """Keep a picture of every figure, those that run the model too."""
    from ildlab.widgets.figures import FIGURES

    kinds = page.locator(".ildlab-stepper select").filter(has_text=next(iter(FIGURES))).first
    for kind in FIGURES:
        kinds.select_option(kind)
        press(page, "Draw")
        wait_status(page, f"Drawn: {re.escape(kind)}")
        shot(page, "figure_" + kind.replace(" ", "_").replace("×", "x"))


def test_the_whole_flow(lab, page):
    address, work = lab
    ready(page, address)
    run_all(page)
    page.wait_for_selector(".ildlab-stepper", timeout=120_000)
    wait_status(page, "Ready. 30 of 30 layers")
    shot(page, "ready")

    # Measure, and stop one in the middle; then measure to the end.
    page.locator(".ildlab-stepper select").first.select_option("kl")
    page.locator(".ildlab-stepper input[type=checkbox]").first.check()  # a race has more places to stop at
    press(page, "Measure")
    wait_status(page, r"Measure: \d")
    shot(page, "measuring")
    press(page, "Stop")
    wait_status(page, "Measure stopped")
    shot(page, "stopped")
    page.locator(".ildlab-stepper select").first.select_option("block_influence")
    press(page, "Measure")
    wait_status(page, "least important")
    shot(page, "measured")

    # Choose by keyboard: the slider, which stands on the suggestion, moves by arrow keys.
    handle = page.locator(".ildlab-layer [role=slider]").first
    handle.focus()
    page.keyboard.press("Home")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.wait_for_selector(".ildlab-cell-4.ildlab-selected")

    # What if: the words change when layers go.
    tab(page, "What if")
    press(page, "Compare")
    wait_status(page, "Student beside teacher")
    whole = page.locator(".ildlab-stepper table").first.inner_text()
    page.locator(".ildlab-cell-0").first.click()
    press(page, "Switch the selected layer off or on")
    wait_status(page, "Without 0")
    assert page.locator(".ildlab-stepper table").first.inner_text() != whole
    page.wait_for_selector(".ildlab-cell-0.ildlab-off")
    shot(page, "what_if")
    press(page, "All layers on")

    # Remove the suggestion, distill while another cell runs, with the click answered at once.
    tab(page, "Remove and distill")
    press(page, "Select the suggestion")
    press(page, "Remove the selected layer")
    wait_status(page, "removed; undo brings it back")
    assert page.locator(".ildlab-removed").count() == 1
    shot(page, "removed")
    press(page, "Remove the selected layer")
    wait_status(page, "Not done: Layer .* is not in the student")
    shot(page, "refused")
    press(page, "Distill")
    wait_status(page, r"Distill: \d")
    page.evaluate(
        "() => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = 1;"
        " window.jupyterapp.commands.execute('notebook:run-cell'); }"
    )
    press(page, "Pause")
    wait_status(page, "Paused|paused")
    shot(page, "paused")
    press(page, "Resume")
    wait_status(page, r"Distill: \d")
    shot(page, "distilling")
    wait_status(page, "Distill: done", 300)
    shot(page, "distilled")

    tab(page, "Evaluate")
    press(page, "Evaluate")
    wait_status(page, "Evaluate: done")
    assert "perplexity" in page.locator(".ildlab-stepper").inner_text()
    shot(page, "evaluated")
    if IMAGES:
        figures(page)

    tab(page, "History and export")
    shot(page, "history")
    press(page, "Undo")
    wait_status(page, "Back at step")
    folder = page.get_by_placeholder("runs/branch or runs/out")
    folder.fill("branch")
    folder.blur()
    press(page, "Branch into the folder")
    wait_status(page, "Branched into branch")
    folder.fill("out")
    folder.blur()
    press(page, "Export to the folder")
    wait_status(page, "Exported to out")
    assert (work / "out" / "model.safetensors").is_file() and (work / "branch" / "journal.jsonl").is_file()
    shot(page, "exported")
    before = status(page)
    assert not own_errors(page), page.errors

    # A restarted kernel and a reloaded page stand at the same step. Until its cell has run again, JupyterLab looks for
    # the widget that the saved page shows: whether it says that the old kernel's is gone is a matter of time.
    page.errors.clear()
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    ready(page, address)
    run_all(page)
    page.wait_for_selector(".ildlab-stepper", timeout=120_000)
    words = wait_status(page, "Ready. 29 of 30 layers")
    assert re.search(r"step (\d+)", words)[1] == re.search(r"step (\d+)\.$", before.strip())[1]
    assert page.locator(".ildlab-stepper .ildlab-removed").count() == 1
    assert not [e for e in own_errors(page) if "widget model not found" not in e], page.errors


def test_every_control_is_reached_by_keyboard(lab, page):
    address, _ = lab
    ready(page, address)
    run_all(page)
    page.wait_for_selector(".ildlab-stepper", timeout=120_000)
    wait_status(page, "Ready")
    unreachable = page.evaluate(
        """() => [...document.querySelectorAll('.ildlab-stepper button, .ildlab-stepper select, '
             + '.ildlab-stepper input, .ildlab-stepper textarea, .ildlab-stepper [role=slider]')]
             .filter(e => e.tabIndex < 0 && !e.disabled).map(e => e.outerHTML.slice(0, 120))"""
    )
    assert unreachable == []
    page.locator(".ildlab-cell-7").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".ildlab-cell-7.ildlab-selected")
