"""Redundancy, drift and the logit lens against naive loops in fp64."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats

from ildlab.errors import MeasureError
from ildlab.importance import hidden_states
from ildlab.importance.agreement import rank_agreement
from ildlab.importance.dispatch import measure
from ildlab.importance.hidden_states import block_distances, drift, logit_lens, redundancy, token_drift
from ildlab.model.stack import LayerStack


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(hidden_states, "BATCH", 2)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 97, (5, 12), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def pair(tiny):
    teacher = LayerStack(tiny(5))
    student = teacher.share()
    student.remove(2)
    return teacher, student


def doubles(stack, tokens):
    return LayerStack(copy.deepcopy(stack.model).double(), stack.layer_ids).hidden_states(tokens)


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("kind", ["cosine", "angular"])
def test_redundancy(pair, tokens, kind, skip_first):
    teacher, _ = pair
    states = [h[:, int(skip_first) :].flatten(0, 1) for h in doubles(teacher, tokens)]
    want = np.array(
        [
            [
                float(torch.cosine_similarity(a, b, -1).clamp(-1, 1).mean())
                if kind == "cosine"
                else float((torch.cosine_similarity(a, b, -1).clamp(-1, 1).arccos() / torch.pi).mean())
                for b in states
            ]
            for a in states
        ]
    )
    got = redundancy(teacher, tokens, kind, skip_first=skip_first)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert list(got.index) == [0, 1, 2, 3, 4, "out"] == list(got.columns)


def unbiased_hsic(k, m):
    """Song et al. 2012, eq. 5, by the book."""
    n = len(k)
    k, m = k - torch.diag(k.diagonal()), m - torch.diag(m.diagonal())
    one = torch.ones(n, dtype=k.dtype)
    return float(
        ((k @ m).trace() + one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one))
        / (n * (n - 3))
    )


def test_cka(pair, tokens, monkeypatch):
    monkeypatch.setattr(hidden_states, "BATCH", 5)
    teacher, _ = pair
    states = [h.flatten(0, 1) for h in doubles(teacher, tokens)]
    grams = [h @ h.T for h in states]
    want = np.array([[unbiased_hsic(a, b) for b in grams] for a in grams])
    want /= np.sqrt(np.outer(want.diagonal(), want.diagonal()))
    np.testing.assert_allclose(redundancy(teacher, tokens, "cka"), want, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(hidden_states, "BATCH", 3)
    # Minibatches of tokens, their HSIC summed before the quotient: here two batches of 36 and 24 tokens.
    parts = [[h[a:b] @ h[a:b].T for h in states] for a, b in ((0, 36), (36, 60))]
    want = sum(np.array([[unbiased_hsic(a, b) for b in grams] for a in grams]) for grams in parts)
    want /= np.sqrt(np.outer(want.diagonal(), want.diagonal()))
    np.testing.assert_allclose(redundancy(teacher, tokens, "cka"), want, rtol=1e-4, atol=1e-5)


def test_block_distances(pair, tokens):
    _, student = pair
    states = doubles(student, tokens)
    triangle = block_distances(student, tokens)
    assert list(triangle.columns) == [0, 1, 3, 4] and list(triangle.index) == [1, 2, 3, 4]
    angles = torch.cosine_similarity(states[1], states[3], -1).arccos() / torch.pi
    assert triangle.loc[2, 1] == pytest.approx(float(angles.mean()), rel=1e-5)
    assert np.isnan(triangle.loc[2, 4]) and triangle.notna().to_numpy().sum() == 10
    np.testing.assert_allclose(triangle.loc[1], measure(student, tokens, "angular_distance").table.score, rtol=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "relative_l2"])
def test_drift(pair, tokens, kind):
    teacher, student = pair
    mine, theirs = doubles(student, tokens), doubles(teacher, tokens)
    partner = [0, 1, 3, 4, 5]  # input of layer 3 against input of layer 3
    want = []
    for a, at in zip(mine, partner, strict=True):
        b = theirs[at]
        value = 1 - torch.cosine_similarity(a, b, -1) if kind == "cosine" else (a - b).norm(dim=-1) / b.norm(dim=-1)
        want.append(value)
    got = drift(student, teacher, tokens, kind)
    assert list(got.index) == [0, 1, 3, 4, "out"]
    np.testing.assert_allclose(got.drift, [float(w.mean()) for w in want], rtol=1e-5, atol=1e-9)
    assert (got.ci_low <= got.drift).all() and (got.drift <= got.ci_high).all() and got.drift[1] == 0
    each = token_drift(student, teacher, tokens[2])
    if kind == "cosine":
        np.testing.assert_allclose(each, np.stack([w[2] for w in want]), rtol=1e-4, atol=1e-9)
    assert each.attrs["tokens"] == [str(i) for i in tokens[2].tolist()]


def test_drift_leaves_out_padding_and_the_first_token(pair, tokens):
    teacher, student = pair
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    garbled = {"input_ids": torch.where(mask.bool(), tokens, 5), "attention_mask": mask}
    got = drift(student, teacher, garbled, skip_first=True)
    mine, theirs = student.hidden_states(garbled)[3], teacher.hidden_states(garbled)[4]
    each = 1 - torch.cosine_similarity(mine.double(), theirs.double(), -1)
    keep = mask.bool()
    keep[:, 0] = False
    assert got.loc[4, "drift"] == pytest.approx(float(each[keep].mean()), rel=1e-4)


def test_logit_lens(teacher):
    stack = LayerStack(teacher.model)
    student = stack.share()
    student.remove(12)
    text = "The capital of France is"
    table = logit_lens(student, text, teacher.tokenizer, teacher=stack, top=3)
    ids = teacher.tokenizer(text, return_tensors="pt")["input_ids"]
    assert len(table) == (30 + 31) * ids.shape[1]
    last = table[(table.model == "teacher") & (table.layer == "out")]
    with torch.no_grad():
        probabilities = teacher.model(ids).logits[0].double().softmax(-1)
    np.testing.assert_allclose([p[0] for p in last.probability], probabilities.amax(-1), rtol=1e-4)
    np.testing.assert_allclose(last.entropy, -(probabilities * probabilities.log()).sum(-1), rtol=1e-4)
    assert [t[0] for t in last.top] == [teacher.tokenizer.decode([i]) for i in probabilities.argmax(-1).tolist()]
    assert last.target_probability.iloc[0] == pytest.approx(float(probabilities[0, ids[0, 1]]), rel=1e-3)
    assert np.isnan(last.target_probability.iloc[-1])


def test_bad_input(pair, tokens, tiny):
    teacher, student = pair
    with pytest.raises(MeasureError, match="no kind 'colour'"):
        redundancy(teacher, tokens, "colour")
    with pytest.raises(MeasureError, match="fewer than 4"):
        redundancy(teacher, tokens[:1, :3], "cka")
    with pytest.raises(MeasureError, match="teacher lacks"):
        drift(teacher, student, tokens)
    with pytest.raises(MeasureError, match="tokenizer"):
        token_drift(student, teacher, "text")
    with pytest.raises(MeasureError, match="empty"):
        token_drift(student, teacher, [])
    broken = LayerStack(tiny(3))
    broken.layers[1].mlp.down_proj.weight.data.fill_(torch.inf)
    with pytest.raises(MeasureError, match="not finite at layer"):
        redundancy(broken, tokens)


def test_rank_agreement(pair, tokens):
    teacher, student = pair
    scores = {
        m: measure(student, tokens, m, teacher if m == "kl" else None) for m in ("block_influence", "magnitude", "kl")
    }
    found = rank_agreement(scores, k=2)
    assert len(found) == 3
    row = found.set_index(["a", "b"]).loc[("magnitude", "kl")]
    pair = [scores[m].table.score for m in ("magnitude", "kl")]
    assert row.spearman == pytest.approx(stats.spearmanr(*pair).statistic)
    assert row.kendall == pytest.approx(stats.kendalltau(*pair).statistic)
    assert row.top == len(set(scores["magnitude"].ranking[:2]) & set(scores["kl"].ranking[:2])) / 2
    same = rank_agreement({"a": scores["kl"], "b": scores["kl"]}, k=2)
    assert same.iloc[0][["spearman", "kendall", "top"]].tolist() == pytest.approx([1, 1, 1])
    with pytest.raises(MeasureError, match="at least two"):
        rank_agreement({"a": scores["kl"]})
    with pytest.raises(MeasureError, match="k=9"):
        rank_agreement(scores, 9)
    with pytest.raises(MeasureError, match="different students"):
        rank_agreement({"a": scores["kl"], "b": measure(teacher, tokens)})
