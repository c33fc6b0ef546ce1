"""One micro-batch of distillation: both decoders and the loss in one module's forward.

DDP wraps this module, so that gradients of the trained layers are averaged as the backward pass runs.
The bottom layers that teacher and student share run once for both, nothing below the lowest trained
layer builds a graph, and what a teacher cache holds, or an earlier pass over the text left, is not run at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ildlab.distill.bottoms import BottomStore
from ildlab.distill.config import DistillConfig
from ildlab.distill.fused import fused_divergence
from ildlab.distill.losses import hidden_distance, naive_divergence
from ildlab.model.head import normed
from ildlab.model.shared import shared_prefix
from ildlab.model.stack import LayerStack


@dataclass
class Counts:
    """Tokens of the whole global batch that the sums of each term are divided by."""

    hidden: int
    kl: int
    ce: int


class DistillStep(nn.Module):
    """The loss of a student against its teacher on one micro-batch.

    Parameters
    ----------
    student, teacher : LayerStack
        The student's trained layers hold weights of their own.
    trained : sequence of int
        Layer ids that train.
    points : sequence of int
        Layer ids after which hidden states are matched.
    config : DistillConfig
    """

    def __init__(
        self,
        student: LayerStack,
        teacher: LayerStack,
        trained: Sequence[int],
        points: Sequence[int],
        config: DistillConfig,
    ):
        super().__init__()
        self.student, self.teacher, self.config = student, teacher, config
        # Only what trains is registered: DDP looks at nothing else.
        self.layers = nn.ModuleList(student.layers[student.position(i)] for i in trained)
        self.first = student.position(trained[0])
        self.prefix = min(shared_prefix(student, teacher), self.first)
        last = student.layer_ids[-1]
        # Point -> the teacher's depth whose hidden state it meets: after the layer of the same id.
        self.depth = {i: len(teacher) if i == last else teacher.position(i) + 1 for i in points}
        # The published formula adds both terms, even where the last trainable layer is the last layer.
        both = config.reduction == "paper" and config.hidden_at == "last_trainable+last" and len(points) == 1
        self.times = 2 if both else 1
        self.squares = torch.zeros(2, device=student.device)  # no copy to the host in a backward hook
        self.bottoms: BottomStore | None = None

    def keep_bottoms(self, rows: int, block: int, limit: int) -> int:
        """Keep what frozen bottom layers give in memory, where it fits; returns the bytes it will take.

        Parameters
        ----------
        rows, block : int
            Rows of the text and tokens in a row.
        limit : int
            Bytes; a larger store is not made.
        """
        # The shared bottom serves both models; the student's own frozen layers end at its lowest trained one.
        names = ["shared"] * (self.prefix > 0) + ["student"] * (self.first > self.prefix)
        shape = (rows, block, self.student.hidden_size, names, self.student.model.dtype)
        size = BottomStore.size(*shape)
        if not names or size > limit:
            return 0
        self.bottoms = BottomStore(*shape)
        return size

    @property
    def depths(self) -> set[int]:
        """Depths of the teacher's hidden states that the loss needs."""
        return {*self.depth.values(), len(self.teacher)}

    def forward(
        self,
        batch: dict[str, Tensor],
        counts: Counts,
        positions: Tensor | None = None,
        known: dict[int, Tensor] | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss and statistics of a micro-batch.

        Parameters
        ----------
        batch : dict with `input_ids` [B, T] and, where there is padding, `attention_mask` [B, T]
        counts : Counts
            Of the global batch: losses of micro-batches and processes add up.
        positions : Tensor [B, P] int64, optional
            Where divergence and cross entropy are computed; everywhere by default.
        known : dict of int to Tensor [B, T, d], optional
            Hidden states of the teacher by depth, from a cache.
        rows : Tensor [B] int64, optional
            Which rows of the text these are, for `keep_bottoms`.

        Returns
        -------
        loss : Tensor, scalar
        stats : Tensor [3 + points]
            Sums over this micro-batch: divergence, cross entropy, agreeing top tokens, then the hidden-state
            distance at each point, without gradient.
        """
        config, student = self.config, self.student
        mine, theirs = self._hidden(batch, known or {}, rows)
        final = mine[len(student)]
        ids = batch["input_ids"].to(final.device)
        mask = batch.get("attention_mask")
        mask = torch.ones(ids.shape, device=final.device) if mask is None else mask.to(final.device).float()
        paper = config.reduction == "paper"

        loss = torch.zeros((), device=final.device)
        distances = []
        for layer_id, depth in self.depth.items():
            a, b = mine[student.position(layer_id) + 1], theirs[depth]
            a = self._watched(a, 1)
            if config.hidden_after_norm and depth == len(self.teacher):
                a, b = normed(student, a), normed(self.teacher, b).detach()
            distance = hidden_distance(a, b, config.hidden_loss)
            total = distance.sum() if paper else (distance * mask).sum()
            loss = loss + total * (config.hidden_weight * self.times / counts.hidden)
            distances.append(total.detach())

        stats = torch.zeros(3, device=final.device)
        if config.kl_weight or config.ce_weight:
            head_loss, stats = self._head(final, theirs[len(self.teacher)], ids, mask, positions, counts)
            loss = loss + head_loss
        return loss, torch.cat([stats, torch.stack(distances)]) if distances else stats

    def _head(self, final, target, ids, mask, positions, counts):
        config = self.config
        # Position t predicts token t + 1; the last position of a block has no label.
        labels = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
        label_mask = mask * torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
        final = self._watched(final, 0)
        if positions is not None:
            at = positions.to(final.device)
            wide = at[..., None].expand(-1, -1, final.shape[-1])
            final, target = final.gather(1, wide), target.gather(1, wide)
            mask, labels, label_mask = (x.gather(1, at) for x in (mask, labels, label_mask))
        if config.reduction == "paper":
            weights = torch.full_like(mask, config.kl_weight / 100)
        else:
            weights = mask * (config.kl_weight / counts.kl)
        if not config.kl_weight:
            weights = torch.zeros_like(mask)
        use = fused_divergence if config.fused else naive_divergence
        extra = {"chunk": config.chunk} if config.fused else {}
        if config.ce_weight:
            extra["labels"] = labels.flatten()
            extra["label_weights"] = (label_mask * (config.ce_weight / counts.ce)).flatten()
        return use(
            self.student,
            self.teacher,
            final.flatten(0, 1),
            target.flatten(0, 1),
            config.spec,
            weights=weights.flatten(),
            **extra,
        )

    def _hidden(self, batch, known, rows) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Hidden states by depth: the student's from its first trained layer up, the teacher's that are needed."""
        student, teacher = self.student, self.teacher
        trunk = student.trunk(batch)
        device, dtype = trunk.h0.device, trunk.h0.dtype
        theirs = {depth: h.to(device, dtype) for depth, h in known.items()}
        store = self.bottoms if rows is not None else None
        with torch.no_grad():
            shared = store.get("shared", rows, device) if store else None
            entry = store.get("student", rows, device) if store else None
            whole = self.depths <= set(theirs)  # the teacher need not run
            start = max((d for d in theirs if d <= self.prefix), default=0)
            hidden = theirs[start] if start else trunk.h0.detach()
            full = trunk if whole else teacher.trunk(batch)
            if not (whole and entry is not None):
                if shared is not None:
                    hidden, start = shared, self.prefix
                for depth in range(start, self.prefix):
                    hidden = (student if whole else teacher).run(depth, hidden, full)
                if store and shared is None:
                    store.put("shared", rows, hidden)
            if not whole:
                upper = hidden
                for depth in range(self.prefix, len(teacher)):
                    upper = teacher.run(depth, upper, full)
                    if depth + 1 in self.depths:
                        theirs[depth + 1] = upper
            if entry is not None:
                hidden = entry
            else:
                for position in range(self.prefix, self.first):
                    hidden = student.run(position, hidden, trunk)
                if store and self.first > self.prefix:
                    store.put("student", rows, hidden)
        mine: dict[int, Tensor] = {}
        keep = {student.position(i) + 1 for i in self.depth} | {len(student)}
        for position in range(self.first, len(student)):
            if self.config.grad_checkpointing:
                hidden = checkpoint(student.run, position, hidden, trunk, use_reentrant=False)
            else:
                hidden = student.run(position, hidden, trunk)
            if position + 1 in keep:
                mine[position + 1] = hidden
        return mine, theirs

    def _watched(self, hidden: Tensor, term: int) -> Tensor:
        """The same tensor; the squared norm of the gradient that a term sends through it is summed up."""
        if not hidden.requires_grad:
            return hidden
        branch = hidden.view_as(hidden)

        def note(gradient):
            self.squares[term] += gradient.detach().float().square().sum().to(self.squares.device)

        branch.register_hook(note)
        return branch
