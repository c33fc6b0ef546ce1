"""The stepper without a browser: every control, every state, and a monkey that presses everything."""

from __future__ import annotations

import base64
import html
import io
import json
import random
import re
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from ildlab.errors import DistillError, JournalError, SessionError
from ildlab.importance.scores import LayerScores
from ildlab.plots import canvas
from ildlab.progress import Progress
from ildlab.session.loop import next_phase
from ildlab.session.session import PruningSession
from ildlab.widgets import figures
from ildlab.widgets.controls import PANES
from ildlab.widgets.figures import FIGURES, OF_KINDS
from ildlab.widgets.stack_view import HERE
from ildlab.widgets.stepper import Stepper, step_through
from ildlab.widgets.worker import Worker

pytestmark = pytest.mark.usefixtures("short_speed")
SIZES = {"block": 32, "calibration_tokens": 4 * 32, "train_tokens": 16 * 32, "eval_tokens": 4 * 32}


@pytest.fixture
def create(tmp_path, tiny_folder, text_file):
    """Make runs: `create(name, **settings)`; they are closed at the end."""
    made = []

    def make(name="run", **settings):
        settings = {"metric": "block_influence", "text": str(text_file), "dtype": "float32", **SIZES, **settings}
        made.append(PruningSession.create(tmp_path / name, str(tiny_folder), **settings))
        return made[-1]

    yield make
    for session in made:
        session.close()


@pytest.fixture
def session(create):
    return create()


@pytest.fixture
def stepper(session):
    made = Stepper(session, inline=True)
    made.prompt.value = made.text.value = "def f(x):"
    return made


def logits(stack):
    with torch.no_grad():
        return stack.model(torch.tensor([[5, 9, 40, 7]]), use_cache=False).logits


def look(stepper, layer_id: int) -> str:
    """State of a column of the picture."""
    return re.search(rf'class="col ([\w ]+)" data-id="{layer_id}"', stepper.stack.picture)[1]


def said(stepper, layer_id: int) -> str:
    """What a column tells who points at it."""
    return html.unescape(re.search(rf'data-id="{layer_id}"[^>]*><title>(.*?)</title>', stepper.stack.picture)[1])


# ------------------------------------------------------------------ the loop


def test_one_button_is_the_next_phase_of_the_loop(stepper, session):
    seen = []
    for _ in range(6):
        seen.append((next_phase(session.path), stepper.proceed.description.partition(" · ")[0]))
        assert PANES[stepper.panes.selected_index] == {"evaluate removal": "Evaluate"}.get(
            seen[-1][0], seen[-1][0].capitalize()
        )
        stepper.proceed.click()
        assert stepper.failed is None
    (gone,) = session.removed
    assert seen == [
        ("measure", "▶ Measure importance"),
        ("remove", f"▶ Remove layer {gone}"),
        ("evaluate removal", "▶ Evaluate the removal"),
        ("distill", "▶ Distill"),
        ("evaluate", "▶ Evaluate"),
        ("measure", "▶ Measure importance"),
    ]
    assert stepper.proceed.description.startswith("▶ Remove layer") and "suggested" in stepper.stack.picture


def test_the_whole_flow(stepper, session, tmp_path):
    stepper.measure.click()
    assert "least important" in stepper.stack.status
    (chosen,) = stepper.stack.selected
    assert chosen == session.scores.least_important and look(stepper, chosen) == "suggested"
    assert stepper.remove.description == f"Remove layer {chosen}"
    stepper.remove.click()
    assert session.removed == [chosen] and look(stepper, chosen) == "removed"
    assert said(stepper, chosen) == f"layer {chosen} (removed)"
    stepper.distill.click()
    assert session.journal.head.action == "distill" and stepper.failed is None
    assert stepper.stack.picture.count('class="foot"') == len(session.trained) + 1  # and the key
    stepper.evaluate.click()
    assert "perplexity" in stepper.results.value
    stepper.branch_to.value, stepper.export_to.value = str(tmp_path / "branch"), str(tmp_path / "out")
    stepper.branch.click()
    assert (tmp_path / "branch" / "journal.jsonl").is_file()
    stepper.export_to.value = str(tmp_path / "out")
    stepper.export.click()
    assert "generation is the same" in stepper.stack.status and (tmp_path / "out" / "model.safetensors").is_file()
    stepper.undo.click()
    assert [s.action for s in session.path][-1] == "remove"
    stepper.steps.value = 0
    stepper.go_back.click()
    assert session.removed == []


def test_from_run_all_to_a_checkpoint_in_two_clicks(stepper, session):
    stepper.goal.value = 4
    stepper.run.click()
    assert stepper.failed is None and len(session.student) == 4 and "Run to 4 layers" in stepper.stack.status
    stepper.export.click()  # its folder is named already
    assert (session.folder / "checkpoint-4-layers" / "model.safetensors").is_file()
    for layer_id in session.removed:  # the run's past: a row each, aligned, what it removed marked
        assert f">−{layer_id}<" in stepper.stack.picture
    assert stepper.stack.picture.count('data-step="') == 2


def test_vital_layers_are_not_a_click_away(stepper, session):
    assert stepper.stack.selected == [] and stepper.remove.disabled and "select a layer" in stepper.remove.description
    stepper.remove.click()
    assert session.removed == [] and "No layer is selected" in stepper.stack.status
    stepper.stack.selected = [1, 4]
    assert stepper.remove.description == "Remove layers 1, 4"
    stepper.remove.click()
    assert session.removed == [1, 4] and stepper.stack.selected == []
    stepper.stack.selected = [0, 1]
    stepper.remove.click()  # one of them is gone: none goes
    assert session.removed == [1, 4] and "Layer 1 is not in the student" in stepper.stack.status


def test_the_suggestion_is_selected_until_a_person_chooses(stepper, session):
    stepper.measure.click()
    least = session.scores.least_important
    assert stepper.stack.selected == [least] and f"Layer {least}: block_influence" in stepper.about.value
    stepper.stack.selected = [0]
    stepper.refresh()
    assert stepper.stack.selected == [0]  # a person's choice stays
    stepper.measure.click()
    assert stepper.stack.selected == [least]
    assert Stepper(session, inline=True).stack.selected == [least]  # a run that was measured before


def test_forecasts_come_from_what_it_cost_before(stepper, session):
    assert "about" not in stepper.proceed.description and "not timed in this run yet" in stepper.forecast.value
    for _ in range(5):
        stepper.proceed.click()
    for step in session.steps:
        object.__setattr__(step, "seconds", {"measure": 60.0, "distill": 600.0}.get(step.action, 0.0))
    stepper.refresh()
    assert stepper.proceed.description == "▶ Measure importance · about 50 s"  # five layers are left of six
    assert "about 11 min" in stepper.run.description and "about 50 s" in stepper.forecast.value
    stepper.goal.value = 3
    assert "Run to 3 layers · about 22 min" == stepper.run.description


def test_the_header_changes_as_one_works(stepper, session):
    assert "<b>6</b> of 6 layers" in stepper.header.value and "after an evaluation" in stepper.header.value
    stepper.evaluate.click()
    stepper.stack.selected = [2]
    stepper.remove.click()
    assert "<b>5</b> of 6 layers" in stepper.header.value and "quality as of step 1" in stepper.header.value
    assert re.search(r"parameters \(-\d+\.\d%, \d+ MB saved\)", stepper.header.value)
    stepper.evaluate.click()
    found = session.evaluation
    assert f"perplexity <b>{found.perplexity:.2f}</b> (teacher {found.teacher_perplexity:.2f}" in stepper.header.value
    assert re.search(r"; [+-][\d.]+\)", stepper.header.value) and "as of step" not in stepper.header.value


def test_the_aggregate_kept_has_its_interval(create):
    stepper = Stepper(create(suite="mini7@1"), inline=True)
    assert stepper.suite.value == "mini7@1"
    stepper.evaluate.click()
    assert re.search(r"aggregate kept <b>100\.0%</b> \[", stepper.header.value)
    assert stepper.figure_kind.value == "tasks"
    assert "Scores by task; aggregates: teacher" in stepper.figure.html
    stepper.suite.value = " "  # an empty box is no suite, and not the run's
    stepper.evaluate.click()
    assert stepper.session.journal.head.args["suite"] is None and stepper.session.evaluation.suite is None


# ------------------------------------------------------------------ the what-if


def test_what_if_changes_words_and_nothing_else(stepper, session):
    before = logits(session.student)
    stepper.what_if.click()
    whole = stepper.answers.value
    assert "<mark" not in whole  # the student is the teacher
    stepper.stack.selected = [2]
    stepper.toggle.click()
    assert "layer 2 off" in stepper.answers.value and "<mark" in stepper.answers.value
    assert look(stepper, 2) == "off" and "switched off" in said(stepper, 2)
    assert torch.equal(logits(session.student), before) and len(session.steps) == 1
    stepper.stack.selected = [2, 3]
    stepper.toggle.click()
    assert "layers 2, 3 off" in stepper.answers.value
    stepper.toggle.click()
    assert "off" not in (look(stepper, 2), look(stepper, 3))
    stepper.prompt.value = "import"
    stepper.what_if.click()
    assert stepper.answers.value.index("“import”") < stepper.answers.value.index("“def f(x):”")  # both are kept
    stepper.sampled.value = True
    stepper.what_if.click()
    first = stepper.answers.value
    assert "one sample" in first
    stepper.what_if.click()
    assert stepper.answers.value == first  # the same luck
    stepper.reset.click()
    assert stepper.answers.value == "" and "off" not in look(stepper, 2)


def test_what_if_tells_the_kl_of_each_word(session):
    from ildlab.progress import drive
    from ildlab.session.whatif import what_if_steps

    for sample in (None, 3):
        found = drive(what_if_steps(session, "def f", [2], tokens=5, sample=sample), show=False)
        assert len(found.tokens) == len(found.kls) and len(found.teacher_tokens) == 5
        ids = session.tokenizer("def f" + found.student, return_tensors="pt").input_ids
        start = session.tokenizer("def f", return_tensors="pt").input_ids.shape[1]
        if ids.shape[1] != start + 5:  # bytes that do not come back the same
            continue
        p = session.teacher.model(ids).logits.log_softmax(-1)
        with session.student.without(2):
            q = session.student.model(ids).logits.log_softmax(-1)
        want = (p.exp() * (p - q)).sum(-1)[0, start - 1 : -1]
        assert found.kls == pytest.approx(want.tolist(), abs=1e-4)


def test_of_fast_clicks_the_last_state_wins(session):
    stepper = Stepper(session)
    stepper.prompt.value = "def f(x):"
    for selected in ([1], [2], [3], [1]):
        stepper.stack.selected = selected
        stepper.toggle.click()  # while the answer to the one before is worked on
    until(lambda: not stepper.worker.busy and "Without 2, 3:" in stepper.stack.status)
    assert "layers 2, 3 off" in stepper.answers.value and look(stepper, 1) == "kept"


def until(holds, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


# ------------------------------------------------------------------ errors, and what is said


def test_errors_are_words_and_lose_nothing(stepper, session):
    session.remove(1)
    stepper.rate.value = 1e-2
    stepper.tokens.value = -3
    stepper.distill.click()
    assert stepper.failed is not None and "nothing is lost" in stepper.stack.status
    assert session.removed == [1] and session.journal.head.action == "remove"
    stepper.prompt.value = ""
    stepper.what_if.click()
    assert "prompt is empty" in stepper.stack.status


def test_html_in_names_and_prompts_is_text(stepper):
    stepper.prompt.value = "<script>alert(1)</script>"
    stepper.what_if.click()
    assert "<script>" not in stepper.answers.value and "&lt;script&gt;" in stepper.answers.value
    script = (HERE / "stack_view.js").read_text()
    assert "said.textContent" in script and script.count("innerHTML") == 1  # of the picture, that Python has escaped


def test_direct_actions_hold_the_worker(session, monkeypatch):
    stepper = Stepper(session)
    seen = []
    real = session.remove

    def remove(layer_id):
        seen.append(stepper.worker.start(count(1, []), lambda p: None, lambda o: None))
        return real(layer_id)

    monkeypatch.setattr(session, "remove", remove)
    stepper.stack.selected = [2]
    stepper.remove.click()
    assert seen == [False] and session.removed == [2]  # no job could start beside it
    assert not stepper.worker.busy
    stepper._working = True
    with stepper.worker.hold() as held:
        assert held
        stepper.undo.click()
        assert "Busy" in stepper.stack.status and session.removed == [2]


def test_a_click_while_the_end_of_a_job_is_shown_is_not_lost(session, monkeypatch):
    stepper = Stepper(session)
    real, clicked = stepper.refresh, []

    def slow(words):
        clicked.append(words)
        time.sleep(0.3)
        real(words)

    monkeypatch.setattr(stepper, "refresh", slow)
    stepper.measure.click()
    until(lambda: clicked)
    stepper.undo.click()  # refused for its own reason
    assert "nothing to undo" in stepper.stack.status


def test_what_fails_outside_of_ildlab_is_words_too(stepper, session, monkeypatch):
    from ildlab import plots

    def broken(*_, **__):
        raise ValueError("no <room>")

    monkeypatch.setattr(plots, "task_bars", broken)
    stepper.evaluate.click()
    assert "Evaluate: done" in stepper.stack.status  # the step itself is done, and said so
    assert "could not be drawn: no &lt;room&gt;" in stepper.figure.html
    monkeypatch.undo()
    stepper.figure_kind.value = "losses"
    stepper.figure_kind.value = "tasks"
    monkeypatch.setattr(plots, "save", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    stepper.save.click()
    assert "Not done: disk is full" in stepper.stack.status and isinstance(stepper.failed, OSError)


def test_an_error_without_words_is_named(stepper, session, monkeypatch):
    def broken(*_, **__):
        yield Progress(0, 1)
        raise AssertionError

    monkeypatch.setattr(session, "measure_steps", broken)
    stepper.measure.click()
    assert "Measure failed, and nothing is lost: AssertionError" in stepper.stack.status


def test_undo_and_going_back_say_what_they_take(stepper, session):
    for layer_id in (1, 2):
        stepper.stack.selected = [layer_id]
        stepper.remove.click()
    stepper.evaluate.click()
    assert stepper.undo.description == "Undo: remove layer 2 (step 2)"
    stepper.undo.click()
    assert "Back at step 1" in stepper.stack.status
    assert "taken back: remove layer 2 (step 2), evaluate: perplexity" in stepper.stack.status
    lines = len(session.steps)
    stepper.go_back.click()  # to where it stands
    assert "Nothing to do: today's student is that of step 1" in stepper.stack.status
    assert session.undo(to=1).step == 1 and len(session.steps) == lines  # in Python too
    stepper.steps.value = 3
    stepper.go_back.click()
    assert "At step 3, which was undone before" in stepper.stack.status and session.removed == [1, 2]


def test_earlier_scores_say_so(stepper, session):
    stepper.measure.click()
    least = session.scores.least_important
    stepper.remove.click()
    picture = stepper.stack.picture
    assert f"from step 1, before layer {least} was removed: measure again" in picture and 'class="stale"' in picture
    assert not re.search('class="col (suggested|tied)', picture)
    stepper.stack.selected = [i for i in session.student.layer_ids][:1]
    assert "The student changed since: measure again" in stepper.about.value


def test_while_it_measures_stack_and_words_are_of_what_is_measured(stepper, session):
    stepper.measure.click()
    stepper._next_picture = 0.0
    stepper._partial(mixed("prose", "copies"))
    assert (
        "Measuring kl, 4 sequences so far" in stepper.stack.picture and "block_influence" not in stepper.stack.picture
    )


def test_a_layer_that_a_race_dropped_is_faded_with_its_n_and_never_tied(stepper, session):
    x = np.array([[9.0, 1.0, 2.0, 0.10, 0.11, 1.0], [8.0, 1.1, 2.1, 0.12, 0.11, 1.2], [np.nan, 1, 2, 0.11, 0.12, 1]])
    journal(session, LayerScores.from_samples("kl", "t", range(6), x, np.ones(3), details={"dropped": {"0": 2}}))
    stepper.refresh()
    assert look(stepper, 0) == "dropped" and "n=2" in said(stepper, 0) and look(stepper, 4) == "tied"


def test_time_left_does_not_count_what_a_checkpoint_had_done(stepper, monkeypatch):
    from ildlab.widgets import stepper as module

    clock = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    stepper._begin, stepper._shown = (0.0, 0), 0.0
    for done in (14, 15, 16):  # resumed at 14 of 32, ten seconds a step
        stepper._progress("Distill", Progress(done, 32))
        clock[0] += 10
    assert stepper.stack.left == pytest.approx(160) and stepper.stack.done == 0.5


def test_an_interrupted_distillation_is_gone_on_with_or_discarded(create):
    session = create(distill={"checkpoint_every": 1, "batch_size": 2})
    session.remove(2)
    work = session.distill_steps(learning_rate=1e-3, tokens=8 * 64, local_tokens=0)
    for _ in range(3):
        next(work)
    left = session.folder.with_name("left")
    shutil.copytree(session.folder, left)  # as a killed kernel leaves it
    work.close()
    again = PruningSession.open(left, dtype="float32")
    stepper = Stepper(again, inline=True)
    assert stepper.discard.layout.display is None and "learning_rate 0.001" in stepper.discard.tooltip
    assert stepper.proceed.description.startswith("▶ Evaluate the removal")
    again.evaluate(False, speed=False)
    stepper.refresh()
    assert stepper.proceed.description.startswith("▶ Go on distilling (3 of 8)")
    file = again.standing().checkpoint
    whole = file.read_bytes()
    file.write_bytes(whole[:100])  # half a file: told, and all there is to do is to discard it
    stepper.refresh()
    assert stepper.proceed.description.startswith("▶ Distill") and "cannot be read" in stepper.discard.tooltip
    stepper.distill.click()
    assert isinstance(stepper.failed, DistillError) and "Delete it to start anew" in str(stepper.failed)
    file.write_bytes(whole)
    stepper.discard.click()
    assert again.standing() is None and stepper.discard.layout.display == "none"
    again.close()


def test_a_distillation_ends_with_its_figure_and_its_kl(stepper, session):
    session.remove(2)
    stepper.distill.click()
    assert re.search(r"Distill: done in \d+ s, KL [\d.]+ to [\d.]+ nats/token", stepper.stack.status)
    assert stepper.figure_kind.value == "losses" and "Losses of every distillation" in stepper.figure.html


def test_what_a_stop_kept_is_said(session):
    stepper = Stepper(session)
    session.remove(2)
    stepper.tokens.value = 4000 * 32
    stepper.distill.click()
    until(lambda: re.search(r"Distill: [1-9]", stepper.stack.status))
    stepper.measure.click()
    assert "Busy" in stepper.stack.status
    assert stepper.stop.layout.display is None  # hidden where nothing runs
    stepper.stop.click()
    until(lambda: "stopped" in stepper.stack.status)
    assert stepper.worker.wait(60)
    assert "Distill stopped; kept: step 2, distill, stopped at" in stepper.stack.status
    assert session.journal.head.action == "distill" and stepper.stop.layout.display == "none"
    stored = session.student_at(session.journal.head.step)
    assert torch.equal(logits(stored), logits(session.student))


def test_a_run_that_is_open_elsewhere_is_looked_at(create, tiny_folder, text_file):
    session = create()
    session.remove(2)
    code = (
        "from ildlab.session.session import PruningSession; import sys\n"
        f"session = PruningSession.open({str(session.folder)!r}, dtype='float32'); print('open', flush=True); sys.stdin.read()"
    )
    session.close()
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "open\n"
        stepper = step_through(session.folder, str(tiny_folder), dtype="float32", text=str(text_file), inline=True)
        assert "Read only" in stepper.header.value and look(stepper, 2) == "removed"
        stepper.stack.selected = [3]
        stepper.remove.click()
        assert "Not done" in stepper.stack.status and "open to read only" in stepper.stack.status
        assert stepper.session.removed == [2]
        stepper.toggle.click()  # what writes nothing can be done
        assert "layer 3 off" in stepper.answers.value
    finally:
        other.communicate("")
    again = step_through(session.folder, str(tiny_folder), dtype="float32", text=str(text_file))
    assert "Read only" not in again.header.value
    again.session.close()


def test_a_checkpoint_folder_is_no_run(tiny_folder):
    for begin in (PruningSession.open, lambda folder: PruningSession.create(folder, str(tiny_folder))):
        with pytest.raises(JournalError, match="such as a model's checkpoint has: choose another folder"):
            begin(tiny_folder)


def test_history_is_in_words(stepper, session):
    assert "Nothing was removed yet: each removal adds a line here" in stepper.history.value
    session.measure()
    session.remove()
    session.evaluate(speed=False)
    stepper.refresh()
    page = stepper.history.value
    first = page.partition("<tbody>")[2].partition("</tr>")[0]
    assert (
        "none: the teacher" in first and f"{session.evaluation.teacher_perplexity:.4g}" in first and "0 s" not in first
    )
    for raw in ("n_removed", "layer_id", "perplexity_pruned", "e+0"):
        assert raw not in page, raw
    assert "layers removed" in page and re.search(r"[\d.]+ M<", page) and re.search(r"\d s<", page)


def test_a_click_on_an_iteration_shows_its_student_and_two_steps_compare(stepper, session):
    stepper.measure.click()
    stepper.remove.click()
    stepper.evaluate.click()
    gone, at = session.removed[0], session.journal.head.step
    stepper.undo.click()
    assert look(stepper, gone) != "removed" and f'class="row undone" data-step="{at}"' in stepper.stack.picture
    stepper._asked({"step": at})
    assert look(stepper, gone) == "removed" and f"As it was at step {at}" in stepper.stack.picture
    assert (
        stepper.go_back.description == f"Go to step {at}"
        and PANES[stepper.panes.selected_index] == "History and export"
    )
    stepper.beside.value = 0
    assert "6 layers" in stepper.compared.value and "5 layers" in stepper.compared.value
    assert f"removed: {gone}" in stepper.compared.value and "perplexity" in stepper.compared.value
    stepper.go_back.click()
    assert session.removed == [gone]


def test_keys_are_buttons(stepper, session):
    for key in ("measure", "remove", "distill", "evaluate", "undo", "no_such_thing"):
        stepper._asked({"action": key})
    assert [s.action for s in session.steps] == ["create", "measure", "remove", "distill", "evaluate", "undo"]
    script = (HERE / "stack_view.js").read_text()
    for key in "mrdeunx":
        assert re.search(rf"^  {key}: \[", script, re.M), key


# ------------------------------------------------------------------ figures


def assert_same_picture(one, other, kind):
    """The same words around two PNGs of one size, and the same pixels but for the edges of a line or two."""
    inside = re.compile("base64,([A-Za-z0-9+/=]+)")
    assert inside.sub("", one) == inside.sub("", other), kind
    for a, b in zip(inside.findall(one), inside.findall(other), strict=True):
        a, b = (np.asarray(Image.open(io.BytesIO(base64.b64decode(x))).convert("RGBA"), float) for x in (a, b))
        assert a.shape == b.shape and np.abs(a - b).mean() < 1, kind  # of 255


def test_every_figure_and_its_code(stepper, session, tmp_path):
    """Each snippet, run as it stands in a namespace of its own, draws the very figure that is shown."""
    for kind in FIGURES:  # with nothing to show yet
        stepper.figure_kind.value = kind
        assert ("Here will be" in stepper.figure.html and "press" in stepper.figure.html) or FIGURES[kind].heavy
        stepper.draw.click()
        stepper._kept = (None, None, None)
    for button in (stepper.evaluate, stepper.measure, stepper.remove, stepper.distill, stepper.evaluate):
        button.click()
    stepper.text.value = "import os: print('it', \"is\")\nexit()"
    shown = {}
    for number, kind in enumerate(FIGURES, 1):
        stepper.figure_kind.value = kind
        stepper.draw.click()
        assert 'alt="' in stepper.figure.html, f"{kind}: {stepper.stack.status}"
        for form in ("PNG", "SVG", "CSV"):
            stepper.save_as.value = form
            stepper.save.click()
        assert len(list((session.folder / "figures").iterdir())) == 3 * number, kind
        code = html.unescape(re.search("<pre>(.*)</pre>", stepper.code.value, re.DOTALL)[1])
        shown[kind] = code, stepper.figure.html
        if cells := stepper.figure.cells:
            left, top, right, bottom = cells["box"]
            assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
            assert json.dumps(cells) and len({len(row) for row in cells["tips"]}) == 1
    tokens = (session.folder / "figures" / "token_x_layer_drift.csv").read_text().partition("\n")[0]
    assert "i,m,p,or,t" in tokens and "0,1,2" not in tokens  # its columns are the tokens
    session.close()
    for kind, (code, figure) in shown.items():
        *lines, last = code.splitlines()
        namespace = {}
        exec("\n".join(lines), namespace)
        assert_same_picture(eval(last, namespace)._repr_html_(), figure, kind)
        namespace["session"].close()


def test_long_text_is_capped_in_words_and_can_be_stopped(stepper, session):
    stepper.text.value = "word " * 2000
    for kind in ("logit lens", "token × layer drift"):
        stepper.figure_kind.value = kind
        stepper.draw.click()
        assert re.search(rf"The first {FIGURES[kind].most} of [\d,]+ tokens are shown", stepper.figure.html)
        assert len(stepper.figure.cells["tips"][0]) <= FIGURES[kind].most + 1
    for kind, figure in FIGURES.items():
        if figure.heavy:
            work = figures.draw_steps(kind, session, "def f(x)")
            assert isinstance(next(work), Progress), kind  # a place to stop at
            work.close()


def test_what_lies_under_the_pointer(stepper, session):
    session.remove(2)
    stepper.refresh()
    stepper.figure_kind.value = "logit lens"
    stepper.draw.click()
    tips = stepper.figure.cells["tips"]
    assert len(tips) == 6 and "layer out" in tips[0][0] and tips[0][0].count("\n") == 6  # the last layer is on top
    stepper.figure_kind.value = "redundancy"
    stepper.draw.click()
    tips = stepper.figure.cells["tips"]
    assert tips[0][0].startswith("layers out and 0\ncosine") and tips[-1][0] == "layers 0 and 0\ncosine 1.0000"


def test_quality_and_branches_are_there_after_two_removals_and_an_evaluation(stepper, session):
    for layer_id in (1, 3):
        session.remove(layer_id)
    session.evaluate(False, speed=False)
    stepper.refresh()
    for kind in ("quality against layers", "branches", "tasks"):
        stepper.figure_kind.value = kind
        assert 'alt="' in stepper.figure.html, kind


def test_branches_are_compared_on_one_figure(stepper, session):
    for layer_id in (1, 3):
        session.evaluate(speed=False)
        session.remove(layer_id)
        session.evaluate(speed=False)
        session.undo(to=0)
    stepper.figure_kind.value = "branches"
    assert stepper._drawn.data.index.get_level_values("branch").nunique() == 2


def test_an_evaluation_stands_beside_the_one_before(stepper, session):
    assert "press Evaluate" in stepper.results.value
    stepper.evaluate.click()
    assert "before it" not in stepper.results.value
    session.remove(2)
    stepper.evaluate.click()
    assert "the evaluation before it" in stepper.results.value and stepper.results.value.count("<table") == 2


def mixed(first: str, second: str) -> LayerScores:
    """Scores of six layers on two kinds of text: layer 2 is the least important, but 3 on the second kind alone."""
    x = [[8.0, 8.0, 1.0, 8.0, 8.0, 8.0]] * 2 + [[0.04, 0.04, 0.04, 0.02, 0.04, 0.04]] * 2
    return LayerScores.from_samples("kl", "a mix", range(6), x, np.ones(4), kinds=[first] * 2 + [second] * 2)


def journal(session, scores):
    session.append("measure", args={"metric": "kl"}, result={"scores": scores.to_dict()}, seed=0)


def test_one_kind_of_text_is_shown_and_all_of_them_suggest(stepper, session):
    view = stepper.kind_of_text
    stepper.measure.click()
    assert view.layout.display == "none" and stepper.figure_kind.options == tuple(FIGURES)
    journal(session, mixed("prose", "copies"))
    stepper.refresh()
    assert view.layout.display is None and view.options == ("all kinds", "prose", "copies")
    picture = stepper.stack.picture
    view.value = "copies"
    assert "on copies alone (all kinds suggest)" in stepper.stack.picture != picture
    assert "kl 0.02 [" in said(stepper, 3) and look(stepper, 2) == "suggested"
    stepper.stack.selected = [3]
    assert "On copies alone: kl 0.02 [" in stepper.about.value
    stepper.suggest.click()
    assert stepper.stack.selected == [2] and view.value == "copies"
    stepper._next_picture = 0.0
    stepper._partial(mixed("prose", "copies"))  # while it is measured
    assert "kl 0.02 [" in said(stepper, 3) and look(stepper, 2) == "suggested"
    stepper._next_picture = 0.0
    stepper._partial(mixed("prose", "lists"))  # no copies yet
    assert "kl 0.02 [" not in said(stepper, 3)
    view.value = "all kinds"
    assert stepper.stack.picture == picture and "alone" not in stepper.about.value


def test_kinds_that_are_gone_are_not_offered(stepper, session):
    (name,) = OF_KINDS
    journal(session, mixed("prose", "copies"))
    stepper.refresh()
    stepper.figure_kind.value, stepper.kind_of_text.value = name, "copies"
    assert "by kind of text" in stepper.figure.html and list(stepper._drawn.data) == ["prose", "copies"]
    journal(session, mixed("lists", "copies"))
    stepper.refresh()
    assert stepper.kind_of_text.value == "copies" and stepper.figure_kind.value == name
    assert list(stepper._drawn.data) == ["lists", "copies"]
    stepper.measure.click()  # on plain text
    assert stepper.kind_of_text.value == "all kinds" and stepper.kind_of_text.layout.display == "none"
    assert stepper.figure_kind.options == tuple(FIGURES) and stepper.failed is None


# ------------------------------------------------------------------ options


def test_text_and_loss_of_a_distillation_are_chosen_there(stepper, session, tmp_path, text_file):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[100_000:200_000])
    session.remove(2)
    stepper.source.value, stepper.loss.label, stepper.scope.label = str(other), "KL alone", "neighbours"
    stepper.distill.click()
    step = session.journal.head
    assert step.result["text"]["source"] == str(other)
    assert step.args["config"]["hidden_weight"] == 0.0 and step.args["trained"] == [1, 3]


def test_the_papers_settings_are_a_click_away(stepper, session):
    session.remove(2)
    stepper.preset.index = 1
    stepper.distill.click()
    config = session.journal.head.args["config"]
    assert (config["reduction"], config["scope"], config["hidden_loss"]) == ("paper", "neighbours", "mse")


def test_controls_start_at_the_settings_of_the_run(create):
    distill = {"tokens": 128, "learning_rate": 1e-3}
    for race, measure in ((False, {}), (True, {"race": True})):
        session = create(str(race), metric="kl", measure=measure, distill=distill)
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


def test_the_box_of_the_text_shows_what_is_distilled_on(create, tmp_path, text_file):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text())
    session = create("own", train_text=str(other))
    stepper = Stepper(session, inline=True)
    assert stepper.source.value == str(other)
    stepper.measure.click()
    stepper.remove.click()
    stepper.source.value = str(text_file)  # the run's other text, chosen on purpose
    stepper.distill.click()
    assert session.journal.head.result["text"]["source"] == str(text_file)


# ------------------------------------------------------------------ the page


def test_what_goes_on_is_announced_and_pictures_have_words(stepper):
    stepper.measure.click()
    script = (HERE / "stack_view.js").read_text()
    assert 'role: "status", "aria-live": "polite"' in script  # one element that stays, whatever it says
    page = stepper._repr_html_()
    assert 'role="list"' in page and "<title>layer 0" in page and "ildlab-header" in page
    assert stepper.stack.picture in page.replace(stepper.session._repr_html_(), stepper.stack.picture)
    assert canvas.contrast("#ffffff", "#222222") >= 4.5  # of what is told to who points


def test_what_is_hidden_hides_nothing_else(stepper):
    assert stepper.kind_of_text.layout.display == stepper.discard.layout.display == "none"
    for control in (stepper.metric, stepper.figure_kind, stepper.prompt, stepper.suite, stepper.source):
        assert control.layout.display is None


def test_reopened_at_the_same_step(stepper, session):
    session.remove(3)
    session.close()
    again = PruningSession.open(session.folder, dtype="float32")
    other = Stepper(again, inline=True)
    assert look(other, 3) == "removed" and other.steps.value == session.journal.head.step
    again.close()


def test_monkey(stepper, session):
    """500 seeded actions: nothing raises, and session, journal and model stay in step."""
    rng = random.Random(0)
    quick = "toggle reset suggest remove undo go_back pause stop discard".split()
    slow = "proceed measure what_if distill evaluate draw save".split()
    stepper.tokens.value = 4 * 32
    for _ in range(500):
        draw = rng.random()
        if draw < 0.3:
            stepper.stack.selected = rng.sample(session.teacher.layer_ids, rng.choice((0, 1, 1, 1, 2)))
        elif draw < 0.4:
            stepper.figure_kind.value = rng.choice(list(FIGURES))
        elif draw < 0.5:
            stepper.steps.value = rng.choice([v for _, v in stepper.steps.options])
        elif draw < 0.95:
            getattr(stepper, rng.choice(quick)).click()
        else:
            getattr(stepper, rng.choice(slow)).click()
        assert session.student.layer_ids == session.journal.head.layer_ids
        assert stepper.failed is None or "traceback" not in stepper.stack.status.lower()
        assert not stepper.worker.busy
        assert stepper.stack.picture.count('<g class="col ') == 6
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


def test_a_pause_while_a_phase_is_drawn_is_not_talked_over(session):
    stepper = Stepper(session)
    draw = stepper.refresh

    def paused_meanwhile(said="Ready."):
        if said.startswith("Run: ") and stepper.worker.busy and not stepper.worker.paused:
            stepper.pause.click()
        draw(said)

    stepper.refresh = paused_meanwhile
    stepper.goal.value = 6
    stepper.run.click()
    end = time.monotonic() + 60
    while "(paused)" not in stepper.stack.status and time.monotonic() < end:
        time.sleep(0.01)
    held = stepper.stack.status
    stepper.refresh = draw
    stepper.stop.click()
    assert stepper.worker.wait(60)
    assert re.match(r"Run: \d+/\d+ \(paused\)", held)


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


def test_live_pictures_take_a_small_share_of_the_time(stepper, monkeypatch):
    from ildlab.widgets import stepper as module

    clock, drawn = [0.0], []

    def draw(records):
        clock[0] += 0.2  # what one figure takes
        drawn.append(len(records))
        return f"figure {len(records)}"

    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(module.figures, "live_losses", draw)
    stepper._live, stepper._next_picture = [], 0.0
    for step in range(200):
        clock[0] += 0.5
        stepper._partial({"kl": 1.0, "step": step})
    assert drawn[0] == 2 and len(drawn) > 10  # at once, then again and again
    assert 0.2 * len(drawn) <= 0.04 * clock[0]
