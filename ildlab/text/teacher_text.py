"""Text of many kinds that a teacher writes herself: a mix to calibrate and to distill on, for any teacher.

No label is needed: what a student should say is what the teacher says. Answers, summaries, endings and lists are the
teacher's own words; copies are passages followed by themselves; sums are written by rule. Each row is
`{"kind": ..., "split": ..., "parts": [context, target, context, target, ...]}`: a student is scored where it
says a target. `ildlab.text.mix` reads such rows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from ildlab.errors import TextError
from ildlab.files import data_dir
from ildlab.limits import check_input
from ildlab.progress import Progress, Work, blocking
from ildlab.text.blocks import opened, opening_ids
from ildlab.text.sources import checked_texts, encodable, split_of

# min-p (Nguyen et al. 2024): one token of the far tail is enough to derail a small model for the rest of its text.
SAMPLING = {"do_sample": True, "temperature": 0.9, "min_p": 0.03, "top_k": 0}
SHARES = {"copies": 4, "questions": 4, "summaries": 2, "endings": 2, "lists": 1, "arithmetic": 1}
WRITTEN = {"questions": 48, "summaries": 40, "endings": 24, "lists": 40}  # what the teacher writes: tokens at most
SUMMARY = ("\n\nIn short,", "\n\nSummary:", "\n\nThe main idea of this text is", "\n\nTitle:")


def continued(
    model: torch.nn.Module, tokenizer: Any, batch: Sequence[Sequence[int]], new: int, seed: int
) -> list[list[int]]:
    """Let a model go on with each prompt of token ids, by sampling, to its end of text or for `new` tokens.

    Returns what it wrote, without the prompts. Raises TextError where the tokenizer has no EOS token, ModelError where
    prompt and new tokens are more than the model's window, or one of them has no row in its embedding.
    """
    end = check_end(tokenizer)
    width = max(map(len, batch))
    fill = [width - len(ids) for ids in batch]  # on the left, so that all rows go on at one place
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[end] * n + list(ids) for n, ids in zip(fill, batch)])  # [B, width]
    check_input(model, ids, new=new, tokenizer=tokenizer)
    ids = ids.to(device)
    mask = (torch.arange(width, device=device) >= torch.tensor(fill, device=device)[:, None]).long()  # [B, width]
    banned = [i for i in tokenizer.all_special_ids if i != end]
    config = GenerationConfig(
        **SAMPLING, max_new_tokens=new, eos_token_id=end, pad_token_id=end, suppress_tokens=banned
    )
    # `generate` fills what a given config leaves open from the model's own, so that one is set aside.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            out = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    finally:
        model.generation_config = own
    # What follows an answer's end is filling.
    return [row[: row.index(end)] if end in row else row for row in out]


def check_end(tokenizer: Any) -> int:
    """The EOS id of a tokenizer; TextError where it has none."""
    if tokenizer.eos_token_id is None:
        raise TextError("Text cannot be sampled with a tokenizer that has no EOS token: set tokenizer.eos_token.")
    return tokenizer.eos_token_id


def mix_steps(
    model: torch.nn.Module,
    tokenizer: Any,
    documents: Sequence[str],
    *,
    rows: int = 4000,
    batch: int = 64,
    seed: int = 0,
) -> Work[list[dict[str, Any]]]:
    """Make rows of many kinds from a teacher and some prose of hers.

    Parameters
    ----------
    model, tokenizer
        The teacher. A chat template is used where there is one, for half of the questions and summaries.
    documents : sequence of str
        Prose, some hundred passages or more: each row is in the split of the passage that it is made of.
    rows : int
        Rows to make beside the passages themselves, shared out by `SHARES`.
    batch : int
        Prompts that the teacher goes on with at one time.
    seed : int

    Yields Progress in rows, with the rows so far as `partial`, and returns them. Raises TextError where `documents` is
    no list of texts, there are fewer than 20 passages of 40 words, or the tokenizer has no EOS token.
    """
    draw = random.Random(seed)
    documents = [encodable(text) for text in checked_texts(documents)]
    special = [tokenizer.decode([i]) for i in tokenizer.all_special_ids]  # a chat is no prose to take words from
    passages = [t.strip() for t in documents if len(t.split()) >= 40 and not any(mark in t for mark in special)]
    if len(passages) < 20:
        raise TextError(f"A mix needs at least 20 passages of 40 words or more; these have {len(passages)}.")
    counts = {kind: max(1, rows * share // sum(SHARES.values())) for kind, share in SHARES.items()}
    made = [{"kind": "prose", "split": split_of(text), "parts": ["", text]} for text in documents]
    made += [_copy(draw, draw.choice(passages)) for _ in range(counts["copies"])]
    made += [_sums(draw) for _ in range(counts["arithmetic"])]
    total = sum(counts[kind] for kind in WRITTEN)
    yield Progress(0, total, "prompts", list(made))
    done = 0
    for kind, most in WRITTEN.items():
        prompts = [_prompt(kind, draw, passages, tokenizer) for _ in range(counts[kind])]
        prompts.sort(key=lambda prompt: len(prompt[1]))  # of about one length together: less filling
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            ids = [_encoded(tokenizer, text) for _, text in part]
            answers = continued(model, tokenizer, ids, most, draw.getrandbits(63))
            for (split, text), prompt, answer in zip(part, ids, answers, strict=True):
                # Behind its prompt, so that a tokenizer which opens a text with a space of its own keeps this one's.
                said = _cut(kind, tokenizer.decode(prompt + answer)[len(tokenizer.decode(prompt)) :])
                if said.strip():
                    made.append(
                        {"kind": "lists" if kind == "lists" else "answers", "split": split, "parts": [text, said]}
                    )
            done += len(part)
            yield Progress(done, total, kind, list(made))
    return made


make_mix = blocking(mix_steps)


def _encoded(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a prompt, opened as the tokenizer opens a text, or as in packed text by an EOS."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return opened(opening_ids(tokenizer) or (tokenizer.eos_token_id,), ids)


def _cut(kind: str, said: str) -> str:
    """What of a teacher's words is kept: whole sentences, or lines of a list, where there is one that ends."""
    if kind == "lists":
        return "\n".join(said.split("\n")[:5]).rstrip()
    said = said.split("\n\n")[0] if kind == "endings" else said
    end = max(said.rfind(mark) for mark in ".!?")
    return said[: end + 1] if end > 0 else said.rstrip()


# ---- prompts: (split, text) ------------------------------------------------------------------------


def _prompt(kind: str, draw: random.Random, passages: Sequence[str], tokenizer: Any) -> tuple[str, str]:
    if kind == "questions":
        question = draw.choice(_questions())
        text = _asked(draw, tokenizer, question, f"Question: {question}\nAnswer:")
        return split_of(question), text
    if kind == "lists":
        group, items = draw.choice([(g, i) for g, i in _subjects().items() if g != "everyday"])
        first = draw.sample(items, 3)
        text = f"A list of {group}:\n" + "".join(f"{n}. {item}\n" for n, item in enumerate(first, 1)) + "4."
        return split_of(text), text
    passage = draw.choice(passages)
    words = _slice(draw, passage, 25, 55)
    if kind == "summaries":
        plain = words + draw.choice(SUMMARY)
        return split_of(passage), _asked(draw, tokenizer, f"Summarise this in one sentence.\n\n{words}", plain)
    everyday = _subjects().get("everyday", [])  # "The man lost his keys, so he"
    if everyday and draw.random() < 0.4:
        words = draw.choice(everyday)
        return split_of(words), words
    return split_of(passage), _slice(draw, passage, 12, 40)


def _asked(draw: random.Random, tokenizer: Any, message: str, plain: str) -> str:
    """A message in the chat template, or half the time (and where there is none) the plain text."""
    if tokenizer.chat_template is None or draw.random() < 0.5:
        return plain
    chat = [{"role": "user", "content": message}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def _slice(draw: random.Random, passage: str, least: int, most: int) -> str:
    """Some words of a passage, from the beginning of a sentence where it has one in time."""
    passage = " ".join(passage.split())
    starts = [0, *(at + 2 for at in range(len(passage) - 1) if passage[at] in ".!?" and passage[at + 1] == " ")]
    starts = [at for at in starts if len(passage[at:].split()) >= least] or [0]
    return " ".join(passage[draw.choice(starts) :].split()[: draw.randint(least, most)])


def _subjects() -> dict[str, list[str]]:
    seeds = json.loads((data_dir() / "teacher_samples" / "seeds.json").read_text(encoding="utf-8"))
    return {name: group["subjects"] for name, group in seeds["openings"].items()}


def _questions() -> list[str]:
    seeds = json.loads((data_dir() / "teacher_samples" / "seeds.json").read_text(encoding="utf-8"))
    asked = [
        frame.replace("{}", subject)
        for name, frames in seeds["asked"].items()
        for frame in frames
        for subject in seeds["openings"][name]["subjects"]
    ]
    return [*seeds["questions"] * 4, *asked]  # those written one by one are the more varied ones


# ---- kinds that nobody need write ------------------------------------------------------------------


def _copy(draw: random.Random, passage: str) -> dict[str, Any]:
    """A passage followed by itself: in-context copying, scored from the second word of the copy on."""
    words = _slice(draw, passage, 15, 45)
    first, _, rest = words.partition(" ")
    between = draw.choice(("\n", "\n\n", "\n---\n"))
    return {"kind": "copies", "split": split_of(passage), "parts": [words + between + first, " " + rest]}


def _sums(draw: random.Random) -> dict[str, Any]:
    """Eight one-digit sums or differences, each answer scored."""
    parts: list[str] = []
    for number in range(8):
        a, b = draw.randint(0, 9), draw.randint(0, 9)
        sign, value = ("+", a + b) if draw.random() < 0.7 or a < b else ("-", a - b)
        parts += [("\n" if number else "") + f"{a} {sign} {b} =", f" {value}"]
    return {"kind": "arithmetic", "split": split_of("".join(parts)), "parts": parts}
