from __future__ import annotations

import json

import numpy as np
import pytest
from fake_unet import fake
from PIL import Image

from satdifuser_jax.sample_files import (
    DrawConfig,
    Sampler,
    label_prompts,
    parse_drawing,
    parse_metadata,
    write_samples,
)


def embed(texts):
    """A context that is larger for longer texts."""
    return np.stack([np.full((2, 24), len(text) / 100, np.float32) for text in texts])


def sampler(**config):
    return Sampler(fake(in_channels=12, out_channels=12, **config), embed, side=8)


def pictures(folder) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("0*.png"))])


PROMPTS = ["a farm", "a satellite image of a harbour"]


def test_pictures_a_list_and_a_grid_are_written(tmp_path):
    grid = write_samples(sampler(), DrawConfig(count=3, steps=2), PROMPTS, {}, tmp_path)
    assert pictures(tmp_path).shape == (3, 8, 8, 3) and grid == tmp_path / "grid.png"
    assert Image.open(grid).width > 24
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row["file"], row["prompt"]) for row in rows] == [
        ("0000.png", PROMPTS[0]),
        ("0001.png", PROMPTS[1]),
        ("0002.png", PROMPTS[0]),
    ]
    assert rows[0]["seed"] == 0 and rows[0]["steps"] == 2


def test_a_picture_does_not_depend_on_the_batch_it_is_drawn_in(tmp_path):
    for batch in (1, 2, 5):
        drawing = DrawConfig(count=5, steps=2, batch=batch, guidance=3.0)
        write_samples(sampler(), drawing, PROMPTS, {}, tmp_path / str(batch))
    one, two, five = (pictures(tmp_path / str(batch)).astype(int) for batch in (1, 2, 5))
    assert abs(one - five).max() <= 1 and abs(two - five).max() <= 1


def test_prompt_seed_and_metadata_change_the_picture(tmp_path):
    def drawn(prompt=PROMPTS[0], fields=None, **settings):
        model = sampler(num_metadata=7)
        drawing = DrawConfig(count=1, steps=3, **settings)
        write_samples(model, drawing, [prompt], fields or {}, tmp_path / "out")
        return pictures(tmp_path / "out")

    first = drawn()
    assert (first == drawn()).all()
    assert (first != drawn(prompt=PROMPTS[1])).any()
    assert (first != drawn(seed=1)).any()
    assert (first != drawn(fields={"month": 7.0})).any()


def test_settings_are_read_and_wrong_ones_named():
    assert parse_drawing(["count=2", "guidance=7.5"]) == DrawConfig(count=2, guidance=7.5)
    with pytest.raises(ValueError, match="'cout=2': use NAME=VALUE of count, steps, guidance"):
        parse_drawing(["cout=2"])
    with pytest.raises(ValueError, match="count, steps and batch begin at 1"):
        parse_drawing(["count=0"])
    assert parse_metadata(["gsd=0.5", "date=2019-08-31"]) == {
        "gsd": 0.5,
        "year": 2019,
        "month": 8,
        "day": 31,
    }
    with pytest.raises(ValueError, match="--metadata=clouds"):
        parse_metadata(["clouds=0.5"])
    with pytest.raises(ValueError, match="no metadata embeddings"):
        write_samples(sampler(), DrawConfig(), PROMPTS, {"gsd": 1.0}, "nowhere")


def test_prompts_under_pictures_are_what_tells_them_apart():
    prompts = ["a satellite image of a river", "a satellite image of an airplane"]
    assert label_prompts(prompts) == ["a river", "an airplane"]
    for whole in (["a river"], ["a river", "a river"], ["a river", "a river bed"]):
        assert label_prompts(whole) == whole
