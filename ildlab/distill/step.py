"""One micro-batch of distillation: both decoders and the loss.

The bottom layers that teacher and student share run once for both, and nothing below the lowest trained
layer builds a graph. Below, B is sequences, T their tokens, P sampled positions, d the width of a hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from ildlab.distill.batches import Counts, has_next
from ildlab.distill.bottoms import BottomStore
from ildlab.distill.config import DistillConfig
from ildlab.distill.fused import fused_divergence
from ildlab.distill.losses import hidden_distance
from ildlab.distill.scope import runs
from ildlab.model.capture import Trunk, sent
from ildlab.model.shared import shared_prefix
from ildlab.model.stack import Batch, LayerStack

BOTTOM_BYTES = 2**30  # most memory for the hidden states of frozen bottom layers; more text runs them in every epoch


class DistillStep:
    """The loss of a student against its teacher on one micro-batch.

    `trained` are the layer ids that train, of weights of their own; after those of `points` hidden states are matched.
    """

    def __init__(
        self,
        student: LayerStack,
        teacher: LayerStack,
        trained: Sequence[int],
        points: Sequence[int],
        config: DistillConfig,
    ):
        self.student, self.teacher, self.config = student, teacher, config
        self.first = student.position(trained[0])
        self.prefix = min(shared_prefix(student, teacher), self.first)
        # Layer id -> the teacher's depth whose hidden state it meets: after the layer of the same id.
        self.depth, self.ends = {i: self._depth_of(i) for i in points}, runs(student, trained)
        # The published formula adds both terms, even where the last trainable layer is the last layer.
        self.times = 2 if config.reduction == "paper" and len(points) == 1 else 1
        self.squares = torch.zeros(2, device=student.device)  # no copy to the host in a backward hook
        self.bottoms: BottomStore | None = None

    def _depth_of(self, layer_id: int) -> int:
        """The teacher's depth whose hidden state meets the student's after a layer; its last layer feeds the head."""
        if layer_id == self.student.layer_ids[-1]:
            return len(self.teacher)
        return self.teacher.position(layer_id) + 1

    def keep_bottoms(self, rows: int, block: int) -> None:
        """Keep what frozen bottom layers give for a text of `rows` times `block` tokens, where memory allows."""
        # The shared bottom serves both models; the student's own frozen layers end at its lowest trained one.
        names = ["shared"] * (self.prefix > 0) + ["student"] * (self.first > self.prefix)
        width, dtype = self.student.hidden_size, self.student.model.dtype
        size = rows * block * width * len(names) * dtype.itemsize
        if names and size <= BOTTOM_BYTES:
            where = torch.device("cpu")
            if self.student.device.type == "cuda" and torch.cuda.mem_get_info(self.student.device)[0] > 8 * size:
                where = self.student.device  # no copy to the host and back, for which each step would wait
            self.bottoms = BottomStore(rows, block, width, names, dtype, where)

    def __call__(
        self, batch: Batch, counts: Counts, positions: Tensor | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and statistics of a micro-batch.

        Parameters
        ----------
        batch : Tensor [B, T] of token ids, or a mapping with `input_ids` and perhaps `attention_mask`
        counts : Counts
            Of the global batch: losses of micro-batches and processes add up.
        positions : Tensor [B, P] int64, optional
            Where divergence and cross entropy are computed; everywhere by default.
        rows : Tensor [B] int64, optional
            Which rows of the text these are, for `keep_bottoms`.

        Returns
        -------
        loss : Tensor, scalar
        stats : Tensor [3 + points]
            Sums without gradient: divergence, cross entropy, agreeing top tokens, then the distance at each point.
        """
        config, student = self.config, self.student
        batch = batch if isinstance(batch, Mapping) else {"input_ids": batch}
        mine, theirs = self._hidden(batch, rows)
        final, target = mine[len(student)], theirs[len(self.teacher)]  # [B, T, d] each
        ids = sent(batch["input_ids"], final.device)  # [B, T]
        mask = batch.get("attention_mask")
        mask = (
            torch.ones(ids.shape, device=final.device) if mask is None else sent(mask, final.device).float()
        )  # [B, T]

        loss = torch.zeros((), device=final.device)
        distances = []
        for layer_id, depth in self.depth.items():
            a, b = self._watched(mine[student.position(layer_id) + 1], 1), theirs[depth]  # [B, T, d] each
            distance = hidden_distance(a, b, config.hidden_loss)  # [B, T, d] -> [B, T]
            total = distance.sum() if config.reduction == "paper" else (distance * mask).sum()
            loss = loss + total * (config.hidden_weight * self.times / counts.hidden)
            distances.append(total.detach())

        stats = torch.zeros(3, device=final.device)
        if config.kl_weight or config.ce_weight:
            head_loss, stats = self._head(final, target, ids, mask, positions, counts)
            loss = loss + head_loss
        return loss, torch.cat([stats, torch.stack(distances)]) if distances else stats  # [3] + [points]

    def local(self, batch: Batch, counts: Counts, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss and statistics of a micro-batch in the local stage, as of `__call__`; its points are the runs' ends.

        Each run of trained layers goes on from what the student has below it, which passes no gradient on.
        """
        student, config = self.student, self.config
        batch = batch if isinstance(batch, Mapping) else {"input_ids": batch}
        depths = {i: self._depth_of(i) for i in self.ends}
        trunk, hidden, theirs = self._below(batch, rows, max(depths.values()), {*depths.values()})
        mask = batch.get("attention_mask")
        mask = torch.ones(hidden.shape[:2]) if mask is None else mask.float()  # [B, T]
        mask = sent(mask, hidden.device)
        loss, distances, at = torch.zeros((), device=hidden.device), [], self.first
        for layer_id, start in self.ends.items():
            with torch.no_grad():
                hidden = _through(student, trunk, hidden, at, start)[start]  # frozen layers between two runs
            at = student.position(layer_id) + 1
            hidden = _through(student, trunk, hidden.detach(), start, at)[at]  # [B, T, d]
            seen = self._watched(hidden, 1)
            distance = hidden_distance(seen, theirs[depths[layer_id]], config.hidden_loss)  # [B, T, d] -> [B, T]
            total = (distance * mask.to(distance.device)).sum()
            loss = loss + total.to(loss.device) / counts.hidden
            distances.append(total.detach().to(loss.device))
        return loss, torch.cat([torch.zeros(3, device=loss.device), torch.stack(distances)])  # [3] + [runs]

    def _head(
        self, final: Tensor, target: Tensor, ids: Tensor, mask: Tensor, positions: Tensor | None, counts: Counts
    ):
        """Divergence and cross entropy of final hidden states [B, T, d]: loss, and stats [3]."""
        config = self.config
        # Position t predicts token t + 1; what stands at the last one has no weight.
        labels, label_mask = ids.roll(-1, dims=1), has_next(mask)  # [B, T] each
        final = self._watched(final, 0)
        if positions is not None:
            at = sent(positions, final.device)  # [B, P]
            across = at[..., None].expand(-1, -1, final.shape[-1])  # [B, P] -> [B, P, d]
            final, target = final.gather(1, across), target.gather(1, across)  # [B, T, d] -> [B, P, d]
            mask, labels, label_mask = (x.gather(1, at) for x in (mask, labels, label_mask))  # [B, T] -> [B, P]
        if config.reduction == "paper":
            weights = torch.full_like(mask, config.kl_weight / 100)
        else:
            weights = mask * (config.kl_weight / counts.kl)
        with_labels = {}
        if config.ce_weight:
            with_labels["labels"] = labels.flatten()  # [B, P] -> [N]
            with_labels["label_weights"] = (label_mask * (config.ce_weight / counts.ce)).flatten()  # [B, P] -> [N]
        return fused_divergence(
            self.student,
            self.teacher,
            final.flatten(0, 1),  # [B, P, d] -> [N, d]
            target.flatten(0, 1),
            config.spec,
            weights=weights.flatten(),  # [B, P] -> [N]
            **with_labels,
        )

    def _hidden(self, batch: Mapping[str, Tensor], rows: Tensor | None) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Hidden states [B, T, d] by depth: the student's that train, the teacher's that they meet."""
        student = self.student
        trunk, hidden, theirs = self._below(batch, rows, len(self.teacher), {*self.depth.values()})
        wanted = {student.position(i) + 1 for i in self.depth}
        return _through(student, trunk, hidden.detach(), self.first, len(student), wanted), theirs

    @torch.no_grad()
    def _below(
        self, batch: Mapping[str, Tensor], rows: Tensor | None, end: int, depths: Set[int]
    ) -> tuple[Trunk, Tensor, dict[int, Tensor]]:
        """The student's trunk and hidden state [B, T, d] below what trains; the teacher's, up to depth `end`, by depth."""
        student, teacher, prefix = self.student, self.teacher, self.prefix
        trunk, their_trunk = student.trunk(batch), teacher.trunk(batch)
        upper = self._bottom("shared", rows, teacher, their_trunk, their_trunk.h0, 0, prefix)  # [B, T, d]
        # Without a layer in common, the embeddings may differ too.
        hidden = upper if prefix else trunk.h0  # [B, T, d]
        hidden = self._bottom("student", rows, student, trunk, hidden, prefix, self.first)
        return trunk, hidden, _through(teacher, their_trunk, upper, prefix, end, depths)

    def _bottom(
        self, name: str, rows: Tensor | None, stack: LayerStack, trunk: Trunk, hidden: Tensor, start: int, end: int
    ) -> Tensor:
        """Hidden states [B, T, d] after frozen layers: of an earlier pass over the text, or made now."""
        if start == end:
            return hidden
        if self.bottoms is None or rows is None:
            return _through(stack, trunk, hidden, start, end)[end]
        made = self.bottoms.at(name, rows, lambda: _through(stack, trunk, hidden, start, end)[end])
        return made.to(self.student.device)

    def _watched(self, hidden: Tensor, term: int) -> Tensor:
        """The same tensor; the squared norm of the gradient that a term sends through it is summed up."""
        if not hidden.requires_grad:
            return hidden
        branch = hidden.view_as(hidden)

        def note(gradient):
            self.squares[term] += gradient.detach().float().square().sum().to(self.squares.device)

        branch.register_hook(note)
        return branch


def _through(
    stack: LayerStack, trunk: Trunk, hidden: Tensor, start: int, end: int, wanted: Set[int] = frozenset()
) -> dict[int, Tensor]:
    """Hidden states [B, T, d] by depth, at `end` and where `wanted`, of the layers at positions start .. end - 1."""
    found = {}
    for position in range(start, end):
        hidden = stack.run(position, hidden, trunk)
        if position + 1 in wanted:
            found[position + 1] = hidden
    return found | {end: hidden}
