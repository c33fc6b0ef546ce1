"""What importance costs, side by side on the same tokens (SmolLM2-135M).

`bench()` is called by `benchmarks/run.py`. optipfair, the nearest other tool, is installed for this alone
(into the cache, without its dependencies).
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from ildlab.files import cache_dir
from ildlab.importance.dispatch import measure
from ildlab.importance.samples import Positions
from ildlab.model.head import branch_nll
from ildlab.model.load import load_model
from ildlab.model.stack import LayerStack
from ildlab.text.blocks import load_text
from ildlab.text.rows import Rows

OPTIPFAIR = "optipfair==0.4.2"


def timed(work: Callable) -> float:
    """Seconds of one call; the GPU's queue is waited for."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def in_turns(*works: Callable, repeats: int) -> np.ndarray:
    """Seconds [repeats, works], run in turns so that a busy machine hurts all alike."""
    if repeats > 3:  # long work needs no warming up
        for work in works:
            work()
    return np.array([[timed(work) for work in works] for _ in range(repeats)])


def over(seconds: np.ndarray, a: int, b: int) -> float:
    """Median over the turns of the cost of work a over that of work b."""
    return float(np.median(seconds[:, a] / seconds[:, b]))


def optipfair():
    """The rival's module for depth pruning, or None where it cannot be had."""
    folder = cache_dir("bench")
    if not (folder / "optipfair").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), OPTIPFAIR]
        if subprocess.run(command, capture_output=True).returncode:
            return None
    sys.path.append(str(folder))
    try:
        from optipfair.pruning import depth

        logging.getLogger("optipfair").setLevel(logging.ERROR)
    except ImportError:
        return None
    finally:
        sys.path.remove(str(folder))
    return depth


@torch.no_grad()
def separate(stack: LayerStack, rows: Rows, positions: int | None) -> None:
    """The plain way: the whole student, then L runs with one layer skipped; the same scored positions."""
    places = Positions.sample(rows, positions, 0, predict=True)
    places = places.batch(range(len(rows.tokens)), stack.device)
    batch = rows.tokens.long()

    def score():
        places.mean(branch_nll(stack, [places.take(stack.final(batch))], places.targets)[0]).cpu()

    score()
    for layer_id in stack.layer_ids:
        with stack.without(layer_id):
            score()


def row(name: str, ratio: float, limit: str | None, note: str) -> dict:
    """One row of the table."""
    return {"name": name, "ratio": ratio, "limit": limit, "note": note}


def bench() -> Iterator[dict]:
    """Yield the rows of `benchmarks/run.py` as they are measured."""
    loaded = load_model("smollm2-135m", dtype="float32", device="cpu" if not torch.cuda.is_available() else "cuda")
    stack = LayerStack(loaded.model)
    text = load_text("python-docs", loaded.tokenizer, block=128, tokens=48 * 128, split="calibration")

    # -------------------------------------------------------- Block Influence
    some = text.tokens[:4]
    decoder = loaded.model.get_decoder()
    ids = some.long().to(stack.device)

    def bare():
        with torch.no_grad():
            decoder(input_ids=ids, use_cache=False)

    scores = []
    works = [bare, lambda: scores.append(measure(stack, some, batch_size=4))]
    rival = optipfair()
    if rival is not None:
        theirs = []
        loader = [{"input_ids": ids}]
        works.append(
            lambda: theirs.append(rival.analyze_layer_importance(decoder, loader, "layers", show_progress=False))
        )
    seconds = in_turns(*works, repeats=15)
    note = f"{np.median(seconds[:, 1]):.2f} s for 512 tokens; median of 15 turns"
    yield row("block influence / bare decoder pass", over(seconds, 1, 0), "<= 1.1", note)
    if rival is not None:
        order = [i for i in scores[-1].ranking if i != stack.layer_ids[-1]]
        other = [i for i in sorted(theirs[-1], key=theirs[-1].get) if i != stack.layer_ids[-1]]
        same = "the same ranking but for the last layer" if order == other else f"ANOTHER ranking: {other}"
        note = f"on the bare decoder, that is without its head; {same}; both are the pass and 1 %"
        yield row(f"block influence / {OPTIPFAIR}", over(seconds, 1, 2), "<= 1.05", note)

    # ------------------------------------------------------------- the sweep
    few = Rows.of(text.tokens[:2])
    seconds = in_turns(
        lambda: measure(stack, few.tokens, "nll", batch_size=2), lambda: separate(stack, few, None), repeats=3
    )
    swept, apart = np.median(seconds, 0)
    note = f"all positions; {swept:.1f} s for 256 tokens; median of 3 turns; 1.64 by operations"
    yield row("L separate runs / sweep", over(seconds, 1, 0), ">= 1.4", note)
    seconds = in_turns(
        lambda: measure(stack, few.tokens, "nll", batch_size=2, positions=8),
        lambda: separate(stack, few, 8),
        repeats=3,
    )
    yield row(
        "sweep / L separate runs",
        over(seconds, 0, 1),
        "<= 0.55",
        "8 of 128 positions scored by both; 0.543 by operations",
    )

    result = []
    long = load_text("python-docs", loaded.tokenizer, block=256, tokens=48 * 256, split="calibration")
    raced = timed(lambda: result.append(measure(stack, long, "nll", race=True, batch_size=2)))
    all_apart = apart * long.tokens.numel() / few.tokens.numel()
    details = result[0].details
    full_passes = len(stack) * (len(stack) - 1) * len(long) / 2
    yield row(
        "race / L separate runs",
        raced / all_apart,
        "<= 0.125",
        f"{raced:.0f} s against {all_apart:.0f} (256 tokens, scaled to 48 x 256); {details['layer_passes']} against "
        f"{full_passes:.0f} layer passes of a batch of 2; {details['stopped']}",
    )
    if rival is not None:
        tries = [3, 15, 27]

        def pruned_copies():
            for layer_id in tries:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    pruned = rival.prune_model_depth(copy.deepcopy(loaded.model), layer_indices=[layer_id])
                with torch.no_grad():
                    logits = pruned(input_ids=few.tokens.long(), use_cache=False).logits[:, :-1]
                    torch.nn.functional.cross_entropy(logits.flatten(0, 1), few.tokens[:, 1:].long().flatten())

        copies = timed(pruned_copies) * len(stack) / len(tries)
        yield row(
            f"{OPTIPFAIR} / sweep", copies / swept, ">= 1.4", f"L pruned copies evaluated ({len(tries)}, scaled to L)"
        )

    # ------------------------------------------------------------ how it grows
    half = stack.share()
    for layer_id in range(1, 30, 2):
        half.remove(layer_id)
    seconds = in_turns(
        lambda: measure(stack, few.tokens, "nll", batch_size=2),
        lambda: measure(stack, text.tokens[:4], "nll", batch_size=2),
        lambda: measure(half, few.tokens, "nll", batch_size=2),
        repeats=2,
    )
    yield row("sweep of 2x the tokens / 2 sweeps", over(seconds, 1, 0) / 2, "<= 1.15", "linear in tokens")
    # Operations: L(L+1)/2 layer passes, and L+1 heads, each worth the layers that cost as much.
    layer = sum(p.numel() for p in stack.layers[0].parameters())
    head = loaded.model.get_output_embeddings().weight.numel() / layer

    def operations(depth: int) -> float:
        return depth * (depth + 1) / 2 + (depth + 1) * head

    expected = operations(30) / operations(15)
    measured = over(seconds, 0, 2)
    note = f"{measured:.2f} times, {expected:.2f} by L(L+1)/2 layer passes and L+1 heads"
    yield row("sweep of 30 layers / of 15, over its count", measured / expected, "<= 1.15", note)


if __name__ == "__main__":
    for measured in bench():
        print(measured)
