from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rel_error
from PIL import Image
from small_probe import CLASSES, SIDE, make_workdir, small_config, write_pictures

from common_jax.checkpoint import read_checkpoint
from common_jax.files import read_json
from common_jax.sharding import make_mesh, put_batch, replicated
from common_jax.workdir import WorkdirError
from data.images import ImageError, decode, decode_mask
from satdifuser_jax.backbone import export_backbone, small_backbone
from satdifuser_jax.extract import extract_features
from satdifuser_jax.feature_files import FeatureError, FeatureFolder
from satdifuser_jax.heads import Head
from satdifuser_jax.inference import (
    SHOWN,
    Labels,
    _local_mesh,
    format_predictions,
    to_probabilities,
)
from satdifuser_jax.linear_probe import pool_taps
from satdifuser_jax.preprocess import to_pixels
from satdifuser_jax.probe import ProbeTask

SIZES = [(32, 32), (40, 60), (32, 32), (50, 34), (32, 32)]
SCENES = Labels("classification", CLASSES, SIDE)
CONVOLUTIONS = {"up_blocks": {"conv2": "all"}}
MAPS = Labels("segmentation", CLASSES, 24)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder / "a", SIZES)
    return folder


@pytest.fixture(scope="module")
def expected(pictures):
    """Features [5, ...] of the pictures, by the library, four at a time as the verbs do."""
    task = ProbeTask(small_config())
    mesh = make_mesh()
    backbone = jax.device_put(task.backbone, replicated(mesh))
    images = [decode(pictures / "a" / f"{i}.png") for i in range(len(SIZES))]
    pixels, found = np.stack([to_pixels(image, SIDE) for image in images]), []
    for rows in ([0, 1, 2, 3], [4, 4, 4, 4]):
        batch = put_batch({"pixels": pixels[rows], "index": np.array(rows)}, mesh)
        features = extract_features(
            backbone, batch["pixels"], task.extract_config, index=batch["index"]
        )
        found.append([np.asarray(f) for f in features])
    return [np.concatenate([a, b[:1]]) for a, b in zip(*found)]


def extract(images, out, file_format="npz", **changes):
    task = ProbeTask(small_config(**changes))
    assert task.extract(str(images), str(out), file_format) == 0
    return FeatureFolder(out)


# --------------------------------------------------------------------------------------- features
def test_feature_files_hold_what_the_library_gives(pictures, expected, tmp_path, capsys):
    folder = extract(pictures, tmp_path)
    assert len(folder) == len(SIZES)
    for i in range(len(SIZES)):
        found = folder[i]
        assert found["name"] == f"a/{i}.png"
        for s, maps in enumerate(expected):
            assert rel_error(found[f"scale_{s}"], maps[i]) < 2e-5
    about = folder.manifest["about"]
    assert about["times"] == [21] and about["axes"] == ["time", "y", "x", "channel"]
    for scale, maps in zip(about["scales"], expected):
        assert scale["side"] == maps.shape[2]
        assert sum(channels for _, channels in scale["taps"]) == maps.shape[-1]
    out, err = capsys.readouterr()
    assert "model.weights is empty" in err and "THEY MEAN NOTHING" in out


def test_pooled_features_are_means_and_deviations_of_the_maps(pictures, expected, tmp_path):
    folder = extract(pictures, tmp_path, "array_record", **{"model.pool": "mean_std"})
    assert folder.manifest["about"]["axes"] == ["time", "channel"]
    for i in range(len(SIZES)):
        maps = expected[0][i]
        pooled = np.concatenate([maps.mean((1, 2)), maps.std((1, 2))], -1)
        assert rel_error(folder[i]["scale_0"], pooled) < 2e-5


def test_an_extraction_goes_on_where_it_stopped_with_the_same_numbers(pictures, tmp_path, capsys):
    before = extract(pictures, tmp_path)[3]
    (tmp_path / "a" / "3.png.npz").unlink()
    after = extract(pictures, tmp_path)[3]
    assert "features: 1/1" in capsys.readouterr().err
    for key in ("scale_0", "scale_1"):
        assert rel_error(after[key], before[key]) < 1e-5
    with pytest.raises(FeatureError, match="other features .different: .*taps"):
        extract(pictures, tmp_path, **{"model.layers": CONVOLUTIONS})


def test_weights_of_a_folder_are_used(pictures, expected, tmp_path, capsys):
    config = small_config()
    backbone = small_backbone(config.seed)
    prompts = {"A satellite image": np.zeros((1, 16), np.float32)}
    export_backbone(tmp_path / "same", backbone, prompts)
    other = backbone.replace(unet_params=jax.tree.map(lambda p: 1.1 * p, backbone.unet_params))
    export_backbone(tmp_path / "other", other, prompts)
    errors = {}
    for name in ("same", "other"):
        changes = {"model.weights": str(tmp_path / name), "data.cache_dir": str(tmp_path)}
        folder = extract(pictures, tmp_path / f"{name}_out", **changes)
        assert folder.manifest["about"]["weights"] == str(tmp_path / name)
        errors[name] = rel_error(folder[0]["scale_1"], expected[1][0])
    assert errors["same"] < 2e-5 and errors["other"] > 1e-2
    assert "MEAN NOTHING" not in capsys.readouterr().out


def test_broken_pictures_are_refused_or_left_out_by_name(pictures, tmp_path, caplog):
    images = tmp_path / "images"
    write_pictures(images, SIZES[:3])
    (images / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="broken.png.*on_corrupt=skip"):
        extract(images, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    folder = extract(images, tmp_path / "out", **{"data.on_corrupt": "skip"})
    assert folder.manifest["names"] == ["0.png", "1.png", "2.png"]
    assert "broken.png" in caplog.text


def test_pictures_keep_their_size_unless_a_dataset_or_a_side_is_named(tmp_path, monkeypatch):
    import satdifuser_jax.probe as probe

    seen = []
    monkeypatch.setattr(
        probe, "extract_pictures", lambda task, *_: seen.append((task.asked_side, task.side))
    )
    write_pictures(tmp_path, [(30, 44), (30, 30)])
    for arg, side in (("tiny", 0), ("tiny,dataset=m-eurosat", 0), ("tiny", 48)):
        config = small_config(arg, **{"data.side": side})
        ProbeTask(config).extract(str(tmp_path), "", "npz")
    assert seen == [(0, 32), (256, 256), (48, 48)]


def test_a_batch_is_not_larger_than_the_pictures_need():
    config = small_config(**{"batch_size": 32})
    assert [_local_mesh(config, rows)[1] for rows in (1, 3, 500)] == [2, 4, 32]
    with pytest.raises(ValueError, match="batch_size=3 is not divisible by 2"):
        _local_mesh(small_config(**{"batch_size": 3}), 10)


# ------------------------------------------------------------------------------------ predictions
@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A head of a dataset that is not here."""
    folder = tmp_path_factory.mktemp("classifier")
    changes = {"data.train": "/nonexistent/folder"}
    make_workdir(folder, small_config("tiny,dataset=folder,fuser=linear", **changes), SCENES)
    return folder


def predict(workdir, images, out=None, arg="tiny,dataset=folder,fuser=linear", **changes):
    config = small_config(arg, **{"data.train": "/nonexistent/folder"} | changes)
    assert ProbeTask(config).predict_images(str(workdir), str(images), out) == 0
    return [json.loads(x) for x in (out / "predictions.jsonl").read_text().splitlines()]


def linear_logits(features, workdir, labels, arg):
    """Of the head in a workdir, written out."""
    task = make_workdir(workdir / "again", small_config(arg), labels)
    tree, _ = read_checkpoint(workdir / "again", ("params", "state"))
    if labels.task == "segmentation":
        variables = {"params": tree["params"], **tree["state"]}
        return np.asarray(Head(task.spec).apply(variables, features)[0])
    stats, layer = tree["state"]["feature_stats"]["decoder"], tree["params"]["decoder"]["linear"]
    vectors = np.asarray(pool_taps([jnp.asarray(f) for f in features]))[:, 0]
    return (vectors - stats["mean"]) / stats["std"] @ layer["kernel"] + layer["bias"]


def test_a_head_gives_probabilities_of_pictures_without_its_training_data(
    classifier, pictures, expected, tmp_path, capsys
):
    found = predict(classifier, pictures, tmp_path / "out")
    logits = linear_logits(expected, tmp_path, SCENES, "tiny,dataset=folder,fuser=linear")
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert [record["picture"] for record in found] == [f"a/{i}.png" for i in range(len(SIZES))]
    values = np.array([[record["values"][name] for name in CLASSES] for record in found])
    np.testing.assert_allclose(values, shares, atol=2e-5)
    assert np.ptp(values, axis=0).max() > 0.01  # the pictures are told apart
    assert [r["prediction"] for r in found] == [CLASSES[k] for k in shares.argmax(1)]
    out, err = capsys.readouterr()
    line = next(line for line in out.splitlines() if line.startswith("a/1.png"))
    assert f"{found[1]['prediction']} {max(shares[1]):.1%}" in line
    assert "not the one this head was trained on" in err and "best/7" in err


def test_a_segmentation_head_writes_masks_overlays_and_shares(pictures, expected, tmp_path):
    arg = "tiny,dataset=masks,fuser=linear"
    make_workdir(tmp_path / "run", small_config(arg, **{"data.train": "/nonexistent/folder"}), MAPS)
    out = tmp_path / "out"
    found = predict(tmp_path / "run", pictures, out, arg)
    maps = linear_logits(expected, tmp_path, MAPS, arg).argmax(-1)
    assert maps.shape == (5, 24, 24) and len(np.unique(maps)) > 1
    assert read_json(out / "classes.json") == list(CLASSES)
    for i, (height, width) in enumerate(SIZES):
        mask = decode_mask(out / "masks" / "a" / f"{i}.png")
        nearest = Image.fromarray(maps[i].astype(np.uint8)).resize((width, height), 0)
        agreement = (mask == np.asarray(nearest)).mean()
        assert mask.shape == (height, width) and agreement > 0.99
        shares = [found[i]["values"][name] for name in CLASSES]
        np.testing.assert_allclose(
            shares, np.bincount(maps[i].ravel(), minlength=4) / 24**2, atol=0.01
        )
        assert found[i]["prediction"] == CLASSES[int(np.argmax(shares))]
        with Image.open(out / "overlays" / "a" / f"{i}.png") as sheet:
            assert sheet.format == "PNG" and sheet.width > 300


def test_a_head_is_refused_where_it_does_not_belong(classifier, pictures, tmp_path):
    with pytest.raises(WorkdirError, match=r"model\.timesteps: \(21,\) there, \(61,\) now"):
        predict(classifier, pictures, tmp_path, **{"model.timesteps": (61,)})
    # Where things are, and how many at once, does not matter.
    free = {"data.train": "", "batch_size": 2, "optim.lr": 1.0, "data.on_corrupt": "skip"}
    more = {"labels.json": {"task": "classification", "classes": ["a", "b"], "native_side": 32}}
    known = read_json(classifier / "labels.json")
    try:
        wrong = more["labels.json"] | {"backbone": known["backbone"]}
        (classifier / "labels.json").write_text(json.dumps(wrong))
        with pytest.raises(
            ValueError, match=r"decoder/linear/bias is \(4,\) there, \(2,\) is needed"
        ):
            predict(classifier, pictures, tmp_path, **free)
    finally:
        (classifier / "labels.json").write_text(json.dumps(known))


def test_several_labels_may_hold_at_once_or_none():
    logits = np.array([2.0, -3.0, 1.0, 800.0])
    np.testing.assert_allclose(
        to_probabilities(logits, "multi_label_classification"),
        1 / (1 + np.exp(-np.minimum(logits, 700))),
    )
    assert to_probabilities(logits, "classification")[3] == 1
    records = [
        {
            "picture": "x",
            "prediction": ["sea", "port"],
            "values": {"sea": 0.9, "port": 0.6, "c": 0.1},
        },
        {"picture": "y", "prediction": [], "values": {"sea": 0.1, "port": 0.2, "c": 0.3}},
    ]
    table = format_predictions(records)
    assert "sea + port" in table and "sea 90.0%, port 60.0%, c 10.0%" in table
    assert "predicted: sea + port 1, none 1" in table
    long = format_predictions(records * SHOWN)
    assert f"... and {SHOWN} more" in long and len(long.splitlines()) == SHOWN + 4
