"""A plain Hugging Face checkpoint of the student, and the doctor that proves it.

The checkpoint is written beside its place, loaded again with stock transformers, and compared with the
student; only then is it moved to where it was asked for.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ildlab.errors import ExportError, first_line
from ildlab.files import disk_error
from ildlab.model.generate import greedy
from ildlab.model.load import quiet
from ildlab.model.stack import LayerStack

if TYPE_CHECKING:
    from ildlab.session.session import PruningSession

PROBE = "The layers of a transformer refine the hidden state step by step, so that"


@dataclass(frozen=True)
class Verdict:
    """What the doctor found when it loaded a checkpoint with stock transformers.

    Attributes
    ----------
    logits_error : float
        Largest difference of logits to the student's, relative to the largest logit.
    same_with_cache : bool
        Greedy generation with the KV cache gives the tokens that it gives without (where they part, two tokens are
        equally likely but for the rounding of the dtype).
    layers : int
    text : str
        The greedy continuation of a probe.
    """

    logits_error: float
    same_with_cache: bool
    layers: int
    text: str

    def __str__(self) -> str:
        cache = "the same with and without the KV cache" if self.same_with_cache else "DIFFERENT with the KV cache"
        return (
            f"{self.layers} layers; logits equal the student's to {self.logits_error:.1e} of the largest; "
            f"generation is {cache}"
        )


def export(session: PruningSession, path: str | Path) -> tuple[Path, Verdict]:
    """Write the session's student to a new folder that `AutoModelForCausalLM.from_pretrained` loads.

    Parameters
    ----------
    session : PruningSession
    path : path
        A folder that does not exist, or is empty.

    Returns
    -------
    Path
        The folder: safetensors, config, generation config, tokenizer, `README.md` (a model card) and
        `ildlab.json` (what was removed and measured).
    Verdict
        What the doctor found.

    Raises
    ------
    ExportError
        The folder is in use, or the checkpoint, loaded again, is not the student.
    """
    target = Path(path).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} exists and is not an empty folder: choose a new one for the checkpoint.")
    if any(p.is_meta for p in session.student.model.parameters()):
        raise ExportError(
            "Weights of the student are offloaded (device_map), so that it cannot be saved from here: open the run with its "
            "teacher loaded without device_map, and export then."
        )
    dtype = session.weights_dtype
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        exact = save(session.student, session.tokenizer, scratch, dtype, teacher=session.config.teacher)
        verdict = examine(scratch, session.student, session.tokenizer, exact=exact)
        (scratch / "README.md").write_text(model_card(session, verdict), encoding="utf-8")
        facts = {
            "teacher": session.config.teacher,
            "fingerprint": session.journal.config["fingerprint"],
            "removed": session.removed,
            "layer_ids": session.student.layer_ids,
            "steps": [step.__dict__ for step in session.path if step.action in ("remove", "distill", "evaluate")],
        }
        (scratch / "ildlab.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        if target.exists():
            target.rmdir()
        scratch.chmod(0o755)
        scratch.rename(target)
        scratch = None
    except OSError as error:
        raise disk_error(target, error) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return target, verdict


def save(stack: LayerStack, tokenizer, folder: Path, dtype: torch.dtype, *, teacher: str) -> bool:
    """Save a stack's model and tokenizer in `dtype`, its layer ids recorded in the config.

    Returns
    -------
    bool
        Whether `dtype` holds every weight exactly.
    """
    config = stack.model.config
    text = stack.config
    before = (text.__dict__.get("ildlab"), config.dtype)
    text.ildlab = {"teacher": teacher, "layer_ids": stack.layer_ids}
    config.dtype = dtype
    try:
        state = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in stack.model.state_dict().items()
        }
        # Tied tensors must stay one tensor after the cast, or they would be saved twice.
        once: dict[int, Tensor] = {}
        exact = True
        for name, original in stack.model.state_dict().items():
            state[name] = once.setdefault(original.data_ptr(), state[name])
            exact = exact and torch.equal(state[name].to(original.dtype), original)
        with quiet():
            stack.model.save_pretrained(folder, state_dict=state)
        # transformers writes the dtype of the model in memory; the file is what `dtype` says.
        written = json.loads((folder / "config.json").read_text())
        written["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
        for file in folder.glob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes it 0600
    finally:
        config.dtype = before[1]
        if before[0] is None:
            del text.ildlab
        else:
            text.ildlab = before[0]
    tokenizer.save_pretrained(folder)
    return exact


@torch.no_grad()
def examine(folder: str | Path, student: LayerStack, tokenizer, *, exact: bool = True) -> Verdict:
    """Load a checkpoint with stock transformers and compare it with the student that it is to be.

    Parameters
    ----------
    folder : path
    student : LayerStack
    tokenizer
    exact : bool
        The checkpoint's dtype holds every weight of the student; else its logits may differ by the rounding.

    Raises
    ------
    ExportError
        It does not load, misses weights, or its logits differ from the student's.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=student.model.dtype, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:
        raise ExportError(f"The checkpoint does not load with stock transformers: {error}") from error
    odd = {k: sorted(map(str, v)) for k, v in info.items() if v and k != "error_msgs"}
    if odd:
        raise ExportError(f"The checkpoint loads, but with {odd}: its config does not describe the student.")
    model.to(student.device).eval()
    ids = tokenizer(PROBE, return_tensors="pt").input_ids.to(student.device)
    want = student.model(input_ids=ids, use_cache=False).logits.float()
    got = model(input_ids=ids, use_cache=False).logits.float()
    error = float((want - got).abs().max() / want.abs().max())
    rounding = 1e-5 if student.model.dtype == torch.float32 else 2e-2
    if not error <= (rounding if exact else 5e-2):
        raise ExportError(
            f"The checkpoint's logits differ from the student's by {error:.2g} of the largest logit: "
            "the saved model is not the student. Nothing was exported."
        )
    with_cache = greedy(model, ids, use_cache=True)
    without = greedy(model, ids, use_cache=False)
    text = tokenizer.decode(with_cache[0, ids.shape[1] :], skip_special_tokens=True)
    same = _same_but_for_rounding(model, with_cache[0], without[0], rounding)
    return Verdict(error, same, model.config.get_text_config().num_hidden_layers, text)


def _same_but_for_rounding(model, one: Tensor, other: Tensor, rounding: float) -> bool:
    """Whether two greedy continuations are one, or part at two tokens that are equally likely in this dtype."""
    length = min(len(one), len(other))
    apart = (one[:length] != other[:length]).nonzero()
    if not len(apart):
        return len(one) == len(other)
    at = int(apart[0])
    logits = model(input_ids=one[None, :at], use_cache=False).logits[0, -1].float()
    return bool((logits[one[at]] - logits[other[at]]).abs() <= rounding * logits.abs().max())


def check_describable(stack: LayerStack) -> None:
    """Find out, before anything is removed, whether the family's config can describe a stack that lacks a layer.

    Where the kinds of layers follow from a period (Jamba), or from anything else that is no list in the config,
    a student without its first layer is another model than the config says.

    Raises
    ------
    ExportError
        It cannot: such a student could be neither saved nor run with a KV cache.
    """
    if len(stack) < 2:
        return
    try:
        if _shapes(_built(stack)) != _shapes(stack.model):
            return  # quantised weights, an adapter: the class alone does not make this model
    except Exception:  # it computes with weights while it is built: only the doctor can tell
        return
    trial = stack.share()
    kinds = _kinds(trial.config)
    trial.remove(trial.layer_ids[0])
    wanted = _shapes(trial.model)
    try:
        found = _shapes(_built(trial))
    except Exception as error:  # whatever a family's constructor says of its config
        raise ExportError(
            f"{type(stack.model).__name__} cannot lose a layer: with one layer fewer its config is refused "
            f"({first_line(error)})."
        ) from error
    if found != wanted or _kinds(trial.config) != kinds[1:]:
        odd = sorted(set(found) ^ set(wanted)) or sorted(n for n in found if found[n] != wanted[n]) or kinds
        raise ExportError(
            f"{type(stack.model).__name__} cannot lose a layer: its config tells the kinds of layers by a rule, not by a "
            f"list, so that a model without one cannot be described (first difference: {odd[0]})."
        )


def _built(stack: LayerStack):
    """The model that the stack's config describes, without weights."""
    with torch.device("meta"), quiet():
        return type(stack.model)(copy.deepcopy(stack.model.config))


def _shapes(model) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _kinds(config) -> list:
    """Kinds of the layers by position, as the config tells them; empty where it tells none."""
    for name in ("layer_types", "layers_block_type"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, (list, tuple)) and len(kinds) == config.num_hidden_layers:
            return list(kinds)
    return []


def model_card(session: PruningSession, verdict: Verdict) -> str:
    """The README of an exported checkpoint: what it is, how it was made, what was measured."""
    table = session.history()[
        [
            "n_removed",
            "layer_id",
            "layers",
            "parameters",
            "perplexity_undistilled",
            "perplexity_pruned",
            "perplexity",
            "kl",
            "aggregate",
        ]
    ].dropna(axis=1, how="all")
    head = "| " + " | ".join(table.columns) + " |\n|" + " --- |" * len(table.columns)
    body = "\n".join("| " + " | ".join(_cell(v) for v in row) + " |" for row in table.itertuples(index=False))
    source = session.config.eval_text or session.config.text
    return f"""---
library_name: transformers
pipeline_tag: text-generation
base_model: {session.config.teacher}
tags: [ildlab, layer-pruning, distillation]
---
# {session.config.teacher} with {len(session.student)} of {len(session.teacher)} layers

Made with ildlab by iterative layer-wise distillation (arXiv 2511.05085): the least important decoder
layer is removed, the student is distilled from the frozen teacher, and so on.

Removed, in order (layer ids of the teacher): {", ".join(map(str, session.removed)) or "none"}.

Judged on {session.config.eval_tokens} tokens of `{source}` (eval split), KL in nats per token:

{head}
{body}

`perplexity_undistilled`: the same layers removed, no distillation at all. `perplexity_pruned`: right
after the removal. Checked on export: {verdict}.

The licence is the teacher's.
"""


def _cell(value) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return str(int(value)) if isinstance(value, float) else str(value)
