"""Find, capture, replay, skip and remove the decoder layers of any causal LM.

No code here knows a model family. The decoder layers are the `nn.ModuleList` as long as
`num_hidden_layers`. One pass with every layer's `forward` replaced by a recorder *captures* the
arguments (masks, rotary embeddings, positions) that the model gives each layer; calling the layers
with them *replays* the pass. For the tail (final norm, head, soft-cap, scaling), one stub layer stands
in place of the stack and returns a hidden state of the caller's choice, so that the model itself
applies its own tail. `LayerStack` proves on load that the replay reproduces the model's logits.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ildlab.errors import SessionError, UnsupportedModelError
from ildlab.model.masks import unpacked

Batch = Tensor | Mapping[str, Tensor]


class _Captured(Exception):
    """Raised by the last recorder: the rest of the model's forward is not needed."""


@dataclass
class Trunk:
    """What replaying needs: the embedding output and each layer's captured arguments.

    Attributes
    ----------
    h0 : Tensor [B, T, d]
        Input of the first layer.
    calls : list of (args, kwargs)
        One for each position of the stack; without the hidden state.
    attention_mask : Tensor [B, T] or None
        1 where a token is valid; None where all are.
    input_ids : Tensor [B, T]
    """

    h0: Tensor
    calls: list[tuple[tuple, dict]]
    attention_mask: Tensor | None
    input_ids: Tensor


class _Stub(nn.Module):
    """Stands in for the whole stack and returns a given hidden state."""

    def __init__(self, like: nn.Module, returns_tuple: bool):
        super().__init__()
        object.__setattr__(self, "_like", like)
        self._returns_tuple = returns_tuple
        self.hidden: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of a layer, such as its attention type.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_like"), name)

    def forward(self, *args, **kwargs):
        return (self.hidden,) if self._returns_tuple else self.hidden


class LayerStack:
    """The decoder layers of a causal LM, addressed by layer id.

    Parameters
    ----------
    model : nn.Module
        Any causal LM of transformers. The stack acts on it in place.
    layer_ids : sequence of int, optional
        The teacher's layer id of each of today's layers; by default those recorded in the config of
        a checkpoint that ildlab exported, else 0 .. L-1.

    Raises
    ------
    UnsupportedModelError
        The layers are not found, or replaying them does not reproduce the model's logits.
    """

    def __init__(self, model: nn.Module, layer_ids: Iterable[int] | None = None):
        self.model = model
        self.config = _text_config(model)
        self._parent, self._name = _find_layers(model, self.config.num_hidden_layers)
        self._tuple_out = False
        self._learn_return_kind()
        recorded = (getattr(self.config, "ildlab", None) or {}).get("layer_ids")
        ids = list(layer_ids) if layer_ids is not None else list(recorded or range(len(self.layers)))
        if len(ids) != len(self.layers) or len(set(ids)) != len(ids):
            raise UnsupportedModelError(
                f"The model has {len(self.layers)} decoder layers, but {len(ids)} layer ids were given: {ids}."
            )
        self._layer_ids = ids
        self._prove()

    # ---------------------------------------------------------------- looking

    @property
    def layers(self) -> nn.ModuleList:
        """Today's decoder layers."""
        return self._parent._modules[self._name]

    @property
    def layer_ids(self) -> list[int]:
        """Layer ids (indices in the teacher) of today's layers, bottom first."""
        return list(self._layer_ids)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def hidden_size(self) -> int:
        """Width d of the hidden state."""
        return self.config.hidden_size

    def __len__(self) -> int:
        return len(self.layers)

    def position(self, layer_id: int) -> int:
        """Position of a layer id in today's stack.

        Raises
        ------
        SessionError
            The layer was removed, or never existed.
        """
        if layer_id not in self._layer_ids:
            raise SessionError(
                f"Layer {layer_id} is not in the student (it was removed, or never existed). "
                f"Layers that are: {self._layer_ids}."
            )
        return self._layer_ids.index(layer_id)

    def __repr__(self) -> str:
        return f"LayerStack({len(self)} layers: {self._layer_ids})"

    def _repr_html_(self) -> str:
        top = max(self._layer_ids, default=-1) + 1
        cells = []
        for layer_id in range(top):
            here = layer_id in self._layer_ids
            style = "border:1px solid currentColor;padding:1px 4px;margin:1px;display:inline-block;"
            if not here:
                style += (
                    "opacity:.55;background:repeating-linear-gradient(45deg,transparent 0 3px,currentColor 3px 4px);"
                )
            title = f"layer {layer_id}" + ("" if here else " (removed)")
            label = str(layer_id) if here else f"<s>{layer_id}</s>"
            cells.append(f'<span style="{style}" title="{title}">{label}</span>')
        return f"<div><b>{len(self)} layers</b><br>{''.join(cells)}</div>"

    # --------------------------------------------------------------- replaying

    def trunk(self, batch: Batch) -> Trunk:
        """Run the embedding only and capture what the model hands to each layer.

        Parameters
        ----------
        batch : Tensor [B, T] of token ids, or a mapping with `input_ids` and `attention_mask`
        """
        inputs = self._inputs(batch)
        calls: list[tuple[tuple, dict]] = []
        first: list[Tensor] = []
        last = len(self.layers) - 1

        def recorder(index: int):
            def record(*args, **kwargs):
                hidden, args, kwargs = _split_hidden(args, kwargs)
                if not first:
                    first.append(hidden)
                calls.append((args, kwargs))
                if index == last:
                    raise _Captured
                return (hidden,) if self._tuple_out else hidden

            return record

        with contextlib.ExitStack() as restore:
            for index, layer in enumerate(self.layers):
                restore.enter_context(_forward_replaced(layer, recorder(index)))
            alone = contextlib.nullcontext() if "position_ids" in inputs else unpacked()
            with contextlib.suppress(_Captured), alone:
                self.model(**inputs, use_cache=False)
        if len(calls) != len(self.layers):
            raise UnsupportedModelError(
                f"The model called {len(calls)} of its {len(self.layers)} decoder layers in one pass."
            )
        return Trunk(first[0], calls, inputs.get("attention_mask"), inputs["input_ids"])

    def run(self, position: int, hidden: Tensor, trunk: Trunk) -> Tensor:
        """Run the layer at `position` on a hidden state [B, T, d], as the model would."""
        args, kwargs = trunk.calls[position]
        out = self.layers[position](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def walk(self, batch: Batch | Trunk) -> Iterator[Tensor]:
        """Yield h[0], h[1], ..., h[L] (pre-norm) one after another; nothing is kept."""
        trunk = batch if isinstance(batch, Trunk) else self.trunk(batch)
        hidden = trunk.h0
        yield hidden
        for position in range(len(self.layers)):
            hidden = self.run(position, hidden, trunk)
            yield hidden

    @torch.no_grad()
    def hidden_states(self, batch: Batch) -> list[Tensor]:
        """All of h[0..L], each [B, T, d]; h[L] is before the final norm."""
        return list(self.walk(batch))

    def final(self, batch: Batch | Trunk) -> Tensor:
        """h[L] alone, [B, T, d], pre-norm."""
        *_, last = self.walk(batch)
        return last

    def logits(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits of a final hidden state, through the model's own norm, head, soft-cap and scaling.

        Parameters
        ----------
        hidden : Tensor [..., d]
            Pre-norm hidden state h[L].
        positions : Tensor [P] or [B, P] of int64, optional
            Only these positions of a `hidden` [B, T, d]: the result is [B, P, V].

        Returns
        -------
        Tensor [..., V], in the model's dtype. Gradients flow to `hidden`.
        """
        if positions is not None:
            if positions.dim() == 1:
                hidden = hidden[:, positions]
            else:
                hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        shape = hidden.shape[:-1]
        # A batch of single tokens, so that no attention mask between them is ever built.
        flat = hidden.reshape(-1, 1, hidden.shape[-1])
        ids = torch.zeros(flat.shape[:2], dtype=torch.long, device=self.device)
        stub = _Stub(self.layers[0], self._tuple_out)
        stub.hidden = flat
        with self._stack_replaced(nn.ModuleList([stub])), unpacked():
            out = self.model(input_ids=ids, use_cache=False).logits
        return out.reshape(*shape, out.shape[-1])

    # ------------------------------------------------------ skipping, removing

    @contextlib.contextmanager
    def without(self, layer_ids: int | Iterable[int]) -> Iterator[LayerStack]:
        """Run the model without some layers for as long as the context lasts.

        Nothing is copied. Inside, the model is the pruned model, KV-cache generation included; after
        it, even after an exception, the model is whole again.

        Parameters
        ----------
        layer_ids : int or iterable of int
        """
        gone = {layer_ids} if isinstance(layer_ids, int) else set(layer_ids)
        for layer_id in gone:
            self.position(layer_id)
        if len(gone) == len(self):
            raise SessionError("Without all of its layers there is no model left: leave at least one.")
        before = (self.layers, self._layer_ids, _config_entries(self.config), _layer_indices(self.layers))
        try:
            self._keep([p for p, layer_id in enumerate(self._layer_ids) if layer_id not in gone])
            yield self
        finally:
            layers, self._layer_ids, entries, indices = before
            self._parent._modules[self._name] = layers
            _restore_config(self.config, entries)
            for module, name, value in indices:
                setattr(module, name, value)

    def remove(self, layer_id: int) -> nn.Module:
        """Remove one decoder layer for good and return it.

        Per-layer lists of the config are cut, entries that name layers are remapped, and `layer_idx`
        is renumbered, so that the KV cache and a saved checkpoint stay right.

        Raises
        ------
        SessionError
            No such layer in the student, or it is the only one left.
        """
        position = self.position(layer_id)
        if len(self) == 1:
            raise SessionError("The student has one layer left; it cannot be removed.")
        layer = self.layers[position]
        self._keep([p for p in range(len(self)) if p != position])
        return layer

    def share(self) -> LayerStack:
        """A second model that shares every weight with this one: a student at no cost in memory.

        The two may then differ in their layers (`remove`) and, after `own`, in their weights.
        """
        memo = {id(t): t for t in itertools.chain(self.model.parameters(), self.model.buffers())}
        return LayerStack(copy.deepcopy(self.model, memo), self._layer_ids)

    def own(self, layer_ids: Iterable[int]) -> None:
        """Give these layers weights of their own, equal to the shared ones, so that they may change."""
        for position in [self.position(layer_id) for layer_id in layer_ids]:
            self.layers[position] = copy.deepcopy(self.layers[position])

    def _keep(self, positions: list[int]) -> None:
        count = len(self.layers)
        self._parent._modules[self._name] = nn.ModuleList([self.layers[p] for p in positions])
        self._layer_ids = [self._layer_ids[p] for p in positions]
        _cut_config(self.config, positions, count)
        renumber = {old: new for new, old in enumerate(positions)}
        for module, name, value in _layer_indices(self.layers):
            setattr(module, name, renumber[value])

    # ------------------------------------------------------------------ proof

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        return {
            k: v.to(self.device, dtype=torch.long if k == "input_ids" else None, non_blocking=True)
            for k, v in inputs.items()
            if v is not None
        }

    @contextlib.contextmanager
    def _stack_replaced(self, layers: nn.ModuleList) -> Iterator[None]:
        before = self.layers
        self._parent._modules[self._name] = layers
        try:
            yield
        finally:
            self._parent._modules[self._name] = before

    def _probe(self) -> Tensor:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        # Two short inputs of ordinary ids; fixed, so that the proof is the same at every load.
        return (torch.arange(14, device=self.device).reshape(2, 7) * 7919 + 11) % min(vocabulary, 30_000)

    @torch.no_grad()
    def _learn_return_kind(self) -> None:
        kinds: list[bool] = []
        hooks = [
            layer.register_forward_hook(lambda m, a, out: kinds.append(isinstance(out, tuple)))
            for layer in self.layers
        ]
        try:
            self.model(input_ids=self._probe(), use_cache=False)
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not run on plain token ids: {error}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        if len(kinds) != len(self.layers):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} called its decoder layers {len(kinds)} times in one pass, "
                f"expected {len(self.layers)}: ildlab needs a plain stack, each layer run once."
            )
        self._tuple_out = kinds[0]

    @torch.no_grad()
    def _prove(self) -> None:
        name = type(self.model).__name__
        ids = self._probe()
        want = self.model(input_ids=ids, use_cache=False).logits.float()
        try:
            got = self.logits(self.final(ids)).float()
        except (UnsupportedModelError, RuntimeError, TypeError, IndexError, KeyError, AttributeError) as error:
            raise UnsupportedModelError(f"Replaying the decoder layers of {name} failed: {error}") from error
        error = (want - got).abs().max()
        # The tail sees one token at a time, which may round its matrix product in another order.
        limit = 1e-4 * (1 + want.abs().max())
        if self.model.dtype in (torch.bfloat16, torch.float16):
            limit = limit * 200
        if not bool(error <= limit):
            raise UnsupportedModelError(
                f"Replaying the decoder layers of {name} gives other logits than the model (by {error:.3g}): "
                "it carries state between layers that ildlab does not see."
            )


def shared_prefix(student: LayerStack, teacher: LayerStack) -> int:
    """Count the bottom layers that student and teacher have in common, ids and weights alike.

    Their hidden states are equal there, so that one pass serves both.
    """
    count = 0
    for mine, theirs, my_id, their_id in zip(
        student.layers, teacher.layers, student.layer_ids, teacher.layer_ids, strict=False
    ):
        same = my_id == their_id and all(
            a is b or (a.device.type != "meta" and a.data_ptr() == b.data_ptr())  # meta: offloaded, no address
            for a, b in zip(mine.parameters(), theirs.parameters(), strict=True)
        )
        if not same:
            break
        count += 1
    return count


# ---------------------------------------------------------------- finding


def _text_config(model: nn.Module):
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no config: give a causal LM of transformers.")
    text = config.get_text_config()
    if getattr(text, "num_hidden_layers", None) is None:
        raise UnsupportedModelError(f"The config of {type(model).__name__} does not say num_hidden_layers.")
    return text


def _find_layers(model: nn.Module, count: int) -> tuple[nn.Module, str]:
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model: ildlab compresses decoder-only causal LMs."
        )
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, nn.ModuleList)
        and len(child) == count
        and len({type(layer) for layer in child}) <= 4
        and all(any(True for _ in layer.parameters()) for layer in child)
    ]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds no list of {count} modules (its num_hidden_layers): "
            "the decoder layers were not found."
        )
    # Lists of the same length (experts, say) may lie deeper: the decoder layers hold the most weights.
    return max(found, key=lambda at: sum(p.numel() for p in at[0]._modules[at[1]].parameters()))


def _split_hidden(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    if args:
        return args[0], args[1:], dict(kwargs)
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), (), kwargs


@contextlib.contextmanager
def _forward_replaced(layer: nn.Module, forward) -> Iterator[None]:
    # accelerate's offload hooks also live in the instance's __dict__: put back exactly what was there.
    before, compiled = layer.__dict__.get("forward"), layer._compiled_call_impl
    layer.forward, layer._compiled_call_impl = forward, None  # a compiled layer would compile this stand-in
    try:
        yield
    finally:
        layer._compiled_call_impl = compiled
        if before is None:
            del layer.__dict__["forward"]
        else:
            layer.__dict__["forward"] = before


# ----------------------------------------------------------------- config

_INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
_NAMING = ("full_attn_idxs", "moe_layers", "mlp_only_layers", "attn_layer_indices", "cross_attention_layers")
_THRESHOLDS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")


def _layer_indices(layers: nn.ModuleList) -> list[tuple[nn.Module, str, int]]:
    """Every attribute in the layers by which a submodule knows its layer's position."""
    found = []
    for layer in layers:
        for module in layer.modules():
            for name in _INDEX_NAMES:
                value = module.__dict__.get(name)
                if isinstance(value, int):
                    found.append((module, name, value))
    return found


def _config_entries(config) -> dict[str, Any]:
    return {k: (list(v) if isinstance(v, list) else v) for k, v in config.__dict__.items()}


def _restore_config(config, entries: dict[str, Any]) -> None:
    for name in list(config.__dict__):
        if name not in entries:
            del config.__dict__[name]
    config.__dict__.update(entries)


def _cut_config(config, positions: list[int], count: int) -> None:
    """Make the config true of a stack that keeps `positions` out of `count` layers."""
    renumber = {old: new for new, old in enumerate(positions)}
    for name, value in list(config.__dict__.items()):
        if name in _NAMING and isinstance(value, (list, tuple)):
            config.__dict__[name] = [renumber[v] for v in value if v in renumber]
        elif name in _THRESHOLDS and isinstance(value, int):
            config.__dict__[name] = sum(1 for p in positions if p < value)
        elif isinstance(value, (list, tuple)) and len(value) == count and not name.endswith(("_ids", "_id")):
            config.__dict__[name] = [value[p] for p in positions]
    if getattr(config, "attention_layers", None) and getattr(config, "attention_types", None):
        # GPT-Neo writes the same list a second time, folded: [[[types], repeats]].
        config.attention_types = [[list(config.attention_layers), 1]]
    config.num_hidden_layers = len(positions)
