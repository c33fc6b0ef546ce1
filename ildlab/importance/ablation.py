"""Exact ablation of every layer by a trunk-shared sweep, and races that stop early.

Skipping layer l leaves the layers below it as they were. Going down the stack once, each branch
starts from the trunk's own hidden state h[l] and runs only the layers above l: the same numbers as L
separate runs, bit for bit, for L·(L+1)/2 layer passes instead of L·(L-1). The LM head is paid once a
branch, at the scored positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ildlab.errors import MeasureError
from ildlab.importance.batches import Halving, rounds, world
from ildlab.importance.one_pass import block_influence
from ildlab.importance.samples import Positions, Rows, Samples
from ildlab.importance.scores import LayerScores
from ildlab.model.capture import Trunk
from ildlab.model.head import branch_kl, branch_nll
from ildlab.model.offload import is_offloaded, resident
from ildlab.model.shared import shared_prefix
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress
from ildlab.stats import t_quantile

MAX_BRANCH_BYTES = 2 * 2**30
COMMON = 4  # sequences' worth of faith in the variance that the layers have in common


@torch.no_grad()
def branches(
    student: LayerStack,
    trunks: Sequence[Trunk],
    layer_ids: Sequence[int] | None = None,
    *,
    reach: int = 0,
    on_trunk: Callable[[int, int, Tensor], None] | None = None,
    max_branch_bytes: int = MAX_BRANCH_BYTES,
    count: Callable[[int], None] | None = None,
) -> Iterator[tuple[list[int], list[list[Tensor]]]]:
    """Yield the final hidden states of the student without each layer, wave by wave.

    Layer-outer, batch-inner: within a wave every layer is visited once for all batches and branches,
    which is what a model with offloaded layers needs.

    Parameters
    ----------
    student : LayerStack
    trunks : sequence of Trunk
        One for each batch (`student.trunk(batch)`).
    layer_ids : sequence of int, optional
        Layers to skip, one at a time; all by default.
    reach : int
        Carry the trunk at least to h[reach] (`len(student)`: to the whole student's output).
    on_trunk : callable(position q, index of the batch, h[q]), optional
        Sees the trunk's hidden states as they come.
    max_branch_bytes : int
        Memory that the hidden states of trunk and branches may take; where all branches do not fit
        they go in waves, of at least one branch.
    count : callable(int), optional
        Told the layer passes as they are run (one pass: one layer, one batch).

    Yields
    ------
    (layer ids, hidden)
        `hidden[i][b]` is h[L] [B, T, d], pre-norm, of batch b without `layer ids[i]`. Bottom first.
    """
    ids = student.layer_ids if layer_ids is None else layer_ids
    alive = sorted(student.position(layer_id) for layer_id in ids)
    trunk = [t.h0 for t in trunks]
    fits = max(1, max_branch_bytes // sum(h.nbytes for h in trunk) - 1)
    waves = [alive[i : i + fits] for i in range(0, len(alive), fits)] or [[]]
    at = 0  # the trunk stands at h[at]

    def see() -> None:
        if on_trunk is not None:
            for b, hidden in enumerate(trunk):
                on_trunk(at, b, hidden)

    see()
    for wave in waves:
        goal = max(wave[-1] if wave else 0, reach if wave is waves[-1] else 0)
        going: dict[int, list[Tensor]] = {}
        for q in range(at, len(student)):
            born = {q: list(trunk)} if q in wave else {}
            advance = q < goal
            if going or advance:
                with resident(student.layers[q]):
                    for b, replay in enumerate(trunks):
                        for states in going.values():
                            states[b] = student.run(q, states[b], replay)
                        if advance:
                            trunk[b] = student.run(q, trunk[b], replay)
                if count is not None:
                    count(len(trunks) * (len(going) + advance))
            if advance:
                at = q + 1
                see()
            going.update(born)
        if wave:
            final = [going[p] for p in wave]
            going = {}  # so that the caller alone decides how long they live
            yield [student.layer_ids[p] for p in wave], final


@torch.no_grad()
def sweep(
    student: LayerStack,
    batch,
    score: Callable[[Tensor, int], Tensor],
    layer_ids: Sequence[int] | None = None,
    *,
    max_branch_bytes: int = MAX_BRANCH_BYTES,
) -> Tensor:
    """Score one batch without each layer in turn, with the bottom layers shared.

    Parameters
    ----------
    student : LayerStack
    batch : Tensor [B, T] or mapping with `input_ids` and `attention_mask`
    score : callable(hidden [B, T, d], position of the skipped layer) -> Tensor [B]
        Given h[L] (pre-norm) of the student without the layer; `student.logits` makes logits of it.
    layer_ids : sequence of int, optional
        Layers to skip, one at a time; all by default.

    Returns
    -------
    Tensor [len(layer_ids), B]
        In the order of `layer_ids`.
    """
    ids = student.layer_ids if layer_ids is None else list(layer_ids)
    found = {}
    for wave, hidden in branches(student, [student.trunk(batch)], ids, max_branch_bytes=max_branch_bytes):
        for layer_id, states in zip(wave, hidden, strict=True):
            found[layer_id] = score(states[0], student.position(layer_id))
    return torch.stack([found[layer_id] for layer_id in ids])


class _Job:
    """One batch of an ablation metric: rows -> [rows, alive scores + whole student + weight + prior]."""

    def __init__(self, student, teacher, rows: Rows, metric: str, places: Positions, batch_size: int, **limits):
        self.student, self.teacher, self.rows = student, teacher, rows
        self.metric, self.places, self.batch_size = metric, places, batch_size
        self.alive = student.layer_ids
        self.want_prior = False
        self.max_branch_bytes = limits["max_branch_bytes"]
        self.passes = self.heads = 0  # layer passes; heads: how often a batch's positions were scored
        # Up to where teacher and student are one: one pass serves both.
        self.prefix = 0 if teacher is None else shared_prefix(student, teacher)

    def _count(self, passes: int) -> None:
        self.passes += passes

    def __call__(self, rows: np.ndarray) -> Tensor:
        parts = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        trunks = [self.student.trunk(self.rows.batch(part)) for part in parts]
        places = [self.places.of(part, self.student.device) for part in parts]
        top, every = len(self.student), range(len(parts))
        seen: dict[tuple[str, int], Tensor] = {}
        prior: list[list[Tensor]] = [[] for _ in parts]

        def on_trunk(q: int, b: int, hidden: Tensor) -> None:
            if self.metric == "nll" and q == top:
                seen["whole", b] = places[b].take(hidden)
            if self.metric == "kl" and q == self.prefix and q:
                seen["prefix", b] = hidden
            if self.want_prior:
                if q:
                    prior[b].append(block_influence(seen["before", b], hidden, trunks[b].attention_mask))
                seen["before", b] = hidden

        reference: list[Tensor] = []  # the teacher's final states at the scored positions, [n, d] a batch
        tokens: list[list[Tensor]] = [[] for _ in parts]
        work = branches(
            self.student,
            trunks,
            self.alive,
            on_trunk=on_trunk,
            count=self._count,
            reach=top if self.metric == "nll" or self.want_prior else self.prefix,
            max_branch_bytes=self.max_branch_bytes,
        )
        for number, (_, hidden) in enumerate(work):
            # Only the scored positions live on.
            picked = [[places[b].take(states[b]) for states in hidden] for b in every]
            hidden.clear()
            if self.metric == "kl" and number == 0:
                final = self._teacher_final(parts, [seen.get(("prefix", b)) for b in every])
                reference = [places[b].take(final[b]) for b in every]
            for b in every:
                if self.metric == "kl":
                    tokens[b] += branch_kl(self.student, picked[b], self.teacher, reference[b])
                else:
                    tokens[b] += branch_nll(self.student, picked[b], places[b].targets)
                self.heads += len(picked[b])
        out = []
        for b in every:
            scores = torch.stack(tokens[b])
            base = torch.zeros_like(scores[0])
            if self.metric == "nll":
                base = branch_nll(self.student, [seen["whole", b]], places[b].targets)[0]
                self.heads += 1
                scores -= base
            columns = [places[b].mean(row) for row in (*scores, base)]
            out.append(torch.stack([*columns, places[b].weights, *prior[b]], 1))
        return torch.cat(out)

    def _teacher_final(self, parts: list[np.ndarray], prefix: list[Tensor | None]) -> list[Tensor]:
        """Run the teacher's layers above those that it shares with the student; layer-outer."""
        start = self.prefix if prefix[0] is not None else 0
        if start == len(self.teacher):
            return prefix
        trunks = [self.teacher.trunk(self.rows.batch(part)) for part in parts]
        hidden = [trunk.h0 if start == 0 else h for trunk, h in zip(trunks, prefix, strict=True)]
        for q in range(start, len(self.teacher)):
            with resident(self.teacher.layers[q]):
                hidden = [self.teacher.run(q, h, trunk) for h, trunk in zip(hidden, trunks, strict=True)]
            self.passes += len(parts)
        return hidden


def ablation_steps(
    student: LayerStack,
    rows: Rows,
    metric: str,
    teacher: LayerStack | None = None,
    *,
    race: bool = False,
    positions: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    confidence: float = 0.95,
    tie: float = 0.02,
    first: int = 2,
    max_branch_bytes: int = MAX_BRANCH_BYTES,
) -> Generator[Progress, None, LayerScores]:
    """Sweep all layers, or race them; `ildlab.measure` documents the common arguments.

    Parameters
    ----------
    race : bool
        After each batch drop every layer whose paired difference to the best so far is significantly
        positive: one-sided t, `confidence` for all layers together (Bonferroni), its variance
        moderated by the layers' median as in Smyth 2004 (doi 10.2202/1544-6115.1027). Stop when one
        layer is left, when surely none that is left is better than the best by more than `tie`, or
        when the text runs out.
    tie : float
        In nats per token: what may be lost by picking one of two layers so near to each other
        (the indifference zone of Bechhofer 1954).
    first : int
        Sequences of a small first batch. After it, Block Influence of the same tokens is the prior: a
        layer that both rate far above the others is dropped at once.
    max_branch_bytes : int
        Memory for the branches' hidden states (see `branches`). With offloaded layers, as many
        sequences as fit go through each layer while it is loaded.
    """
    if tie < 0 or first < 1 or max_branch_bytes < 1:
        raise MeasureError("tie must not be negative; first and max_branch_bytes must be positive.")
    places = Positions.sample(rows, positions, seed, predict=metric == "nll")
    samples = Samples(metric, rows.source, student.layer_ids, len(rows.tokens), confidence)
    limits = {"max_branch_bytes": max_branch_bytes}
    job = _Job(student, teacher, rows, metric, places, batch_size, **limits)
    group = batch_size
    if is_offloaded(student.layers) and not race:
        # Every layer is to be loaded once for all of these rows.
        one = rows.tokens.shape[1] * student.hidden_size * student.model.dtype.itemsize * (len(student) + 1)
        group = max(batch_size, min(len(rows.tokens), max_branch_bytes // one))
    run = Halving(job, group)
    total, done = len(rows.tokens), 0
    details = samples.details
    details |= {
        "positions": positions,
        "batch_size": batch_size,
        "seed": seed,
        "race": race,
        "ranks": world()[1],
        "dropped": {},
        "notes": run.notes,
    }
    if race:
        details |= {"tie": tie, "first": first, "stopped": "the text ran out"}
        job.want_prior = True
    whole = 0.0
    for picked, values in rounds(total, group, run, first=first if race else None):
        count = len(job.alive)
        weights = values[:, count + 1]
        samples.add(picked, job.alive, values[:, :count], weights)
        whole += float(values[:, count] @ weights)
        done += len(picked)
        details |= {"layer_passes": job.passes, "heads": job.heads, "whole": whole / float(samples.weights.sum())}
        note = run.notes[-1] if run.notes else ""
        if race:
            prior = values[:, count + 2 :].mean(0) if job.want_prior else None
            job.want_prior = False
            stopped = _race(job, samples, prior, confidence, tie, details["dropped"])
            note = note or f"{len(job.alive)} of {len(student)} layers left"
            if stopped:
                details["stopped"] = stopped
                break
        if done < total:
            yield Progress(done, total, note, samples.scores() if done > 1 else None)
    scores = samples.scores()
    yield Progress(total, total, details.get("stopped", ""), scores)
    return scores


def _race(job: _Job, samples: Samples, prior, confidence: float, tie: float, dropped: dict) -> str:
    """Drop layers from `job.alive`; return why the race is over, or an empty string."""
    seen = samples.weights > 0
    columns = [samples.layer_ids.index(i) for i in job.alive]
    x, w = samples.values[np.ix_(seen, columns)], samples.weights[seen]
    n = len(x)
    if n < 2 or len(columns) < 2:
        return ""
    mean = w @ x / w.sum()
    best = int(mean.argmin())
    gap, above = x - x[:, [best]], mean - mean[best]
    spread = (w[:, None] * (gap - above) ** 2).sum(0) / w.sum() * n / (n - 1)
    # A variance of two sequences is a guess: it is drawn towards the layers' median (moderated t).
    common = np.median(np.delete(spread, best))
    spread = (COMMON * common + (n - 1) * spread) / (COMMON + n - 1)
    quantile = t_quantile(1 - (1 - confidence) / max(1, len(columns) - 1), n - 1 + COMMON)
    bound = quantile * np.sqrt(spread * ((w / w.sum()) ** 2).sum()) + 1e-12  # 1 / n, where weights are equal
    drop = above - bound > 0
    if prior is not None and len(prior) == len(columns):
        middle = np.median(prior)
        apart = prior > middle + 3 * 1.4826 * np.median(np.abs(prior - middle))
        drop |= apart & (gap.min(0) > 0) & (above > np.median(above))
    drop[best] = False
    # Could a layer that is left be better than the best by more than a tie?
    settled = bool((drop | (above - bound >= -tie)).all())
    for layer_id in [i for i, gone in zip(job.alive, drop, strict=True) if gone]:
        dropped[str(layer_id)] = n
    job.alive = [i for i, gone in zip(job.alive, drop, strict=True) if not gone]
    if len(job.alive) == 1:
        return "one layer is left"
    return f"{len(job.alive)} layers are left, none better than the best by more than {tie:g}" if settled else ""
