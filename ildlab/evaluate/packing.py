"""Pack requests into rows and batches: tokens that requests have in common go through the model once.

Requests of one example (the choices of a question) and of examples with a common few-shot prompt form
a *tree* of tokens. A tree is packed into one row: each token sees its ancestors alone (a 4-D attention
mask) and has its depth as its position, so that one pass gives exactly what separate passes give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

MERGE = 48  # tokens in common from which on examples share a row
ROW = 768  # tokens in a row that examples share, at most (attention is quadratic in it)


@dataclass(frozen=True)
class Encoded:
    """One request as token ids: what is conditioned on, and what is scored."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    truncated: bool = False  # the context was cut from the left to fit the model's window


@dataclass
class Batch:
    """Rows that go through the model together: P positions at the head, Q scored tokens of K requests."""

    inputs: dict[str, Tensor]  # what `LayerStack.trunk` takes
    head: Tensor  # [P, 2] int64: (row, column) of the positions that the head is computed at
    which: Tensor  # [Q] int64: every scored token's index into `head`
    target: Tensor  # [Q] int64: and its id
    requests: np.ndarray  # [K]
    owner: np.ndarray  # [Q]: every scored token's request, as an index into `requests`; in order

    @property
    def tokens(self) -> int:
        """Tokens that go through the layers, padding included."""
        return self.inputs["input_ids"].numel()


class _Tree:
    """Token sequences of one row, common beginnings stored once."""

    def __init__(self):
        self.ids: list[int] = []
        self.parent: list[int] = []
        self.depth: list[int] = []
        self.children: dict[tuple[int, int], int] = {}
        self.wanted: list[tuple[int, list[int], tuple[int, ...]]] = []  # request, head nodes, targets

    def add(self, request: int, encoded: Encoded) -> None:
        node, path = -1, []
        for token in (encoded.context + encoded.continuation)[:-1]:
            key = (node, token)
            if key not in self.children:
                self.children[key] = len(self.ids)
                self.ids.append(token)
                self.depth.append(self.depth[node] + 1 if node >= 0 else 0)
                self.parent.append(node)
            node = self.children[key]
            path.append(node)
        self.wanted.append((request, path[len(encoded.context) - 1 :], encoded.continuation))

    @property
    def chain(self) -> bool:
        return all(parent == node - 1 for node, parent in enumerate(self.parent))

    def mask(self, size: int) -> np.ndarray:
        seen = np.eye(size, dtype=bool)
        for node, parent in enumerate(self.parent):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


def make_batches(
    encoded: Sequence[Encoded], groups: Sequence[int], *, largest_tree: int, tokens_per_batch: int = 1024
) -> list[Batch]:
    """Plan the passes over all requests: trees to rows, rows of like length to batches, longest first.

    Parameters
    ----------
    groups : sequence of int
        The example that each request belongs to; requests of one example share a row.
    largest_tree : int
        Tokens in the largest tree that the model takes; requests beyond it have plain rows.
    tokens_per_batch : int
        At most (a row longer than that is a batch of its own).
    """
    trees = _trees(encoded, groups, largest_tree)
    trees.sort(key=lambda tree: (-len(tree.ids), tree.ids))
    batches, rows = [], []
    for tree in trees:
        full = rows and (len(rows) + 1) * len(rows[0].ids) > tokens_per_batch
        # A tree's mask holds for its whole batch, and would stand in for the sliding window of a longer row.
        crossing = rows and len(rows[0].ids) > largest_tree >= len(tree.ids)
        if full or crossing:
            batches.append(_batch(rows))
            rows = []
        rows.append(tree)
    return batches + ([_batch(rows)] if rows else [])


def _trees(encoded, groups, largest: int) -> list[_Tree]:
    members: dict[int, list[int]] = {}
    for request, group in enumerate(groups):
        members.setdefault(group, []).append(request)
    # Alphabetical order brings examples with a common few-shot prompt together.
    order = sorted(members.values(), key=lambda requests: encoded[requests[0]].context)
    trees, opened = [], None
    for requests in order:
        contexts = {encoded[r].context for r in requests}
        size = sum(map(len, contexts)) + sum(len(encoded[r].continuation) for r in requests)
        if size > largest:
            for request in requests:
                trees.append(_Tree())
                trees[-1].add(request, encoded[request])
            opened = None
            continue
        alike = zip(opened or (), encoded[requests[0]].context)
        common = sum(1 for _ in takewhile(lambda both: both[0] == both[1], alike))
        if common < MERGE or len(trees[-1].ids) + size - common > min(ROW, largest):
            trees.append(_Tree())
            opened = encoded[requests[0]].context
        for request in requests:
            trees[-1].add(request, encoded[request])
    return trees


def _batch(trees: list[_Tree]) -> Batch:
    size = max(len(tree.ids) for tree in trees)
    ids = np.zeros((len(trees), size), dtype=np.int64)  # [B, T]
    for row, tree in enumerate(trees):
        ids[row, : len(tree.ids)] = tree.ids
    inputs = {"input_ids": torch.from_numpy(ids)}
    if not all(tree.chain for tree in trees):
        positions = np.zeros_like(ids)
        for row, tree in enumerate(trees):
            positions[row, : len(tree.ids)] = tree.depth
        inputs["position_ids"] = torch.from_numpy(positions)
        # Additive: every attention implementation that takes a 4-D mask adds it to the scores.
        inputs["attention_mask"] = torch.from_numpy(np.stack([tree.mask(size) for tree in trees]))[:, None]
    # Without branches plain causal attention is right, and padding at the end changes nothing before it.
    heads: dict[tuple[int, int], int] = {}
    which, target, owner, requests = [], [], [], []
    for row, tree in enumerate(trees):
        for request, nodes, tokens in tree.wanted:
            which += [heads.setdefault((row, node), len(heads)) for node in nodes]
            target += tokens
            owner += [len(requests)] * len(tokens)
            requests.append(request)
    return Batch(
        inputs,
        torch.tensor(list(heads)),
        torch.tensor(which),
        torch.tensor(target),
        np.array(requests),
        np.array(owner),
    )
