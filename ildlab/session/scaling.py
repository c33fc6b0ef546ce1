"""What the method costs on a model of any size, counted on paper: layer calls, operations, bytes, memory.

A product of matrices is two operations for each weight and token; normalisation, activation functions and softmax
are left out. `notebooks/batch/scaling.ipynb` holds these counts against those of SmolLM2 as it runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

from ildlab.distill.scope import resolve_scope
from ildlab.errors import SessionError
from ildlab.model.stack import LayerStack

TRAINED_BYTES = 18  # a trained weight: bf16 at work, fp32 master and gradient, two fp32 moments of Adam
WAYS = ("one pass", "sweep", "separate runs")


@dataclass(frozen=True)
class ModelShape:
    """A decoder of equal layers, by what its cost depends on."""

    layers: int
    hidden: int  # width of a hidden state
    layer_weights: int  # in the matrices of one layer
    mixed: int  # query heads times their size: what attention does for each token and token attended
    vocabulary: int
    tied: bool = True  # the head is the embedding

    @classmethod
    def gated(
        cls, layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = True
    ) -> ModelShape:
        """A model of the Llama, Qwen and Mistral kind: grouped queries, a gated feed-forward of `inner` units."""
        kv = hidden // heads * kv_heads
        return cls(layers, hidden, hidden * (2 * hidden + 2 * kv + 3 * inner), hidden, vocabulary, tied)

    @classmethod
    def of(cls, stack: LayerStack) -> ModelShape:
        """The shape of a loaded model whose layers are alike."""
        config, layer = stack.model.config.get_text_config(), stack.layers[0]
        weights = sum(p.numel() for p in layer.parameters() if p.ndim > 1)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        tied = bool(getattr(stack.model.config, "tie_word_embeddings", False))
        mixed = config.num_attention_heads * size
        return cls(len(stack), stack.hidden_size, weights, mixed, config.vocab_size, tied)

    @property
    def weights(self) -> int:
        """Weights in all matrices."""
        return self.layers * self.layer_weights + self.hidden * self.vocabulary * (1 if self.tied else 2)

    def trained(self, removed: list[int], scope: str) -> list[int]:
        """Layer ids that train in a student without the layers `removed`, by `DistillConfig.scope`."""
        return resolve_scope(
            scope, SimpleNamespace(layer_ids=[i for i in range(self.layers) if i not in removed]), removed
        )

    def layer_operations(self, block: int) -> float:
        """Operations of one layer for one token of a block, forward; attention as the full square of the block."""
        return 2 * self.layer_weights + self.attention(block)

    def attention(self, block: int) -> float:
        """Of these, the two products of attention."""
        return 4 * block * self.mixed

    @property
    def head_operations(self) -> float:
        """Operations of the head for one token."""
        return 2 * self.hidden * self.vocabulary


@dataclass(frozen=True)
class Cost:
    """Counts of some work; they add up."""

    layer_calls: float = 0  # of a layer, for a batch, forward
    head_positions: float = 0  # tokens whose logits are computed, forward
    operations: float = 0  # forward and backward
    bytes: float = 0  # of weights read, in 2 bytes each, each call reading them once

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.layer_calls + other.layer_calls,
            self.head_positions + other.head_positions,
            self.operations + other.operations,
            self.bytes + other.bytes,
        )

    def seconds(self, operations: float, bandwidth: float) -> float:
        """Time on a device of so many operations and bytes a second: whichever of the two takes longer."""
        return max(self.operations / operations, self.bytes / bandwidth)


def measuring(shape: ModelShape, way: str, tokens: int, block: int, rows: int, positions: int | None = None) -> Cost:
    """Cost of measuring every layer once on `tokens` tokens, in batches of `rows` blocks.

    `way` is "one pass" (Block Influence), "sweep" (`kl` or `nll`, trunk-shared) or "separate runs" (the model without
    each layer in turn, as by hand). `positions` of each block are scored; None is all.
    """
    if way not in WAYS:
        raise SessionError(f"way={way!r}: choose from {', '.join(map(repr, WAYS))}.")
    layers, batches = shape.layers, math.ceil(tokens / (rows * block))
    passes = {"one pass": layers, "sweep": layers * (layers + 1) // 2, "separate runs": layers**2}[way]
    heads = 0 if way == "one pass" else (layers + 1) * tokens / block * min(positions or block, block)
    operations = passes * tokens * shape.layer_operations(block) + heads * shape.head_operations
    return Cost(passes * batches, heads, operations, 2 * passes * batches * shape.layer_weights)


def distilling(
    shape: ModelShape,
    removed: list[int],
    tokens: int,
    block: int,
    rows: int,
    *,
    scope: str = "window(3)",
    local: bool = False,
    positions: int | None = None,
) -> Cost:
    """Cost of distilling a student without the layers `removed`, on `tokens` tokens: the joint or the `local` stage.

    What teacher and student share below the lowest layer that was removed or trains runs once. A trained layer's
    backward pass is twice its forward pass; through a frozen one above, products cost once and attention twice. To the
    local stage belong two looks at the KL of a batch, before it and after it. In a second pass over the same text the
    library saves what lies below the lowest trained layer: that is not reckoned with.
    """
    ids = [i for i in range(shape.layers) if i not in removed]
    trained = shape.trained(removed, scope)
    first = ids.index(trained[0])
    shared = min([*removed, first])
    top = ids.index(trained[-1]) + 1 if local else len(ids)  # of the student, that runs
    above = trained[-1] + 1 if local and trained[-1] != ids[-1] else shape.layers  # of the teacher
    forward = above + top - shared
    frozen = 0 if local else top - first - len(trained)
    layer, attention = shape.layer_operations(block), shape.attention(block)
    of_layers = (forward + 2 * len(trained)) * layer + frozen * (layer + attention)
    heads = 0 if local else tokens / block * min(positions or block, block)
    operations = tokens * of_layers + 3 * heads * shape.head_operations
    steps = math.ceil(tokens / (rows * block))
    passes = forward + 2 * len(trained) + frozen
    cost = Cost(forward * steps, 2 * heads, operations, 2 * passes * steps * shape.layer_weights)
    if not local:
        return cost
    whole, batch = shape.layers + len(ids) - shared, rows * block
    look = batch * (whole * layer + 2 * shape.head_operations)
    return cost + Cost(2 * whole, 4 * batch, 2 * look, 4 * whole * shape.layer_weights)


def memory(shape: ModelShape, *, trained: int = 0, branches: int = 0, batch_tokens: int = 0) -> dict[str, float]:
    """Bytes that weights in bf16, the training of `trained` layers and hidden states of so many branches take.

    What a backward pass keeps of a layer's inside is not among them: it depends on the kernels.
    """
    return {
        "weights": 2 * shape.weights,
        "training": TRAINED_BYTES * trained * shape.layer_weights,
        "branches": 2 * branches * batch_tokens * shape.hidden,
    }
