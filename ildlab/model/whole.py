"""Was a checkpoint read whole? Files are looked at before, and the report of transformers after it is loaded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ildlab.errors import ModelError


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own progress bars and load reports: in a notebook each would leave a dead widget behind."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def check_folder(path: Path) -> None:
    """Raise ModelError where a folder cannot be read as a plain checkpoint: by its files alone, before any is loaded."""
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"{path} holds an adapter (adapter_config.json). Merge it into its base model first: "
            "`PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(new_folder)`; give that folder. "
            "If the base model alone is meant, move the adapter's files elsewhere."
        )
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} holds no config.json: it is not a model folder.")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"{path} holds no .safetensors file. ildlab reads no pickled weights (.bin, .pt): "
            "save the model with safe_serialization=True first."
        )
    index = path / "model.safetensors.index.json"
    for file in [*path.glob("*.json"), *path.glob("*.model"), *weights]:
        refuse_pointer(file)
    if index.is_file():
        try:
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is damaged ({error}): fetch it again.") from error
        if missing := sorted(wanted - {file.name for file in weights}):
            raise ModelError(f"{path} lacks {_some(missing)}, which {index.name} names: fetch what is missing.")


def refuse_pointer(file: Path) -> None:
    """Raise ModelError where a file is what Git LFS leaves in the place of a large one."""
    with open(file, "rb") as content:
        if content.read(42).startswith(b"version https://git-lfs.github.com/spec/"):
            raise ModelError(
                f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository."
            )


def check_whole(report: Mapping[str, Any], where: str | Path) -> None:
    """Raise ModelError where a loading report of transformers says that weights were missing, left over or misshapen.

    Such a model would run, with random weights in the place of its own. A tied head and buffers that are made anew are
    no fault, and transformers does not report them.
    """
    told = []
    for name, words in {
        "missing_keys": "it lacks {}",
        "mismatched_keys": "of another shape than the config says: {}",
        "unexpected_keys": "the model has no place for {}",
    }.items():
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report.get(name) or ())
        if keys:
            told.append(words.format(_some(keys)))
    if not told:
        return
    odd = sorted(report.get("unexpected_keys") or ())
    advice = "The config is not of these weights: check num_hidden_layers and the sizes in config.json, or fetch both again."
    for prefix in ("_orig_mod.", "module."):
        if odd and all(key.startswith(prefix) for key in odd):
            advice = (
                f"Every name begins with {prefix!r}, which torch.compile or a data-parallel wrapper puts there: save the "
                "model inside the wrapper."
            )
    if set(report) and not report.get("missing_keys") and not report.get("mismatched_keys"):
        advice += (
            " If what is left over is meant to be (another modality's tower, a speculative head), load the model with "
            "transformers once and save it again: the new folder holds what is used."
        )
    raise ModelError(f"The weights of {where} are not those of its model: {'; '.join(told)}. {advice}")


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
