"""Rows of a metric split over batches and ranks, smaller ones where memory is short, one copy to the host each.

A job is a function of row indices; `rounds` runs it batch by batch. Under `accelerate launch` or torchrun every rank
takes its share of each round and all ranks see all results, so that a decision made on them (a race that drops layers)
is the same everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ildlab.errors import MeasureError
from ildlab.model.head import in_fp64


def world() -> tuple[int, int]:
    """Return (rank, number of ranks); starts the process group where a launcher (WORLD_SIZE) asks for several."""
    if not (dist.is_available() and (dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1)):
        return 0, 1
    if not dist.is_initialized():
        from accelerate import PartialState

        PartialState()
    return dist.get_rank(), dist.get_world_size()


def to_host(values: Tensor) -> np.ndarray:
    """Copy statistics to the host: the only place where a metric waits for the device."""
    return in_fp64(values.detach()).cpu().numpy()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that an allocation failed, on a GPU or in main memory."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return memory or (isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words))


class SmallerOnOOM:
    """Run a job on rows; on an out-of-memory error halve the batch, remember the size, and say so.

    Attributes
    ----------
    job : callable(ndarray [rows]) -> Tensor [rows, columns]
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
        while len(rows):
            part = rows[: self.batch_size]
            try:
                done.append(to_host(self.job(part)))
                rows = rows[len(part) :]
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise MeasureError(
                        "Out of memory with a single sequence in the batch. Use shorter blocks, score fewer "
                        "`positions`, lower `max_branch_bytes`, or load the model with device_map and offload."
                    ) from error
            # Out of the except block: the traceback no longer holds the failed batch's tensors.
            self.batch_size = max(1, len(part) // 2)
            self.notes.append(f"out of memory: batch size lowered from {len(part)} to {self.batch_size}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return np.concatenate(done)


def rounds(
    count: int, batch_size: int, run: SmallerOnOOM, *, first: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (rows [n], values [n, columns]) of all ranks, round by round.

    Parameters
    ----------
    count : int
        Rows in all.
    batch_size : int
        Rows that each rank takes in a round.
    first : int, optional
        Rows of a smaller first round (for each rank).
    """
    rank, ranks = world()
    start, take = 0, min(first or batch_size, batch_size)
    while start < count:
        mine = np.arange(start + rank * take, min(start + (rank + 1) * take, count))
        pieces = [(mine, run(mine) if len(mine) else None)]
        if ranks > 1:
            pieces *= ranks
            dist.all_gather_object(pieces, pieces[0])
        rows, values = zip(*(piece for piece in pieces if len(piece[0])), strict=True)
        yield np.concatenate(rows), np.concatenate(values)
        start += take * ranks
        take = batch_size
