"""The same figures on a GPU as on the CPU. Marked `gpu`: these run where CUDA is.

`ILDLAB_GPU_DEVICE=cpu pytest -m gpu` tries the tests themselves on a machine without one.
"""

import os

import pytest
import torch

from ildlab import measure
from ildlab.distill.config import DistillConfig
from ildlab.distill.train import distill
from ildlab.evaluate.suites import load_suite, score_suite
from ildlab.evaluate.text_quality import evaluate
from ildlab.model.load import load_model
from ildlab.model.stack import LayerStack
from ildlab.session.session import PruningSession

DEVICE = os.environ.get("ILDLAB_GPU_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("short_speed"),
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.fixture
def both(tiny, teacher):
    """The same model on the CPU and on the device."""
    vocab = len(teacher.tokenizer)
    return LayerStack(tiny(5, vocab=vocab)), LayerStack(tiny(5, vocab=vocab).to(DEVICE))


@pytest.mark.parametrize("metric", ["block_influence", "taylor", "nll", "kl"])
def test_scores(both, blocks, metric):
    cpu, gpu = (measure(stack, blocks.tokens, metric, stack.share()) for stack in both)
    torch.testing.assert_close(
        torch.tensor(gpu.table["score"].values), torch.tensor(cpu.table["score"].values), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("options", [{}, {"micro_batch": 1}, {"kl_positions": 8}])
def test_distillation(both, blocks, options):
    config = DistillConfig(tokens=6 * 4 * 64, learning_rate=1e-3, **options)
    found = []
    for teacher in both:
        student = teacher.share()
        student.remove(2)
        found.append(distill(student, teacher, blocks.tokens, config, gap=2).history)
        assert student.device.type == teacher.device.type
    for column in ("kl", "hidden", "grad_norm"):
        torch.testing.assert_close(
            torch.tensor(found[1][column].values), torch.tensor(found[0][column].values), rtol=1e-2, atol=1e-3
        )


def test_evaluation_and_suites(both, blocks, teacher):
    suite = load_suite("mini7", limit=2)
    found = []
    for stack in both:
        student = stack.share()
        student.remove(1)
        text = evaluate(student, stack, blocks.tokens, speed=False)
        scored = score_suite(student, teacher.tokenizer, suite)
        drops = measure(student, None, "task", suite=suite, tokenizer=teacher.tokenizer)
        found.append((text.kl, text.perplexity, scored.aggregate, *drops.table["score"]))
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_whole_loop(tiny_folder, text_file, tmp_path, dtype):
    loaded = load_model(str(tiny_folder), dtype=dtype, device=DEVICE)
    with PruningSession.create(
        tmp_path / "run",
        loaded,
        text=str(text_file),
        block=32,
        calibration_tokens=256,
        train_tokens=512,
        eval_tokens=256,
    ) as session:
        session.run(target_layers=4)
        assert session.student.device.type == torch.device(DEVICE).type
        assert len(session.removed) == 2
        session.export(tmp_path / "out")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("second", ["cpu", 1])
def test_a_model_over_devices(tiny, blocks, teacher, tmp_path, second):
    """Layers on the GPU, and others in main memory or on a second GPU: the figures of the CPU."""
    from transformers import AutoModelForCausalLM

    if second == 1 and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = tiny(5, vocab=len(teacher.tokenizer))
    model.save_pretrained(tmp_path)
    where = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
    where |= {f"model.layers.{i}": 0 if i < 3 else second for i in range(5)}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=where, dtype=torch.float32).eval()
    found = []
    for whole in (LayerStack(model), LayerStack(spread.requires_grad_(False))):
        student = whole.share()
        student.remove(1)
        text = evaluate(student, whole, blocks.tokens, speed=False)
        scores = [measure(student, blocks.tokens, m, whole).table["score"] for m in ("block_influence", "kl")]
        found.append([text.kl, text.perplexity, *scores[0], *scores[1]])
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-4)
