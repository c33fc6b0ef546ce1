"""A run begins, or goes on: `create`, `open_run`, and `resume`, which is the one or the other; `PruningSession` has them."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ildlab.errors import JournalError, SessionError
from ildlab.evaluate.suites import load_suite
from ildlab.files import whole_path, write_atomic
from ildlab.importance.samples import check_kinds
from ildlab.model.fingerprints import fingerprint
from ildlab.model.load import LoadedModel, load_model
from ildlab.model.stack import LayerStack
from ildlab.session.actions import undo
from ildlab.session.config import SessionConfig, storage_dtype
from ildlab.session.doctor import check_describable
from ildlab.session.journal import Journal, read_config
from ildlab.session.places import from_run, gone, placed, whole
from ildlab.session.run import Run, load_split, text_record
from ildlab.text.sources import SPLITS

FORMAT = 2  # of a run folder; 1 named its teacher by another fingerprint
STAGES = 2  # of a distillation; a folder that does not say so was made when there was one

R = TypeVar("R", bound=Run)


def create(
    cls: type[R],
    folder: str | Path,
    teacher: str | Path | LoadedModel = "smollm2-135m",
    *,
    dtype: str = "auto",
    device: str = "auto",
    **settings: Any,
) -> R:
    """Start a run in a new folder; nothing is written where an argument is wrong, or the model cannot lose a layer.

    `dtype` and `device` are those of `load_model`, `settings` fields of `SessionConfig` (`distill` may be a
    `DistillConfig`). Local files are kept by their whole paths, so that the run goes on from any folder.
    """
    folder = _named(folder)
    config = SessionConfig.of(_name(teacher), settings)  # before the model is loaded
    loaded = _loaded(teacher, dtype, device)
    stack = LayerStack(loaded.model)
    check_describable(stack)
    config.check_layers(stack.layer_ids)
    splits = [split for split in SPLITS if split == "calibration" or config.text_field(split) != "text"]
    blocks = {split: load_split(config, loaded, split) for split in splits}
    if config.metric != "task":
        check_kinds(blocks["calibration"].kinds)
    texts = {split: text_record(each) for split, each in blocks.items()}
    facts = {"ildlab_run": FORMAT, "fingerprint": fingerprint(stack, any_dtype=True), "layers": len(stack)}
    facts |= {"distill_stages": STAGES, "weights_dtype": str(storage_dtype(stack)).removeprefix("torch.")}
    journal = Journal.create(folder, config.told(from_run(folder)) | facts)
    about = {"args": {"teacher": loaded.name}, "result": {"text": texts}}
    journal.append("create", layer_ids=stack.layer_ids, seed=config.seed, **about)
    return cls(journal, loaded, stack)


def open_run(
    cls: type[R],
    folder: str | Path,
    teacher: str | Path | LoadedModel | None = None,
    *,
    text: str | None = None,
    train_text: str | None = None,
    eval_text: str | None = None,
    suite: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    step: int | None = None,
    read_only: bool = False,
) -> R:
    """Go on with a run where it stood, or at a `step` (an undo, of what is damaged after it too).

    A run that is not ours to write, or `read_only`, can be looked at, and branched.

    `teacher`, `text`, `train_text`, `eval_text` and `suite` say where these are now, if they moved since; the run
    remembers (the teacher, where it is no longer where it was). What lies in the run folder may move with it.

    Raises
    ------
    JournalError
        No run there, another session has it open, its teacher is gone, teacher or text is another one, or what leads to
        the step is damaged: the message names the last that is whole.
    """
    folder = _named(folder)
    was = SessionConfig.stored(read_config(folder), folder).teacher
    if teacher is None and gone(was):  # told before the run is taken from who has it
        raise JournalError(
            f"The teacher of {folder} is no longer at {was}: say where it is now, "
            f"PruningSession.open({str(folder)!r}, teacher=...)."
        )
    now = {"text": text, "train_text": train_text, "eval_text": eval_text, "suite": suite}
    if gone(was) and not isinstance(teacher, LoadedModel):
        now["teacher"] = str(teacher)
    now = {name: place for name, place in now.items() if place is not None}
    journal = Journal.open(folder, step=step, read_only=read_only)
    try:
        loaded = _loaded(was if teacher is None else teacher, dtype, device)
        stack = LayerStack(loaded.model)
        _check_teacher(journal, loaded.name, stack)
        if not journal.steps:  # killed between config.json and the first line
            journal.append("create", layer_ids=stack.layer_ids, args={"teacher": loaded.name})
        run = cls(journal, loaded, stack)
        if now:
            _move(run, now)
        if step is not None and journal.writable:
            journal.at = None
            undo(run, step, reason="opened at it")
        return run
    except BaseException:
        journal.close()
        raise


def resume(
    cls: type[R],
    folder: str | Path,
    teacher: str | Path | LoadedModel = "smollm2-135m",
    *,
    dtype: str = "auto",
    device: str = "auto",
    **settings: Any,
) -> R:
    """`create` a run, or `open` the one in the folder if it was begun with this teacher and these settings.

    A setting that is not given is the run's own, whatever its default is by now.

    Raises
    ------
    SessionError
        The run was begun with others; the message names each that differs.
    """
    folder = _named(folder)
    if not (folder / "config.json").exists():
        return create(cls, folder, teacher, dtype=dtype, device=device, **settings)
    facts, given = read_config(folder), SessionConfig.of(_name(teacher), settings)
    stored = SessionConfig.stored(facts, folder)
    other = stored.changes(given, settings)
    if given.teacher != whole(stored.teacher):  # by another name it may be the same
        teacher = _loaded(teacher, dtype, device)
        if _is_other(facts, LayerStack(teacher.model)):
            other.insert(0, f"teacher was {stored.teacher!r}, now {given.teacher!r}")
    if other:
        raise SessionError(
            f"The run in {folder} was begun with other settings ({'; '.join(other)}): go on with those, or take "
            "another folder."
        )
    return open_run(cls, folder, teacher, dtype=dtype, device=device)


def _move(run: Run, now: dict[str, str]) -> None:
    """Have a run's teacher, texts and suite elsewhere from now on; JournalError where a text is another than it was."""
    none = [name for name in now if getattr(run.config, name) is None]
    if none:
        raise JournalError(f"{run.folder} has no {none[0]} that could have moved: leave it out.")
    run.config = placed(replace(run.config, **now), whole)
    began = run.steps[0].result.get("text", {})
    for split in began:
        name = run.config.text_field(split)
        if name in now and load_split(run.config, run.loaded, split).fingerprint != began[split]["fingerprint"]:
            raise JournalError(f"{name}={now[name]!r} is not the text that {run.folder} was begun with.")
    if run.config.suite is not None:
        load_suite(run.config.suite)
    facts = run.journal.config | run.config.told(from_run(run.folder))
    if run.journal.writable:
        write_atomic(run.folder / "config.json", json.dumps(facts, indent=2) + "\n")


def _named(folder: str | Path) -> Path:
    """The whole path of a run folder."""
    if not str(folder).strip():
        raise SessionError("The run folder has no name: give one, such as 'runs/first'.")
    return whole_path(folder)


def _name(teacher: str | Path | LoadedModel) -> str:
    return teacher.name if isinstance(teacher, LoadedModel) else str(teacher)


def _loaded(teacher: str | Path | LoadedModel, dtype: str, device: str) -> LoadedModel:
    """The teacher, by a name that holds in any folder."""
    name = whole(_name(teacher))
    if isinstance(teacher, LoadedModel):
        return replace(teacher, name=name)
    return load_model(name, dtype=dtype, device=device)


def _is_other(facts: dict[str, Any], stack: LayerStack) -> bool:
    """Whether a teacher is another than the run's; an older ildlab's fingerprint tells nothing."""
    if len(stack) != facts["layers"]:
        return True
    return facts.get("ildlab_run") == FORMAT and fingerprint(stack, any_dtype=True) != facts["fingerprint"]


def _check_teacher(journal: Journal, name: str, stack: LayerStack) -> None:
    """Raise JournalError where a run is another teacher's."""
    config = journal.config
    if _is_other(config, stack):
        raise JournalError(
            f"{journal.folder} holds a run of another teacher ({config['teacher']!r}, {config['layers']} layers) than "
            f"{name!r} ({len(stack)} layers): open it with that one, or start a run in another folder."
        )
    if config.get("ildlab_run") != FORMAT:
        warnings.warn(
            f"An older ildlab began {journal.folder}: if {name!r} is its teacher cannot be checked.", stacklevel=4
        )
