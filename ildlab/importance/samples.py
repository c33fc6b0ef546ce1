"""On its way to a score: which positions count, batches that fit in memory, and the values that come in from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ildlab.errors import MeasureError, out_of_memory
from ildlab.importance.config import MeasureConfig
from ildlab.importance.scores import LayerScores, by_kind
from ildlab.model.capture import sent
from ildlab.model.head import in_fp64
from ildlab.progress import Progress
from ildlab.text.rows import Rows


@dataclass
class Positions:
    """Which positions of each sequence are scored."""

    index: Tensor  # [N, P] int64
    valid: Tensor  # [N, P] bool; False for filling, since sequences may have fewer valid positions than others
    targets: Tensor  # [N, P] int64: the token that follows each (its own at the last one, which then has no use)
    weights: Tensor | None = None  # [B], of a batch alone: positions scored in each sequence

    @classmethod
    def sample(cls, rows: Rows, count: int | None, seed: int, *, predict: bool) -> Positions:
        """Draw `count` positions of each sequence without replacement (None: all); `predict`: only with a next token.

        They depend on the seed and the row alone, so not on the batch size.
        """
        n, length = rows.tokens.shape
        able = torch.ones(n, length, dtype=torch.bool) if rows.mask is None else rows.mask.clone()
        if predict:
            able[:, :-1] &= able[:, 1:].clone()
            able[:, -1] = False
            if bool((~able.any(1)).any()):
                raise MeasureError("A sequence has no token to predict: each needs at least 2 valid tokens.")
        if rows.scored is not None:  # where the next token is a target
            able &= rows.scored
            if bool((~able.any(1)).any()):
                raise MeasureError("A block has no target in it: take longer blocks.")
        most = int(able.sum(1).max())
        count = most if count is None else min(count, most)
        index, valid = torch.zeros(n, count, dtype=torch.long), torch.zeros(n, count, dtype=torch.bool)
        for row in range(n):
            choice = able[row].nonzero()[:, 0]
            if len(choice) > count:
                picked = np.random.default_rng([seed, row]).choice(len(choice), count, replace=False)
                choice = choice[torch.from_numpy(np.sort(picked))]
            index[row, : len(choice)] = choice
            valid[row, : len(choice)] = True
        targets = rows.tokens.gather(1, (index + 1).clamp(max=length - 1)).long()
        return cls(index, valid, targets)

    def batch(self, rows: np.ndarray, device: torch.device) -> Positions:
        """Those of one batch, on the device, with targets [B * P] and weights [B] (positions scored)."""
        pick = torch.as_tensor(rows)
        parts = (self.index[pick], self.valid[pick], self.targets[pick].flatten())  # targets [B, P] -> [B * P]
        index, valid, targets = (sent(part, device) for part in parts)
        return Positions(index, valid, targets, valid.sum(1).float())

    def take(self, hidden: Tensor) -> Tensor:
        """Pick the scored positions of [B, T, d]: [B * P, d]."""
        index = self.index.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])  # [B, P] -> [B, P, d]
        return hidden.gather(1, index).flatten(0, 1)  # [B, P, d] -> [B * P, d]

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the scored positions of values [B * P]: [B]."""
        values = values.view(self.valid.shape)  # [B * P] -> [B, P]
        return torch.where(self.valid, values, 0.0).sum(1) / self.weights


def to_host(values: Tensor) -> np.ndarray:
    """Copy statistics to the host: the only place where a metric waits for the device."""
    return in_fp64(values.detach()).cpu().numpy()


class SmallerOnOOM:
    """Run a job, row indices [n] -> Tensor [n, columns]; on an out-of-memory error halve the batch and say so.

    `batch_size` is what fits, as far as is known; `notes` has a sentence for each time that it was halved.
    """

    def __init__(self, job: Callable[[np.ndarray], Tensor], batch_size: int):
        self.job, self.batch_size = job, batch_size
        self.notes: list[str] = []

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return the job's values [n, columns] (float64, on the host)."""
        done: list[np.ndarray] = []
        while len(rows):
            part = rows[: self.batch_size]
            try:
                done.append(to_host(self.job(part)))
                rows = rows[len(part) :]
                continue
            except Exception as error:
                if not out_of_memory(error):
                    raise
                if len(part) == 1:
                    advice = "Use shorter blocks, fewer `positions`, a lower `max_branch_bytes`, or offload layers."
                    raise MeasureError(f"Out of memory with a single sequence in the batch. {advice}") from error
            # Out of the except block: the traceback no longer holds the failed batch's tensors.
            self.batch_size = max(1, len(part) // 2)
            self.notes.append(f"out of memory: batch size lowered from {len(part)} to {self.batch_size}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return np.concatenate(done)


def rounds(total: int, batch_size: int, first: int | None = None) -> Iterator[np.ndarray]:
    """Row indices [n], batch by batch; `first` of them at first."""
    start, stop = 0, first or batch_size
    while start < total:
        yield np.arange(start, min(stop, total))
        start, stop = stop, stop + batch_size


def first_look(kinds: Sequence[str], least: int) -> int:
    """Rows that a race looks at first: `least`, or as many as hold two of each kind of text."""
    seen: dict[str, int] = {}
    for number, kind in enumerate(kinds, 1):
        seen[kind] = seen.get(kind, 0) + 1
        if len(seen) == len(set(kinds)) and min(seen.values()) > 1:
            return max(least, number)
    return least


def check_kinds(kinds: Sequence[str]) -> None:
    """MeasureError where of a kind of text there is one sequence alone, whose spread nothing tells."""
    lone = [kind for kind in dict.fromkeys(kinds) if list(kinds).count(kind) < 2]
    if lone:
        raise MeasureError(
            f"Of {', '.join(lone)} there is one sequence: give two or more of each kind of text, or its spread is not "
            f"known. Raise calibration tokens to {2 * len(set(kinds))} blocks, or shorten the blocks; where they are that "
            "many already, a kind has run out of rows that fit: lengthen the blocks."
        )


class Collector:
    """Collects values per sequence while a metric runs, and turns them into LayerScores."""

    def __init__(
        self, config: MeasureConfig, source: str, layer_ids: Sequence[int], total: int, kinds: Sequence[str] = ()
    ):
        self.config, self.source, self.layer_ids = config, source, list(layer_ids)
        self.kinds = np.array(kinds)
        check_kinds(kinds)
        self.values = np.full((total, len(self.layer_ids)), np.nan)  # [N, L]
        self.weights = np.zeros(total)
        self.details: dict[str, Any] = config.told()
        self.batches = self.count = 0
        self.started = time.perf_counter()

    def add(self, rows: np.ndarray, layer_ids: Sequence[int], values: np.ndarray, weights: np.ndarray) -> None:
        """Take values [rows, layers] of one batch; a NaN or an infinity is an error, never a score."""
        bad = ~np.isfinite(values)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise MeasureError(
                f"{self.config.metric} of layer {layer_ids[column]} is {values[row, column]} in batch {self.batches} "
                f"(sequence {rows[row]}): the model overflows there. Load it in float32 or bfloat16."
            )
        self.values[np.ix_(rows, self._columns(layer_ids))] = values
        self.weights[rows] = weights
        self.batches += 1
        self.count += len(rows)

    def seen(self, layer_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Values [n, layers] and weights [n] of the rows scored so far."""
        rows = np.flatnonzero(self.weights > 0)
        values, weights = self.values[rows], self.weights[rows]
        if len(self.kinds):
            values, weights, _ = by_kind(values, weights, self.kinds[rows], self.config.medians)
        return values[:, self._columns(layer_ids)], weights

    def scores(self) -> LayerScores:
        """LayerScores of what has been collected."""
        rows = np.flatnonzero(self.weights > 0)
        return LayerScores.from_samples(
            self.config.metric,
            self.source,
            self.layer_ids,
            self.values[rows],
            self.weights[rows],
            kinds=self.kinds[rows].tolist() if len(self.kinds) else (),
            seconds=time.perf_counter() - self.started,
            confidence=self.config.confidence,
            details=self.details,
        )

    def progress(self, note: str) -> Progress:
        """How far the metric is, with the scores so far; none while a kind of text has too few rows to tell layers by."""
        enough = all(np.count_nonzero(self.kinds[self.weights > 0] == kind) > 1 for kind in np.unique(self.kinds))
        return Progress(self.count, len(self.values), note, self.scores() if self.count > 1 and enough else None)

    def _columns(self, layer_ids: Sequence[int]) -> list[int]:
        return [self.layer_ids.index(i) for i in layer_ids]
