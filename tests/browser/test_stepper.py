"""The stepper in a real JupyterLab, driven by mouse and keyboard in a real Chromium, on SmolLM2."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
IMAGES = os.environ.get("ILDLAB_SCREENSHOTS")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
]

CELLS = [
    """from pathlib import Path
from ildlab import PruningSession
from ildlab.stepper import Stepper
folder = Path("run")
if (folder / "config.json").exists():
    session = PruningSession.open(folder)
else:
    session = PruningSession.create(folder, "smollm2-135m", block=64, calibration_tokens=256,
                                    train_tokens=2048, eval_tokens=128, metric="block_influence",
                                    distill={"kl_positions": 8, "batch_size": 2, "scope": "neighbours"})
Stepper(session)""",
    "import time; time.sleep(2); print('second cell', 'ran')",
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab of its own on loopback: (address of the notebook, folder)."""
    root = tmp_path_factory.mktemp("lab")
    work = root / "work"
    work.mkdir()
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in CELLS],
        metadata={"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
    )
    nbformat.write(notebook, work / "stepper.ipynb")
    settings = root / "settings"
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    for name, values in (
        ("apputils-extension/notification", quiet),
        ("apputils-extension/themes", {"theme": os.environ.get("ILDLAB_THEME", "JupyterLab Light")}),
    ):
        file = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        **os.environ,
        **{f"JUPYTER_{k}_DIR": str(root / k.lower()) for k in ("CONFIG", "DATA", "RUNTIME")},
        "IPYTHONDIR": str(root / "ipython"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTERLAB_WORKSPACES_DIR": str(root / "workspaces"),
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", "--IdentityProvider.token=t0ken", f"--ServerApp.root_dir={work}",
        "--LabApp.expose_app_in_browser=True",
    ]  # fmt: skip
    log = open(root / "lab.log", "w")
    server = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=work)
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{base}/api?token=t0ken", timeout=2)
                break
            except OSError:
                assert server.poll() is None, (root / "lab.log").read_text()
                time.sleep(0.5)
        yield f"{base}/lab/tree/stepper.ipynb?token=t0ken", work
    finally:
        server.terminate()
        server.wait(20)
        log.close()


@pytest.fixture
def page(tmp_path):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        context = play.chromium.launch_persistent_context(
            str(tmp_path / "profile"), executable_path=CHROMIUM, headless=True, args=FLAGS,
            viewport={"width": 1250, "height": 1250},
        )  # fmt: skip
        opened = context.new_page()
        opened.errors = []
        opened.on("console", lambda m: opened.errors.append(m.text) if m.type == "error" else None)
        yield opened
        context.close()


def ready(page, address: str) -> None:
    page.goto(address)
    page.wait_for_function("window.jupyterapp !== undefined", timeout=60_000)
    page.evaluate(
        """async () => {
          const app = window.jupyterapp; await app.restored;
          let panel;
          for (let i = 0; i < 300 && !(panel = app.shell.currentWidget)?.context; i++)
            await new Promise(r => setTimeout(r, 100));
          await panel.context.ready; await panel.sessionContext.ready; await panel.sessionContext.session.kernel.info;
        }"""
    )


def run_all(page) -> None:
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")


def status(page) -> str:
    return page.locator(".ildlab-status").first.inner_text()


def wait_status(page, pattern: str, seconds: float = 120) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        words = status(page)
        if re.search(pattern, words):
            return words
        time.sleep(0.05)
    raise AssertionError(f"the status never said {pattern!r}; it says {status(page)!r}")


def press(page, label: str) -> None:
    page.get_by_role("button", name=label, exact=True).first.click()


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def shot(page, name: str) -> None:
    if IMAGES:
        page.locator(".ildlab-stepper").first.screenshot(path=f"{IMAGES}/{name}.png")


def test_the_whole_flow(lab, page):
    address, work = lab
    ready(page, address)
    run_all(page)
    page.wait_for_selector(".ildlab-stepper", timeout=120_000)
    wait_status(page, "Ready. 30 of 30 layers")

    # Measure, and stop one in the middle; then measure to the end.
    page.locator(".ildlab-stepper select").first.select_option("kl")
    press(page, "Measure")
    wait_status(page, r"Measure: \d")
    press(page, "Stop")
    wait_status(page, "Measure stopped")
    page.locator(".ildlab-stepper select").first.select_option("block_influence")
    press(page, "Measure")
    wait_status(page, "least important")
    shot(page, "measured")

    # Choose by keyboard: the slider moves by arrow keys.
    handle = page.locator(".ildlab-layer [role=slider]").first
    handle.focus()
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
    press(page, "Distill")
    wait_status(page, r"Distill: \d")
    page.evaluate(
        "() => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = 1;"
        " window.jupyterapp.commands.execute('notebook:run-cell'); }"
    )
    press(page, "Pause")
    wait_status(page, "Paused|paused")
    press(page, "Resume")
    wait_status(page, "Distill: done", 300)
    shot(page, "distilled")

    tab(page, "Evaluate")
    press(page, "Evaluate")
    wait_status(page, "Evaluate: done")
    assert "perplexity" in page.locator(".ildlab-stepper").inner_text()

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
    before = status(page)

    # A restarted kernel and a reloaded page stand at the same step.
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    ready(page, address)
    run_all(page)
    page.wait_for_selector(".ildlab-stepper", timeout=120_000)
    words = wait_status(page, "Ready. 29 of 30 layers")
    assert re.search(r"step (\d+)", words)[1] == re.search(r"step (\d+)\.$", before.strip())[1]
    assert page.locator(".ildlab-stepper .ildlab-removed").count() == 1
    own = [e for e in page.errors if "favicon" not in e and "ERR_" not in e and "404" not in e]
    assert not own, own


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
