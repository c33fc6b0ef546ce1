"""A grid as it lies on disk, as tables: how far its points are, and what came out of them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from ildlab.errors import GridError
from ildlab.files import whole_path
from ildlab.grid.work import NOTEBOOK, PARAMETERS, is_held, state_of
from ildlab.session.config import SessionConfig
from ildlab.session.journal import Journal
from ildlab.session.tables import table_of


def states(folders: Iterable[Path]) -> pd.DataFrame:
    """How far points are, a row each by its folder's name: `state`, `seconds`, `attempts`, `error`.

    `state` is "waiting", "running", "stopped" (its worker is gone; it runs again when the grid does), "done" or "failed".
    """
    rows = {}
    for folder in folders:
        held, known = is_held(folder), state_of(folder)
        if known["state"] == "running":  # asked twice, as it may have begun or ended between the two
            known["seconds"] = time.time() - known["began"]
            known["state"] = "running" if held or is_held(folder) else "stopped"
        rows[folder.name] = known
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["state", "seconds", "attempts", "error"])
    return table.rename_axis("point").astype({"seconds": float})


def load_grid(out: str | os.PathLike) -> pd.DataFrame:
    """A grid's points, a row each: its parameters, how it stands, and the figures that its run ended with.

    Columns: the parameters; those of `states`; of a run that was kept in the point's `run_folder` the last row of its
    `history_table` (`n_removed`, `perplexity`, `kl`, `aggregate`, `loss`, ...) and `removed`, the layer ids in order. A
    figure that is called as a parameter is has `run_` before it. Raises GridError where there is no grid.
    """
    out = whole_path(out)
    folders = sorted(path.parent for path in out.glob(f"*/{PARAMETERS}"))
    if not (out / NOTEBOOK).is_file() or not folders:
        raise GridError(f"{out} holds no grid: make one with run_grid(notebook, grid, {str(out)!r}).")
    stand = states(folders)
    given = [json.loads((folder / PARAMETERS).read_text(encoding="utf-8")) for folder in folders]
    left = pd.concat([pd.DataFrame(given, index=stand.index), stand], axis=1)
    found = [figures(folder / "run") if stand.at[folder.name, "state"] == "done" else {} for folder in folders]
    right = pd.DataFrame(found, index=stand.index).dropna(axis=1, how="all")
    return pd.concat([left, right.rename(columns={name: f"run_{name}" for name in left})], axis=1)


def figures(folder: Path) -> dict[str, Any]:
    """What the run in a folder ended with, by its journal; nothing where there is none. No model is loaded."""
    if not (folder / "config.json").is_file():
        return {}
    journal = Journal.open(folder, read_only=True)
    path = journal.path_to(journal.head.step)
    last = table_of(path, SessionConfig.stored(journal.config, folder).suite).iloc[-1]
    removed = [step.args["layer_id"] for step in path if step.action == "remove"]
    return last.drop(["layer_id", "score", "seconds"]).to_dict() | {"removed": removed}
