"""Is a checkpoint whole, and what its config says? `doctor(path)`, or `python -m ildlab.doctor PATH [--fix NEW]`.

For any checkpoint: ildlab's, mergekit's, one that was cut by hand. It is read by stock transformers in a process of its
own, and none of ildlab's ways of running layers is used.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ildlab.errors import ExportError, ModelError
from ildlab.model.config_cut import BY_NUMBER, cut_config, layer_lists
from ildlab.model.generate import greedy
from ildlab.model.twin import same_but_for_rounding
from ildlab.model.whole import check_folder, check_whole, quiet

_LAYER = re.compile(r"^(.*?\.)(\d+)(\..+)$")  # prefix, number, rest of a tensor's name
_PREFIXES = ("_orig_mod.", "module.")
_BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "attention_layers")


@dataclass(frozen=True)
class Diagnosis:
    """One thing that the doctor looked at."""

    looked_at: str
    well: bool
    words: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.well else 'ILL '} {self.looked_at}: {self.words}"


def doctor(path: str | Path, *, fix: str | Path | None = None) -> list[Diagnosis]:
    """Look at a checkpoint folder, in a process of its own.

    Parameters
    ----------
    path : path
        A folder with config.json, safetensors and a tokenizer.
    fix : path, optional
        A new folder for a mended copy: names without a wrapper's prefix, layers numbered without gaps, lists and depth
        of the config as the weights have them. It is looked at instead. What is not in the files cannot be mended.

    Raises
    ------
    ExportError
        The process ended without an answer, or nothing could be mended (the message says why).
    """
    command = [sys.executable, "-m", "ildlab.doctor", str(path), "--json", *(["--fix", str(fix)] if fix else [])]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode not in (0, 1):
        raise ExportError(
            result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "The doctor was stopped."
        )
    return [Diagnosis(**each) for each in json.loads(result.stdout.splitlines()[-1])]


def examine(path: Path) -> list[Diagnosis]:
    """Look at a checkpoint folder, in this process."""
    found: list[Diagnosis] = []

    def told(looked_at: str, words: str = "", fine: str = "") -> bool:
        found.append(Diagnosis(looked_at, not words, words or fine))
        return not words

    try:
        check_folder(path)
        told("files", fine="config, weights and their index are there")
    except (ModelError, OSError) as error:
        told("files", str(error))
        return found
    try:
        said = _Said.of(_config(path))
    except Exception as error:  # no JSON, a type that transformers does not know
        told("config", f"it cannot be read: {type(error).__name__}: {error}")
        return found
    told("layers", *_layers(said, _numbers(path)))
    told("lists of the config", *_lists(said))
    model, tokenizer = _loaded(path, told)
    if model is None:
        return found
    broken = [name for name, tensor in model.named_parameters() if not bool(tensor.float().isfinite().all())]
    told("finite weights", f"NaN or infinite: {', '.join(broken[:3])}" if broken else "", "all are")
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None:
        highest = max(tokenizer.get_vocab().values(), default=0)
        beyond = f"it has ids up to {highest}, and the embedding {rows} rows: text with these cannot be read"
        told("tokenizer", beyond if highest >= rows else "", f"its ids are below the embedding's {rows} rows")
    if not broken:
        told("KV cache", *_cache(model))
    return found


def _layers(said: _Said, numbers: list[int]) -> tuple[str, str]:
    """What is wrong with the numbers of the layers in the files, and what is right."""
    wanted = said.depth
    if numbers == list(range(wanted)):
        return "", f"{wanted}, as the config says"
    gap = "" if numbers == list(range(len(numbers))) else f", numbered {_short(numbers)}"
    return f"the config says {wanted}, the weights are of {len(numbers)}{gap}", ""


def _lists(said: _Said) -> tuple[str, str]:
    """Lists by layer of the config whose length is not its depth."""
    odd = [
        f"{name} has {len(v)} entries for {said.depth} layers"
        for name, v in said.lists.items()
        if len(v) != said.depth
    ]
    return "; ".join(odd), "as long as the model is deep"


def _loaded(path: Path, told: Any) -> tuple[Any, Any]:
    """Model and tokenizer, where the weights fit the config; what is found on the way is told."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever transformers and tokenizers say of a file
        told("tokenizer", f"it cannot be read: {' '.join(str(error).split())[:200]}")
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                path, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, dtype="auto"
            )
        check_whole(report, path)
    except Exception as error:
        told("weights", " ".join(str(error).split())[:700])
        return None, tokenizer
    told("weights", fine="every tensor has its place, and none is missing")
    return model.eval(), tokenizer


@torch.no_grad()
def _cache(model: Any) -> tuple[str, str]:
    """What differs where the model goes on with a text with its KV cache."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(14).reshape(2, 7) * 7919 + 11) % min(rows, 30_000)  # [B, T]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
        if not bool(logits.isfinite().all()):
            return "the logits are not finite", ""
        one, other = (greedy(model, ids, tokens=6, exactly=True, use_cache=cached) for cached in (True, False))
    except Exception as error:
        return " ".join(str(error).split())[:200], ""
    rounding = 1e-4 if model.dtype == torch.float32 else 2e-2
    same = all(same_but_for_rounding(model, a, b, rounding) for a, b in zip(one, other, strict=True))
    return "" if same else "greedy text with the cache differs from that without", "the same text with and without"


# ---------------------------------------------------------------- mending


def mend(path: Path, target: Path) -> list[str]:
    """Write a mended copy of a checkpoint to a new folder; return what was changed.

    Raises
    ------
    ExportError
        The folder is in use, the files cannot be read, or there is nothing that could be mended.
    """
    from safetensors.torch import load_file, save_file

    if target.exists():
        raise ExportError(f"{target} exists: choose a new folder for the mended copy.")
    try:
        check_folder(path)
        config = _config(path)
        tensors = {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}
    except Exception as error:
        raise ExportError(f"{path} cannot be mended: {error}") from error
    changed = []
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            changed.append(f"{prefix!r} taken off every name")
    numbers = _numbered(tensors)
    places = {old: new for new, old in enumerate(numbers)}
    if numbers != list(range(len(numbers))):
        tensors = {_renumbered(name, places): tensor for name, tensor in tensors.items()}
        changed.append(f"layers {_short(numbers)} numbered 0 to {len(numbers) - 1}")
    changed += _mend_config(config, numbers)
    if not changed:
        raise ExportError(f"{path}: nothing that a change of names, numbers or config could mend.")
    target.mkdir(parents=True)
    for file in path.iterdir():
        if file.is_file() and not file.name.startswith("model") and file.suffix != ".safetensors":
            shutil.copy(file, target)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return changed


def _mend_config(config: dict[str, Any], numbers: list[int]) -> list[str]:
    """Make a config, in place, true of the layers with these numbers; say what was changed."""
    said, count = _Said.of(config), len(numbers)
    if said.depth == count and all(len(v) == count for v in said.lists.values()):
        return []
    # As it was when all lists were as long as the model was deep.
    deep = max([said.depth, numbers[-1] + 1, *map(len, said.lists.values())])
    lists = {name: value for name, value in said.lists.items() if len(value) == deep}
    ids = (config.get("ildlab") or {}).get("layer_ids") or []
    kept = ids if len(ids) == count and max(ids, default=0) < deep else numbers
    unsure = [name for name, value in lists.items() if len(set(map(str, value))) > 1]
    if kept == list(range(count)) and unsure and deep > count:
        raise ExportError(
            f"{unsure[0]} has {deep} entries for {count} layers that are numbered without a gap: which of its entries went "
            "with the layers cannot be known. Cut it by hand."
        )
    plain = {k: v for k, v in said.text.items() if k not in said.lists and k != "model_type"}
    made = type(said.default)(**plain | lists | {said.key: deep})
    cut_config(made, list(kept), layer_lists(made) & set(lists))
    new = made.to_dict()
    known = [
        name for name in (said.key, *lists, *BY_NUMBER) if name in new and (name in said.text or name == said.key)
    ]
    changes = {name: new[name] for name in known if new[name] != said.text.get(name)}
    said.text.update(changes)
    return [f"{name} in config.json" for name in changes]


# ------------------------------------------------------------------ files


@dataclass(frozen=True)
class _Said:
    """What a config.json says of layers, read as it stands: transformers refuses one that contradicts itself."""

    text: dict[str, Any]  # of the text model
    default: Any  # its class's default config
    key: str  # what this class calls num_hidden_layers
    depth: int
    lists: dict[str, list]  # those by layer

    @classmethod
    def of(cls, config: dict[str, Any]) -> _Said:
        from transformers import CONFIG_MAPPING

        text = config.get("text_config") or config
        default = CONFIG_MAPPING[text["model_type"]]().get_text_config()
        key = default.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        by_layer = {
            name
            for name, value in default.__dict__.items()
            if isinstance(value, (list, tuple)) and len(value) == default.num_hidden_layers
        }
        lists = {n: v for n, v in text.items() if isinstance(v, list) and v and n in by_layer | set(_BY_LAYER)}
        return cls(text, default, key, int(text.get(key, default.num_hidden_layers)), lists)


def _config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text(encoding="utf-8"))


def _numbers(path: Path) -> list[int]:
    """Numbers of the layers that the weights in a folder are of, in order."""
    from safetensors import safe_open

    names: list[str] = []
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names += weights.keys()
    return _numbered(names)


def _numbered(names: Any) -> list[int]:
    """The numbers under the prefix that has the most tensors: experts lie deeper, and other towers have fewer."""
    under: dict[str, list[int]] = {}
    for name in names:
        if match := _LAYER.match(name):
            under.setdefault(match[1], []).append(int(match[2]))
    return sorted(set(max(under.values(), key=len))) if under else []


def _renumbered(name: str, places: dict[int, int]) -> str:
    match = _LAYER.match(name)
    return f"{match[1]}{places[int(match[2])]}{match[3]}" if match and int(match[2]) in places else name


def _short(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) if len(numbers) < 12 else f"{numbers[0]}, {numbers[1]} ... {numbers[-1]}"


def main(arguments: list[str] | None = None) -> int:
    """Print what is found; 0 where all is well, 1 where something is not, 2 where nothing could be done."""
    parser = argparse.ArgumentParser(prog="python -m ildlab.doctor", description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path, help="checkpoint folder")
    parser.add_argument(
        "--fix", type=Path, metavar="NEW", help="write a mended copy to this new folder, and look at that"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    asked = parser.parse_args(arguments)
    path = asked.path.expanduser()
    try:
        if not path.is_dir():
            raise ExportError(f"There is no folder {path}: give a checkpoint's.")
        if asked.fix is not None:
            changed = mend(path, asked.fix.expanduser())
            path = asked.fix.expanduser()
            if not asked.json:
                print(f"written to {path}: {'; '.join(changed)}")
        found = examine(path)
    except ExportError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps([asdict(each) for each in found]) if asked.json else "\n".join(map(str, found)))
    return 0 if all(each.well for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
