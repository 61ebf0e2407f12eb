"""Floating point operations of GeoDiT: matrix products, two operations for a multiply and add."""

from __future__ import annotations

from geodit_jax.config import GeoDiTConfig, TextConfig, TowerConfig
from geodit_jax.image_layout import max_image_tokens, max_views


def tower_flops(tower: TowerConfig) -> float:
    """Features of one view."""
    tokens = tower.grid**2
    block = 4 * tower.width**2 + 2 * tower.width * tower.mlp
    attention = 2 * tokens * tower.width
    patches = 3 * tower.patch**2 * tower.width
    return 2.0 * tokens * (tower.layers * (block + attention) + patches)


def projector_flops(config: GeoDiTConfig) -> float:
    """Projected tokens of one view."""
    width = config.text.width
    return 2.0 * config.tower.grid**2 * (config.tower.width * width + width**2)


def core_flops(text: TextConfig, length: int) -> float:
    """Hidden states of a sequence of `length` tokens that all see each other."""
    kv = text.kv_heads * text.head_width
    block = 2 * text.width**2 + 2 * text.width * kv + 3 * text.width * text.mlp
    return 2.0 * length * text.layers * (block + 2 * length * text.width)


def head_flops(text: TextConfig, rows: float) -> float:
    """Logits of `rows` tokens."""
    return 2.0 * rows * text.width * text.vocab_rows


def count_training_flops(
    config: GeoDiTConfig,
    text_length: int,
    stage: str,
    blind: bool = False,
    complementary: bool = False,
) -> float:
    """One training example of full length, forward and backward, nothing computed twice.

    A part that is trained costs three forward passes; one that is frozen and hands a gradient on to
    trained parts two; one that no gradient enters one. The head is counted for half of the text
    positions, the masked ones, at most. stage `adapters`: only those of the core are trained; their
    own products are left out (a hundredth of the core's at rank 16). complementary: the core sees
    every example twice, with a mask and with its complement, its picture once.
    """
    image = projector = 0.0
    length = text_length
    if config.tower is not None and not blind:
        length += max_image_tokens(config)
        image = max_views(config) * tower_flops(config.tower)
        projector = max_views(config) * projector_flops(config)
    text = core_flops(config.text, length) + head_flops(config.text, text_length / 2)
    text *= 1 + complementary
    if stage == "adapters":
        return image + projector + 2 * text
    if stage == "align":
        return image + 3 * projector + 2 * text
    return 3 * (image + projector + text)
