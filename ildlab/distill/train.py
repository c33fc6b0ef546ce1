"""Distill a student from its teacher: `Trainer` takes optimizer steps, `distill_steps` is the loop over them."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ildlab.distill.batches import GlobalBatch, global_batch
from ildlab.distill.checkpoint import identity, load_checkpoint, save_checkpoint
from ildlab.distill.config import DistillConfig, DistillResult
from ildlab.distill.masters import Masters, peak_memory, reset_peak_memory
from ildlab.distill.plan import Plan
from ildlab.distill.step import DistillStep
from ildlab.errors import DistillError, IldlabError, NotFiniteError, out_of_memory
from ildlab.files import write_atomic, writing
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, Work, blocking
from ildlab.typed import reading

SNAPSHOT = 16  # optimizer steps between copies of the weights that a step which is not finite falls back to
CHECKPOINT_SECONDS = 60.0  # between checkpoints, unless the config says how many steps


@reading(DistillError)
def distill_steps(
    student: LayerStack,
    teacher: LayerStack,
    blocks: Any,
    config: DistillConfig | None = None,
    *,
    gap: int | list[int] = (),
    checkpoint: Path | str | None = None,
    metrics_path: Path | str | None = None,
) -> Work[DistillResult]:
    """Distill in place, yielding a record after each optimizer step.

    Layers that train get weights of their own first, so a teacher that the student shares weights with
    never changes. Closing the generator, or an exception, leaves the student with its last good weights (of at
    most 16 steps earlier, where the loss stopped being finite) and with `requires_grad` False everywhere.

    Parameters
    ----------
    student, teacher : LayerStack
        Of the same width and vocabulary; the student without the removed layers.
    blocks : TextBlocks, Tensor [N, T] of int, or mapping with `input_ids` and `attention_mask` [N, T]
        Training text. The order of rows is a function of the seed alone.
    config : DistillConfig
    gap : int or sequence of int
        Layer ids just removed; scopes are told from them.
    checkpoint : path, optional
        A file for exact resume: where it holds a part of this very distillation, that is carried on from.
    metrics_path : path, optional
        A JSONL file; one record a line, as in `DistillResult.history`.

    Raises
    ------
    DistillError
        The scope or text does not fit; the checkpoint belongs to something else.
    NotFiniteError
        The loss or its gradient stopped being finite (the message says where, and what to try).
    FileError
        Checkpoint or metrics could not be written.
    """
    plan = Plan.of(student, teacher, blocks, config, gap)
    state = _processes(student.device)
    plan.check_processes(state.num_processes)
    name = identity(student, teacher, plan.text.fingerprint, plan.config, plan.trained, plan.gaps)
    resumed = load_checkpoint(checkpoint, name) if checkpoint else None
    student.model.requires_grad_(False)
    teacher.model.requires_grad_(False)
    student.own(plan.trained)
    try:
        trainer = Trainer(student, teacher, plan, state)
        if resumed:
            resumed.restore(trainer.masters, trainer.optimizer)
            trainer.take_up(resumed.history, resumed.seconds)
        if not state.is_main_process:
            checkpoint = metrics_path = None  # the first process writes
        if metrics_path:
            write_atomic(metrics_path, "".join(json.dumps(r) + "\n" for r in trainer.history))
        saved = time.perf_counter()
        while trainer.done < plan.steps:
            record = trainer.step(global_batch(trainer.done, plan.text, plan.config))
            if metrics_path:
                with writing(metrics_path), open(metrics_path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            every = plan.config.checkpoint_every
            due = trainer.done % every == 0 if every else time.perf_counter() - saved > CHECKPOINT_SECONDS
            if checkpoint and (due or trainer.done == plan.steps):
                save_checkpoint(checkpoint, name, trainer.masters, trainer.optimizer, trainer.history, trainer.seconds)
                saved = time.perf_counter()
            yield Progress(trainer.done, plan.steps, step_note(record), record)
        return plan.result(trainer.history, trainer.seconds, peak_memory(student.device))
    except Exception as error:
        if isinstance(error, IldlabError) or not out_of_memory(error):
            raise
        raise DistillError(
            "Out of memory, with a single sequence in a micro-batch too: take shorter blocks, train fewer layers (scope), "
            "or sample positions (kl_positions)."
        ) from error
    finally:
        for param in student.model.parameters():
            param.grad = None
        student.model.requires_grad_(False)


distill = blocking(distill_steps)


class Trainer:
    """What a distillation carries from step to step: weights, optimizer, history; and the step itself.

    The student's trained layers hold weights of their own; `state` says which of how many processes this is.
    """

    def __init__(self, student: LayerStack, teacher: LayerStack, plan: Plan, state):
        self.plan, self.state = plan, state
        self.micro_batch, self._notes = plan.config.micro_batch, []  # halved where memory does not do
        self.masters = Masters(student, plan.trained)
        self.loss = DistillStep(student, teacher, plan.trained, plan.points, plan.config)
        rows, block = plan.text.tokens.shape
        if plan.steps * plan.config.batch_size > rows:  # more than one pass over the text
            self.loss.keep_bottoms(rows, block)
        fused = student.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(self.masters.tensors, weight_decay=0.0, fused=fused)
        # What a local stage that does harm falls back to.
        self.start = self.masters.copy() if plan.local_steps and plan.config.kl_weight else []
        reset_peak_memory(student.device)
        self.take_up([], 0.0)

    def take_up(self, history: list[dict], seconds: float) -> None:
        """Go on from these records; the weights are those of now."""
        self.history = history
        self.good = self.masters.copy()
        self._began = time.perf_counter() - seconds

    @property
    def done(self) -> int:
        """Optimizer steps so far."""
        return len(self.history)

    @property
    def seconds(self) -> float:
        """Time so far, resumed parts included."""
        return time.perf_counter() - self._began

    def step(self, batch: GlobalBatch) -> dict[str, float | None]:
        """Take one optimizer step and return its record.

        Raises NotFiniteError before the update, so that a bad step changes nothing, with the last good weights.
        """
        config, masters = self.plan.config, self.masters
        self._notes = []
        if batch.step == self.plan.local_steps:  # what Adam knows of the local loss says nothing of the other
            self.optimizer.state.clear()
            self._check_local(batch)
        sums = self._fitting(lambda: self._accumulate(batch))  # [6 + points]
        if self.state.num_processes > 1:
            # Each loss is divided by the tokens of the whole batch, so gradients add up. In fp32, and once a step: DDP would
            # add micro-batches and processes in the model's own dtype, and a bf16 model would follow another curve.
            masters.sum_gradients()
            torch.distributed.all_reduce(sums)
        norm = torch.nn.utils.clip_grad_norm_(masters.tensors, config.clip or math.inf)
        values = torch.cat([sums, norm.float()[None].to(sums.device)]).tolist()  # [7 + points]; the one host sync
        if not all(map(math.isfinite, values)):
            masters.write(self.good)
            raise NotFiniteError(_not_finite(batch.step, values, self.plan))
        if batch.step % SNAPSHOT == 0:
            self.good = []  # freed first, so that there is one copy at a time
            self.good = masters.copy()
        rate = learning_rate(self.plan, batch.step)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        masters.push()
        local = self.plan.local_steps
        began = self.history[local - 1]["seconds"] if 0 < local <= batch.step else 0.0  # of this stage
        record = _record(batch, values, self.plan, rate, self.seconds, began)
        self.history.append(record | ({"note": "; ".join(self._notes)} if self._notes else {}))
        return self.history[-1]

    def _fitting(self, work: Callable[[], Tensor]) -> Tensor:
        """Run work on a batch, with micro-batches half as large, which changes no result, where it is out of memory."""
        while True:
            share = self.plan.config.batch_size // self.state.num_processes
            now = min(self.micro_batch or share, share)
            try:
                return work()
            except Exception as error:
                if not out_of_memory(error) or now == 1:
                    raise
            # Out of the except block: the traceback no longer holds the failed batch's tensors.
            self.micro_batch = now // 2
            self._notes.append(f"out of memory: micro_batch lowered to {self.micro_batch}")
            self.optimizer.zero_grad()
            for param in self.masters.params:
                param.grad = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _check_local(self, batch: GlobalBatch) -> None:
        """Take the local stage back where it made the KL of this batch worse.

        Near hidden states are not always near logits: the first token of a text is an attention sink in many models, with a
        norm a hundred times the others', and a run that ends where this is made may miss it.
        """
        start, self.start = self.start, []
        if not start:
            return
        after, now = self._kl(batch), self.masters.copy()
        self.masters.write(start)
        before = self._kl(batch)
        if after > before:
            self.good = self.masters.copy()  # what a step that is not finite goes back to
            self._notes.append(f"the local stage did harm (KL {before:.3f} to {after:.3f}) and was taken back")
        else:
            self.masters.write(now)

    @torch.no_grad()
    def _kl(self, batch: GlobalBatch) -> float:
        """KL to the teacher on a global batch, in nats a token."""

        def mine() -> Tensor:
            total = torch.zeros((), device=self.loss.squares.device)
            for part in self._parts(batch):
                positions = batch.positions[part] if batch.positions is not None else None  # [B, P]
                found = self.loss(self.plan.text.batch(batch.rows[part]), batch.counts, positions)[1]  # [3 + points]
                total += found[0].to(total.device)
            return total

        total = self._fitting(mine)
        if self.state.num_processes > 1:
            torch.distributed.all_reduce(total)
        return float(total) / batch.counts.kl

    def _accumulate(self, batch: GlobalBatch) -> Tensor:
        """Leave the gradient of a process's part of the global batch in the masters; return its sums [6 + points].

        Loss, divergence, cross entropy, agreeing tokens, the distance at each point, and the squared norms of
        the gradients that divergence and hidden states send into the student.
        """
        squares = self.loss.squares.zero_()
        sums: Tensor | float = 0.0
        for part in self._parts(batch):
            rows = batch.rows[part]  # [B]
            positions = batch.positions[part] if batch.positions is not None else None  # [B, P]
            if batch.step < self.plan.local_steps:
                loss, stats = self.loss.local(self.plan.text.batch(rows), batch.counts, rows)
            else:
                loss, stats = self.loss(self.plan.text.batch(rows), batch.counts, positions, rows)
            loss.backward()
            self.masters.gather()
            sums = sums + torch.cat([loss.detach()[None], stats.detach()])  # [1] + [3 + points]
        return torch.cat([sums, squares.to(sums)])  # [4 + points] + [2]

    def _parts(self, batch: GlobalBatch) -> list[list[int]]:
        return batch.parts(self.state.process_index, self.state.num_processes, self.micro_batch)


def _processes(device: torch.device):
    if "WORLD_SIZE" not in os.environ:  # no launcher started this process: it is alone, and needs no accelerate
        return SimpleNamespace(num_processes=1, process_index=0, is_main_process=True)
    from accelerate import PartialState
    from accelerate.state import is_initialized

    # Only the first to ask in a process may say that it means the CPU; later ones share its state.
    return PartialState(**({"cpu": True} if device.type == "cpu" and not is_initialized() else {}))


def learning_rate(plan: Plan, step: int) -> float:
    """Learning rate of a step, counted from 0: in each stage a linear rise, then the schedule."""
    config, local = plan.config, plan.local_steps
    step, total, peak = step - local, plan.steps - local, config.learning_rate
    if step < 0:  # a few dozen steps at the rate of hundreds leave a student worse than they found it
        step, total, peak = step + local, local, config.local_rate or min(2e-3, 2e-5 * local)
    rising = max(1, round(config.warmup * total))
    if step < rising:
        return peak * (step + 1) / rising
    gone = (step - rising) / max(1, total - rising)
    falls = {"constant": 1.0, "linear": 1 - gone, "cosine": (1 + math.cos(math.pi * gone)) / 2}
    return peak * falls[config.schedule]


def _record(batch: GlobalBatch, values: list[float], plan: Plan, rate: float, seconds: float, began: float) -> dict:
    """A step's record; a term that is not part of the loss was not computed, and is None."""
    config, counts = plan.config, batch.counts
    local = batch.step < plan.local_steps
    points = plan.points_at(batch.step)
    loss, kl, ce, agree, *distances, square_kl, square_hidden, norm = values
    grad_kl, grad_hidden = math.sqrt(square_kl), math.sqrt(square_hidden)
    tokens = (batch.step + 1) * plan.step_tokens
    return {
        "step": batch.step + 1,
        "stage": "local" if local else "joint",
        "tokens": tokens,
        "loss": loss,
        "kl": kl / counts.kl if config.kl_weight and not local else None,
        "hidden": sum(distances) / counts.hidden if points else None,
        **{f"hidden_{i}": d / counts.hidden for i, d in zip(points, distances, strict=True)},
        "ce": ce / counts.ce if config.ce_weight and not local else None,
        "agreement": agree / counts.kl if config.kl_weight and not local else None,
        "grad_norm": norm,
        "grad_kl": grad_kl,
        "grad_hidden": grad_hidden,
        "kl_share": grad_kl / (grad_kl + grad_hidden) if grad_kl + grad_hidden else None,
        "learning_rate": rate,
        "seconds": seconds,
        "tokens_per_second": (tokens - (0 if local else plan.local_steps * plan.step_tokens)) / (seconds - began),
    }


def step_note(record: Mapping[str, Any]) -> str:
    """A step's record in one short line: the loss, the terms that it has, and the speed."""
    terms = [f"{name} {record[name]:.4f}" for name in ("loss", "kl", "hidden") if record[name] is not None]
    said = [record["note"]] if record.get("note") else []
    return ", ".join([*terms, f"{record['tokens_per_second']:.0f} tokens/s", *said])


def _not_finite(step: int, values: list[float], plan: Plan) -> str:
    _, kl, ce, _, *distances, _, _, _ = values
    lower = f"lower {'local_rate' if step < plan.local_steps else 'learning_rate'}"
    bad = [i for i, d in zip(plan.points_at(step), distances, strict=True) if not math.isfinite(d)]
    if bad:
        cause = f"the hidden states after layers {bad} overflowed: {lower}, or load in bf16 or fp32"
    elif not math.isfinite(kl + ce):
        cause = f"the logits overflowed (logit scaling): {lower}, or load in bf16 or fp32, not fp16"
    else:
        cause = f"only the gradient did: {lower}, set clip, or raise temperature"
    return (
        f"The loss stopped being finite at step {step + 1} (learning rate {learning_rate(plan, step):.3g}); most likely "
        f"{cause}. Weights of at most {SNAPSHOT} steps earlier are kept."
    )
