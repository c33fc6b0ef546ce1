"""LayerStack: replay, skip and remove, on the real model and on many families at random weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ildlab.errors import SessionError, UnsupportedModelError
from ildlab.model.shared import shared_prefix
from ildlab.model.stack import LayerStack

FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": 4}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 4}),
    "gemma3_text": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 4}),
    "phi3": ("Phi3Config", {}),
    "granite": ("GraniteConfig", {"logits_scaling": 3.0}),
    "smollm3": ("SmolLM3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "cohere": ("CohereConfig", {}),
    "gpt2": ("GPT2Config", {}),
    "gpt_neo": ("GPTNeoConfig", {"attention_types": [[["global", "local"], 3]], "window_size": 4}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
}


def family(name: str) -> nn.Module:
    import transformers

    config_name, extra = FAMILIES[name]
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if name not in ("gpt2", "gpt_neo", "opt"):
        sizes["intermediate_size"] = 64
    if name not in ("gpt2", "gpt_neo", "opt", "gpt_neox"):
        sizes["num_key_value_heads"] = 2
    config = getattr(transformers, config_name)(**sizes, **extra)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def prompt() -> torch.Tensor:
    return torch.tensor([[5, 9, 12, 7, 30, 41, 3, 8]])


def generate(model, use_cache: bool) -> torch.Tensor:
    ids = prompt()
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_replay_and_removal_without_family_code(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = family(name)
    stack = LayerStack(model)
    ids = prompt()
    want = model(ids, use_cache=False).logits
    assert torch.allclose(stack.logits(stack.final(ids)), want, atol=1e-5)

    with stack.without([1, 4]):
        skipped = model(ids, use_cache=False).logits
        assert torch.equal(generate(model, True), generate(model, False))
    assert torch.equal(model(ids, use_cache=False).logits, want)

    stack.remove(4)
    stack.remove(1)
    assert stack.layer_ids == [0, 2, 3, 5]
    assert torch.equal(model(ids, use_cache=False).logits, skipped)
    assert torch.equal(generate(model, True), generate(model, False))
    # The checkpoint is true: stock transformers builds the same model from the config alone.
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.allclose(again(ids, use_cache=False).logits, skipped, atol=1e-6)


def test_real_model_bit_for_bit(teacher):
    stack = LayerStack(teacher.model)
    ids = teacher.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        want = teacher.model(ids).logits
        assert torch.equal(stack.logits(stack.final(ids)), want)
        # h[L] is before the norm: the norm of it is what transformers calls the last hidden state.
        states = stack.hidden_states(ids)
        assert len(states) == 31
        reference = teacher.model.model(ids, output_hidden_states=True).hidden_states
        for ours, theirs in zip(states[:30], reference[:30], strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(teacher.model.model.norm(states[30]), reference[30])
        positions = torch.tensor([1, 3])
        assert torch.allclose(stack.logits(states[30][:, positions]), want[:, positions], atol=1e-4)


def test_padding_is_replayed(teacher):
    stack = LayerStack(teacher.model)
    teacher.tokenizer.padding_side = "right"
    batch = teacher.tokenizer(["A cat", "The quick brown fox jumps"], return_tensors="pt", padding=True)
    with torch.no_grad():
        want = teacher.model(**batch).logits
        got = stack.logits(stack.final(dict(batch)))
    assert torch.allclose(got, want, atol=1e-4)


def test_without_restores_after_an_exception(tiny):
    model = tiny(5)
    stack = LayerStack(model)
    ids = prompt()
    want = model(ids).logits
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ZeroDivisionError), stack.without([0, 3]):
        assert len(stack) == 3 and model.config.num_hidden_layers == 3
        raise ZeroDivisionError
    assert stack.layer_ids == [0, 1, 2, 3, 4]
    assert model.config.to_dict() == before
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3, 4]
    assert torch.equal(model(ids).logits, want)


def test_nested_without(tiny):
    stack = LayerStack(tiny(5))
    with stack.without(1), stack.without(3):
        assert stack.layer_ids == [0, 2, 4]
    assert stack.layer_ids == [0, 1, 2, 3, 4]


def test_share_and_own(tiny):
    teacher = LayerStack(tiny(5))
    student = teacher.share()
    assert shared_prefix(student, teacher) == 5
    student.remove(3)
    assert len(teacher) == 5 and teacher.model.config.num_hidden_layers == 5
    assert shared_prefix(student, teacher) == 3
    student.own([2])
    assert shared_prefix(student, teacher) == 2
    with torch.no_grad():
        for parameter in student.layers[2].parameters():
            parameter.add_(1)
    ids = prompt()
    assert torch.equal(teacher.model(ids).logits, tiny(5)(ids).logits)


def test_refusals(tiny):
    stack = LayerStack(tiny(3))
    with pytest.raises(SessionError, match="Layer 7 is not in the student"):
        stack.remove(7)
    stack.remove(1)
    with pytest.raises(SessionError, match="Layer 1 is not in the student"):
        stack.remove(1)
    with pytest.raises(SessionError, match="at least one"), stack.without([0, 2]):
        pass
    stack.remove(0)
    with pytest.raises(SessionError, match="one layer left"):
        stack.remove(2)
    assert stack.layer_ids == [2]
    with pytest.raises(UnsupportedModelError, match="no config"):
        LayerStack(nn.Linear(2, 2))


def test_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        LayerStack(model)


def test_hidden_coupling_between_layers_is_refused(tiny):
    """A model that carries state around its layers must not be replayed silently wrong."""
    model = tiny(4)
    inner = model.model

    def forward(*args, _forward=inner.forward, **kwargs):
        out = _forward(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + inner.layers[0].last
        return out

    def remember(module, args, output):
        module.last = output

    inner.layers[0].register_forward_hook(remember)
    inner.layers[0].last = 0.0
    inner.forward = forward
    with pytest.raises(UnsupportedModelError, match="other logits|failed"):
        LayerStack(model)


def test_html_shows_removed_layers(tiny):
    stack = LayerStack(tiny(4))
    stack.remove(2)
    html = stack._repr_html_()
    assert "<title>layer 2 (removed)" in html and "<title>layer 3; depth 3 of 3" in html


def passes(monkeypatch, model) -> list[int]:
    """A list that grows by one whenever a model of this class runs."""
    seen: list[int] = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *a, **k: seen.append(1) or forward(self, *a, **k))
    return seen


def test_the_final_state_alone_is_held(tiny, monkeypatch):
    """All of h[0..L] at one time would be the depth's worth of memory."""
    import gc

    stack = LayerStack(tiny(6))
    most = []

    def counted(position, hidden, trunk, run=stack.run):
        out = run(position, hidden, trunk)
        most.append(sum(type(o) is torch.Tensor and o.shape == (1, 11, 32) for o in gc.get_objects()))
        return out

    monkeypatch.setattr(stack, "run", counted)
    before = sum(type(o) is torch.Tensor and o.shape == (1, 11, 32) for o in gc.get_objects())
    stack.final(torch.arange(11)[None])
    assert max(most) - before <= 4  # the embedding's output, a layer's input and its output


def test_a_share_is_not_proven_again(tiny, monkeypatch):
    """The same modules: what was proven of them holds. With disk offload each proof would load all weights."""
    model = tiny(4)
    seen = passes(monkeypatch, model)
    teacher = LayerStack(model)
    assert len(seen) == 3  # the model, the embedding in front of the replay, the tail behind it
    student = teacher.share()
    student.remove(1)
    student.share()
    assert len(seen) == 3
    assert student.layer_ids == [0, 2, 3] and teacher.layer_ids == [0, 1, 2, 3]
    assert teacher.share().layers[0].mlp.up_proj.weight is teacher.layers[0].mlp.up_proj.weight


@pytest.mark.parametrize("part", ["model.embed_tokens", "model.norm", "lm_head"])
def test_a_student_that_differs_outside_its_layers_shares_nothing(tiny, part):
    """It had a KL of 0 and the teacher's perplexity: equal layers are not an equal model."""
    from ildlab.evaluate.text_quality import evaluate

    teacher = LayerStack(tiny(3))
    student = teacher.share()
    assert shared_prefix(student, teacher) == 3
    module = student.model.get_submodule(part)
    module.weight = nn.Parameter(module.weight.detach() * torch.linspace(0.2, 2, module.weight.shape[-1]), False)
    assert shared_prefix(student, teacher) == 0
    found = evaluate(student, teacher, torch.arange(60).reshape(3, 20), speed=False)
    assert found.kl > 0.01 and found.perplexity != pytest.approx(found.teacher_perplexity)


def test_the_fingerprint_is_kept_while_weights_do_not_change(tiny, monkeypatch):
    from ildlab.model import fingerprints

    made = []
    digest = fingerprints._digest
    monkeypatch.setattr(fingerprints, "_digest", lambda *a: made.append(1) or digest(*a))
    stack = LayerStack(tiny(3))
    name = fingerprints.fingerprint(stack)
    assert fingerprints.fingerprint(stack) == name and len(made) == 1
    twin = stack.share()
    assert fingerprints.fingerprint(twin) == name
    twin.remove(1)
    assert fingerprints.fingerprint(twin) != name
    stack.layers[0].mlp.up_proj.weight.mul_(1.5)  # in place, as an optimizer does
    assert fingerprints.fingerprint(stack) != name
    whole = LayerStack(tiny(3, dtype=torch.bfloat16))
    in_fp32 = LayerStack(tiny(3, dtype=torch.bfloat16).float())
    assert fingerprints.fingerprint(whole) != fingerprints.fingerprint(in_fp32)
    assert fingerprints.fingerprint(whole, any_dtype=True) == fingerprints.fingerprint(in_fp32, any_dtype=True)
