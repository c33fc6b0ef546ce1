"""Text sampled from a teacher: training text for a student where no other is at hand.

`python -m ildlab.sampling MODEL OUT.jsonl.gz --tokens 300000` makes the texts that ship as
`text="teacher-samples"`. Every row of a batch decodes at each step: a row still inside its opening is
fed the opening's next token, so openings of any length share a batch without padding; a row whose
document has ended opens the next one, behind the end-of-text token as in packed training text.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ildlab.errors import TextError
from ildlab.files import data_dir, write_atomic
from ildlab.progress import Progress, Work, drive


def openings(seed: int = 0, *, file: Path | None = None) -> Iterator[str]:
    """Openings of articles, stories, news and explanations, without end, in a seeded order.

    Parameters
    ----------
    seed : int
    file : Path, optional
        A JSON file like `data/teacher_samples/seeds.json`, which is the default.
    """
    seeds = json.loads((file or data_dir() / "teacher_samples" / "seeds.json").read_text(encoding="utf-8"))
    groups = [
        [
            frame.replace("{}", _capital(subject) if frame.startswith("{}") else subject, 1).replace(
                "{}", _capital(subject)
            )
            for frame in group["openings"]
            for subject in group["subjects"]
        ]
        for group in seeds["openings"].values()
    ]
    draw = random.Random(seed)
    while True:
        for group in groups:
            draw.shuffle(group)
        # Categories take turns, weighted by their size, so that none is used up first.
        pool = [(draw.random(), text) for group in groups for text in group]
        yield from (text for _, text in sorted(pool))


def questions(tokenizer: Any, seed: int = 0, *, file: Path | None = None) -> Iterator[str]:
    """Questions in the tokenizer's chat template, ready to be answered, without end."""
    seeds = json.loads((file or data_dir() / "teacher_samples" / "seeds.json").read_text(encoding="utf-8"))
    asked, draw = list(seeds["questions"]), random.Random(seed)
    while True:
        draw.shuffle(asked)
        for question in asked:
            chat = [{"role": "user", "content": question}]
            yield tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def sample_steps(
    model: torch.nn.Module,
    tokenizer: Any,
    *,
    tokens: int,
    rows: int = 96,
    length: int = 256,
    temperature: tuple[float, float] = (0.8, 1.0),
    min_p: float = 0.03,
    chat: float = 0.15,
    bare: float = 0.1,
    seed: int = 0,
) -> Work[list[str]]:
    """Sample texts from a model.

    Parameters
    ----------
    model, tokenizer
        A causal LM of transformers and its tokenizer.
    tokens : int
        Tokens wanted in all, openings included.
    rows, length : int
        Rows that decode together, and tokens in a row.
    temperature : (float, float)
        Each row draws its own between these: low ones stay on topic, high ones vary.
    min_p : float
        Tokens less likely than this part of the likeliest are not drawn: one of them is enough to derail a
        small model for the rest of its document.
    chat, bare : float
        Parts of the rows that open with a chat question, and with nothing but the end-of-text token.
    seed : int

    Yields
    ------
    Progress
        After every 16 tokens of a batch of rows; `partial` is the list of texts of the finished batches.

    Returns
    -------
    list of str

    Raises
    ------
    TextError
        The tokenizer has no end-of-text token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise TextError("Texts cannot be sampled with a tokenizer that has no EOS token: set tokenizer.eos_token.")
    device = model.get_input_embeddings().weight.device
    draw, generator = random.Random(seed), torch.Generator(device).manual_seed(seed)
    plain, asked = openings(seed), questions(tokenizer, seed)
    banned = torch.tensor([i for i in tokenizer.all_special_ids if i != end], dtype=torch.long, device=device)
    templated = tokenizer.chat_template is not None

    def opening(kind: float) -> list[int]:
        if kind < chat and templated:
            return tokenizer(next(asked), add_special_tokens=False)["input_ids"]
        if kind < chat + bare:
            return []
        return tokenizer(next(plain), add_special_tokens=False)["input_ids"]

    texts: list[str] = []
    done, batches = 0, -(-tokens // (rows * length))
    for _ in range(batches):
        kinds = [draw.random() for _ in range(rows)]
        queues = [[end, *opening(kind)] for kind in kinds]
        low, high = temperature
        heat = torch.tensor([[low + (high - low) * draw.random()] for _ in range(rows)], device=device)
        written: list[list[int]] = [[] for _ in range(rows)]
        cache, feed = _cache(model, length), torch.tensor([[q.pop(0)] for q in queues], device=device)
        for step in range(length):
            with torch.no_grad():
                out = model(input_ids=feed, past_key_values=cache, use_cache=True)
                logits = out.logits[:, -1].float()
                logits[:, banned] = -torch.inf
                # By the inverse of the cumulative distribution: several times faster than multinomial here.
                chance = logits.div_(heat).softmax(-1)
                chance.mul_(chance >= min_p * chance.amax(-1, keepdim=True))
                ladder = chance.cumsum(-1)
                at = torch.rand(rows, 1, generator=generator, device=device) * ladder[:, -1:]
                drawn = torch.searchsorted(ladder, at, right=True).clamp_max(logits.shape[-1] - 1)[:, 0].tolist()
            chosen = []
            for row in range(rows):
                token = queues[row].pop(0) if queues[row] else drawn[row]
                if token == end and not queues[row]:
                    queues[row] = opening(kinds[row])
                chosen.append(token)
                written[row].append(token)
            feed = torch.tensor(chosen, device=device)[:, None]
            done += rows
            if (step + 1) % 16 == 0:
                yield Progress(done, batches * rows * length, f"{len(texts)} texts", list(texts))
        for row in written:
            texts.extend(_documents(row, end, tokenizer))
    return texts


def _cache(model: torch.nn.Module, length: int):
    """Build the model's own KV cache, with buffers that are not copied at every token."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Grown(DynamicLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            start = self.get_seq_length()
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.room = [torch.empty(*x.shape[:2], length, x.shape[3]) for x in (key_states, value_states)]
                self.room = [x.to(key_states) for x in self.room]
            end = start + key_states.shape[2]
            for room, new in zip(self.room, (key_states, value_states), strict=True):
                room[:, :, start:end] = new
            self.keys, self.values = (room[:, :, :end] for room in self.room)
            return self.keys, self.values

    cache = DynamicCache(config=model.config)
    cache.layers = [Grown() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _documents(row: list[int], end: int, tokenizer: Any) -> Iterator[str]:
    """Cut a row at its ends of text, chat turns aside; scraps of a few words are left out."""
    turn = tokenizer("<|im_start|>", add_special_tokens=False)["input_ids"]
    start = 0
    for at, token in enumerate([*row, end]):
        # In chat templates that close turns with the EOS token, the document goes on.
        goes_on = row[at + 1 : at + 3] and (row[at + 1] == turn[0] or row[at + 2 : at + 3] == turn[:1])
        if token == end and not (len(turn) == 1 and goes_on and turn[0] in row[start:at]):
            text = tokenizer.decode(row[start:at]).strip()
            if at - start >= 24 and text:
                yield text
            start = at + 1


def write_samples(texts: Sequence[str], path: Path) -> Path:
    """Write texts as .jsonl.gz, `{"text": ...}` a line; the bytes depend on the texts alone."""
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return write_atomic(path, gzip.compress(lines.encode("utf-8", "replace"), mtime=0))


def main(argv: Sequence[str] | None = None) -> None:
    """Sample from a model and write the texts."""
    import argparse

    from ildlab.model.load import load_model

    parser = argparse.ArgumentParser(prog="python -m ildlab.sampling", description=main.__doc__)
    parser.add_argument("model", help="smollm2-135m, a folder, a .gguf file or a Hub id")
    parser.add_argument("out", type=Path, help="a .jsonl.gz file")
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    loaded = load_model(given.model)
    work = sample_steps(
        loaded.model, loaded.tokenizer, tokens=given.tokens, rows=given.rows, length=given.length, seed=given.seed
    )

    def saving() -> Work[list[str]]:
        # What is sampled so far is on disk after every batch of rows: this may take an hour.
        written = 0
        while True:
            try:
                progress = next(work)
            except StopIteration as stop:
                return stop.value
            if len(progress.partial) > written:
                write_samples(progress.partial, given.out)
                written = len(progress.partial)
            yield progress

    texts = drive(saving(), desc="sample")
    print(f"{len(texts)} texts -> {write_samples(texts, given.out)}")


if __name__ == "__main__":
    main()
