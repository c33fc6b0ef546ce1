"""What importance costs, side by side on the same tokens (SmolLM2-135M).

`bench()` is called by `benchmarks/run.py`. optipfair, the nearest other tool, is installed for this alone
(into the cache, without its dependencies).
"""

from __future__ import annotations

import contextlib
import copy
import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

from ildlab.ablation import token_scores
from ildlab.cache import cache_dir
from ildlab.models import load_model
from ildlab.samples import Positions, Rows
from ildlab.scores import measure
from ildlab.stack import LayerStack
from ildlab.text import load_text

OPTIPFAIR = "optipfair==0.4.2"


def timed(work: Callable) -> float:
    """Seconds of one call; the GPU's queue is waited for."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def least(*works: Callable, repeats: int = 5) -> list[float]:
    """Least seconds of each piece of work, run in turns so that a busy machine hurts all alike."""
    if repeats > 1:  # long work needs no warming up
        for work in works:
            work()
    times = [[timed(work) for work in works] for _ in range(repeats)]
    return [min(column) for column in zip(*times, strict=True)]


def optipfair():
    """The rival's module for depth pruning, or None where it cannot be had."""
    folder = cache_dir("bench")
    if not (folder / "optipfair").is_dir():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(folder),
            OPTIPFAIR,
        ]
        if subprocess.run(command, capture_output=True).returncode:
            return None
    sys.path.append(str(folder))
    try:
        from optipfair.pruning import depth
    except ImportError:
        return None
    finally:
        sys.path.remove(str(folder))
    return depth


@torch.no_grad()
def separate(stack: LayerStack, rows: Rows, positions: int | None) -> None:
    """The plain way: the whole student, then L runs with one layer skipped; the same scored positions."""
    places = Positions.sample(rows, positions, 0, predict=True)
    places = places.of(range(len(rows.tokens)), stack.device)
    batch = rows.tokens.long()

    def score():
        places.mean(token_scores(stack, [places.take(stack.final(batch))], targets=places.targets)[0]).cpu()

    score()
    for layer_id in stack.layer_ids:
        with stack.without(layer_id):
            score()


def row(name: str, ratio: float, limit: str | None, note: str) -> dict:
    """One row of the table."""
    return {"name": name, "ratio": ratio, "limit": limit, "note": note}


def bench() -> Iterator[dict]:
    """Yield the rows of `benchmarks/run.py` as they are measured."""
    loaded = load_model(
        "smollm2-135m", dtype="float32", device="cpu" if not torch.cuda.is_available() else "cuda"
    )
    stack = LayerStack(loaded.model)
    text = load_text("python-docs", loaded.tokenizer, block=128, tokens=48 * 128, split="calibration")

    # -------------------------------------------------------- Block Influence
    some = text.tokens[:16]
    decoder = loaded.model.get_decoder()
    ids = some.long().to(stack.device)

    def bare():
        with torch.no_grad():
            for part in ids.split(8):
                decoder(input_ids=part, use_cache=False)

    scores = []
    works = [bare, lambda: scores.append(measure(stack, some, batch_size=8))]
    rival = optipfair()
    if rival is not None:
        theirs = []
        loader = [{"input_ids": part} for part in ids.split(8)]
        works.append(
            lambda: theirs.append(
                rival.analyze_layer_importance(decoder, loader, "layers", show_progress=False)
            )
        )
    seconds = least(*works)
    yield row(
        "block influence / bare decoder pass",
        seconds[1] / seconds[0],
        "<= 1.15",
        f"{seconds[1]:.2f} s, 2048 tokens",
    )
    if rival is not None:
        order = [i for i in scores[-1].ranking if i != stack.layer_ids[-1]]
        other = [i for i in sorted(theirs[-1], key=theirs[-1].get) if i != stack.layer_ids[-1]]
        same = "the same ranking but for the last layer" if order == other else f"ANOTHER ranking: {other}"
        yield row(
            f"block influence / {OPTIPFAIR}",
            seconds[1] / seconds[2],
            "<= 1.0",
            f"on the bare decoder; {same}",
        )

    # ------------------------------------------------------------- the sweep
    few = Rows.of(text.tokens[:2])
    swept, apart = least(
        lambda: measure(stack, few.tokens, "nll", batch_size=2), lambda: separate(stack, few, None), repeats=1
    )
    yield row(
        "L separate runs / sweep",
        apart / swept,
        ">= 1.4",
        f"all positions; {swept:.1f} s, 256 tokens; limit 1.64",
    )
    eighth = 16
    sampled, apart_sampled = least(
        lambda: measure(stack, few.tokens, "nll", batch_size=2, positions=eighth),
        lambda: separate(stack, few, eighth),
        repeats=1,
    )
    yield row(
        "sweep / L separate runs",
        sampled / apart_sampled,
        "<= 0.55",
        f"{eighth} of 128 positions scored by both",
    )

    result = []
    raced = timed(lambda: result.append(measure(stack, text, "nll", race=True, batch_size=2)))
    all_apart = apart * len(text) / len(few.tokens)
    details = result[0].details
    full_passes = len(stack) * (len(stack) - 1) * len(text) / 2
    yield row(
        "race / L separate runs",
        raced / all_apart,
        "<= 0.125",
        f"{raced:.0f} s against {all_apart:.0f} (2 sequences, scaled to 48); {details['layer_passes']} against "
        f"{full_passes:.0f} layer passes of a batch of 2; {details['stopped']}",
    )
    if rival is not None:
        tries = [3, 15, 27]

        def pruned_copies():
            for layer_id in tries:
                with contextlib.redirect_stdout(io.StringIO()):
                    pruned = rival.prune_model_depth(copy.deepcopy(loaded.model), layer_indices=[layer_id])
                with torch.no_grad():
                    logits = pruned(input_ids=few.tokens.long(), use_cache=False).logits[:, :-1]
                    torch.nn.functional.cross_entropy(
                        logits.flatten(0, 1), few.tokens[:, 1:].long().flatten()
                    )

        copies = timed(pruned_copies) * len(stack) / len(tries)
        yield row(
            f"{OPTIPFAIR} / sweep",
            copies / swept,
            ">= 1.4",
            f"L pruned copies evaluated ({len(tries)}, scaled to L)",
        )

    # ------------------------------------------------------------ how it grows
    double = timed(lambda: measure(stack, text.tokens[:4], "nll", batch_size=2))
    yield row("sweep of 2x the tokens / 2 sweeps", double / swept / 2, "<= 1.15", "linear in tokens")
    half = stack.share()
    for layer_id in range(1, 30, 2):
        half.remove(layer_id)
    shallow = timed(lambda: measure(half, few.tokens, "nll", batch_size=2))
    # Operations: L(L+1)/2 layer passes, and L+1 heads, each worth the layers that cost as much.
    layer = sum(p.numel() for p in stack.layers[0].parameters())
    head = loaded.model.get_output_embeddings().weight.numel() / layer

    def operations(depth: int) -> float:
        return depth * (depth + 1) / 2 + (depth + 1) * head

    expected = operations(30) / operations(15)
    yield row("sweep of 30 layers / of 15, over its count", swept / shallow / expected, "<= 1.15",
        f"{swept / shallow:.2f} times, {expected:.2f} by L(L+1)/2 layer passes and L+1 heads")  # fmt: skip


if __name__ == "__main__":
    for measured in bench():
        print(measured)
