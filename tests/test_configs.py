from __future__ import annotations

import re
from pathlib import Path

import pytest

from common_jax.workdir import flatten_config
from configs import (
    geodit_align,
    geodit_pretrain,
    geodit_sft,
    satdifuser_pretrain,
    satdifuser_probe,
)
from configs.base import parse_arg

ROOT = Path(__file__).parent.parent
FAMILIES = {
    "probe": satdifuser_probe,
    "pretrain": satdifuser_pretrain,
    "geodit_align": geodit_align,
    "geodit_sft": geodit_sft,
    "geodit_pretrain": geodit_pretrain,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_leaf_of_every_config_is_read_somewhere(family):
    folders = ("common_jax", "geodit_jax" if family.startswith("geodit") else "satdifuser_jax")
    files = [p for folder in folders for p in (ROOT / folder).glob("*.py")]
    text = "\n".join(p.read_text() for p in files) + (ROOT / "launch.py").read_text()
    for name in flatten_config(FAMILIES[family].get_config()):
        if name.startswith("model.layers."):
            name = "model.layers"
        group, _, leaf = name.rpartition(".")
        owner = {"": "config", "eval": "(eval|rule)"}.get(group, group)
        assert re.search(rf"\b{owner}\.{leaf}\b", text), f"{name} is read nowhere"


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_are_locked_and_say_how_to_run_them(family):
    config = FAMILIES[family].get_config()
    with pytest.raises(AttributeError, match=r"lr"):
        config.optim.lrr = 1.0
    assert "python launch.py train" in FAMILIES[family].__doc__
    assert len(flatten_config(config)) <= 100


def test_published_turns_every_published_quirk_on():
    config = satdifuser_probe.get_config("published")
    assert (config.model.prediction_type, config.model.lw_input) == ("as_epsilon", "first_tap")
    assert (config.model.warmup, config.model.posterior) == ("calls", "sample")
    assert (config.optim.name, config.optim.schedule) == ("adam", "epoch_cosine")
    assert (config.model.metadata, config.model.save_timesteps) == ("none", (47, 45, 40))


def test_arguments_are_words_or_choices_and_unknown_ones_are_listed():
    allowed = {"fuser": "gw", "tiny": False}
    assert parse_arg("fuser=moe,tiny", allowed) == {"fuser": "moe", "tiny": True}
    assert parse_arg(None, allowed) == allowed
    with pytest.raises(ValueError, match="'size' is unknown; known: fuser, tiny"):
        parse_arg("size=3", allowed)
    with pytest.raises(ValueError, match="write it as tiny"):
        parse_arg("tiny=1", allowed)
    with pytest.raises(ValueError, match="write it as fuser=VALUE"):
        parse_arg("fuser", allowed)


def test_geodit_in_full_size_has_the_values_of_the_paper():
    align, sft = (c.get_config("size=8b") for c in (geodit_align, geodit_sft))
    assert (align.batch_size, align.optim.lr) == (96, 1e-3)
    assert (sft.batch_size, sft.optim.lr) == (24, 1e-5)
    for c in (align, sft):
        assert (c.optim.name, c.optim.b1, c.optim.b2, c.optim.weight_decay) == (
            "adamw",
            0.9,
            0.95,
            0,
        )
        assert (c.optim.schedule, c.optim.warmup_share, c.optim.min_lr) == ("cosine", 0.03, 0)
        assert (c.optim.epochs, c.optim.steps, c.optim.clip) == (1, 0, 1)
        assert (c.answer.caption, c.answer.detection, c.answer.vqa) == (16, 32, 8)
