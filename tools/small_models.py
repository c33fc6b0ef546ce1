"""Small random models of every type of causal LM that transformers knows: what the matrix of models is run on."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS, VOCABULARY, WINDOW, LARGEST = 6, 97, 8, 12_000_000
KINDS = tuple(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in CONFIG_MAPPING)


def _each(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# What a config class calls its sizes; those that it has are set.
SIZES: dict[str, Any] = {
    **_each(LAYERS, "num_hidden_layers num_layers n_layer n_layers decoder_layers"),
    **_each(VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    **_each(128, "max_position_embeddings n_positions n_ctx max_seq_len"),
    **_each(
        32,
        "hidden_size n_embd d_model dim emb_dim embedding_size word_embed_proj_dim attn_hidden_size attention_hidden_size "
        "lru_width conv_dim bottleneck_size moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size mlp_expert_hidden_size",
    ),
    **_each(
        64,
        "intermediate_size ffn_dim ffn_hidden_size n_inner d_ff hidden_dim decoder_ffn_dim encoder_ffn_dim mamba_d_ssm "
        "dense_intermediate_size dense_ffn_hidden_size",
    ),
    **_each(
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads mamba_n_heads "
        "mamba_num_heads linear_num_value_heads qk_rope_head_dim rope_head_dim index_topk laurel_rank mamba_dt_rank "
        "time_step_rank num_experts num_local_experts n_routed_experts moe_num_experts",
    ),
    **_each(
        2,
        "num_key_value_heads encoder_layers index_n_heads num_experts_per_tok moe_topk moe_k altup_num_inputs mamba_expand "
        "expand linear_num_key_heads",
    ),
    **_each(
        8,
        "head_dim d_kv rotary_dim qk_nope_head_dim v_head_dim mamba_d_state state_size ssm_state_size linear_key_head_dim "
        "linear_value_head_dim key_length hidden_size_per_layer_input",
    ),
    **_each(
        16,
        "kv_lora_rank q_lora_rank index_head_dim mamba_d_head mamba_head_dim chunk_size mamba_chunk_size moe_latent_size",
    ),
    **_each(WINDOW, "sliding_window attention_chunk_size local_attention window_size attention_window_size"),
    **_each(
        1,
        "n_group topk_group num_expert_group mamba_n_groups n_groups zero_expert_num moe_num_shared_experts "
        "n_shared_experts bos_token_id",
    ),
    "qk_head_dim": 12,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_kv_shared_layers": 0,
    "is_decoder": True,
}
# Where a class leaves these None, that is a way of its own.
MAY_BE_NONE = "sliding_window attention_chunk_size num_key_value_heads head_dim q_lora_rank mamba_d_ssm n_inner rotary_dim".split()
LINEAR = {"full_attn_layers": [3, 6], "kda_layers": [1, 2, 4, 5], "head_dim": 8, "num_heads": 4}
SPECIAL: dict[str, dict[str, Any]] = {
    **{kind: {"head_dim": 8} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    **{kind: {"hidden_size_per_layer_input": 0} for kind in ("gemma4_text", "gemma4_unified_text")},
    "kimi_linear": {"linear_attn_config": LINEAR | {"short_conv_kernel_size": 4}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "reformer": {"axial_pos_embds": False},
    "roc_bert": dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 50)
    | dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 8),
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(kind: str) -> Any:
    """A small config of a model type; None where its text model is a type of its own."""
    cls = CONFIG_MAPPING[kind]
    default = cls()
    if default.get_text_config() is not default:
        return None
    told = default.to_dict()
    known = told | dict.fromkeys(inspect.signature(cls.__init__).parameters)
    values = {}
    for name, value in SIZES.items():
        own = cls.attribute_map.get(name)
        if own in SIZES or not (name in known or own):
            continue
        before = told.get(own or name)
        if (before is None and name in MAY_BE_NONE) or isinstance(before, (list, tuple, dict, str)):
            continue
        values[name] = value
    if "kv_lora_rank" in values:  # keys are of the rotary part, a head for each query
        values |= {name: 4 for name in ("head_dim", "num_key_value_heads") if name in values}
    values |= SPECIAL.get(kind, {})
    try:
        return cls(**values)
    except Exception:  # a default list by layer is of another depth
        depth = default.num_hidden_layers
        lists = {
            n: (list(v) * LAYERS)[:LAYERS] for n, v in told.items() if isinstance(v, (list, tuple)) and len(v) == depth
        }
        return cls(**values | lists)


def small_model(kind: str) -> torch.nn.Module | None:
    """A small random model of a type, on the CPU in fp32; None where its text model is a type of its own."""
    config = small_config(kind)
    if config is None:
        return None
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"its small config still makes {size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            scale = 0.6 / parameter.shape[-1] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    # As in a trained model: padding never had a gradient, and some families write zeros there whenever they are loaded.
    model.get_input_embeddings().weight[getattr(config, "pad_token_id", 0) or 0] = 0
    return model
