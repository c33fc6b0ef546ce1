"""What a picture of the stack shows: units, a `Column` of each layer, a `Row` of each iteration, told from scores."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

UNITS = {
    "block_influence": "Block Influence (1 − cosine)",
    "angular_distance": "angular distance (fraction of π)",
    "mse": "MSE of consecutive hidden states",
    "relative_l2": "relative L2 step of the hidden state",
    "cosine": "cosine similarity",
    "angular": "angular distance (fraction of π)",
    "cka": "linear CKA (0 to 1)",
    "lrp": "relevance of the layer (summed |R|)",
    "magnitude": "sum of |weight|",
    "taylor": "first-order effect on the loss (nats/token)",
    "nll": "NLL rise without the layer (nats/token)",
    "kl": "KL to the teacher without the layer (nats/token)",
    "task": "drop of the suite aggregate without the layer",
    "perplexity": "perplexity",
    "aggregate": "suite aggregate (0 to 1)",
}
SAID = {
    "suggested": "to be removed next",
    "tied": "tied with the least important",
    "dropped": "left the race early",
    "unscored": "not scored this time",
}


def label_of(metric: str) -> str:
    """Axis label of a metric: what it is, with its unit."""
    return UNITS.get(metric, metric.replace("_", " "))


def unit_of(scores: Any) -> str:
    """Axis label of `LayerScores`: their metric's, but of several kinds of text each is in units of its median layer."""
    return f"{scores.metric}, of each kind's median layer" if scores.kinds else label_of(scores.metric)


@dataclass(frozen=True)
class Column:
    """A layer as it is drawn. `state`: "kept", "suggested", "tied", "dropped" (by a race), "unscored" or "removed"."""

    layer_id: int
    state: str = "kept"
    score: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0  # sequences that the score is from
    off: bool = False
    trained: bool = False
    trains: bool = False  # just now
    drift: float | None = None  # of the hidden state after it from the teacher's, while it trains
    words: str = ""  # all that is known of it, for those who point or listen


@dataclass(frozen=True)
class Row:
    """An iteration of a run below the columns: the scores that it decided on, and what it took."""

    step: int
    scores: dict[int, float]  # layer id -> score; a layer that was there and not scored has NaN
    removed: int
    words: str = ""
    undone: bool = False


def columns_of(
    layer_ids: Iterable[int],
    scores: Any = None,
    *,
    here: Collection[int] | None = None,
    shown: Any = None,
    trained: Collection[int] = (),
    off: Collection[int] = (),
    current: bool = True,
) -> list[Column]:
    """The columns of a stack, bottom first.

    Parameters
    ----------
    layer_ids : iterable of int
        Of the teacher.
    scores : LayerScores, optional
        They say which layer is suggested, which are tied with it, and which a race dropped.
    here : collection of int, optional
        Layer ids of today's student, by default all; the others were removed.
    shown : LayerScores, optional
        Whose heights are drawn, such as those of one kind of text; by default `scores`.
    trained, off : collection of int
        Layers that are no longer the teacher's, and those that are switched off.
    current : bool
        False: the scores are of an earlier student, and suggest nothing.
    """
    layer_ids = list(layer_ids)
    here = layer_ids if here is None else here
    shown = scores if shown is None else shown
    states: dict[int, str] = {}
    if scores is not None:
        states |= dict.fromkeys(scores.unscored, "unscored")
        states |= {i: "dropped" for i in set(scores.layer_ids) - set(scores.finalists)}
        if current:
            states |= dict.fromkeys(scores.tied, "tied") | {scores.least_important: "suggested"}
    out = []
    for layer_id in layer_ids:
        state = states.get(layer_id, "kept") if layer_id in here else "removed"
        known = state != "removed" and shown is not None and layer_id in shown.table.index
        row = shown.table.loc[layer_id] if known else None
        words = [f"layer {layer_id}" + (" (removed)" if state == "removed" else f"; depth {_depth(layer_id, here)}")]
        words += [score_words(shown, layer_id), _rank(shown, layer_id)] if known else []
        words += [SAID[state]] if state in SAID else []
        words += ["trained"] if layer_id in trained else ["the teacher's own weights"] if state != "removed" else []
        words += ["switched off"] if layer_id in off else []
        found = {"score": row.score, "low": row.ci_low, "high": row.ci_high} if known else {}
        values = {name: float(value) for name, value in found.items()} | {"n": int(row.n) if known else 0}
        marks = {"off": layer_id in off, "trained": layer_id in trained}
        out.append(Column(layer_id, state, **values, **marks, words="; ".join(words)))
    return out


def score_words(scores: Any, layer_id: int) -> str:
    """The score of a layer, with its interval and the number of sequences that it is from."""
    row = scores.table.loc[layer_id]
    return f"{scores.metric} {row.score:.4g} [{row.ci_low:.4g}, {row.ci_high:.4g}], n={int(row.n)}"


def _depth(layer_id: int, here: Collection[int]) -> str:
    return f"{sum(i <= layer_id for i in here)} of {len(here)}"


def _rank(scores: Any, layer_id: int) -> str:
    return f"number {scores.ranking.index(layer_id) + 1} of {len(scores.table)} from the least important"
