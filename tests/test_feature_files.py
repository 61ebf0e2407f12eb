from __future__ import annotations

import json

import numpy as np
import pytest
import test_cache
from test_cache import batches, encode, values, watching

from satdifuser_jax import feature_files
from satdifuser_jax.cache import CacheError
from satdifuser_jax.feature_files import FeatureError, FeatureFolder, write_features

ROWS = 70  # two ArrayRecord files
NAMES = [f"set {i % 3}/image{i}.jpg" for i in range(ROWS)]


def spec_of(rows=ROWS, **changes):
    return test_cache.spec_of(rows=rows, **changes)


@pytest.mark.parametrize("file_format", ["npz", "array_record"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_of_every_image_are_read_back_with_their_names(tmp_path, file_format, dtype):
    spec, out = spec_of(dtype=dtype), tmp_path / "out"
    about = {"keys": [47, 45, 40]}
    write_features(out, batches, encode, spec, names=NAMES, about=about, file_format=file_format)
    folder = FeatureFolder(out)
    assert len(folder) == ROWS and folder.manifest["about"] == about
    for i in (0, 63, 64, 69, -1):
        found, (a, b) = folder[i], values(i % ROWS)
        assert found["name"] == NAMES[i]
        np.testing.assert_array_equal(found["a"], a.astype(found["a"].dtype))
        np.testing.assert_array_equal(found["b"], b)
        assert found["a"].dtype.name == dtype


def test_an_npz_needs_numpy_alone(tmp_path):
    write_features(tmp_path, batches, encode, spec_of(), names=NAMES)
    with np.load(tmp_path / "set 1" / "image4.jpg.npz") as arrays:
        np.testing.assert_array_equal(arrays["a"], values(4)[0])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["fields"][0] == ["a", [2, 3], "float32"] and manifest["complete"]
    assert manifest["files"][4] == "set 1/image4.jpg.npz"


@pytest.mark.parametrize("file_format", ["npz", "array_record"])
def test_an_interrupted_extraction_goes_on_where_it_stopped(tmp_path, file_format):
    options = {"names": NAMES, "file_format": file_format}
    with pytest.raises(FeatureError, match="without .*image66.jpg.*4 in all"):
        write_features(tmp_path, lambda wanted: batches(wanted[:66]), encode, spec_of(), **options)
    with pytest.raises(FeatureError, match="not complete"):
        FeatureFolder(tmp_path)
    (tmp_path / ".half.partial").write_bytes(b"killed")
    seen = []
    write_features(tmp_path, batches, watching(seen), spec_of(), **options)
    assert min(seen) == (66 if file_format == "npz" else 64)
    assert not (tmp_path / ".half.partial").exists()
    np.testing.assert_array_equal(FeatureFolder(tmp_path)[69]["a"], values(69)[0])
    write_features(tmp_path, batches, lambda b: pytest.fail("done"), spec_of(), **options)


def test_a_folder_of_other_features_is_refused_naming_what_differs(tmp_path):
    write_features(tmp_path, batches, encode, spec_of(), names=NAMES)
    with pytest.raises(FeatureError, match="different: model"):
        write_features(tmp_path, batches, encode, spec_of(model="n"), names=NAMES)
    with pytest.raises(FeatureError, match="different: file_format"):
        write_features(
            tmp_path, batches, encode, spec_of(), names=NAMES, file_format="array_record"
        )
    with pytest.raises(FeatureError, match="different: names"):
        write_features(tmp_path, batches, encode, spec_of(), names=NAMES[::-1])


def test_unusable_names_formats_and_folders_are_refused(tmp_path, monkeypatch):
    for name in ("../out", "/etc/passwd", ""):
        with pytest.raises(FeatureError, match="path inside"):
            write_features(tmp_path, batches, encode, spec_of(rows=1), names=[name])
    with pytest.raises(FeatureError, match=r"2 names \(1 different\)"):
        write_features(tmp_path, batches, encode, spec_of(rows=2), names=["a", "a"])
    with pytest.raises(ValueError, match="format='csv'"):
        write_features(tmp_path, batches, encode, spec_of(), names=NAMES, file_format="csv")
    with pytest.raises(FeatureError, match="no manifest.json"):
        FeatureFolder(tmp_path)
    monkeypatch.setattr(feature_files, "require_space", full)
    with pytest.raises(CacheError, match="feature files"):
        write_features(tmp_path, batches, encode, spec_of(), names=NAMES)


def full(folder, what, needed, smaller):
    raise CacheError(what)
