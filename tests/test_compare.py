"""The comparison of five methods: what each does, going on after a stop, and its figures."""

import json

import matplotlib
import pandas as pd
import pytest

from ildlab.errors import SessionError
from ildlab.evaluate.suites import load_suite
from ildlab.model.load import LoadedModel
from ildlab.plots import curves as plots_curves
from ildlab.progress import drive
from ildlab.session.methods import METHODS, Method, compare_steps, curve, published_curves, task_columns
from ildlab.session.session import PruningSession

pytestmark = pytest.mark.usefixtures("short_speed")

SETTINGS = {
    "suite": "mini7@1",
    "block": 16,
    "calibration_tokens": 64,
    "train_tokens": 64,
    "eval_tokens": 64,
    "weights_dtype": "float32",
    "evaluate_every": 2,
}


@pytest.fixture(scope="module")
def loaded(tiny, teacher):
    return LoadedModel(tiny(4, vocab=len(teacher.tokenizer)), teacher.tokenizer, "tiny")


@pytest.fixture(scope="module")
def table(loaded, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    settings = {"text": str(text_file), **SETTINGS}
    first = compare_steps(folder, loaded, remove=2, **settings)
    for progress in first:  # stopped in the middle of the second method
        if "iterative Block Influence:" in progress.note and progress.done >= 3:
            first.close()
            break
    return folder, drive(compare_steps(folder, loaded, remove=2, **settings))


def test_every_method_has_a_curve_and_goes_on_where_it_stopped(table, loaded):
    folder, curves = table
    assert list(curves["method"].unique()) == list(METHODS)
    for name, method in METHODS.items():
        own = curves[curves["method"] == name]
        assert list(own["layers_removed"]) == [0, 2]
        assert own["quality_loss"].iloc[0] == 0
        with PruningSession.open(folder / name, loaded) as session:
            actions = [step.action for step in session.path]
            assert actions.count("remove") == 2
            assert actions.count("distill") == (2 if method.distill else 0)
            assert actions.count("measure") == (2 if method.iterative else 1)
            if not method.iterative:
                first = next(step.step for step in session.path if step.action == "measure")
                assert session.removed == session.scores_at(first).ranking[:2]
            assert len(curve(session, name)) == 2


def test_the_teacher_is_scored_once(loaded, text_file, tmp_path, monkeypatch):
    from ildlab.evaluate.suites import Suite

    scored = []
    real = Suite.steps
    monkeypatch.setattr(Suite, "steps", lambda suite, stack, *a: scored.append(len(stack)) or real(suite, stack, *a))
    chosen = ["shortgpt", "iterative_block_influence"]
    settings = {"text": str(text_file), **SETTINGS, "evaluate_every": 1}
    table = drive(compare_steps(tmp_path, loaded, remove=1, methods=chosen, **settings))
    assert scored.count(4) == 2  # the suite and the canaries, for both methods together
    assert {"canary_copying", "canary_arithmetic", "canary_brackets"} <= set(table.columns)


def test_a_run_goes_on_only_with_its_own_settings(loaded, text_file, tmp_path):
    settings = {"text": str(text_file), **SETTINGS, "evaluate_every": 1}
    name = "iterative_block_influence_distillation"

    def run(**changes):
        return compare_steps(tmp_path, loaded, remove=1, methods=[name], **{**settings, **changes})

    # Stopped in the middle of its distillation: what was trained so far is no whole distillation.
    work = run(train_tokens=1024)
    with PruningSession.create(
        tmp_path / name,
        loaded,
        metric="block_influence",
        suite="mini7@1",
        text=str(text_file),
        **{**{k: v for k, v in SETTINGS.items() if k not in ("suite", "evaluate_every")}, "train_tokens": 1024},
    ) as session:
        session.measure()
        session.remove()
        stopped = session.distill_steps()
        next(stopped)
        stopped.close()
    drive(work)
    with PruningSession.open(tmp_path / name, loaded) as session:
        found = ["stopped_at" in step.result for step in session.path if step.action == "distill"]
    assert found == [True, False]
    with pytest.raises(SessionError, match="train_tokens was 1024, now 128"):
        drive(run(train_tokens=128))


def test_a_comparison_begun_with_other_defaults_goes_on(loaded, text_file, tmp_path):
    """What the caller does not name is the run's own, whatever the default is by now."""
    settings = {"text": str(text_file), **SETTINGS, "evaluate_every": 1, "methods": ["shortgpt"]}
    settings.pop("weights_dtype")
    drive(compare_steps(tmp_path, loaded, remove=1, **settings))
    file = tmp_path / "shortgpt" / "config.json"
    config = json.loads(file.read_text())
    config["settings"] |= {"weights_dtype": "bfloat16", "distill": {"seed": 0}}
    del config["weights_dtype"], config["settings"]["text_column"]  # as an older version wrote it
    file.write_text(json.dumps(config))
    table = drive(compare_steps(tmp_path, loaded, remove=1, distill={"seed": None}, **settings))
    assert len(table) == 2


def test_rows_that_chose_nothing_have_an_aggregate_of_their_own(loaded, text_file, tmp_path):
    settings = {"text": str(text_file), **SETTINGS, "suite": "mini7@3", "evaluate_every": 1}
    table = drive(
        compare_steps(
            tmp_path,
            loaded,
            remove=1,
            methods=["iterative_layerwise_pruning"],
            ablation="task",
            ablation_options={"suite": "mini7@2"},
            **settings,
        )
    )
    with PruningSession.open(tmp_path / "iterative_layerwise_pruning", loaded) as session:
        found = [session.scores_at(s.step).source for s in session.path if s.action == "measure"]
        results = [s.result["evaluation"]["suite"] for s in session.path if s.action == "evaluate"]
    assert found == ["suite mini7, 14 examples"]
    want = [sum(task["values"][2] for task in result["tasks"]) / 7 for result in results]
    assert list(table["aggregate_rest"]) == pytest.approx(want)
    assert task_columns(table) == [task.name for task in load_suite("mini7").tasks]


def test_figures(table):
    _, curves = table
    ax = plots_curves.methods(curves)
    assert isinstance(ax, matplotlib.axes.Axes)
    assert len(ax.get_lines()) == len(METHODS) + 1
    assert len(plots_curves.methods(published_curves(), over="share_removed").get_lines()) == 6
    tasks = ["knowledge", "cloze", "summary"]
    figure = plots_curves.task_panels(curves, tasks, chance={"knowledge": 0.25})
    assert sum(ax.get_visible() for ax in figure.axes) == 3


def test_published_curves_are_over_the_share_of_36_layers():
    curves = published_curves()
    assert isinstance(curves, pd.DataFrame)
    assert set(curves["method"]) == set(METHODS)
    assert curves["share_removed"].max() == pytest.approx(12 / 36)


def test_bad_input(loaded, tmp_path):
    with pytest.raises(SessionError, match="Unknown method magic"):
        drive(compare_steps(tmp_path, loaded, methods=["magic"]))
    with pytest.raises(SessionError, match="remove=4 of 4"):
        drive(compare_steps(tmp_path, loaded, remove=4))


def test_methods_of_ones_own_share_a_budget_of_tokens(loaded, text_file, tmp_path):
    """Measured, and distilled, after every second removal; and all at once; at the same tokens."""
    methods = {
        "second": Method("every second", True, True, True, distill_every=2, measure_every=2, race=True),
        "once": Method("all at once", True, True, True, distill_every=3, measure_every=3),
    }
    settings = {"text": str(text_file), **SETTINGS, "train_tokens": 512, "evaluate_every": 3, "share_tokens": True}
    distill = {"batch_size": 2, "tokens": 96, "local_tokens": 192}
    table = drive(compare_steps(tmp_path, loaded, remove=3, methods=methods, distill=distill, **settings))
    ends = table[table["layers_removed"] == 3].set_index("method")
    assert list(ends["distill_tokens"]) == [288, 288]
    assert (ends["distill_seconds"] > 0).all() and {"loss_low", "loss_high"} <= set(ends)
    with PruningSession.open(tmp_path / "second", loaded) as session:
        steps = [s for s in session.path if s.action in ("measure", "remove", "distill")]
        assert [s.action[0] for s in steps] == list("mrrdmrd")
        assert [s.result["tokens"] for s in steps if s.action == "distill"] == [192, 96]
        first = session.scores_at(steps[0].step)
        assert session.removed[:2] == first.ranking[:2]
        assert session.config.measure == {"race": True}
        passes = [session.scores_at(s.step).details["layer_passes"] for s in steps if s.action == "measure"]
        assert ends["layer_passes"]["second"] == sum(passes) > 0
    with PruningSession.open(tmp_path / "once", loaded) as session:
        assert [s.action[0] for s in session.path if s.action in ("measure", "remove", "distill")] == list("mrrrd")
