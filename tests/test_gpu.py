"""Every routine on a device: the figures of the CPU. On `cuda` these are skipped where there is none.

The same bodies run on the CPU, where they try the tests themselves, and the paths that a GPU alone takes by itself
(branches stacked, what is kept of frozen layers on the device). Nothing is needed but torch, transformers, safetensors, pandas, numpy,
scipy, filelock, pyyaml and tqdm; the model is made here, and its text is Python's own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import bare  # noqa: E402

bare.fill_in()

import gpu as benchmark  # noqa: E402

from ildlab.distill.config import DistillConfig  # noqa: E402
from ildlab.distill.train import distill  # noqa: E402
from ildlab.evaluate.suites import load_suite, score_suite  # noqa: E402
from ildlab.evaluate.text_quality import evaluate  # noqa: E402
from ildlab.importance import sweep  # noqa: E402
from ildlab.importance.dispatch import measure  # noqa: E402
from ildlab.importance.hidden_states import drift, logit_lens, redundancy, token_drift  # noqa: E402
from ildlab.model.head import chunk_rows  # noqa: E402
from ildlab.model.load import LoadedModel, load_model  # noqa: E402
from ildlab.model.stack import LayerStack  # noqa: E402
from ildlab.model.stacked import learned  # noqa: E402
from ildlab.progress import drive  # noqa: E402
from ildlab.session.session import PruningSession  # noqa: E402
from ildlab.session.whatif import what_if_steps  # noqa: E402
from ildlab.widgets.worker import Worker  # noqa: E402

CUDA = torch.cuda.is_available()
ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs CUDA")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]
pytestmark = [pytest.mark.usefixtures("short_speed"), pytest.mark.parametrize("device", DEVICES)]
VOCABULARY = 320


@pytest.fixture(scope="module")
def tokenizer():
    return benchmark.byte_tokenizer(VOCABULARY)


@pytest.fixture
def both(tiny, device):
    """The same model on the CPU and on the device; there with branches stacked, as CUDA has them."""
    there = LayerStack(tiny(5, vocab=VOCABULARY).to(device))
    there.stacking = learned(there)
    assert there.stacking is not None
    return LayerStack(tiny(5, vocab=VOCABULARY)), there


@pytest.fixture
def stacked(monkeypatch, device):
    """On the CPU too, branches go through a layer together where a model's stacking is known."""
    if device == "cpu":
        monkeypatch.setattr(sweep, "tokens_together", lambda stack: 10_000 if stack.stacking else 0)


@pytest.fixture
def tokens():
    return torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(3))


def padded(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(tokens)
    mask[1::2, -5:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def close(found, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    """Two lists of figures, from the CPU and from the device, are the same."""
    here, there = (torch.tensor(pd.Series(each).to_numpy(float)) for each in found)
    assert here.isfinite().all() and len(here)
    torch.testing.assert_close(there, here, rtol=rtol, atol=atol)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("metric", ["block_influence", "angular_distance", "mse", "relative_l2", "lrp", "taylor"])
def test_metrics_of_one_pass(both, tokens, metric, pad):
    blocks = padded(tokens) if pad else tokens
    close([measure(stack, blocks, metric, batch_size=4).table["score"] for stack in both])


def test_magnitude(both):
    close([measure(stack, None, "magnitude").table["score"] for stack in both])


@pytest.mark.parametrize(
    "options", [{}, {"positions": 3}, {"race": True, "batch_size": 2}, {"max_branch_bytes": 40_000}], ids=str
)
@pytest.mark.parametrize("metric", ["nll", "kl"])
def test_sweep_and_race(both, stacked, tokens, metric, options):
    found = []
    for stack in both:
        teacher = stack.share() if metric == "kl" else None
        student = stack.share(without=[2])
        found.append(measure(student, padded(tokens), metric, teacher, **{"batch_size": 4, **options}))
    close([each.table["score"] for each in found])
    assert found[0].ranking == found[1].ranking


@pytest.mark.parametrize("race", [False, True])
def test_task_metric(both, stacked, tokenizer, race):
    suite = load_suite("mini7", limit=2)
    found = [measure(s, None, "task", suite=suite, tokenizer=tokenizer, race=race) for s in both]
    close([each.table["score"] for each in found])


def test_hidden_states(both, tokens, tokenizer):
    found = []
    for stack in both:
        student = stack.share(without=[1])
        tables = [
            drift(student, stack, padded(tokens))["drift"],
            drift(student, stack, tokens, "relative_l2")["drift"],
        ]
        tables += [token_drift(student, stack, tokens[0]).stack()]
        tables += [redundancy(student, padded(tokens), kind).stack() for kind in ("cosine", "angular", "cka")]
        lens = logit_lens(student, "def f(x):", tokenizer, teacher=stack)
        tables += [lens["entropy"], lens["target_probability"].dropna(), lens["probability"].explode()]
        found.append(pd.concat([each.astype(float) for each in tables], ignore_index=True))
    close(found)


OPTIONS = [
    {},
    {"micro_batch": 1},
    {"kl_positions": 8},
    {"divergence": "reverse_kl"},
    {"divergence": "jsd", "temperature": 2.0},
    {"hidden_weight": 1.0, "hidden_loss": "cosine"},
    {"ce_weight": 0.5, "schedule": "linear"},
    {"scope": "suffix", "clip": None},
    {"scope": "all", "local_tokens": 0, "schedule": "constant"},
    {"tokens": 3 * 128},  # passes over the text, with what frozen layers give kept
    "paper",
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_distillation(both, tokens, options, device):
    if options == "paper":
        config = DistillConfig.paper(batch_size=4)
    else:
        config = DistillConfig(**{"batch_size": 4, "learning_rate": 1e-3, **options})
    found = []
    for teacher in both:
        student = teacher.share(without=[3])
        found.append(distill(student, teacher, padded(tokens), config, gap=3).history)
        assert student.device.type == teacher.device.type
        assert not any(p.requires_grad for p in student.model.parameters())
    assert both[1].device.type == device
    for column in ("loss", "grad_norm"):
        close([history[column] for history in found], rtol=1e-2, atol=1e-3)


def test_evaluation_and_suites(both, stacked, tokens, tokenizer):
    suite = load_suite("mini7", limit=2)
    found = []
    for stack in both:
        student = stack.share(without=[1])
        texts = [evaluate(student, stack, blocks, speed=blocks is tokens) for blocks in (tokens, padded(tokens))]
        scored = score_suite(student, tokenizer, suite)
        found.append(
            [*(figure for text in texts for figure in (text.kl, text.perplexity, text.agreement)), scored.aggregate]
        )
    close(found)


def folder_of(tiny, tokenizer, path: Path, layers: int = 5) -> Path:
    """A checkpoint folder with a tiny model and a tokenizer of bytes."""
    tiny(layers, vocab=VOCABULARY, hidden=32).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def session_of(folder: Path, loaded: LoadedModel, **changes) -> PruningSession:
    (folder / "text.txt").write_text(benchmark.some_text(20_000), encoding="utf-8")
    sizes = {"block": 32, "calibration_tokens": 128, "train_tokens": 256, "eval_tokens": 128}
    settings = {"text": str(folder / "text.txt"), **sizes, "distill": {"batch_size": 2}, **changes}
    return PruningSession.create(folder / "run", loaded, **settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_session_from_end_to_end(tiny, tokenizer, tmp_path, device, dtype):
    if (device, dtype) == ("cpu", "float16"):
        pytest.skip("a CPU emulates it: bfloat16 goes the same ways")
    layers = 3 if device == "cuda" else 4
    loaded = load_model(folder_of(tiny, tokenizer, tmp_path / "model"), dtype=dtype, device=device)
    with session_of(tmp_path, loaded) as session:
        session.run(target_layers=layers)
        assert session.student.device.type == device and session.student.model.dtype == getattr(torch, dtype)
        assert len(session.removed) == 5 - layers
        figures = drive(what_if_steps(session, "def f", [session.student.layer_ids[0]], tokens=3), show=False)
        assert figures.kl > 0
        want = session.student.logits(session.student.final(torch.arange(3, 13)[None])).float().cpu()
        session.export(tmp_path / "out")
    got = load_model(tmp_path / "out", dtype=dtype, device=device).model(torch.arange(3, 13)[None].to(device)).logits
    torch.testing.assert_close(got.detach().float().cpu(), want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(tiny, tokens, device, dtype):
    """Figures of a narrow model are near those of the same weights in fp32."""
    narrow = LayerStack(tiny(5, vocab=VOCABULARY).to(dtype).to(device))
    wide = LayerStack(tiny(5, vocab=VOCABULARY).to(dtype).float())
    for metric in ("block_influence", "nll"):
        close([measure(s, tokens, metric).table["score"] for s in (wide, narrow)], rtol=0.1, atol=0.05)
    config = DistillConfig(batch_size=4, local_tokens=0, learning_rate=1e-4)
    found = []
    for teacher in (wide, narrow):
        found.append(distill(teacher.share(without=[2]), teacher, tokens, config, gap=2).history["kl"])
    close(found, rtol=0.1, atol=0.05)


def test_two_streams_of_work_from_the_steppers_thread(tiny, tokenizer, tmp_path, device, tokens):
    """A job on the worker's thread while another thread works on the same device: both get their own figures."""
    loaded = load_model(folder_of(tiny, tokenizer, tmp_path / "model"), dtype="float32", device=device)
    with session_of(tmp_path, loaded) as session:
        apart = LayerStack(tiny(5, vocab=VOCABULARY, seed=1).to(device))
        want = measure(apart, tokens, "nll").table["score"]
        alone = session.measure("nll").table["score"]
        ends, found = [], []

        def other() -> None:
            if device == "cuda":
                with torch.cuda.stream(torch.cuda.Stream()):
                    found.append(measure(apart, tokens, "nll").table["score"])
            else:
                found.append(measure(apart, tokens, "nll").table["score"])

        second, worker = threading.Thread(target=other), Worker()
        assert worker.start(session.measure_steps("nll"), lambda progress: None, ends.append)
        second.start()
        second.join(60)
        assert worker.wait(60) and [end.state for end in ends] == ["done"]
        close([want, found[0]])
        close([alone, ends[0].value.table["score"]])


def test_the_heads_chunk_is_sized_for_the_device(both, device):
    rows = chunk_rows(both[1])
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 2**40
    assert 1 <= rows and rows * VOCABULARY * 4 <= free


def test_a_model_over_devices(tiny, tokenizer, tokens, tmp_path, device):
    """`device_map="auto"` with a capped GPU: layers on it, the rest in main memory, the figures of the CPU."""
    if device == "cpu" or not bare.there("accelerate"):
        pytest.skip("needs CUDA, and accelerate")
    folder = folder_of(tiny, tokenizer, tmp_path / "model", layers=8)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    memory = {0: size * 2 // 3, "cpu": 2**30}
    spread = load_model(folder, dtype="float32", device_map="auto", max_memory=memory).model
    assert {"cpu", "meta"} & {p.device.type for p in spread.parameters()}
    assert "cuda" in {p.device.type for p in spread.parameters()}
    found = []
    for whole in (LayerStack(load_model(folder, dtype="float32", device="cpu").model), LayerStack(spread)):
        student = whole.share(without=[1])
        text = evaluate(student, whole, tokens, speed=False)
        scores = [measure(student, tokens, m, t).table["score"] for m, t in (("block_influence", None), ("kl", whole))]
        found.append([text.kl, text.perplexity, *scores[0], *scores[1]])
    close(found)


def test_the_benchmark_has_every_row(tmp_path, device):
    """On a CPU by the command itself, on a machine that has nothing but what is promised."""
    blocked = [
        "lazy_loader",
        "pydantic",
        "accelerate",
        "psutil",
        "gguf",
        "matplotlib",
        "seaborn",
        "ipywidgets",
        "IPython",
    ]
    blocked += ["anywidget", "jinja2", "datasets", "pyarrow", "lm_eval", "papermill", "traitlets", "liger_kernel"]
    code = f"""
import runpy, sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {set(blocked)} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
sys.argv = ["gpu.py", "--device", {device!r}, "--tiny", "--out", {str(tmp_path)!r}]
runpy.run_path({str(ROOT / "benchmarks" / "gpu.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    found = json.loads((tmp_path / "gpu.json").read_text()) if (tmp_path / "gpu.json").exists() else None
    assert found is not None and (done.returncode == 0 or device == "cuda"), done.stderr[-3000:]
    names = [row["name"] for row in found["rows"]]
    assert names == list(benchmark.NAMES)
    table = (tmp_path / "gpu.md").read_text()
    for row in found["rows"]:
        assert row["name"] in table
        if isinstance(row["value"], str):
            assert row["value"] in (benchmark.ELSEWHERE, "out of memory") and row["ok"] is None
        else:
            assert 0 <= row["value"] < float("inf")
    assert "largest difference of a score: 0 " in table or device == "cuda"  # stacked and single: bit for bit
