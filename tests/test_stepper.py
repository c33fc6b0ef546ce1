"""The stepper without a browser: every control, every state, and a monkey that presses everything."""

from __future__ import annotations

import html
import random
import re
import threading
import time

import numpy as np
import pytest
import torch

from ildlab.errors import SessionError
from ildlab.importance.scores import LayerScores
from ildlab.plots.canvas import contrast
from ildlab.progress import Progress
from ildlab.session.session import PruningSession
from ildlab.widgets.figures import FIGURES, OF_KINDS
from ildlab.widgets.stepper import Stepper
from ildlab.widgets.strip import shade
from ildlab.widgets.worker import Worker

pytestmark = pytest.mark.usefixtures("short_speed")


@pytest.fixture
def session(tmp_path, tiny_folder, text_file):
    made = PruningSession.create(
        tmp_path / "run",
        str(tiny_folder),
        dtype="float32",
        text=str(text_file),
        block=32,
        calibration_tokens=4 * 32,
        train_tokens=16 * 32,
        eval_tokens=4 * 32,
        metric="block_influence",
    )
    yield made
    made.close()


@pytest.fixture
def stepper(session):
    made = Stepper(session, inline=True)
    made.prompt.value = made.text.value = "def f(x):"
    return made


def logits(stack):
    with torch.no_grad():
        return stack.model(torch.tensor([[5, 9, 40, 7]]), use_cache=False).logits


def test_the_whole_flow(stepper, session, tmp_path):
    stepper.measure.click()
    assert "least important" in stepper.status.value
    stepper.suggest.click()
    chosen = stepper.strip.selected
    assert chosen == session.scores.least_important
    assert "▼" in stepper.strip.cells[chosen].description
    stepper.remove.click()
    assert session.removed == [chosen]
    cell = stepper.strip.cells[chosen]
    assert "×" in cell.description and "removed" in cell.tooltip and "ildlab-removed" in cell._dom_classes
    stepper.distill.click()
    assert session.journal.head.action == "distill" and stepper.failed is None
    assert any("*" in c.description for c in stepper.strip.cells.values())
    stepper.evaluate.click()
    assert "perplexity" in stepper.results.value
    stepper.folder.value = str(tmp_path / "branch")
    stepper.branch.click()
    assert (tmp_path / "branch" / "journal.jsonl").is_file()
    stepper.folder.value = str(tmp_path / "out")
    stepper.export.click()
    assert "generation is the same" in stepper.status.value
    stepper.undo.click()
    assert [s.action for s in session.path][-1] == "remove"
    stepper.steps.value = 0
    stepper.go_back.click()
    assert session.removed == []


def test_what_if_changes_words_and_nothing_else(stepper, session):
    before = logits(session.student)
    stepper.what_if.click()
    whole = stepper.answers.value
    stepper.strip.select(2)
    stepper.toggle.click()
    assert "layers 2 off" in stepper.answers.value and stepper.answers.value != whole
    assert "switched off" in stepper.strip.cells[2].tooltip
    assert torch.equal(logits(session.student), before) and len(session.steps) == 1
    # A click, or Enter, on the selected cell toggles as well.
    stepper.strip.cells[2].click()
    assert "ildlab-off" not in stepper.strip.cells[2]._dom_classes
    stepper.strip.cells[2].click()
    assert "ildlab-off" in stepper.strip.cells[2]._dom_classes
    stepper.reset.click()
    assert stepper.answers.value == "" and "ildlab-off" not in stepper.strip.cells[2]._dom_classes


def test_errors_are_words_and_lose_nothing(stepper, session):
    stepper.strip.select(1)
    stepper.remove.click()
    stepper.remove.click()
    assert "Not done" in stepper.status.value and "Layer 1 is not in the student" in stepper.status.value
    stepper.rate.value = 1e-2
    stepper.tokens.value = -3
    stepper.distill.click()
    assert stepper.failed is not None and "nothing is lost" in stepper.status.value
    assert session.removed == [1] and session.journal.head.action == "remove"
    stepper.prompt.value = ""
    stepper.what_if.click()
    assert "prompt is empty" in stepper.status.value


def test_html_in_names_and_prompts_is_text(stepper):
    stepper.prompt.value = "<script>alert(1)</script>"
    stepper.what_if.click()
    assert "<script>" not in stepper.answers.value and "&lt;script&gt;" in stepper.answers.value
    stepper._say("<b>x</b>")
    assert "&lt;b&gt;x" in stepper.status.value


def test_direct_actions_hold_the_worker(session, monkeypatch):
    stepper = Stepper(session)
    seen = []
    real = session.remove

    def remove(layer_id):
        seen.append(stepper.worker.start(count(1, []), lambda p: None, lambda o: None))
        return real(layer_id)

    monkeypatch.setattr(session, "remove", remove)
    stepper.strip.select(2)
    stepper.remove.click()
    assert seen == [False] and session.removed == [2]  # no job could start beside it
    assert not stepper.worker.busy
    with stepper.worker.hold() as held:
        assert held
        stepper.undo.click()
        assert "Busy" in stepper.status.value and session.removed == [2]


def test_what_fails_outside_of_ildlab_is_words_too(stepper, session, monkeypatch):
    from ildlab import plots

    def broken(*_, **__):
        raise ValueError("no <room>")

    monkeypatch.setattr(plots, "importance", broken)
    stepper.measure.click()
    assert "Measured" in stepper.status.value  # the step itself is done, and said so
    assert "could not be drawn: no &lt;room&gt;" in stepper.figure.value
    monkeypatch.undo()
    stepper.figure_kind.value = "losses"
    stepper.figure_kind.value = "importance"
    monkeypatch.setattr(plots, "save", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    stepper.save.click()
    assert "Not done: disk is full" in stepper.status.value and isinstance(stepper.failed, OSError)


def test_the_first_click_on_a_cell_selects_and_the_second_toggles(stepper):
    stepper.strip.cells[0].click()
    assert "ildlab-off" not in stepper.strip.cells[0]._dom_classes
    stepper.strip.cells[0].click()
    assert "ildlab-off" in stepper.strip.cells[0]._dom_classes


def test_text_and_loss_of_a_distillation_are_chosen_there(stepper, session, tmp_path, text_file):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[100_000:200_000])
    session.remove(2)
    stepper.source.value, stepper.loss.label, stepper.scope.label = str(other), "KL alone", "neighbours"
    stepper.distill.click()
    step = session.journal.head
    assert step.result["text"]["source"] == str(other)
    assert step.args["config"]["hidden_weight"] == 0.0 and step.args["trained"] == [1, 3]


def test_an_evaluation_stands_beside_the_one_before(stepper, session):
    stepper.evaluate.click()
    assert "before it" not in stepper.results.value
    session.remove(2)
    stepper.evaluate.click()
    assert "before it, step 1" in stepper.results.value and stepper.results.value.count("<table") == 2


def test_branches_are_compared_on_one_figure(stepper, session):
    for layer_id in (1, 3):
        session.evaluate(speed=False)
        session.remove(layer_id)
        session.evaluate(speed=False)
        session.undo(to=0)
    stepper.figure_kind.value = "branches"
    assert stepper._drawn.data.index.get_level_values("branch").nunique() == 2


def test_every_figure_and_its_code(stepper, session, tmp_path):
    """Each snippet, run as it stands in a namespace of its own, draws the very figure that is shown."""
    for kind in FIGURES:  # with nothing to show yet
        stepper.figure_kind.value = kind
        stepper.draw.click()
    for button in (stepper.evaluate, stepper.measure, stepper.remove, stepper.distill, stepper.evaluate):
        button.click()
    stepper.text.value = "import os: print('it', \"is\")\nexit()"
    shown = {}
    for number, kind in enumerate(FIGURES, 1):
        stepper.figure_kind.value = kind
        stepper.draw.click()
        assert 'alt="' in stepper.figure.value, f"{kind}: {stepper.status.value}"
        for form in ("PNG", "SVG", "CSV"):
            stepper.save_as.value = form
            stepper.save.click()
        assert len(list((session.folder / "figures").iterdir())) == 3 * number, kind
        code = html.unescape(re.search("<pre>(.*)</pre>", stepper.code.value, re.DOTALL)[1])
        shown[kind] = code, stepper.figure.value
    session.close()
    for kind, (code, figure) in shown.items():
        *lines, last = code.splitlines()
        namespace = {}
        exec("\n".join(lines), namespace)
        assert eval(last, namespace)._repr_html_() == figure, kind
        namespace["session"].close()


def mixed(first: str, second: str) -> LayerScores:
    """Scores of six layers on two kinds of text: layer 2 is the least important, but 3 on the second kind alone."""
    x = [[8.0, 8.0, 1.0, 8.0, 8.0, 8.0]] * 2 + [[0.04, 0.04, 0.04, 0.02, 0.04, 0.04]] * 2
    return LayerScores.from_samples("kl", "a mix", range(6), x, np.ones(4), kinds=[first] * 2 + [second] * 2)


def journal(session, scores):
    session.append("measure", args={"metric": "kl"}, result={"scores": scores.to_dict()}, seed=0)


def test_one_kind_of_text_is_shown_and_all_of_them_suggest(stepper, session):
    view, cells = stepper.kind_of_text.view, stepper.strip.cells
    stepper.measure.click()
    assert view.layout.display == "none" and stepper.figure_kind.options == tuple(FIGURES)
    journal(session, mixed("prose", "copies"))
    stepper.refresh()
    assert view.layout.display is None and view.options == ("all kinds", "prose", "copies")
    figure, cell = stepper.figure.value, cells[3].description
    stepper.draw.click()  # a figure kept from before a choice is not what it asks for
    view.value = "copies"
    assert stepper.failed is None and stepper.figure.value != figure
    assert "importance(session, kind=&#x27;copies&#x27;)" in stepper.code.value
    assert stepper._drawn.data["score"].tolist() == pytest.approx([0.04, 0.04, 0.04, 0.02, 0.04, 0.04])
    assert cells[3].description == "3\n0.02" != cell and cells[2].description == "2▼\n0.04"
    stepper.strip.select(3)
    assert "On copies alone: kl 0.02 [" in stepper.about.value
    stepper.suggest.click()
    assert stepper.strip.selected == 2 and view.value == "copies"
    stepper._partial(mixed("prose", "copies"))  # while it is measured
    assert cells[3].description == "3\n0.02" and "▼" in cells[2].description
    stepper._partial(mixed("prose", "lists"))  # no copies yet
    assert cells[3].description == cell
    view.value = "all kinds"
    assert stepper.figure.value == figure and cells[3].description == cell and "alone" not in stepper.about.value
    stepper.figure_kind.value = "redundancy"
    stepper.draw.click()
    heavy = stepper.figure.value
    view.value = "prose"  # what ran the model has nothing to do with it
    assert 'alt="' in heavy and stepper.figure.value == heavy


def test_kinds_that_are_gone_are_not_offered(stepper, session):
    (name,) = OF_KINDS
    journal(session, mixed("prose", "copies"))
    stepper.refresh()
    stepper.figure_kind.value, stepper.kind_of_text.view.value = name, "copies"
    stepper.draw.click()
    assert "by kind of text" in stepper.figure.value and list(stepper._drawn.data) == ["prose", "copies"]
    journal(session, mixed("lists", "copies"))
    stepper.refresh()
    assert stepper.kind_of_text.chosen == "copies" and stepper.figure_kind.value == name
    assert list(stepper._drawn.data) == ["lists", "copies"]
    stepper.measure.click()  # on plain text
    assert stepper.kind_of_text.chosen is None and stepper.kind_of_text.view.layout.display == "none"
    assert stepper.figure_kind.options == tuple(FIGURES) and stepper.figure_kind.value == "importance"
    assert "Importance (block_influence)" in stepper.figure.value and stepper.failed is None


def test_controls_start_at_the_settings_of_the_run(tmp_path, tiny_folder, text_file):
    settings = {"block": 32, "calibration_tokens": 64, "train_tokens": 256, "eval_tokens": 64, "text": str(text_file)}
    distill = {"tokens": 128, "learning_rate": 1e-3}
    for race, measure in ((False, {}), (True, {"race": True})):
        folder = tmp_path / f"{race}"
        with PruningSession.create(
            folder, str(tiny_folder), dtype="float32", metric="kl", measure=measure, distill=distill, **settings
        ) as session:
            stepper = Stepper(session, inline=True)
            assert (stepper.race.value, stepper.tokens.value, stepper.rate.value) == (race, 128, 1e-3)
            stepper.measure.click()
            assert session.journal.head.args == {"metric": "kl", **measure}  # as session.measure()
            stepper.race.value = not race
            stepper.measure.click()
            assert session.journal.head.args["race"] is not race
            stepper.remove.click()
            stepper.distill.click()
            assert session.journal.head.args["config"]["tokens"] == 128
            stepper.tokens.value, stepper.rate.value = 192, 2e-3
            stepper.distill.click()
            config = session.journal.head.args["config"]
            assert (config["tokens"], config["learning_rate"]) == (192, 2e-3)


def test_after_a_measure_the_suggestion_is_selected_until_a_person_chooses(stepper, session):
    stepper.measure.click()
    least = session.scores.least_important
    assert least != 0 and stepper.strip.selected == least and f"Layer {least}:" in stepper.about.value
    stepper.strip.cells[least].click()  # the first click chooses, and switches nothing off
    assert "ildlab-off" not in stepper.strip.cells[least]._dom_classes
    stepper.strip.select(0)
    stepper.refresh()
    assert stepper.strip.selected == 0  # a person's choice stays
    stepper.measure.click()
    stepper.remove.click()
    assert session.removed == [least]
    stepper.undo.click()
    assert Stepper(session, inline=True).strip.selected == least  # a run that was measured before


def test_an_empty_suite_box_is_no_suite(tmp_path, tiny_folder, text_file):
    settings = {"block": 32, "calibration_tokens": 64, "train_tokens": 256, "eval_tokens": 64, "text": str(text_file)}
    with PruningSession.create(tmp_path / "run", str(tiny_folder), suite="mini7@1", **settings) as session:
        stepper = Stepper(session, inline=True)
        assert stepper.suite.value == "mini7@1"
        stepper.evaluate.click()
        assert session.journal.head.args["suite"] == "mini7@1"
        stepper.suite.value = " "
        stepper.evaluate.click()
        assert session.journal.head.args["suite"] is None and session.evaluation.suite is None


def test_an_error_without_words_is_named(stepper, session, monkeypatch):
    def broken(*_, **__):
        yield Progress(0, 1)
        raise AssertionError

    monkeypatch.setattr(session, "measure_steps", broken)
    stepper.measure.click()
    assert "Measure failed, and nothing is lost: AssertionError" in stepper.status.value


def test_status_is_announced_and_figures_have_words(stepper):
    stepper.measure.click()
    assert 'role="status"' in stepper.status.value and "aria-live" in stepper.status.value
    page = stepper._repr_html_()
    assert 'alt="Importance' in page and "<table" in page


def test_contrast_of_the_strip():
    for value in (0.0, 0.3, 0.5, 0.7, 1.0, None):
        colour = shade(value, 0, 1)
        assert max(contrast("#000000", colour), contrast("#ffffff", colour)) >= 4.5


def test_reopened_at_the_same_step(stepper, session):
    stepper.strip.select(3)
    stepper.remove.click()
    session.close()
    again = PruningSession.open(session.folder, dtype="float32")
    other = Stepper(again, inline=True)
    assert "×" in other.strip.cells[3].description
    assert other.steps.value == session.journal.head.step
    again.close()


def test_monkey(stepper, session):
    """500 seeded actions: nothing raises, and session, journal and model stay in step."""
    rng = random.Random(0)
    quick = [
        stepper.toggle,
        stepper.reset,
        stepper.suggest,
        stepper.remove,
        stepper.undo,
        stepper.go_back,
        stepper.pause,
        stepper.stop,
    ]
    slow = [stepper.measure, stepper.what_if, stepper.distill, stepper.evaluate, stepper.draw, stepper.save]
    stepper.tokens.value = 4 * 32
    for _ in range(500):
        draw = rng.random()
        if draw < 0.3:
            stepper.strip.select(rng.choice(session.teacher.layer_ids))
        elif draw < 0.4:
            stepper.figure_kind.value = rng.choice(list(FIGURES))
        elif draw < 0.5:
            stepper.steps.value = rng.choice([v for _, v in stepper.steps.options])
        elif draw < 0.95:
            rng.choice(quick).click()
        else:
            rng.choice(slow).click()
        assert session.student.layer_ids == session.journal.head.layer_ids
        assert stepper.failed is None or "traceback" not in stepper.status.value.lower()
        assert not stepper.worker.busy
    assert len(session.teacher) == 6
    stored = session.student_at(session.journal.head.step)
    assert torch.equal(logits(stored), logits(session.student))
    assert len(session.steps) > 50


# ------------------------------------------------------------------ the worker


def count(n: int, log: list):
    try:
        for i in range(n):
            yield Progress(i, n)
            time.sleep(0.005)
        return n
    finally:
        log.append("closed")


def test_worker_one_job_at_a_time_and_stop():
    worker, log, ends = Worker(), [], []
    started = threading.Event()
    assert worker.start(count(10_000, log), lambda p: started.set(), ends.append)
    started.wait(5)
    assert not worker.start(count(1, log), lambda p: None, ends.append)
    worker.stop()
    assert worker.wait(5)
    assert log == ["closed"] and [e.state for e in ends] == ["stopped"]
    assert worker.start(count(3, log), lambda p: None, ends.append)
    assert worker.wait(5)
    assert ends[-1].state == "done" and ends[-1].value == 3


def test_worker_pause_holds_and_stop_frees():
    worker, log, ends, seen = Worker(), [], [], []
    worker.start(count(10_000, log), seen.append, ends.append)
    while not seen:
        time.sleep(0.01)
    worker.pause()
    time.sleep(0.1)
    held = len(seen)
    time.sleep(0.1)
    assert len(seen) == held and worker.busy
    worker.pause(False)
    time.sleep(0.1)
    assert len(seen) > held
    worker.pause()
    worker.stop()
    assert worker.wait(5) and ends[-1].state == "stopped"


def test_worker_outlives_a_callback_that_raises(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    worker, ends = Worker(), []

    def broken(_):
        raise RuntimeError("in the view")

    worker.start(count(1, []), lambda p: None, broken)
    assert worker.wait(5)
    assert worker.start(count(1, []), lambda p: None, ends.append) and worker.wait(5)
    assert ends[0].state == "done"


def test_worker_failure_is_an_outcome_even_of_a_stop():
    worker, ends = Worker(), []

    def unclosable():
        try:
            while True:
                yield Progress(0, 1)
        finally:
            raise OSError("disk is full")

    worker.start(unclosable(), lambda p: worker.stop(), ends.append)
    worker.wait(5)
    assert ends.pop().state == "failed"

    def broken():
        yield Progress(0, 1)
        raise SessionError("no")

    worker.start(broken(), lambda p: None, ends.append)
    worker.wait(5)
    assert ends[0].state == "failed" and str(ends[0].value) == "no"


def test_distill_in_the_background_is_stopped_and_kept(session):
    stepper = Stepper(session)
    session.remove(2)
    stepper.tokens.value = 400 * 32
    seen = threading.Event()
    stepper.status.observe(lambda change: "Distill: 2/" in change["new"] and seen.set(), names="value")
    stepper._shown = 0.0
    stepper.distill.click()
    while stepper.worker.busy and not session.steps[-1].action == "distill":
        if "Distill:" in stepper.status.value and "1/" in stepper.status.value:
            break
        time.sleep(0.02)
    stepper.measure.click()
    assert "Busy" in stepper.status.value or not stepper.worker.busy
    stepper.stop.click()
    assert stepper.worker.wait(60)
    assert session.journal.head.action == "distill"
    stored = session.student_at(session.journal.head.step)
    assert torch.equal(logits(stored), logits(session.student))


def test_live_figure_takes_a_small_share_of_the_time(stepper, monkeypatch):
    from ildlab.widgets import stepper as module

    clock, drawn = [0.0], []

    def draw(records):
        clock[0] += 0.2  # what one figure takes
        drawn.append(len(records))
        return f"figure {len(records)}"

    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(module.figures, "live_losses", draw)
    stepper._live, stepper._next_figure = [], 0.0
    for step in range(200):
        clock[0] += 0.5
        stepper._partial({"kl": 1.0, "step": step})
    assert drawn[0] == 2 and len(drawn) > 10  # at once, then again and again
    assert 0.2 * len(drawn) <= 0.04 * clock[0]
