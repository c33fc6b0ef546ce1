"""Distill a student from its teacher: a generator of progress over optimizer steps.

`python -m ildlab.distill CONFIG`, also under `accelerate launch`, runs the same loop from a JSON file.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ildlab.distill.config import DistillConfig, DistillResult, match_points, resolve_scope
from ildlab.distill.masters import (
    Masters,
    identity,
    load_checkpoint,
    memory_parts,
    peak_memory,
    reset_peak_memory,
    save_checkpoint,
    weights_hash,
)
from ildlab.distill.step import Counts, DistillStep
from ildlab.errors import DistillError, NotFiniteError
from ildlab.files import write_atomic
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, Work, drive

__all__ = ["DistillConfig", "DistillResult", "distill", "distill_steps", "resolve_scope"]

_SNAPSHOT = 16  # optimizer steps between copies of the weights that a step which is not finite falls back to
_SECONDS = 60.0  # between checkpoints, unless the config says how many steps


def distill(
    student: LayerStack,
    teacher: LayerStack,
    blocks: Any,
    config: DistillConfig | None = None,
    *,
    gap: int | Sequence[int] = (),
    show: bool | None = None,
    **options: Any,
) -> DistillResult:
    """Run `distill_steps` to its end, with a bar."""
    work = distill_steps(student, teacher, blocks, config, gap=gap, **options)
    return drive(work, desc="distill", show=show)


def distill_steps(
    student: LayerStack,
    teacher: LayerStack,
    blocks: Any,
    config: DistillConfig | None = None,
    *,
    gap: int | Sequence[int] = (),
    checkpoint: Path | str | None = None,
    metrics_path: Path | str | None = None,
    cache: Any = None,
) -> Work[DistillResult]:
    """Distill in place, yielding a record after each optimizer step.

    Layers that train get weights of their own first, so a teacher that the student shares weights with
    never changes. Closing the generator, or an exception, leaves the student with its last good weights
    and with `requires_grad` False everywhere.

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
    cache : TeacherCache, optional
        Of this teacher and these blocks.

    Yields
    ------
    Progress
        `partial` is the step's record.

    Returns
    -------
    DistillResult

    Raises
    ------
    DistillError
        The config, scope or text does not fit; the checkpoint belongs to something else.
    NotFiniteError
        The loss or its gradient stopped being finite (the message says where, and what to try).
    """
    config = config or DistillConfig()
    config.check()
    ids, mask, fingerprint = _as_rows(blocks)
    gaps = [gap] if isinstance(gap, int) else sorted(gap)
    _check_pair(student, teacher)
    trained = resolve_scope(config.scope, student, gaps)
    points = match_points(config, student, trained)
    elsewhere = [i for i in trained if any(p.is_meta for p in student.layers[student.position(i)].parameters())]
    if elsewhere:
        raise DistillError(
            f"The weights of layers {elsewhere} are offloaded (device_map): they can be measured, but not trained. Load the "
            "model without device_map, or with these layers on a device."
        )
    rows, block = ids.shape
    tokens = config.tokens or rows * block
    total = math.ceil(tokens / (config.batch_size * block))
    if cache is not None:
        cache.check(teacher, fingerprint)

    accelerator = _accelerator(student.device, config, metrics_path)
    world, rank = accelerator.num_processes, accelerator.process_index
    if config.batch_size % world:
        raise DistillError(f"batch_size={config.batch_size} cannot be shared evenly by {world} processes.")
    if config.tracker and not accelerator.log_with:
        raise DistillError(
            f"tracker={config.tracker!r} is not installed here: pip install {config.tracker}, or leave it out (the "
            "JSONL metrics are always written)."
        )
    name = identity(config, trained, gaps, student.layer_ids, fingerprint, weights_hash(student, teacher))
    resumed = load_checkpoint(checkpoint, name) if checkpoint else None

    student.model.requires_grad_(False)
    teacher.model.requires_grad_(False)
    student.own(trained)
    masters = Masters(student, trained, config)
    try:
        module = DistillStep(student, teacher, trained, points, config)
        if cache is not None and not module.depths <= set(cache.depths):
            raise DistillError(
                f"The cache in {cache.folder} keeps the hidden states at depths {cache.depths}; this loss needs "
                f"{sorted(module.depths)}. Build it with depths={sorted(module.depths)}, or leave it out."
            )
        step_module = accelerator.prepare_model(module, device_placement=False) if world > 1 else module
        optimizer = torch.optim.AdamW(
            masters.groups(config.weight_decay),
            lr=config.learning_rate,
            betas=config.adam_betas,
            fused=student.device.type in ("cpu", "cuda"),
        )
        epochs = total * config.batch_size / rows
        kept = module.keep_bottoms(rows, block, config.bottom_bytes) if epochs > 1 else 0
        history, before, start = [], 0.0, 0
        if resumed:
            start, history, before = masters.restore(optimizer, resumed)
        if metrics_path and accelerator.is_main_process:
            write_atomic(metrics_path, "".join(json.dumps(r) + "\n" for r in history))
        if config.tracker:
            accelerator.init_trackers("ildlab")
        good = masters.copy()
        memory: dict[str, int] = {}
        reset_peak_memory(student.device)
        began = saved = time.perf_counter()
        for step in range(start, total):
            learning_rate = _learning_rate(config, step, total)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            index = _rows_of(step, rows, config)
            positions = _positions_of(step, index, block, mask, config)
            counts = _counts(index, block, mask, positions, config)
            module.squares.zero_()
            sums: Tensor | float = 0.0
            mine = list(range(rank, len(index), world))
            size = config.micro_batch or len(mine)
            parts = [mine[i : i + size] for i in range(0, len(mine), size)]
            for number, part in enumerate(parts):
                batch = {"input_ids": ids[index[part]].long()}
                if mask is not None:
                    batch["attention_mask"] = mask[index[part]]
                known = cache.get(index[part]) if cache is not None else None
                where = positions[part] if positions is not None else None
                # DDP averages over processes, while the loss is divided by the global count: hence `world`.
                quiet = contextlib.nullcontext() if number == len(parts) - 1 else accelerator.no_sync(step_module)
                measured = (
                    _ActivationMeter(memory, (student, teacher))
                    if step == start and not number
                    else contextlib.nullcontext()
                )
                with quiet:
                    with measured:
                        loss, stats = step_module(batch, counts, where, known, index[part])
                    (loss * world).backward()
                # Between processes, DDP reduces what the micro-batches left in the weights' own gradients.
                if world == 1 or number == len(parts) - 1:
                    masters.gather()
                sums = sums + torch.cat([loss.detach()[None], stats.detach()])
                del loss, stats
            squares = module.squares.to(sums.device) / world**2
            if world > 1:
                sums, squares = accelerator.reduce(sums, "sum"), accelerator.reduce(squares, "sum")
            norm = torch.nn.utils.clip_grad_norm_(masters.tensors, config.clip or math.inf)
            # The step's one host sync; it comes before the update, so that a bad step changes nothing.
            values = torch.cat([sums, squares, norm.float()[None].to(sums.device)]).tolist()
            if not all(map(math.isfinite, values)):
                masters.write(good)
                raise NotFiniteError(_not_finite(step, values, points, config))
            if step % _SNAPSHOT == 0:
                masters.copy(good)
            optimizer.step()
            masters.clear()
            masters.push()
            if step == start:
                memory.update(memory_parts(student, teacher, masters, optimizer, config, block))
                memory["bottoms"] = kept

            seconds = before + time.perf_counter() - began
            done = (step + 1) * config.batch_size * block
            record = _record(step, done, seconds, learning_rate, values, counts, points, config)
            history.append(record)
            if accelerator.is_main_process:
                if metrics_path:
                    with open(metrics_path, "a") as file:
                        file.write(json.dumps(record) + "\n")
                due = (
                    (step + 1) % config.checkpoint_every == 0
                    if config.checkpoint_every
                    else time.perf_counter() - saved > _SECONDS
                )
                if checkpoint and (due or step + 1 == total):
                    save_checkpoint(checkpoint, name, masters, optimizer, step + 1, history, seconds)
                    saved = time.perf_counter()
            if config.tracker:
                accelerator.log({k: v for k, v in record.items() if k != "step" and v is not None}, step=step)
            yield Progress(step + 1, total, step_note(record), record)
        memory["peak"] = peak_memory(student.device)
        seconds = before + time.perf_counter() - began
        frame = pd.DataFrame(history)
        return DistillResult(frame, trained, gaps, total * config.batch_size * block, total, seconds, memory, config)
    finally:
        masters.finish()
        student.model.requires_grad_(False)
        if config.tracker:
            accelerator.end_training()


# ------------------------------------------------------------------ inputs


def _as_rows(blocks: Any) -> tuple[Tensor, Tensor | None, str]:
    """Token ids [N, T], their mask or None, and a fingerprint of both."""
    from ildlab.distill.masters import fingerprint

    mask = None
    if isinstance(blocks, Mapping):
        ids, mask = blocks["input_ids"], blocks.get("attention_mask")
    else:
        ids = getattr(blocks, "tokens", blocks)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.numel() == 0 or ids.shape[1] < 2:
        raise DistillError("Training text has to be TextBlocks or an int tensor [N, T] with N >= 1 and T >= 2.")
    known = getattr(blocks, "fingerprint", None)
    return ids, mask, known or fingerprint(ids, mask)


def _check_pair(student: LayerStack, teacher: LayerStack) -> None:
    if student.model is teacher.model:
        raise DistillError("Student and teacher are the same model: make the student with teacher.share().")
    if student.hidden_size != teacher.hidden_size:
        raise DistillError(
            f"The student is {student.hidden_size} wide, the teacher {teacher.hidden_size}: they do not match."
        )
    missing = [i for i in student.layer_ids if i not in teacher.layer_ids]
    if missing:
        raise DistillError(f"The student has layers that the teacher lacks: {missing}.")


def _accelerator(device: torch.device, config: DistillConfig, metrics_path):
    from accelerate import Accelerator
    from accelerate.state import is_initialized

    folder = str(Path(metrics_path).parent) if metrics_path else "."
    # Dtypes are ours to choose (fp32 masters), so accelerate's autocast stays out.
    return Accelerator(
        # Only the first one in a process may say so; later ones share its state, and place nothing anyway.
        cpu=device.type == "cpu" and not is_initialized(),
        mixed_precision="no",
        log_with=config.tracker,
        project_dir=folder if config.tracker else None,
    )


# ---------------------------------------------------- functions of the step


def _learning_rate(config: DistillConfig, step: int, total: int) -> float:
    rising = max(1, round(config.warmup * total))
    if step < rising:
        return config.learning_rate * (step + 1) / rising
    gone = (step - rising) / max(1, total - rising)
    if config.schedule == "linear":
        return config.learning_rate * (1 - gone)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * gone))
    return config.learning_rate


def _generator(*numbers: int) -> torch.Generator:
    # Any process can make the generator of any step: resuming takes an integer.
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(mixed)


def _rows_of(step: int, rows: int, config: DistillConfig) -> Tensor:
    """Rows of a step's global batch: permutations of the text, one after another, cut to batches."""
    wanted = range(step * config.batch_size, (step + 1) * config.batch_size)
    orders = {e: torch.randperm(rows, generator=_generator(config.seed or 0, e)) for e in {i // rows for i in wanted}}
    return torch.stack([orders[i // rows][i % rows] for i in wanted])


def _positions_of(step, index, block, mask, config) -> Tensor | None:
    if config.kl_positions is None or config.kl_positions >= block:
        return None
    draw = torch.rand(len(index), block, generator=_generator(config.seed or 0, step, 7))
    if mask is not None:
        draw = draw.masked_fill(mask[index] == 0, -1.0)  # padding only where nothing else is left
    return draw.topk(config.kl_positions, dim=1).indices.sort(dim=1).values


def _counts(index, block, mask, positions, config) -> Counts:
    """What each term's sum over the global batch is divided by: tokens that count."""
    if config.reduction == "paper":  # where padding counts as well
        return Counts(len(index) * block, len(index) * block, 1)
    here = torch.ones(len(index), block) if mask is None else mask[index].float()
    follows = here * torch.cat([here[:, 1:], torch.zeros(len(index), 1)], dim=1)
    hidden = here.sum()
    if positions is not None:
        here, follows = here.gather(1, positions), follows.gather(1, positions)
    return Counts(max(1, int(hidden)), max(1, int(here.sum())), max(1, int(follows.sum())))


def _record(step, tokens, seconds, learning_rate, values, counts, points, config) -> dict[str, float | None]:
    """A step's record; a term that is not part of the loss was not computed, and is None."""
    loss, kl, ce, agree, *rest = values
    distances, (square_kl, square_hidden, norm) = rest[: len(points)], rest[len(points) :]
    grad_kl, grad_hidden = math.sqrt(square_kl), math.sqrt(square_hidden)
    return {
        "step": step + 1,
        "tokens": tokens,
        "loss": loss,
        "kl": kl / counts.kl if config.kl_weight else None,
        "hidden": sum(distances) / counts.hidden if points else None,
        **{f"hidden_{i}": d / counts.hidden for i, d in zip(points, distances, strict=True)},
        "ce": ce / counts.ce if config.ce_weight else None,
        "agreement": agree / counts.kl if config.kl_weight else None,
        "grad_norm": norm,
        "grad_kl": grad_kl,
        "grad_hidden": grad_hidden,
        "kl_share": grad_kl / (grad_kl + grad_hidden) if grad_kl + grad_hidden else None,
        "learning_rate": learning_rate,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def step_note(record: Mapping[str, Any]) -> str:
    """A step's record in one short line: the loss, the terms that it has, and the speed."""
    terms = [f"{name} {record[name]:.4f}" for name in ("loss", "kl", "hidden") if record[name] is not None]
    return ", ".join([*terms, f"{record['tokens_per_second']:.0f} tokens/s"])


def _not_finite(step: int, values: list[float], points: list[int], config: DistillConfig) -> str:
    _, kl, ce, _, *rest = values
    distances = rest[: len(points)]
    if not all(map(math.isfinite, distances)):
        bad = [i for i, d in zip(points, distances, strict=True) if not math.isfinite(d)]
        cause = (
            f"the hidden states after layers {bad} overflowed: lower learning_rate, or load the model in bf16 or fp32"
        )
    elif not math.isfinite(kl) or not math.isfinite(ce):
        cause = (
            "the logits overflowed (logit scaling): lower learning_rate, or load the model in bf16 or fp32, not fp16"
        )
    else:
        cause = "only the gradient did: lower learning_rate, set clip, or raise temperature"
    return (
        f"The loss stopped being finite at step {step + 1} (learning rate {config.learning_rate:g}); most likely "
        f"{cause}. The student keeps its weights of at most {_SNAPSHOT} steps earlier."
    )


class _ActivationMeter:
    """Bytes that the forward pass keeps for the backward pass, each storage once."""

    def __init__(self, memory: dict[str, int], stacks: Sequence[LayerStack]):
        self.memory, self.seen = memory, {}
        self.weights = {p.untyped_storage().data_ptr() for s in stacks for p in s.model.parameters()}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.seen[storage.data_ptr()] = storage.nbytes()
        return x

    def __enter__(self):
        self.hooks.__enter__()

    def __exit__(self, *error):
        self.hooks.__exit__(*error)
        self.memory["activations"] = sum(self.seen.values())


if __name__ == "__main__":
    from ildlab.distill.launch import main

    sys.exit(main(sys.argv[1:]))
