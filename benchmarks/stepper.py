"""What the stepper costs: a step of distillation with and without it, and how soon a click is answered."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat


def bench() -> Iterator[dict]:
    """What the stepper adds to a step, and how soon it answers, in the kernel and in a browser."""
    yield from in_the_kernel()
    yield from in_a_browser()


def in_the_kernel() -> list[dict]:
    """Distill SmolLM2 by the session alone and through the stepper, in turns, on the same tokens."""
    from ildlab.model.load import load_model
    from ildlab.progress import drive
    from ildlab.session.session import PruningSession
    from ildlab.widgets.stepper import Stepper

    loaded = load_model("smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        session = PruningSession.create(
            Path(folder) / "run",
            loaded,
            text="python-docs",
            block=128,
            calibration_tokens=1024,
            train_tokens=8 * 512,
            eval_tokens=256,
            metric="block_influence",
            distill={"batch_size": 4, "scope": "neighbours"},
        )
        session.remove(14)
        removed_at = session.journal.head.step
        stepper = Stepper(session)
        stepper.tokens.value = 8 * 512
        alone, shown, answers = [], [], []
        for turn in range(3):
            start = time.perf_counter()
            drive(session.distill_steps(), show=False)
            alone.append(time.perf_counter() - start)
            session.undo(to=removed_at)
            start = time.perf_counter()
            stepper.distill.click()
            if turn:  # the clicks of the first turn would be paid by it
                while stepper.worker.busy:
                    clicked = time.perf_counter()
                    stepper.measure.click()  # answered by "Busy", at once
                    answers.append(time.perf_counter() - clicked)
                    time.sleep(0.2)
            stepper.worker.wait()
            shown.append(time.perf_counter() - start)
            session.undo(to=removed_at)
        session.close()
    return [
        {
            "name": "distillation in the stepper / without",
            "ratio": min(shown) / min(alone),
            "limit": "<= 1.05",
            "note": f"{min(alone):.1f} s for 4096 tokens, live curves included",
        },
        {
            "name": "slowest click while distilling / 0.3 s",
            "ratio": max(answers) / 0.3,
            "limit": "<= 1",
            "note": f"{len(answers)} clicks, median {1000 * sorted(answers)[len(answers) // 2]:.1f} ms",
        },
    ]


def in_a_browser() -> list[dict]:
    """Run the first notebook in JupyterLab: seconds to its first figure, and to answer a click while it distills."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.browser.lab import (
        CHROMIUM,
        answer_seconds,
        browser,
        jupyterlab,
        pane,
        press,
        ready,
        run_all,
        wait_status,
    )

    if CHROMIUM is None:
        print("No Chromium: clicks in a browser are not timed.")
        return []
    notebook = nbformat.read(Path(__file__).parents[1] / "notebooks" / "01_step_through_pruning.ipynb", 4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    with (
        tempfile.TemporaryDirectory() as folder,
        jupyterlab(Path(folder), cells) as (address, _),
        browser(Path(folder) / "profile") as page,
    ):
        ready(page, address)
        start = time.perf_counter()
        run_all(page)
        page.wait_for_selector(".ildlab-stepper svg.columns", state="attached", timeout=240_000)
        first = time.perf_counter() - start
        page.wait_for_selector(".ildlab-stepper", timeout=120_000)
        wait_status(page, "Ready|least important", 240)
        page.wait_for_function("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'")
        page.locator(".ildlab-stepper svg.columns").first.focus()
        page.keyboard.press("r")
        wait_status(page, "removed; undo brings it back")
        pane(page, "Distill")
        press(page, "Distill")
        pane(page, "Measure")
        wait_status(page, r"Distill: \d")
        answers = []
        for _ in range(10):
            answers.append(answer_seconds(page, "Measure", "Busy"))
            wait_status(page, r"Distill: \d")  # the next progress: the same words twice would be no change
        press(page, "Stop")
        wait_status(page, "Distill stopped", 120)
    return [
        {
            "name": "first figure after run all / 60 s",
            "ratio": first / 60,
            "limit": "<= 1",
            "note": f"{first:.1f} s, notebook 01 in JupyterLab, model in the cache",
        },
        {
            "name": "slowest click in the browser while distilling / 0.3 s",
            "ratio": max(answers) / 0.3,
            "limit": "<= 1",
            "note": f"{len(answers)} clicks, median {1000 * sorted(answers)[len(answers) // 2]:.0f} ms",
        },
    ]
