"""What a family's config can say: the student in memory is what its checkpoint will be, or the removal is refused."""

from __future__ import annotations

import pytest
import torch

from ildlab import LayerStack, PruningSession
from ildlab.errors import ExportError, SessionError
from ildlab.model.config_cut import cut_config, layer_lists
from ildlab.model.load import LoadedModel
from ildlab.model.twin import check_cuts, check_savable, cut_difference, difference
from tools.model_matrix import examine
from tools.small_models import small_model

# A part of docs/models.md: plain, packed in tuples, hybrids of attention and state space, experts, shared keys.
PASSING = (
    "llama",
    "gemma3_text",
    "mixtral",
    "bloom",
    "mpt",
    "bamba",
    "qwen3_next",
    "deepseek_v3",
    "gemma4_text",
    "gpt_bigcode",
)


@pytest.mark.parametrize("kind", PASSING)
def test_all_that_is_promised_of_a_model_holds(kind):
    found = examine(kind)
    assert found.verdict == "passes", found


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("minicpm3", r"residual_scale is 0\.\d+, and 0\.\d+ when it is built anew"),
        ("diffllama", "lambda_init is"),
        ("jamba", "by a rule, not by a list"),
    ],
)
def test_a_family_that_goes_by_a_rule_is_refused_before_anything_is_done(kind, words, tiny_folder, tmp_path):
    from transformers import AutoTokenizer

    with torch.no_grad(), pytest.raises(ExportError, match=words):
        check_cuts(LayerStack(small_model(kind)))
    loaded = LoadedModel(small_model(kind), AutoTokenizer.from_pretrained(tiny_folder), kind)
    with pytest.raises(ExportError, match=words):
        PruningSession.create(tmp_path / "run", loaded, text="python-docs", block=32)
    assert not (tmp_path / "run").exists()


def test_one_layer_like_no_other_stays_and_the_next_one_goes(tmp_path, tiny_folder, text_file, monkeypatch):
    """Layer 0 of this decoder has no norm: what is left without it the config cannot say."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_folder), small_model("modernbert-decoder")
    model.resize_token_embeddings(320, mean_resizing=False)
    settings = {"text": str(text_file), "block": 32, "calibration_tokens": 64, "train_tokens": 64, "eval_tokens": 64}
    with PruningSession.create(tmp_path / "run", LoadedModel(model, tokenizer, "m"), **settings) as session:
        with pytest.raises(SessionError, match=r"Layer 0 cannot be removed .*Take another"):
            session.remove(0)
        scores = session.measure("block_influence")
        monkeypatch.setattr(type(scores), "ranking", property(lambda self: [0, 3, 2, 1, 4, 5]))
        assert session.remove() == 3 and session.removed == [3]


def test_a_hybrid_keeps_what_its_cache_needs():
    """Without its only layer of full attention the cache cannot count positions; the original can."""
    stack = LayerStack(small_model("bailing_hybrid"))
    assert "KV cache" in cut_difference(stack, 5) and cut_difference(stack, 1) == ""


def test_a_list_as_long_as_the_stack_by_chance_is_left_alone():
    from transformers import Gemma3TextConfig, Mamba2Config

    two = Mamba2Config(num_hidden_layers=2)
    assert len(two.time_step_limit) == 2 and "time_step_limit" not in layer_lists(two)
    before = list(two.time_step_limit)
    cut_config(two, [1], layer_lists(two))
    assert list(two.time_step_limit) == before and two.num_hidden_layers == 1
    assert layer_lists(Gemma3TextConfig(num_hidden_layers=4)) == {"layer_types"}


def test_what_single_layers_have_of_their_own_is_renumbered():
    from transformers import LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=4, per_layer_config={1: {"intermediate_size": 96}, 3: {"intermediate_size": 80}}
    )
    before = config._heterogeneity_spec
    cut_config(config, [0, 2, 3], layer_lists(config))
    assert config._heterogeneity_spec.per_layer_overrides == {2: {"intermediate_size": 80}}
    assert before.per_layer_overrides == {1: {"intermediate_size": 96}, 3: {"intermediate_size": 80}}
    assert config.to_dict()["per_layer_config"] == {"2": {"intermediate_size": 80}}


def test_a_model_pruned_by_hand_is_renumbered(tiny):
    model = tiny(5)
    del model.model.layers[1]
    model.config.num_hidden_layers = 4
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 2, 3, 4]
    stack = LayerStack(model)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    with stack.without(2):
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    stack.remove(0)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


@pytest.mark.parametrize("kind", ["bare", "tuple", "list"])
def test_layers_answer_in_their_own_form(kind, tiny):
    """Some return a tuple or a list with more beside the hidden state: recorder and stub do so too."""
    model, ids = tiny(4), torch.arange(3, 12)[None]
    want = model(ids, use_cache=False).logits
    more = {"bare": lambda h: h, "tuple": lambda h: (h, None, None), "list": lambda h: [h, None]}[kind]
    seen = []

    class Layer(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden, *args, **kwargs):
            if kind != "bare" and not isinstance(hidden, torch.Tensor):  # as the family's own loop unpacks it
                seen.append(len(hidden))
                hidden = hidden[0]
            return more(self.inner(hidden, *args, **kwargs))

    class Norm(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            return self.inner(hidden if isinstance(hidden, torch.Tensor) else hidden[0])

    model.model.layers = torch.nn.ModuleList(map(Layer, model.model.layers))
    model.model.norm = Norm(model.model.norm)
    stack = LayerStack(model)
    assert torch.allclose(stack.logits(stack.final(ids)), want, atol=1e-5)
    assert set(seen) <= {len(more(want))} if kind != "bare" else not seen


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda model: setattr(model, "peft_config", {"default": None}), "merge_and_unload"),
        (lambda model: setattr(model, "_hf_peft_config_loaded", True), "merge_and_unload"),
        (lambda model: setattr(model.config, "quantization_config", {"quant_method": "fp8"}), "is quantised"),
        (lambda model: setattr(model.config, "_output_attentions", True), "output_attentions"),
        (lambda model: setattr(model.config, "rms_norm_eps", 0.5), "would be another model"),
    ],
)
def test_create_refuses_what_could_not_be_exported(spoil, words, tiny, tiny_folder, tmp_path):
    from transformers import AutoTokenizer

    model = tiny(4, vocab=320)
    spoil(model)
    loaded = LoadedModel(model, AutoTokenizer.from_pretrained(tiny_folder), "tiny")
    with pytest.raises(ExportError, match=words):
        PruningSession.create(tmp_path / "run", loaded, text="python-docs", block=32)
    assert not (tmp_path / "run").exists()


def test_a_temperature_without_sampling_is_no_fault(tiny, tmp_path):
    """Llama 2 comes with one, which transformers refuses to save."""
    from ildlab.session.export import save

    model = tiny(4)
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
    stack = LayerStack(model)
    check_savable(stack)
    assert difference(stack) == ""

    class Nothing:
        def save_pretrained(self, folder):
            pass

    save(stack, Nothing(), tmp_path / "saved", torch.float32, teacher="tiny")
    assert model.generation_config.temperature == 0.6
