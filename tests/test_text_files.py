"""Text files as people have them: tables, encodings, one long line, and a cache that a fault has got at."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import random
import sys
import time
import types

import pytest
import torch

from ildlab.errors import TextError
from ildlab.files import open_text, parted
from ildlab.session.run import text_record
from ildlab.text import blocks, sources, stream
from ildlab.text.blocks import load_text
from ildlab.text.sources import SPLITS, find_documents


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of this test's own, on disk and in memory."""
    monkeypatch.setenv("ILDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_SOURCES", {})
    return tmp_path / "cache" / "text"


TEXTS = [f"This is what document {n} says, and it says so in words." for n in range(80)]


def documents_of(source, **more) -> set[str]:
    return {text for split in SPLITS for text in find_documents(source, split=split, **more).stream()}


# ---- tables: each as JSONL, gzipped JSONL, parquet and rows of the Hub ----------------------------


def write_jsonl(folder, rows, monkeypatch):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def write_gzipped(folder, rows, monkeypatch):
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return folder / "rows.jsonl.gz"


def write_parquet(folder, rows, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), folder / "rows.parquet")
    return folder / "rows.parquet"


def on_the_hub(folder, rows, monkeypatch):
    class Stream(list):
        def shuffle(self, seed, buffer_size):
            return iter(self)

    module = types.SimpleNamespace(load_dataset=lambda *args, **more: Stream(rows))
    monkeypatch.setitem(sys.modules, "datasets", module)
    return "owner/rows"


KINDS = pytest.mark.parametrize("table", [write_jsonl, write_gzipped, write_parquet, on_the_hub])


@KINDS
def test_rows_without_a_text_are_left_out_and_told(table, cache, tmp_path, monkeypatch, tokenizer):
    rows = [{"id": f"doc-{n}", "text": text} for n, text in enumerate(TEXTS)]
    rows[0]["text"] = rows[30]["text"] = None
    del rows[1]["text"]
    rows[2]["text"] = "  \n"
    source = table(tmp_path, rows, monkeypatch)
    for column in (None, "text"):
        options = {"block": 16, "split": "train", "tokens": 1600, "text_column": column}
        found = load_text(source, tokenizer, **options)
        assert found.note.endswith(f"4 of 80 rows of {source} hold no text, and were left out.")
        assert "doc-" not in tokenizer.decode(found.tokens.flatten().tolist())
        assert load_text(source, tokenizer, **options).note == found.note  # from whatever cache
        assert text_record(found)["note"] == found.note  # as the journal has it
    assert documents_of(source) == set(TEXTS) - {TEXTS[n] for n in (0, 1, 2, 30)}
    both = load_text(f"{source}+teacher-samples", tokenizer, block=16, tokens=160, split="train")
    assert both.note == f"4 of 80 rows of {source} hold no text, and were left out."


def test_many_rows_without_the_text_still_do_not_choose_another(cache, tmp_path, tokenizer):
    rows = [{"id": f"doc-{n}"} for n in range(40)] + [{"id": "x", "text": text} for text in TEXTS]
    source = write_jsonl(tmp_path, rows, None)
    assert documents_of(source) == set(TEXTS)
    source = write_jsonl(tmp_path, [{"name": "A name of many words", "text": None}] * 90, None)
    with pytest.raises(TextError, match="is empty.* 90 of 90 rows of .* hold no text"):
        load_text(source, tokenizer, block=16)


@KINDS
@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        # Ids, numbers as words, dates, links, or a text that only some rows have, are learnt by nobody unasked.
        ([{"id": f"{n:032x}", "n": n} for n in range(80)], None, "only 'id' .*such as '0000.* do not read as text"),
        ([{"when": f"2024-01-01 12:00:{n}"} for n in range(80)], None, "only 'when' .* do not read as text"),
        ([{"link": f"https://a.org/some-page/{n}"} for n in range(80)], None, "only 'link'"),
        ([{"body": TEXTS[n] if n % 2 else None, "n": n} for n in range(80)], None, "'body' .* 40 of 80 rows have it"),
        ([{"id": f"doc-{n}", "body": text} for n, text in enumerate(TEXTS)], None, "these hold text: id, body"),
        ([{"id": f"doc-{n}", "text": n} for n in range(80)], None, "'text' .* does not hold text; .* id"),
        ([{"id": f"doc-{n}", "text": ["a", "b"]} for n in range(80)], None, "'text' .* does not hold text; .* id"),
        ([{"id": f"doc-{n}", "body": "A b c."} for n in range(80)], "texts", "no column 'texts'; it has id, body"),
        ([{"id": f"doc-{n}", "text": "A b c."} for n in range(600)], "texts", "no column 'texts' in its first 500"),
    ],
)
def test_a_doubtful_column_is_refused(rows, column, message, table, cache, tmp_path, monkeypatch, tokenizer):
    with pytest.raises(TextError, match=message):
        load_text(table(tmp_path, rows, monkeypatch), tokenizer, block=16, tokens=160, text_column=column)


@KINDS
def test_the_only_column_of_texts_is_taken(table, cache, tmp_path, monkeypatch):
    source = table(tmp_path, [{"n": n, "body": text} for n, text in enumerate(TEXTS)], monkeypatch)
    assert documents_of(source) == set(TEXTS)
    texts = [f"我今天去了北京，明天去第{n}个地方" for n in range(60)]  # no spaces between words
    (tmp_path / "more").mkdir()
    assert documents_of(table(tmp_path / "more", [{"body": text} for text in texts], monkeypatch)) == set(texts)


@pytest.mark.parametrize("table", [write_jsonl, write_gzipped, on_the_hub])
@pytest.mark.parametrize("value", [3, True, ["a"], {"a": "b"}])
def test_a_row_that_is_no_text_is_named(table, value, cache, tmp_path, monkeypatch, tokenizer):
    rows = [{"body": text} for text in TEXTS] + [{"body": value}]
    source = table(tmp_path, rows, monkeypatch)
    with pytest.raises(TextError, match=rf"Row 81 of .* holds {type(value).__name__} in 'body'"):
        load_text(source, tokenizer, block=16, tokens=10**6, text_column="body")


def test_a_line_that_is_no_json_is_named(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n\n{"text": oh}\n')
    with pytest.raises(TextError, match="rows.jsonl cannot be read as JSON lines .*: row 3: Expecting value"):
        load_text(tmp_path / "rows.jsonl", tokenizer)


def test_a_column_is_asked_of_a_persons_table_and_not_of_what_ships(tmp_path, tokenizer):
    write_jsonl(tmp_path, [{"body": text} for text in TEXTS], None)
    options = {"block": 32, "tokens": 960, "split": "train", "text_column": "body"}
    found = load_text(f"teacher-samples+{tmp_path}/rows.jsonl", tokenizer, **options)
    assert set(found.kinds) == {"prose", "rows.jsonl"}


# ---- encodings -------------------------------------------------------------------------------------

MARKED = {"utf-8-sig": "utf-8-sig", "utf-16": "utf-16", "utf-32": "utf-32"}
MARKED |= {"utf-16be with a mark": "utf-16be", "utf-8": "utf-8"}


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("encoding", MARKED)
def test_a_byte_order_mark_says_the_encoding(name, encoding, tmp_path):
    texts = [f"Où est le café numéro {n} ? Здесь, сказал он." for n in range(60)]
    content = "\n\n".join(texts if name[-4:] in (".txt", "a.md") else map(json.dumps, texts))
    data = (codecs.BOM_UTF16_BE if "be" in encoding else b"") + content.encode(MARKED[encoding])
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    found = "\n\n".join(documents_of(tmp_path / name))
    assert "\ufeff" not in found and sorted(found.split("\n\n")) == sorted(texts)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-16le", "utf-16be", "utf-32le", "utf-32be"])
@pytest.mark.parametrize(
    "text", ["Words of a text, one behind another. ", "Это слова одного текста, одно за другим. "]
)
def test_wide_characters_without_a_mark_are_told(name, encoding, text, tmp_path, tokenizer):
    data = (json.dumps(text * 90, ensure_ascii=False) + "\n").encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(TextError, match=f"{name} cannot .*it is {encoding} without .*iconv -f {encoding} -t utf-8"):
        load_text(tmp_path / name, tokenizer)


@pytest.mark.parametrize(
    ("encoding", "word", "shown"),
    [
        ("latin1", "café", "'café' in windows-1252, 'cafй' in windows-1251"),
        ("windows-1251", "привет", "'привет' in windows-1251"),
        ("shift_jis", "これは日本語です", "'これは日本語です' in shift_jis"),
        ("gb18030", "我今天去了北京", "'我今天去了北京' in gb18030"),
    ],
)
def test_other_bytes_are_shown_where_they_are(encoding, word, shown, tmp_path, tokenizer):
    file = tmp_path / "a.txt"
    file.write_bytes(b"plain words\n" * 20_000 + f"and here {word} noir\n".encode(encoding) + b"more\n" * 100)
    at = 240_009 + (3 if encoding == "latin1" else 0)
    with pytest.raises(TextError, match=f"at offset {at:,} is not UTF-8 .*{shown}.*iconv -f ENCODING") as told:
        load_text(file, tokenizer)
    assert "latin1" not in str(told.value)  # any bytes are Latin-1: no advice for all of them
    (tmp_path / "b.txt").write_bytes("Ω".encode()[:1])
    with pytest.raises(ValueError, match="unexpected end"), open_text(tmp_path / "b.txt") as lines:
        lines.read()


def test_what_is_no_text_in_spite_of_its_name(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(random.Random(0).randbytes(4000) + bytes(400))
    with pytest.raises(TextError, match="zero bytes"):
        load_text(tmp_path / "a.txt", tokenizer)
    (tmp_path / "a.txt").write_bytes("Words".encode("utf-16")[:-1])
    with pytest.raises(TextError, match="mark says utf-16, and it is not"):
        load_text(tmp_path / "a.txt", tokenizer)
    for source in (5, None, {"text": ["a"]}, ["a", b"b"]):
        with pytest.raises(TextError, match="must hold str"):
            load_text(source, tokenizer)
    with pytest.raises(TextError, match="no text source"):
        load_text("~no-such-user/a.txt", tokenizer)


def test_names_are_parted_between_what_is_there():
    there = {"a,b", "a", "b,c"}.__contains__
    assert parted("a,b,c", ",", there) == ["a,b", "c"]  # from the left, the longest
    assert parted("x, b,c ,y", ",", there) == ["x", "b,c", "y"]
    assert parted("x,y", ",", there) == ["x", "y"] and parted("a", ",", there) == ["a"]


# ---- one long line, read once ----------------------------------------------------------------------


def tangled(n: int, seed: int) -> str:
    """Text with all that a cut can meet: long lines, words without an end, blank lines of many kinds."""
    rng = random.Random(seed)
    out = []
    for i in range(n):
        kind = rng.randrange(7)
        words = " ".join(f"w{rng.randrange(10**4)}" for _ in range(rng.randrange(1, 90)))
        if kind == 1:
            words = " ".join([words] * 40)
        if kind == 2:
            words = "\n".join([words] * 30)
        if kind == 3:
            words = "".join(str(rng.randrange(10)) for _ in range(rng.randrange(1, 9000)))
        if kind == 4:
            words = "  \u00a0" + words + " \u2028é漢 "
        out.append(words + rng.choice(["\n\n", "\n \t\n", "\n\n\n\n", "\n", "\r\n\r\n", "\n\u00a0\n  "]))
    return "\n" * rng.randrange(4) + "".join(out)


@pytest.mark.parametrize(("n", "seed", "golden"), [(12, 0, "8c26ea5eac401661"), (400, 1, "ea46c200b9aec25f")])
def test_documents_are_what_they_were(n, seed, golden, tmp_path):
    (tmp_path / "a.txt").write_text(tangled(n, seed), encoding="utf-8", newline="")
    parts = ["\1".join(find_documents(tmp_path / "a.txt", split=split, seed=3).stream()) for split in SPLITS]
    assert hashlib.sha256("\0".join(parts).encode()).hexdigest().startswith(golden)


def test_a_long_line_is_cut_in_time():
    start = time.perf_counter()
    assert sum(map(len, sources._cuts("word " * 8_000_000, 8000))) > 31_000_000
    assert sum(map(len, sources._chunks("a\n\n" * 1_000_000, 2000))) > 1_000_000
    assert time.perf_counter() - start < 10  # it was some minutes


def test_a_source_is_read_once_a_process_while_it_stays_the_same(cache, tmp_path, tokenizer, monkeypatch):
    read = []
    file_texts = sources._file_texts
    monkeypatch.setattr(sources, "_file_texts", lambda *args: read.append(args[0]) or file_texts(*args))
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("\n\n".join(text + " " + text for text in TEXTS))
    b.write_text("\n\n".join(text * 3 for text in TEXTS))

    def load(file, **more):
        return load_text(file, tokenizer, block=16, **more).fingerprint

    names = {load(a, split=split, seed=seed, tokens=800) for split in SPLITS for seed in (0, 1)}
    assert len(names) == 6 and len(read) == 1
    load(f"{a}+{b}", split="train", tokens=160), load(a, split="train"), load(b, split="eval")
    assert len(read) == 2
    a.write_text("\n\n".join(text + " Now." for text in TEXTS))
    assert load(a, split="train", tokens=800) not in names and len(read) == 3
    # What is too large to be held is read again, and comes out the same; of several sources the latest stay.
    known, largest = load(b, split="train", seed=1), max(size for *_, size in sources._SOURCES.values())
    for most, expected in ((1, [a, a, b, b, a, b]), (largest, [a, b, a, b]), (2**28, [a, b])):
        monkeypatch.setattr(sources, "_KEPT", most)
        monkeypatch.setattr(sources, "_SOURCES", {})
        read.clear()
        for file in (a, a, b, b, a):
            load(file, split="eval", tokens=32)
        assert load(b, split="train", seed=1) == known
        assert [files[0] for files in read] == expected


# ---- the cache after a fault -----------------------------------------------------------------------


@pytest.fixture
def kept(cache, tmp_path, tokenizer, monkeypatch):
    """A way to load a text from the cache; it says whether anything was tokenised."""
    monkeypatch.setattr(stream, "_PIECE", 100)
    encode, encoded = blocks._encode, []
    monkeypatch.setattr(blocks, "_encode", lambda tok, texts: encoded.extend(texts) or encode(tok, texts))
    on_the_hub(tmp_path, [{"id": n, "text": text or None} for n, text in enumerate(["", *TEXTS])], monkeypatch)

    def load(tokens=10**6):
        encoded.clear()
        found = load_text("owner/rows", tokenizer, block=16, tokens=tokens, split="train")
        return found, bool(encoded)

    return load


@pytest.mark.parametrize("mapped", [False, True])
def test_a_cached_stream_that_a_fault_got_at_is_made_again(kept, cache, monkeypatch, mapped):
    if mapped:
        monkeypatch.setattr(stream, "_MAPPED", 1)
    whole, _ = kept()
    assert whole.note.endswith("1 of 81 rows of owner/rows hold no text, and were left out.")
    [file] = cache.glob("tokens-*.int32")
    data = file.read_bytes()
    again, anew = kept()
    assert not anew and again.note == whole.note
    flips = [0, 500, *range(len(data) - 700, len(data), 23), *range(len(data) - 8, len(data))]
    cases = [data[:-1], data[:-600], data[:50], data[:5], b"", data + b" 1"]
    cases += [data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] for at in flips for bit in (0, 3, 6)]
    for damaged in cases:
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match=f"{file.name} is damaged"):
            again, anew = kept()
        assert anew and torch.equal(again.tokens, whole.tokens) and again.note == whole.note
        assert file.read_bytes() == data and not kept()[1]


def test_of_a_large_stream_what_is_used_is_proven(kept, cache):
    whole, _ = kept()
    [file] = cache.glob("tokens-*.int32")
    data = bytearray(file.read_bytes())
    data[4 * 250] ^= 1  # a token of the third piece
    file.write_bytes(data)
    assert not kept(tokens=192)[1]
    with pytest.warns(UserWarning, match="damaged"):
        assert kept(tokens=208)[1]


def test_cached_docs_that_a_fault_got_at_are_made_again(cache, monkeypatch):
    def read_python_docs():
        yield from ()
        return [*TEXTS, "half a character: \ud800"]

    monkeypatch.setattr(sources, "read_python_docs", read_python_docs)
    found = documents_of("python-docs")
    assert found == {*TEXTS, "half a character: ?"}
    [file] = cache.glob("python-docs-*.json")
    data = file.read_bytes()
    flipped = data.replace(b"document 7 ", b"document 6 ")
    for damaged in (data[:-1], data[:1000], b"", b"[]", b"{}", b"\xff" + data[1:], flipped):
        file.write_bytes(damaged)
        sources._SOURCES.clear()
        with pytest.warns(UserWarning, match=f"{file.name} is damaged"):
            assert documents_of("python-docs") == found
        assert file.read_bytes() == data
