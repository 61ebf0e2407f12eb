"""Scenes are functions of (seed, split, index), exact, and not solved by colour."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import scenes
from data.pipeline import train_batches
from data.scene_canvas import BUILDING, WATER
from data.scenes import CLASSES, LAND_COVER, SceneSource, draw_scene

DIGEST = "bbfc168ae6bd62ca81f62456800a562189ad21c04ba7e4e03a3ca4369fc1cb40"
PRINT_DIGEST = """
import hashlib
from data.scenes import draw_scene
digest = hashlib.sha256()
for k in range(16):
    scene = draw_scene(7, "train", k)
    digest.update(scene.image.tobytes() + scene.cover.tobytes())
print(digest.hexdigest())
"""


def digest(**environment):
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", PRINT_DIGEST],
        cwd=root,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


def test_pixels_change_only_with_the_version():
    """If this fails on purpose: raise VERSION, so that caches of old scenes are not used."""
    assert scenes.VERSION == 1 and digest() == DIGEST


def test_a_processor_without_wide_vectors_draws_the_same_bytes():
    known = np.show_config(mode="dicts")["SIMD Extensions"]
    wide = [name for name in known["found"] if name not in known["baseline"]]
    assert digest(NPY_DISABLE_CPU_FEATURES=" ".join(wide)) == DIGEST


def test_index_split_and_seed_each_change_the_scene():
    base = draw_scene(0, "train", 0).image
    for other in (draw_scene(1, "train", 0), draw_scene(0, "val", 0), draw_scene(0, "train", 8)):
        assert (other.image != base).mean() > 0.5
    np.testing.assert_array_equal(base, draw_scene(0, "train", 0).image)


def test_classes_come_in_turn_and_equal_numbers():
    source = SceneSource("classification", "train", 32)
    labels = [int(source[i]["label"]) for i in range(32)]
    assert labels == [i % len(CLASSES) for i in range(32)] and len(CLASSES) == 8
    np.testing.assert_array_equal(source.labels(), labels)
    assert SceneSource("segmentation", "train", 8).labels() is None


def test_examples_hold_what_the_pipeline_needs():
    image = SceneSource("classification", "train", 8, side=48)[3]
    assert image["image"].shape == (48, 48, 3) and image["image"].dtype == np.uint8
    assert image["label"].dtype == np.int32 and image["label"].shape == ()
    assert image["metadata"].shape == (7,) and image["metadata"].dtype == np.float32
    cover = SceneSource("segmentation", "train", 8, side=48)[3]
    assert cover["label"].shape == (48, 48) and cover["label"].dtype == np.int32
    assert cover["label"].min() >= 0 and cover["label"].max() < len(LAND_COVER)
    np.testing.assert_array_equal(image["image"], cover["image"])


def test_the_source_goes_through_the_pipeline():
    batches = train_batches(SceneSource("segmentation", "val", 16, side=32), batch_size=4, seed=0)
    batch = next(batches)
    assert batch["image"].shape == (4, 32, 32, 3) and batch["label"].shape == (4, 32, 32)
    assert batch["metadata"].shape == (4, 7)


def test_the_source_survives_pickling_and_its_fingerprint_names_its_content():
    source = SceneSource("classification", "train", 8)
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[5]["image"], source[5]["image"])
    prints = {
        source.fingerprint,
        SceneSource("classification", "train", 9).fingerprint,
        SceneSource("classification", "val", 8).fingerprint,
        SceneSource("classification", "train", 8, seed=1).fingerprint,
        SceneSource("classification", "train", 8, side=32).fingerprint,
    }
    assert len(prints) == 5


def test_objects_stand_on_their_cover():
    for index in range(120):
        scene = draw_scene(3, "train", index)
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
            at = scene.cover[min(int((y0 + y1) / 2), 63), min(int((x0 + x1) / 2), 63)]
            if thing.kind in ("building", "tank") and min(x1 - x0, y1 - y0) > 3:
                assert at == BUILDING, (index, thing)
            if thing.kind == "boat":
                assert at == WATER, (index, thing)


def test_colour_alone_does_not_name_the_class():
    def features(split, number):
        drawn = [draw_scene(0, split, k) for k in range(number)]
        tables = [
            np.concatenate([np.histogram(s.image[..., c], 12, (0, 256))[0] for c in range(3)])
            for s in drawn
        ]
        return np.sqrt(np.array(tables) / 4096), np.array([s.label for s in drawn])

    known, labels = features("train", 320)
    unknown, answers = features("test", 160)
    distance = ((unknown[:, None] - known[None]) ** 2).sum(-1)
    nearest = labels[np.argsort(distance, axis=1)[:, :5]]
    guesses = np.array([np.bincount(row, minlength=8).argmax() for row in nearest])
    assert 0.2 < (guesses == answers).mean() < 0.5


def test_metadata_is_the_cause_of_what_is_seen():
    """Snow and clouds, both foretold by the metadata, make a scene brighter."""
    drawn = [draw_scene(0, "train", k) for k in range(400)]
    light = np.array([scene.image.mean() for scene in drawn])
    cloudy = np.array([scene.place.cloud_cover > 0.2 for scene in drawn])
    snowy = np.array([scene.snowy for scene in drawn])
    assert light[snowy].mean() > light[~snowy].mean() + 10
    assert light[cloudy].mean() > light[~cloudy].mean() + 5
    assert all(
        scene.place.latitude > 40 or scene.place.latitude < -40 for scene in drawn if scene.snowy
    )


def test_wrong_requests_say_what_is_there():
    with pytest.raises(ValueError, match="train, val, test"):
        SceneSource("classification", "dev", 4)
    with pytest.raises(ValueError, match="detection"):
        SceneSource("detection", "train", 4)
    with pytest.raises(ValueError, match="at least 16"):
        draw_scene(0, "train", 0, side=8)
    with pytest.raises(IndexError):
        SceneSource("classification", "train", 4)[4]
