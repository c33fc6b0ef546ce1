"""What the stepper costs: a step of distillation with and without it, and how soon a click is answered."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path


def bench() -> list[dict]:
    """Distill SmolLM2 by the session alone and through the stepper, in turns, on the same tokens."""
    from ildlab.models import load_model
    from ildlab.progress import drive
    from ildlab.session import PruningSession
    from ildlab.stepper import Stepper

    loaded = load_model("smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        session = PruningSession.create(
            Path(folder) / "run", loaded, block=128, calibration_tokens=1024, train_tokens=16 * 512,
            eval_tokens=256, metric="block_influence", distill={"batch_size": 4, "scope": "neighbours"},
        )  # fmt: skip
        session.remove(14)
        removed_at = session.journal.head.step
        stepper = Stepper(session)
        stepper.tokens.value = 16 * 512
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
            "note": f"{min(alone):.1f} s for 8192 tokens, live curves included",
        },
        {
            "name": "slowest click while distilling / 0.3 s",
            "ratio": max(answers) / 0.3,
            "limit": "<= 1",
            "note": f"{len(answers)} clicks, median {1000 * sorted(answers)[len(answers) // 2]:.1f} ms",
        },
    ]
