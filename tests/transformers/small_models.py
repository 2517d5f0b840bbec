"""Configs of every causal model of the installed transformers, made so small that a model is built in milliseconds."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Fields that a config may have, and what they are set to where it does.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "lru_width", "emb_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions", "n_inner", "unpadded_vocab_size"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("head_dim", "v_head_dim", "global_head_dim", "mamba_d_head"), 16),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 1),
    **dict.fromkeys(("num_key_value_heads", "linear_num_value_heads", "linear_num_key_heads", "mamba_expand"), 2),
    "linear_num_heads": 2,
    **dict.fromkeys(
        ("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "ssm_state_size"), 8
    ),
    **dict.fromkeys(("attention_dropout", "attn_pdrop"), 0.0),
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),  # sharp enough that what is attended to matters
    "mamba_n_heads": 4,
    "mamba_d_ssm": 64,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "alibi": False,
    "use_mamba_kernels": False,
    "sliding_window": None,
}
WINDOW = 8  # of sliding windows, less than a prompt

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {
    "indexer_compress_ratio": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
}
_GEMMA4 = {
    "model_type": "gemma4_text",
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 2,
}

# What kinds of models need besides, or instead; ``...``: as their config's constructor has it.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "num_hidden_layers": 2, "local_attention_window_len": None},
    "codegen": {"n_head": 4},  # which older versions divide by 4
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {**_ROPE, "mrope_section": [4, 2, 2]}},
        "sliding_window": WINDOW,
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dory": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        **dict.fromkeys(("n_input_layers", "n_recurrent_layers", "n_output_layers"), 1),
        "sliding_window": WINDOW,
    },
    "dots3_note_text": {"layer_types": ["indexed_attention", "sliding_attention"]},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [32] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_assistant": {"text_config": _GEMMA4},
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_unified_assistant": {"text_config": {**_GEMMA4, "model_type": "gemma4_unified_text"}},
    "gpt_neo": dict.fromkeys(SMALL, ...),  # it compares one of its sizes with another that is not small
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": dict.fromkeys(("num_layers_per_stack", "H_cycles", "L_cycles"), 1),
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "laguna": {"num_attention_heads_per_layer": [2, 2]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"moe_topk": 2, "zero_expert_num": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "mimo_v2_flash": {"num_key_value_heads": 1},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
    },
    "qwen2_moe": {"sliding_window": WINDOW},
    "qwen4_exp": _INDEXER,
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": WINDOW},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 64,
        "attention_head_dim": 32,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "kv_channels": 16,
        "num_query_groups": 2,
        "hybrid_layer_ids": [1],
    },
}

# Kinds that cannot be built where these tests run: what their class raises, a word of it, and why.
NOT_BUILT: dict[str, tuple[type[Exception], str, str]] = {
    "gemma3n": (ImportError, "timm", "its vision tower needs the package timm, which is not installed"),
}

_LAYERS = ("layer_types", "mlp_layer_types", "layers_block_type")
MOST_PARAMETERS = 2e7


def kinds() -> list[str]:
    """``config.model_type`` of every model that ``AutoModelForCausalLM`` knows."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _shrink(config: Any, own: dict[str, Any]) -> Any:
    for name in config.sub_configs or {}:
        if getattr(config, name, None) is not None and name not in own:
            _shrink(getattr(config, name), {})
    fields = config.to_dict()
    for name, small in SMALL.items():
        if name in fields and own.get(name) is not ...:
            _set(config, name, small)
    if "qk_rope_head_dim" in fields:
        config.head_dim = 8
    for name in _LAYERS:
        if name not in own and isinstance(fields.get(name), (list, tuple)):
            different = list(dict.fromkeys(type(config)().to_dict()[name]))  # one layer of each kind
            setattr(config, name, (different * 2)[:2])
    for name, value in own.items():
        if value is not ... and name not in config.sub_configs:
            setattr(config, name, value)
    return config


def _set(config: Any, name: str, small: Any) -> None:
    if name == "sliding_window" and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        small = WINDOW
    elif isinstance(small, float) and type(getattr(config, name, None)) is int:  # some fields take ints alone
        small = int(small)
    try:
        setattr(config, name, small)
    except StrictDataclassFieldValidationError:  # it always has a window
        assert name == "sliding_window", name
        setattr(config, name, WINDOW)


def _in_words_of(default: Any, name: str, own: Any) -> Any:
    """Kinds of layers as older versions call them, of which a config's own tell."""
    if name not in _LAYERS:
        return own
    layers = getattr(default, name, None)
    is_older = "mamba" in layers if layers else hasattr(default, "layers_block_type")
    if not is_older:
        return own
    return [{"linear_attention": "mamba", "full_attention": "attention"}.get(each, each) for each in own]


@cache
def class_and_config(kind: str) -> tuple[Any, Any]:
    """The class of a kind of model, and its config."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    config_class, own = CONFIG_MAPPING[kind], OWN.get(kind, {})
    try:
        default = config_class(**{name: value for name, value in own.items() if name == "text_config"})
    except (TypeError, ValueError, StrictDataclassFieldValidationError):  # older versions have no default parts
        config_class = model_class.config_class
        default = config_class()
    known = default.to_dict()
    own = {name: _in_words_of(default, name, value) for name, value in own.items()}
    given = {name: small for name, small in SMALL.items() if name in known and small is not None} | own
    config = config_class(**{name: value for name, value in given.items() if value is not ...})
    if not hasattr(config, "pad_token_id"):  # which some models of transformers 5.0 read all the same
        config.pad_token_id = None
    if model_class.config_class is not config_class:  # the class takes the text part alone
        config = config.get_text_config(decoder=True)
    return model_class, _shrink(config, {} if kind == "gpt_neo" else own)


_SMALL: set[str] = set()


def build(kind: str, implementation: str) -> Any:
    """A small model of this kind, the same at every call."""
    model_class, config = class_and_config(kind)
    if kind not in _SMALL:  # which its config does not tell; refused models are refused here
        try:
            with torch.device("meta"):
                model = model_class._from_config(config, attn_implementation=implementation)
        except NotImplementedError:  # older versions of Apertus read what they have just made
            model = model_class._from_config(config, attn_implementation=implementation)
        size = sum(each.numel() for each in model.parameters())
        assert size <= MOST_PARAMETERS, f"{kind}: {size:.0e} parameters"
        _SMALL.add(kind)
    torch.manual_seed(0)
    return model_class._from_config(config, attn_implementation=implementation).eval()
