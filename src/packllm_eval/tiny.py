"""Tiny random models of every family in transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGES
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as SEQUENCES

VOCABULARY = 258
END = 257
MOST_PARAMETERS = 12_000_000

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "dim_model", "emb_dim", "embedding_dim"), 32),
    **dict.fromkeys(("embedding_size", "lru_width", "attention_hidden_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "dff", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 48
    ),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp", "block_ff_dim", "dim_ff", "d_inner"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "depth"), 4),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "global_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "lowrank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads", "rotary_dim", "laurel_rank"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "attention_chunk_size"), 8),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), None),
    **dict.fromkeys(("image_size", "out_hidden_size"), 32),
    **dict.fromkeys(("patch_size", "hidden_size_per_layer_input"), 8),
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "mamba_expand": 2,
    "initializer_range": 0.3,
}
"""Small values of the sizes in configurations, by their common names. Windows are shorter than the prompts."""

_IDS = {"bos_token_id": 0, "eos_token_id": END, "pad_token_id": 1}
_NEED_IDS = (
    *("camembert", "cwm", "data2vec-text", "modernbert-decoder", "prophetnet", "mllama_text_model", "roberta"),
    *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "emu3_text_model"),
)
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_NEED_SECTIONS = (
    *("glm46v_text", "glm4v_text", "glm4v_moe_text", "glm_ocr_text", "paddleocr_vl_text"),
    *("qwen2_5_vl_text", "qwen2_vl_text", "qwen2_5_omni_text"),
)
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 48}},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": {"pad_token_id": 0},
    "gemma4_unified_text": {"pad_token_id": 0},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2_vl": {"vision_config": {"embed_dim": 32, "depth": 1, "num_heads": 4, "hidden_size": 32}},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32]},
    "xlstm": {"qk_head_dim": 4, "v_head_dim": 8},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
    **{kind: dict(_IDS) for kind in _NEED_IDS},
    **{kind: dict(_SECTIONS) for kind in _NEED_SECTIONS},
}
"""Settings of single families, by model type."""


def families() -> dict[str, str]:
    """Model types of the causal, vision-language and encoder-decoder models in this version of transformers, each with
    its class name."""
    families: dict[str, str] = {}
    for names in (CAUSAL, IMAGES, SEQUENCES):
        for family, model in names.items():
            families[family] = model if isinstance(model, str) else model[0]
    return dict(sorted(families.items()))


def tiny_config(kind: type[Any], **settings: Any) -> Any:
    """A configuration of this class with small sizes, also in its parts."""
    default = kind()
    stored, renamed = default.to_dict(), getattr(kind, "attribute_map", {})
    values: dict[str, Any] = {}
    for key, value in SIZES.items():
        if (key not in stored and key not in renamed) or renamed.get(key) in SIZES:
            continue
        current = stored.get(renamed.get(key, key))
        optional = current is None and value is not None and key != "head_dim"  # None disables a feature
        if not optional and not isinstance(current, list | tuple | dict):
            values[key] = value
    if "qk_rope_head_dim" in stored and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name in getattr(kind, "sub_configs", None) or {}:
        if (part := getattr(default, name, None)) is not None:
            values[name] = tiny_config(type(part)).to_dict()
    return kind(**{**values, **SPECIAL.get(kind.model_type, {}), **settings})


def tiny_model(family: str, seed: int = 0) -> Any:
    """A model of a family with large random weights, so that its answers depend on the prompt.

    Raises:
        ValueError: its sizes cannot be made small enough.
    """
    kind = getattr(transformers, families()[family])
    config = tiny_config(CONFIG_MAPPING[family])
    with torch.device("meta"):
        size = sum(weight.numel() for weight in kind._from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters are left")
    torch.manual_seed(seed)
    model = kind._from_config(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "A_log" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    if (head := model.get_output_embeddings()) is not None:
        torch.nn.init.zeros_(head.weight[END:])  # no answer ends early
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, and two control tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|pad|>", "<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
