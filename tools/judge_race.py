"""Judge the race: does it pick the layer that the full sweep picks, and at what cost?

    python tools/judge_race.py --depths 30 28 26 --seeds 20

At each depth every layer's damage is measured at every position of some sequences (minutes a depth; kept in
the cache). Each seed then draws its own text from these sequences, with replacement, and its own positions,
and the race's own rule is replayed on it; the full sweep is the mean over all tokens of the seed's text.
Layers are removed by the full sweep, without distillation.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from ildlab.files import cache_dir
from ildlab.importance.race import Race
from ildlab.importance.samples import Positions
from ildlab.importance.sweep import branches
from ildlab.model.head import branch_nll
from ildlab.model.load import load_model
from ildlab.model.stack import LayerStack
from ildlab.text.blocks import load_text
from ildlab.text.rows import Rows

HEAD = 8  # decoder layers' worth of operations, on SmolLM2
BATCH, FIRST = 2, 2


@torch.no_grad()
def damages(stack: LayerStack, tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rise of the NLL without each layer at every position [N, L, T-1], and Block Influence [N, L]."""
    found, prior = [], []
    for part in range(0, len(tokens), 4):
        rows = Rows.of(tokens[part : part + 4])
        every = np.arange(len(rows.tokens))
        places = Positions.sample(rows, None, 0, predict=True).batch(every, stack.device)
        states = list(stack.walk(rows.batch(every)))
        prior.append(
            np.stack(
                [1 - torch.cosine_similarity(a, b, dim=-1).mean(1).cpu().numpy() for a, b in zip(states, states[1:])],
                1,
            )
        )
        whole = places.take(states[-1])
        del states
        work = branches(stack, [stack.trunk(rows.batch(every))])
        hidden = [places.take(h[0]) for _, wave in work for h in wave]
        scores = branch_nll(stack, [*hidden, whole], places.targets)
        rise = (scores[:-1] - scores[-1]).view(len(hidden), len(every), -1)
        found.append(rise.permute(1, 0, 2).cpu().numpy())
        print(f"  {part + len(every)} of {len(tokens)} sequences", flush=True)
    return np.concatenate(found), np.concatenate(prior)


def replay(rise: np.ndarray, prior: np.ndarray, seed: int, sequences: int, positions: int, tie: float) -> dict:
    """One race on a text drawn by the seed; each of its sequences is two of the measured ones."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(rise), size=(sequences, 2))
    text = np.concatenate([rise[drawn[:, 0]], rise[drawn[:, 1]]], 2)  # [sequences, L, 2(T-1)]
    layers, length = text.shape[1:]
    chosen = np.argsort(rng.random((sequences, length)), 1)[:, :positions]
    values = np.take_along_axis(text, chosen[:, None], 2).mean(2)
    first_prior = prior[drawn].mean(1)
    race = Race(list(range(layers)), 0.95, tie)
    cost = at = 0
    while at < sequences and not race.over:
        rows = np.arange(at, min(at + (BATCH if at else FIRST), sequences))
        alive = race.alive
        above = sum(layers - 1 - i for i in alive)
        cost += len(rows) * (layers + above + (len(alive) + 1) * HEAD * positions / length)
        at += len(rows)
        race.look(values[:at, alive], np.ones(at), prior=first_prior[rows].mean(0) if at == len(rows) else None)
    pick = race.alive[int(values[:at, race.alive].mean(0).argmin())]
    full = text.mean((0, 2))
    separate = sequences * (layers * (layers - 1) + layers * HEAD)
    return {
        "off": full[pick] - full.min(),
        "cost": cost / separate,
        "stopped": race.stopped.rpartition(" are left, ")[2],
    }


def main() -> None:
    """Print a line a depth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[30, 28, 26])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--measured", type=int, default=40, help="sequences of 128 tokens that are measured")
    parser.add_argument("--sequences", type=int, default=48, help="sequences of a race's text, 256 tokens each")
    parser.add_argument("--positions", type=int, default=254, help="scored positions of each")
    parser.add_argument("--tie", type=float, default=0.02)
    args = parser.parse_args()
    loaded = load_model("smollm2-135m", dtype="float32")
    stack = LayerStack(loaded.model).share()
    text = load_text("python-docs", loaded.tokenizer, block=128, tokens=128 * args.measured, split="calibration")
    for depth in range(max(args.depths), min(args.depths) - 1, -1):
        wanted = depth in args.depths
        tokens = text.tokens[: args.measured if wanted else 8]
        file = cache_dir("judge_race") / f"{'-'.join(map(str, stack.layer_ids))}_{len(tokens)}.npz"
        if not file.is_file():
            print(f"{depth} layers: measuring", flush=True)
            rise, prior = damages(stack, tokens)
            np.savez(file, rise=rise, prior=prior)
        stored = np.load(file)
        rise, prior = stored["rise"], stored["prior"]
        mean = rise.mean((0, 2))
        if wanted:
            made = [replay(rise, prior, seed, args.sequences, args.positions, args.tie) for seed in range(args.seeds)]
            off = np.array([m["off"] for m in made])
            ends = {name: sum(m["stopped"] == name for m in made) for name in sorted({m["stopped"] for m in made})}
            order = np.argsort(mean)[:3]
            print(
                f"{depth} layers: least {[stack.layer_ids[i] for i in order]} at {mean[order].round(3)} nats; "
                f"within {args.tie:g} of the full sweep's best in {np.mean(off <= args.tie):.1%} of {len(made)}, "
                f"the same layer in {np.mean(off == 0):.1%}, at most {off.max():.4f} off; cost 1/"
                f"{1 / np.mean([m['cost'] for m in made]):.1f} of separate runs; ended by {ends}",
                flush=True,
            )
        stack.remove(stack.layer_ids[int(mean.argmin())])


if __name__ == "__main__":
    main()
