"""A run goes on from any folder, with its own settings alone, and tells nobody where it lay."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from ildlab.distill.config import DistillConfig
from ildlab.errors import DistillError, IldlabError, JournalError, MeasureError, SessionError, TextError
from ildlab.model.load import LoadedModel
from ildlab.session.config import SessionConfig
from ildlab.session.loop import RunSettings
from ildlab.session.places import from_run, in_suite, in_text, short, whole
from ildlab.session.session import PruningSession

pytestmark = pytest.mark.usefixtures("short_speed")

SETTINGS = {"block": 32, "calibration_tokens": 256, "train_tokens": 512, "eval_tokens": 256, "metric": "nll"}
# Of these two rows a model has one right, whatever it is.
ROWS = "".join(f'{{"query": "one", "choices": ["two", "three"], "gold": {gold}}}\n' for gold in (0, 1))


@pytest.fixture
def here(tmp_path, tiny_folder, text_file, monkeypatch):
    """A folder to work in, with `model`, `mine.txt` and `rows.jsonl`, and a second one, `elsewhere`."""
    shutil.copytree(tiny_folder, tmp_path / "here" / "model")
    shutil.copyfile(text_file, tmp_path / "here" / "mine.txt")
    (tmp_path / "here" / "rows.jsonl").write_text(ROWS)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def create(folder="runs/one", teacher="model", **changes):
    return PruningSession.create(folder, teacher, dtype="float32", **{"text": "mine.txt", **SETTINGS, **changes})


# ---- from another folder -------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_another_folder(here):
    session = create(suite="file:rows.jsonl@2", eval_text="mine.txt*2 + teacher-samples")
    os.chdir(here.parent / "elsewhere")
    session.run(5)
    session.close()
    assert session.loaded.name == str(here / "model")  # by which processes that distill together load it again
    assert not any(Path.cwd().iterdir())
    assert session.config.eval_text == f"{here}/mine.txt*2 + teacher-samples"
    assert session.config.suite == f"file:{here}/rows.jsonl@2"
    with PruningSession.open(here / "runs" / "one", dtype="float32") as again:
        assert again.config == session.config and again.config.teacher == str(here / "model")
        assert [step.action for step in again.steps] == [step.action for step in session.steps]
        again.run()  # it is done, by the suite that it began with
        again.measure()


def test_a_suite_of_the_loop_is_found_from_another_folder(here):
    session = create()
    work = session.run_steps(5, distill=False, suite="file:rows.jsonl")
    next(work)
    work.close()
    os.chdir(here.parent / "elsewhere")
    session.run()
    assert session.removed and session.steps[-1].args["suite"] == f"file:{here}/rows.jsonl"
    session.close()


def test_a_model_that_was_loaded_by_a_relative_name_is_found_again(here):
    from ildlab.model.load import load_model

    session = create(teacher=load_model("model", dtype="float32"))
    session.close()
    os.chdir(here.parent / "elsewhere")
    PruningSession.open(here / "runs" / "one").close()


def test_names(here):
    (here / "kinds.jsonl").touch()
    (here / "mix").mkdir()
    (here / "owner").mkdir()
    (here / "owner" / "name").mkdir()
    for text, wanted in {
        "mix*3+mine.txt": f"mix*3+{here}/mine.txt",
        "mine.txt*0.5": f"{here}/mine.txt*0.5",
        "kinds.jsonl:copies + python-docs": f"{here}/kinds.jsonl:copies + python-docs",
        "mix:copies": "mix:copies",
        "mix": "mix",
        "owner/name:part": "owner/name:part",  # of the Hub
        "owner/name": f"{here}/owner/name",
        "~/nowhere.txt": "~/nowhere.txt",
    }.items():
        assert in_text(text, whole) == in_text(in_text(text, whole), whole) == wanted
    for suite, wanted in {
        "mini7@40": "mini7@40",
        "lm-eval:piqa,arc_easy@3": "lm-eval:piqa,arc_easy@3",
        "file:rows.jsonl, mine.txt@2": f"file:{here}/rows.jsonl,{here}/mine.txt@2",
        None: None,
    }.items():
        assert in_suite(suite, whole) == wanted
    assert whole("smollm2-135m") == "smollm2-135m"
    assert in_text(f"mix+{here}/runs/one/a.txt", from_run("runs/one")) == "mix+{run}/a.txt"
    assert [short(name) for name in ("/a/b c", "owner/name", "mine.txt")] == ["b c", "owner/name", "mine.txt"]


def test_a_path_that_would_take_a_sum_or_a_list_apart_is_refused(here):
    (here / "c++, a").mkdir()
    os.chdir(here / "c++, a")
    shutil.copyfile(here / "mine.txt", "mine.txt")
    shutil.copyfile(here / "rows.jsonl", "rows.jsonl")
    with pytest.raises(SessionError, match="a sum cannot name .*Give it by another path"):
        create(text="mine.txt+python-docs", teacher="../model")
    with pytest.raises(SessionError, match="a list cannot name a path with a comma"):
        create(suite="file:rows.jsonl,../rows.jsonl", teacher="../model")
    assert not Path("runs").exists()
    create(teacher="../model").close()  # alone it is no sum
    PruningSession.open("runs/one").close()


# ---- what moved ----------------------------------------------------------------------------------------------------


def test_a_teacher_that_moved_is_asked_for_and_moves_with_the_run_once_it_lies_in_it(here, tmp_path):
    session = create(text="teacher-samples+mine.txt", suite="file:rows.jsonl")
    shutil.move("model", "runs/one/teacher")
    with pytest.raises(JournalError, match=r"no longer at .*here/model: say.*PruningSession.open\(.*, teacher=...\)"):
        PruningSession.open("runs/one")
    session.measure("kl")  # nobody took it from the session that has it
    with pytest.raises(IldlabError, match="no model folder"):
        PruningSession.open("runs/one", "./nowhere")
    for name in ("mine.txt", "rows.jsonl"):
        shutil.move(name, f"runs/one/{name}")
    moved = {"text": "teacher-samples+runs/one/mine.txt", "suite": "file:runs/one/rows.jsonl"}
    PruningSession.open("runs/one", "runs/one/teacher", **moved).close()
    shutil.move("runs/one", tmp_path / "elsewhere" / "two")
    with PruningSession.open(tmp_path / "elsewhere" / "two") as again:
        assert (
            again.config.text == f"teacher-samples+{again.folder}/mine.txt"
            and again.loaded.name == f"{again.folder}/teacher"
        )
        again.measure("kl")
        again.evaluate(speed=False)
        told = (again.folder / "config.json").read_text()
        assert str(here) not in told and '"{run}/teacher"' in told
        branch = again.branch(tmp_path / "branch")  # and is none of the folder that it lies in
    branch.close()
    PruningSession.open(tmp_path / "branch").measure("kl")


def test_a_run_distills_on_a_text_of_its_own(here):
    Path("train.txt").write_text("Whales sing, and rivers run to the sea.\n" * 400)
    with create(train_text="train.txt", train_tokens=512, distill={"local_tokens": 0, "tokens": 64}) as session:
        session.run(5)
        kinds = {
            step.action: step.result["text"]["source"]
            for step in session.steps
            if "source" in step.result.get("text", {})
        }
        assert kinds == {"measure": f"{here}/mine.txt", "distill": f"{here}/train.txt", "evaluate": f"{here}/mine.txt"}
        assert session.text("calibration").source == f"{here}/mine.txt"
    shutil.move("train.txt", "moved.txt")
    with PruningSession.open("runs/one") as session:
        session.measure()  # wants the other text
        session.remove()
        with pytest.raises(JournalError, match=r"no longer at .*train.txt: .*open\(.*, train_text=...\)"):
            session.distill()
    with pytest.raises(JournalError, match="train_text='teacher-samples' is not the text"):
        PruningSession.open("runs/one", train_text="teacher-samples")
    create("runs/two", eval_text="mine.txt").close()  # the same text, named twice, is still its own
    with pytest.raises(JournalError, match="eval_text='moved.txt' is not the text"):
        PruningSession.open("runs/two", eval_text="moved.txt")
    with PruningSession.open("runs/one", train_text="moved.txt") as session:
        session.distill()
        assert session.steps[-1].result["text"]["source"] == f"{here}/moved.txt"


def test_a_text_that_moved_is_asked_for_and_is_the_same(here):
    create(eval_text="teacher-samples").close()
    shutil.move("mine.txt", "yours.txt")
    with PruningSession.open("runs/one") as session:  # to look at it, and to export, no text is needed
        session.remove(2)
        with pytest.raises(JournalError, match=r"no longer at .*mine.txt: put it back, or .*open\(.*, text=...\)"):
            session.measure()
    kept = Path("runs/one/config.json").read_bytes()
    for wrong, words in (
        ({"text": "teacher-samples"}, "text='teacher-samples' is not the text"),
        ({"eval_text": "yours.txt"}, "eval_text='yours.txt' is not the text"),
        ({"train_text": "yours.txt"}, "has no train_text that could have moved"),
        ({"suite": "mini7"}, "has no suite that could have moved"),
    ):
        with pytest.raises(JournalError, match=words):
            PruningSession.open("runs/one", **wrong)
        assert Path("runs/one/config.json").read_bytes() == kept
    PruningSession.open("runs/one", text="yours.txt").close()
    with PruningSession.open("runs/one") as session:
        assert session.removed == [2] and session.measure() is not None


# ---- begun once, gone on with as it was begun -----------------------------------------------------------------------


def test_resume_creates_a_run_and_goes_on_with_it(here):
    settings = {"text": "mine.txt", **SETTINGS, "dtype": "float32"}
    distill = {"learning_rate": 1e-3, "seed": None}
    with PruningSession.resume("runs/one", "model", **settings, distill=distill) as session:
        session.remove(2)
    os.chdir(here.parent / "elsewhere")
    settings["text"] = "../here/mine.txt"
    written = DistillConfig(learning_rate="1e-3")
    with PruningSession.resume("../here/runs/one", "../here/model", **settings, distill=written) as again:
        assert again.removed == [2]
    shutil.copytree("../here/model", "same")  # by another name
    with PruningSession.resume("../here/runs/one", "same", block="32") as again:  # what is not named is the run's own
        assert again.config.metric == "nll"


def test_resume_names_each_setting_that_differs(here, tiny, tmp_path):
    create(measure={"positions": 8}, distill={"learning_rate": 1e-3}).close()
    shutil.copyfile("mine.txt", "yours.txt")
    loaded = PruningSession.open("runs/one").loaded
    other = LoadedModel(tiny(6, vocab=320, seed=1), loaded.tokenizer, "other")
    held = PruningSession.open("runs/one", loaded)
    for given, words in (
        ({"metric": "kl"}, "metric was 'nll', now 'kl'"),
        ({"text": "yours.txt"}, f"text was '{here}/mine.txt', now '{here}/yours.txt'"),
        ({"seed": 7}, "seed was 0, now 7"),
        ({"suite": "mini7"}, "suite was None, now 'mini7'"),
        ({"measure": "{}"}, "measure positions was 8, now None"),
        ({"distill": '{"tokens": "64"}'}, "distill learning_rate was 0.001, now 0.0005"),
        ({"teacher": other}, f"teacher was '{here}/model', now 'other'"),
    ):
        with pytest.raises(SessionError) as raised:
            PruningSession.resume("runs/one", **{"teacher": loaded, **given})
        assert words in str(raised.value)
    with pytest.raises(SessionError, match="teacher was .*; metric was .*; seed was"):
        PruningSession.resume("runs/one", other, metric="kl", seed=1)
    held.remove(1)  # nothing was taken from the session that has it
    held.close()


# ---- settings are proven before there is a run -----------------------------------------------------------------------


def test_settings_are_stored_as_what_they_mean(here):
    distill = '{"tokens": "128", "scope": "[1, 4]"}'
    with create(seed="7", block=32.0, distill=distill, measure={"race": "false"}, suite="") as session:
        config = session.config
    assert (config.seed, config.block, config.suite) == (7, 32, None)
    assert config.distill == {"tokens": 128, "scope": [1, 4]} and config.measure == {"race": False}
    with PruningSession.open("runs/one") as again:
        assert again.config == config
    settings = RunSettings("4", None, distill="no", final={"tokens": "64"}, suite_each="true")
    assert settings == RunSettings(4, None, False, None, {"tokens": 64}, True)


@pytest.mark.parametrize(
    "wrong, error, words",
    [
        ({"seed": -1}, SessionError, "seed=-1: it must not be negative"),
        ({"seed": True}, SessionError, "seed=True: it must be a whole number"),
        ({"text": ""}, SessionError, "text='': it must not be empty"),
        ({"train_text": "nowhere.txt"}, TextError, "no text source '.*nowhere.txt'"),
        ({"distill": "fast"}, SessionError, "distill='fast': it must be a mapping"),
        ({"distill": {"learning_rate": "nan"}}, DistillError, "learning_rate='nan': it must be a number"),
        ({"distill": {"scope": [1, 9]}}, SessionError, r"the teacher has no layers \[9\]"),
        ({"distill": {"batch_size": 3}, "processes": 2}, SessionError, "cannot share batch_size=3 evenly"),
        ({"measure": {"race": "perhaps"}}, MeasureError, "race='perhaps': it must be True or False"),
        ({"metric": "task"}, SessionError, "metric='task': it needs a suite"),
        ({"metric": "task", "measure": {"suite": "mini77"}}, IldlabError, "no suite 'mini77'"),
        ({"metric": "task", "measure": {"suite": 7}}, SessionError, "a run keeps its suite by name"),
        ({"folder": ""}, SessionError, "The run folder has no name"),
        ({"teacher": " "}, SessionError, "teacher=' ': it must not be empty"),
    ],
)
def test_no_run_is_made_that_could_never_act(here, wrong, error, words):
    before = sorted(here.iterdir())
    with pytest.raises(error, match=words):
        create(**wrong)
    assert sorted(here.iterdir()) == before


def test_what_is_evaluated_as_a_whole_cannot_race(here, monkeypatch):
    from ildlab.evaluate.suites import Suite

    monkeypatch.setattr(Suite, "swept", False)
    with pytest.raises(SessionError, match="is evaluated as a whole, and cannot stop early"):
        create(metric="task", suite="mini7@2", measure={"race": True})


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"final": {"tokens": "many"}}, "tokens='many'"),
        ({"final": {"token": 1}}, "no 'token'"),
        ({"final": 3}, "final=3"),
    ],
)
def test_a_final_distillation_is_read_too(wrong, words):
    with pytest.raises(IldlabError, match=words):
        RunSettings(4, **wrong)


# ---- an exported checkpoint says nothing of the machine -------------------------------------------------------------


@pytest.mark.parametrize("name", ["a: b", "@home #1", "- x", "plain"])
def test_a_checkpoint_names_its_base_model_and_no_place(here, name, tmp_path):
    shutil.move("model", name)
    with create(teacher=name, text="mine.txt+teacher-samples", suite="file:rows.jsonl", train_tokens=4096) as session:
        session.remove(2)
        session.distill(tokens=64, local_tokens=0)
        session.evaluate(speed=False, canaries=False)
        folder = session.export(tmp_path / "out")
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == name and front["tags"] == ["ildlab", "layer-pruning", "distillation"]
    assert f"# {name} with 5 of 6 layers" in card and "`mine.txt+teacher-samples`" in card
    told = json.loads((folder / "ildlab.json").read_text())
    assert told["teacher"] == name == json.loads((folder / "config.json").read_text())["ildlab"]["teacher"]
    used = [step["result"]["text"]["source"] for step in told["steps"] if step["action"] != "remove"]
    assert used == 2 * ["mine.txt+teacher-samples"] and told["steps"][-1]["args"]["suite"] == "file:rows.jsonl"
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_names_of_the_hub_stay(here):
    from ildlab.model.load import load_model
    from ildlab.session.export import model_card

    for name in ("Qwen/Qwen2.5-3B", "smollm2-135m"):
        with create(name, replace(load_model("model"), name=name)) as session:
            front = yaml.safe_load(model_card(session, "fine").split("---\n")[1])
        assert front["base_model"] == name and session.config.teacher == name


def test_the_config_of_an_older_run_is_read_as_it_is(here):
    """A relative text of an older run is found from where one stands, as it was then."""
    create().close()
    file = Path("runs/one/config.json")
    config = json.loads(file.read_text())
    config["settings"]["text"] = "mine.txt"
    file.write_text(json.dumps(config))
    with PruningSession.resume("runs/one", "model", text="mine.txt") as session:
        assert session.config.text == "mine.txt" and session.measure() is not None
    assert SessionConfig.stored(config, Path("runs/one")).text == "mine.txt"
