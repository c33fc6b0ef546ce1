"""The rows that ship in data/suites: well formed, reproducible, and without a giveaway."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SUITES = ROOT / "data" / "suites"
HELDOUT = ROOT.parent / "shared" / "heldout"


def load_tasks(suite):
    document = yaml.safe_load((SUITES / f"{suite}.yaml").read_text(encoding="utf-8"))
    for task in document["tasks"]:
        lines = (SUITES / task["file"]).read_text(encoding="utf-8").splitlines()
        yield task, [json.loads(line) for line in lines]


ALL = [(suite, task, rows) for suite in ("mini7", "canaries") for task, rows in load_tasks(suite)]
CHOICE = [(task, rows) for _, task, rows in ALL if task["kind"] == "multiple_choice"]
CONTINUE = [(task, rows) for _, task, rows in ALL if task["kind"] != "multiple_choice"]


def by_name(value):
    return value["name"] if isinstance(value, dict) and "name" in value else ""


def test_suites_hold_what_they_promise():
    sizes = {suite: [len(rows) for s, _, rows in ALL if s == suite] for suite in ("mini7", "canaries")}
    assert len(sizes["mini7"]) == 7 and min(sizes["mini7"]) >= 120
    assert sizes["canaries"] == [40, 40, 40]


@pytest.mark.parametrize(("task", "rows"), [(t, r) for _, t, r in ALL], ids=by_name)
def test_tasks_and_rows_are_well_formed(task, rows):
    assert {"name", "kind", "file", "metric", "chance"} <= set(task)
    keys = {"query", "choices", "gold"} if task["kind"] == "multiple_choice" else {"context", "continuation"}
    for row in rows:
        assert set(row) == keys
        texts = row["choices"] if "choices" in row else [row["continuation"]]
        texts = texts + [row.get("query") or row.get("context") or "x"]
        for text in texts:  # parts are joined by one space, so none may bring its own
            assert text == text.strip() and text
    whole = [json.dumps(row, sort_keys=True) for row in rows]
    assert len(set(whole)) == len(whole)


@pytest.mark.parametrize(("task", "rows"), CHOICE, ids=by_name)
def test_choices_are_valid_and_distinct(task, rows):
    sizes = {len(row["choices"]) for row in rows}
    assert len(sizes) == 1
    assert task["chance"] == pytest.approx(1 / sizes.pop(), abs=1e-6)
    for row in rows:
        assert len(set(row["choices"])) == len(row["choices"])
        assert 0 <= row["gold"] < len(row["choices"])


@pytest.mark.parametrize(("task", "rows"), CHOICE, ids=by_name)
@pytest.mark.parametrize("unit", [len, lambda text: len(text.encode())], ids=["characters", "bytes"])
def test_no_giveaway_by_length_or_place(task, rows, unit):
    # Guess the r-th longest choice, for each r (0 = longest), a tie being drawn by lot.
    k = len(rows[0]["choices"])
    earned = [0.0] * k
    for row in rows:
        lengths = [unit(choice) for choice in row["choices"]]
        size = lengths[row["gold"]]
        above, level = sum(other > size for other in lengths), lengths.count(size)
        for rank in range(above, above + level):
            earned[rank] += 1 / level
    assert [share / len(rows) for share in earned] == pytest.approx([1 / k] * k, abs=0.03)
    places = Counter(row["gold"] for row in rows)
    assert [places[place] / len(rows) for place in range(k)] == pytest.approx([1 / k] * k, abs=0.03)
    # Length and place together: the longest choice is right about as often whatever its letter.
    longest = Counter(
        row["gold"] for row in rows if max(map(unit, row["choices"])) == unit(row["choices"][row["gold"]])
    )
    assert max(longest.values()) - min(longest[place] for place in range(k)) <= 0.12 * len(rows)


@pytest.mark.parametrize(("task", "rows"), CHOICE, ids=by_name)
def test_a_random_guesser_scores_chance(task, rows):
    rng = random.Random(0)
    tries = [sum(rng.randrange(len(r["choices"])) == r["gold"] for r in rows) / len(rows) for _ in range(200)]
    assert sum(tries) / len(tries) == pytest.approx(task["chance"], abs=0.01)


def test_grammar_pairs_share_their_words():
    # A pair differs in few words, so that only grammar can tell them apart.
    (rows,) = [rows for _, task, rows in ALL if task["name"] == "grammar"]
    for row in rows:
        first, second = (Counter(re.findall(r"[\w']+", choice)) for choice in row["choices"])
        assert max(sum((first - second).values()), sum((second - first).values())) <= 2


@pytest.mark.parametrize(("task", "rows"), [(t, r) for t, r in CONTINUE if t["kind"] == "copy"], ids=by_name)
def test_what_is_copied_stands_above(task, rows):
    marker = "->" if task["name"] == "copying" else "Copy:\n"
    for row in rows:
        original, _, head = row["context"].rpartition(marker)
        given = original.rsplit("\n", 1)[-1].strip() if task["name"] == "copying" else original.strip()
        shown = f"{head} {row['continuation']}".strip()
        assert given.startswith(shown) and len(shown) > len(head)


def test_cloze_answers_mostly_stand_in_their_context():
    (rows,) = [rows for _, task, rows in ALL if task["name"] == "cloze"]
    mentioned = [re.search(rf"\b{row['continuation']}\b", row["context"]) is not None for row in rows]
    assert all(re.fullmatch(r"\w+", row["continuation"]) for row in rows)
    assert sum(mentioned) >= 0.95 * len(rows)


def test_arithmetic_and_brackets_are_right():
    closing = {"(": ")", "[": "]", "{": "}"}
    for _, task, rows in ALL:
        for row in rows if task["name"] == "arithmetic" else []:
            for line in f"{row['context']} {row['continuation']}".splitlines():
                a, sign, b, equals, result = line.split()
                assert equals == "=" and len(result) == 1
                assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        for row in rows if task["name"] == "brackets" else []:
            for line in f"{row['context']} {row['continuation']}".splitlines():
                stack = []
                for mark in line.split():
                    if mark in closing:
                        stack.append(closing[mark])
                    elif not mark.isalpha():
                        assert stack.pop() == mark
                assert not stack


def test_generator_writes_these_very_files():
    command = [sys.executable, str(ROOT / "tools" / "make_mini7.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def grams(text, n=7):
    parts = re.findall(r"\w+", text.lower())
    return {tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)}


@pytest.mark.skipif(not HELDOUT.is_dir(), reason="no held-out files beside this checkout")
def test_nothing_is_taken_from_the_held_out_benchmarks():
    ours = set()
    for _, _, rows in ALL:
        for row in rows:
            parts = [row["query"], *row["choices"]] if "choices" in row else [row["context"]]
            ours |= set().union(*(grams(part) for part in parts))
    for file in sorted(HELDOUT.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for part in row.get("choices", row.get("context_options", [])) + [row.get("query", "")]:
                assert not grams(part) & ours, f"{file.name}: {part}"
