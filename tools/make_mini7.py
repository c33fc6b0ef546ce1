"""Write `data/suites/mini7/*.jsonl` and `data/suites/canaries/*.jsonl`; the same bytes on every machine.

Hand-written items are read from `data/suites/source/*.txt`; the rest comes from the templates and word
lists below and in `mini7_words.py`. Run `python tools/make_mini7.py` after a change; with `--check` it
writes nothing and fails if a file on disk differs from what it would write.

Every multiple-choice row is made so that the length of a choice says nothing: of the wrong answers
at hand, those are taken that make the right one the longest in 1/k of the rows, the second longest in
1/k, and so on. The place of the right answer is balanced in the same way.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import mini7_words as words  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent / "data" / "suites"
SEED = 7


def read_source(name: str) -> list[str]:
    """Lines of a hand-written source file without comments and blanks (`##` headings are kept)."""
    lines = (ROOT / "source" / name).read_text(encoding="utf-8").splitlines()
    kept = (line.strip() for line in lines)
    return [line for line in kept if line and (not line.startswith("#") or line.startswith("## "))]


def length_places(gold: str, others: tuple[str, ...]) -> list[float]:
    """Chance that the right answer is the r-th longest (UTF-8 bytes), r = 0 .. k-1; ties are drawn by lot."""
    size = len(gold.encode())
    sizes = [len(other.encode()) for other in others]
    above, level = sum(other > size for other in sizes), 1 + sum(other == size for other in sizes)
    return [1 / level if above <= r < above + level else 0.0 for r in range(len(others) + 1)]


def balance(items: list[tuple[str, str, list[str]]], k: int, rng: random.Random) -> list[dict]:
    """Turn (query, right answer, pool of wrong answers) into rows of `k` choices without a length cue.

    Wrong answers are chosen item by item, again and again, so that over all items the right answer is
    the r-th longest about n/k times for each r: least squares by coordinate descent. Then the place of
    the right answer goes round within each length rank, so that length and place are independent.
    """
    options = []
    for _, gold, pool in items:
        if len(set(pool) | {gold}) != len(pool) + 1:
            raise ValueError(f"repeated choice beside {gold!r}: {pool}")
        combinations = list(itertools.combinations(pool, k - 1))
        rng.shuffle(combinations)
        options.append([(others, length_places(gold, others)) for others in combinations])
    chosen = [0] * len(items)
    for _ in range(20):
        for index, table in enumerate(options):
            rest = [sum(options[i][chosen[i]][1][r] for i in range(len(items)) if i != index) for r in range(k)]
            chosen[index] = min(
                range(len(table)),
                key=lambda c, table=table, rest=rest: sum(
                    (rest[r] + table[c][1][r] - len(items) / k) ** 2 for r in range(k)
                ),
            )
    counts: dict[tuple[float, ...], int] = {}
    rows = []
    for (query, gold, _), table, pick in zip(items, options, chosen, strict=True):
        others, place_of = list(table[pick][0]), tuple(table[pick][1])
        rng.shuffle(others)
        place = (counts.setdefault(place_of, len(counts))) % k
        counts[place_of] += 1
        rows.append({"query": query, "choices": others[:place] + [gold] + others[place:], "gold": place})
    rng.shuffle(rows)
    return rows


def make_choice_task(name: str, k: int, rng: random.Random) -> list[dict]:
    """Rows of knowledge or commonsense: lines `query | right | wrong ; wrong ; ...`."""
    items = []
    for line in read_source(name):
        query, gold, pool = (part.strip() for part in line.split("|"))
        items.append((query, gold, [wrong.strip() for wrong in pool.split(";")]))
    return balance(items, k, rng)


def make_summary(rng: random.Random) -> list[dict]:
    """Rows of summary: wrong choices are right summaries of other passages on the same topic."""
    topics: list[list[tuple[str, str]]] = []
    for line in read_source("summary.txt"):
        if line.startswith("## "):
            topics.append([])
        else:
            passage, summary = (part.strip() for part in line.split("|"))
            topics[-1].append((passage, summary))
    items = []
    for topic in topics:
        for passage, summary in topic:
            pool = [other for _, other in topic if other != summary]
            items.append((f"{passage}\nIn one sentence:", summary, pool))
    return balance(items, 3, rng)


def make_cloze(rng: random.Random) -> list[dict]:
    """Rows of cloze: the last word of each passage is the continuation."""
    rows = []
    for line in read_source("cloze.txt"):
        fillers, _, template = line.rpartition(" :: ")
        for filler in fillers.split(", ") if fillers else [""]:
            first, second = rng.sample(words.NAMES, 2)
            text = template.replace("{x}", filler).replace("{A}", first).replace("{B}", second)
            context, _, last = text.rpartition(" ")
            rows.append({"context": context, "continuation": last})
    rng.shuffle(rows)
    return rows


def make_grammar(rng: random.Random, per_category: int = 12) -> list[dict]:
    """Rows of grammar: {good, bad} sentences; the good one is as often the longer as the shorter."""
    pairs: list[tuple[str, str]] = []
    surplus: list[tuple[str, str]] = []
    for category in words.GRAMMAR:
        made = list(dict.fromkeys(category(rng) for _ in range(40 * per_category)))
        if len(made) < per_category:
            raise ValueError(f"{category.__name__} makes only {len(made)} pairs")
        longer = [pair for pair in made if len(pair[0]) > len(pair[1])]
        shorter = [pair for pair in made if len(pair[0]) < len(pair[1])]
        same = [pair for pair in made if len(pair[0]) == len(pair[1])]
        half = min(per_category // 2, len(longer), len(shorter))
        chosen = longer[:half] + shorter[:half]
        chosen += same[: per_category - len(chosen)]
        rest = longer[half:] if len(longer) > len(shorter) else shorter[half:]
        surplus += rest[: per_category - len(chosen)]
        pairs += chosen
    balance_of = sum((len(a) > len(b)) - (len(a) < len(b)) for a, b in pairs + surplus)
    if abs(balance_of) > 6:
        raise ValueError(f"good sentences are longer {balance_of} times more often than shorter")
    pairs += surplus
    rng.shuffle(pairs)
    # The place of the good sentence alternates within each sign of the length difference.
    counts = {-1: 0, 0: 0, 1: 0}
    rows = []
    for good, bad in pairs:
        sign = (len(good) > len(bad)) - (len(good) < len(bad))
        place = counts[sign] % 2
        counts[sign] += 1
        rows.append({"query": "", "choices": [bad, good] if place else [good, bad], "gold": place})
    rng.shuffle(rows)
    return rows


def copy_row(text: str, shown: int, copied: int, marker: str = "Copy:") -> dict:
    """A copying row: the text, the marker, its first `shown` words; the next `copied` words are to follow.

    Line breaks stay: words are cut at single spaces only, and context and continuation meet at one.
    """
    parts = text.split(" ")
    if len(parts) < shown + copied:
        raise ValueError(f"only {len(parts)} words to copy: {text!r}")
    head = " ".join(parts[:shown])
    return {"context": f"{text}\n\n{marker}\n{head}", "continuation": " ".join(parts[shown : shown + copied])}


def make_copy_paragraph(rng: random.Random, n: int = 130) -> list[dict]:
    """Rows of paragraph copying: one paragraph of unpredictable words, to be repeated."""
    makers = words.PARAGRAPHS
    return [copy_row(makers[i % len(makers)](rng), shown=4, copied=20) for i in range(n)]


def make_copy_document(rng: random.Random, n: int = 120) -> list[dict]:
    """Rows of document copying: several short lines (a form, a list, a timetable), to be repeated."""
    makers = words.DOCUMENTS
    return [copy_row(makers[i % len(makers)](rng), shown=6, copied=30) for i in range(n)]


def make_canary_copy(rng: random.Random, n: int = 40) -> list[dict]:
    """Three words to be repeated, after two examples."""
    rows = []
    for _ in range(n):
        drawn = rng.sample(words.THINGS, 9)
        shots = "".join(f"{' '.join(drawn[i : i + 3])} -> {' '.join(drawn[i : i + 3])}\n" for i in (0, 3))
        asked = " ".join(drawn[6:9])
        rows.append({"context": f"{shots}{asked} ->", "continuation": asked})
    return rows


def make_canary_arithmetic(rng: random.Random, n: int = 40) -> list[dict]:
    """Sums and differences of one-digit numbers with a one-digit result, after four examples."""
    sums = [(f"{a} + {b} =", str(a + b)) for a in range(1, 9) for b in range(1, 9) if a + b <= 9]
    differences = [(f"{a} - {b} =", str(a - b)) for a in range(2, 10) for b in range(1, a)]
    rows = []
    for pool in (sums, differences):
        for question, answer in rng.sample(pool, n // 2):
            others = [item for item in pool if item[0] != question]
            shots = "".join(f"{q} {a}\n" for q, a in rng.sample(others, 4))
            rows.append({"context": shots + question, "continuation": answer})
    rng.shuffle(rows)
    return rows


def make_canary_brackets(rng: random.Random, n: int = 40) -> list[dict]:
    """Open brackets to be closed in the right order, after three examples; parts are apart by spaces."""
    pairs = {"(": ")", "[": "]", "{": "}"}

    def one(depth: int) -> tuple[str, str]:
        opened = [rng.choice("([{") for _ in range(depth)]
        inner = rng.choice(words.THINGS)
        return " ".join([*opened, inner]), " ".join(pairs[mark] for mark in reversed(opened))

    rows = {}
    while len(rows) < n:
        shots = [one(rng.choice((2, 3))) for _ in range(3)]
        asked, answer = one(2)
        context = "".join(f"{a} {b}\n" for a, b in shots) + asked
        rows[context] = {"context": context, "continuation": answer}
    return list(rows.values())


def build() -> dict[str, list[dict]]:
    """All rows, by file path below `data/suites`. Each task has its own generator of random numbers."""
    makers = {
        "mini7/knowledge": lambda rng: make_choice_task("knowledge.txt", 4, rng),
        "mini7/commonsense": lambda rng: make_choice_task("commonsense.txt", 3, rng),
        "mini7/grammar": make_grammar,
        "mini7/cloze": make_cloze,
        "mini7/copy_paragraph": make_copy_paragraph,
        "mini7/copy_document": make_copy_document,
        "mini7/summary": make_summary,
        "canaries/copying": make_canary_copy,
        "canaries/arithmetic": make_canary_arithmetic,
        "canaries/brackets": make_canary_brackets,
    }
    return {f"{name}.jsonl": make(random.Random(f"{SEED}:{name}")) for name, make in makers.items()}


def main() -> int:
    """Write the files, or compare them with those on disk."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file differs")
    arguments = parser.parse_args()
    differing = []
    for name, rows in build().items():
        path = ROOT / name
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if arguments.check:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                differing.append(name)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"{name}: {len(rows)} rows")
    for name in differing:
        print(f"{name} differs from what tools/make_mini7.py writes", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
