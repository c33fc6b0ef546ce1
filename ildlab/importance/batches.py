"""Rows of a batch job split over ranks, out-of-memory halving, and the one copy to the host a batch.

A job is a function of row indices; `rounds` runs it batch by batch. Under `accelerate launch` or
torchrun every rank takes its share of each round and all ranks see all results, so that a decision
made on them (a race that drops layers) is the same everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ildlab.errors import MeasureError


def world() -> tuple[int, int]:
    """Return (rank, number of ranks); starts the process group where a launcher asks for several.

    `accelerate launch` and torchrun set WORLD_SIZE; without them this is (0, 1).
    """
    import torch.distributed as dist

    if not (dist.is_available() and (dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1)):
        return 0, 1
    if not dist.is_initialized():
        from accelerate import PartialState

        PartialState()
    return dist.get_rank(), dist.get_world_size()


def gather(piece):
    """Return the pieces of all ranks, in rank order (picklable objects; [piece] for one process)."""
    if world()[1] == 1:
        return [piece]
    import torch.distributed as dist

    pieces = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, piece)
    return pieces


def to_host(values: Tensor) -> np.ndarray:
    """Copy statistics to the host: the only place where a metric waits for the device."""
    return values.detach().double().cpu().numpy() if values.device.type != "mps" else values.detach().cpu().numpy()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that an allocation failed, on a GPU or in main memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in ("out of memory", "can't allocate memory", "not enough memory")
    )


class SmallerOnOOM:
    """Run a job on rows; on an out-of-memory error halve the batch, remember the size, and say so.

    Parameters
    ----------
    job : callable(np.ndarray [rows]) -> Tensor [rows, columns]
    batch_size : int

    Attributes
    ----------
    batch_size : int
        What fits, as far as is known.
    notes : list of str
        One sentence for each time that the batch was halved.
    """

    def __init__(self, job: Callable[[np.ndarray], Tensor], batch_size: int):
        self.job = job
        self.batch_size = batch_size
        self.notes: list[str] = []

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return the job's values [rows, columns] (float64, on the host)."""
        done: list[np.ndarray] = []
        start = 0
        while start < len(rows):
            part = rows[start : start + self.batch_size]
            try:
                done.append(to_host(self.job(part)))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise MeasureError(
                        "Out of memory with a single sequence in the batch. Use shorter blocks, score fewer "
                        "`positions`, lower `max_branch_bytes`, or load the model with device_map and offload."
                    ) from error
            else:
                start += len(part)
                continue
            # Out of the except block: the traceback no longer holds the failed batch's tensors.
            self.batch_size = max(1, len(part) // 2)
            self.notes.append(f"out of memory: batch size lowered from {len(part)} to {self.batch_size}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return np.concatenate(done) if done else np.empty((0, 0))


def rounds(count: int, batch_size: int, run: SmallerOnOOM, *, first: int | None = None) -> Iterator:
    """Yield (rows [n], values [n, columns]) of all ranks, round by round.

    Parameters
    ----------
    count : int
        Rows in all.
    batch_size : int
        Rows that each rank takes in a round.
    run : SmallerOnOOM
    first : int, optional
        Rows of a smaller first round (for each rank).
    """
    rank, size = world()
    start, take = 0, min(first or batch_size, batch_size)
    while start < count:
        mine = np.arange(start + rank * take, min(start + (rank + 1) * take, count))
        values = run(mine) if len(mine) else None
        pieces = [piece for piece in gather((mine, values)) if piece[1] is not None]
        yield np.concatenate([p[0] for p in pieces]), np.concatenate([p[1] for p in pieces])
        start += take * size
        take = batch_size
