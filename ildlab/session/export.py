"""A plain Hugging Face checkpoint of the student, written beside its place, and moved there once it is proven."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ildlab.errors import ExportError
from ildlab.files import whole_path, writing
from ildlab.model.stack import LayerStack
from ildlab.model.twin import without_sampling
from ildlab.model.whole import quiet
from ildlab.session.doctor import Verdict, examine
from ildlab.session.places import in_suite, in_text, paths_in, short
from ildlab.session.run import Run
from ildlab.session.tables import history_table
from ildlab.text.sources import SPLITS


def export_student(run: Run, path: str | Path) -> Path:
    """Write today's student as a plain Hugging Face checkpoint, and journal what `examine` says of it.

    The folder, new or empty, then holds safetensors, configs, tokenizer, `README.md` (a model card) and `ildlab.json`
    (what was removed and measured).

    Raises
    ------
    ExportError, FileError
        The folder is in use, or the checkpoint, loaded again, is not the student; or it cannot be written.
    """
    target = whole_path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} exists and is not an empty folder: choose a new one for the checkpoint.")
    if any(p.is_meta for p in run.student.model.parameters()):
        raise ExportError(
            "Weights of the student are offloaded: open the run with its teacher loaded without device_map, and export then."
        )
    with run.acting("export"):
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
                whole = Path(scratch) / "checkpoint"
                verdict = _write(run, whole)
                if target.exists():
                    target.rmdir()
                whole.rename(target)
        run.append("export", args={"path": str(path)}, result={"verdict": str(verdict), **asdict(verdict)})
    return target


def _write(run: Run, folder: Path) -> Verdict:
    teacher = short(run.config.teacher)
    exact = save(run.student, run.tokenizer, folder, run.weights_dtype, teacher=teacher)
    verdict = examine(folder, run.student, run.tokenizer, exact=exact)
    (folder / "README.md").write_text(model_card(run, verdict), encoding="utf-8")
    facts = {"teacher": teacher, "fingerprint": run.journal.config["fingerprint"]}
    facts |= {"removed": run.removed, "layer_ids": run.student.layer_ids}
    facts["steps"] = _steps(run)
    (folder / "ildlab.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return verdict


def _steps(run: Run) -> list[dict[str, Any]]:
    """What changed and judged the student; of a file the name alone, since its path is a matter of one machine."""
    steps = [step for step in run.path if step.action in ("remove", "distill", "evaluate")]
    texts = [*map(run.config.text_of, SPLITS), *(step.result.get("text", {}).get("source") for step in steps)]
    suites = [run.config.suite, *(step.args.get("suite") for step in steps)]
    paths = {path for text in texts for path in paths_in(text, in_text)}
    paths |= {path for suite in suites for path in paths_in(suite, in_suite)}
    told = json.dumps([asdict(step) for step in steps])
    for path in sorted(paths, key=len, reverse=True):
        told = told.replace(json.dumps(path)[1:-1], json.dumps(short(path))[1:-1])
    return json.loads(told)


def save(stack: LayerStack, tokenizer, folder: Path, dtype: torch.dtype, *, teacher: str) -> bool:
    """Save a stack in `dtype`, its layer ids in the config, and return whether `dtype` holds every weight exactly."""
    twin = stack.share()  # with a config of its own
    twin.config.ildlab = {"teacher": teacher, "layer_ids": stack.layer_ids}
    if twin.model.generation_config is not None:
        twin.model.generation_config = without_sampling(twin.model.generation_config)
    # Tied tensors must stay one tensor after the cast, or they would be saved twice.
    once: dict[int, Tensor] = {}
    state, exact = {}, True
    for name, tensor in twin.model.state_dict().items():
        cast = tensor.to(dtype) if tensor.is_floating_point() else tensor
        state[name] = once.setdefault(tensor.data_ptr(), cast)
        exact = exact and torch.equal(cast.to(tensor.dtype), tensor)
    with quiet():
        twin.model.save_pretrained(folder, state_dict=state)
    # transformers writes the dtype of the model in memory; the file is what `dtype` says.
    written = json.loads((folder / "config.json").read_text())
    written["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes it 0600
    tokenizer.save_pretrained(folder)
    return exact


CARD_COLUMNS = "n_removed layer_id layers parameters perplexity_undistilled perplexity_pruned perplexity kl aggregate"


def model_card(run: Run, verdict: Verdict) -> str:
    """The README of an exported checkpoint: what it is, how it was made, what was measured."""
    table = history_table(run)[CARD_COLUMNS.split()].dropna(axis=1, how="all")
    cells = [table.columns, ["---"] * table.shape[1], *table.map(_cell).to_numpy()]
    teacher, source = short(run.config.teacher), in_text(run.config.text_of("eval"), short)
    about = {"library_name": "transformers", "pipeline_tag": "text-generation", "base_model": teacher}
    about["tags"] = ["ildlab", "layer-pruning", "distillation"]
    return f"""---
{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---
# {teacher} with {len(run.student)} of {len(run.teacher)} layers

Made with ildlab by iterative layer-wise distillation (arXiv 2511.05085): the least important decoder
layer is removed, the student is distilled from the frozen teacher, and so on.

Removed, in order (layer ids of the teacher): {", ".join(map(str, run.removed)) or "none"}.

Judged on {run.config.eval_tokens} tokens of `{source}` (eval split), KL in nats per token:

{chr(10).join(f"| {' | '.join(row)} |" for row in cells)}

`perplexity_undistilled`: the same layers removed, no distillation at all. `perplexity_pruned`: right
after the removal. Checked on export: {verdict}.

The licence is the teacher's.
"""


def _cell(value) -> str:
    return "" if value is None or value != value else f"{value:.4g}" if value % 1 else f"{value:.0f}"
