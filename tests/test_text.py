"""Text blocks: packing against a naive loop, splits that never overlap, the cache, and bad input."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from ildlab.errors import TextError
from ildlab.files import data_dir
from ildlab.importance.samples import Positions
from ildlab.text import blocks as text
from ildlab.text import sources as documents
from ildlab.text import stream
from ildlab.text.blocks import load_text, tokenizer_fingerprint
from ildlab.text.rows import Rows
from ildlab.text.sources import SPLITS, find_documents, split_of


@pytest.fixture(scope="module")
def tokenizer(teacher):
    return teacher.tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of this test's own."""
    monkeypatch.setenv("ILDLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def prose(n: int, seed: int = 0) -> list[str]:
    """`n` different paragraphs of some 300 characters."""
    rng = random.Random(seed)
    words = "the model learns from every layer it loses and heals by what the teacher knows of text".split()
    return [f"Paragraph {i}. " + " ".join(rng.choices(words, k=60)) + "." for i in range(n)]


def make_tokenizer(*, bos=None, eos=None, opens=False):
    """A word-level tokenizer with the special tokens asked for; `opens`: it puts BOS before each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "<s>", "</s>", *sorted({word for page in prose(50) for word in page.split()}), "a"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if opens:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def test_packing_equals_the_naive_loop(tokenizer):
    texts = prose(80)
    blocks = load_text(texts, tokenizer, block=32, split="train", seed=3)
    naive = []
    for document in find_documents(texts, split="train", seed=3).stream():
        naive += [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    n = len(naive) // 32
    assert len(blocks) == n > 20
    assert blocks.tokens.dtype == torch.int32 and blocks.tokens.shape == (n, 32)
    assert blocks.tokens.flatten().tolist() == naive[: n * 32]
    assert (blocks.source, blocks.split, blocks.seed, blocks.note) == ("list of 80 texts", "train", 3, "")


@pytest.mark.parametrize("kind", ["list", "txt", "jsonl"])
def test_splits_partition_the_documents(kind, tmp_path):
    texts = prose(200)
    source = texts
    if kind == "txt":
        source = tmp_path / "a.txt"
        source.write_text("\n\n".join(texts))
    if kind == "jsonl":
        source = tmp_path / "a.jsonl"
        source.write_text("\n".join(json.dumps({"text": each}) for each in texts))
    parts = {split: list(find_documents(source, split=split).stream()) for split in SPLITS}
    everything = [document for part in parts.values() for document in part]
    assert len(everything) == len(set(everything))
    # Text files are cut to chunks of paragraphs; nothing is lost and nothing is in two splits.
    assert sorted("\n\n".join(everything).split("\n\n")) == sorted(texts)
    assert all(split_of(document) == split for split, part in parts.items() for document in part)
    assert len(parts["train"]) > len(parts["eval"]) > 0 < len(parts["calibration"])


def test_a_document_that_differs_in_white_space_is_the_same_document():
    texts = prose(60)
    double = texts + [" ".join(each.split()).replace(" ", "  ").upper() for each in texts]
    count = sum(len(list(find_documents(double, split=split).stream())) for split in SPLITS)
    assert count == 60


def test_seed_orders_and_fewer_tokens_are_a_prefix(tokenizer):
    texts = prose(80)
    one, again = (load_text(texts, tokenizer, block=16, split="train", seed=1) for _ in range(2))
    other = load_text(texts[::-1], tokenizer, block=16, split="train", seed=1)
    assert one.fingerprint == again.fingerprint == other.fingerprint
    assert load_text(texts, tokenizer, block=16, split="train", seed=2).fingerprint != one.fingerprint
    few = load_text(texts, tokenizer, block=16, split="train", seed=1, tokens=16 * 9 + 15)
    assert len(few) == 9 and torch.equal(few.tokens, one.tokens[:9])
    assert (
        few.fingerprint
        == load_text(texts, tokenizer, block=16, split="train", seed=1, tokens=16 * 9).fingerprint
        != one.fingerprint
    )


@pytest.mark.parametrize(
    ("special", "first", "after"),
    [
        ({"eos": "</s>"}, (), 2),
        ({"bos": "<s>"}, (), 1),
        ({"bos": "<s>", "eos": "</s>"}, (), 2),
        ({"bos": "</s>", "eos": "</s>"}, (), 2),
        ({"bos": "<s>", "opens": True}, (1,), 1),
        ({"bos": "<s>", "eos": "</s>", "opens": True}, (1,), 2),
        # What the tokenizer does decides, not whether it says which token is its BOS.
        ({"eos": "</s>", "opens": True}, (1,), 2),
    ],
)
def test_what_opens_a_block_and_what_stands_between_documents(special, first, after):
    tokenizer = make_tokenizer(**special)
    texts = [each for each in prose(50) if split_of(each) == "train"][:2]
    blocks = load_text(texts, tokenizer, block=4, split="train")
    assert blocks.bos == first
    assert all(tuple(row[: len(first)]) == first for row in blocks.tokens.tolist())
    ordered = find_documents(texts, split="train").stream()
    one, two = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in ordered)
    expected = [*one, after, *two, after]
    assert blocks.tokens[:, len(first) :].flatten().tolist() == expected[: len(blocks) * (4 - len(first))]
    assert len(blocks) == len(expected) // (4 - len(first))


def test_every_block_begins_with_the_bos_and_none_is_a_target(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_MAPPED", 100)  # so that this small source counts as large, and is cached
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, prose(300))))
    opening, plain = (make_tokenizer(bos="<s>", eos="</s>", opens=opens) for opens in (True, False))
    load = functools.partial(load_text, tmp_path / "a.jsonl", split="train", tokens=16 * 40 + 7)
    blocks, without = load(opening, block=16), load(plain, block=15, tokens=15 * 40)
    assert blocks.tokens.shape == (40, 16) and blocks.tokens.dtype == torch.int32  # `block` tokens in all
    assert bool((blocks.tokens[:, 0] == 1).all())
    assert torch.equal(blocks.tokens[:, 1:], without.tokens)  # behind it stands the very text of the other tokenizer
    assert blocks.fingerprint != load(plain, block=16).fingerprint
    assert "BOS 1" in repr(blocks) and "BOS" not in repr(without)
    assert "BOS" in Rows.of(blocks).source and "BOS" not in Rows.of(without).source
    # The stream on disk has no BOS, so blocks of another length are cut from it.
    monkeypatch.setattr(text, "_encode", lambda *given: pytest.fail("tokenised anew"))
    again = load(opening, block=8)
    assert bool((again.tokens[:, 0] == 1).all())
    n = again.tokens[:, 1:].numel()
    assert torch.equal(again.tokens[:, 1:].flatten()[:n], blocks.tokens[:, 1:].flatten()[:n])
    # Every position that predicts is scored, and none of their targets is a BOS.
    places = Positions.sample(Rows.of(blocks), None, 0, predict=True)
    assert int(places.valid.sum()) == 40 * 15 and not bool((places.targets[places.valid] == 1).any())


def test_a_mixture_keeps_the_bos(tmp_path):
    for seed in (0, 1):
        (tmp_path / f"{seed}.jsonl").write_text("\n".join(map(json.dumps, prose(100, seed))))
    tokenizer = make_tokenizer(bos="<s>", eos="</s>", opens=True)
    both = load_text(f"{tmp_path / '0.jsonl'}+{tmp_path / '1.jsonl'}", tokenizer, block=32, split="train")
    assert both.bos == (1,) and bool((both.tokens[:, 0] == 1).all())


def test_text_of_a_tokenizer_without_bos_is_what_it_was(tokenizer):
    blocks = load_text("teacher-samples", tokenizer, block=128, tokens=16 * 128, split="train")
    assert blocks.bos == () and blocks.fingerprint.startswith("5c6556789b04")
    assert repr(blocks) == (
        "TextBlocks('teacher-samples', split='train', seed=0, 16 blocks of 128 tokens, 5c6556789b04)"
    )


def test_a_tokenizer_without_bos_and_eos_is_refused():
    with pytest.raises(TextError, match="neither an EOS nor a BOS"):
        load_text(prose(50), make_tokenizer(), block=8)


# ---- the one reader of blocks ----------------------------------------------------------------------


def test_rows_of_whatever_holds_tokens(tokenizer):
    blocks = load_text(prose(80), tokenizer, block=16, split="train")
    rows = Rows.of(blocks)
    assert rows.mask is None and torch.equal(rows.tokens, blocks.tokens)
    assert rows.source == f"list of 80 texts (train), {len(blocks)} × 16 tokens"
    assert rows.text == {"source": blocks.source, "split": "train", "fingerprint": blocks.fingerprint}
    assert rows.fingerprint == blocks.fingerprint
    assert Rows.of(rows) is rows
    given = Rows.of(blocks.tokens.long())
    assert given.text == {} and given.source == f"given tokens, {len(blocks)} × 16 tokens"
    batch = given.batch(np.array([3, 1]))
    assert batch.dtype == torch.int64 and torch.equal(batch, blocks.tokens[[3, 1]].long())
    # What a tokenizer returns is taken as it is.
    padded = tokenizer(["One.", "One two three four."], padding=True, return_tensors="pt", padding_side="right")
    batch = Rows.of(padded).batch(np.array([0]))
    assert batch.keys() == {"input_ids", "attention_mask"} and batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0]]


def test_fingerprint_of_rows_is_that_of_ids_and_mask():
    ids, mask = torch.arange(12).reshape(2, 6), torch.ones(2, 6, dtype=torch.long)
    plain = Rows.of(ids).fingerprint
    assert plain == hashlib.sha256(b"(2, 6)|" + np.arange(12, dtype="<i4").tobytes()).hexdigest()
    assert plain == Rows.of(ids.int()).fingerprint == Rows.of({"input_ids": ids, "attention_mask": mask}).fingerprint
    mask[1, 4:] = 0
    masked = Rows.of({"input_ids": ids, "attention_mask": mask}).fingerprint
    others = [Rows.of(ids + 1).fingerprint, Rows.of(ids.reshape(3, 4)).fingerprint]
    assert len({plain, masked, *others}) == 4


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("a text", "integer tensor .* got str"),
        (torch.zeros(2, 3), "integer tensor"),
        (torch.zeros(3, dtype=torch.int), r"got \(3,\)"),
        ({"ids": torch.ones(2, 3).int()}, "input_ids; got NoneType"),
        (torch.ones(0, 3).int(), "at least 1 sequence of 2 tokens"),
        (torch.ones(3, 1).int(), "at least 1 sequence of 2 tokens"),
        ({"input_ids": torch.ones(2, 3).int(), "attention_mask": torch.ones(2, 2)}, r"\(2, 2\) where input_ids"),
        ({"input_ids": torch.ones(2, 3).int(), "attention_mask": torch.eye(2, 3) * 0}, "no valid token"),
    ],
)
def test_rows_that_are_none(blocks, message):
    with pytest.raises(TextError, match=message):
        Rows.of(blocks)


# ---- sources ---------------------------------------------------------------------------------------


def test_files_of_every_kind_give_the_same_documents(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = prose(60)
    rows = "\n".join(json.dumps({"id": i, "text": each}) for i, each in enumerate(texts))
    (tmp_path / "a.jsonl").write_text("\ufeff" + rows + "\n\n", encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "strings.jsonl").write_text("\n".join(map(json.dumps, texts)))
    pq.write_table(pa.table({"id": range(60), "body": texts}), tmp_path / "a.parquet", row_group_size=7)
    for file in ("a.jsonl", "a.jsonl.gz", "strings.jsonl", "a.parquet"):
        assert list(find_documents(tmp_path / file, split="train").stream()) == list(
            find_documents(texts, split="train").stream()
        ), file
    # A folder holds all of them, and hidden files do not count; each document comes once.
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "b.txt").write_text("not to be read " * 50)
    assert len(list(find_documents(tmp_path, split="train").stream())) == sum(split_of(t) == "train" for t in texts)


def test_a_text_without_paragraphs_is_cut(tmp_path):
    file = tmp_path / "one_line.txt"
    file.write_text(" ".join(f"word{i}" for i in range(20_000)))
    parts = {split: list(find_documents(file, split=split).stream()) for split in SPLITS}
    assert all(parts.values())
    words = sorted(" ".join(document for part in parts.values() for document in part).split())
    assert words == sorted(f"word{i}" for i in range(20_000))


def test_python_docs_run_nothing_and_are_real(tokenizer):
    code = (
        "import sys; from ildlab.text.sources import find_documents\n"
        "page = next(find_documents('python-docs', split='eval').stream())\n"
        "print(len(page), *(name for name in ('scipy', 'sympy', 'seaborn', 'torch') if name in sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    length, *imported = output.stdout.split()
    assert int(length) >= 200 and not imported
    parts = {split: set(find_documents("python-docs", split=split).stream()) for split in SPLITS}
    assert len(parts["train"]) > 10_000
    assert not parts["train"] & parts["eval"] and not parts["train"] & parts["calibration"]
    blocks = load_text("python-docs", tokenizer, block=128, tokens=1024, split="eval")
    assert blocks.tokens.shape == (8, 128)
    assert "the" in tokenizer.decode(blocks.tokens[0].tolist())


def test_cache_is_used_kept_true_and_survives_damage(cache, tokenizer, monkeypatch, tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, prose(300))))
    monkeypatch.setattr(stream, "_MAPPED", 1000)  # so that this small source counts as large
    encoded = []
    encode = text._encode
    monkeypatch.setattr(text, "_encode", lambda tok, batch: encoded.append(len(batch)) or encode(tok, batch))

    def load(**more):
        encoded.clear()
        blocks = load_text(folder, tokenizer, block=64, split="train", **more)
        return blocks, sum(encoded)

    part, n = load(tokens=2048)
    assert len(part) == 32 and 0 < n < 150
    again, n = load(tokens=1024)
    assert n == 0 and torch.equal(again.tokens, part.tokens[:16])
    whole, n = load()
    assert n > 150 and torch.equal(whole.tokens[:32], part.tokens)
    again, n = load()
    assert n == 0 and again.fingerprint == whole.fingerprint
    assert isinstance(stream._kept(next((cache / "text").glob("*-all.int32")), None, whole=True)[0], np.memmap)
    again.tokens[0, 0] += 1  # private to this process: the file stays as it was
    assert load()[0].fingerprint == whole.fingerprint

    for file in (cache / "text").glob("*.int32"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match="-all.int32 is damaged"):
        again, n = load()
    assert n > 150 and again.fingerprint == whole.fingerprint
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, prose(300, seed=1))))
    again, n = load()
    assert n > 150 and again.fingerprint != whole.fingerprint
    assert load_text(folder, make_tokenizer(eos="</s>"), split="train").fingerprint != again.fingerprint


def test_no_warning_about_long_texts(capfd, caplog):
    tokenizer = make_tokenizer(eos="</s>")
    tokenizer.model_max_length = 10
    load_text(prose(50), tokenizer, block=32, split="train")
    captured = capfd.readouterr()
    assert "longer than" not in captured.err + captured.out + caplog.text


def test_mixture_takes_turns(tokenizer, tmp_path):
    names = []
    for seed in (0, 1):
        names.append(str(tmp_path / f"{seed}.jsonl"))
        (tmp_path / f"{seed}.jsonl").write_text("\n".join(map(json.dumps, prose(100, seed))))
    parts = [load_text(name, tokenizer, block=32, split="train") for name in names]
    both = load_text("+".join(names), tokenizer, block=32, split="train", tokens=7 * 32)
    assert len(both) == 7 and both.source == "+".join(names) and both.note == ""
    for i, row in enumerate(both.tokens):
        assert torch.equal(row, parts[i % 2].tokens[i // 2])
    much = load_text("+".join(names), tokenizer, block=32, split="train", tokens=10**6)
    assert len(much) == 2 * min(map(len, parts)) and "shares stay as they are" in much.note
    # A file whose name holds a plus is a file.
    (tmp_path / "a+b.jsonl").write_text("\n".join(map(json.dumps, prose(100))))
    assert load_text(str(tmp_path / "a+b.jsonl"), tokenizer, block=32, split="train").note == ""


def test_fewer_tokens_than_asked_for_are_given_with_a_note(tokenizer):
    blocks = load_text(prose(60), tokenizer, block=32, tokens=10**6, split="eval")
    assert len(blocks) >= 2
    assert f"{10**6 // 32 * 32:,} tokens were asked for" in blocks.note
    assert "asked for" in repr(blocks)
    one = next(each for each in prose(60) if split_of(each) == "eval")
    n = len(tokenizer(one)["input_ids"])
    with pytest.raises(TextError, match="two blocks"):
        load_text([one], tokenizer, block=n, tokens=10 * n, split="eval")
    assert len(load_text([one], tokenizer, block=n, split="eval")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(source="no/such/file.txt"), "no such file or folder"),
        (dict(source="/no/such/folder"), "no such file or folder"),
        (dict(source="wikipedia"), "There is no text source"),
        (dict(source=[]), "is empty"),
        (dict(source=["short"] * 5, split="train"), "empty|too short"),
        (dict(source=[1, 2]), "must hold str"),
        (dict(source=prose(9), split="test"), "choose one of calibration, train, eval"),
        (dict(source=prose(9), block=1), "at least 2 tokens"),
        (dict(source=prose(9), tokens=100), "do not fill one block of 256"),
        (dict(source=prose(3), split="train", block=10_000), "too short: .* lower block"),
        (dict(source="owner/name"), "say how many tokens"),
    ],
)
def test_bad_arguments(arguments, message, tokenizer):
    with pytest.raises(TextError, match=message):
        load_text(arguments.pop("source"), tokenizer, **arguments)


def test_bad_files(tmp_path, tokenizer):
    def refused(name, content, message, **more):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TextError, match=message):
            load_text(tmp_path / name, tokenizer, block=16, split="train", **more)

    refused("empty.txt", b"", "is empty")
    refused("blank.txt", b" \n\n \n", "is empty")
    refused("short.md", b"Hello.", "too short|is empty")
    refused(
        "latin.txt",
        "é".encode("latin1") * 500,
        "latin.txt cannot be read as text: byte 0xE9 at offset 0 .*'é.* in windows-1252",
    )
    refused("image.png", b"\x89PNG", "no file that ildlab reads")
    refused("broken.jsonl", b'{"text": "a"}\n{"text": ', "cannot be read as JSON lines")
    refused("number.jsonl", b'{"text": "a"}\n{"text": 3}\n', "Row 2 .* holds int")
    refused("cut.jsonl.gz", gzip.compress(b'"abc"\n' * 1000)[:-9], "cannot be read as JSON lines")
    refused("two.jsonl", b'{"q": "a", "r": "b"}', "text_column=.*q, r")
    refused("column.jsonl", b'{"q": "a", "n": 1}', "no column 'x'; it has q, n", text_column="x")
    refused("typed.jsonl", b'{"q": "a", "n": 1}', "does not hold text; these hold text: q", text_column="n")
    refused("broken.parquet", b"PAR1 nothing of the kind", "cannot be read as parquet")
    (tmp_path / "folder").mkdir()
    with pytest.raises(TextError, match="holds, no file .* .txt"):
        load_text(tmp_path / "folder", tokenizer)


def test_unreadable_parquet_column(tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    table = {"n": [1, 2], "lists": [["a"], ["b"]], "question": ["a", "b"], "answer": ["c", "d"]}
    pq.write_table(pa.table(table), file)
    for column, message in {
        None: "these hold text: question, answer",
        "text": "has no column 'text'; it has n, lists, question, answer",
        "n": "'n' .* does not hold text",
        "lists": "'lists' .* does not hold text",
    }.items():
        with pytest.raises(TextError, match=message):
            load_text(file, tokenizer, text_column=column)
    chosen = {
        document for split in SPLITS for document in find_documents(file, split=split, text_column="answer").stream()
    }
    assert chosen == {"c", "d"}


def test_the_encyclopedia_is_running_text_with_a_card(tokenizer):
    found = {split: list(find_documents("encyclopedia", split=split).stream()) for split in SPLITS}
    texts = [text for each in found.values() for text in each]
    assert len(texts) == len(set(texts)) == 92 and all(found.values())
    lines = [line for text in texts for line in text.split("\n")]
    assert all(len(line) >= 120 and line[-1] in '.!?"' for line in lines)
    assert not [line for line in lines if re.search(r"\[\[|\{\{|''|<ref|\|", line)]
    card = (data_dir() / "encyclopedia" / "README.md").read_text()
    assert "CC BY-SA 3.0" in card and f"{sum(map(len, texts)):,} characters" in card
    blocks = load_text("mix+encyclopedia*6", tokenizer, block=128, tokens=2**14, split="train")
    assert blocks.tokens.shape[0] == 2**7


def test_missing_teacher_samples_say_so(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(documents, "data_dir", lambda: tmp_path)
    with pytest.raises(TextError, match="not part of this copy"):
        load_text("teacher-samples", tokenizer)
    (tmp_path / "teacher_samples").mkdir()
    (tmp_path / "teacher_samples" / "samples.jsonl.gz").write_bytes(
        gzip.compress("\n".join(json.dumps({"text": each}) for each in prose(60)).encode())
    )
    monkeypatch.setenv("ILDLAB_CACHE", str(tmp_path / "cache"))
    assert load_text("teacher-samples", tokenizer, block=32, split="train").source == "teacher-samples"


def test_hub_rows_are_streamed_and_offline_says_what_to_do(cache, tokenizer, monkeypatch):
    import datasets

    texts = prose(400)
    asked = []

    def load_dataset(name, configuration, *, split, streaming):
        asked.append((name, configuration, split, streaming))
        return datasets.Dataset.from_dict({"id": range(400), "text": texts}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    blocks = load_text("owner/name:small", tokenizer, block=32, tokens=320, split="eval")
    assert len(blocks) == 10 and asked == [("owner/name", "small", "train", True)]
    decoded = tokenizer.decode(blocks.tokens[0].tolist())
    assert any(each[:40] in decoded for each in texts)

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/other' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(TextError, match="python-docs"):
        load_text("owner/other", tokenizer, tokens=512)
    # What was read once is in the cache, and needs no network.
    assert (
        load_text("owner/name:small", tokenizer, block=32, tokens=320, split="eval").fingerprint == blocks.fingerprint
    )


def test_padding_does_not_make_another_tokenizer(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a longer text"], padding=True)
    assert tokenizer_fingerprint(tokenizer) == before


def test_a_first_row_without_its_text_does_not_choose_the_column(teacher, tmp_path):
    rows = [{"id": f"doc-{n}", "text": None if n == 0 else f"Words of document {n}. " * 20} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for column in (None, "text"):
        blocks = load_text(tmp_path / "rows.jsonl", teacher.tokenizer, block=16, split="train", text_column=column)
        assert "doc-" not in teacher.tokenizer.decode(blocks.tokens[0])


def test_a_text_in_the_place_of_a_source_is_refused_in_words(teacher, tmp_path):
    with pytest.raises(TextError, match="no text source"):
        load_text("A whole text. " * 60, teacher.tokenizer)
    with pytest.raises(TextError, match="no text source"):
        load_text("One + two, and more. " * 60, teacher.tokenizer)


def test_a_damaged_gzip_file_is_named(teacher, tmp_path):
    data = bytearray(gzip.compress("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(2000)).encode()))
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    (tmp_path / "rows.jsonl.gz").write_bytes(data)
    with pytest.raises(TextError, match="rows.jsonl.gz"):
        load_text(tmp_path / "rows.jsonl.gz", teacher.tokenizer, block=16)


def test_the_first_blocks(teacher):
    text = load_text("teacher-samples", teacher.tokenizer, block=16, tokens=16 * 6)
    few = text.take(2)
    assert len(few) == 2 and torch.equal(few.tokens, text.tokens[:2])
    assert few.fingerprint != text.fingerprint and few.source == text.source
    for count in (0, 7):
        with pytest.raises(TextError, match="take from 1 to 6"):
            text.take(count)
