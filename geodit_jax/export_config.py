"""GeoDiTConfig -> config.json, in the spelling of LLaDA-V or of LLaDA."""

from __future__ import annotations

import dataclasses

from geodit_jax.config import GeoDiTConfig, TowerConfig
from geodit_jax.image_layout import pinpoints
from geodit_jax.published_config import OWN


def to_published(config: GeoDiTConfig) -> dict:
    """config.json in the spelling of LLaDA-V; `read_config` gives the same config back."""
    text, tower, tokens = config.text, config.tower, config.tokens
    raw = {
        "architectures": ["LlavaLLaDAModelLM" if tower else "LLaDAModelLM"],
        "model_type": "llava_llada" if tower else "llada",
        "hidden_size": text.width,
        "intermediate_size": text.mlp,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "vocab_size": text.vocab_rows,
        "rms_norm_eps": text.eps,
        "rope_theta": text.rope_theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": 16384,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "use_cache": False,
        **_token_keys(config),
        OWN: {
            "rope_cast": text.rope_cast,
            "max_tiles": config.max_tiles,
            "newline_on_single": config.newline_on_single,
            "prefix_lm": config.prefix_lm,
            "tokens": dataclasses.asdict(tokens),
        },
    }
    return raw if tower is None else raw | _tower_keys(config, tower)


def to_llada(config: GeoDiTConfig) -> dict:
    """config.json of the text core alone, in the spelling of LLaDA."""
    text = config.text
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "activation_type": "silu",
        "block_type": "llama",
        "d_model": text.width,
        "n_layers": text.layers,
        "n_heads": text.heads,
        "n_kv_heads": text.kv_heads,
        "mlp_hidden_size": text.mlp,
        "vocab_size": text.vocab_rows,
        "embedding_size": text.vocab_rows,
        "layer_norm_type": "rms",
        "rms_norm_eps": text.eps,
        "rope": True,
        "rope_theta": text.rope_theta,
        "rope_full_precision": text.rope_cast == "float32",
        "max_sequence_length": 4096,
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": False,
        **_token_keys(config),
        OWN: {
            "rope_cast": text.rope_cast,
            "prefix_lm": config.prefix_lm,
            "tokens": dataclasses.asdict(config.tokens),
        },
    }


def _token_keys(config: GeoDiTConfig) -> dict:
    tokens = config.tokens
    return {
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.eos,
        "mask_token_id": tokens.mask,
    }


def _tower_keys(config: GeoDiTConfig, tower: TowerConfig) -> dict:
    anyres = f"anyres_max_{config.max_tiles}" if config.max_tiles else "anyres"
    so400m = f"google/siglip2-so400m-patch{tower.patch}-{tower.image_size}"
    return {
        "image_aspect_ratio": anyres if config.image_mode == "anyres" else config.image_mode,
        "image_grid_pinpoints": [list(canvas) for canvas in pinpoints(config)],
        "mm_hidden_size": tower.width,
        "mm_newline_position": "grid",
        "mm_patch_merge_type": config.merge,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": so400m if tower.width == TowerConfig.width else "siglip",
        "tokenizer_model_max_length": 8192,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": tower.width,
            "intermediate_size": tower.mlp,
            "num_hidden_layers": tower.layers + 1,  # published configs count the dropped layer
            "num_attention_heads": tower.heads,
            "num_channels": 3,
            "image_size": tower.image_size,
            "patch_size": tower.patch,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": tower.eps,
            "attention_dropout": 0.0,
        },
    }


__all__ = ["to_llada", "to_published"]
