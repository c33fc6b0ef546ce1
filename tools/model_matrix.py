"""Every type of causal LM of transformers, small and random, put through what ildlab promises of a model.

`python tools/model_matrix.py` (or `make models`) writes docs/models.md; names of types run these alone and print.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from ildlab import LayerStack, measure
from ildlab.errors import ExportError, MeasureError, UnsupportedModelError
from ildlab.importance.config import ABLATION, ONE_PASS
from ildlab.model.twin import cache_difference, check_cuts, check_savable, cut_difference
from ildlab.model.whole import quiet
from ildlab.session.export import save
from tools.small_models import KINDS, WINDOW, small_model

PAGE = Path(__file__).parent.parent / "docs" / "models.md"


@dataclass
class Found:
    """What became of a type."""

    kind: str
    verdict: str  # "not built", "refused", "passes" or "FAILED"
    why: str = ""
    kept: list[int] = field(default_factory=list)  # layers that cannot go
    seconds: float = 0.0


class _NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """There is none."""


def examine(kind: str) -> Found:
    """Build a type and try it; nothing is raised."""
    start = time.perf_counter()
    try:
        model = small_model(kind)
    except Exception as error:
        return Found(kind, "not built", _line(error))
    if model is None:
        return Found(kind, "not built", "multimodal: its text model is a type of its own")
    try:
        with torch.no_grad():
            stack = LayerStack(model)
            check_savable(stack)
            check_cuts(stack)
    except (UnsupportedModelError, ExportError) as error:
        return Found(kind, "refused", _line(error), seconds=time.perf_counter() - start)
    except Exception as error:
        return Found(kind, "FAILED", f"raw: {type(error).__name__}: {_line(error)}")
    try:
        kept = [i for i in stack.layer_ids if cut_difference(stack, i)]
        problem = _problem(stack, kept)
    except Exception as error:
        kept, problem = [], f"raw: {type(error).__name__}: {_line(error)}"
    return Found(kind, "FAILED" if problem else "passes", problem, kept, time.perf_counter() - start)


@torch.no_grad()
def _problem(stack: LayerStack, kept: list[int]) -> str:
    """The first promise that does not hold, in words; empty where all do."""
    model, ids = stack.model, (torch.arange(2 * 3 * WINDOW).reshape(2, -1) * 31 + 7) % 90 + 3  # [2, T], past a window
    mask = torch.ones_like(ids)
    mask[1, 2 * WINDOW + 3 :] = 0
    for batch in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        want, got = model(**batch, use_cache=False).logits, stack.logits(stack.final(batch))
        if not torch.allclose(want[mask.bool()], got[mask.bool()], atol=1e-4, rtol=1e-4):
            return f"replay differs from forward ({'padded' if len(batch) > 1 else 'long'})"
    whole = model(input_ids=ids, use_cache=False).logits
    teacher = stack.share()
    for metric in (*ONE_PASS, *ABLATION):
        try:
            with torch.enable_grad():
                scores = measure(stack, ids, metric, teacher if metric == "kl" else None)
        except MeasureError:
            if metric != "lrp":  # which says that it reads query projections, where a family has none of their own
                raise
        if not scores.table["score"].notna().all():
            return f"{metric} is not finite"
    free = [i for i in stack.layer_ids if i not in kept]
    for layer_id in free[:1] + free[-1:]:
        pruned = teacher.share(without=[layer_id])
        logp, logq = (
            torch.log_softmax(m(input_ids=ids, use_cache=False).logits.double(), -1) for m in (model, pruned.model)
        )
        real = (logp.exp() * (logp - logq)).sum(-1).mean()  # [B, T] -> one figure
        if abs(float(real) - scores.table.loc[layer_id, "score"]) > 1e-4 * (1 + float(real)):
            return f"the sweep differs from the removal of layer {layer_id}"
    for gone in _cuts(free):
        if len(gone) > 1 and cut_difference(stack, gone):
            continue  # each may go, all may not: remove() would say so at the last
        if problem := _cut_problem(stack, ids, gone):
            return f"without {gone}: {problem}"
    if not torch.equal(model(input_ids=ids, use_cache=False).logits, whole):
        return "the model was changed"
    return ""


def _cuts(free: list[int]) -> list[list[int]]:
    """The first, a middle, the last, and three at once."""
    singles = dict.fromkeys((free[0], free[len(free) // 2], free[-1]))
    several = [list(singles)] if len(singles) == 3 else []
    return [[i] for i in singles] + several


def _cut_problem(stack: LayerStack, ids: torch.Tensor, gone: list[int]) -> str:
    with stack.without(gone):
        skipped = stack.model(input_ids=ids, use_cache=False).logits
    student = stack.share(without=gone)
    if not torch.equal(student.model(input_ids=ids, use_cache=False).logits, skipped):
        return "`without` and `remove` differ"
    with tempfile.TemporaryDirectory() as folder:
        save(student, _NoTokenizer(), Path(folder), torch.float32, teacher="small")
        with quiet():
            again, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    odd = {name: sorted(map(str, keys))[:2] for name, keys in report.items() if keys}
    if odd:
        return f"the checkpoint loads with {odd}"
    if not torch.allclose(again.eval()(input_ids=ids, use_cache=False).logits, skipped, atol=1e-5, rtol=1e-5):
        return "the checkpoint has other logits"
    return "" if cache_difference(stack) else cache_difference(LayerStack(again))


def _line(error: Exception) -> str:
    said = re.sub(r"\s+", " ", str(error)).strip()
    return said if len(said) < 240 else f"{said[:240]} ..."


def page(found: list[Found]) -> str:
    """docs/models.md."""
    counts = Counter(each.verdict for each in found)
    built = len(found) - counts["not built"]
    rows = {verdict: [each for each in found if each.verdict == verdict] for verdict in counts}
    passing = ", ".join(
        f"`{each.kind}`" + (f" (not {', '.join(map(str, each.kept))})" if each.kept else "")
        for each in rows.get("passes", [])
    )

    def table(verdict: str) -> str:
        lines = (f"| `{each.kind}` | {each.why.replace('|', '/')} |" for each in rows.get(verdict, []))
        return "\n".join(["| type | why |", "| --- | --- |", *lines])

    return f"""# Which models

Made by `make models` with transformers {transformers.__version__}: a small random model of 6 layers of every type of causal LM
that can be built small, put through `tools/model_matrix.py`. **{built} built: {counts["passes"]} pass, {counts["refused"]} are
refused with a reason, {counts["FAILED"]} fail.** `make test` runs a part of them.

What holds for those that pass:

- replaying the layers gives the model's logits, with right padding and past a sliding window;
- every metric of one pass (`lrp` where queries have a projection of their own), `nll` and `kl` are finite, and the sweep's figure is that of the real removal;
- `without` is `remove`;
- after removing the first layer, a middle one, the last, and the three at once: the checkpoint loads with stock transformers,
  no key is missing or left over, its logits are the student's, and it generates the same with the KV cache as without
  (where the whole model does).

In brackets are layers, counted from 0, that cannot go: the config cannot describe the model without them (layer 0 alone
has no norm, say), so `remove` refuses that layer, and the loop takes the next least important one.
These are small models at random weights: that a real one of the family works is likely, not shown.

{passing}.

## Refused

By `LayerStack`, or when a session is created, before anything is done.

{table("refused")}
{f"{chr(10)}## Failing{chr(10)}{chr(10)}{table('FAILED')}{chr(10)}" if counts["FAILED"] else ""}
## Not tried

{table("not built")}
"""


def main(kinds: list[str]) -> int:
    """Try the types (all, where none is named), print what becomes of each; return how many fail."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    found = []
    for kind in kinds or KINDS:
        found.append(examine(kind))
        each = found[-1]
        kept = f" (layers {each.kept} stay)" if each.kept else ""
        print(f"{each.kind:28} {each.verdict}{kept} {each.why[:150]} {each.seconds:.0f} s", flush=True)
    counts = Counter(each.verdict for each in found)
    built = len(found) - counts["not built"]
    print(f"{built} built, {counts['passes']} pass, {counts['refused']} refused, {counts['FAILED']} failed")
    if not kinds:
        PAGE.write_text(page(found), encoding="utf-8")
    return counts["FAILED"]


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
