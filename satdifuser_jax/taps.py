"""Which intermediate maps of the UNet become features, named as the published configs name them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from satdifuser_jax.unet import DOWN_TYPES, UP_TYPES, UNetConfig

MODULES = {
    "attn1": "attentions.{}.transformer_blocks.0.attn1",
    "attn2": "attentions.{}.transformer_blocks.0.attn2",
    "conv2": "resnets.{}.conv2",
}
PUBLISHED_LAYERS = {"up_blocks": {"attn1": "all", "conv2": "all"}}


@dataclasses.dataclass(frozen=True)
class Scale:
    """Taps that share one side, in the published order; features join them on channels."""

    side: int
    taps: tuple[str, ...]
    channels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Block:
    """One block of the UNet: where its maps are and how many of each kind it has."""

    name: str
    level: int
    resnets: int
    transformers: int


def select_taps(config: UNetConfig, layers: Mapping, side: int) -> tuple[Scale, ...]:
    """Scales, fine to coarse, chosen by the published `layer_idxs` for latents of `side` pixels.

    `layers` is {"up_blocks": {"attn1": "all", "conv2": [[0, 1], ...]}, ...}: groups down_blocks,
    mid_block, up_blocks; modules attn1, attn2, conv2; "all" or pairs (block, index in the block).
    The order is that of the published extractor: group by group, block by block, modules as
    listed, then grouped by side. Raises ValueError naming what exists for an unknown choice.
    """
    factor = 2 ** (config.levels - 1)
    if side % factor:
        raise ValueError(
            f"latent side {side} is not divisible by {factor} ({config.levels} levels)"
        )
    by_side: dict[int, list[tuple[str, int]]] = {}
    for group, modules in layers.items():
        blocks = _blocks(config, group)
        for module, choice in modules.items():
            _check_choice(group, module, choice, blocks)
        for index, block in enumerate(blocks):
            for module, choice in modules.items():
                for j in range(_count(block, module)):
                    if choice == "all" or [index, j] in [list(pair) for pair in choice]:
                        name = f"{block.name}.{MODULES[module].format(j)}"
                        channels = config.block_out_channels[block.level]
                        by_side.setdefault(side >> block.level, []).append((name, channels))
    if not by_side:
        raise ValueError(f"layers={dict(layers)} selects no tap")
    return tuple(
        Scale(key, tuple(n for n, _ in by_side[key]), tuple(c for _, c in by_side[key]))
        for key in sorted(by_side, reverse=True)
    )


def list_taps(config: UNetConfig) -> Iterator[str]:
    """Names of all taps that this UNet can return."""
    for group in ("down_blocks", "mid_block", "up_blocks"):
        for block in _blocks(config, group):
            for module, pattern in MODULES.items():
                for j in range(_count(block, module)):
                    yield f"{block.name}.{pattern.format(j)}"


def _blocks(config: UNetConfig, group: str) -> list[_Block]:
    layers, last = config.layers_per_block, config.levels - 1
    if group == "down_blocks":
        return [
            _Block(f"down_blocks.{i}", i, layers, layers * DOWN_TYPES[kind])
            for i, kind in enumerate(config.down_block_types)
        ]
    if group == "mid_block":
        return [_Block("mid_block", last, 2, 1)]
    if group == "up_blocks":
        return [
            _Block(f"up_blocks.{i}", last - i, layers + 1, (layers + 1) * UP_TYPES[kind])
            for i, kind in enumerate(config.up_block_types)
        ]
    raise ValueError(f"unknown tap group {group!r}; there are down_blocks, mid_block, up_blocks")


def _count(block: _Block, module: str) -> int:
    return block.resnets if module == "conv2" else block.transformers


def _check_choice(group: str, module: str, choice, blocks: list[_Block]) -> None:
    if module not in MODULES:
        raise ValueError(f"unknown tap module {group}.{module}; there are {', '.join(MODULES)}")
    if choice == "all":
        return
    if isinstance(choice, str) or choice is None:
        raise ValueError(f"{group}.{module}={choice!r}: give 'all' or pairs [block, index]")
    existing = [[i, j] for i, block in enumerate(blocks) for j in range(_count(block, module))]
    unknown = [list(pair) for pair in choice if list(pair) not in existing]
    if unknown:
        raise ValueError(f"{group}.{module} has no {unknown}; it has the pairs {existing}")
