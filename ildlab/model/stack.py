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

import torch
from torch import Tensor, nn

from ildlab.drawing.columns import columns_of
from ildlab.drawing.stack import Picture
from ildlab.errors import SessionError, UnsupportedModelError
from ildlab.limits import check_ids, check_length
from ildlab.model.capture import Captured, Stub, Trunk, forward_replaced, sent, shape_of, split_hidden
from ildlab.model.config_cut import (
    config_entries,
    cut_config,
    layer_indices,
    layer_lists,
    number_by_position,
    restore_config,
)
from ildlab.model.find import find_layers, text_config
from ildlab.model.offload import is_offloaded
from ildlab.model.proof import what_is_odd
from ildlab.model.stacked import learned

Batch = Tensor | Mapping[str, Tensor]


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
        self._attach(model)
        recorded = (getattr(self.config, "ildlab", None) or {}).get("layer_ids")
        ids = list(layer_ids) if layer_ids is not None else list(recorded or range(len(self.layers)))
        if len(ids) != len(self.layers) or len(set(ids)) != len(ids):
            raise UnsupportedModelError(
                f"The model has {len(self.layers)} decoder layers, but {len(ids)} layer ids were given: {ids}."
            )
        self._layer_ids = ids
        self._lists = layer_lists(self.config)
        number_by_position(self.layers)  # a model that was pruned by hand may have its old numbers still
        self._prove()

    def _attach(self, model: nn.Module) -> None:
        self.model = model
        self.config = text_config(model)
        self._parent, self._name = find_layers(model, self.config.num_hidden_layers)
        self._fingerprints: dict = {}  # kept by ildlab.model.fingerprints

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
        return Picture(columns_of(range(top), here=self._layer_ids), f"{len(self)} layers").html()

    # --------------------------------------------------------------- replaying

    def trunk(self, batch: Batch) -> Trunk:
        """Run the embedding only, and capture what the model hands to each layer.

        `batch` is a Tensor [B, T] of token ids, or a mapping with `input_ids` and `attention_mask`.
        """
        inputs = self._inputs(batch)
        calls: list[tuple[tuple, dict]] = []
        first: list[Tensor] = []
        last = len(self.layers) - 1

        def recorder(index: int):
            def record(*args, **kwargs):
                hidden, args, kwargs = split_hidden(args, kwargs)
                if not first:
                    first.append(hidden)
                calls.append((args, kwargs))
                if index == last:
                    raise Captured
                return self._answer(hidden)

            return record

        with contextlib.ExitStack() as restore:
            for index, layer in enumerate(self.layers):
                restore.enter_context(forward_replaced(layer, recorder(index)))
            with contextlib.suppress(Captured):
                self.model(**inputs, use_cache=False)
        if len(calls) != len(self.layers):
            raise UnsupportedModelError(
                f"The model called {len(calls)} of its {len(self.layers)} decoder layers in one pass."
            )
        return Trunk(first[0], calls, inputs.get("attention_mask"), inputs["input_ids"])

    def run(self, position: int, hidden: Tensor, trunk: Trunk) -> Tensor:
        """Run the layer at `position` on a hidden state [B, T, d], as the model would."""
        args, kwargs = trunk.calls[position]
        # Over several devices accelerate's hooks bring what a layer is given to the layer; what comes out is brought back,
        # so that hidden states of all layers can be stacked and compared. On one device this does nothing.
        out = self.layers[position](hidden, *args, **kwargs)
        return (out[0] if isinstance(out, (tuple, list)) else out).to(self.device)

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
        for last in self.walk(batch):
            pass  # one at a time: a list of all would hold the whole depth in memory
        return last

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final hidden states h[L] [..., d], pre-norm, in the model's dtype.

        They go through the model's own norm, head, soft-cap and scaling. Gradients flow to `hidden`.
        """
        # A batch of single tokens, so that no attention mask between them is ever built.
        flat = hidden.reshape(-1, 1, hidden.shape[-1])  # [..., d] -> [N, 1, d]
        ids = torch.zeros(flat.shape[:2], dtype=torch.long, device=self.device)
        stub = Stub(self.layers[0], self._answer)
        stub.hidden = flat
        with self._stack_replaced(nn.ModuleList([stub])):
            out = self.model(input_ids=ids, use_cache=False).logits
        return out.reshape(*hidden.shape[:-1], out.shape[-1]).to(self.device)  # [N, 1, V] -> [..., V]

    # ------------------------------------------------------ skipping, removing

    @contextlib.contextmanager
    def without(self, layer_ids: int | Iterable[int]) -> Iterator[LayerStack]:
        """Run the model without some layers for as long as the context lasts.

        Nothing is copied. Inside, the model is the pruned model, KV-cache generation included; after
        it, even after an exception, the model is whole again.
        """
        gone = {layer_ids} if isinstance(layer_ids, int) else set(layer_ids)
        for layer_id in gone:
            self.position(layer_id)
        if len(gone) == len(self):
            raise SessionError("Without all of its layers there is no model left: leave at least one.")
        before = (self.layers, self._layer_ids, config_entries(self.config), layer_indices(self.layers))
        try:
            self._keep([p for p, layer_id in enumerate(self._layer_ids) if layer_id not in gone])
            yield self
        finally:
            layers, self._layer_ids, entries, indices = before
            self._parent._modules[self._name] = layers
            restore_config(self.config, entries)
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

    def share(self, without: Iterable[int] = ()) -> LayerStack:
        """A second model, without some layers, that shares every weight with this one: a student at no cost in memory.

        The two may then differ in their layers (`remove`) and, after `own`, in their weights.
        """
        memo = {id(t): t for t in itertools.chain(self.model.parameters(), self.model.buffers())}
        twin = copy.copy(self)
        twin._attach(copy.deepcopy(self.model, memo))  # the same modules again: what was proven of them holds
        twin._layer_ids = list(self._layer_ids)
        for layer_id in without:
            twin.remove(layer_id)
        return twin

    def own(self, layer_ids: Iterable[int]) -> None:
        """Give these layers weights of their own, equal to the shared ones, so that they may change."""
        for position in [self.position(layer_id) for layer_id in layer_ids]:
            self.layers[position] = copy.deepcopy(self.layers[position])

    def _keep(self, positions: list[int]) -> None:
        kept = nn.ModuleList([self.layers[p] for p in positions])
        kept.training = self.layers.training
        self._parent._modules[self._name] = kept
        self._layer_ids = [self._layer_ids[p] for p in positions]
        cut_config(self.config, positions, self._lists)
        number_by_position(self.layers)

    # ------------------------------------------------------------------ proof

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        if inputs.get("position_ids") is None:  # a packed tree is as long as its longest branch, not as its row
            check_length(self.model, inputs["input_ids"].shape[-1])
        if inputs["input_ids"].device.type == "cpu":  # on a GPU it would wait for the device
            check_ids(self.model, inputs["input_ids"])
        return {k: sent(v.long() if k == "input_ids" else v, self.device) for k, v in inputs.items() if v is not None}

    @contextlib.contextmanager
    def _stack_replaced(self, layers: nn.ModuleList) -> Iterator[None]:
        before = self.layers
        self._parent._modules[self._name] = layers
        try:
            yield
        finally:
            self._parent._modules[self._name] = before

    def probe(self) -> Tensor:
        """Token ids [2, 7] that a model is tried on."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        # Two short inputs of ordinary ids; fixed, so that the proof is the same at every load.
        return (torch.arange(14, device=self.device).reshape(2, 7) * 7919 + 11) % min(vocabulary, 30_000)

    def _seen_whole(self, ids: Tensor) -> Tensor:
        """Logits of the model as it is, and on the way what each layer returns: a tensor, or a tuple."""
        name, kinds = type(self.model).__name__, []
        hooks = [layer.register_forward_hook(lambda m, a, out: kinds.append(shape_of(out))) for layer in self.layers]
        try:
            logits = self.model(input_ids=ids, use_cache=False).logits
        except Exception as error:
            raise UnsupportedModelError(f"{name} does not run on plain token ids: {error}") from error
        finally:
            for hook in hooks:
                hook.remove()
        if len(kinds) != len(self.layers):
            raise UnsupportedModelError(
                what_is_odd(self.model)
                or f"{name} called its decoder layers {len(kinds)} times in one pass, expected {len(self.layers)}: ildlab "
                "needs a plain stack, each layer run once."
            )
        self._answer = kinds[0]
        return logits.float().to(self.device)

    @torch.no_grad()
    def _prove(self) -> None:
        name = type(self.model).__name__
        ids = self.probe()
        want = self._seen_whole(ids)
        try:
            got = self.logits(self.final(ids)).float()
            error = (want - got).abs().max()
        except Exception as error:  # whatever a family does where its layers are replayed
            odd = what_is_odd(self.model, want)
            raise UnsupportedModelError(odd or f"Replaying the decoder layers of {name} failed: {error}") from error
        # The tail sees one token at a time, which may round its matrix product in another order.
        limit = 1e-4 * (1 + want.abs().max())
        if self.model.dtype in (torch.bfloat16, torch.float16):
            limit = limit * 200
        if not error <= limit < float("inf"):
            raise UnsupportedModelError(
                what_is_odd(self.model, want, got)
                or f"Replaying the decoder layers of {name} gives other logits than the model (by {error:.3g}): "
                "it carries state between layers that ildlab does not see."
            )
        # Where branches run as one larger batch (see `ildlab.importance.sweep`), which no offloaded layer does.
        self.stacking = learned(self) if self.device.type == "cuda" and not is_offloaded(self.layers) else None
