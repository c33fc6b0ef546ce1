"""The trunk-shared sweep is exact; races pick what the sweep picks; offloaded layers load once."""

import copy
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from ildlab.importance import ablation
from ildlab.importance.dispatch import measure
from ildlab.importance.sweep import branches
from ildlab.model.head import branch_kl, branch_nll
from ildlab.model.stack import LayerStack


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 97, (6, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def pair(tiny):
    """(teacher of 6 layers, student of 5: layer 3 removed, layer 4 with weights of its own)."""
    teacher = LayerStack(tiny(6))
    student = teacher.share()
    student.remove(3)
    student.own([4])
    student.layers[student.position(4)].mlp.down_proj.weight.data.mul_(1.1)
    return teacher, student


def really_removed(stack, layer_id):
    """A copy of the model with the layer gone, for good."""
    pruned = LayerStack(copy.deepcopy(stack.model), stack.layer_ids)
    pruned.remove(layer_id)
    return pruned


def nll(log_p, tokens):
    return -log_p[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]


@torch.no_grad()
def oracle(stack, tokens, teacher=None, mask=None):
    """Scores of each layer in fp64 from plain models with the layer really removed, [N, L]."""
    stack = LayerStack(copy.deepcopy(stack.model).double(), stack.layer_ids)
    inputs = {"input_ids": tokens} | ({} if mask is None else {"attention_mask": mask})
    valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    columns = []
    if teacher is None:
        base = nll(stack.model(**inputs).logits.log_softmax(-1), tokens)
        valid = valid[:, :-1] & valid[:, 1:]
    else:
        log_t = copy.deepcopy(teacher.model).double()(**inputs).logits.log_softmax(-1)
    for layer_id in stack.layer_ids:
        log_p = really_removed(stack, layer_id).model(**inputs).logits.log_softmax(-1)
        if teacher is None:
            value = nll(log_p, tokens) - base
        else:
            value = (log_t.exp() * (log_t - log_p)).sum(-1)
        columns.append((value * valid).sum(1) / valid.sum(1))
    return torch.stack(columns, 1).numpy()


@pytest.mark.parametrize("metric", ["nll", "kl"])
@pytest.mark.parametrize("limit", [1, 2**31])
def test_sweep_equals_removed_models_in_fp64(pair, tokens, metric, limit):
    teacher, student = pair
    want = oracle(student, tokens, teacher if metric == "kl" else None)
    got = measure(student, tokens, metric, teacher, batch_size=4, max_branch_bytes=limit)
    np.testing.assert_allclose(got.per_sequence, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.table.score, want.mean(0), rtol=1e-5, atol=1e-6)
    assert got.layer_ids == [0, 1, 2, 4, 5]


@pytest.mark.parametrize("metric", ["nll", "kl"])
def test_padding_never_counts(pair, tokens, metric):
    teacher, student = pair
    mask = torch.ones_like(tokens)
    mask[1, 15:] = 0
    mask[4, 9:] = 0
    garbage = torch.where(mask.bool(), tokens, 0)
    want = oracle(student, garbage, teacher if metric == "kl" else None, mask)
    got = measure(student, {"input_ids": garbage, "attention_mask": mask}, metric, teacher, batch_size=6)
    np.testing.assert_allclose(got.per_sequence, want, rtol=1e-4, atol=1e-5)
    assert got.weights.tolist() == (mask.sum(1) - int(metric == "nll")).tolist()
    pooled = (want * got.weights[:, None]).sum(0) / got.weights.sum()
    np.testing.assert_allclose(got.table.score, pooled, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_branches_are_bit_for_bit_the_removed_model(tiny, tokens, dtype):
    stack = LayerStack(tiny(5, dtype=dtype))
    seen = []
    for ids, hidden in branches(stack, [stack.trunk(tokens)], max_branch_bytes=30_000):
        for layer_id, states in zip(ids, hidden, strict=True):
            with torch.no_grad():
                pruned = really_removed(stack, layer_id)
                assert torch.equal(states[0], pruned.final(tokens)), layer_id
                assert torch.equal(stack.logits(states[0]), pruned.logits(pruned.final(tokens)))
            seen.append(layer_id)
    assert seen == stack.layer_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_model_scores_are_those_of_separate_runs(teacher, blocks, dtype):
    """SmolLM2: three layers, against the plain forward of the model with the layer removed."""
    model = teacher.model if dtype is torch.float32 else copy.deepcopy(teacher.model).to(dtype)
    stack, batch = LayerStack(model), blocks.tokens[:2, :16].long()
    chosen = [3, 17, 29]
    with torch.no_grad():
        for ids, hidden in branches(stack, [stack.trunk(batch)], chosen):
            for layer_id, states in zip(ids, hidden, strict=True):
                with stack.without(layer_id):
                    want = model(batch, use_cache=False).logits
                got = stack.logits(states[0])
                assert got.dtype == dtype
                if dtype is torch.bfloat16:
                    assert torch.equal(got, want)
                else:
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if dtype is torch.float32:
        scores = measure(stack, batch, "nll", batch_size=2)
        with torch.no_grad():
            whole = nll(model(batch, use_cache=False).logits.double().log_softmax(-1), batch).mean()
            for layer_id in chosen:
                with stack.without(layer_id):
                    without = nll(model(batch, use_cache=False).logits.double().log_softmax(-1), batch).mean()
                assert scores.table.score[layer_id] == pytest.approx(float(without - whole), abs=1e-5)


def test_layer_passes_and_heads(pair, tokens, monkeypatch):
    teacher, student = pair
    heads, logits = [], LayerStack.logits
    monkeypatch.setattr(LayerStack, "logits", lambda *a, **k: heads.append(1) or logits(*a, **k))
    details = measure(student, tokens, "nll", batch_size=6).details
    assert details["layer_passes"] == 5 * 6 // 2
    assert len(heads) == 5 + 1
    # The teacher's own layers only from where it leaves the student: 3 shared, 3 of its own.
    details = measure(student, tokens, "kl", teacher, batch_size=6).details
    assert details["layer_passes"] == 4 + (4 + 3 + 2 + 1) + 3


def test_token_scores_survive_large_logits(tiny, tokens):
    """fp32 log-softmax: no overflow, no cancellation where the distribution is all but certain."""
    stack = LayerStack(tiny(3))
    hidden = stack.final(tokens[:1])[0].detach()
    stack.model.lm_head.weight.data.mul_(200)
    got = branch_nll(stack, [hidden], tokens[0])[0]
    log_p = stack.logits(hidden).double().log_softmax(-1)
    torch.testing.assert_close(got.double(), -log_p.gather(1, tokens[0][:, None])[:, 0], rtol=1e-5, atol=1e-4)
    same = branch_kl(stack, [hidden], stack, hidden)[0]
    assert float(same.abs().max()) < 1e-5


# ----------------------------------------------------------------------- race


class Table:
    """Stands in for a model: looks scores up, so that races can be run by the hundred."""

    def __init__(self, student, values, prior):
        self.alive, self.values, self.prior = student.layer_ids, values, prior
        self.want_prior, self.passes, self.rows = False, 0, []

    def __call__(self, rows):
        self.passes += len(self.alive)
        self.rows += list(rows)
        columns = [self.values[rows][:, self.alive], np.zeros((len(rows), 1)), np.ones((len(rows), 1))]
        if self.want_prior:
            columns.append(self.prior[rows])
        return torch.from_numpy(np.concatenate(columns, 1))


def race(monkeypatch, tiny_stack, values, prior=None, **options):
    prior = np.zeros_like(values) if prior is None else prior
    made = []
    monkeypatch.setattr(
        ablation, "_Job", lambda student, *a, **k: made.append(Table(student, values, prior)) or made[0]
    )
    rows = torch.randint(3, 97, (len(values), 8))
    return measure(tiny_stack, rows, "nll", race=True, batch_size=4, **options), made[0]


@pytest.fixture(scope="module")
def eight(tiny):
    return LayerStack(tiny(8))


def test_race_picks_the_least_and_says_when(eight, monkeypatch):
    wrong, scored = 0, []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        truth = rng.permutation(np.array([0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 2.0, 4.0]))
        values = truth + 0.08 * rng.normal(size=(64, 8)) + rng.normal(size=(64, 1))
        scores, job = race(monkeypatch, eight, values, tie=0.0)
        wrong += scores.least_important != truth.argmin()
        scored.append(scores.table.n.sum() / values.size)
        assert scores.details["stopped"] in ("one layer is left", "the text ran out")
        n = scores.table.n
        assert all(n[int(i)] == count for i, count in scores.details["dropped"].items())
        assert n[truth.argmax()] <= 6 and n[truth.argmin()] == n.max()
    assert wrong <= 1  # 95 %
    assert np.mean(scored) < 0.3


def test_race_stops_at_a_tie(eight, monkeypatch):
    rng = np.random.default_rng(5)
    values = np.array([0.05, 0.052, 0.9, 1, 2, 3, 4, 5]) + 0.004 * rng.normal(size=(400, 8))
    scores, job = race(monkeypatch, eight, values, tie=0.02)
    assert scores.details["stopped"] == "2 layers are left, none better than the best by more than 0.02"
    assert scores.finalists == [0, 1] and len(job.rows) < 40
    assert scores.tied == [scores.least_important, 1 - scores.least_important]


def test_prior_drops_the_hopeless_after_the_first_small_batch(eight, monkeypatch):
    rng = np.random.default_rng(6)
    values = np.array([6, 5, 0.1, 0.2, 0.3, 0.4, 0.5, 3]) + 0.3 * rng.normal(size=(40, 8))
    prior = np.array([0.9, 0.6, 0.03, 0.04, 0.03, 0.05, 0.04, 0.4]) + 0.001 * rng.normal(size=(40, 8))
    with_prior, _ = race(monkeypatch, eight, values, prior)
    assert with_prior.table.n[[0, 1, 7]].tolist() == [2, 2, 2]
    misled, _ = race(monkeypatch, eight, values, prior[:, ::-1].copy())  # calls 0, 6 and 7 hopeless
    assert misled.table.n[6] > 2  # an average score contradicts it: the prior alone drops nothing
    assert misled.least_important == 2


def test_race_on_a_model_agrees_with_the_sweep(pair, tokens):
    teacher, student = pair
    full = measure(student, tokens, "kl", teacher)
    quick = measure(student, tokens, "kl", teacher, race=True, batch_size=2)
    assert quick.least_important == full.least_important
    for layer_id, n in quick.table.n.items():
        column = full.layer_ids.index(layer_id)
        np.testing.assert_allclose(quick.per_sequence[:n, column], full.per_sequence[:n, column], rtol=1e-4)
    assert quick.details["layer_passes"] > 0


@pytest.mark.parametrize("metric", ["nll", "kl"])
def test_some_layers_alone_score_as_among_all(pair, tokens, metric):
    teacher, student = pair
    given = (teacher,) if metric == "kl" else ()
    some = [student.layer_ids[i] for i in (3, 1)]
    full, part = (measure(student, tokens, metric, *given, layers=layers) for layers in (None, some))
    assert part.layer_ids == sorted(some) and part.details["layers"] == tuple(some)
    assert full.unscored == [] and sorted([*part.unscored, *some]) == student.layer_ids
    columns = [full.layer_ids.index(i) for i in part.layer_ids]
    np.testing.assert_allclose(part.per_sequence, full.per_sequence[:, columns], rtol=1e-4)
    assert part.details["layer_passes"] < full.details["layer_passes"]
    raced = measure(student, tokens, metric, *given, layers=some, race=True, batch_size=2)
    assert raced.least_important == part.least_important and raced.layer_ids == part.layer_ids


def test_the_prior_of_a_race_is_that_of_the_layers_in_it(eight, monkeypatch):
    """Layer 5 is hopeless by both; as the second of three, its prior must not be read as that of layer 1."""
    rng = np.random.default_rng(6)
    values = np.array([9, 9, 0.1, 9, 9, 6, 9, 0.3]) + 0.3 * rng.normal(size=(40, 8))
    prior = np.array([0.9, 0.03, 0.03, 0.9, 0.9, 0.9, 0.9, 0.04]) + 0.001 * rng.normal(size=(40, 8))
    scores, job = race(monkeypatch, eight, values, prior, layers=[2, 5, 7, 3])
    assert scores.layer_ids == [2, 3, 5, 7] and scores.table.n[[3, 5]].tolist() == [2, 2]
    assert scores.least_important == 2


# -------------------------------------------------------------------- offload


@pytest.fixture()
def offloaded(tiny, tmp_path):
    """A tiny model whose layers accelerate keeps on disk, and a counter of loads by layer."""
    from transformers import LlamaForCausalLM

    tiny(5).save_pretrained(tmp_path / "model")
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {f"model.layers.{i}": "disk" for i in range(5)}
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=where, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    stack = LayerStack(model.eval().requires_grad_(False))
    loads = {}
    for position, layer in enumerate(stack.layers):
        hook = layer.mlp.up_proj._hf_hook
        before = hook.pre_forward

        def counted(module, *args, _before=before, _hook=hook, _position=position, **kwargs):
            if _hook.offload:
                loads[_position] = loads.get(_position, 0) + 1
            return _before(module, *args, **kwargs)

        hook.pre_forward = counted
    return stack, loads


@pytest.mark.parametrize("metric", ["block_influence", "lrp", "magnitude", "nll", "kl"])
def test_offloaded_layers_are_loaded_once(offloaded, tiny, tokens, metric):
    stack, loads = offloaded
    whole = LayerStack(tiny(5))
    got = measure(stack, tokens, metric, stack, batch_size=2)
    # The first layer is needed by no branch but its own, and KL with itself runs the trunk to the top.
    assert loads == dict.fromkeys(range(5), 1)
    want = measure(whole, tokens, metric, whole, batch_size=2)
    np.testing.assert_allclose(got.table.score, want.table.score, rtol=1e-6)
    assert all(p.device.type == "meta" for p in stack.layers.parameters())


def test_offload_goes_in_groups_where_memory_is_short(offloaded, tokens):
    stack, loads = offloaded
    one = tokens.shape[1] * 32 * 4 * 6
    measure(stack, tokens, "nll", batch_size=2, max_branch_bytes=4 * one)
    assert loads == dict.fromkeys(range(5), 2)  # 6 sequences, 4 at a time


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_ranking_under_a_memory_cap(teacher, tmp_path):
    """SmolLM2 with its layers on disk: the peak stays well under the model and its activations."""
    teacher.model.save_pretrained(tmp_path / "model")
    tokens = torch.randint(0, 49152, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, tmp_path / "tokens.pt")
    code = textwrap.dedent(
        """
        import json, sys, torch
        torch.set_num_threads(1)
        from transformers import AutoModelForCausalLM
        from ildlab.importance.dispatch import measure
        from ildlab.model.stack import LayerStack
        folder = sys.argv[1]
        place = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        place |= {f"model.layers.{i}": "disk" for i in range(30)}

        def peak():  # ru_maxrss would count the parent's, before exec
            return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))

        before = peak()
        model = AutoModelForCausalLM.from_pretrained(
            folder + "/model", dtype=torch.float32, device_map=place, offload_folder=folder + "/off"
        )
        stack = LayerStack(model.eval().requires_grad_(False))
        scores = measure(stack, torch.load(folder + "/tokens.pt"), "nll", batch_size=2, positions=3)
        print(json.dumps({"peak": (peak() - before) / 1024, "score": scores.table.score.tolist()}))
        """
    )
    command = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    out = json.loads(done.stdout.splitlines()[-1])
    want = measure(LayerStack(teacher.model), tokens, "nll", batch_size=2, positions=3).table.score
    np.testing.assert_allclose(out["score"], want, rtol=1e-4, atol=1e-5)
    embeddings = teacher.model.get_input_embeddings().weight.numel() * 4 / 2**20
    size = sum(p.numel() * 4 for p in teacher.model.parameters()) / 2**20
    assert embeddings < out["peak"] < 0.75 * size  # the embeddings at least are in memory
