"""LayerScores: intervals, separation, ties, storing; what `measure` refuses; positions, memory, host syncs."""

import json
import re

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ildlab.errors import MeasureError, TextError
from ildlab.importance import samples
from ildlab.importance.agreement import rank_correlation, redundant_depth
from ildlab.importance.dispatch import measure, measure_steps
from ildlab.importance.samples import Positions
from ildlab.importance.scores import LayerScores
from ildlab.model.stack import LayerStack
from ildlab.stats import over_runs, resamples
from ildlab.text.rows import Rows


def made(values, weights=None, **kwargs):
    values = np.asarray(values, float)
    weights = np.ones(len(values)) if weights is None else weights
    return LayerScores.from_samples("nll", "test", range(10, 10 + values.shape[1]), values, weights, **kwargs)


@pytest.fixture(scope="module")
def small(tiny):
    return LayerStack(tiny(5))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 97, (7, 20), generator=torch.Generator().manual_seed(1))


def test_bootstrap_equals_the_naive_loop():
    rng = np.random.default_rng(3)
    x, w = rng.normal(size=(12, 4)) + np.arange(4), rng.integers(5, 50, 12)
    scores = made(x, w, confidence=0.9)
    draws = resamples(12)
    naive = np.array(
        [
            [np.average(np.repeat(x[:, j], d.astype(int)), weights=np.repeat(w, d.astype(int))) for j in range(4)]
            for d in draws
        ]
    )
    mean = np.average(x, axis=0, weights=w)
    wider = np.sqrt(12 / 11) * 1.795885 / 1.644854  # t with 11 degrees of freedom over z, at 95%
    np.testing.assert_allclose(scores.table.ci_low, mean + wider * (np.percentile(naive, 5, axis=0) - mean), rtol=1e-5)
    np.testing.assert_allclose(
        scores.table.ci_high, mean + wider * (np.percentile(naive, 95, axis=0) - mean), rtol=1e-5
    )
    np.testing.assert_allclose(scores.table.score, mean)
    assert scores.separation() == pytest.approx(np.mean(naive.argmin(1) == 0))


@pytest.mark.parametrize("n", [3, 8, 16])
def test_intervals_of_few_sequences_are_wide_enough(n):
    """Of 30 equal layers: how often an interval holds the truth, and one is called surely more important."""
    rng = np.random.default_rng(n)
    hits, left_out = 0, 0
    for _ in range(40):
        scores = made(rng.normal(size=(n, 30)))
        hits += ((scores.table["ci_low"] <= 0) & (scores.table["ci_high"] >= 0)).sum()
        left_out += 30 - len(scores.tied)
    assert 0.92 <= hits / 1200 <= 0.98
    assert left_out / (40 * 29) <= 0.05


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        row = made(rng.normal(size=(40, 2))).table.iloc[0]
        hits += row.ci_low <= 0 <= row.ci_high
    assert 0.88 <= hits / 200 <= 0.985


def test_separation_is_paired():
    rng = np.random.default_rng(0)
    common = 10 * rng.normal(size=(30, 1))  # hard and easy sequences: it cancels between layers
    x = common + np.array([0.0, 0.5, 1.0]) + 0.1 * rng.normal(size=(30, 3))
    scores = made(x)
    assert scores.separation() == 1.0
    assert scores.tied == [10]
    assert scores.split_half() == pytest.approx(1.0)
    assert scores.table.ci_high[10] > scores.table.ci_low[12]  # though the intervals overlap


def test_noise_is_named():
    scores = made(np.random.default_rng(1).normal(size=(20, 8)))
    assert scores.separation() < 0.9
    assert len(scores.tied) > 2
    assert scores.tied[0] == scores.least_important
    assert abs(scores.split_half()) < 0.5
    assert "tied with it" in scores._repr_html_()


def test_dropped_layers_are_ranked_last_and_never_least():
    x = np.array([[1.0, -5.0, 3.0], [1.1, np.nan, 3.0], [0.9, np.nan, 3.1], [1.0, np.nan, 2.9]])
    scores = made(x)
    assert scores.least_important == 10  # 11 was scored once and dropped
    assert scores.finalists == [10, 12]
    assert scores.ranking == [10, 12, 11]
    assert scores.table.n.tolist() == [4, 1, 4]
    assert scores.separation() < 1  # the one sequence of layer 11 speaks against it
    assert "dropped early" in scores._repr_html_()


def test_a_layer_that_a_race_dropped_is_never_tied():
    x = np.array([[1.0, 1.5, 3.0], [1.1, 2.1, 3.0], [0.9, np.nan, 3.1], [1.0, np.nan, 2.9]])
    scores = made(x, details={"dropped": {"11": 2}})
    assert scores.tied == [10]  # two sequences alone could not part layer 11 from it


def test_json_round_trip():
    x = np.array([[1.0, 2.0, np.nan], [1.5, 2.5, 3.5], [0.5, 2.0, np.nan]])
    scores = made(x, details={"notes": ["a"], "dropped": {"12": 2}})
    again = LayerScores.from_dict(json.loads(json.dumps(scores.to_dict(), allow_nan=False)))
    np.testing.assert_allclose(again.per_sequence, x)
    assert again.table.equals(scores.table)
    assert again.tied == scores.tied and again.details == scores.details
    assert repr(again) == repr(scores)


def test_display_marks_the_least(small, tokens):
    scores = measure(small, tokens)
    page = scores._repr_html_()
    assert page.count("least important</td>") == 1
    assert [int(i) for i in re.findall(r"<th>(\d+)</th>", page)] == scores.ranking
    assert all(f"[{row.ci_low:.4g}, {row.ci_high:.4g}]" in page for row in scores.table.itertuples())
    assert scores._repr_html_() == page  # no random names in a stored notebook
    assert "split-half" in page


def test_display_has_a_column_of_each_kind():
    x = [[8.0, 9.0, 4.0, 8.0], [10.0, 9.0, 4.0, 8.0], [0.06, 0.08, 1.6, 0.04], [1.0, 2.0, 3.0, 4.0]]
    scores = made(x, kinds=["prose", "prose", "<b>", "n"])
    np.testing.assert_allclose(scores.per_kind.mean(axis=1), scores.table.score)
    page = scores._repr_html_()
    heads = re.findall(r"<th>(.*?)</th>", page.partition("</tr>")[0])
    assert heads[1:] == ["score", "interval", "n", "prose", "&lt;b&gt;", "n (text)", ""]
    cells = dict.fromkeys(scores.layer_ids)
    for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)[1:]:
        layer_id = int(re.search(r"<th>(\d+)</th>", row)[1])
        cells[layer_id] = re.findall(r"<td>(.*?)</td>", row)[3:6]
    # Medians: prose (9, 9, 4, 8) 8.5; <b> 0.07; n 2.5.
    assert cells == {
        10: ["1.06", "0.857", "0.4"],
        11: ["1.06", "1.14", "0.8"],
        12: ["0.471", "22.9", "1.2"],
        13: ["0.941", "0.571", "1.6"],
    }
    assert "median layer" in page and "median layer" not in made(x)._repr_html_()


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"metric": "colour"}, "no metric 'colour'"),
        ({"metric": "kl"}, "give teacher="),
        ({"metric": "nll", "positions": 0}, "positions=0"),
        ({"metric": "nll", "batch_size": 0}, "batch_size=0"),
        ({"metric": "mse", "race": True}, "no option 'race'"),
        ({"metric": "mse", "positions": 3}, "no option 'positions'"),
        ({"metric": "nll", "colour": 3}, "no option 'colour'"),
        ({"metric": "nll", "confidence": 1.0}, "confidence"),
        ({"metric": "nll", "tie": -1.0}, "tie"),
        ({"metric": "nll", "positions": "many"}, "positions='many'"),
        ({"metric": "nll", "seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments(small, tokens, arguments, says):
    with pytest.raises(MeasureError, match=says):
        measure(small, tokens, **arguments)


def test_bad_blocks(small, tokens):
    with pytest.raises(MeasureError, match="at least 2"):
        measure(small, tokens[:1])
    with pytest.raises(TextError, match="integer tensor"):
        measure(small, tokens.float())
    with pytest.raises(TextError, match="no valid token"):
        measure(small, {"input_ids": tokens, "attention_mask": torch.zeros_like(tokens)})


def test_nan_names_layer_and_batch(tiny, tokens):
    broken = LayerStack(tiny(4))
    broken.layers[2].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(MeasureError, match=r"layer 2 is nan in batch 0"):
        measure(broken, tokens)
    with pytest.raises(MeasureError, match=r"layer 0 is nan in batch 0"):
        measure(broken, tokens, "nll")


def test_lrp_says_which_family_cannot(tokens):
    from transformers import GPT2Config, GPT2LMHeadModel

    fused = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=3, n_head=2, n_positions=64)).eval()
    with pytest.raises(MeasureError, match="query projection"):
        measure(LayerStack(fused), tokens, "lrp")


# ------------------------------------------------------------------- positions


def test_positions_are_seeded_by_row_and_valid():
    mask = torch.ones(5, 30, dtype=torch.long)
    mask[2, 10:] = 0
    mask[3, :25] = 0
    rows = Rows.of({"input_ids": torch.arange(150).reshape(5, 30), "attention_mask": mask})
    places = Positions.sample(rows, 8, 7, predict=True)
    again = Positions.sample(rows, 8, 7, predict=True)
    assert torch.equal(places.index, again.index)
    assert not torch.equal(places.index, Positions.sample(rows, 8, 8, predict=True).index)
    assert places.valid.sum(1).tolist() == [8, 8, 8, 4, 8]
    for row in range(5):
        at = places.index[row][places.valid[row]]
        assert len(at.unique()) == len(at)
        assert bool(mask[row][at].all()) and bool(mask[row][at + 1].all())
        assert torch.equal(places.targets[row][places.valid[row]], rows.tokens[row][at + 1])


def test_sampled_positions_are_unbiased(small, tokens):
    full = measure(small, tokens, "nll").table.score
    sampled = np.mean([measure(small, tokens, "nll", positions=4, seed=s).table.score for s in range(12)], axis=0)
    np.testing.assert_allclose(sampled, full, atol=0.25)


# ------------------------------------------------------------ memory, syncs


@pytest.mark.parametrize("metric", ["block_influence", "taylor", "nll"])
def test_out_of_memory_halves_the_batch(small, tokens, metric, monkeypatch):
    want = measure(small, tokens, metric, batch_size=2)
    trunk = LayerStack.trunk

    def starved(self, batch):
        if batch.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return trunk(self, batch)

    monkeypatch.setattr(LayerStack, "trunk", starved)
    got = measure(small, tokens, metric, batch_size=7)
    np.testing.assert_allclose(got.per_sequence, want.per_sequence, rtol=1e-4, atol=1e-5)
    assert [n.split(":")[0] for n in got.details["notes"]] == ["out of memory"] * 2
    assert got.details["notes"][-1].endswith("to 1")

    def hopeless(self, batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(LayerStack, "trunk", hopeless)
    with pytest.raises(MeasureError, match="single sequence"):
        measure(small, tokens, metric)


def test_closing_leaves_the_student_whole(small, tokens):
    before = {k: v.clone() for k, v in small.model.state_dict().items()}
    work = measure_steps(small, tokens, "nll", batch_size=2)
    step = next(work)
    assert step.done == 2 and step.total == 7 and isinstance(step.partial, LayerScores)
    work.close()
    assert all(torch.equal(v, before[k]) for k, v in small.model.state_dict().items())
    assert not any(p.requires_grad for p in small.model.parameters())


PER_ROW = 1  # `nonzero` on the host for each sequence, when its positions are drawn


class Syncs(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    names = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        down = name == "_to_copy" and str(kwargs.get("device")) == "cpu" and args[0].device.type != "cpu"
        self.count += name in self.names or down
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    "metric", ["block_influence", "angular_distance", "mse", "relative_l2", "lrp", "taylor", "nll", "kl"]
)
def test_one_host_sync_a_batch(small, tokens, metric, monkeypatch):
    copies = []
    to_host = samples.to_host
    monkeypatch.setattr(samples, "to_host", lambda v: copies.append(1) or to_host(v))
    student = small.share()
    student.remove(2)
    rows = tokens.repeat(2, 1)

    def syncs(batches):
        copies.clear()
        with Syncs() as seen:
            measure(student, rows[: 2 * batches], metric, small if metric == "kl" else None, batch_size=2)
        return seen.count, len(copies)

    # Without a mask transformers looks for packed sequences in the position ids, at each pass: its own look at the device.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    few, many = syncs(2), syncs(6)
    assert many[1] - few[1] == 4  # the one copy of each batch
    # On the CPU the copy itself is none that the dispatcher sees; positions are drawn on the host, before.
    assert many[0] - few[0] == (PER_ROW * 8 if metric in ("taylor", "nll", "kl") else 0)


def test_rank_correlation_of_two_texts():
    rng = np.random.default_rng(0)
    layers, truth = range(12), np.arange(12.0)

    def scores(means, noise):
        return LayerScores.from_samples("kl", "a", layers, means + rng.normal(0, noise, (40, 12)), np.ones(40))

    value, low, high = rank_correlation(scores(truth, 0.1), scores(2 * truth, 0.1))
    assert low <= value <= high <= 1.0 and value == pytest.approx(1)
    value, low, high = rank_correlation(scores(truth, 0.1), scores(-truth, 0.1))
    assert -1 <= low <= value and value == pytest.approx(-1) and high < -0.9
    value, low, high = rank_correlation(scores(0 * truth, 1.0), scores(0 * truth, 1.0))
    assert low < 0 < high and high - low > 0.5  # noise alone: it is not known
    with pytest.raises(MeasureError, match="different students"):
        rank_correlation(scores(truth, 1), LayerScores.from_samples("kl", "a", [0, 1], rng.random((4, 2)), np.ones(4)))
    raced = LayerScores.from_samples("kl", "a", layers, np.full((4, 12), np.nan), np.ones(4))
    with pytest.raises(MeasureError, match="without a race"):
        rank_correlation(scores(truth, 1), raced)


def test_redundant_depth_says_where_the_least_layers_lie():
    def scores(means, noise=0.0, n=8):
        values = np.asarray(means, float) + np.random.default_rng(0).normal(0, noise, (n, len(means)))
        return LayerScores.from_samples("kl", "a", range(5, 5 + len(means)), values, np.ones(n))

    middle = [9, 8, 7, 1, 0, 7, 8, 9]
    assert redundant_depth(scores(middle)) == pytest.approx((0.5, 0.5, 0.5))
    assert redundant_depth(scores(range(8)))[0] == pytest.approx(0.5 / 7)
    value, low, high = redundant_depth(scores([1.0] * 8, 1.0))
    assert 0 <= low < value < high <= 1 and high - low > 0.2
    exact = LayerScores.exact("magnitude", "weights", range(8), middle)
    assert redundant_depth(exact)[0] == 0.5 and np.isnan(redundant_depth(exact)[1:]).all()
    with pytest.raises(MeasureError, match="of 8 layers that is 0"):
        redundant_depth(scores(middle), share=0.05)


def test_an_interval_over_a_few_runs_is_students():
    from scipy import stats

    x = [1.0, 2.0, 4.0]
    want = stats.t.interval(0.95, 2, loc=np.mean(x), scale=stats.sem(x))
    assert over_runs(x) == pytest.approx((np.mean(x), *want))
    mean, low, high = over_runs([3.0])
    assert mean == 3 and np.isnan([low, high]).all()
