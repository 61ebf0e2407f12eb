from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rel_error
from fake_unet import FAKE_SCALES, fake

from satdifuser_jax.backbone import fingerprint
from satdifuser_jax.cache import Subset, build_cache, open_cache
from satdifuser_jax.extract import ExtractConfig, encode_latents, extract, features_at
from satdifuser_jax.features import describe, make_encoder, pool_features
from satdifuser_jax.schedule import Schedule
from satdifuser_jax.taps import Scale

CONFIG = ExtractConfig(scales=FAKE_SCALES, keys=(47, 40))
# The network and the codec decide together: 12 channels of space-to-depth, not the 4 of a VAE.
BACKBONE = fake(in_channels=12, out_channels=12)


def images(count=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (count, 8, 8, 3)).astype(np.float32)


def batches_of(pictures, size=4):
    def batches(wanted):
        source = Subset(pictures, wanted)
        for start in range(0, len(wanted), size):
            index = np.arange(start, start + size)
            rows = [source[min(i, len(source) - 1)] for i in index]
            yield {"index": index, "mask": index < len(wanted), "pixels": np.stack(rows)}

    return batches


def spec_of(kind="taps", backbone=BACKBONE, config=CONFIG, **changes):
    settings = {"model": fingerprint(backbone), "source": "s", "rows": 5, "side": 8}
    settings |= {"dtype": "float32"} | changes
    return describe(kind, backbone, config, **settings)


def test_cached_latents_give_the_features_of_a_whole_pass(tmp_path):
    spec = spec_of("latents")
    build_cache(tmp_path, batches_of(images()), make_encoder(BACKBONE, CONFIG, spec), spec)
    (latents,) = open_cache(tmp_path, spec).read(range(5))
    assert latents.shape == (5, 2, 4, 4, 12) and latents.dtype == np.float32
    passed = extract(BACKBONE, encode_latents(BACKBONE, images(), CONFIG), CONFIG)
    assert rel_error(latents, passed.latents) < 1e-6
    for a, b in zip(features_at(BACKBONE, latents, CONFIG), passed.features):
        assert rel_error(a, b) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_cached_taps_are_the_features_in_the_type_asked_for(tmp_path, dtype):
    spec = spec_of(dtype=dtype)
    build_cache(tmp_path, batches_of(images()), make_encoder(BACKBONE, CONFIG, spec), spec)
    passed = extract(BACKBONE, encode_latents(BACKBONE, images(), CONFIG), CONFIG).features
    for cached, features in zip(open_cache(tmp_path, spec).read(range(5)), passed):
        assert cached.dtype == jnp.dtype(dtype)
        assert cached.shape == features.shape
        np.testing.assert_array_equal(cached, np.asarray(features).astype(cached.dtype))


def test_what_a_resumed_cache_holds_does_not_depend_on_where_it_was_cut(tmp_path):
    """Noise is by the row of the data set, although batches differ after a resumption."""
    config = ExtractConfig(mode="noising", timesteps=(100,), posterior="sample")
    pictures, spec = images(70), spec_of("latents", config=config, rows=70)
    encode = make_encoder(BACKBONE, config, spec)
    whole = build_cache(tmp_path / "whole", batches_of(pictures), encode, spec)
    cut = build_cache(tmp_path / "cut", batches_of(pictures), encode, spec)
    (cut / "00001.json").unlink()
    (cut / "00001.bin").unlink()
    build_cache(tmp_path / "cut", batches_of(pictures), encode, spec)
    assert (cut / "00001.bin").read_bytes() == (whole / "00001.bin").read_bytes()


def change(**settings):
    return {"config": dataclasses.replace(CONFIG, **settings)}


NOISING = ExtractConfig(mode="noising", timesteps=(21,), scales=FAKE_SCALES)
OTHER_TAPS = (Scale(4, ("other",), (3,)),)


CHANGES = [
    {"backbone": BACKBONE.replace(unet_params={"w": np.ones(2, np.float32)})},
    {"backbone": BACKBONE.replace(unet_params={"w": np.ones(2, np.float16)})},
    {"backbone": BACKBONE.replace(codec_params={"w": np.ones(2, np.float32)})},
    {"backbone": BACKBONE.replace(context=jnp.full((1, 2, 24), 0.5))},
    {"backbone": BACKBONE.replace(uncond=jnp.full((1, 2, 24), 0.5))},
    {"backbone": BACKBONE.replace(schedule=Schedule(beta_end=0.02))},
    {"backbone": fake("velocity", in_channels=12, out_channels=12)},
    {"source": "t"},
    {"rows": 6},
    {"side": 16},
    {"transform": "another"},
    change(keys=(47, 41)),
    change(keys=(47,)),
    change(keys=None, timesteps=(21, 121)),
    change(num_timesteps=100, keys=(97, 89)),
    change(num_timesteps=25, keys=(23, 20)),
    change(prediction_type="v_prediction"),
    change(guidance_scale=2.0),
    change(posterior="sample"),
    change(posterior="sample", seed=1),
    change(metadata="zeros"),
    {"config": NOISING},
    {"config": dataclasses.replace(NOISING, seed=1)},
    {"config": dataclasses.replace(NOISING, timesteps=(22,))},
]


@pytest.mark.parametrize("kind", ["latents", "taps"])
def test_whatever_changes_a_number_changes_the_key(kind):
    keys = [spec_of(kind).key, *(spec_of(kind, **changes).key for changes in CHANGES)]
    assert len(set(keys)) == len(keys)


def test_taps_and_their_type_change_the_taps_key_only():
    for changes in ({"dtype": "float16"}, change(scales=OTHER_TAPS), {"pool": "mean"}):
        assert spec_of("taps", **changes).key != spec_of("taps").key
        assert spec_of("latents", **changes).key == spec_of("latents").key
    # the same times by another name, and a seed that nothing draws from, are the same numbers
    for same in (change(keys=None, timesteps=(21, 161)), change(seed=7)):
        assert spec_of("taps", **same).key == spec_of("taps").key


def test_sizes_are_known_before_anything_runs():
    scales = (Scale(32, ("a",), (1920,)), Scale(16, ("b",), (3840,)))
    spec = spec_of(config=dataclasses.replace(CONFIG, scales=scales), dtype="float16", rows=100)
    assert [f.shape for f in spec.fields] == [(2, 32, 32, 1920), (2, 16, 16, 3840)]
    assert spec.total_bytes == 100 * 2 * 2 * (32 * 32 * 1920 + 16 * 16 * 3840)
    pooled = spec_of(pool="mean_std")
    assert [f.shape for f in pooled.fields] == [(2, 6)]


def test_pooled_features_are_means_and_deviations_over_pixels():
    maps = np.random.default_rng(0).random((2, 3, 4, 4, 5), np.float32)
    (mean,) = pool_features([jnp.asarray(maps)], "mean")
    (both,) = pool_features([jnp.asarray(maps)], "mean_std")
    np.testing.assert_allclose(mean, maps.mean((2, 3)), rtol=1e-5)
    expected = np.concatenate([maps.mean((2, 3)), maps.std((2, 3))], -1)
    np.testing.assert_allclose(both, expected, rtol=1e-5)


def test_an_encoder_places_its_batches_where_it_is_told(tmp_path):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def put(batch):
        return {k: jax.device_put(v, rows) for k, v in batch.items()}

    spec = spec_of("latents")
    backbone = jax.device_put(BACKBONE, everywhere)
    encode = make_encoder(backbone, CONFIG, spec, put)
    folder = build_cache(tmp_path / "two", batches_of(images()), encode, spec)
    one = build_cache(
        tmp_path / "one", batches_of(images()), make_encoder(BACKBONE, CONFIG, spec), spec
    )
    a, b = (np.fromfile(f / "00000.bin", np.float32) for f in (folder, one))
    assert rel_error(a, b) < 1e-6


def test_an_unknown_kind_or_no_taps_is_refused():
    with pytest.raises(ValueError, match="kind='all'"):
        spec_of("all")
    with pytest.raises(ValueError, match="no taps chosen"):
        spec_of(config=ExtractConfig())
