"""The distillation loop: the published loss, scopes, sharing, resume, and what failures leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import psutil
import pytest
import torch
import torch.nn.functional as F
from test_losses import naive_divergence

from ildlab.distill import processes
from ildlab.distill.batches import Counts, row_order
from ildlab.distill.config import DistillConfig
from ildlab.distill.losses import divergence
from ildlab.distill.masters import Masters
from ildlab.distill.plan import Plan
from ildlab.distill.scope import match_points, resolve_scope, runs
from ildlab.distill.step import DistillStep
from ildlab.distill.train import distill, distill_steps, learning_rate
from ildlab.errors import DistillError, NotFiniteError, TextError
from ildlab.model.load import load_model
from ildlab.model.stack import LayerStack

BASE = DistillConfig(
    scope="suffix",
    hidden_loss="mse",
    hidden_weight=1.0,
    batch_size=4,
    learning_rate=1e-2,
    tokens=4 * 12 * 8,
    local_tokens=0,
    kl_positions=None,
)


def pair(tiny, gone=(2,), layers=5, dtype=torch.float32):
    teacher = LayerStack(tiny(layers, dtype=dtype))
    student = teacher.share()
    for layer_id in gone:
        student.remove(layer_id)
    return student, teacher


def rows(n=10, length=12, seed=0):
    return torch.randint(3, 97, (n, length), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def weights(stack):
    return {k: v.clone() for k, v in stack.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- the loss


def restated_paper_loss(student, teacher, ids, mask, last_trainable, gap):
    """loss = KLDiv(sum, log_target) / 100 + MSE(last trainable) + MSE(last), on everything, padding too."""
    out_t = teacher.model(input_ids=ids, attention_mask=mask)
    out_s = student.model(input_ids=ids, attention_mask=mask)
    kl = F.kl_div(out_s.logits.log_softmax(-1), out_t.logits.log_softmax(-1), reduction="sum", log_target=True)
    h_t = teacher.hidden_states({"input_ids": ids, "attention_mask": mask})
    h_s = list(student.walk({"input_ids": ids, "attention_mask": mask}))
    # The student's layer `last_trainable` lies above the gap: one position lower than in the teacher.
    at = last_trainable - sum(g < last_trainable for g in gap)
    return kl / 100 + F.mse_loss(h_s[at + 1], h_t[last_trainable + 1]) + F.mse_loss(h_s[-1], h_t[-1])


@pytest.mark.parametrize("gone", [(2,), (1, 3)])
@pytest.mark.parametrize("padded", [False, True])
def test_paper_loss_and_gradients_to_the_letter(tiny, gone, padded):
    student, teacher = pair(tiny, gone, dtype=torch.float64)
    config = DistillConfig.paper()
    trained = resolve_scope(config.scope, student, gone)
    assert trained == sorted({i for g in gone for i in (g - 1, g + 1)} - set(gone))
    student.own(trained)
    generator = torch.Generator().manual_seed(1)
    for i in trained:  # so that both MSE terms differ from 0 below the last layer too
        for p in student.layers[student.position(i)].parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
            p.requires_grad_()
    params = [p for p in student.model.parameters() if p.requires_grad]
    ids = rows(3).long()
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 7:] = 0
        mask[2, 4:] = 0
    points = match_points(config, student, trained)
    step = DistillStep(student, teacher, trained, points, config)
    # The paper averages the MSE over everything, so the count is that of all positions.
    loss, _ = step({"input_ids": ids, "attention_mask": mask}, Counts(ids.numel(), 1, 1))
    got = torch.autograd.grad(loss, params)
    want_loss = restated_paper_loss(student, teacher, ids, mask, trained[-1], gone)
    want = torch.autograd.grad(want_loss, params)
    assert abs(loss - want_loss) <= 1e-6 * want_loss
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_paper_counts_the_last_layer_twice_where_it_is_also_the_last_trainable(tiny):
    student, teacher = pair(tiny, (3,))
    config = DistillConfig.paper(batch_size=2, tokens=24, learning_rate=1e-6, kl_weight=0.0)
    record = distill(student, teacher, rows(2), config, gap=3).history.iloc[0]
    with torch.no_grad():
        once = F.mse_loss(pair(tiny, (3,))[0].final(rows(2).long()), teacher.final(rows(2).long())).item()
    assert record.loss == pytest.approx(2 * once, rel=1e-5)


def test_how_the_two_reductions_relate_and_why_the_papers_depends_on_the_batch(tiny):
    def first(config, n):
        student, teacher = pair(tiny)
        one = replace(config, batch_size=n, tokens=n * 12, learning_rate=1e-9)
        return distill(student, teacher, rows(1).repeat(n, 1), one, gap=2).history.iloc[0]

    paper, token = DistillConfig.paper(), replace(DistillConfig.paper(), reduction="token")
    one, four = first(paper, 1), first(paper, 4)
    # The same row four times over: the same model, four times the KL in the paper's loss.
    assert four.kl == pytest.approx(one.kl, rel=1e-5)
    assert four.loss - four.hidden == pytest.approx(4 * (one.loss - one.hidden), rel=1e-4)
    assert first(token, 4).loss == pytest.approx(first(token, 1).loss, rel=1e-5)
    # sum KL / 100 = (tokens / 100) x the KL per token
    assert one.loss - one.hidden == pytest.approx(12 / 100 * one.kl, rel=1e-4)


def test_padding_never_counts_per_token(tiny):
    ids = rows(3).long()
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    mask[2, 9:] = 0
    records = []
    for junk in (4, 77):
        student, teacher = pair(tiny)
        batch = {"input_ids": torch.where(mask == 1, ids, junk), "attention_mask": mask}
        config = replace(BASE, batch_size=3, tokens=36, ce_weight=0.5)
        records.append(distill(student, teacher, batch, config, gap=2).history.iloc[0])
    for name in ("loss", "kl", "hidden", "ce", "grad_norm"):
        assert records[0][name] == pytest.approx(records[1][name], rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"divergence": "reverse_kl", "temperature": 2.0},
        {"divergence": "jsd", "hidden_loss": "relative_mse", "scope": [3]},
        {"hidden_loss": "cosine", "ce_weight": 0.3, "kl_positions": 5},
        {"hidden_weight": 0.0},
        {"kl_weight": 0.0},
    ],
    ids=str,
)
def test_every_loss_learns_and_fused_equals_unfused(tiny, changes, monkeypatch):
    curves = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr("ildlab.distill.step.fused_divergence", naive_divergence)
        student, teacher = pair(tiny)
        before = weights(teacher)
        result = distill(student, teacher, rows(4), replace(BASE, tokens=4 * 12 * 12, **changes), gap=2)
        curves.append(result.history.loss.tolist())
        assert same(before, weights(teacher))
    assert curves[0] == pytest.approx(curves[1], rel=2e-3)
    assert min(curves[0][-3:]) < 0.9 * curves[0][0]


# ------------------------------------------------------------ what is trained


def test_scopes(tiny):
    student, _ = pair(tiny, (3, 4), layers=8)
    assert resolve_scope("neighbours", student, [3, 4]) == [2, 5]
    assert resolve_scope("window(2)", student, [3, 4]) == [1, 2, 5, 6]
    assert resolve_scope("suffix", student, 4) == [5, 6, 7]
    later, _ = pair(tiny, (1, 4), layers=8)  # layer 1 went earlier: its suffix goes on healing
    assert resolve_scope("suffix", later, 4) == [2, 3, 5, 6, 7]
    assert resolve_scope("neighbours", later, 4) == [3, 5]
    assert resolve_scope("suffix(2)", student, 4) == [1, 2, 5, 6, 7]
    assert resolve_scope("all", student, []) == [0, 1, 2, 5, 6, 7]
    assert resolve_scope([7, 0], student, []) == [0, 7]
    top, _ = pair(tiny, (4,))
    assert resolve_scope("suffix", top, 4) == [3]
    assert resolve_scope("neighbours", top, 4) == [3]
    for scope, gap, words in [
        ("window(0)", 4, "window"),
        ("prefix", 4, "prefix"),
        ([3], 4, "cannot train"),
        ([], 4, "none"),
        ("suffix", [], "gap"),
        ("all", 5, "still in the student"),
    ]:
        with pytest.raises(DistillError, match=words):
            resolve_scope(scope, student, gap)


@pytest.mark.parametrize("scope", ["neighbours", "suffix", "all", [0]])
def test_only_the_scope_changes_and_the_teacher_never(tiny, scope):
    student, teacher = pair(tiny)
    before, teacher_before = weights(student), weights(teacher)
    result = distill(student, teacher, rows(), replace(BASE, scope=scope, tokens=96), gap=2)
    changed = {
        student.layer_ids[int(k.split(".")[2])] for k, v in weights(student).items() if not torch.equal(v, before[k])
    }
    assert changed == set(result.trained)
    assert same(teacher_before, weights(teacher))
    assert not any(p.requires_grad or p.grad is not None for p in student.model.parameters())


def test_nothing_below_the_lowest_trained_layer_builds_a_graph_and_the_bottom_runs_once(tiny):
    student, teacher = pair(tiny, (3,), layers=6)
    runs = {"student": [], "teacher": []}
    for name, stack in (("student", student), ("teacher", teacher)):
        real = stack.run

        def spy(position, hidden, trunk, real=real, name=name):
            runs[name].append((position, torch.is_grad_enabled()))
            return real(position, hidden, trunk)

        stack.run = spy
    distill(student, teacher, rows(4), replace(BASE, scope=[4], tokens=48), gap=3)
    assert runs["student"] == [(3, True), (4, True)]  # ids 4 and 5
    assert runs["teacher"] == [(p, False) for p in range(6)]


@pytest.mark.parametrize("changes", [{"micro_batch": 1}, {"micro_batch": 3}], ids=str)
def test_accumulation_changes_nothing(tiny, changes):
    curves = []
    for config in (BASE, replace(BASE, **changes)):
        student, teacher = pair(tiny)
        curves.append(distill(student, teacher, rows(), replace(config, kl_positions=6), gap=2).history)
    for name in ("loss", "kl", "hidden", "grad_norm", "grad_kl", "agreement"):
        assert curves[0][name].tolist() == pytest.approx(curves[1][name].tolist(), rel=1e-3), name


def test_a_teacher_of_other_embeddings_starts_from_its_own(tiny):
    """A student whose embedding was changed shares no bottom with its teacher, and not the teacher's input either."""
    student, teacher = pair(tiny)
    embedding = student.model.get_input_embeddings()
    embedding.weight = torch.nn.Parameter(1.5 * embedding.weight, requires_grad=False)
    with torch.no_grad():
        want = divergence(*(stack.logits(stack.final(rows(2).long())) for stack in (student, teacher))).mean()
    first = replace(BASE, scope="all", batch_size=2, tokens=24)
    assert distill(student, teacher, rows(2), first, gap=2).history.kl[0] == pytest.approx(want.item(), rel=1e-4)


def test_bf16_model_has_fp32_masters(tiny):
    # At a rate too small for one bf16 step to show, the fp32 masters still add up.
    student, teacher = pair(tiny, dtype=torch.bfloat16)
    before = weights(student)
    config = replace(BASE, learning_rate=1e-4, warmup=0, schedule="constant", tokens=4 * 12 * 40)
    result = distill(student, teacher, rows(4), config, gap=2)
    assert all(t.dtype == torch.float32 for t in Masters(pair(tiny, dtype=torch.bfloat16)[0], [3]).tensors)
    assert student.model.dtype == torch.bfloat16
    moved = [(weights(student)[k] != before[k]).float().mean().item() for k in before if ".mlp." in k and ".3." in k]
    assert min(moved) > 0.1
    assert result.history.loss.iloc[-5:].mean() < result.history.loss.iloc[:5].mean()


# ------------------------------------------------------------ failure, resume


def test_not_finite_stops_with_the_last_good_weights(tiny):
    student, teacher = pair(tiny)
    # A bad row that the seeded order meets later than the first: an embedding row that is NaN.
    with torch.no_grad():
        teacher.model.get_input_embeddings().weight[5] = float("nan")
    text = rows(10)
    text[text == 5] = 6
    order = distill_rows(len(text))
    text[order[9], 3] = 5
    with pytest.raises(DistillError, match="step 3.*(logits|hidden)"):
        distill(student, teacher, text, BASE, gap=2)
    kept = weights(student)
    assert all(v.isfinite().all() for k, v in kept.items() if ".layers." in k)
    assert not any(p.requires_grad for p in student.model.parameters())


def distill_rows(n):
    return torch.cat([row_order(step, n, BASE) for step in range(3)]).tolist()


@pytest.mark.parametrize("part", ["Masters", "DistillStep"])
def test_a_failure_while_setting_up_leaves_a_plain_student(tiny, monkeypatch, part):
    from ildlab.distill import train

    class Failing(getattr(train, part)):
        def __init__(self, *args):
            super().__init__(*args)
            raise RuntimeError("no memory")

    monkeypatch.setattr(train, part, Failing)
    student, teacher = pair(tiny)
    with pytest.raises(RuntimeError, match="no memory"):
        distill(student, teacher, rows(), BASE, gap=2)
    assert not any(p.requires_grad or p.grad is not None for p in student.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.model.modules())


def test_closing_keeps_the_weights_of_the_last_step(tiny):
    student, teacher = pair(tiny)
    work = distill_steps(student, teacher, rows(), BASE, gap=2)
    for _ in range(3):
        next(work)
    work.close()
    other, teacher = pair(tiny)
    work = distill_steps(other, teacher, rows(), BASE, gap=2)
    for _ in range(3):
        progress = next(work)
    assert progress.partial["step"] == 3 and progress.total == 8
    now = weights(other)
    work.close()
    assert same(weights(student), now)
    assert not any(p.requires_grad for p in student.model.parameters())


@pytest.mark.parametrize("local", [0, 4])
def test_resumed_curves_equal_the_unbroken_one(tiny, tmp_path, local):
    few = {"tokens": 4 * 12 * (11 - local), "local_tokens": 4 * 12 * local}
    config = replace(BASE, checkpoint_every=1, kl_positions=5, **few)
    student, teacher = pair(tiny)
    whole = distill(student, teacher, rows(), config, gap=2).history
    final = weights(student)
    # Broken off ten times over, once after each step.
    for attempt in range(1, 12):
        student, teacher = pair(tiny)
        work = distill_steps(
            student,
            teacher,
            rows(),
            config,
            gap=2,
            checkpoint=tmp_path / "c.safetensors",
            metrics_path=tmp_path / "m.jsonl",
        )
        progress = next(work)
        assert progress.done == attempt
        if attempt < 11:
            work.close()
    with pytest.raises(StopIteration) as stop:
        next(work)
    columns = ["loss", "kl", "grad_norm", "agreement", "learning_rate"]
    assert stop.value.value.history[columns].equals(whole[columns])
    assert same(weights(student), final)
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in lines] == whole.loss.tolist()


# ---------------------------------------------------------------- the local stage


def test_runs_are_layers_that_follow_each_other_in_the_student(tiny):
    student = LayerStack(tiny(8)).share()
    student.remove(2)
    student.remove(5)
    assert runs(student, [0, 1, 3]) == {3: 0}  # over the gap at 2
    assert runs(student, [1, 3, 6]) == {3: 1, 6: 4}  # 4 is between
    assert runs(student, [4, 6, 7]) == {7: 3}


def test_local_loss_and_gradients_restated(tiny):
    """Each run is trained for its own distance, on what the student has below it, and for nothing else."""
    student, teacher = pair(tiny, (1, 5), layers=8, dtype=torch.float64)
    trained = [0, 2, 4, 6]  # two runs: 0 2, and behind the frozen 3, 4 6
    student.own(trained)
    layers = {i: student.layers[student.position(i)] for i in trained}
    for layer in layers.values():
        layer.requires_grad_(True)
    ids, mask = rows(3).long(), torch.ones(3, 12)
    mask[1, 7:] = 0
    config = replace(BASE, local_tokens=36, hidden_loss="relative_mse")
    step = DistillStep(student, teacher, trained, [], config)
    loss, stats = step.local({"input_ids": ids, "attention_mask": mask}, Counts(int(mask.sum()), 1, 1))
    theirs = teacher.hidden_states({"input_ids": ids, "attention_mask": mask})
    mine = list(student.walk({"input_ids": ids, "attention_mask": mask}))
    distances = []
    for layer_id in (2, 6):
        a, b = mine[student.position(layer_id) + 1], theirs[layer_id + 1]
        distances.append((((a - b).square().sum(-1) / b.square().sum(-1)) * mask).sum() / mask.sum())
    assert float(loss.detach()) == pytest.approx(float(sum(distances).detach()), rel=1e-9)
    assert (stats[3:] / mask.sum()).tolist() == pytest.approx([float(d.detach()) for d in distances], rel=1e-6)
    for run, distance in (((0, 2), distances[0]), ((4, 6), distances[1])):
        params = [p for i in run for p in layers[i].parameters()]
        got, want = (torch.autograd.grad(each, params, retain_graph=True) for each in (loss, distance))
        assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(got, want, strict=True))


def test_the_local_stage_comes_first_and_runs_nothing_above(tiny):
    student, teacher = pair(tiny, layers=8)
    config = replace(
        BASE, scope="neighbours", tokens=4 * 12 * 3, local_tokens=4 * 12 * 20, local_rate=2e-3, warmup=0.0
    )
    ran = []
    hooks = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(teacher.layers)]
    result = distill(student, teacher, rows(), config, gap=2)
    for hook in hooks:
        hook.remove()
    history = result.history
    assert history.stage.tolist() == ["local"] * 20 + ["joint"] * 3 and result.steps == 23
    local, joint = history[history.stage == "local"], history[history.stage == "joint"]
    assert local.kl.isna().all() and local.agreement.isna().all() and joint.kl.notna().all()
    assert (
        local.hidden.iloc[-1] < 0.8 * local.hidden.iloc[0]
        and local.columns[local.notna().any()].isin(["hidden_3"]).any()
    )
    assert local.learning_rate.iloc[0] == config.local_rate and joint.learning_rate.iloc[0] == config.learning_rate
    assert ran.count(7) == 3 + 2  # the top layer: in the joint steps, and twice to see what the local stage did
    took = joint.seconds.iloc[-1] - local.seconds.iloc[-1]  # each stage has a speed of its own
    assert joint.tokens_per_second.iloc[-1] == pytest.approx(3 * 48 / took)


@pytest.mark.parametrize("steps, rate", [(1, 2e-5), (32, 6.4e-4), (100, 2e-3), (500, 2e-3)])
def test_a_short_local_stage_takes_a_lower_rate_unless_one_is_named(tiny, steps, rate):
    config = replace(BASE, scope="neighbours", warmup=0.0, local_tokens=4 * 12 * steps)
    plan = Plan.of(*pair(tiny), rows(), config, gap=2)
    assert plan.local_steps == steps and learning_rate(plan, 0) == pytest.approx(rate)
    assert learning_rate(plan, steps) == config.learning_rate  # the second stage has its own
    named = Plan.of(*pair(tiny), rows(), replace(config, local_rate=3e-3), gap=2)
    assert learning_rate(named, 0) == 3e-3


def test_a_local_stage_that_does_harm_is_taken_back(tiny, tmp_path):
    config = replace(BASE, scope="neighbours", tokens=4 * 12, local_tokens=4 * 12 * 6, learning_rate=1e-12)
    student, teacher = pair(tiny, layers=8)
    good = distill(student, teacher, rows(), config, gap=2)
    assert "note" not in good.history
    student, teacher = pair(tiny, layers=8)
    before = weights(student)
    work = distill_steps(
        student,
        teacher,
        rows(),
        replace(config, local_rate=3.0),
        gap=2,
        checkpoint=tmp_path / "c",
        metrics_path=tmp_path / "m",
    )
    notes = [progress.note for progress in work]
    assert "did harm" in notes[-1] and not any("harm" in note for note in notes[:-1])
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(student).values(), before.values(), strict=True)
    )
    assert "taken back" in json.loads((tmp_path / "m").read_text().splitlines()[-1])["note"]


def test_a_local_stage_that_cannot_be(tiny):
    with pytest.raises(DistillError, match="local_tokens"):
        DistillConfig(local_tokens=-1)
    with pytest.raises(DistillError, match="local_rate"):
        DistillConfig(local_rate=0.0)
    with pytest.raises(DistillError, match="local_tokens=0"):
        DistillConfig.paper(local_tokens=96)


def test_a_local_loss_that_is_not_finite_names_its_layer(tiny):
    student, teacher = pair(tiny)
    with torch.no_grad():
        student.layers[student.position(3)].mlp.down_proj.weight.fill_(float("inf"))
    config = replace(BASE, scope="neighbours", local_tokens=96)
    with pytest.raises(NotFiniteError, match=r"step 1 \(learning rate 4e-05\).*layers \[3\].*lower local_rate"):
        distill(student, teacher, rows(), config, gap=2)


KILLED = """
import os, random, signal, torch
import accelerate, torch._dynamo, transformers.models.llama  # once, for all children
from ildlab.distill.config import DistillConfig
from ildlab.distill.train import distill_steps
from ildlab.model.stack import LayerStack
config, draw = DistillConfig.from_dict({config!r}), random.Random(0)
torch.set_num_threads(1)
for attempt in range(10):
    steps = draw.randint(1, 4)
    child = os.fork()
    if not child:
        teacher = LayerStack(torch.load({model!r}, weights_only=False))
        student = teacher.share()
        student.remove(2)
        work = distill_steps(student, teacher, torch.load({text!r}), config, gap=2, checkpoint={out!r})
        for number, progress in enumerate(work, 1):
            if number == steps:
                os.kill(os.getpid(), signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "ended", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_steps_ten_times(tiny, tmp_path):
    """SIGKILL, most times between two checkpoints: the curve and the weights are those of an unbroken run."""
    config = replace(BASE, checkpoint_every=3, tokens=4 * 12 * 40)
    student, teacher = pair(tiny)
    torch.save(teacher.model, tmp_path / "model.pt")
    torch.save(rows(), tmp_path / "text.pt")
    whole = distill(student, teacher, rows(), config, gap=2).history
    out = tmp_path / "c.safetensors"
    code = KILLED.format(
        model=str(tmp_path / "model.pt"), text=str(tmp_path / "text.pt"), config=config.to_dict(), out=str(out)
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["9"] * 10, done.stdout + done.stderr[-3000:]
    again, teacher = pair(tiny)
    work = distill_steps(again, teacher, rows(), config, gap=2, checkpoint=out)
    assert next(work).done > 6  # not from the start
    with pytest.raises(StopIteration) as stop:
        while True:
            next(work)
    columns = ["loss", "kl", "grad_norm", "agreement", "learning_rate"]
    assert stop.value.value.history[columns].equals(whole[columns])
    assert same(weights(student), weights(again))


def test_a_checkpoint_of_something_else_is_refused(tiny, tmp_path):
    student, teacher = pair(tiny)
    out = tmp_path / "c.safetensors"
    distill(student, teacher, rows(), BASE, gap=2, checkpoint=out)
    before = weights(student)
    with pytest.raises(DistillError, match="another distillation"):
        distill(student, teacher, rows(), replace(BASE, seed=1), gap=2, checkpoint=out)
    assert same(weights(student), before)
    with torch.no_grad():  # the same layers, healed in another way: not the student that the checkpoint is of
        next(student.layers[0].parameters()).add_(0.1)
    with pytest.raises(DistillError, match="another distillation"):
        distill(student, teacher, rows(), BASE, gap=2, checkpoint=out)
    other = LayerStack(tiny(5, seed=8))
    with pytest.raises(DistillError, match="another distillation"):
        student = other.share()
        student.remove(2)
        distill(student, other, rows(), BASE, gap=2, checkpoint=out)
    out.write_bytes(b"half a file")
    with pytest.raises(DistillError, match="cannot be read"):
        distill(student, teacher, rows(), BASE, gap=2, checkpoint=out)


def test_what_is_not_part_of_the_loss_is_not_zero_but_missing(tiny):
    few = replace(BASE, tokens=48)
    hidden = distill(*pair(tiny), rows(), replace(few, kl_weight=0.0), gap=2).history.iloc[0]
    assert hidden.kl is None and hidden.agreement is None and hidden.ce is None and hidden.hidden > 0
    kl = distill(*pair(tiny), rows(), replace(few, hidden_weight=0.0), gap=2).history.iloc[0]
    assert kl.hidden is None and kl.kl > 0 and kl.agreement is not None
    student, teacher = pair(tiny)
    work = distill_steps(student, teacher, rows(), replace(few, kl_weight=0.0), gap=2)
    note = next(work).note
    work.close()
    assert note.startswith("loss ") and "hidden" in note and "kl" not in note


@pytest.mark.parametrize("scope", [(4,), "suffix"])
def test_frozen_bottom_runs_once_over_several_epochs(tiny, scope, monkeypatch):
    """32 rows of a text of 10: layers 0 and 1 are shared, layer 3 is frozen but healed before, 4 trains."""

    def run():
        student, teacher = pair(tiny, (2,), layers=6)
        student.own([3])
        with torch.no_grad():
            for p in student.layers[student.position(3)].parameters():
                p.mul_(1.1)
        seen = {}

        def counted(stack, name):
            real = stack.run
            stack.run = lambda at, h, trunk: (
                seen.update({(name, at): seen.get((name, at), 0) + len(h)}) or real(at, h, trunk)
            )

        counted(student, "student"), counted(teacher, "teacher")
        config = replace(BASE, scope=scope, batch_size=2, tokens=32 * 12)
        return distill(student, teacher, rows(), config, gap=2), seen

    result, seen = run()
    monkeypatch.setattr("ildlab.distill.step.BOTTOM_BYTES", 0)
    plain, all_runs = run()
    assert result.history.loss.tolist() == pytest.approx(plain.history.loss.tolist(), rel=1e-5)
    assert seen["teacher", 0] == seen["teacher", 1] == 10 and all_runs["teacher", 0] == 32
    # The teacher starts above the shared bottom, every time.
    assert ("student", 0) not in seen and seen["teacher", 2] == 32
    assert seen["student", 2] == (10 if scope == (4,) else 32)


# ------------------------------------------------------------------- config


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_weight": 0, "hidden_weight": 0},
        {"learning_rate": 0},
        {"batch_size": 0},
        {"temperature": -1},
        {"hidden_loss": "l2"},
        {"schedule": "step"},
        {"warmup": 2},
        {"reduction": "paper", "ce_weight": 1},
        {"scope": [2]},
        {"divergence": "kl"},
    ],
    ids=str,
)
def test_bad_configs_are_refused_before_anything_changes(tiny, changes):
    student, teacher = pair(tiny)
    layers = list(student.layers)
    with pytest.raises(DistillError, match=list(changes)[-1]):
        distill(student, teacher, rows(), replace(BASE, **changes), gap=2)
    assert list(student.layers) == layers


def test_a_config_is_checked_where_it_is_made_and_stays(tiny):
    with pytest.raises(DistillError, match=r"tokens=1.5: it must be a whole number or None"):
        DistillConfig(tokens=1.5)
    with pytest.raises(DistillError, match="schedule='step': it must be one of 'constant'"):
        DistillConfig(schedule="step")
    config = DistillConfig(scope=[1, 2], learning_rate="5e-4", batch_size=2.0)  # as YAML has them
    assert (config.scope, config.learning_rate, config.batch_size) == ((1, 2), 5e-4, 2)
    with pytest.raises(FrozenInstanceError):
        config.tokens = 4


def test_config_survives_json(tiny):
    config = DistillConfig(scope=[1, 3], clip=None, learning_rate=1e-3)
    assert DistillConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(DistillError, match="learnig_rate"):
        DistillConfig.from_dict({"learnig_rate": 1})
    result = distill(*pair(tiny), rows(), BASE, gap=2)
    assert "steps" in result._repr_html_() and result.peak > 0


def test_bad_text_and_pairs(tiny):
    student, teacher = pair(tiny)
    for text in ([[1, 2]], torch.zeros(3), torch.zeros(0, 4, dtype=torch.long)):
        with pytest.raises(TextError, match="blocks:"):
            distill(student, teacher, text, BASE, gap=2)
    with pytest.raises(DistillError, match="same model"):
        distill(teacher, teacher, rows(), replace(BASE, scope="all"))
    with pytest.raises(DistillError, match="wide"):
        distill(student, LayerStack(tiny(hidden=16)), rows(), BASE, gap=2)


def test_seeded_order_covers_the_text(tiny):
    config = replace(BASE, batch_size=3)
    seen = torch.cat([row_order(step, 10, config) for step in range(10)]).tolist()
    assert all(sorted(seen[e * 10 : e * 10 + 10]) == list(range(10)) for e in range(3))
    assert seen[:10] != seen[10:20]
    assert row_order(7, 10, config).tolist() == row_order(7, 10, config).tolist()
    assert seen[:10] != torch.cat([row_order(s, 10, replace(config, seed=1)) for s in range(4)]).tolist()[:10]


# ---------------------------------------------------------------- real model


def test_smollm2_heals(teacher, blocks):
    whole = LayerStack(teacher.model)
    student = whole.share()
    student.remove(20)
    config = DistillConfig(scope="window(2)", tokens=3 * 256, local_tokens=6 * 256, batch_size=4)
    result = distill(student, whole, blocks.tokens[:4], config, gap=20)
    assert result.trained == [18, 19, 21, 22]
    local, joint = (result.history[result.history.stage == stage] for stage in ("local", "joint"))
    assert local.hidden.iloc[-1] < 0.85 * local.hidden.iloc[0]
    untrained = distill(whole.share(without=[20]), whole, blocks.tokens[:4], replace(config, local_tokens=0), gap=20)
    assert joint.kl.iloc[0] < 0.9 * untrained.history.kl.iloc[0]  # it begins where the local stage left it


# ---------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def saved(tiny, teacher, tmp_path_factory):
    """A folder with a tiny model and a tokenizer, as `load_model` takes it."""
    folder = tmp_path_factory.mktemp("model")
    tiny(4, vocab=49152, hidden=16).save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    return folder


def loaded_pair(folder, dtype):
    """A teacher, and a student that was healed before: layer 0 is its own."""
    teacher = LayerStack(load_model(folder, dtype=dtype, device="cpu").model)
    student = teacher.share()
    student.own([0])
    with torch.no_grad():
        for p in student.layers[0].parameters():
            p.mul_(1.1)
    student.remove(1)
    return student, teacher


# Two steps of each stage.
SPREAD = DistillConfig(
    batch_size=4, tokens=4 * 12 * 2, local_tokens=4 * 12 * 2, hidden_weight=1.0, kl_positions=7, micro_batch=1
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_processes_equal_one(saved, tmp_path, dtype):
    text = {"input_ids": rows(12), "attention_mask": torch.ones(12, 12).index_fill_(1, torch.tensor([11]), 0)}
    students, results = [], []
    for count in (1, 2):
        student, teacher = loaded_pair(saved, dtype)
        work = processes.distill_steps(
            student,
            teacher,
            text,
            SPREAD,
            gap=1,
            processes=count,
            teacher_name=str(saved),
            checkpoint=tmp_path / f"{count}.safetensors",
            metrics_path=tmp_path / f"{count}.jsonl",
        )
        seen, workers = [], set()
        try:
            while True:
                seen.append(next(work))
                workers |= {w.environ().get("RANK") for w in psutil.Process().children(recursive=True)}
        except StopIteration as stop:
            results.append(stop.value)
        assert workers - {None} == ({"0", "1"} if count == 2 else set())
        assert [p.done for p in seen] == [1, 2, 3, 4] and seen[0].total == 4
        assert len((tmp_path / f"{count}.jsonl").read_text().splitlines()) == 4
        students.append(student)
    one, two = results
    assert (one.trained, one.gap, one.tokens, one.config) == (two.trained, two.gap, two.tokens, two.config)
    assert two.peak > 0 and two.seconds > 0
    for name in ("loss", "kl", "hidden", "agreement", "grad_norm", "grad_kl", "grad_hidden"):
        assert two.history[name].tolist() == pytest.approx(one.history[name].tolist(), rel=1e-4, nan_ok=True), name
    ours, theirs = (weights(student) for student in students)
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[k], theirs[k], atol=1e-5) for k in ours)
    assert not same(theirs, weights(loaded_pair(saved, dtype)[0]))
    assert not any(p.requires_grad for p in students[1].model.parameters())
    # A checkpoint of several processes is one of this distillation: one process takes it up, at its end.
    student, teacher = loaded_pair(saved, dtype)
    again = distill(student, teacher, text, SPREAD, gap=1, checkpoint=tmp_path / "2.safetensors")
    assert again.history.loss.tolist() == two.history.loss.tolist() and same(weights(student), theirs)


def test_a_killed_process_leaves_the_student_as_it_was(saved):
    student, teacher = loaded_pair(saved, "float32")
    before, layers = weights(student), list(student.layers)
    long = replace(SPREAD, tokens=4 * 12 * 100_000)
    work = processes.distill_steps(student, teacher, rows(), long, gap=1, processes=2, teacher_name=str(saved))
    next(work)
    workers = psutil.Process().children(recursive=True)
    trained = [w for w in workers if w.environ().get("RANK") == "1"]
    trained[-1].kill()
    with pytest.raises(DistillError, match="(?s)process of the distillation died.*SIGKILL"):
        for _ in work:
            pass
    assert same(before, weights(student)) and list(student.layers) == layers
    psutil.wait_procs(workers, timeout=30)
    assert not any(w.is_running() for w in workers)


def test_closing_ends_the_processes_and_keeps_what_they_trained(saved):
    student, teacher = loaded_pair(saved, "float32")
    before = weights(student)
    long = replace(SPREAD, tokens=4 * 12 * 100_000, scope="suffix")
    work = processes.distill_steps(student, teacher, rows(), long, gap=1, processes=2, teacher_name=str(saved))
    next(work)
    workers = psutil.Process().children(recursive=True)
    work.close()
    psutil.wait_procs(workers, timeout=30)
    assert len(workers) >= 3 and not any(w.is_running() for w in workers)
    changed = {k for k, v in weights(student).items() if not torch.equal(v, before[k])}
    assert changed and all(".layers.1." in k or ".layers.2." in k for k in changed)
    assert not any(p.requires_grad for p in student.model.parameters())


def test_what_a_process_finds_wrong_is_said(saved, tiny, tmp_path):
    student, teacher = loaded_pair(saved, "float32")
    before = weights(student)

    def run(**changes):
        options = {"gap": 1, "processes": 2, "teacher_name": str(saved)} | changes
        return list(processes.distill_steps(student, teacher, rows(), replace(SPREAD, seed=0), **options))

    with pytest.raises(DistillError, match="shared evenly by 3"):
        run(processes=3)
    other = tiny(4, vocab=49152, hidden=16, seed=1)
    other.save_pretrained(tmp_path)
    load_model(saved, device="cpu").tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DistillError, match="does not load the teacher in memory"):
        run(teacher_name=str(tmp_path))
    assert same(before, weights(student))


def test_one_that_is_not_finite_in_processes_is_that_error(saved):
    student, teacher = loaded_pair(saved, "float32")
    wild = replace(SPREAD, learning_rate=1e30, clip=None, warmup=0.0)
    with pytest.raises(NotFiniteError, match="stopped being finite at step"):
        list(processes.distill_steps(student, teacher, rows(), wild, gap=1, processes=2, teacher_name=str(saved)))
