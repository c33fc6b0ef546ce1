"""`PruningSession`: the loop measure -> remove -> distill -> evaluate as journaled, undoable steps.

Every action that takes long has a twin that is a generator of `Progress` (`measure_steps`, ...): the
plain call drives it with a bar, the stepper from a worker thread. A step is journaled when it is
whole; a process killed in the middle of one loses that step only, and distillation goes on from its
last checkpoint.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ildlab.distill.config import DistillConfig
from ildlab.errors import JournalError, SessionError
from ildlab.evaluate.text_quality import Evaluation
from ildlab.importance.scores import LayerScores
from ildlab.model.load import LoadedModel, load_model
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, drive
from ildlab.session import actions
from ildlab.session.config import SessionConfig, fingerprint, storage_dtype
from ildlab.session.export import check_describable
from ildlab.session.journal import CHANGES_STUDENT, Journal, Step
from ildlab.session.loop import RunSettings, run_steps
from ildlab.session.tables import history_table, losses_table
from ildlab.text.blocks import TextBlocks, load_text

if TYPE_CHECKING:
    import pandas as pd


class PruningSession:
    """One run: a frozen teacher, the student it is pruned to, and the journal of how.

    Make one with `create` or `open`. Attributes: `teacher` and `student` (`LayerStack`), `tokenizer`,
    `config` (`SessionConfig`), `folder`, `scores` (the latest `LayerScores` of today's student, or None).
    """

    def __init__(self, journal: Journal, loaded: LoadedModel):
        self.journal = journal
        self.folder = journal.folder
        known = {k: v for k, v in journal.config["settings"].items() if k in SessionConfig.__dataclass_fields__}
        self.config = SessionConfig(**known)
        self.loaded = loaded
        self.tokenizer = loaded.tokenizer
        self.teacher = LayerStack(loaded.model)
        self._text: dict[tuple[str, int, str, int], TextBlocks] = {}
        self._action, self._busy = "", threading.Lock()
        self.student = self.teacher.share()

    # ------------------------------------------------------- making, opening

    @classmethod
    def create(
        cls,
        folder: str | Path,
        teacher: str | LoadedModel = "smollm2-135m",
        *,
        dtype: str = "auto",
        device: str = "auto",
        **settings: Any,
    ) -> PruningSession:
        """Start a run in a new folder.

        Parameters
        ----------
        folder : path
            New or empty.
        teacher : str or LoadedModel
        dtype, device : str
            As in `load_model`.
        **settings
            Fields of `SessionConfig`. `distill` may be a `DistillConfig`.

        Raises
        ------
        SessionError, ModelError, ExportError, TextError, JournalError
            Before anything is written, where an argument is wrong, or the model cannot lose a layer.
        """
        given = isinstance(teacher, LoadedModel)
        config = SessionConfig.of(teacher.name if given else teacher, settings)  # before the model is loaded
        loaded = teacher if given else load_model(teacher, dtype=dtype, device=device)
        config = replace(config, teacher=loaded.name)
        stack = LayerStack(loaded.model)
        check_describable(stack)
        load_text(
            config.text,
            loaded.tokenizer,
            block=config.block,
            tokens=config.calibration_tokens,
            seed=config.seed,
            text_column=config.text_column,
        )
        if config.eval_text is not None:
            load_text(
                config.eval_text,
                loaded.tokenizer,
                block=config.block,
                tokens=config.eval_tokens,
                split="eval",
                seed=config.seed,
                text_column=config.text_column,
            )
        journal = Journal.create(
            folder,
            {
                "ildlab_run": 1,
                "teacher": loaded.name,
                "fingerprint": fingerprint(stack),
                "layers": len(stack),
                "weights_dtype": str(storage_dtype(stack)).removeprefix("torch."),
                "settings": asdict(config),
            },
        )
        journal.append("create", layer_ids=stack.layer_ids, args={"teacher": loaded.name}, seed=config.seed)
        return cls(journal, loaded)

    @classmethod
    def open(
        cls, folder: str | Path, teacher: str | LoadedModel | None = None, *, dtype: str = "auto", device: str = "auto"
    ) -> PruningSession:
        """Go on with a run, at the step where it stood.

        Parameters
        ----------
        folder : path
        teacher : str or LoadedModel, optional
            Where the teacher is now, if not under the name that the run was made with.

        Raises
        ------
        JournalError
            No run there, another session has it open, or it is another teacher's.
        """
        journal = Journal.open(folder)
        try:
            name = teacher or journal.config["teacher"]
            loaded = name if isinstance(name, LoadedModel) else load_model(name, dtype=dtype, device=device)
            if not journal.steps:  # killed between config.json and the first line
                stack = LayerStack(loaded.model)
                journal.append("create", layer_ids=stack.layer_ids, args={"teacher": loaded.name})
            session = cls(journal, loaded)
            found = fingerprint(session.teacher)
            if found != journal.config["fingerprint"]:
                raise JournalError(
                    f"{folder} holds a run of another teacher ({journal.config['teacher']!r}, fingerprint "
                    f"{journal.config['fingerprint'][:12]}) than {loaded.name!r} ({found[:12]}). "
                    "Open it with that teacher, or start a run in another folder."
                )
            session.student = session.student_at(journal.head.step)
        except BaseException:
            journal.close()
            raise
        return session

    def close(self) -> None:
        """Let go of the run folder, so that another session may open it."""
        self.journal.close()

    def __enter__(self) -> PruningSession:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    # ---------------------------------------------------------------- looking

    @cached_property
    def weights_dtype(self) -> torch.dtype:
        """dtype that changed weights are rounded to and stored in, and of exported checkpoints."""
        if self.config.weights_dtype != "auto":
            return getattr(torch, self.config.weights_dtype)
        # Settled once: the folder may be opened on a machine that loads the teacher in another dtype.
        return getattr(torch, self.journal.config["weights_dtype"])

    @contextmanager
    def acting(self, action: str) -> Iterator[None]:
        """Hold the session for one action: two at a time would work on a student that the other one changes.

        Raises
        ------
        SessionError
            Another action is in hand: in the stepper, in another thread, or a generator that was begun and
            neither ended nor closed.
        """
        if not self._busy.acquire(blocking=False):
            raise SessionError(
                f"Cannot {action} now: the session is in the middle of {self._action}. Let it end, or stop it first "
                "(a generator such as distill_steps() is stopped by its close())."
            )
        self._action = action
        try:
            yield
        finally:
            self._busy.release()

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
    def scores(self) -> LayerScores | None:
        """Latest scores of today's student; None where it changed since it was measured."""
        for step in reversed(self.path):
            if step.action == "measure":
                return LayerScores.from_dict(step.result["scores"])
            if step.action in CHANGES_STUDENT:
                return None
        return None

    @property
    def latest_scores(self) -> LayerScores | None:
        """The last scores on the way to today's student, though it may have changed since; or None."""
        measured = [step for step in self.path if step.action == "measure"]
        return self.scores_at(measured[-1].step) if measured else None

    @property
    def trained(self) -> list[int]:
        """Layer ids of the student whose weights are no longer the teacher's."""
        return _own_layers(self.student, self.teacher)

    @property
    def evaluation(self) -> Evaluation | None:
        """Latest evaluation of today's student; None where it changed since."""
        for step in reversed(self.path):
            if step.action == "evaluate":
                return Evaluation.from_dict(step.result["evaluation"])
            if step.action in CHANGES_STUDENT:
                return None
        return None

    def text(self, split: str, source: str | None = None, tokens: int | None = None) -> TextBlocks:
        """The run's text blocks of a split (`"calibration"`, `"train"` or `"eval"`), or another source's.

        Training text is drawn anew after each removal, so that a longer run sees more text; the others
        stay the same, so that scores and evaluations compare. `tokens` asks for more than the run's.
        """
        seed = self._seed() if split == "train" else self.config.seed
        source = source or (split == "eval" and self.config.eval_text) or self.config.text
        tokens = max(tokens or 0, getattr(self.config, f"{split}_tokens"))
        key = (split, seed, source, tokens)
        if key not in self._text:
            # One text a split is kept: an old iteration's training text is not needed again.
            self._text = {other: kept for other, kept in self._text.items() if other[0] != split}
            self._text[key] = load_text(
                source,
                self.tokenizer,
                block=self.config.block,
                tokens=tokens,
                split=split,
                seed=seed,
                text_column=self.config.text_column,
            )
        return self._text[key]

    def student_at(self, step: int) -> LayerStack:
        """The student as it was at a step; it shares with the teacher every weight that did not change."""
        record = self.journal.path_to(step)[-1]
        student = self.teacher.share()
        for layer_id in self.teacher.layer_ids:
            if layer_id not in record.layer_ids:
                student.remove(layer_id)
        tensors = self.journal.tensors_at(step)
        changed = sorted({int(name.split(".")[1]) for name in tensors} & set(record.layer_ids))
        student.own(changed)
        for layer_id in changed:
            layer = student.layers[student.position(layer_id)]
            with torch.no_grad():
                for name, parameter in layer.named_parameters():
                    parameter.copy_(tensors[f"layer.{layer_id}.{name}"])
        return student

    def losses(self) -> pd.DataFrame:
        """Losses of every distillation so far, end to end; see `ildlab.session.tables.losses_table`."""
        return losses_table(self)

    def scores_at(self, step: int) -> LayerScores:
        """The scores that a `measure` step found."""
        record = self.journal.path_to(step)[-1]
        if record.action != "measure":
            raise SessionError(f"Step {step} is a {record.action}, not a measure: it has no scores.")
        return LayerScores.from_dict(record.result["scores"])

    def generate(self, prompt: str, *, who: str = "student", tokens: int = 40) -> str:
        """Greedy continuation of a prompt by today's `"student"` or by the `"teacher"`, prompt included."""
        from ildlab.model.generate import greedy

        stack = self.teacher if who == "teacher" else self.student
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        if ids.shape[1] == 0:
            raise SessionError("The prompt is empty: give it at least one word.")
        with self.acting("generate"):
            return self.tokenizer.decode(greedy(stack.model, ids.to(stack.device), tokens=tokens)[0])

    def __repr__(self) -> str:
        return (
            f"PruningSession({str(self.folder)!r}, teacher {self.config.teacher!r}, "
            f"{len(self.student)} of {len(self.teacher)} layers, step {self.journal.head.step})"
        )

    def _repr_html_(self) -> str:
        from html import escape

        table = self.history().to_html(index=False, float_format=lambda v: f"{v:.4g}", na_rep="", border=0)
        return f"<code>{escape(repr(self))}</code>{self.student._repr_html_()}{table}"

    def history(self) -> pd.DataFrame:
        """One row an iteration, the teacher first; see `ildlab.session.tables.history_table`."""
        return history_table(self)

    # ---------------------------------------------------------------- acting

    def measure_steps(self, metric: str | None = None, **options: Any) -> Generator[Progress, None, LayerScores]:
        """Score today's layers; see `measure`."""
        return actions.measure(self, metric, options)

    def measure(self, metric: str | None = None, *, show: bool | None = None, **options: Any) -> LayerScores:
        """Score today's layers on the calibration text, and journal the scores.

        Parameters
        ----------
        metric : str, optional
            By default the run's.
        **options
            As in `ildlab.measure`: `race`, `positions`, `batch_size`, `seed`, ...
        """
        return drive(self.measure_steps(metric, **options), desc="measure", show=show)

    def remove(self, layer_id: int | None = None) -> int:
        """Remove a layer from the student, by default the least important one by the latest scores.

        Returns
        -------
        int
            The layer id removed.

        Raises
        ------
        SessionError
            The layer is gone already, is the last one, or none was named and nothing was measured.
        """
        scores = self.scores
        if layer_id is None:
            if scores is None:
                raise SessionError(
                    "The student changed since it was last measured: measure() first, or say which layer_id to remove."
                )
            layer_id = int(scores.least_important)
        self.student.position(layer_id)
        if len(self.student) == 1:
            raise SessionError("The student has one layer left; it cannot be removed.")
        score = None
        if scores is not None and layer_id in scores.table.index:
            score = float(scores.table.loc[layer_id, "score"])
        left = [i for i in self.student.layer_ids if i != layer_id]
        with self.acting("remove a layer"):
            # The journal first: if it cannot be written, the student has not changed either.
            self.journal.append(
                "remove",
                layer_ids=left,
                args={"layer_id": layer_id, "score": score, "metric": scores.metric if scores else None},
                seed=self._seed(),
            )
            self.student.remove(layer_id)
        return layer_id

    def distill_steps(
        self,
        config: DistillConfig | None = None,
        *,
        text: str | None = None,
        gap: Sequence[int] | None = None,
        **changes: Any,
    ) -> Generator[Progress, None, Any]:
        """Distill the student; see `distill`. Closing it keeps what was trained so far, as a step."""
        config = config or DistillConfig.from_dict(self.config.distill)
        if changes:
            config = DistillConfig.from_dict({**config.to_dict(), **changes})
        return actions.distill(self, config, text, gap)

    def distill(
        self,
        config: DistillConfig | None = None,
        *,
        text: str | None = None,
        gap: Sequence[int] | None = None,
        show: bool | None = None,
        **changes: Any,
    ):
        """Distill the student from the teacher on the train text, and journal the changed weights.

        Parameters
        ----------
        config : DistillConfig, optional
            By default the run's.
        text : str, optional
            Another source of `load_text` to train on in this step.
        gap : sequence of int, optional
            Removed layers that "neighbours" and "window(k)" are counted from (a suffix begins at the lowest
            layer ever removed). By default those removed since the last distillation.
        **changes
            Fields of the config to change for this step. `tokens` above the run's `train_tokens` draws more text;
            without a `seed` (None), data order follows the place in the run.

        Returns
        -------
        DistillResult

        Raises
        ------
        DistillError
            The loss stopped being finite; the student is again as it was before the step.
        """
        return drive(self.distill_steps(config, text=text, gap=gap, **changes), desc="distill", show=show)

    def evaluate_steps(
        self, suite: str | bool | None = None, *, cache: Path | None = None, undistilled: bool = True, **options: Any
    ) -> Generator[Progress, None, Evaluation]:
        """Evaluate today's student; see `evaluate`."""
        return actions.evaluate(self, suite, cache, undistilled, options)

    def evaluate(
        self, suite: str | bool | None = None, *, undistilled: bool = True, show: bool | None = None, **options: Any
    ) -> Evaluation:
        """Judge today's student against the teacher, and journal the result.

        Parameters
        ----------
        suite : str, optional
            By default the run's; False for the eval text alone.
        undistilled : bool
            Evaluate the teacher without the same layers, never distilled, as well.
        **options
            As in `ildlab.evaluate.text_quality.evaluate_steps`.
        """
        work = self.evaluate_steps(suite, undistilled=undistilled, **options)
        return drive(work, desc="evaluate", show=show)

    def undo(self, to: int | None = None, *, reason: str = "") -> Step:
        """Go back: by default to before the latest change of the student. Nothing is deleted.

        Parameters
        ----------
        to : int, optional
            Step to go to; it may also be one that was undone before, to take it again.

        Returns
        -------
        Step
            The step at which the student now stands.
        """
        if to is None:
            changes = [step for step in self.path if step.action in CHANGES_STUDENT]
            if not changes:
                raise SessionError("There is nothing to undo: the student is still the teacher.")
            to = changes[-1].parent
        if not 0 <= to < len(self.steps):
            raise SessionError(f"There is no step {to}: the journal has steps 0 to {len(self.steps) - 1}.")
        if self.steps[to].action == "undo":
            raise SessionError(f"Step {to} is itself an undo: go to step {self.steps[to].args['to']} instead.")
        with self.acting("undo"):
            student = self.student_at(to)
            self.journal.append("undo", layer_ids=student.layer_ids, args={"to": to, "reason": reason})
            self.student = student
        return self.journal.head

    def branch(self, folder: str | Path, step: int | None = None) -> PruningSession:
        """A second run that shares this one's past up to a step, in a folder of its own."""
        step = self.journal.head.step if step is None else step
        chain = self.journal.path_to(step)
        other = Journal.create(folder, {**self.journal.config, "branched_from": [str(self.folder), step]})
        for number, record in enumerate(chain):
            tensors = None
            if record.weights is not None:
                from safetensors.torch import load_file

                tensors = load_file(self.folder / "weights" / record.weights)
            other.append(
                record.action,
                layer_ids=record.layer_ids,
                args=record.args,
                result=record.result,
                tensors=tensors,
                seed=record.seed,
                seconds=record.seconds,
            )
            assert other.steps[-1].step == number
            curves = self.folder / "metrics" / f"{record.step:03d}.jsonl"
            if curves.is_file():
                (other.folder / "metrics").mkdir(exist_ok=True)
                shutil.copyfile(curves, other.folder / "metrics" / f"{number:03d}.jsonl")
        session = PruningSession(other, self.loaded)
        session.student = session.student_at(other.head.step)
        return session

    def export(self, path: str | Path) -> Path:
        """Write today's student as a plain Hugging Face checkpoint, and prove it by loading it again."""
        from ildlab.session.export import export

        with self.acting("export"):
            started = time.perf_counter()
            where, verdict = export(self, path)
            self._append(
                "export",
                args={"path": str(path)},
                result={"verdict": str(verdict), **asdict(verdict)},
                seconds=time.perf_counter() - started,
            )
        return where

    # ---------------------------------------------------------------- the loop

    def run_steps(
        self,
        target_layers: int | None = None,
        max_loss: float | None = None,
        *,
        distill: bool = True,
        suite: str | None = None,
        final: dict[str, Any] | None = None,
    ) -> Generator[Progress, None, pd.DataFrame]:
        """Run the loop; see `run`."""
        return run_steps(self, RunSettings(target_layers, max_loss, distill, suite, final or None))

    def run(
        self,
        target_layers: int | None = None,
        max_loss: float | None = None,
        *,
        distill: bool = True,
        suite: str | None = None,
        final: dict[str, Any] | None = None,
        show: bool | None = None,
    ) -> pd.DataFrame:
        """The whole method: measure, remove, distill, evaluate, until one of the paper's stop rules holds.

        Parameters
        ----------
        target_layers : int, optional
            Stop when the student has this many layers.
        max_loss : float, optional
            Stop when the quality loss passes this (0 .. 1): the step that did is undone, and the last
            good student kept. With a suite: 1 - aggregate of the student / that of the teacher; without:
            1 - perplexity of the teacher / that of the student.
        distill : bool
            False for pruning alone, the paper's baseline.
        suite : str, optional
            By default the run's.
        final : dict, optional
            Fields of `DistillConfig` for one more distillation once `target_layers` is reached, with the scope
            counted from all the layers that were removed, such as `{"tokens": 150_000, "learning_rate": 7e-4}`.

        Called with neither on a run that was interrupted, it goes on with the earlier settings.

        Returns
        -------
        DataFrame
            `history()`.
        """
        work = self.run_steps(target_layers, max_loss, distill=distill, suite=suite, final=final)
        return drive(work, desc="run", show=show)

    # --------------------------------------------------------------- insides

    def _seed(self) -> int:
        # A function of the place in the run alone, so that a resumed run draws what an unbroken one draws.
        return self.config.seed + 1000 * len(self.removed)

    def _append(self, action: str, **fields: Any) -> Step:
        return self.journal.append(action, layer_ids=self.student.layer_ids, **fields)


# ---------------------------------------------------------------- helpers


def _own_layers(student: LayerStack, teacher: LayerStack) -> list[int]:
    """Layer ids whose weights are no longer the teacher's."""
    own = []
    for layer_id, layer in zip(student.layer_ids, student.layers, strict=True):
        mine = next(layer.parameters())
        if mine.data_ptr() != next(teacher.layers[teacher.position(layer_id)].parameters()).data_ptr():
            own.append(layer_id)
    return own
