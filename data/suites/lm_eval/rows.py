"""Rows of ildlab's shipped tasks for lm-eval: `lm_eval --include_path .../data/suites/lm_eval --tasks mini7`."""

import json
from pathlib import Path

import datasets


def load(file: str, **_) -> dict:
    """Read a task file that lies beside this folder; lm-eval passes `dataset_kwargs`."""
    lines = (Path(__file__).resolve().parent.parent / file).read_text(encoding="utf-8").split("\n")
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines if line.strip()])}
