"""Training text that a teacher writes itself, for a student where no other is at hand.

    python tools/sample_teacher.py MODEL OUT.jsonl.gz --tokens 300000 --mix 5600

Openings and questions of `data/teacher_samples/seeds.json` become prompts, the model goes on with each, and each row
is a document. `load_text("OUT.jsonl.gz", ...)` then takes them as any text. With `--mix N`, they and N rows of other kinds
(`ildlab.text.make_mix`) are the file instead, a mix to calibrate and to distill on.
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

from ildlab.files import data_dir, write_atomic
from ildlab.model.load import load_model
from ildlab.progress import Progress, Work
from ildlab.text.blocks import opened, opening_ids
from ildlab.text.sources import SPLITS, find_documents
from ildlab.text.teacher_text import check_end, continued, mix_steps

CHAT, BARE = 0.15, 0.1  # parts of the prompts that are chat questions, and empty; the others are openings
SHORTEST = 24  # tokens: less is a scrap of a few words


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
    check_end(tokenizer)
    # Without a BOS, a text begins as it does in packed text: behind an EOS.
    lead = opening_ids(tokenizer) or (tokenizer.eos_token_id,)
    draw = random.Random(seed)
    source, texts, done = prompts(tokenizer, draw), [], 0
    while done < tokens:
        batch = [tokenizer(next(source), add_special_tokens=False)["input_ids"] for _ in range(rows)]
        batch = [opened(lead, ids) for ids in batch]
        new = max(1, length - max(map(len, batch)))
        for ids, said in zip(batch, continued(model, tokenizer, batch, new, draw.getrandbits(63)), strict=True):
            document = ids + said
            done += len(document)
            text = tokenizer.decode(document[len(lead) :]).strip()
            texts += [text] if text and len(document) >= SHORTEST else []
        yield Progress(min(done, tokens), tokens, f"{len(texts)} texts", list(texts))
    return texts


def main(argv: list[str] | None = None) -> None:
    """Sample from a model and write the texts, `{"text": ...}` a line; the bytes depend on the texts alone."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", help="smollm2-135m, a folder, a .gguf file or a Hub id")
    parser.add_argument("out", type=Path, help="a .jsonl.gz file")
    for name, default in {"tokens": 300_000, "rows": 32, "length": 256, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--mix", type=int, default=0, help="rows of other kinds to make of the texts")
    parser.add_argument("--prose", help="a text of the teacher's instead of new samples: a source of load_text")
    given = vars(parser.parse_args(argv))
    loaded, out, mix = load_model(given.pop("model")), given.pop("out"), given.pop("mix")
    texts, prose = [], given.pop("prose")
    if prose:
        texts = [text for split in SPLITS for text in find_documents(prose, split=split, seed=given["seed"]).stream()]
    else:
        for progress in sample_steps(
            loaded.model, loaded.tokenizer, **given
        ):  # written after each: it may take an hour
            texts = progress.partial
            _write(out, [{"text": text} for text in texts])
            print(f"{progress.done:,} of {progress.total:,} tokens, {progress.note} in {out}", flush=True)
    if mix:
        for progress in mix_steps(loaded.model, loaded.tokenizer, texts, rows=mix, seed=given["seed"]):
            _write(out, progress.partial)
            print(f"{progress.done:,} of {progress.total:,} rows written by the teacher: {progress.note}", flush=True)


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(out, gzip.compress(lines.encode("utf-8", "replace"), mtime=0))


if __name__ == "__main__":
    main()
