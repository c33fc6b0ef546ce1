"""`Run`: what actions, loop, tables and export act on; `PruningSession` is its face for people."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import torch

from ildlab.errors import IldlabError, JournalError, SessionError, out_of_memory
from ildlab.evaluate.record import Evaluation
from ildlab.importance.scores import LayerScores
from ildlab.limits import check_ids, check_length
from ildlab.model.load import LoadedModel
from ildlab.model.stack import LayerStack
from ildlab.session.config import SessionConfig
from ildlab.session.journal import CHANGES_STUDENT, Journal, Step
from ildlab.session.places import gone, whole
from ildlab.text.blocks import TextBlocks, load_text
from ildlab.typed import reading


class Run:
    """A run folder opened: its journal, its frozen teacher, and the student that the journal leads to.

    Made by what `ildlab.session.opening` has. The student shares with the teacher every weight that did not change.
    """

    def __init__(self, journal: Journal, loaded: LoadedModel, teacher: LayerStack):
        self.journal, self.folder = journal, journal.folder
        self.config = SessionConfig.stored(journal.config, self.folder)
        self.loaded, self.tokenizer, self.teacher = loaded, loaded.tokenizer, teacher
        self._text: dict[tuple, TextBlocks] = {}
        self._busy, self._action, self._began = threading.Lock(), "", 0.0
        self.student = self.student_at(journal.head.step)

    @reading(SessionError)
    def branch(self, folder: str | Path, step: int | None = None) -> Self:
        """A second run, in a folder of its own, that shares this one's past up to a step (by default today's)."""
        self.journal.config |= self.config.told(whole)  # by whole paths: the other folder is elsewhere
        journal = self.journal.branch(folder, self.journal.head.step if step is None else step)
        return type(self)(journal, self.loaded, self.teacher)

    def close(self) -> None:
        """Let go of the run folder, so that another session may open it."""
        self.journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    # ---------------------------------------------------------------- looking

    @property
    def steps(self) -> list[Step]:
        """Every step of the journal, those that were undone included."""
        return self.journal.steps

    @property
    def path(self) -> list[Step]:
        """The steps that led to today's student."""
        return self.journal.path_to(self.journal.head.step)

    @property
    def removed(self) -> list[int]:
        """Layer ids removed so far, in order."""
        return [step.args["layer_id"] for step in self.path if step.action == "remove"]

    @property
    def trained(self) -> list[int]:
        """Layer ids of the student whose weights are no longer the teacher's."""
        ours, theirs = (
            {i: next(layer.parameters()).data_ptr() for i, layer in zip(stack.layer_ids, stack.layers)}
            for stack in (self.student, self.teacher)
        )
        return [i for i in ours if ours[i] != theirs[i]]

    @property
    def seed(self) -> int:
        """Seed of what is drawn next: of the place in the run alone, so that a resumed run draws the same."""
        return self.config.seed + 1000 * len(self.removed)

    @cached_property
    def weights_dtype(self) -> torch.dtype:
        """dtype that changed weights are rounded to and stored in, and of exported checkpoints."""
        # "auto" was settled once: the folder may be opened on a machine that loads the teacher in another dtype.
        asked = self.config.weights_dtype
        return getattr(torch, self.journal.config["weights_dtype"] if asked == "auto" else asked)

    @property
    def scores(self) -> LayerScores | None:
        """Latest scores of today's student; None where it changed since it was measured."""
        step = self._latest("measure")
        return step and self.scores_at(step.step)

    @property
    def latest_scores(self) -> LayerScores | None:
        """Latest scores on the way to today's student, though it may have changed since; or None."""
        step = self._latest("measure", since=())
        return step and self.scores_at(step.step)

    @property
    def evaluation(self) -> Evaluation | None:
        """Latest evaluation of today's student; None where it changed since."""
        step = self._latest("evaluate")
        return step and Evaluation.from_dict(step.result["evaluation"])

    def _latest(self, action: str, since: Sequence[str] = CHANGES_STUDENT) -> Step | None:
        """The last step of a kind, after the last of the kinds in `since`."""
        step = next((s for s in reversed(self.path) if s.action in (action, *since)), None)
        return step if step is not None and step.action == action else None

    @reading(SessionError)
    def scores_at(self, step: int) -> LayerScores:
        """The scores that a `measure` step found."""
        record = self.journal.path_to(step)[-1]
        if record.action != "measure":
            raise SessionError(f"Step {step} is a {record.action}, not a measure: it has no scores.")
        return LayerScores.from_dict(record.result["scores"])

    @reading(SessionError)
    def text(
        self, split: Literal["calibration", "train", "eval"], source: str | None = None, tokens: int | None = None
    ) -> TextBlocks:
        """Text blocks of a split (`"calibration"`, `"train"` or `"eval"`); `tokens` asks for more than the run's.

        Training text is drawn anew after each removal, so that a longer run sees more text; the others stay the same,
        so that scores and evaluations compare.
        """
        seed = self.seed if split == "train" else self.config.seed
        key = (split, seed, source, tokens)
        if key not in self._text:
            name = self.config.text_field(split)
            own = getattr(self.config, name)
            if source is None and gone(own):
                raise JournalError(
                    f"The text of {self.folder} is no longer at {own}: put it back, or say where it is now, "
                    f"PruningSession.open({str(self.folder)!r}, {name}=...)."
                )
            # One text a split is kept: an old iteration's training text is not needed again.
            self._text = {other: kept for other, kept in self._text.items() if other[0] != split}
            self._text[key] = load_split(self.config, self.loaded, split, seed, source, tokens or 0)
        return self._text[key]

    @reading(SessionError)
    def student_at(self, step: int) -> LayerStack:
        """The student as it was at a step; it shares with the teacher every weight that did not change."""
        record = self.journal.path_to(step)[-1]
        student = self.teacher.share(without=[i for i in self.teacher.layer_ids if i not in record.layer_ids])
        tensors = self.journal.tensors_at(step)  # "layer.<layer id>.<parameter>"
        changed = sorted({int(name.split(".")[1]) for name in tensors} & set(record.layer_ids))
        student.own(changed)
        with torch.no_grad():
            for layer_id in changed:
                for name, parameter in student.layers[student.position(layer_id)].named_parameters():
                    parameter.copy_(tensors[f"layer.{layer_id}.{name}"])
        return student

    # ----------------------------------------------------------------- acting

    @contextmanager
    def acting(self, action: str, *, writes: bool = True) -> Iterator[None]:
        """Hold the run for one action; SessionError where another is in hand, in this thread or another.

        Two at a time would work on a student that the other one changes. JournalError where it `writes`, to a run that is
        closed or open to read only.
        """
        if writes:
            self.journal.check_writable()
        if not self._busy.acquire(blocking=False):
            raise SessionError(
                f"Cannot {action} now: the session is in the middle of {self._action}. Let it end, or stop it first "
                "(a generator such as distill_steps() is stopped by its close())."
            )
        self._action, self._began = action, time.perf_counter()
        try:
            yield
        except Exception as error:
            if isinstance(error, IldlabError) or not out_of_memory(error):
                raise
            raise SessionError(
                f"Out of memory: cannot {action} here. The run is as it was; take fewer or shorter blocks, or a smaller "
                "batch_size, or free memory."
            ) from error
        finally:
            self._busy.release()

    def append(self, action: str, **fields: Any) -> Step:
        """Journal a step of today's student; `fields` as in `Journal.append`, `seconds` those of the action in hand."""
        seconds = time.perf_counter() - self._began if self._busy.locked() else 0.0
        return self.journal.append(action, layer_ids=self.student.layer_ids, seconds=seconds, **fields)

    def commit(self, action: str, changed: Sequence[int], **fields: Any) -> Step:
        """Journal a step that changed the weights of some layers, rounded to what is stored."""
        tensors = {}
        with torch.no_grad():
            for layer_id in changed:
                for name, parameter in self.student.layers[self.student.position(layer_id)].named_parameters():
                    stored = parameter.to(self.weights_dtype)
                    parameter.copy_(stored)
                    tensors[f"layer.{layer_id}.{name}"] = stored
        try:
            return self.append(action, tensors=tensors, **fields)
        except Exception:  # nothing was written
            self.restore()
            raise

    def restore(self) -> None:
        """Make today's student the one of the journal again, whatever was done to it since."""
        self.student = self.student_at(self.journal.head.step)


def load_split(
    config: SessionConfig,
    loaded: LoadedModel,
    split: str,
    seed: int | None = None,
    source: str | None = None,
    tokens: int = 0,
) -> TextBlocks:
    """Text blocks of a split as a config says, or of another seed or source; `tokens` asks for more than its own.

    Raises ModelError where they are longer than the model's window, or hold a token that its embedding lacks.
    """
    check_length(loaded.model, config.block)  # before a long text is read
    blocks = load_text(
        source or config.text_of(split),
        loaded.tokenizer,
        block=config.block,
        tokens=max(tokens, getattr(config, f"{split}_tokens")),
        split=split,
        seed=config.seed if seed is None else seed,
        text_column=config.text_column,
    )
    check_ids(loaded.model, blocks.tokens, loaded.tokenizer)
    return blocks


def text_record(blocks: TextBlocks) -> dict[str, Any]:
    """What a journal says of the text that a step used; `bos` are the ids that open each block, where any do."""
    told = {"source": blocks.source, "fingerprint": blocks.fingerprint, "bos": list(blocks.bos)}
    return told | ({"note": blocks.note} if blocks.note else {})
