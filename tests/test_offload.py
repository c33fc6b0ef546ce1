"""Layers that accelerate keeps elsewhere: every figure is the one of the model in one place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ildlab import LayerStack, measure
from ildlab.evaluate import evaluate
from ildlab.importance import drift, logit_lens, redundancy, token_drift
from ildlab.model.offload import is_offloaded


def placed(model, folder, where: dict[int, str]) -> LayerStack:
    """The model anew from its checkpoint, with these layers on the CPU and on the disk, the rest on the "GPU" (a CPU here)."""
    from transformers import AutoModelForCausalLM

    model.save_pretrained(folder / "model")
    device_map = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    device_map |= {f"model.layers.{i}": where.get(i, "cpu") for i in range(model.config.num_hidden_layers)}
    away = AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=device_map, offload_folder=folder / "off", dtype=torch.float32
    )
    return LayerStack(away.eval().requires_grad_(False))


@pytest.fixture(params=[{1: "disk"}, {0: "disk", 1: "disk", 2: "disk", 3: "disk", 4: "disk"}], ids=["one", "all"])
def both(tiny, tmp_path, request):
    here = LayerStack(tiny(5))
    return here, placed(tiny(5), tmp_path, request.param)


def test_every_figure_is_that_of_the_model_in_one_place(both):
    here, away = both
    assert is_offloaded(away.layers) and not is_offloaded(here.layers)
    ids = (torch.arange(64).reshape(4, 16) * 7) % 90 + 3
    found = []
    for teacher in both:
        student = teacher.share()
        student.remove(2)
        text = evaluate(student, teacher, ids, speed=False)
        found.append(
            {
                "evaluate": [text.kl, text.perplexity, text.agreement],
                "drift": drift(student, teacher, ids)["drift"],
                "redundancy": redundancy(student, ids),
                "cka": redundancy(student, ids, "cka"),
                "tokens": token_drift(student, teacher, ids[0], None).to_numpy(float),
                "lens": logit_lens(student, ids[0], _Words(), teacher=teacher)["entropy"],
                "taylor": measure(student, ids, "taylor").table["score"],
                "kl": measure(student, ids, "kl", teacher, race=True).table["score"],
            }
        )
    for name, wanted in found[0].items():
        np.testing.assert_allclose(np.asarray(found[1][name], float), np.asarray(wanted, float), rtol=1e-5, atol=1e-6)


class _Words:
    """A tokenizer that only decodes."""

    def decode(self, ids):
        return str(ids)


def test_what_a_layer_gives_is_where_the_stack_is(tiny):
    """States of layers on several devices are stacked and compared: `run` brings each back (here from "meta")."""
    stack = LayerStack(tiny(3))
    trunk = stack.trunk(torch.arange(5)[None])
    seen = []

    class Elsewhere(torch.nn.Module):
        def forward(self, hidden, *args, **kwargs):
            return Moved(hidden)

    class Moved(torch.Tensor):
        @staticmethod
        def __new__(cls, data):
            return torch.Tensor._make_subclass(cls, data)

        def to(self, device):
            seen.append(device)
            return self

    stack.layers[1] = Elsewhere()
    stack.run(1, trunk.h0, trunk)
    assert seen == [stack.device]
