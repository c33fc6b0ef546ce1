"""A JupyterLab of its own and a Chromium that drives it: for browser tests, screenshots and the benchmark."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def jupyterlab(root: Path, cells: list[str], theme: str = "JupyterLab Light") -> Iterator[tuple[str, Path]]:
    """Serve one notebook of these code cells on loopback; gives its address and its folder."""
    work = root / "work"
    work.mkdir()
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in cells],
        metadata={"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
    )
    nbformat.write(notebook, work / "stepper.ipynb")
    settings = root / "settings"
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    for name, values in (("apputils-extension/notification", quiet), ("apputils-extension/themes", {"theme": theme})):
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
        "PYTHONPATH": str(ROOT),
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=t0ken",
        f"--ServerApp.root_dir={work}",
        "--LabApp.expose_app_in_browser=True",
    ]
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


@contextmanager
def browser(profile: Path, height: int = 1250, width: int = 1440) -> Iterator:
    """Open a page of a fresh Chromium; `page.errors` collects what its console calls an error."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        context = play.chromium.launch_persistent_context(
            str(profile),
            executable_path=CHROMIUM,
            headless=True,
            args=FLAGS,
            viewport={"width": width, "height": height},
        )
        page = context.new_page()
        page.errors = []
        page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
        yield page
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


def violations(page, folder: Path) -> list[str] | None:
    """What axe-core, taken from npm, holds against the stepper; None where npm, or its registry, is out of reach."""
    try:
        command = ["npm", "pack", "axe-core@4.14.1", "--silent"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    with tarfile.open(folder / "axe-core-4.14.1.tgz") as packed:
        page.evaluate(packed.extractfile("package/axe.min.js").read().decode())
    found = page.evaluate(
        """async () => (await axe.run({include: [['.ildlab-stepper']]})).violations.map(
             v => `${v.id}: ${v.help}: ${v.nodes.slice(0, 3).map(n => n.html.slice(0, 160)).join(' | ')}`)"""
    )
    return found


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


def pane(page, name: str) -> None:
    """Open the options of a phase, if they are not open."""
    header = page.locator(".ildlab-stepper .jupyter-widget-Collapse").filter(
        has=page.locator(".jupyter-widget-Collapse-header").get_by_text(name, exact=True)
    )
    if "jupyter-widget-Collapse-open" not in (header.first.get_attribute("class") or ""):
        header.first.locator(".jupyter-widget-Collapse-header").click()


def column(page, layer_id: int):
    """The column of a layer."""
    return page.locator(f'.ildlab-stepper .col[data-id="{layer_id}"]').first


def answer_seconds(page, label: str, pattern: str, seconds: float = 10) -> float:
    """Click a button of the stepper; how long until the status line says `pattern`."""
    return page.evaluate(
        """([label, pattern, limit]) => new Promise((resolve, reject) => {
          const line = document.querySelector('.ildlab-status'), said = new RegExp(pattern);
          const button = [...document.querySelectorAll('.ildlab-stepper button')].find(b => b.innerText === label);
          let start = 0;
          const observer = new MutationObserver(() => {
            if (said.test(line.innerText)) { observer.disconnect(); resolve((performance.now() - start) / 1000); }
          });
          observer.observe(line, {childList: true, subtree: true, characterData: true});
          setTimeout(() => { observer.disconnect(); reject(`${label} was not answered`); }, 1000 * limit);
          start = performance.now();
          button.click();
        })""",
        [label, pattern, seconds],
    )
