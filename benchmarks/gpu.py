"""What the library costs on one GPU, at the method's own size: `python benchmarks/gpu.py --out results`.

No hub is needed: the model is Qwen2.5-3B, built from its config on the device with seeded random weights in bf16, and
text is seeded random ids (`--model` takes a folder, or anything that `load_model` takes). Each row stands beside its limit or its
rival on the same device; `gpu.json` and `gpu.md` are written. `--device cpu --tiny` runs the same code on six tiny
layers in seconds: its figures say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import bare  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

bare.fill_in()

from ildlab.distill.config import DistillConfig  # noqa: E402
from ildlab.distill.masters import peak_memory, reset_peak_memory  # noqa: E402
from ildlab.distill.train import distill_steps  # noqa: E402
from ildlab.importance import sweep  # noqa: E402
from ildlab.importance.dispatch import measure  # noqa: E402
from ildlab.importance.samples import Positions  # noqa: E402
from ildlab.model.head import HELD, LEAST_CHUNK, MOST_CHUNK, branch_nll, chunk_rows  # noqa: E402
from ildlab.model.load import LoadedModel, load_model  # noqa: E402
from ildlab.model.stack import LayerStack  # noqa: E402
from ildlab.model.stacked import learned  # noqa: E402
from ildlab.text.rows import Rows  # noqa: E402

ELSEWHERE = "not on this device"
# Dense bf16 FLOP/s of a card, by a part of its name, as its maker states them.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
QWEN_3B = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}

NAMES = (
    "block influence / bare decoder pass",
    "exact sweep, all positions / L separate runs",
    "exact sweep, 1/8 of the positions / L separate runs",
    "sweep, branches stacked / one by one",
    "race / whole sweep",
    "distillation step, tokens/s",
    "distillation step, model FLOP utilisation",
    "distillation step, peak GiB",
    "plain step / ours, seconds",
    "peak memory, ours / plain step",
    "liger-kernel's fused loss / ours, seconds",
    "peak memory, ours / liger-kernel's fused loss",
    "session's part of a measurement, seconds",
    "host syncs a batch, block influence",
    "host syncs a batch, sweep",
    "host syncs a batch, distillation",
    "out-of-memory back-off, largest difference of a score",
    "head's chunk, part of the free memory",
    "compiled layer / plain layer",
)


def built(tiny: bool, device: torch.device) -> torch.nn.Module:
    """A Qwen2 of random weights, made on the device: bf16, or fp32 where it is tiny."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(**(TINY if tiny else QWEN_3B), tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if tiny else torch.bfloat16)
    return model.to(device).eval().requires_grad_(False)


def row(name: str, value: float | str, limit: str | None = None, note: str = "") -> dict:
    """One row: its value, what it must keep to, and whether it does (None: it has no limit, or was not measured)."""
    ok = None
    if limit is not None and not isinstance(value, str):
        sign, _, bound = limit.partition(" ")
        ok = bool(value <= float(bound) if sign == "<=" else value >= float(bound))
    return {"name": name, "value": value, "limit": limit, "ok": ok, "note": note}


class Bench:
    """One device, one model, and the rows measured on it."""

    def __init__(self, device: str, tiny: bool, model: str | None = None):
        self.device, self.tiny, self.cuda = torch.device(device), tiny, device.startswith("cuda")
        loaded = load_model(model, device=device) if model else LoadedModel(built(tiny, self.device), None, "built")
        self.loaded, self.stack = loaded, LayerStack(loaded.model)
        vocabulary = self.stack.model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(1)
        self.rows, self.length = (4, 32) if tiny else (8, 1024)
        self.tokens = torch.randint(3, vocabulary, (4 * self.rows, self.length), generator=generator)
        self.few = self.tokens[:2] if tiny else self.tokens[:2, :512]

    def timed(self, work: Callable, repeats: int = 3) -> float:
        """Least seconds of some calls, after one that does not count; the device's queue is waited for."""
        found = []
        for turn in range(2 if self.tiny else repeats + 1):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - start)
        return min(found[1:])

    def wait(self) -> None:
        """Wait until the device has done all it was given."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def all_rows(self) -> Iterator[dict]:
        """Every row, one after another."""
        for part in (self.influence, self.sweeps, self.race, self.distillation, self.session, self.syncs):
            yield from part()
        yield from self.out_of_memory()
        yield from self.chunk()
        yield from self.compiled()

    # ------------------------------------------------------------ importance

    def influence(self) -> Iterator[dict]:
        """Block Influence beside the bare decoder."""
        some = self.tokens[: self.rows]
        decoder, ids = self.stack.model.get_decoder(), some.to(self.device)

        def plain():
            with torch.inference_mode():
                decoder(input_ids=ids, use_cache=False)

        bare_pass = self.timed(plain)
        ours = self.timed(lambda: measure(self.stack, some, batch_size=self.rows))
        note = f"{ours:.3f} s and {bare_pass:.3f} s for {some.numel()} tokens"
        yield row("block influence / bare decoder pass", ours / bare_pass, "<= 1.05", note)

    @torch.no_grad()
    def separate(self, positions: int | None) -> None:
        """The plain way of a sweep: the whole model, and then a run without each layer."""
        rows = Rows.of(self.few)
        places = Positions.sample(rows, positions, 0, predict=True).batch(range(len(self.few)), self.device)

        def score():
            places.mean(branch_nll(self.stack, [places.take(self.stack.final(self.few))], places.targets)[0]).cpu()

        score()
        for layer_id in self.stack.layer_ids:
            with self.stack.without(layer_id):
                score()

    def sweeps(self) -> Iterator[dict]:
        """The exact sweep: all positions and an eighth of them; branches stacked and one by one."""
        eighth = self.few.shape[1] // 8
        for words, positions, limit in (
            ("all positions", None, "<= 0.72"),
            ("1/8 of the positions", eighth, "<= 0.6"),
        ):
            ours = self.timed(lambda p=positions: self.swept(p), repeats=1)
            apart = self.timed(lambda p=positions: self.separate(p), repeats=1)
            note = f"{ours:.3f} s and {apart:.3f} s, {self.few.numel()} tokens"
            yield row(f"exact sweep, {words} / L separate runs", ours / apart, limit, note)
        chosen, how = sweep.tokens_together, self.stack.stacking
        if how is None:  # on a CPU it is neither proven at load nor done
            self.stack.stacking = learned(self.stack)
        try:
            seconds, tables = [], []
            for together in (2**16, 0):
                sweep.tokens_together = lambda stack, tokens=together: tokens
                seconds.append(self.timed(lambda: tables.append(self.swept(eighth).table["score"]), repeats=1))
        finally:
            sweep.tokens_together, self.stack.stacking = chosen, how
        note = f"largest difference of a score: {abs(tables[0] - tables[-1]).max():.2g} nats"
        yield row(
            "sweep, branches stacked / one by one", seconds[0] / seconds[1], "<= 1.0" if self.cuda else None, note
        )

    def swept(self, positions: int | None, **options):
        """Scores by the exact sweep."""
        return measure(self.stack, self.few, "nll", batch_size=len(self.few), positions=positions, **options)

    def race(self) -> Iterator[dict]:
        """The race beside the whole sweep of the same text."""
        text = self.tokens[: 2 * self.rows] if self.tiny else self.tokens[: self.rows]
        options = {"batch_size": 2, "positions": max(2, self.length // 8)}
        found = []
        raced = self.timed(lambda: found.append(measure(self.stack, text, "nll", race=True, **options)), repeats=1)
        whole = self.timed(lambda: measure(self.stack, text, "nll", **options), repeats=1)
        details = found[-1].details
        note = f"{details['layer_passes']} layer passes; {details['stopped']}; random weights tell layers apart badly"
        yield row("race / whole sweep", raced / whole, None, note)

    # ---------------------------------------------------------- distillation

    def distillation(self) -> Iterator[dict]:
        """A step of window(2) at five sixths of the depth, beside the plain form, and liger-kernel's losses."""
        depth = len(self.stack)
        gaps = list(range(depth // 2 - depth // 12, depth // 2 - depth // 12 + depth // 6))
        student = self.stack.share(without=gaps)
        text = self.tokens[: self.rows]
        steps = 2 if self.tiny else 4
        config = DistillConfig(
            scope="window(2)", batch_size=self.rows, local_tokens=0, tokens=steps * text.numel(), hidden_weight=1.0
        )
        reset_peak_memory(self.device)
        times, start, last = [], time.perf_counter(), None
        for progress in distill_steps(student, self.stack, text, config, gap=gaps):
            self.wait()
            times.append(time.perf_counter() - start)
            start, last = time.perf_counter(), progress.partial
        seconds, memory = min(times[1:]), peak_memory(self.device)
        trained = [i for i in student.layer_ids if any(p is not q for p, q in self._pairs(student, i))]
        flops = self._flops(student, trained) * text.numel()
        peak = next((f for name, f in PEAKS.items() if self.cuda and name in torch.cuda.get_device_name()), None)
        note = f"{seconds:.3f} s a step of {self.rows} x {self.length}, layers {trained} of {len(student)}, KL {last['kl']:.3f}"
        yield row("distillation step, tokens/s", text.numel() / seconds, None, note)
        used = flops / seconds / peak if peak else ELSEWHERE
        yield row("distillation step, model FLOP utilisation", used, None, f"{flops:.3g} FLOP a step")
        yield row("distillation step, peak GiB", memory / 2**30, None, "weights and optimizer included")
        for name, work in (("plain step", self._plain), ("liger-kernel's fused loss", self._liger)):
            yield from self._rival(name, work, student, trained, text, seconds, memory)

    def _pairs(self, student: LayerStack, layer_id: int):
        mine, theirs = (stack.layers[stack.position(layer_id)] for stack in (student, self.stack))
        return zip(mine.parameters(), theirs.parameters(), strict=True)

    def _flops(self, student: LayerStack, trained: list[int]) -> float:
        """Operations for a token: what must be computed, products alone (2 a weight; attention as it is, causal)."""
        layer = (
            sum(p.numel() for p in self.stack.layers[0].parameters() if p.dim() > 1)
            + self.length * self.stack.hidden_size
        )
        head = self.stack.model.get_output_embeddings().weight.numel()
        first = student.position(trained[0])
        above = len(student) - first
        passes = len(self.stack) + above  # forward: the teacher, and the student above what both share
        passes += above + len(trained)  # backward: to the lowest trained layer, and to the trained weights
        return 2.0 * (layer * passes + head * 3)

    def _rival(self, name, work, student, trained, text, seconds, memory) -> Iterator[dict]:
        names, limits = (f"{name} / ours, seconds", f"peak memory, ours / {name}"), (">= 1.0", "<= 1.0")
        if work == self._liger and not (self.cuda and bare.there("liger_kernel")):
            why = "liger-kernel is not installed, so not compared" if self.cuda else ""
            yield from (row(each, ELSEWHERE, None, why) for each in names)
            return
        reset_peak_memory(self.device)
        try:
            theirs = self.timed(lambda: work(student, trained, text), repeats=1 if self.tiny else 2)
        except torch.cuda.OutOfMemoryError:  # a rival that does not fit is told as that
            yield from (row(each, "out of memory", None, f"ours {seconds:.3f} s") for each in names)
            return
        finally:
            student.model.requires_grad_(False)
            for param in student.model.parameters():
                param.grad = None
        note = f"{theirs:.3f} s and {seconds:.3f} s; the rival's is without an optimizer"
        yield row(names[0], theirs / seconds, limits[0] if self.cuda else None, note)
        ratio = memory / peak_memory(self.device) if self.cuda else ELSEWHERE
        yield row(names[1], ratio, limits[1], f"{memory / 2**30:.1f} GiB ours, with the optimizer")

    def _both(self, student: LayerStack, trained: list[int], text):
        """Decoder outputs of both, as a plain loop has them: all hidden states kept."""
        for layer_id in trained:
            student.layers[student.position(layer_id)].requires_grad_(True)
        ids = text.to(self.device)
        with torch.no_grad():
            want = self.stack.model.get_decoder()(input_ids=ids, output_hidden_states=True, use_cache=False)
        return student.model.get_decoder()(input_ids=ids, output_hidden_states=True, use_cache=False), want

    def _plain(self, student: LayerStack, trained: list[int], text) -> None:
        got, want = self._both(student, trained, text)
        head = self.stack.model.get_output_embeddings()
        with torch.no_grad():
            target = head(want.last_hidden_state).float().log_softmax(-1)
        logits = head(got.last_hidden_state).float().log_softmax(-1)
        loss = F.kl_div(logits, target, reduction="sum", log_target=True) / text.numel()
        loss = loss + F.mse_loss(got.hidden_states[-2].float(), want.hidden_states[-2].float())
        loss.backward()

    def _liger(self, student: LayerStack, trained: list[int], text) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        got, want = self._both(student, trained, text)
        head = self.stack.model.get_output_embeddings().weight
        labels = text.to(self.device).flatten()
        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)(
            got.last_hidden_state.flatten(0, 1), head, want.last_hidden_state.flatten(0, 1), head, labels
        )
        loss.backward()

    # ---------------------------------------------------------------- session

    def session(self) -> Iterator[dict]:
        """What a session adds to a measurement, a removal and a distillation: journal, checks, files."""
        from ildlab.session.session import PruningSession

        vocabulary = self.stack.model.get_input_embeddings().weight.shape[0]
        loaded = LoadedModel(self.loaded.model, self.loaded.tokenizer or byte_tokenizer(vocabulary), "built")
        block = 32 if self.tiny else 512
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "text.txt").write_text(some_text(20_000 if self.tiny else 400_000), encoding="utf-8")
            settings = {"block": block, "calibration_tokens": 8 * block, "train_tokens": 16 * block}
            with PruningSession.create(
                Path(folder, "run"), loaded, text=str(Path(folder, "text.txt")), eval_tokens=4 * block, **settings
            ) as session:
                blocks, teacher = session.text("calibration"), session.teacher
                plain = self.timed(lambda: measure(session.student, blocks), repeats=1)
                ours = self.timed(lambda: session.measure("block_influence"), repeats=1)
                session.remove(session.student.layer_ids[len(teacher) // 2])
                session.distill(tokens=8 * block, local_tokens=0)
                session.evaluate()
                kinds = [step.action for step in session.steps]
        note = f"journaled {', '.join(kinds)}; a measurement in a session took {ours:.3f} s"
        yield row("session's part of a measurement, seconds", max(0.0, ours - plain), "<= 2.0", note)

    # ------------------------------------------------------------ host syncs

    def syncs(self) -> Iterator[dict]:
        """Times that the host waits for the device for one more batch, or step."""
        size, short = self.rows, self.few.shape[1]

        def distilled(batches: int) -> None:
            student = self.stack.share(without=[len(self.stack) // 2])
            config = DistillConfig(batch_size=size, local_tokens=0, tokens=batches * size * self.length)
            list(distill_steps(student, self.stack, self.tokens, config, gap=len(self.stack) // 2))

        works = {
            "block influence": lambda n: measure(self.stack, self.tokens[: n * size], batch_size=size),
            "sweep": lambda n: measure(self.stack, self.tokens[:n, :short], "nll", batch_size=1, positions=8),
            "distillation": distilled,
        }
        for name, work in works.items():
            # What a call waits for at its start (fingerprints of the weights) is in both, and so in neither.
            counts = [count_syncs(lambda n=n, work=work: work(n)) for n in (2, 4)] if self.cuda else []
            if not self.cuda:
                work(2)
            value = (counts[1] - counts[0]) / 2 if self.cuda else ELSEWHERE
            yield row(f"host syncs a batch, {name}", value, "<= 1", f"counted by CUDA, of 2 and 4 batches: {counts}")

    # ---------------------------------------------------------------- memory

    def out_of_memory(self) -> Iterator[dict]:
        """Scores of a batch that does not fit are those of smaller ones."""
        name = "out-of-memory back-off, largest difference of a score"
        if not self.cuda:
            yield row(name, ELSEWHERE, "<= 1e-3", "the memory of a CPU cannot be capped")
            return
        some = self.tokens
        whole = measure(self.stack, some, batch_size=2)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(self.device).total_memory
        room = torch.cuda.memory_allocated(self.device) + (2**30 if not self.tiny else 2**24)
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), self.device)
        try:
            capped = measure(self.stack, some, batch_size=len(some))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        notes = capped.details["notes"]
        value = float(abs(capped.table["score"] - whole.table["score"]).max()) if notes else "it was not provoked"
        yield row(name, value, "<= 1e-3", "; ".join(notes))

    def chunk(self) -> Iterator[dict]:
        """The head's chunk beside the free memory that it is sized for."""
        vocabulary = self.stack.model.get_input_embeddings().weight.shape[0]
        rows = chunk_rows(self.stack)
        if not self.cuda:
            yield row("head's chunk, part of the free memory", ELSEWHERE, f"<= {1 / HELD}", f"{rows} positions here")
            return
        free, _ = torch.cuda.mem_get_info(self.device)
        note = f"{rows} positions; between {LEAST_CHUNK // 2**20} and {MOST_CHUNK // 2**20} MiB"
        yield row("head's chunk, part of the free memory", rows * vocabulary * 4 / free, f"<= {1 / HELD}", note)

    def compiled(self) -> Iterator[dict]:
        """One layer through `torch.compile`, beside the layer as it is."""
        if not self.cuda:
            yield row("compiled layer / plain layer", ELSEWHERE)
            return
        trunk = self.stack.trunk(self.tokens[: self.rows])
        args, kwargs = trunk.calls[0]
        layer = self.stack.layers[0]
        fast = torch.compile(layer)
        with torch.no_grad():
            ratio = self.timed(lambda: fast(trunk.h0, *args, **kwargs), 10) / self.timed(
                lambda: layer(trunk.h0, *args, **kwargs), 10
            )
        yield row("compiled layer / plain layer", ratio, None, "an option for a person: the library compiles nothing")


def count_syncs(work: Callable) -> int:
    """How often CUDA's own watch says that the host waited, while `work` runs."""
    work()  # so that first calls, which set things up, do not count
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in found)


def some_text(characters: int) -> str:
    """Paragraphs of Python's own documentation, which any Python has."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return (text * (1 + characters // len(text)))[:characters]


def byte_tokenizer(vocabulary: int):
    """A tokenizer of bytes, for a model that has none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    if len(ids) > vocabulary:
        raise ValueError(f"The model has {vocabulary} embeddings, fewer than there are bytes.")
    core = Tokenizer(models.BPE(vocab=ids, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def table(found: dict) -> str:
    """The rows as a Markdown table."""
    lines = [f"{found['device']}; {found['versions']}; {found['seconds']:.0f} s", ""]
    lines += ["| what | value | limit | kept | note |", "| --- | --- | --- | --- | --- |"]
    for each in found["rows"]:
        value = each["value"] if isinstance(each["value"], str) else f"{each['value']:.4g}"
        kept = {True: "yes", False: "NO", None: ""}[each["ok"]]
        lines.append(f"| {each['name']} | {value} | {each['limit'] or ''} | {kept} | {each['note']} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write; the exit status counts the limits missed on a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model to load instead of building one: a folder, a .gguf file, a hub id")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="six tiny layers")
    given = parser.parse_args(arguments)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here: --device cpu --tiny tries the code itself.")
    start = time.perf_counter()
    bench = Bench(given.device, given.tiny, given.model)
    rows = []
    for each in bench.all_rows():
        rows.append(each)
        print(
            f"{each['value'] if isinstance(each['value'], str) else format(each['value'], '.4g'):>20}  {each['name']}",
            flush=True,
        )
    name, driver = f"{platform.processor() or platform.machine()} (CPU)", ""
    if bench.cuda:
        name, driver = torch.cuda.get_device_name(bench.device), f", CUDA {torch.version.cuda}"
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}{driver}"
    found = {
        "device": name,
        "versions": versions,
        "tiny": given.tiny,
        "seconds": time.perf_counter() - start,
        "rows": rows,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "gpu.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (given.out / "gpu.md").write_text(table(found), encoding="utf-8")
    return sum(each["ok"] is False for each in rows) if bench.cuda else 0


if __name__ == "__main__":
    sys.exit(main())
