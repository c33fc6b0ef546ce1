"""`make bench`: what is fast, as ratios measured side by side in this one run.

Each module here has `bench()` that returns rows `{"name", "ratio", "limit", "note"}`. A ratio says how
many times the first thing named costs the second one (below 1: cheaper), unless its note says more.
Arguments choose modules: `python benchmarks/run.py importance`.
"""

from __future__ import annotations

import importlib
import platform
import sys
import time
from pathlib import Path

MODULES = ["importance", "distillation", "evaluation", "stepper"]


def main() -> int:
    """Run the benchmarks asked for and print one table; the exit status counts the limits missed."""
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    wanted = sys.argv[1:] or MODULES
    unknown = set(wanted) - set(MODULES)
    if unknown:
        print(f"No benchmark named {', '.join(sorted(unknown))}. There are: {', '.join(MODULES)}.")
        return 2
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}\n")
    missed = 0
    print(f"{'ratio':>7}  {'limit':>7}  {'':4}  what")
    for name in wanted:
        start = time.perf_counter()
        for row in importlib.import_module(name).bench():
            limit = row.get("limit")
            good = within(row["ratio"], limit)
            missed += not good
            shown = "" if limit is None else limit
            verdict = "" if limit is None else "ok" if good else "MISS"
            print(f"{row['ratio']:7.3f}  {shown:>7}  {verdict:4}  {row['name']}: {row['note']}", flush=True)
        print(f"{'':25}({name}: {time.perf_counter() - start:.0f} s)", flush=True)
    return missed


def within(ratio: float, limit: str | None) -> bool:
    """Tell whether a ratio keeps a limit such as `"<= 1.15"` or `">= 1.4"`; None is always kept."""
    if limit is None:
        return True
    sign, _, bound = limit.partition(" ")
    return ratio <= float(bound) if sign == "<=" else ratio >= float(bound)


if __name__ == "__main__":
    sys.exit(main())
