"""How alike hidden states are across layers (redundancy) and across models (drift); the logit lens.

One batch's hidden states are in memory at a time, and sums are in fp64 where the device has it. h[l] is the *input* of
layer l and bears its layer id; "out" is h[L], the last layer's output before the final norm. The first token of a
sequence often has a huge, constant hidden state (an attention sink with massive activations, Sun et al. 2024,
arXiv 2402.17762): `skip_first=True` leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ildlab.errors import MeasureError
from ildlab.importance.cka import Cka
from ildlab.importance.one_pass import apart, token_mean
from ildlab.importance.samples import rounds
from ildlab.limits import check_input
from ildlab.model.capture import sent
from ildlab.model.head import in_fp64, log_probabilities
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, Work, blocking
from ildlab.stats import interval, mean, means, resamples
from ildlab.text.blocks import encode_prompts
from ildlab.text.rows import Rows
from ildlab.typed import at_least_one

AS = {"cosine": "block_influence", "relative_l2": "relative_l2"}  # kind of drift -> the same between two layers
BATCH = 4  # sequences whose hidden states are in memory at one time
TOKENS = 256  # whose [L+1, L+1] cosines are made at one time


def redundancy_steps(
    model: LayerStack, blocks: Any, kind: str = "cosine", *, skip_first: bool = False
) -> Work[pd.DataFrame]:
    """Likeness (or distance) of every two hidden states h[i], h[j] on blocks, as `measure` takes them.

    Parameters
    ----------
    kind : {"cosine", "angular", "cka"}
        Mean over tokens of the cosine of h[i] and h[j], or of the angle between them over pi (a distance); linear CKA.
    skip_first : bool
        Leave out the first valid token of each sequence.

    Returns
    -------
    DataFrame [L+1, L+1], indexed both ways by layer id and, last, "out". MeasureError where it is not finite.
    """
    _check(kind, ("cosine", "angular", "cka"))
    return (yield from _redundancy_steps(model, kind, _batches(_rows(model, blocks), skip_first)))


redundancy = blocking(redundancy_steps)


def block_distances(model: LayerStack, blocks: Any, **options: Any) -> pd.DataFrame:
    """Angular distance across every block of n consecutive layers; options are those of `redundancy`.

    Gromov et al. 2024 (arXiv 2403.17887), eq. 7-8, as a mean over tokens: from the input of layer `start` to the output
    of the n-th layer from it. The least of a row is the block of n layers to drop.

    Returns
    -------
    DataFrame [L, L], indexed by n = 1..L, columns by the layer id `start`; NaN where the stack ends first
    """
    matrix, depth = redundancy(model, blocks, "angular", **options).to_numpy(), len(model)
    triangle = np.full((depth, depth), np.nan)
    for n in range(1, depth + 1):
        triangle[n - 1, : depth - n + 1] = np.diagonal(matrix, n)
    starts = pd.Index(model.layer_ids, name="start")
    return pd.DataFrame(triangle, pd.RangeIndex(1, depth + 1, name="n"), starts)


def drift_steps(
    student: LayerStack, teacher: LayerStack, blocks: Any, kind: str = "cosine", *, skip_first: bool = False
) -> Work[pd.DataFrame]:
    """How far the student's hidden states are from the teacher's at the same layer id, of which it has all.

    Parameters are those of `redundancy`, but for `kind`, {"cosine", "relative_l2"}: mean over tokens of 1 - cosine, or
    of |student - teacher| / |teacher|.

    Returns
    -------
    DataFrame, indexed by the student's layer ids and "out"
        `drift` (0 below the first change), `ci_low`, `ci_high` (95% bootstrap over sequences), `n` (sequences).
    """
    _check(kind, AS)
    _check_pair(student, teacher)
    return (yield from _drift_steps(student, teacher, kind, _batches(_rows(student, blocks), skip_first)))


drift = blocking(drift_steps)


@torch.no_grad()
def token_drift_steps(
    student: LayerStack, teacher: LayerStack, text: Any, tokenizer: Any = None
) -> Work[pd.DataFrame]:
    """1 - cosine at every token of one text, a str (with a tokenizer) or int Tensor [T]; see `drift`.

    Returns
    -------
    DataFrame [layers + 1, T]
        Indexed by layer id and "out"; columns are positions; `.attrs["tokens"]` holds their texts.
    """
    _check_pair(student, teacher)
    ids, words = _encode(student, text, tokenizer)
    rows: list[Tensor] = []
    for mine, theirs in _pairs(student, teacher, ids):
        rows.append(apart(theirs, mine, AS["cosine"])[0])  # [1, T] -> [T]
        yield Progress(len(rows), len(student) + 1)
    table = pd.DataFrame(torch.stack(rows).cpu().numpy(), index=_labels(student))
    table.columns.name = "position"
    table.attrs["tokens"] = words
    return table


token_drift = blocking(token_drift_steps)


@torch.no_grad()
def logit_lens_steps(
    model: LayerStack, text: Any, tokenizer: Any, *, teacher: LayerStack | None = None, top: int = 5
) -> Work[pd.DataFrame]:
    """What each hidden state would predict if the model ended there, through its own final norm and head.

    nostalgebraist 2020, "interpreting GPT: the logit lens".

    Parameters
    ----------
    text : str or int Tensor [T]
    teacher : LayerStack, optional
        Adds its rows.
    top : int
        Tokens to keep, most likely first.

    Returns
    -------
    DataFrame, one row for each model, layer and position
        `model` ("student" or "teacher"), `layer` (layer id or "out"), `position`, `token`, `top` (list of str),
        `probability` (list of float), `entropy` (nats), `target_probability` (of the token that follows; else NaN).
    """
    at_least_one(MeasureError, top=top)
    ids, words = _encode(model, text, tokenizer)
    found: list[tuple[str, Any, list[Tensor]]] = []
    total = sum(len(stack) + 1 for stack in (model, teacher) if stack is not None)
    for who, stack in {"student": model, "teacher": teacher}.items():
        for layer, hidden in zip(_labels(stack), stack.walk(ids), strict=True) if stack is not None else ():
            log_p = log_probabilities(stack.logits(hidden[0]))  # [1, T, d] -> [T, V]
            best = log_p.topk(top, -1)  # [T, top]
            following = log_p[:-1].gather(1, ids[0, 1:, None].to(log_p.device))[:, 0].exp()  # [T - 1]
            entropy = -(log_p.exp() * log_p).sum(-1)  # [T]
            found.append((who, layer, [best.indices, best.values.exp(), entropy, following]))
            yield Progress(len(found), total)
    tables = []
    for who, layer, tensors in found:  # to the host when all is computed
        indices, probability, entropy, following = (tensor.tolist() for tensor in tensors)
        columns = {
            "model": who,
            "layer": layer,
            "position": range(len(words)),
            "token": words,
            "top": [[tokenizer.decode([i]) for i in row] for row in indices],
            "probability": probability,
            "entropy": entropy,
            "target_probability": [*following, np.nan],
        }
        tables.append(pd.DataFrame(columns).astype({"layer": object}))
    return pd.concat(tables, ignore_index=True)


logit_lens = blocking(logit_lens_steps)


def _check(kind: str, kinds: Iterable[str]) -> None:
    if kind not in kinds:
        raise MeasureError(f"There is no kind {kind!r} here. Choose one of: {', '.join(kinds)}.")


def _check_pair(student: LayerStack, teacher: LayerStack) -> None:
    alien = [i for i in student.layer_ids if i not in teacher.layer_ids]
    if alien or student.hidden_size != teacher.hidden_size:
        widths = (
            f"width {student.hidden_size} and {teacher.hidden_size}; layers that the teacher lacks: {alien or 'none'}"
        )
        raise MeasureError(f"Student and teacher do not belong together: {widths}.")


def _rows(model: LayerStack, blocks: Any) -> Rows:
    rows = Rows.of(blocks)
    check_input(model.model, rows.tokens)
    return rows


def _labels(stack: LayerStack) -> pd.Index:
    return pd.Index([*stack.layer_ids, "out"], name="layer_id", dtype=object)


def _encode(model: LayerStack, text: Any, tokenizer: Any) -> tuple[Tensor, list[str]]:
    """Token ids [1, T] of a text, and what each of them says."""
    if not isinstance(text, str):
        ids = torch.as_tensor(text).reshape(1, -1).long()  # [T] -> [1, T]
    elif tokenizer is None:
        raise MeasureError("A text needs its tokenizer: give tokenizer=, or token ids [T].")
    else:
        ids = torch.tensor(encode_prompts(tokenizer, [text]))
    if not ids.shape[1]:
        raise MeasureError("The text is empty: give at least one token.")
    check_input(model.model, ids, tokenizer=tokenizer)
    return ids, [str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids[0].tolist()]


def _pairs(student: LayerStack, teacher: LayerStack, batch: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The student's hidden states [B, T, d] and the teacher's at the same layer id, walking both together."""
    theirs = zip(_labels(teacher), teacher.walk(batch), strict=True)
    for label, mine in zip(_labels(student), student.walk(batch), strict=True):
        yield mine, next(hidden for at, hidden in theirs if at == label)


def _batches(rows: Rows, skip_first: bool) -> Iterator[tuple[Any, Tensor, Progress]]:
    """Batch by batch: what a stack takes, which of its tokens count [B, T], and how far that is."""
    mask = torch.ones_like(rows.tokens, dtype=torch.bool) if rows.mask is None else rows.mask
    for picked in rounds(len(mask), BATCH):
        valid = mask[picked]
        valid = valid & (valid.cumsum(1) > 1) if skip_first else valid
        yield rows.batch(picked), valid, Progress(picked[-1] + 1, len(mask))


@torch.no_grad()
def _redundancy_steps(model: LayerStack, kind: str, batches: Iterator) -> Work[pd.DataFrame]:
    cka, above, count = Cka(), 0.0, 0
    for batch, valid, progress in batches:
        counted = sent(valid.flatten().nonzero()[:, 0], model.device)  # told on the host: a mask on a GPU waits for it
        states = torch.stack(
            [h.flatten(0, 1)[counted] for h in model.walk(batch)]
        )  # [L+1, tokens, d] of this batch alone
        if kind == "cka":
            cka.add(states)
        else:
            for part in states.split(TOKENS, dim=1):
                u = in_fp64(part).transpose(0, 1)  # [tokens, L+1, d]
                u = u / torch.linalg.vector_norm(u, dim=-1, keepdim=True)
                cosine = u @ u.mT  # [tokens, L+1, L+1]
                above = above + (cosine if kind == "cosine" else cosine.clamp(-1, 1).arccos() / torch.pi).sum(0)
                count += len(u)
        yield progress
    matrix = (cka.matrix() if kind == "cka" else above / max(count, 1)).cpu().double().numpy()
    if kind == "angular":
        np.fill_diagonal(matrix, 0.0)  # arccos of a rounded 1
    labels = _labels(model)
    return _finite(pd.DataFrame(matrix, index=labels, columns=labels), kind)


@torch.no_grad()
def _drift_steps(student: LayerStack, teacher: LayerStack, kind: str, batches: Iterator) -> Work[pd.DataFrame]:
    found, counts = [], []
    for batch, valid, progress in batches:
        here, pairs = sent(valid, student.device), _pairs(student, teacher, batch)
        columns = [token_mean(apart(theirs, mine, AS[kind]), here) for mine, theirs in pairs]  # L+1 of [B]
        found.append(torch.stack(columns, 1).cpu().double())  # [B, L+1]
        counts.append(valid.sum(1))
        yield progress
    values, weights = torch.cat(found).numpy(), torch.cat(counts).numpy()  # [N, L+1], [N]
    score, n = mean(values, weights), len(values)
    table = _finite(pd.DataFrame({"drift": score}, index=_labels(student)), kind)
    low, high = interval(score, means(resamples(n), values, weights), n)
    return table.assign(ci_low=low, ci_high=high, n=n)


def _finite(table: pd.DataFrame, kind: str) -> pd.DataFrame:
    bad = table.index[~np.isfinite(table.to_numpy(float)).all(1)]
    if len(bad):
        why = "the hidden states overflow, a sequence has no token left to compare, or (CKA) there are fewer than 4"
        raise MeasureError(f"{kind} is not finite at layer {bad[0]}: {why}.")
    return table
