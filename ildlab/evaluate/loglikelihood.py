"""Log-likelihoods of many continuations: shared tokens run once, the head only where it is needed.

`ildlab.evaluate.packing` plans the passes. A model whose attention does not take packed trees (linear attention,
ALiBi, flash attention) is found out on a small one, and gets a plain right-padded row for each request.

Tokenisation follows lm-eval's `HFLM`: the context and the whole string are encoded, and the continuation is what the whole
has beyond the context; an empty context is the BOS (or EOS) token. But no text is ended: of a tokenizer that appends an EOS,
lm-eval's contexts would end in it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ildlab.errors import IldlabError, SuiteError
from ildlab.evaluate.packing import Batch, Encoded, make_batches
from ildlab.limits import check_ids, model_window
from ildlab.model.capture import sent
from ildlab.model.head import chunk_rows
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, Work
from ildlab.text.blocks import encode_prompts

ENGINE = 4  # raise it when scoring changes, so that kept results are not mistaken for today's


@dataclass
class Outcomes:
    """What was found for each of R requests, in the order they were given."""

    loglikelihood: np.ndarray  # [R] float64: sum of ln p over the continuation's tokens
    matched: np.ndarray  # [R] int: leading tokens of the continuation that greedy decoding would produce
    length: np.ndarray  # [R] int: tokens of the continuation

    @classmethod
    def empty(cls, encoded: Sequence[Encoded]) -> Outcomes:
        """To be filled batch by batch."""
        length = np.array([len(e.continuation) for e in encoded], dtype=np.int64)
        return cls(np.full(len(encoded), np.nan), np.full(len(encoded), -1, dtype=np.int64), length)

    def finite(self, requests: Any = slice(None)) -> bool:
        """Whether these requests' log-likelihoods are numbers: of NaN, `argmax` would make an answer."""
        return bool(np.isfinite(self.loglikelihood[requests]).all())


def window(stack: LayerStack, tokenizer: Any) -> int:
    """Longest input that the model was made for, as lm-eval resolves it."""
    length = getattr(tokenizer, "model_max_length", None)
    return model_window(stack.model) or (int(length) if length is not None and length < 1e9 else 2048)


def prefix_token(tokenizer: Any) -> int:
    """Token that stands for an empty context: BOS, or EOS where there is none."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise SuiteError(f"{type(tokenizer).__name__} has neither BOS nor EOS, so an empty context cannot be scored.")


def encode(tokenizer: Any, pairs: Iterable[tuple[str, str]], max_length: int) -> list[Encoded]:
    """Encode (context, continuation) pairs; SuiteError where a continuation has no token, or more than the window."""
    pairs = [_shift_spaces(*pair) for pair in pairs]
    wholes = [context + continuation for context, continuation in pairs]
    known = _encode_all(tokenizer, [c for c, _ in pairs if c] + [w for (c, _), w in zip(pairs, wholes) if c], True)
    bare = _encode_all(tokenizer, [w for (c, _), w in zip(pairs, wholes) if not c], False)
    out = []
    for (context, continuation), whole in zip(pairs, wholes):
        if context:
            before = known[context]
            after = known[whole][len(before) :]
        else:
            before, after = (prefix_token(tokenizer),), bare[whole]
            if after and after[0] == before[0]:
                after = after[1:]
        if not 0 < len(after) <= max_length:
            raise SuiteError(
                f"The continuation {continuation[:60]!r} has {len(after)} tokens; it needs at least 1, "
                f"and at most the model's window of {max_length}."
            )
        spare = max_length + 1 - len(after)
        out.append(Encoded(before[-spare:] if len(before) > spare else before, after, len(before) > spare))
    return out


def _shift_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Move trailing white space of the context to the continuation: that is where tokenizers put it."""
    spaces = len(context) - len(context.rstrip())
    return (context[:-spaces], context[-spaces:] + continuation) if spaces else (context, continuation)


def _encode_all(tokenizer: Any, strings: Iterable[str], opened: bool) -> dict[str, tuple[int, ...]]:
    """Token ids of each string, opened as the tokenizer opens a text or bare, and never ended."""
    unique = list(dict.fromkeys(strings))
    if not unique:
        return {}
    if opened:
        rows = encode_prompts(tokenizer, unique)
    else:
        rows = tokenizer(unique, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return {text: tuple(row) for text, row in zip(unique, rows, strict=True)}


def check_requests(stack: LayerStack, encoded: Sequence[Encoded], tokenizer: Any) -> None:
    """Raise ModelError where a request has a token that the model's embedding lacks, as context or as target."""
    ids = {token for one in encoded for token in one.context + one.continuation}
    check_ids(stack.model, torch.tensor(sorted(ids)), tokenizer)


# ------------------------------------------------------------------- scoring


def model_inputs(stack: LayerStack, batch: Batch) -> dict[str, Tensor]:
    """Inputs of a batch for this model: the mask as numbers to add, in its dtype."""
    inputs = dict(batch.inputs)
    if "attention_mask" in inputs:
        dtype = stack.model.dtype
        hidden = torch.zeros(inputs["attention_mask"].shape, dtype=dtype)
        inputs["attention_mask"] = hidden.masked_fill_(~inputs["attention_mask"], torch.finfo(dtype).min)
    return inputs


def read_out(stack: LayerStack, batch: Batch, hidden: Tensor, outcomes: Outcomes) -> None:
    """Fill in the outcomes of a batch's requests from the final hidden state [B, T, d]."""
    take_in(batch, at_head(stack, batch, hidden).cpu(), outcomes)


@torch.no_grad()
def at_head(stack: LayerStack, batch: Batch, hidden: Tensor) -> Tensor:
    """Of each scored token its logit, the log-sum-exp there, and 1 where it is the likeliest: [3, Q] on the device."""
    row, column = sent(batch.head, hidden.device).unbind(1)
    wanted = hidden[row, column]  # [P, d]
    total = torch.empty(len(wanted), dtype=torch.float32, device=hidden.device)
    best = torch.empty(len(wanted), dtype=torch.long, device=hidden.device)
    gold = torch.zeros(len(batch.which), dtype=torch.float32, device=hidden.device)
    which, target = sent(batch.which, hidden.device), sent(batch.target, hidden.device)
    parts = -(-len(wanted) // chunk_rows(stack)) or 1
    size = -(-len(wanted) // parts) or 1  # even parts: a few last positions would cost as much as many
    for start in range(0, len(wanted), size):
        # Of a model over several devices the logits may come back on another than the hidden state's.
        logits = stack.logits(wanted[start : start + size]).to(hidden.device)  # [P, V]
        part = slice(start, start + len(logits))
        top, best[part] = logits.max(-1)  # before the cast: it changes no order
        logits, top = logits.float(), top.float()
        here = (which >= start) & (which < part.stop)
        gold = torch.where(here, logits[(which - start).clamp(0, len(logits) - 1), target], gold)
        # log-sum-exp in place: on a CPU, fresh memory for a vocabulary's numbers is slow.
        total[part] = logits.sub_(top[:, None]).exp_().sum(-1).log_().add_(top)
    return torch.stack([gold, total[which], (best[which] == target).float()])


def take_in(batch: Batch, found: Tensor, outcomes: Outcomes) -> None:
    """Fill in the outcomes of a batch's requests from what `at_head` found [3, Q], on the host."""
    gold, total, hit = found.double().numpy()  # here, since MPS has no fp64
    scored, hit = gold - total, hit.astype(bool)
    count = len(batch.requests)
    outcomes.loglikelihood[batch.requests] = np.bincount(batch.owner, scored, minlength=count)
    # Greedy decoding follows the continuation up to the first miss.
    missed = np.full(count, np.iinfo(np.int64).max)
    place = np.arange(len(batch.owner)) - np.searchsorted(batch.owner, batch.owner)
    np.minimum.at(missed, batch.owner[~hit], place[~hit])
    outcomes.matched[batch.requests] = np.minimum(missed, outcomes.length[batch.requests])


_TREES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def largest_tree(stack: LayerStack) -> int:
    """Tokens in the largest packed tree whose logits are those of plain rows; 0 where none is.

    Tried once a model, on a small tree. Where attention has a window, the tree's mask stands in for the
    window's too (or, in GPT-Neo, its columns are what the window counts), so that a tree must not be longer.
    """
    if stack.model not in _TREES:
        _TREES[stack.model] = _tree_limit(stack.config) if _try_tree(stack) else 0
    return _TREES[stack.model]


_EXPERTS = "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"
# Layers that carry a state along the row: what stands before a branch leaks into it, mask or no mask.
_RECURRENT = ("linear", "mamba", "conv", "recurrent", "hybrid")


def _tree_limit(config: Any) -> int:
    """Tokens in a tree that no window of the attention reaches around; 0 where layers are recurrent."""
    kinds = " ".join(map(str, getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or ()))
    if any(word in kinds for word in _RECURRENT):
        return 0
    limits = [getattr(config, "max_position_embeddings", None)]  # columns: GPT-Neo's own mask has so many
    if getattr(config, "use_sliding_window", True) is not False and (not kinds or "sliding" in kinds):
        limits.append(getattr(config, "sliding_window", None))
    if "local" in kinds:
        limits.append(getattr(config, "window_size", None))
    if not kinds or "chunked" in kinds:
        limits.append(getattr(config, "attention_chunk_size", None))
    return min((limit for limit in limits if limit), default=sys.maxsize)


@torch.no_grad()
def _try_tree(stack: LayerStack) -> bool:
    rows = min(stack.model.get_input_embeddings().weight.shape[0], 30_000)
    ids = [int(i) for i in (np.arange(28) * 7919 + 11) % rows]
    encoded = [Encoded(tuple(ids[:8]), tuple(ids[8 + 4 * k : 12 + 4 * k])) for k in range(3)]
    # The same with another first branch: attention leaves the others exactly as they were, while a
    # state that runs along the row (Mamba, convolutions) carries some of it over, however little.
    other = [Encoded(tuple(ids[:8]), tuple(ids[20:24])), *encoded[1:]]
    found: list[np.ndarray] = []
    for requests, largest in ((encoded, 0), (encoded, 100), (other, 100)):
        outcomes = Outcomes.empty(requests)
        try:
            for batch in make_batches(requests, [0, 0, 0], largest_tree=largest):
                read_out(stack, batch, stack.final(model_inputs(stack, batch)), outcomes)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, IldlabError):
            if not largest:
                raise
            return False  # this model's attention takes no 4-D mask or no positions: plain rows serve it
        found.append(outcomes.loglikelihood)
    plain, tree, changed = found
    exact = stack.model.dtype in (torch.float32, torch.float64)
    same = np.allclose(plain, tree, rtol=2e-6 if exact else 2e-2, atol=1e-4 if exact else 2e-2)
    # The same shapes, and what is masked counts exactly nothing: these are equal in every dtype. But for experts:
    # another branch changes how many tokens each of them gets, and a product's rounding with it.
    experts = any(getattr(stack.config, name, None) for name in _EXPERTS)
    slack = (1e-6 if exact else 1e-2) if experts else 0.0
    return same and np.allclose(tree[1:], changed[1:], rtol=slack, atol=1e-6)


@torch.no_grad()
def score_steps(
    stack: LayerStack, encoded: Sequence[Encoded], groups: Sequence[int], *, note: str = ""
) -> Work[Outcomes]:
    """Score all requests; SuiteError where a log-likelihood is NaN or infinite."""
    outcomes = Outcomes.empty(encoded)
    batches = make_batches(encoded, groups, largest_tree=largest_tree(stack), tokens_per_batch=batch_tokens(stack))
    done, total = 0, sum(batch.tokens for batch in batches)
    for batch in batches:
        read_out(stack, batch, stack.final(model_inputs(stack, batch)), outcomes)
        if not outcomes.finite(batch.requests):
            raise SuiteError(
                f"{note or 'Scoring'}: a log-likelihood is not a finite number. The model's logits are broken: "
                "load it in float32 or bfloat16 rather than float16."
            )
        done += batch.tokens
        yield Progress(done, total, note)
    return outcomes


def batch_tokens(stack: LayerStack) -> int:
    """Tokens in a batch that keep the device busy without filling its memory."""
    return 16_384 if stack.device.type == "cuda" else 1024
