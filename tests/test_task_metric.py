"""`metric="task"`: which way it goes, what it refuses, and races of few examples. (test_suites.py: the sweep is exact.)"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from ildlab.errors import MeasureError
from ildlab.evaluate.results import SuiteResult, TaskResult
from ildlab.evaluate.suites import Suite, load_suite
from ildlab.evaluate.tasks import Task
from ildlab.importance.dispatch import measure, measure_steps
from ildlab.importance.race import Race, standing
from ildlab.importance.scores import LayerScores
from ildlab.importance.task import LEAST_EXAMPLES, parts_of
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress


@pytest.fixture(scope="module")
def stack(tiny, teacher):
    return LayerStack(tiny(4, vocab=len(teacher.tokenizer)))


@dataclass(frozen=True)
class Running:
    """A suite that runs the model by itself, as lm-eval's do: how likely it finds each next token of two texts."""

    name: str = "running"
    fingerprint: str = "running"
    swept: bool = False
    examples: tuple[int, int] = (9, 4)

    def take(self, limit):
        return replace(self, examples=tuple(min(limit, n) for n in self.examples))

    def steps(self, stack, tokenizer):
        yield Progress(0, 1, "running")
        tasks = {}
        for number, (name, n) in enumerate(zip(("long", "short"), self.examples)):
            ids = torch.arange(n + 1)[None] * 131 + 17 + number
            p = stack.model(ids).logits[0, :-1].softmax(-1)
            values = p.gather(1, ids[0, 1:, None])[:, 0].double().tolist()
            tasks[name] = TaskResult(name, "own", "p", values, list(range(1, n + 1)), weight=2.0 - number)
        return SuiteResult(self.name, self.fingerprint, tasks)


def result_of(suite, stack):
    work = suite.steps(stack, None)
    with pytest.raises(StopIteration) as stop:
        next(work), next(work)
    return stop.value.value


def test_a_suite_that_cannot_be_swept_is_evaluated_without_each_layer(stack, teacher):
    suite, seen = Running(), []
    work = measure_steps(stack, None, "task", suite=suite, tokenizer=teacher.tokenizer)
    while True:
        try:
            seen.append(next(work))
            assert stack.layer_ids == [0, 1, 2, 3]  # for whoever looks at the student meanwhile
        except StopIteration as stop:
            scores = stop.value
            break
    assert seen[0].note == "separate evaluations of running: 5, the student's and one without each layer"
    assert scores.details["way"] == "separate evaluations"
    whole = result_of(suite, stack)
    assert scores.details["whole"] == pytest.approx(whole.aggregate, abs=1e-12)
    for layer_id in stack.layer_ids:
        pruned = stack.share()
        pruned.remove(layer_id)
        want = whole.aggregate - result_of(suite, pruned).aggregate
        assert scores.table.score[layer_id] == pytest.approx(want, abs=1e-9)
    assert scores.table.n.tolist() == [13] * 4 and scores.source == "suite running, 13 examples"
    assert (scores.table.ci_low < scores.table.score).all() and (scores.table.score < scores.table.ci_high).all()
    partial = [p.partial for p in seen if isinstance(p.partial, LayerScores)]
    assert partial[0].finalists == [0] and "s to go" in next(p.note for p in seen if p.partial is partial[0])
    assert len(measure(stack, None, "task", suite=suite, tokenizer=teacher.tokenizer, limit=3).weights) == 6


def test_a_sweep_says_that_it_is_one_and_what_it_costs(stack, teacher):
    work = measure_steps(stack, None, "task", suite="canaries@1", tokenizer=teacher.tokenizer)
    assert next(work) == Progress(0, 3, "sweep of canaries: the layers of 2.5 evaluations, the head of 5")
    scores = measure(stack, None, "task", suite="canaries@1", tokenizer=teacher.tokenizer)
    assert scores.details["way"] == "sweep"


class Untouched(Running):
    """A suite that no model may run on."""

    def steps(self, stack, tokenizer):
        raise AssertionError("work was done")
        yield


@pytest.mark.parametrize(
    "options, says",
    [
        ({"confidence": 95}, "confidence=95"),
        ({"batch_size": 4}, "no option 'batch_size'"),
        ({"positions": 4}, "no option 'positions'"),
        ({"limit": 0}, "limit=0"),
        ({"race": "maybe"}, "race='maybe'"),
        ({"race": True}, "Use race=False"),
        ({"suite": None}, "needs a suite"),
        ({"tokenizer": None}, "needs the tokenizer"),
    ],
)
def test_bad_options_are_refused_before_any_work(stack, options, says):
    with pytest.raises(MeasureError, match=says):
        measure(stack, None, "task", **{"suite": Untouched(), "tokenizer": object(), **options})


def test_a_teacher_and_a_tokenizer_are_refused_where_nothing_uses_them(stack):
    with pytest.raises(MeasureError, match="teacher=: 'task'"):
        measure(stack, None, "task", stack, suite=Untouched(), tokenizer=object())
    with pytest.raises(MeasureError, match="tokenizer=: 'nll'"):
        measure(stack, torch.ones(2, 8, dtype=torch.long), "nll", tokenizer=object())


# ----------------------------------------------------------- races of few examples


def cloze(name, n):
    return Task(name, "cloze", tuple({"context": f"{i} and 1 is", "continuation": str(i + 1)} for i in range(n)))


@pytest.mark.parametrize("sizes", [(1,), (16,), (8, 8, 8), (40, 1), (200, 40, 12)])
def test_no_part_of_a_race_is_judged_on_too_few_examples(sizes, teacher):
    plan = Suite("few", tuple(cloze(f"t{i}", n) for i, n in enumerate(sizes))).plan(teacher.tokenizer, 256)
    parts = parts_of(plan, np.random.default_rng(0))
    assert sorted(np.concatenate(parts)) == list(range(sum(sizes)))
    assert len(parts[0]) >= min(LEAST_EXAMPLES, sum(sizes))
    for rows in plan.task_rows():
        assert np.isin(parts[0], rows).sum() >= min(2, len(rows))
    assert len(parts) == {1: 1, 16: 1, 24: 2, 41: 2, 252: 4}[sum(sizes)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suite", [load_suite("canaries", limit=2), Suite("one", (cloze("sums", 16),))], ids=str)
def test_a_race_of_few_rows_drops_no_half(stack, teacher, suite):
    raced = measure(stack, None, "task", suite=suite, tokenizer=teacher.tokenizer, race=True)
    full = measure(stack, None, "task", suite=suite, tokenizer=teacher.tokenizer)
    assert raced.table.n.tolist() == full.table.n.tolist()
    np.testing.assert_array_equal(raced.per_sequence, full.per_sequence)
    assert raced.least_important == full.least_important
    assert np.isfinite(raced.table[["ci_low", "ci_high"]].to_numpy()).all()


@pytest.mark.filterwarnings("error")
def test_one_observation_says_nothing():
    race = Race([3, 5, 8], 0.95, 0.0)
    race.look(np.array([[0.0, 1.0, 9.0]]), np.ones(1), prior=np.array([0.0, 0.0, 9.0]))
    assert race.alive == [3, 5, 8] and not race.dropped and not race.over


def test_the_bound_is_a_moderated_t():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(14, 4)) + np.array([0.0, 1.0, 2.0, 3.0])
    gap, above, bound, best = standing(values, np.full(14, 2.5), 0.95)
    assert best == 0
    np.testing.assert_allclose(gap, values - values[:, :1])
    np.testing.assert_allclose(above, gap.mean(0))
    spread = gap.var(0, ddof=1) / 14
    spread = (4 * np.median(spread[1:]) + 13 * spread) / 17
    np.testing.assert_allclose(bound[1:], 2.315573 * np.sqrt(spread[1:]), rtol=1e-6)  # t of 17 at 1 - 0.05 / 3
    # An observation that counts nothing is none, but for the degrees of freedom.
    more, weights = np.vstack([values, [[50.0, 0, 0, 0]]]), np.r_[np.full(14, 2.5), 0.0]
    np.testing.assert_allclose(standing(more, weights, 0.95)[1], above)
