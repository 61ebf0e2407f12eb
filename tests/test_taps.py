"""Which taps a published layer table selects, and in which order."""

from __future__ import annotations

import json

import pytest
from conftest import golden_cases, read_golden

from satdifuser_jax.taps import PUBLISHED_LAYERS, Scale, list_taps, select_taps
from satdifuser_jax.unet import UNetConfig

SD21 = UNetConfig.sd21()


def up(block: int, module: str) -> tuple[str, ...]:
    pattern = {
        "attn1": "up_blocks.{}.attentions.{}.transformer_blocks.0.attn1",
        "conv2": "up_blocks.{}.resnets.{}.conv2",
    }[module]
    return tuple(pattern.format(block, i) for i in range(3))


def test_default_taps_are_the_21_of_the_published_extractor_in_its_order():
    scales = select_taps(SD21, PUBLISHED_LAYERS, side=32)
    assert scales == (
        Scale(32, up(3, "attn1") + up(3, "conv2"), (320,) * 6),
        Scale(16, up(2, "attn1") + up(2, "conv2"), (640,) * 6),
        Scale(8, up(1, "attn1") + up(1, "conv2"), (1280,) * 6),
        Scale(4, up(0, "conv2"), (1280,) * 3),
    )
    assert sum(len(scale.taps) for scale in scales) == 21


def test_module_order_is_that_of_the_table():
    scales = select_taps(SD21, {"up_blocks": {"conv2": "all", "attn1": "all"}}, side=64)
    assert scales[0].taps == up(3, "conv2") + up(3, "attn1")


def test_pairs_choose_block_and_index():
    scales = select_taps(SD21, {"up_blocks": {"attn1": [[3, 0], (2, 1)], "conv2": []}}, side=32)
    assert scales == (
        Scale(32, up(3, "attn1")[:1], (320,)),
        Scale(16, up(2, "attn1")[1:2], (640,)),
    )


def test_groups_that_share_a_side_keep_group_order():
    layers = {"mid_block": {"attn2": "all"}, "down_blocks": {"conv2": "all"}}
    scales = select_taps(SD21, layers, side=32)
    assert [scale.side for scale in scales] == [32, 16, 8, 4]
    assert scales[-1].taps == (
        "mid_block.attentions.0.transformer_blocks.0.attn2",
        "down_blocks.3.resnets.0.conv2",
        "down_blocks.3.resnets.1.conv2",
    )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"middle": {"attn1": "all"}}, "group 'middle'; there are down_blocks, mid_block, up_bl"),
        ({"up_blocks": {"attn9": "all"}}, "up_blocks.attn9; there are attn1, attn2, conv2"),
        ({"up_blocks": {"attn1": [[0, 0]]}}, r"no \[\[0, 0\]\]; it has the pairs \[\[1, 0\]"),
        ({"up_blocks": {"attn1": "some"}}, "'some': give 'all' or pairs"),
        ({"up_blocks": {"attn1": []}}, "selects no tap"),
    ],
)
def test_unknown_choice_is_refused_naming_what_exists(layers, message):
    with pytest.raises(ValueError, match=message):
        select_taps(SD21, layers, side=32)


def test_side_must_fit_the_levels():
    with pytest.raises(ValueError, match="latent side 20 is not divisible by 8"):
        select_taps(SD21, PUBLISHED_LAYERS, side=20)


def test_every_selected_tap_is_listed():
    everything = {
        group: {module: "all" for module in ("attn1", "attn2", "conv2")}
        for group in ("down_blocks", "mid_block", "up_blocks")
    }
    chosen = [tap for scale in select_taps(SD21, everything, 32) for tap in scale.taps]
    assert sorted(chosen) == sorted(list_taps(SD21))
    assert len(chosen) == 6 * 2 + 8 + 2 + 2 + 9 * 2 + 12


@pytest.mark.parametrize("folder", golden_cases("satdifuser_*"))
def test_golden_tap_widths(folder):
    meta, arrays = read_golden(folder)
    config = json.loads((folder / "checkpoint" / "unet" / "config.json").read_text())
    inversion = meta["inversion"]
    side = arrays["latents"].shape[-1]
    scales = select_taps(UNetConfig.from_dict(config), inversion["layer_idxs"], side)
    assert {str(s.side): list(s.channels) for s in scales} == inversion["dims"]
    assert [s.side for s in scales] == sorted(map(int, inversion["dims"]), reverse=True)
