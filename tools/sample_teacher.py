"""Training text that a teacher writes itself, for a student where no other is at hand.

    python tools/sample_teacher.py MODEL OUT.jsonl.gz --tokens 300000

Openings and questions of `data/teacher_samples/seeds.json` become prompts, the model goes on with each, and each row
is a document. `load_text("OUT.jsonl.gz", ...)` then takes them as any text.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ildlab.errors import TextError
from ildlab.files import data_dir, write_atomic
from ildlab.model.load import load_model
from ildlab.progress import Progress, Work
from ildlab.text.blocks import opening_ids

CHAT, BARE = 0.15, 0.1  # parts of the prompts that are chat questions, and empty; the others are openings
SHORTEST = 24  # tokens: less is a scrap of a few words
# min-p (Nguyen et al. 2024): one token of the far tail is enough to derail a small model for the rest of its document.
SAMPLING = {"do_sample": True, "temperature": 0.9, "min_p": 0.03, "top_k": 0}


def prompts(tokenizer: Any, draw: random.Random) -> Iterator[str]:
    """Yield prompts without end; no opening and no question comes twice before all of its kind were used."""
    seeds = json.loads((data_dir() / "teacher_samples" / "seeds.json").read_text(encoding="utf-8"))
    openings = [
        # The subject opens the text, or stands in it and once more behind a heading: a capital where it begins a line.
        frame.replace("{}", upper if frame.startswith("{}") else subject, 1).replace("{}", upper)
        for group in seeds["openings"].values()
        for frame in group["openings"]
        for subject in group["subjects"]
        for upper in [subject[:1].upper() + subject[1:]]
    ]
    questions = [[{"role": "user", "content": question}] for question in seeds["questions"]]
    plain, asked = (itertools.cycle(draw.sample(items, len(items))) for items in (openings, questions))
    while True:
        kind = draw.random()
        if kind < CHAT and tokenizer.chat_template is not None:
            yield tokenizer.apply_chat_template(next(asked), tokenize=False, add_generation_prompt=True)
        else:
            yield "" if kind < CHAT + BARE else next(plain)


def sample_steps(
    model: torch.nn.Module, tokenizer: Any, *, tokens: int, rows: int = 32, length: int = 256, seed: int = 0
) -> Work[list[str]]:
    """Sample texts of `tokens` tokens in all, `rows` of at most `length` tokens at a time, prompts included.

    Yields Progress in tokens after each batch, with the list of texts so far as `partial`, and returns that list.
    Raises TextError where the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise TextError("Texts cannot be sampled with a tokenizer that has no EOS token: set tokenizer.eos_token.")
    # Without a BOS, a text begins as it does in packed text: behind an EOS.
    lead = list(opening_ids(tokenizer)) or [tokenizer.eos_token_id]
    draw = random.Random(seed)
    source, texts, done = prompts(tokenizer, draw), [], 0
    while done < tokens:
        batch = [tokenizer(next(source), add_special_tokens=False)["input_ids"] for _ in range(rows)]
        batch = [
            ids if ids[: len(lead)] == lead else lead + ids for ids in batch
        ]  # a chat template may put BOS itself
        for document in _continued(model, tokenizer, batch, length, draw.getrandbits(63)):
            done += len(document)
            text = tokenizer.decode(document[len(lead) :]).strip()
            texts += [text] if text and len(document) >= SHORTEST else []
        yield Progress(min(done, tokens), tokens, f"{len(texts)} texts", list(texts))
    return texts


def _continued(model, tokenizer, batch: list[list[int]], length: int, seed: int) -> list[list[int]]:
    """Let the model go on with each prompt, to its end of text or to `length` tokens."""
    end, width = tokenizer.eos_token_id, max(map(len, batch))
    fill = [width - len(ids) for ids in batch]  # on the left, so that all rows go on at one place
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[end] * n + ids for n, ids in zip(fill, batch)], device=device)  # [B, width]
    mask = (torch.arange(width, device=device) >= torch.tensor(fill, device=device)[:, None]).long()  # [B, width]
    banned = [i for i in tokenizer.all_special_ids if i != end]
    config = GenerationConfig(
        **SAMPLING, max_length=max(length, width + 1), eos_token_id=end, pad_token_id=end, suppress_tokens=banned
    )
    # `generate` fills what a given config leaves open from the model's own, so that one is set aside.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            out = model.generate(ids, attention_mask=mask, generation_config=config).tolist()
    finally:
        model.generation_config = own
    # What follows an answer's end is filling.
    ends = [row.index(end, width) if end in row[width:] else len(row) for row in out]
    return [row[n:stop] for row, n, stop in zip(out, fill, ends)]


def main(argv: list[str] | None = None) -> None:
    """Sample from a model and write the texts, `{"text": ...}` a line; the bytes depend on the texts alone."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", help="smollm2-135m, a folder, a .gguf file or a Hub id")
    parser.add_argument("out", type=Path, help="a .jsonl.gz file")
    for name, default in {"tokens": 300_000, "rows": 32, "length": 256, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = vars(parser.parse_args(argv))
    loaded, out = load_model(given.pop("model")), given.pop("out")
    for progress in sample_steps(loaded.model, loaded.tokenizer, **given):  # written after each: it may take an hour
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in progress.partial)
        write_atomic(out, gzip.compress(lines.encode("utf-8", "replace"), mtime=0))
        print(f"{progress.done:,} of {progress.total:,} tokens, {progress.note} in {out}", flush=True)


if __name__ == "__main__":
    main()
