from __future__ import annotations

import pickle

import jax
import numpy as np
import pytest
from PIL import Image
from text_towers import SMALL, write_tower
from tiny_pipeline import VAE, make_components

from common_jax.sharding import make_mesh, put_batch
from configs.satdifuser_pretrain import get_config
from data.pipeline import eval_batches, train_batches
from data.scenes import SceneSource
from data.wording import read_wording
from satdifuser_jax.convert import export_component
from satdifuser_jax.feature_source import MOST_PICTURES, building_size
from satdifuser_jax.pretrain import PretrainTask
from satdifuser_jax.pretrain_data import CaptionedScenes, ToTrainInput


def tiny(**changes):
    config = get_config("tiny")
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """Folder with a small VAE and a small text tower."""
    folder = write_tower(tmp_path_factory.mktemp("frozen"))
    export_component(folder / "vae", "vae", VAE, make_components()["vae"][1])
    return folder


def behind_vae(frozen, folder, cache: str):
    fixed = {"data.smallest_crop": 0, "data.flips": False, "data.cache_dir": str(folder)}
    parts = {"model.vae": str(frozen / "vae"), "model.text": str(frozen)}
    task = PretrainTask(tiny(**fixed, **parts, **{"data.cache": cache, "data.size": 6}))
    task.prepare(make_mesh(), eval_batches)
    return task


def first_batch(task, split="train"):
    source, transforms = task._source(split), task.transforms(split)
    batch = next(train_batches(source, transforms, batch_size=4, seed=1))
    return task.encode(put_batch(batch, task.mesh))


def test_precomputed_latents_and_text_are_those_of_the_pictures(frozen, tmp_path):
    """The posterior is still drawn anew: what is kept are its moments."""
    plain = first_batch(behind_vae(frozen, tmp_path, "none"))
    for cache in ("latents", "all"):
        kept = first_batch(behind_vae(frozen, tmp_path, cache))
        assert kept.keys() == plain.keys() >= {"latents", "context", "metadata", "index"}
        for name in plain:
            np.testing.assert_allclose(kept[name], plain[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert len(list(tmp_path.glob("pretrain-*"))) == 2


def test_a_cache_is_found_by_everything_it_depends_on(frozen, tmp_path):
    task = behind_vae(frozen, tmp_path, "all")
    source = task._source("train").source
    spec = task.maker.describe(source, with_text=True)
    assert [field.name for field in spec.fields] == ["mean", "logvar", "metadata", "text"]
    darker = jax.tree.map(lambda leaf: leaf * 0.9, task.maker.backbone.codec_params)
    backbone = task.maker.backbone.replace(codec_params=darker)
    other_tower = jax.tree.map(lambda leaf: leaf * 0.9, task.maker.tower.params)
    changes = [
        {"backbone": backbone},
        {"tower": task.maker.tower.replace(params=other_tower)},
        {"tower": None},
        {"last": ToTrainInput(64, 7, task.tokenizer)},
        {"last": ToTrainInput(32, 0, task.tokenizer)},
    ]
    keys = [task.maker._replace(**c).describe(source, with_text=True).key for c in changes]
    keys += [task.maker.describe(source, with_text=False).key, spec.key]
    assert len(set(keys)) == len(keys)


def test_a_cache_is_built_in_each_process_share_of_a_batch_and_few_pictures_a_device(monkeypatch):
    assert [building_size(n) for n in (3, 4, 5000)] == [4, 4, 2 * MOST_PICTURES]
    monkeypatch.setattr(jax, "device_count", lambda: 64)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    assert building_size(256) == 16


def test_what_is_drawn_anew_every_time_is_not_precomputed():
    with pytest.raises(ValueError, match="draw new pixels every time"):
        PretrainTask(tiny(**{"data.cache": "latents"}))
    with pytest.raises(ValueError, match="data.cache='taps' is unknown"):
        PretrainTask(tiny(**{"data.cache": "taps"}))


def test_scenes_come_with_captions_that_are_true_of_them():
    plain = SceneSource("classification", "val", 10, side=32)
    found = CaptionedScenes(plain)
    texts = [found[i]["caption"] for i in range(10)]
    assert len(set(texts)) == 10 and found.fingerprint != plain.fingerprint
    np.testing.assert_array_equal(found[3]["image"], plain[3]["image"])
    assert found[3]["metadata"].shape == (7,)


def test_a_validation_set_is_bounded_and_spread_over_what_is_held_out(tmp_path):
    for i in range(20):
        Image.fromarray(np.full((40, 40, 3), i, np.uint8)).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(f"{i:02d}.png" for i in range(20)))
    for name, root in (("folder", tmp_path), ("satellite", tmp_path / "list.csv")):
        settings = {"data.name": name, "data.train": str(root), "data.holdout": 0.5}
        task = PretrainTask(tiny(**settings, **{"data.val_size": 3}))
        val = pickle.loads(pickle.dumps(task._source("val")))
        shades = [int(np.asarray(example["image"]).max()) for example in val]
        whole = val.source
        assert shades == [int(np.asarray(whole[i]["image"]).max()) for i in (0, 4, 9)]
        assert len(whole) == 10 and val.fingerprint != whole.fingerprint
        task.prepare(make_mesh(), eval_batches)
        drawn = np.asarray(task._held_out(2, make_mesh())["pixels"])[:, 0, 0, 0]
        np.testing.assert_allclose((drawn + 1) * 127.5, [shades[0], shades[-1]], atol=0.01)


def test_a_picture_without_caption_has_the_empty_prompt_and_zero_metadata(frozen):
    task = PretrainTask(tiny(**{"model.text": str(frozen)}))
    image = np.zeros((40, 50, 3), np.uint8)
    made = task.last_transform({"image": image}, None)
    assert made["pixels"].shape == (32, 32, 3) and not made["metadata"].any()
    np.testing.assert_array_equal(made["ids"], task.tokenizer([""])[0])
    assert made["ids"].shape == (SMALL.max_position_embeddings,)


def test_satellite_pictures_lose_parts_of_their_captions_in_training_only(frozen, tmp_path):
    rows = ["path,caption,latitude,gsd"]
    for i in range(4):
        pixels = np.full((40, 40, 3), 60 * i, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,a satellite image of New Zealand,{-40 - i},0.5")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    settings = {"data.name": "satellite", "data.train": str(tmp_path / "list.csv")}
    task = PretrainTask(tiny(**settings, **{"model.text": str(frozen), "data.holdout": 0.25}))
    task.prepare(make_mesh(), eval_batches)
    assert (len(task._source("train")), len(task._source("val"))) == (3, 1)
    (batch,) = eval_batches(task._source("val"), task.transforms("val"), batch_size=1)
    text = ["a satellite image of New Zealand"]
    np.testing.assert_array_equal(batch["ids"], task.tokenizer(text))
    # 0.5 m a pixel, 40 pixels shown as 32; latitude -43 counts from the south pole.
    np.testing.assert_allclose(batch["metadata"][0, 1:3], [47 / 180 * 1000, 625], rtol=1e-5)
    wording = read_wording([[[1.0, "a satellite image"]], [[0.5, " of New Zealand"]]])
    drawn = {
        task.transforms("train")[0]({"wording": wording}, np.random.default_rng(i))["caption"]
        for i in range(8)
    }
    assert len(drawn) == 2
