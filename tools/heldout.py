"""Held-out files to judge quality by: WikiText-2 in bits per byte, four sets of questions. Nothing is trained on them.

Options are compared on the first half of a file; what is reported is measured on the second.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ildlab.evaluate.suites import Suite
from ildlab.evaluate.tasks import Task, read_jsonl
from ildlab.evaluate.text_quality import evaluate
from ildlab.model.stack import LayerStack
from ildlab.text.blocks import TextBlocks, load_text
from ildlab.text.sources import split_of

# name: file, how it is scored, what a guesser scores
TASKS = {
    "arc_easy": ("arc_easy.jsonl", "bytes", 0.25),
    "copa": ("copa.jsonl", "raw", 0.5),
    "winograd": ("winograd_wsc.jsonl", "raw", 0.5),
    "commonsense_qa": ("commonsense_qa.jsonl", "raw", 0.25),
}


def half_of(items: Any, half: int) -> Any:
    """The first (1) or the second (2) half of a text or list."""
    middle = len(items) // 2
    return items[:middle] if half == 1 else items[middle:]


def questions(folder: Path, half: int, rows: int | None = None) -> Suite:
    """The four sets, at most `rows` rows of each; the aggregate that counts is the chance-corrected one."""
    tasks = []
    for name, (file, normalise, chance) in TASKS.items():
        _, found = read_jsonl(folder / file)
        found = half_of(found, half)[:rows]
        if name == "arc_easy":
            found = [{**row, "query": row["query"] + "\nAnswer:"} for row in found]
            chance = sum(1 / len(row["choices"]) for row in found) / len(found)
        tasks.append(Task(name, "multiple_choice", tuple(found), normalise=normalise, chance=chance))
    return Suite(f"held out, half {half}", tuple(tasks))


def unspaced(text: str) -> str:
    """Undo the spacing of WikiText's tokenised text."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?)\]%]|'s|'t|n't)", r"\1", text)
    return re.sub(r"([(\[$]) ", r"\1", text)


def wikitext(folder: Path, tokenizer: Any, half: int, tokens: int, block: int = 256) -> TextBlocks:
    """Raw text of WikiText-2, from the beginning of a half."""
    text = half_of(unspaced((folder / "wikitext2-valid.txt").read_text(encoding="utf-8")), half)
    # One document has one split, whichever it falls to.
    return load_text([text], tokenizer, block=block, tokens=tokens, split=split_of(text))


def nats(stack: LayerStack, blocks: TextBlocks) -> float:
    """Negative log-likelihood in nats a token."""
    return math.log(evaluate(stack, stack, blocks, speed=False, show=False).perplexity)


def bits_per_byte(nats_a_token: float, blocks: TextBlocks, tokenizer: Any) -> float:
    """The same in bits per byte of the raw text, which compares across tokenizers."""
    size = len(tokenizer.decode(blocks.tokens.flatten()).encode("utf-8"))
    return nats_a_token / math.log(2) * blocks.n_tokens / size
