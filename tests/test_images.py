"""Any picture file becomes three channels, or an error that names it."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from PIL import Image

from data.images import ImageError, NamedBytes, check_images, decode, decode_mask, digest_of


def save(folder, name, array, **options):
    Image.fromarray(array).save(folder / name, **options)
    return folder / name


def noise(*shape, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def test_rgb_grey_alpha_and_palette_become_three_channels(tmp_path):
    rgb = noise(16, 12, 3)
    np.testing.assert_array_equal(decode(save(tmp_path, "rgb.png", rgb)), rgb)
    grey = decode(save(tmp_path, "grey.png", rgb[..., 0]))
    np.testing.assert_array_equal(grey, np.repeat(rgb[..., :1], 3, -1))
    rgba = np.concatenate([rgb, noise(16, 12, 1, seed=1)], -1)
    np.testing.assert_array_equal(decode(save(tmp_path, "rgba.png", rgba)), rgb)
    Image.fromarray(rgb // 64 * 64).quantize(64).save(tmp_path / "palette.png")
    assert np.abs(decode(tmp_path / "palette.png").astype(int) - rgb // 64 * 64).max() <= 8
    Image.fromarray(rgb[..., 0] > 127).save(tmp_path / "bits.png")
    assert set(np.unique(decode(tmp_path / "bits.png"))) == {0, 255}


def test_sixteen_bit_files_become_unit_floats(tmp_path):
    deep = noise(10, 9, dtype=np.uint16)
    for name in ("deep.png", "deep.tif"):
        found = decode(save(tmp_path, name, deep))
        assert found.dtype == np.float32 and found.shape == (10, 9, 3)
        np.testing.assert_allclose(found[..., 1], deep / 65535, rtol=1e-6)


def test_truncated_empty_foreign_and_tiny_files_are_named(tmp_path):
    whole = save(tmp_path, "whole.png", noise(64, 64, 3)).read_bytes()
    cases = {"cut.png": whole[: len(whole) // 2], "empty.jpg": b"", "text.jpg": b"not a picture"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=f"{name}: cannot be read as a picture"):
            decode(tmp_path / name)
    with pytest.raises(ImageError, match=r"dot\.png: 1x1 pixels"):
        decode(save(tmp_path, "dot.png", noise(1, 1, 3)))
    with pytest.raises(ImageError, match=r"f\.tif: floating point"):
        decode(save(tmp_path, "f.tif", np.ones((9, 9), np.float32)))


def test_truncated_jpeg_is_refused_not_half_read(tmp_path):
    path = save(tmp_path, "a.jpg", noise(64, 64, 3))
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(ImageError, match=r"a\.jpg"):
        decode(path)


def pillow(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_jpegs_of_every_kind_have_the_pixels_that_pillow_gives(tmp_path, monkeypatch):
    smooth = np.add.outer(np.arange(67), np.arange(45)).astype(np.uint8)
    rgb = np.stack([smooth, smooth.max() - smooth, noise(67, 45)], -1)
    kinds = {f"chroma{k}": {"subsampling": k, "quality": 60} for k in (0, 1, 2)}
    kinds |= {"progressive": {"progressive": True}, "stored": {"keep_rgb": True}}
    files = [save(tmp_path, f"{name}.jpg", rgb, **options) for name, options in kinds.items()]
    files.append(save(tmp_path, "grey.jpg", rgb[..., 0]))
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.jpg")
    for path in [*files, tmp_path / "cmyk.jpg"]:
        np.testing.assert_array_equal(decode(path), pillow(path), path.name)
        named = NamedBytes(path.read_bytes(), path.name)
        np.testing.assert_array_equal(decode(named), pillow(path), path.name)
    monkeypatch.setattr("data.images._decode_any", None)
    for path in files[:4]:  # in colour: not by Pillow
        assert decode(path).shape == (67, 45, 3)


def test_real_jpegs_have_the_pixels_that_pillow_gives(eo_data):
    paths = sorted(eo_data.rglob("*.jpg"))[::40]
    assert paths
    for path in paths:
        np.testing.assert_array_equal(decode(path), pillow(path), path.name)


def test_masks_keep_their_numbers(tmp_path):
    numbers = noise(12, 12) % 7
    np.testing.assert_array_equal(decode_mask(save(tmp_path, "m.png", numbers)), numbers)
    palette = Image.fromarray(numbers).convert("P")
    palette.putpalette(list(range(30)))
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(decode_mask(tmp_path / "p.png"), numbers)
    with pytest.raises(ImageError, match=r"rgb\.png: a mask of mode RGB"):
        decode_mask(save(tmp_path, "rgb.png", noise(12, 12, 3)))


def test_corrupt_files_are_refused_or_skipped_and_counted(tmp_path, caplog):
    paths = [save(tmp_path, f"{k}.png", noise(9, 9, 3, seed=k)) for k in range(4)]
    for k in (1, 3):
        paths[k].write_bytes(b"broken")
    with pytest.raises(ImageError, match=r"2 of 4 files are not usable: .*1\.png.*3\.png"):
        check_images(paths)
    kept = check_images(paths, "skip")
    assert [c.path for c in kept] == [str(paths[0]), str(paths[2])]
    assert "skipped 2 of 4 files" in caplog.text and "1.png" in caplog.text
    with pytest.raises(ValueError, match="not refuse or skip"):
        check_images(paths, "ignore")


def test_the_digest_is_of_pixels_not_of_files(tmp_path):
    picture = noise(9, 9, 3)
    one, two = save(tmp_path, "a.png", picture), save(tmp_path, "b.bmp", picture)
    other = save(tmp_path, "c.png", noise(9, 9, 3, seed=1))
    digests = [c.digest for c in check_images([one, two, other])]
    assert digests[0] == digests[1] == digest_of(picture) != digests[2]
    assert digest_of(picture.reshape(9, 27)) != digests[0]


def test_a_changed_file_is_read_again(tmp_path):
    path = save(tmp_path, "a.png", noise(9, 9, 3))
    before = check_images([path])[0].digest
    save(tmp_path, "a.png", noise(10, 9, 3, seed=5))
    assert check_images([path])[0].digest != before


def test_errors_of_the_system_are_no_broken_pictures(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"")

    def full(path):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(OSError, match="Too many open files"):
        check_images([tmp_path / "a.png"], "skip")
