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
from satdifuser_jax import pretrain_data
from satdifuser_jax.convert import export_component, load_vae
from satdifuser_jax.feature_source import MOST_PICTURES, building_size
from satdifuser_jax.pretrain import PretrainTask
from satdifuser_jax.pretrain_data import (
    WORDING_BYTES,
    CaptionedScenes,
    KeepWording,
    ToTrainInput,
    weigh_roots,
)


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


def test_precomputed_latents_leave_captions_their_parts_to_lose(frozen, tmp_path):
    """The same ids as from the pictures, so the unconditional case is as frequent."""
    parts = [[[1.0, "a satellite image"]], [[0.5, " of New"], [0.2, " of a port"]], [[0.5, " Zea"]]]
    wording = read_wording(parts)

    class Described(CaptionedScenes):
        def __getitem__(self, i):
            return super().__getitem__(i) | {"wording": wording}

    found = {}
    for cache in ("none", "latents"):
        task = behind_vae(frozen, tmp_path, cache)
        source = Described(SceneSource("classification", "train", 6, side=32))
        task.sources["train"] = task.maker.of(source, task.config.data) if task.maker else source
        with task.config.unlocked():
            task.config.data.name = "satellite"
        settings = {"batch_size": 32, "seed": 1}
        batch = next(train_batches(task._source("train"), task.transforms("train"), **settings))
        assert batch.keys() == {"index", "metadata", "ids"} | (batch.keys() & {"pixels"} or KEPT)
        found[cache] = batch["ids"]
    np.testing.assert_array_equal(found["none"], found["latents"])
    assert len(np.unique(found["none"], axis=0)) == 6


KEPT = {"mean", "logvar"}


def test_a_vae_in_16_bit_is_exported_as_it_was_read(frozen, tmp_path):
    parts = {"model.vae": str(frozen / "vae"), "model.vae_dtype": "bfloat16"}
    task = PretrainTask(tiny(**parts))
    task.prepare(make_mesh(), eval_batches)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(task.frozen.codec_params)} == {"bfloat16"}
    task.report(task.init(0)[0], {}, {}, tmp_path)
    _, found, _ = load_vae(tmp_path / "export" / "vae")
    jax.tree.map(np.testing.assert_array_equal, found, load_vae(frozen / "vae")[1])


def test_captions_that_never_fall_away_are_not_embedded_once(frozen):
    fixed = {"data.smallest_crop": 0, "data.flips": False, "model.caption_dropout": 0.0}
    settings = fixed | {"data.cache": "all", "model.text": str(frozen)}
    with pytest.raises(ValueError, match="nothing to compare with. Use data.cache=latents"):
        PretrainTask(tiny(**settings))
    PretrainTask(tiny(**settings | {"model.caption_dropout": 0.1}))
    PretrainTask(tiny(**settings | {"model.text": ""}))


def test_a_caption_too_long_for_a_cache_is_refused_by_name():
    last = ToTrainInput(32, 0)
    image = np.zeros((32, 32, 3), np.uint8)
    kept = KeepWording(last)({"image": image, "caption": "long " * 4000}, None)["wording"]
    assert kept.shape == (WORDING_BYTES,) and kept.dtype == np.uint8
    many = read_wording([[[1.0, "word " * 200]]] * 5)
    with pytest.raises(ValueError, match="farm: its caption with all parts takes"):
        KeepWording(last)({"image": image, "wording": many, "id": "farm"}, None)


def test_places_and_weights_of_a_mix_reach_the_reader(monkeypatch):
    given = {}
    monkeypatch.setattr(
        pretrain_data, "open_satellite", lambda split, **it: given.update({split: it})
    )
    settings = {"data.name": "satellite", "data.train": "a-{0,1}.tar,b", "data.places": "fmow.csv"}
    data = tiny(**settings, **{"data.weights": (2.0, 1.0), "data.val_size": 0}).data
    for split in ("train", "val"):
        pretrain_data._open_all(data, split, has_text=True)
    assert given["train"]["root"] == {"a-{0,1}.tar": 2.0, "b": 1.0}
    assert given["val"]["root"] == "a-{0,1}.tar,b"
    assert given["train"]["places"] == given["val"]["places"] == "fmow.csv"
    with pytest.raises(ValueError, match="are 1 for 2 places in data.train"):
        weigh_roots("a,b", (1.0,))


def test_captioned_pictures_are_shown_whole_and_upright_unless_asked_for(capsys):
    for arg in ("dataset=satellite", "dataset=satellite,size=sd21"):
        data = get_config(arg).data
        assert (data.smallest_crop, data.flips) == (0, False)
    assert get_config("size=sd21,side=512").data.smallest_crop == 384
    pretrain_data.warn_of_crops(get_config("dataset=satellite").data)
    assert not capsys.readouterr().err
    pretrain_data.warn_of_crops(get_config().data)
    assert "set data.smallest_crop=0 and data.flips=False" in capsys.readouterr().err
