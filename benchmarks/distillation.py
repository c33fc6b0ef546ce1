"""Distillation against a plain implementation: the same layers trained on the same tokens, in the same dtype.

The plain form runs both models whole with `output_hidden_states`, holds full logits of both, and lets
autograd take the KL apart. Each side runs in a process of its own, so that peak memory is its own.
`python benchmarks/distillation.py SIDE` runs one side and prints its figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

ROWS, LENGTH, GAP, STEPS = 4, 512, 20, 2


def bench() -> list[dict]:
    """Rows for `benchmarks/run.py`; a ratio is plain / ildlab for time, ildlab / plain for memory."""
    measured = {side: _run(side) for side in ("plain", "all", "sampled")}
    plain, whole = measured["plain"], measured["all"]
    shape = f"{ROWS} x {LENGTH} tokens, SmolLM2 without layer {GAP}, layers above it trained"
    notes = {
        "all": ("", f"the same loss; {shape}"),
        "sampled": (f", KL at {LENGTH // 4} positions", f"kl_positions={LENGTH // 4} of {LENGTH}"),
    }
    rows = [
        {
            "name": f"distillation step, plain / ildlab{name}",
            "ratio": plain["seconds"] / measured[side]["seconds"],
            "limit": None,
            "note": f"{plain['seconds']:.1f} s and {measured[side]['seconds']:.1f} s; {note}",
        }
        for side, (name, note) in notes.items()
    ]
    rows += [
        {
            "name": "peak memory of the process, ildlab / plain",
            "ratio": whole["bytes"] / plain["bytes"],
            "limit": "<= 0.5",
            "note": f"{whole['bytes'] / 2**30:.2f} GiB and {plain['bytes'] / 2**30:.2f} GiB beyond the imports; "
            "weights and optimizer included, KL at every position",
        },
        {
            "name": "loss of the plain form / ours",
            "ratio": plain["loss"] / whole["loss"],
            "limit": None,
            "note": "the same first step, so 1 means the same sum",
        },
    ]
    rows.extend(_rivals(whole))
    return rows


def _rivals(ours: dict) -> list[dict]:
    rows = []
    for name, package in (("optipfair", "optipfair"), ("the loss of TRL's GKD in a plain loop", "trl")):
        found = _run(package)
        if found.get("missing"):
            print(f"{'':25}{name}: not installed, so not compared (pip install {package})")
            continue
        how = "seconds" if "seconds" in found else "mean"
        rows.append(
            {
                "name": f"distillation step, {name} / ildlab",
                "ratio": found[how] / ours[how],
                "limit": None,
                "note": f"{found[how]:.1f} s and {ours[how]:.1f} s; the same tokens and trained layers, KL at every position",
            }
        )
    return rows


def _run(side: str) -> dict:
    done = subprocess.run([sys.executable, __file__, side], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# ------------------------------------------------------------------- sides


def _peak() -> int:
    # On Linux not ru_maxrss: that starts at the parent's, which has run other benchmarks.
    import torch

    from ildlab.distill.masters import peak_memory

    return peak_memory(torch.device("cpu"))


def _setup():
    import torch

    import ildlab.distill  # noqa: F401  (imports count for nobody)
    from ildlab.model.load import load_model
    from ildlab.model.stack import LayerStack
    from ildlab.text.blocks import load_text

    base = _peak()
    loaded = load_model("smollm2-135m", dtype="float32", device="cpu")
    need = ROWS * LENGTH * (STEPS + 1)
    tokens = load_text("python-docs", loaded.tokenizer, block=LENGTH, tokens=need, split="train").tokens
    return torch, base, loaded, LayerStack(loaded.model), tokens


def _pruned(teacher):
    """Copy the teacher and take the layer out by hand, as one would without ildlab; the layers above it train."""
    import copy

    model = copy.deepcopy(teacher.model)
    del model.model.layers[GAP]
    model.config.num_hidden_layers -= 1
    for position, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = position
        layer.requires_grad_(position >= GAP)
    return model


def ours(positions: int | None = None) -> dict:
    """Time steps of `distill_steps` with the plain form's loss."""
    _, base, _, teacher, tokens = _setup()
    from ildlab.distill.config import DistillConfig
    from ildlab.distill.train import distill_steps

    student = teacher.share()
    student.remove(GAP)
    config = DistillConfig(
        scope="suffix",
        batch_size=ROWS,
        seed=0,
        hidden_loss="mse",
        hidden_weight=1.0,
        local_tokens=0,
        reduction="token",
        kl_positions=positions,
    )
    times, losses = [], []
    loading = _peak()  # `distill_steps` counts anew, as its own report does
    start = time.perf_counter()
    for progress in distill_steps(student, teacher, tokens, config, gap=GAP):
        times.append(time.perf_counter() - start)
        losses.append(progress.partial["loss"])
        start = time.perf_counter()
    mean = sum(times) / len(times)
    return {"seconds": min(times[1:]), "mean": mean, "loss": losses[0], "bytes": max(loading, _peak()) - base}


def plain() -> dict:
    """Time steps of the straightforward form."""
    import math

    torch, base, _, teacher, tokens = _setup()
    import torch.nn.functional as F

    from ildlab.distill.batches import row_order
    from ildlab.distill.config import DistillConfig

    model = _pruned(teacher)
    default = DistillConfig(hidden_weight=1.0)
    config = DistillConfig(batch_size=ROWS)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=default.learning_rate, weight_decay=0.0
    )
    captured = {}
    for name, one in (("teacher", teacher.model), ("student", model)):
        # The last entry of output_hidden_states comes after the final norm; the paper's MSE wants the one before.
        one.model.norm.register_forward_pre_hook(lambda m, a, name=name: captured.__setitem__(name, a[0]))
    times, losses = [], []
    for step in range(math.ceil(len(tokens) / ROWS)):
        batch = tokens[row_order(step, len(tokens), config)].long()
        start = time.perf_counter()
        with torch.no_grad():
            want = teacher.model(input_ids=batch, output_hidden_states=True, use_cache=False)
        got = model(input_ids=batch, output_hidden_states=True, use_cache=False)
        kl = F.kl_div(
            got.logits.float().log_softmax(-1), want.logits.float().log_softmax(-1), reduction="sum", log_target=True
        )
        mse = F.mse_loss(captured["student"], captured["teacher"])
        loss = default.kl_weight * kl / batch.numel() + default.hidden_weight * mse
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], default.clip)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
        losses.append(loss.item())
    return {"seconds": min(times[1:]), "loss": losses[0], "bytes": _peak() - base}


def optipfair() -> dict:
    """Time `optipfair.distill_model` (soft labels only) on the same tokens and trained layers."""
    try:
        from optipfair import distill_model
    except ImportError:
        return {"missing": True}
    torch, base, _, teacher, tokens = _setup()
    model = _pruned(teacher)
    batches = [{"input_ids": b.long(), "attention_mask": torch.ones_like(b).long()} for b in tokens.split(ROWS)]
    start = time.perf_counter()
    distill_model(
        student_model=model,
        teacher_model=teacher.model,
        dataloader=batches,
        alpha=0.0,
        beta=1.0,
        epochs=1,
        accumulation_steps=1,
        show_progress=False,
    )
    mean = (time.perf_counter() - start) / len(batches)  # its steps cannot be timed apart
    return {"mean": mean, "bytes": _peak() - base}


def trl() -> dict:
    """Time steps with the loss of TRL's GKD trainer (its data pipeline wants chats, so the loop is plain)."""
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError:
        return {"missing": True}
    torch, base, _, teacher, tokens = _setup()
    model = _pruned(teacher)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    times = []
    for batch in tokens.long().split(ROWS):
        start = time.perf_counter()
        with torch.no_grad():
            want = teacher.model(input_ids=batch, use_cache=False).logits
        got = model(input_ids=batch, use_cache=False).logits
        GKDTrainer.generalized_jsd_loss(student_logits=got, teacher_logits=want, beta=0.0).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return {"seconds": min(times[1:]), "bytes": _peak() - base}


if __name__ == "__main__":
    sides = {
        "plain": plain,
        "all": ours,
        "sampled": lambda: ours(positions=LENGTH // 4),
        "optipfair": optipfair,
        "trl": trl,
    }
    print(json.dumps(sides[sys.argv[1]]()))
