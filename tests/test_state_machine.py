"""Any order of actions leaves journal, model and tables of one mind: a state machine draws the orders."""

from __future__ import annotations

import json
from itertools import count

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from ildlab.errors import IldlabError
from ildlab.model.fingerprints import fingerprint
from ildlab.session.journal import CHANGES_STUDENT
from ildlab.session.session import PruningSession
from ildlab.session.steps import unsealed

QUICK = {"canaries": False, "speed": False, "undistilled": False}
any_number = st.integers(0, 1000)


class Orders(RuleBasedStateMachine):
    """A session, and what was seen of its student after each step; a test sets `folder`, `loaded` and `given`."""

    numbers = count()

    def __init__(self):
        super().__init__()
        self.run = PruningSession.create(self.folder / f"run{next(self.numbers)}", self.loaded, **self.given)
        self.teacher, self.seen = fingerprint(self.run.teacher), []
        self.look()

    def look(self) -> None:
        """Remember the student after each new step."""
        while len(self.seen) < len(self.run.steps):
            self.seen.append((self.run.student.layer_ids, fingerprint(self.run.student)))

    def step_of(self, number: int) -> int:
        """One of the steps that are no undo."""
        found = [step.step for step in self.run.steps if step.action != "undo"]
        return found[number % len(found)]

    def layer_of(self, number: int) -> int:
        return self.run.student.layer_ids[number % len(self.run.student)]

    # ---- what can be done

    @rule(metric=st.sampled_from(["kl", "block_influence", "nll"]))
    def measure(self, metric):
        self.run.measure(metric)

    @precondition(lambda self: len(self.run.student) > 2)
    @rule(number=any_number)
    def remove(self, number):
        layer_id = None if number % 2 and self.run.scores is not None else self.layer_of(number)
        self.run.remove(layer_id)

    @precondition(lambda self: self.run.removed)
    @rule(scope=st.sampled_from(["window(1)", "suffix", "all"]), ends=st.sampled_from(["whole", "closed", "Ctrl-C"]))
    def distill(self, scope, ends):
        work = self.run.distill_steps(scope=scope, tokens=32, local_tokens=32, batch_size=1)
        steps = len(self.run.steps)
        if ends == "whole":
            for _ in work:
                pass
            return
        next(work)
        if ends == "closed":
            work.close()
            assert self.run.steps[-1].result["stopped_at"] >= 1
            return
        with pytest.raises(KeyboardInterrupt):
            work.throw(KeyboardInterrupt)
        assert len(self.run.steps) == steps

    @rule()
    def evaluate(self):
        found = self.run.evaluate(**QUICK)
        assert (found.kl == 0) == (len(self.run.student) == 6 and not self.run.trained)

    @rule(number=any_number)
    def undo(self, number):
        if number % 2 and any(step.action in CHANGES_STUDENT for step in self.run.path):
            self.run.undo()
        else:
            to = self.step_of(number)
            self.run.undo(to=to)
            assert self.run.journal.head.step == to
        head = self.run.journal.head.step
        assert (self.run.student.layer_ids, fingerprint(self.run.student)) == self.seen[head]

    @rule(number=any_number)
    def branch(self, number):
        step = self.step_of(number)
        with self.run.branch(self.folder / f"branch{next(self.numbers)}", step) as other:
            assert (other.student.layer_ids, fingerprint(other.student)) == self.seen[step]
            path = self.run.journal.path_to(step)
            assert [s.action for s in other.steps] == [s.action for s in path]
            assert other.history().drop(columns="seconds").equals(self.run.history(step).drop(columns="seconds"))

    @rule()
    def open_again(self):
        self.run.close()
        self.run = PruningSession.open(self.run.folder, self.loaded)

    @precondition(lambda self: self.run.removed and self.run.steps[-1].action != "export")
    @rule()
    def export(self):
        path = self.run.export(self.folder / f"out{next(self.numbers)}")
        assert json.loads((path / "config.json").read_text())["num_hidden_layers"] == len(self.run.student)

    @rule(number=st.sampled_from([6, 99, -1]))
    def ask_for_what_cannot_be(self, number):
        for call in (self.run.remove, self.run.undo, self.run.student_at, lambda n: self.run.distill(gap=[n])):
            with pytest.raises(IldlabError):
                call(number if number < 0 else number + len(self.run.steps))

    # ---- what holds after each

    @invariant()
    def all_is_of_one_mind(self):
        run, journal = self.run, self.run.journal
        self.look()
        lines = (run.folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
        assert [unsealed(line, number) for number, line in enumerate(lines)] == run.steps
        files = {step.weights for step in run.steps} - {None}
        assert {file.name for file in (run.folder / "weights").iterdir()} == files
        head, student = journal.head, run.student
        assert head.layer_ids == student.layer_ids == [i for i in range(6) if i not in run.removed]
        assert student.config.num_hidden_layers == len(student) == len(student.layers)
        assert fingerprint(student) == self.seen[head.step][1] == fingerprint(run.student_at(head.step))
        assert fingerprint(run.teacher) == self.teacher and len(run.teacher) == 6
        assert not any(p.requires_grad or p.grad is not None for p in student.model.parameters())

    @invariant()
    def the_tables_tell_the_journal(self):
        run = self.run
        table, actions = run.history(), [step.action for step in run.path]
        assert table["n_removed"].tolist() == list(range(len(run.removed) + 1))
        assert table["layers"].iloc[-1] == len(run.student) and table["layer_id"].tolist()[1:] == run.removed
        last = max((i for i, action in enumerate(actions) if action in CHANGES_STUDENT), default=0)
        assert (run.scores is not None) == ("measure" in actions[last:])
        assert (run.evaluation is not None) == ("evaluate" in actions[last:])
        assert (run.latest_scores is not None) == ("measure" in actions)
        losses = run.losses()
        distilled = [step for step in run.path if step.action == "distill"]
        done = sum(step.result.get("stopped_at", 64 // 16) for step in distilled)
        assert len(losses) == done and losses["step"].tolist() == list(range(1, done + 1))
        assert "<svg" in run._repr_html_()

    @invariant()
    def it_is_free(self):
        with self.run.acting("look"):
            pass
        assert not any(module._forward_hooks for module in self.run.student.model.modules())

    def teardown(self):
        self.run.close()


def test_any_order_of_actions(tmp_path, loaded_tiny, small_settings, short_speed):
    Orders.folder, Orders.loaded, Orders.given = tmp_path, loaded_tiny, {**small_settings, "train_tokens": 32}
    torch.manual_seed(0)
    how = settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=10,
        stateful_step_count=14,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Orders, settings=how)
