"""`nll` and `kl`: what the model loses without each layer, exactly, by the trunk-shared sweep.

The LM head is paid once a branch, at the scored positions only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ildlab.importance.config import MeasureConfig
from ildlab.importance.one_pass import apart, token_mean
from ildlab.importance.race import Race
from ildlab.importance.samples import Collector, Positions, SmallerOnOOM, first_look, rounds
from ildlab.importance.scores import LayerScores
from ildlab.importance.sweep import branches, climb, rows_at_once
from ildlab.model.capture import Trunk
from ildlab.model.head import branch_kl, branch_nll
from ildlab.model.shared import shared_prefix
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, Work
from ildlab.text.rows import Rows

FIRST = 2  # sequences of a race's first batch, on which the prior drops the hopeless


def ablation_steps(
    student: LayerStack, rows: Rows, config: MeasureConfig, teacher: LayerStack | None = None
) -> Work[LayerScores]:
    """Sweep all layers, or race them; in a race, Block Influence of the first batch's tokens is the prior."""
    layer_ids = sorted(set(config.layers or student.layer_ids), key=student.position)
    total, depth = len(rows.tokens), len(layer_ids)
    job = _Job(student, teacher, rows, config)
    group = config.batch_size
    if not config.race:  # a race would decide too late
        one = rows.tokens.shape[1] * student.hidden_size * student.model.dtype.itemsize * (depth + 1)
        group = rows_at_once(student, total, group, one, config.max_branch_bytes)
    run = SmallerOnOOM(job, group)
    race = Race(layer_ids, config.confidence, config.tie)
    collected = Collector(config, rows.source, layer_ids, total, rows.kinds)
    unscored = sorted({*student.layer_ids} - {*layer_ids})
    details = collected.details
    details |= {"notes": run.notes, "dropped": race.dropped, "unscored": unscored}
    job.alive, job.want_prior, whole = layer_ids, config.race, 0.0
    for picked in rounds(total, group, first_look(rows.kinds, FIRST) if config.race else None):
        values, alive = run(picked), len(job.alive)
        weights = values[:, alive + 1]
        collected.add(picked, job.alive, values[:, :alive], weights)
        whole += float(values[:, alive] @ weights)
        details |= {"layer_passes": job.passes, "whole": whole / float(collected.weights.sum())}
        note = run.notes[-1] if run.notes else ""
        if config.race:
            at = [alive + 2 + student.position(i) for i in layer_ids]
            prior = values[:, at].mean(0) if job.want_prior else None  # [n, A] -> [A]
            race.look(*collected.seen(job.alive), prior=prior)
            job.alive, job.want_prior = race.alive, False
            details["stopped"] = race.stopped
            note = note or f"{len(job.alive)} of {depth} layers left"
            if race.over:
                break
        if collected.count < total:
            yield collected.progress(note)
    scores = collected.scores()
    yield Progress(total, total, details.get("stopped", ""), scores)
    return scores


class _Job:
    """Damage of each layer on some rows: row indices [n] -> [n, A + 2], or [n, A + 2 + L] with the prior.

    Its columns: the A layers of `alive`, the whole student (its NLL; 0 for KL), the positions scored, and where
    `want_prior` the Block Influence of all L layers on the same tokens.
    """

    def __init__(self, student: LayerStack, teacher: LayerStack | None, rows: Rows, config: MeasureConfig):
        self.student, self.teacher, self.rows, self.config = student, teacher, rows, config
        self.places = Positions.sample(rows, config.positions, config.seed, predict=config.metric == "nll")
        self.alive = student.layer_ids
        self.want_prior = False
        self.passes = 0  # of a layer, for a batch
        # Up to where teacher and student are one: one pass serves both.
        self.prefix = shared_prefix(student, teacher) if config.metric == "kl" else 0

    @torch.no_grad()
    def __call__(self, picked: np.ndarray) -> Tensor:
        nll, size = self.config.metric == "nll", self.config.batch_size
        parts = [picked[i : i + size] for i in range(0, len(picked), size)]
        trunks = [self.student.trunk(self.rows.batch(part)) for part in parts]
        places = [self.places.batch(part, self.student.device) for part in parts]
        view = _TrunkView(trunks, self.prefix, self.want_prior)
        damage: list[list[Tensor]] = [[] for _ in parts]  # [b][i]: at each scored position, [B * P]
        reference: list[Tensor] = []  # the teacher's h[L] at the scored positions of each batch, [B * P, d]

        def count(passes: int) -> None:
            self.passes += passes

        waves = branches(
            self.student,
            trunks,
            self.alive,
            max_branch_bytes=self.config.max_branch_bytes,
            reach=len(self.student) if nll or self.want_prior else self.prefix,
            on_trunk=view,
            count=count,
        )
        for _, hidden in waves:
            # Only the scored positions live on: [A'][b] of [B, T, d] -> [b][A'] of [B * P, d]
            states = [[place.take(branch[b]) for branch in hidden] for b, place in enumerate(places)]
            hidden.clear()
            if not nll and not reference:
                finals = self._teacher_final(parts, view.at_prefix)
                reference = [place.take(final) for place, final in zip(places, finals, strict=True)]
            for b, place in enumerate(places):
                if nll:
                    damage[b] += branch_nll(self.student, states[b], place.targets)
                else:
                    damage[b] += branch_kl(self.student, states[b], self.teacher, reference[b])
        tables = []
        for b, place in enumerate(places):
            lost = torch.stack(damage[b])  # [A, B * P]
            whole = torch.zeros_like(lost[0])  # [B * P]
            if nll:
                whole = branch_nll(self.student, [place.take(view.hidden[b])], place.targets)[0]
                lost = lost - whole
            means = [place.mean(row) for row in (*lost, whole)]  # A + 1 of [B * P] -> [B]
            tables.append(torch.stack([*means, place.weights, *view.influence[b]], 1))  # [B, A + 2 (+ L)]
        return torch.cat(tables)  # [n, A + 2 (+ L)]

    def _teacher_final(self, parts: list[np.ndarray], at_prefix: list[Tensor]) -> list[Tensor]:
        """The teacher's h[L] [B, T, d] of each batch, from where the trunk already carried it."""
        start = self.prefix if at_prefix else 0  # the first of several waves may end below the prefix
        if start == len(self.teacher):
            return at_prefix
        trunks = [self.teacher.trunk(self.rows.batch(part)) for part in parts]
        *_, final = climb(self.teacher, trunks, at_prefix or None, start)
        self.passes += len(parts) * (len(self.teacher) - start)
        return final


class _TrunkView:
    """Keeps what an ablation needs of the trunk's hidden states as they come by, [B, T, d] a batch."""

    def __init__(self, trunks: Sequence[Trunk], prefix: int, want_prior: bool):
        self.trunks, self.prefix, self.want_prior = trunks, prefix, want_prior
        self.hidden: list[Tensor] = []  # the last ones seen
        self.at_prefix: list[Tensor] = []  # h[prefix], which is the teacher's too
        self.influence: list[list[Tensor]] = [[] for _ in trunks]  # [b][layer]: [B]

    def __call__(self, q: int, hidden: list[Tensor]) -> None:
        for b, before in enumerate(self.hidden if self.want_prior else ()):
            turned = apart(before, hidden[b], "block_influence")  # [B, T, d] -> [B, T]
            self.influence[b].append(token_mean(turned, self.trunks[b].attention_mask))
        self.hidden = list(hidden) if self.want_prior else hidden  # which goes up with the trunk
        if q == self.prefix and q:
            self.at_prefix = list(hidden)
