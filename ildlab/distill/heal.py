"""Closed-form healing: after a removal, fold a linear map into the layer below, so that it stands in for the gap.

The layer below the gap adds the output y = W a of its MLP's last projection to a stream x. A map T,
fitted by ridge regression towards the identity, replaces W by T W, so that x + T y meets the teacher's
hidden state *after* the gap: the idea of ReplaceMe (arXiv 2505.02819) and of LLM-Streamline's
replacement (arXiv 2403.19135), with no new module in the checkpoint. It is kept only if the teacher KL
falls on text that it was not fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ildlab.distill.fused import fused_divergence
from ildlab.distill.losses import in_fp64
from ildlab.errors import DistillError
from ildlab.model.stack import LayerStack
from ildlab.progress import Progress, Work, drive

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean eigenvalue of y's second moments
_SHRINK = (1.0, 0.5, 0.25)  # how far to go from the identity to the fitted map


@dataclass(frozen=True)
class HealResult:
    """What healing did.

    Parameters
    ----------
    kept : bool
        Whether the student was changed.
    kl_before, kl_after : float or None
        Teacher KL in nats a token on text that neither the map nor its regularisation was chosen on;
        `kl_after` is that of the best map tried, kept or not.
    layer_id : int or None
        The layer whose projection changed, or would have.
    ridge, shrink : float or None
        The regularisation that was best.
    note : str
        Why it was not kept, or not tried.
    """

    kept: bool
    kl_before: float | None = None
    kl_after: float | None = None
    layer_id: int | None = None
    ridge: float | None = None
    shrink: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)

    def _repr_html_(self) -> str:
        if self.kl_before is None:
            return f"<p>Not healed: {self.note}</p>"
        return (
            f"<p>{'Healed' if self.kept else 'Not healed'}: layer {self.layer_id}, held-out KL {self.kl_before:.4f} → "
            f"{self.kl_after:.4f} nats a token. {self.note}</p>"
        )


def heal(
    student: LayerStack,
    teacher: LayerStack,
    blocks: Any,
    gap: int | Sequence[int],
    *,
    show: bool | None = None,
    **options,
) -> HealResult:
    """Run `heal_steps` to its end, with a bar."""
    return drive(heal_steps(student, teacher, blocks, gap, **options), desc="heal", show=show)


def heal_steps(
    student: LayerStack,
    teacher: LayerStack,
    blocks: Any,
    gap: int | Sequence[int],
    *,
    batch_size: int = 8,
    positions: int | None = 32,
    least_gain: float = 0.0,
) -> Work[HealResult]:
    """Heal a gap in closed form, if that helps.

    The text is split three ways by rows: 60% to fit the map, 20% to choose ridge and shrinkage, 20% to
    decide. Tokens weigh in with 1 / |teacher's hidden state|^2, so that the few with huge activations do not
    decide the fit.

    Parameters
    ----------
    student, teacher : LayerStack
    blocks : TextBlocks or Tensor [N, T]
        Calibration text; at least 5 rows.
    gap : int or sequence of int
        The layer id just removed; of several, the highest run of neighbouring ones is healed.
    batch_size : int
        Rows at a time.
    positions : int, optional
        Evenly spaced positions of each row that the KL is measured at; None is all.
    least_gain : float
        Part of the KL that has to be won for the map to be kept.

    Raises
    ------
    DistillError
        Too little text, or the gap is not one.
    """
    from ildlab.distill.train import _as_rows

    ids, mask, _ = _as_rows(blocks)
    if mask is not None:
        raise DistillError("Healing takes packed blocks without padding.")
    if len(ids) < 5:
        raise DistillError(
            f"Healing needs at least 5 rows of text to fit, choose and decide on; there are {len(ids)}."
        )
    below, depth = _around(student, teacher, [gap] if isinstance(gap, int) else sorted(gap))
    if below is None:
        return HealResult(False, note="there is no layer below the gap to fold a map into.")
    position = student.position(below)
    linear = _projection(student, position, ids[:1])
    if linear is None:
        return HealResult(
            False, layer_id=below, note="the layer below the gap has no last projection that simply adds."
        )

    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    n_fit, n_choose = round(0.6 * len(ids)), max(1, round(0.2 * len(ids)))
    fit, choose, decide = order[:n_fit], order[n_fit : n_fit + n_choose], order[n_fit + n_choose :]
    total = 4
    moments = None
    for rows in fit.split(batch_size):
        x, y, target = _states(student, teacher, ids[rows].long(), position, linear, depth)
        moments = _moments(x, y, target, moments)
    yield Progress(1, total, "fitted")

    held = [_states(student, teacher, ids[rows].long(), position, linear, depth) for rows in choose.split(batch_size)]
    ridge = min(_RIDGES, key=lambda r: sum(_error(_solve(moments, r), *states) for states in held))
    fitted = _solve(moments, ridge)
    eye = torch.eye(len(fitted), dtype=fitted.dtype, device=fitted.device)
    maps = {shrink: eye + shrink * (fitted - eye) for shrink in _SHRINK}
    yield Progress(2, total, f"ridge {ridge:g}")
    kl = dict.fromkeys(maps, 0.0)
    for rows in choose.split(batch_size):
        for shrink, value in _kl(student, teacher, ids[rows].long(), position, linear, depth, maps, positions).items():
            kl[shrink] += value
    shrink = min(kl, key=kl.get)
    yield Progress(3, total, f"shrinkage {shrink:g}")
    tried = {"none": eye, "map": maps[shrink]}
    sums, tokens = {"none": 0.0, "map": 0.0}, 0
    for rows in decide.split(batch_size):
        for name, value in _kl(student, teacher, ids[rows].long(), position, linear, depth, tried, positions).items():
            sums[name] += value
        tokens += len(rows) * min(positions or ids.shape[1], ids.shape[1])
    before, after = sums["none"] / tokens, sums["map"] / tokens
    kept = after < before * (1 - least_gain)
    if kept:
        student.own([below])
        _fold(student.layers[position].get_submodule(linear), maps[shrink])
    yield Progress(4, total, f"KL {before:.4f} -> {after:.4f}")
    note = "" if kept else "The map did not lower the KL on text that it was not fitted on, so it was dropped."
    return HealResult(kept, before, after, below, ridge, shrink, note)


def _around(student: LayerStack, teacher: LayerStack, gaps: list[int]) -> tuple[int | None, int]:
    """The layer id below the highest gap, and the teacher's depth after it."""
    if not gaps or any(g in student.layer_ids for g in gaps):
        raise DistillError(f"gap={gaps}: name layer ids that were removed from the student.")
    above = [i for i in student.layer_ids if i > gaps[-1]]
    below = [i for i in student.layer_ids if i < gaps[-1]]
    return (below[-1] if below else None), teacher.position(above[0]) if above else len(teacher)


@torch.no_grad()
def _projection(student: LayerStack, position: int, ids: Tensor) -> str | None:
    """Name, in its layer, of the projection whose output is added to the stream last; None if there is none.

    It is the last linear map that runs; scaling its output has to change the layer's output by just that.
    """
    layer, ran = student.layers[position], []
    names = {
        module: name
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == student.hidden_size
    }
    hooks = [m.register_forward_hook(lambda m, a, out: ran.append((names[m], out))) for m in names]
    trunk = student.trunk(ids.long())
    hidden = trunk.h0
    for p in range(position):
        hidden = student.run(p, hidden, trunk)
    try:
        ran.clear()
        plain = student.run(position, hidden, trunk)
    finally:
        for hook in hooks:
            hook.remove()
    if not ran or sum(name == ran[-1][0] for name, _ in ran) != 1 or ran[-1][1].shape != plain.shape:
        return None
    name, out = ran[-1]
    hook = layer.get_submodule(name).register_forward_hook(lambda m, a, o: o * 1.5)
    try:
        scaled = student.run(position, hidden, trunk)
    finally:
        hook.remove()
    return name if torch.allclose(scaled - plain, 0.5 * out, rtol=1e-2, atol=1e-2 * float(out.abs().mean())) else None


@torch.no_grad()
def _states(student, teacher, ids, position, linear, depth) -> tuple[Tensor, Tensor, Tensor]:
    """Stream x, projection output y and target, each [tokens, d] in fp32, and nothing of the layers above."""
    seen: list[Tensor] = []
    hook = student.layers[position].get_submodule(linear).register_forward_hook(lambda m, a, o: seen.append(o))
    try:
        trunk = student.trunk(ids)
        hidden = trunk.h0
        for p in range(position + 1):
            seen.clear()
            hidden = student.run(p, hidden, trunk)
    finally:
        hook.remove()
    for level, target in enumerate(teacher.walk(ids)):
        if level == depth:
            break
    y = seen[0].float()
    return tuple(t.flatten(0, 1) for t in (hidden.float() - y, y, target.float()))


def _moments(x: Tensor, y: Tensor, target: Tensor, sums=None) -> tuple[Tensor, Tensor]:
    """Weighted second moments, in fp64 where the device has it: y'y and (target - x)'y."""
    weight = 1 / target.square().sum(-1, keepdim=True)
    weighted = in_fp64(y) * weight
    mine = (in_fp64(y).T @ weighted, in_fp64(target - x).T @ weighted)
    return mine if sums is None else (sums[0] + mine[0], sums[1] + mine[1])


def _solve(moments: tuple[Tensor, Tensor], ridge: float) -> Tensor:
    """T minimising sum w |target - x - T y|^2 + lambda |T - 1|^2."""
    gram, cross = moments
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    size = ridge * gram.diagonal().mean()
    return torch.linalg.solve(gram + size * eye, (cross + size * eye).T).T


def _error(mapping: Tensor, x: Tensor, y: Tensor, target: Tensor) -> float:
    left = target - x - y @ mapping.T.to(y.dtype)
    return float((left.square().sum(-1) / target.square().sum(-1)).sum())


@torch.no_grad()
def _kl(student, teacher, ids, position, linear, depth, maps: dict, positions: int | None) -> dict[Any, float]:
    """Sum of the teacher KL, in nats, with each map in place; the layers below run once."""
    trunk, at = student.trunk(ids), None
    if positions is not None and positions < ids.shape[1]:
        at = torch.linspace(0, ids.shape[1] - 1, positions).round().long()
    x, y, _ = _states(student, teacher, ids, position, linear, depth)
    goal = teacher.final(ids)
    x, y = (t.view(*goal.shape) for t in (x, y))
    goal = goal if at is None else goal[:, at]
    result = {}
    for name, mapping in maps.items():
        hidden = (x + y @ mapping.T.to(y.dtype)).to(goal.dtype)
        for p in range(position + 1, len(student)):
            hidden = student.run(p, hidden, trunk)
        hidden = hidden if at is None else hidden[:, at]
        flat = hidden.flatten(0, 1)
        ones = torch.ones(len(flat), device=flat.device)
        result[name] = float(fused_divergence(student, teacher, flat, goal.flatten(0, 1), weights=ones)[0])
    return result


@torch.no_grad()
def _fold(linear: nn.Linear, mapping: Tensor) -> None:
    linear.weight.copy_((mapping @ in_fp64(linear.weight)).to(linear.weight.dtype))
    if linear.bias is not None:
        linear.bias.copy_((mapping @ in_fp64(linear.bias)).to(linear.bias.dtype))
