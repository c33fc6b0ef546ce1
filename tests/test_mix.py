"""Text of many kinds: sums of sources, rows that say where a student is scored, and the mix that a teacher writes."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pandas as pd
import pytest
import torch

from ildlab.errors import MeasureError, TextError
from ildlab.files import data_dir
from ildlab.importance.dispatch import measure
from ildlab.importance.samples import Positions, first_look, rounds
from ildlab.importance.scores import LayerScores, by_kind
from ildlab.model.stack import LayerStack
from ildlab.session.session import PruningSession
from ildlab.text.blocks import load_text
from ildlab.text.mix import WEIGHTS, interleaved, packed, rows_file, summands
from ildlab.text.rows import Rows
from ildlab.text.sources import split_of
from ildlab.text.teacher_text import SHARES, make_mix

KINDS = {"prose", "answers", "copies", "lists", "arithmetic", "docs"}


def file_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def rows_here(tmp_path):
    """A file of two kinds: sums, scored at each answer, and plain text."""
    sums = [
        {"kind": "sums", "split": "train", "parts": [f"{n} + 1 =", f" {n + 1}", f"\n{n} + 2 =", f" {n + 2}"]}
        for n in range(40)
    ]
    tales = [
        {"kind": "tales", "split": "train", "parts": ["", f"Once there were {n} frogs in a pond."]} for n in range(40)
    ]
    return file_of(tmp_path / "rows.jsonl", sums + tales)


# ---------------------------------------------------------------- sources and weights


def test_a_sum_of_sources_has_weights(tmp_path):
    assert summands("a.txt*3+b.txt") == [("a.txt", 3.0), ("b.txt", 1.0)]
    assert summands("a.txt") == [("a.txt", 1.0)]
    # A file that is there is what it is called, alone and in a sum; from the left, the longest stretch.
    rows = [{"kind": "sums", "parts": ["1 + 1 =", " 2"]}, {"kind": "tales", "parts": ["", "A tale."]}]
    odd, twice, kinds = (str(tmp_path / name) for name in ("a+b*2.txt", "a+b*2", "c+d.jsonl"))
    for name in (odd, twice, odd + "+x"):
        open(name, "w").write("x")
    file_of(tmp_path / "c+d.jsonl", rows)
    assert summands(odd) == [(odd, 1.0)] and summands(odd + "*3") == [(odd, 3.0)] and summands(twice) == [(twice, 1.0)]
    assert summands(f"{odd}*3 + {twice}+b.txt*2") == [(odd, 3.0), (twice, 1.0), ("b.txt", 2.0)]
    assert summands(f"{odd}+x+y") == [(odd + "+x", 1.0), ("y", 1.0)]
    assert summands(f"x+{kinds}:sums*2+{kinds}") == [
        ("x", 1.0), (f"{kinds}:sums", 2.0), (f"{kinds}:sums", 0.5), (f"{kinds}:tales", 0.5)
    ]  # fmt: skip
    assert [name for name, _ in summands("mix:copies+x.txt")] == ["mix:copies", "x.txt"]
    for wrong in ("a*0+b", "a+*2", "a*1.2.3"):
        with pytest.raises(TextError, match="weight"):
            summands(wrong)


def test_the_mix_is_the_sum_of_its_kinds():
    found = dict(summands("mix"))
    assert {name.removeprefix("mix:") for name in found} == {
        *KINDS - {"prose", "docs"},
        "teacher-samples",
        "python-docs",
    }
    assert found["teacher-samples"] / found["mix:copies"] == pytest.approx(WEIGHTS["prose"] / WEIGHTS["copies"])
    assert sum(found.values()) == pytest.approx(1)
    assert dict(summands("mix*3+x.txt"))["x.txt"] == 1 and sum(
        dict(summands("mix*3+x.txt")).values()
    ) == pytest.approx(4)


def test_interleaved_keeps_shares_and_order():
    order = interleaved([100, 100], [3.0, 1.0], 40)
    assert len(order) == 40 and sum(part == 0 for part, _ in order) == 30
    assert [row for part, row in order if part == 0] == list(range(30))
    for end in range(4, 40, 4):  # each prefix has its share, so that fewer tokens are a smaller picture
        assert sum(part == 0 for part, _ in order[:end]) == 3 * end // 4
    assert len(interleaved([3, 100], [1.0, 1.0], 40)) <= 8  # shares stay as they are where one runs out


def test_a_weighted_source_alone_is_that_source(teacher):
    one = load_text("python-docs*2", teacher.tokenizer, block=32, tokens=320)
    assert torch.equal(one.tokens, load_text("python-docs", teacher.tokenizer, block=32, tokens=320).tokens)


# ---------------------------------------------------------------- rows with targets


def test_packed_rows_are_whole_and_scored_before_their_targets():
    rows = [([1, 2, 3, 9], [False, True, True, False]), ([4, 5, 9], [False, True, False])]
    tokens, scored = packed(rows, 7, None)
    assert tokens.tolist() == [[1, 2, 3, 9, 4, 5, 9]]
    # A position is scored where the next token is a target.
    assert scored.tolist() == [[True, True, False, False, True, False, False]]
    tokens, scored = packed([*rows, rows[0]], 5, None)
    assert tokens[0, :4].tolist() == [1, 2, 3, 9] and not scored[0, 3:].any()  # what fills a block is not scored


def test_scored_positions_are_those_of_the_answers(rows_here, teacher):
    blocks = load_text(f"{rows_here}:sums", teacher.tokenizer, block=32, split="train")
    assert blocks.kinds == ("sums",) * len(blocks)
    after = blocks.tokens.roll(-1, 1)[blocks.scored]  # the tokens that scored positions predict
    said = teacher.tokenizer.decode(after)
    assert set(said) <= set("0123456789 ") and "+" not in said and "=" not in said
    assert 4 < len(after) < blocks.n_tokens / 2
    tales = load_text(f"{rows_here}:tales", teacher.tokenizer, block=32, split="train")
    assert tales.scored is None  # plain text is scored everywhere


def test_a_file_of_rows_is_a_mixture(rows_here, teacher):
    blocks = load_text(rows_here, teacher.tokenizer, block=32, tokens=320, split="train")
    assert set(blocks.kinds) == {"sums", "tales"} and blocks.kinds.count("sums") == 5
    assert blocks.scored[np.array(blocks.kinds) == "tales"].all()
    other = load_text(rows_here, teacher.tokenizer, block=32, tokens=320, split="train")
    assert other.fingerprint == blocks.fingerprint != blocks.pick(range(9)).fingerprint
    unscored = Rows.of(blocks.tokens)
    assert unscored.scored is None and Rows.of(blocks).kinds == blocks.kinds


def test_files_that_break_off_or_name_kinds_badly(tmp_path, teacher):
    good = {"kind": "x", "parts": ["a", "b"]}
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(good) + "\n{half")
    with pytest.raises(TextError, match=r"Row 2 of .*broken"):
        load_text(broken, teacher.tokenizer, block=8)
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress((json.dumps(good) + "\n").encode() * 9000)[:-40])
    with pytest.raises(TextError, match="torn"):
        load_text(torn, teacher.tokenizer, block=8)
    (tmp_path / "bom.jsonl").write_bytes("\ufeff".encode() + (json.dumps(good) + "\n").encode())
    (tmp_path / "wide.jsonl").write_bytes((json.dumps(good) + "\n").encode("utf-16"))
    assert rows_file(str(tmp_path / "bom.jsonl")) and rows_file(str(tmp_path / "wide.jsonl"))
    (tmp_path / "late.jsonl").write_bytes((json.dumps(good) + "\n").encode() * 9000 + b"\xe9")
    with pytest.raises(TextError, match="late.jsonl .*byte 0xE9 at offset 315,000"):
        load_text(tmp_path / "late.jsonl", teacher.tokenizer, block=8)
    for kind in ("a:b", "a+b", "a*2", ""):
        with pytest.raises(TextError, match="Row 2"):
            load_text(file_of(tmp_path / "k.jsonl", [good, good | {"kind": kind}]), teacher.tokenizer, block=8)


def test_only_the_rows_that_are_wanted_are_tokenised(rows_here, teacher, monkeypatch):
    import ildlab.text.blocks as module

    how, asked = {"block": 32, "split": "train"}, []
    rows = module.rows_of
    monkeypatch.setattr(module, "rows_of", lambda *args: asked.append(rows(*args) * 50) or asked[-1])
    whole = load_text(f"{rows_here}:sums", teacher.tokenizer, **how)
    few = load_text(f"{rows_here}:sums", teacher.tokenizer, tokens=96, **how)
    assert torch.equal(few.tokens, whole.tokens[:3]) and torch.equal(few.scored, whole.scored[:3])
    lengths = []
    packed(module._encoded_rows(asked[-1], teacher.tokenizer, lengths), 32, 3)
    assert len(lengths) < 300 < len(asked[-1])


def test_half_a_character_in_a_row_is_replaced(tmp_path, teacher):
    row = {"kind": "x", "parts": ["half \ud800 a character, and more words", " of text"], "split": "train"}
    found = load_text(file_of(tmp_path / "rows.jsonl", [row]), teacher.tokenizer, block=11, split="train")
    assert "half ? a" in teacher.tokenizer.decode(found.tokens[0])


def test_a_folder_whose_name_reads_like_a_sum(tmp_path, rows_here, teacher):
    folder = tmp_path / "c++*2"
    folder.mkdir()
    same = folder / "rows.jsonl"
    same.write_bytes(open(rows_here, "rb").read())
    blocks = load_text(same, teacher.tokenizer, block=32, tokens=320, split="train")
    assert set(blocks.kinds) == {"sums", "tales"}


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "x", "parts": ["a"]},
        {"kind": "x", "parts": []},
        {"parts": ["a", "b"]},
        {"kind": "x", "parts": ["a", 1]},
    ],
)
def test_a_row_that_is_none_is_named(tmp_path, teacher, row):
    good = {"kind": "x", "parts": ["a", "b"]}
    with pytest.raises(TextError, match=r"Row 2 of .*rows\.jsonl"):
        load_text(file_of(tmp_path / "rows.jsonl", [good, row]), teacher.tokenizer, block=8)


def test_kinds_that_are_not_there(rows_here, teacher):
    with pytest.raises(TextError, match="sums, tales"):
        load_text(f"{rows_here}:songs", teacher.tokenizer, block=32)
    with pytest.raises(TextError, match="2 kinds of text"):
        load_text(rows_here, teacher.tokenizer, block=32, tokens=32, split="train")


def test_a_file_of_texts_is_no_file_of_rows(tmp_path):
    assert rows_file(file_of(tmp_path / "a.jsonl", [{"text": "x"}])) is None
    (tmp_path / "b.jsonl").write_text("not json")
    assert rows_file(str(tmp_path / "b.jsonl")) is None and rows_file("nowhere.jsonl") is None


# ---------------------------------------------------------------- what ships


def test_the_shipped_mix(teacher):
    found = load_text("mix", teacher.tokenizer, block=128, tokens=128 * 24)
    assert {kind: found.kinds.count(kind) for kind in KINDS} == dict.fromkeys(KINDS, 4)  # to calibrate: equal shares
    train = load_text("mix", teacher.tokenizer, block=128, tokens=128 * 120, split="train")
    assert train.kinds.count("prose") == pytest.approx(120 * WEIGHTS["prose"] / 11, abs=1)  # docs: 1
    assert load_text("mix", teacher.tokenizer, block=128, split="train").n_tokens > 500_000
    card = (data_dir() / "mix" / "README.md").read_text()
    assert "SmolLM2-135M-Instruct" in card and "mini7" in card


def test_splits_of_the_mix_never_overlap():
    with gzip.open(data_dir() / "mix" / "smollm2-135m.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    with gzip.open(data_dir() / "teacher_samples" / "samples.jsonl.gz", "rt") as lines:
        passages = [json.loads(line)["text"].strip() for line in lines]
    passages = [(" ".join(text.split()), split_of(text)) for text in passages]
    cut = 0
    for row in rows[::7]:  # every seventh: each is looked for in every passage
        context = row["parts"][0].split("\n")[0] if row["kind"] == "copies" else row["parts"][0]
        context = " ".join(context.split())
        if row["kind"] in ("copies", "answers") and len(context.split()) > 11:
            found = {split for text, split in passages if context in text}
            cut += bool(found)
            assert not found or row["split"] in found, context
    assert cut > 200
    of = {}
    for row in rows:
        of.setdefault("".join(row["parts"]), set()).add(row["split"])
    assert len(rows) > 5000 and all(len(splits) == 1 for splits in of.values())


# ---------------------------------------------------------------- scores of several kinds


def test_by_kind_gives_each_kind_one_weight_in_its_own_units():
    x = np.array([[1.0, 2.0, 6.0], [3.0, 2.0, 2.0], [0.01, 0.02, 0.09]])
    kinds = np.array(["a", "a", "b"])
    values, weights, medians = by_kind(x, np.array([1.0, 3.0, 5.0]), kinds)
    assert medians == {"a": pytest.approx(2.5), "b": pytest.approx(0.02)}
    assert weights == pytest.approx([0.25, 0.75, 1.0])
    combined = (weights[:, None] * values).sum(0) / 2
    # a: weighted means 2.5, 2, 3 over their median; b: 0.5, 1, 4.5.
    assert combined == pytest.approx([(1 + 0.5) / 2, (0.8 + 1) / 2, (1.2 + 4.5) / 2])
    with pytest.raises(MeasureError, match="'b'"):
        by_kind(np.zeros((2, 3)), np.ones(2), np.array(["b", "b"]))


def test_kl_on_a_mixture_is_that_of_its_kinds(tiny, rows_here, teacher):
    """Against KL measured on each kind alone, and against a plain sum at the scored positions."""
    stack = LayerStack(tiny(4, vocab=49152, hidden=32))
    blocks = load_text(rows_here, teacher.tokenizer, block=32, tokens=256, split="train")
    scores = measure(stack, blocks, "kl", teacher=stack, show=False)
    assert scores.kinds == blocks.kinds
    combined = np.zeros(4)
    for kind in ("sums", "tales"):
        part = blocks.pick([i for i, each in enumerate(blocks.kinds) if each == kind])
        whole = np.array([damage(stack, part, layer_id) for layer_id in stack.layer_ids])
        assert scores.of_kind(kind).table["score"].to_numpy() == pytest.approx(whole, rel=1e-4)
        assert scores.of_kind(kind).source.startswith(f"{kind} of ")
        combined += whole / np.median(whole) / 2
    assert scores.table["score"].to_numpy() == pytest.approx(combined, rel=1e-4)
    kept = LayerScores.from_dict(scores.to_dict())
    pd.testing.assert_frame_equal(kept.of_kind("sums").table, scores.of_kind("sums").table, rtol=1e-5)
    with pytest.raises(MeasureError, match="sums, tales"):
        scores.of_kind("songs")


def test_some_layers_are_scored_in_units_of_the_medians_given(tiny, rows_here, teacher):
    stack = LayerStack(tiny(4, vocab=49152, hidden=32))
    blocks = load_text(rows_here, teacher.tokenizer, block=32, tokens=256, split="train")
    how = {"teacher": stack, "show": False}
    full = measure(stack, blocks, "kl", **how)
    least, medians = sorted(full.ranking[:2]), full.details["medians"]
    alone = measure(stack, blocks, "kl", layers=least, **how)
    part = measure(stack, blocks, "kl", layers=least, medians=medians, **how)
    assert part.table["score"].to_numpy() == pytest.approx(full.table["score"][least].to_numpy(), rel=1e-4)
    assert alone.table["score"].mean() == pytest.approx(1, rel=1e-3)  # of two layers the median is the mean
    assert part.details["medians"] == medians != alone.details["medians"]
    raced = measure(stack, blocks, "kl", layers=least, medians=medians, race=True, **how)
    assert raced.details["medians"] == medians and raced.least_important == part.least_important


def test_next_tokens_are_scored_at_the_last_token_of_an_answer_too(tiny, rows_here, teacher):
    stack = LayerStack(tiny(4, vocab=49152, hidden=32))
    blocks = load_text(f"{rows_here}:sums", teacher.tokenizer, block=32, split="train")
    for metric in ("nll", "kl"):
        scores = measure(stack, blocks, metric, teacher=stack if metric == "kl" else None, show=False)
        assert scores.weights.sum() == pytest.approx(1)  # of one kind
        places = Positions.sample(Rows.of(blocks), None, 0, predict=metric == "nll")
        assert int(places.valid.sum()) == int(blocks.scored.sum())
        said = teacher.tokenizer.decode(places.targets[places.valid])
        assert any(digit in said for digit in "123456789")


def test_a_race_first_sees_two_of_each_kind():
    assert first_look((), 2) == 2
    assert first_look(("a", "a", "b", "a", "b"), 2) == 5
    assert first_look(("a", "b", "c") * 4, 2) == 6
    assert list(map(len, rounds(9, 2, 5))) == [5, 2, 2]


def test_intervals_of_several_kinds_hold_the_truth():
    """95 of 100 intervals hold the mean that the values are drawn around, at two sequences a kind as at ten."""
    for each in (2, 4, 10):
        draw, kinds, inside = np.random.default_rng(0), [k for k in "abcdef" for _ in range(each)], 0
        for _ in range(300):
            x = np.stack([draw.normal(1.0, 0.3, len(kinds)), np.ones(len(kinds)), np.full(len(kinds), 2.0)], 1)
            row = LayerScores.from_samples("kl", "x", [0, 1, 2], x, np.ones(len(kinds)), kinds=kinds).table.loc[0]
            level = 1.0  # the median layer is the second, without noise, but where the first is above it
            inside += row.ci_low <= level <= row.ci_high
        assert inside / 300 > 0.9, each


def test_one_sequence_of_a_kind_is_refused_before_the_work(tiny, rows_here, teacher):
    stack = LayerStack(tiny(4, vocab=49152, hidden=32))
    blocks = load_text(rows_here, teacher.tokenizer, block=32, tokens=96, split="train")
    assert sorted(blocks.kinds.count(kind) for kind in ("sums", "tales")) == [1, 2]
    with pytest.raises(MeasureError, match="there is one sequence"):
        measure(stack, blocks, "kl", teacher=stack, show=False)


def test_a_run_whose_kinds_run_out_is_refused_before_it_is_made(teacher, tmp_path):
    """Of 64 tokens a block, the copies that fit run out after two: two other kinds are left with one sequence."""
    sizes = {"block": 64, "calibration_tokens": 768, "train_tokens": 768, "eval_tokens": 768}
    with pytest.raises(MeasureError, match="one sequence.*lengthen the blocks"):
        PruningSession.create(tmp_path / "run", teacher, text="mix", **sizes)
    assert not (tmp_path / "run").exists()


@torch.no_grad()
def damage(stack, blocks, layer_id):
    """Mean KL(whole || without the layer) at the scored positions."""
    bare = stack.share()
    bare.remove(layer_id)
    ids = blocks.tokens.long()
    p, q = (each.model(input_ids=ids).logits.double().log_softmax(-1) for each in (stack, bare))
    kl = (p.exp() * (p - q)).sum(-1)  # [N, T]
    return float(kl[blocks.scored].mean())


def test_intervals_come_from_rows_within_kinds():
    """Where kinds differ and rows of a kind do not, there is nothing to be unsure of."""
    x = np.repeat([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], 4, axis=0)
    scores = LayerScores.from_samples("kl", "x", [0, 1, 2], x, np.ones(8), kinds=["a"] * 4 + ["b"] * 4)
    assert scores.table["ci_low"].to_numpy() == pytest.approx(scores.table["score"].to_numpy())
    assert scores.table["ci_high"].to_numpy() == pytest.approx(scores.table["score"].to_numpy())


# ---------------------------------------------------------------- a mix of any teacher's


def test_a_mix_of_any_teacher(tiny, teacher, tmp_path):
    model = tiny(2, vocab=49152, hidden=16)
    passages = [
        f"Number {n} is a place by the sea. " + "People walk there and look at the boats when the day is long. " * 4
        for n in range(30)
    ]
    rows = make_mix(model, teacher.tokenizer, passages, rows=200, batch=64, show=False)
    kinds = {row["kind"] for row in rows}
    assert kinds <= KINDS and kinds >= {"prose", "copies", "arithmetic"}
    assert sum(row["kind"] == "copies" for row in rows) == 200 * SHARES["copies"] // sum(SHARES.values())
    for row in rows:
        if row["kind"] == "copies":
            context, target = row["parts"]
            assert (
                context.endswith(target.split()[0]) is False and target.strip() in context
            )  # it stands there already
        if row["kind"] == "arithmetic":
            assert all(
                eval(a.strip().removesuffix("=")) == int(b) for a, b in zip(row["parts"][::2], row["parts"][1::2])
            )
    assert rows == make_mix(model, teacher.tokenizer, passages, rows=200, batch=64, show=False)
    blocks = load_text(file_of(tmp_path / "mine.jsonl", rows), teacher.tokenizer, block=128, split="train")
    assert set(blocks.kinds) == kinds
    with pytest.raises(TextError, match="does not fill one block of 16; .*raise block"):
        load_text(tmp_path / "mine.jsonl", teacher.tokenizer, block=16, split="train")
    with pytest.raises(TextError, match="at least 20 passages"):
        make_mix(model, teacher.tokenizer, ["Too short."] * 30, show=False)
    for wrong in ("A text in place of a list. " * 40, [*passages, 3], 7, None):
        with pytest.raises(TextError, match="must hold str"):
            make_mix(model, teacher.tokenizer, wrong, show=False)
    fewer = make_mix(model, teacher.tokenizer, (text for text in passages), rows=16, show=False)
    assert [row["parts"][1] for row in fewer if row["kind"] == "prose"] == passages  # a generator is read once
