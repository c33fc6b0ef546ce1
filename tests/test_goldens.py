"""Numbers on SmolLM2 that a refactor may not move.

`python tests/test_goldens.py` records them anew into tests/goldens/; do that only for a change that is meant to
move them, and say so in its commit. Measures and distillation run in fp64, so that the figures hold on any
machine to 1e-6; a session stores bf16 or fp32 weights, so its figures are held to 1e-3 (its choices exactly).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ildlab import DistillConfig, LayerStack, PruningSession, load_model, load_text, measure
from ildlab.distill import distill
from ildlab.evaluate import load_suite, score_suite

FOLDER = Path(__file__).parent / "goldens"
KEPT = (0, 1, 2, 3, 8, 12, 14, 17, 20, 25, 28, 29)  # of SmolLM2's layers: a sweep costs their number squared
GONE = (14, 17)  # so that student and teacher differ, and share their bottom
ONE_PASS = ("block_influence", "angular_distance", "mse", "relative_l2", "lrp", "magnitude", "taylor")
PROMPT = "The layers of a transformer"


def cut():
    """SmolLM2 with a part of its layers, in fp32."""
    loaded = load_model("smollm2-135m", dtype="float32", device="cpu")
    whole = LayerStack(loaded.model)
    for layer_id in set(whole.layer_ids) - set(KEPT):
        whole.remove(layer_id)
    return loaded, whole


def pair():
    """Teacher in fp64, and a student without two of its layers."""
    loaded, teacher = cut()
    loaded.model.double()
    student = teacher.share()
    for layer_id in GONE:
        student.remove(layer_id)
    return loaded.tokenizer, teacher, student


def told(scores) -> dict:
    """What a golden keeps of `LayerScores`."""
    return {
        "score": scores.table["score"].tolist(),
        "ci_low": scores.table["ci_low"].tolist(),
        "n": scores.table["n"].tolist(),
        "least": scores.least_important,
        "dropped": scores.details.get("dropped", {}),
    }


def record_measure() -> dict:
    """Scores of every metric, sampled positions, and a race."""
    tokenizer, teacher, student = pair()
    blocks = load_text("teacher-samples", tokenizer, block=48, tokens=6 * 48, split="calibration")
    out = {m: told(measure(student, blocks, m, batch_size=4, show=False)) for m in ONE_PASS}
    out["nll"] = told(measure(student, blocks, "nll", positions=16, batch_size=4, show=False))
    out["kl"] = told(measure(student, blocks, "kl", teacher, batch_size=4, show=False))
    out["race"] = told(
        measure(student, blocks, "kl", teacher, race=True, positions=16, batch_size=2, tie=0.001, show=False)
    )
    return out


def record_task() -> dict:
    """The drop of a small suite's aggregate without each layer, of which a race keeps half and half again."""
    tokenizer, _, student = pair()
    out = {}
    for name, race in (("sweep", False), ("race", True)):
        found = measure(
            student, None, "task", suite=load_suite("canaries", limit=8), tokenizer=tokenizer, race=race, show=False
        )
        out[name] = told(found) | {"whole": found.details["whole"]}
    return out


def record_suite() -> dict:
    """mini7@8 of the whole of SmolLM2, task by task."""
    loaded = load_model("smollm2-135m", dtype="float32", device="cpu")
    loaded.model.double()
    found = score_suite(LayerStack(loaded.model), loaded.tokenizer, "mini7@8", show=False)
    return {name: task.score for name, task in found.tasks.items()} | {"aggregate": found.aggregate}


def record_distill() -> dict:
    """Losses of four steps, with the defaults and with the paper's."""
    out = {}
    for name, config in {
        "default": DistillConfig(batch_size=2, tokens=4 * 2 * 48, local_tokens=4 * 2 * 48),
        "joint": DistillConfig(hidden_weight=1.0, local_tokens=0, tokens=4 * 8 * 48),
        "sampled": DistillConfig(batch_size=4, micro_batch=2, tokens=4 * 4 * 48, kl_positions=12, scope="neighbours"),
        "paper": DistillConfig.paper(batch_size=2, tokens=4 * 2 * 48),
    }.items():
        tokenizer, teacher, student = pair()
        blocks = load_text("teacher-samples", tokenizer, block=48, tokens=12 * 48, split="train")
        result = distill(student, teacher, blocks, config, gap=GONE, show=False)
        history = result.history.drop(columns=["seconds", "tokens_per_second"])
        out[name] = {
            "trained": result.trained,
            "stage": history.pop("stage").tolist(),
            **{c: [None if v != v else v for v in history[c].astype(float)] for c in history},
        }
    return out


def record_session(folder: Path) -> dict:
    """Journal of two iterations in fp32, and logits of the exported checkpoint in stock transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, _ = cut()
    loaded.model.save_pretrained(folder / "teacher")
    loaded.tokenizer.save_pretrained(folder / "teacher")
    loaded = load_model(folder / "teacher", dtype="float32", device="cpu")
    with PruningSession.create(
        folder / "run",
        loaded,
        text="teacher-samples",
        block=48,
        calibration_tokens=192,
        train_tokens=384,
        eval_tokens=192,
        metric="kl",
        measure={"positions": 16},
        distill={"batch_size": 4},
        seed=3,
    ) as session:
        session.run(target_layers=10, show=False)
        path = session.export(folder / "checkpoint")
        actions = [[s.action, s.parent, s.layer_ids, s.args.get("layer_id")] for s in session.steps]
        history = session.history()
        keep = ["perplexity", "kl", "agreement", "perplexity_pruned", "kl_pruned"]
        figures = {c: [None if v != v else v for v in history[c].astype(float)] for c in keep}
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        last = model(**tokenizer(PROMPT, return_tensors="pt")).logits[0, -1]
    best = last.topk(8)
    return {
        "actions": actions,
        "history": figures,
        "logits": {"ids": best.indices.tolist(), "values": best.values.tolist()},
    }


def assert_same(found, wanted, tolerance: float, place: str = "") -> None:
    """Equal in everything but floats, which may differ by `tolerance`, relative above 1."""
    if isinstance(wanted, dict):
        assert sorted(found) == sorted(wanted), place
        for key in wanted:
            assert_same(found[key], wanted[key], tolerance, f"{place}/{key}")
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted), place
        for number, (f, w) in enumerate(zip(found, wanted)):
            assert_same(f, w, tolerance, f"{place}/{number}")
    elif isinstance(wanted, float):
        # The bound of a mean of two sequences is nine times as far off as the mean is.
        allowed = 10 * tolerance if "ci_low" in place else tolerance
        assert found == pytest.approx(wanted, rel=allowed, abs=allowed, nan_ok=True), place
    else:
        assert found == wanted, place


RECORDS = {"measure": record_measure, "task": record_task, "suite": record_suite, "distill": record_distill}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDS)
def test_golden(name):
    wanted = json.loads((FOLDER / f"{name}.json").read_text())
    assert_same(json.loads(json.dumps(RECORDS[name]())), wanted, 1e-6)


@pytest.mark.slow
def test_golden_session(tmp_path, short_speed):
    wanted = json.loads((FOLDER / "session.json").read_text())
    assert_same(json.loads(json.dumps(record_session(tmp_path))), wanted, 1e-3)


if __name__ == "__main__":
    import sys
    import tempfile
    import time

    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        todo = RECORDS | {"session": lambda: record_session(Path(scratch))}
        for each in sys.argv[1:] or todo:
            start = time.perf_counter()
            (FOLDER / f"{each}.json").write_text(json.dumps(todo[each](), indent=1) + "\n")
            print(f"{each}: {time.perf_counter() - start:.0f} s")
