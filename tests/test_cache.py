"""The cache: whole after any interruption, never stale, readable at random."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from satdifuser_jax import cache as cache_module
from satdifuser_jax.cache import Subset, build_cache, open_cache, wait_for_cache
from satdifuser_jax.cache_spec import CacheError, CacheSpec, Field

ROWS = 150  # with 64 rows a shard: three shards, the last one short


def spec_of(rows=ROWS, dtype="float32", **identity):
    fields = (Field("a", (2, 3), dtype), Field("b", (4,), "float32"))
    return CacheSpec("taps", rows, fields, {"model": "m", **identity})


def values(row):
    rng = np.random.default_rng(int(row))
    return rng.standard_normal((2, 3)).astype(np.float32), np.full(4, row, np.float32)


def encode(batch):
    return tuple(np.stack(column) for column in zip(*(values(row) for row in batch["index"])))


def batches(wanted, size=8):
    """Padded batches over a subset; `index` is the position in it."""
    for start in range(0, len(wanted), size):
        index = np.arange(start, start + size)
        yield {"index": index, "mask": index < len(wanted)}


def watching(rows):
    """`encode` that notes the rows it is given."""

    def watched(batch):
        rows.extend(batch["index"].tolist())
        return encode(batch)

    return watched


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".lock"}


def test_every_row_is_read_back_at_random_after_pickling(tmp_path):
    spec = spec_of()
    build_cache(tmp_path, batches, encode, spec)
    cache = pickle.loads(pickle.dumps(open_cache(tmp_path, spec)))
    assert len(cache) == ROWS
    for row in (0, 63, 64, 149, -1):
        for found, expected in zip(cache[row], values(row % ROWS)):
            np.testing.assert_array_equal(found, expected)
            assert not found.flags.writeable
    a, b = cache.read([5, 140, 5])
    assert a.shape == (3, 2, 3) and b[:, 0].tolist() == [5, 140, 5]
    with pytest.raises(IndexError):
        cache[ROWS]


def test_a_cache_is_a_source_for_grain(tmp_path):
    import grain

    spec = spec_of(rows=10)
    build_cache(tmp_path, batches, encode, spec)
    dataset = grain.MapDataset.source(open_cache(tmp_path, spec)).shuffle(seed=0).batch(4)
    assert dataset[0][0].shape == (4, 2, 3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_are_kept_in_the_type_asked_for(tmp_path, dtype):
    spec = spec_of(rows=3, dtype=dtype)
    build_cache(tmp_path, batches, encode, spec)
    seen = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    found = open_cache(tmp_path, spec)[2][0]
    assert found.dtype == seen
    np.testing.assert_array_equal(found, values(2)[0].astype(seen))
    assert spec.record.itemsize == 6 * (4 if dtype == "float32" else 2) + 16


def test_labels_may_be_kept_beside_the_arrays(tmp_path):
    fields = (Field("class", (), "int32"), Field("map", (2, 2), "uint8"))
    spec = CacheSpec("taps", 20, fields, {})

    def labels(batch):
        index = batch["index"]
        return index - 5, np.tile((index + 240)[:, None, None], (1, 2, 2))

    with pytest.raises(CacheError, match="map of row 16 does not fit into finite uint8"):
        build_cache(tmp_path, batches, labels, spec)
    spec = CacheSpec("taps", 16, fields, {})
    build_cache(tmp_path, batches, labels, spec)
    found, picture = open_cache(tmp_path, spec)[3]
    assert found == -2 and found.dtype == np.int32 and found.shape == ()
    assert picture.dtype == np.uint8 and picture.tolist() == [[243, 243]] * 2


def test_a_plain_iterable_over_the_whole_data_set_works_in_any_order(tmp_path):
    spec, seen = spec_of(), []

    def everything():
        order = np.random.default_rng(0).permutation(ROWS)
        for start in range(0, ROWS, 8):
            index = np.full(8, ROWS)  # padding lies past the end
            part = order[start : start + 8]
            index[: len(part)] = part
            yield {"index": index, "mask": np.arange(8) < len(part)}

    build_cache(tmp_path, everything(), watching(seen), spec)
    assert len(seen) == 19 * 8
    np.testing.assert_array_equal(open_cache(tmp_path, spec)[77][0], values(77)[0])


def test_a_finished_cache_is_not_computed_again(tmp_path):
    spec = spec_of()
    build_cache(tmp_path, batches, encode, spec)
    build_cache(tmp_path, batches, lambda batch: pytest.fail("encoded again"), spec)


def test_batches_without_a_missing_row_are_not_encoded(tmp_path):
    spec, seen = spec_of(), []
    folder = build_cache(tmp_path, batches, encode, spec)
    (folder / "00001.json").unlink()  # killed between the records and their seal
    build_cache(tmp_path, batches, watching(seen), spec)
    assert sorted(set(seen)) == list(range(64, 128))
    open_cache(tmp_path, spec)


@pytest.mark.parametrize("damage", ["flip a byte", "cut", "seal"])
def test_a_damaged_shard_is_found_and_computed_again(tmp_path, damage, capsys):
    spec = spec_of()
    folder = build_cache(tmp_path, batches, encode, spec)
    whole = files(folder)
    shard = folder / "00001.bin"
    content = bytearray(shard.read_bytes())
    if damage == "flip a byte":
        content[100] ^= 1
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(content[:-1])
        with pytest.raises(CacheError, match=r"lacks shards \[1\] \(1 of 3\)"):
            open_cache(tmp_path, spec)
    else:
        (folder / "00001.json").write_text("{")
    rows = []
    build_cache(tmp_path, batches, watching(rows), spec)
    assert files(folder) == whole and set(rows) == set(range(64, 128))
    assert "00001.bin does not match" in capsys.readouterr().err


def test_a_build_killed_in_the_middle_is_resumed_to_the_same_bytes(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_cache as t
def stuck(batch):
    if batch["index"][0] >= 100:
        time.sleep(100)
    return t.encode(batch)
t.build_cache({str(tmp_path / "killed")!r}, t.batches, stuck, t.spec_of())
"""
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    folder = tmp_path / "killed" / spec_of().folder
    deadline = time.monotonic() + 60
    while not (folder / "00000.json").exists():
        assert child.poll() is None and time.monotonic() < deadline, child.stderr.read()
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stderr.close()
    assert not (folder / "00002.json").exists()
    (folder / ".00002.bin.left.partial").write_bytes(b"half a shard")
    kept = (folder / "00000.bin").stat().st_mtime_ns
    seen = []
    build_cache(tmp_path / "killed", batches, watching(seen), spec_of())
    assert (folder / "00000.bin").stat().st_mtime_ns == kept and min(seen) >= 64
    other = build_cache(tmp_path / "whole", batches, encode, spec_of())
    assert files(folder) == files(other)


def test_two_hosts_build_their_own_shards_of_one_cache(tmp_path):
    spec, rows = spec_of(), {0: [], 1: []}
    for host in (0, 1):
        if host:
            with pytest.raises(CacheError, match="lacks shards .1.*every host"):
                wait_for_cache(tmp_path, spec, timeout_s=0.0)
        watch = watching(rows[host])
        build_cache(tmp_path, batches, watch, spec, host=host, num_hosts=2)
    assert set(rows[0]) == {*range(64), *range(128, 150)} and set(rows[1]) == set(range(64, 128))
    alone = build_cache(tmp_path / "alone", batches, encode, spec)
    assert files(alone) == files(tmp_path / spec.folder)
    assert len(wait_for_cache(tmp_path, spec)) == ROWS


def test_a_second_process_waits_and_finds_the_cache_done(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_cache as t
calls = []
t.build_cache({str(tmp_path)!r}, t.batches, lambda b: calls.append(b) or t.encode(b), t.spec_of())
print(len(calls))
"""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    counts = [int(child.communicate(timeout=60)[0]) for child in children]
    assert sorted(counts) == [0, 19]


def test_the_key_covers_kind_rows_fields_and_identity():
    base = spec_of()
    others = [
        spec_of(rows=ROWS + 1),
        spec_of(dtype="float16"),
        spec_of(model="n"),
        spec_of(extra=None),
        CacheSpec("latents", ROWS, base.fields, base.identity),
        CacheSpec("taps", ROWS, base.fields[::-1], base.identity),
        CacheSpec("taps", ROWS, (Field("a", (3, 2)), base.fields[1]), base.identity),
    ]
    assert len({spec.key for spec in [base, *others]}) == 1 + len(others)
    assert spec_of().key == base.key


def test_a_cache_of_another_key_is_neither_opened_nor_written(tmp_path):
    spec, other = spec_of(), spec_of(model="n")
    folder = build_cache(tmp_path, batches, encode, spec)
    with pytest.raises(CacheError, match="no taps cache of this key"):
        open_cache(tmp_path, other)
    shutil.copytree(folder, tmp_path / other.folder)  # renamed by hand
    for use in (open_cache, lambda root, s: build_cache(root, batches, encode, s)):
        with pytest.raises(CacheError, match="holds key .* delete the folder"):
            use(tmp_path, other)


def test_too_small_a_disk_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 2**20 + 1000)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CacheError, match=r"taps cache .*needs 6.0 KB more in .*free some space"):
        build_cache(tmp_path, batches, lambda batch: pytest.fail("encoded"), spec_of())
    assert "150 images x 40 B = 6.0 KB" in capsys.readouterr().err


def test_a_disk_that_fills_up_keeps_what_was_written(tmp_path, monkeypatch):
    spec, real = spec_of(), cache_module.atomic_path

    def full(path):
        if Path(path).name == "00001.bin":
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr(cache_module, "atomic_path", full)
    with pytest.raises(CacheError, match="full; 1 shards written .* same command"):
        build_cache(tmp_path, batches, encode, spec)
    monkeypatch.setattr(cache_module, "atomic_path", real)
    rows = []
    build_cache(tmp_path, batches, watching(rows), spec)
    assert min(rows) == 64


def test_outputs_that_do_not_fit_the_description_are_refused(tmp_path):
    def wrong_shape(batch):
        a, b = encode(batch)
        return a[:, :1], b

    def not_finite(batch):
        a, b = encode(batch)
        return np.where(batch["index"][:, None, None] == 3, np.nan, a), b

    def too_large(batch):
        a, b = encode(batch)
        return a * 1e6, b

    with pytest.raises(CacheError, match=r"a has shape \(8, 1, 3\)"):
        build_cache(tmp_path / "1", batches, wrong_shape, spec_of())
    with pytest.raises(CacheError, match="a of row 3 does not fit"):
        build_cache(tmp_path / "2", batches, not_finite, spec_of())
    with pytest.raises(CacheError, match="65504, try bfloat16"):
        build_cache(tmp_path / "3", batches, too_large, spec_of(dtype="float16"))
    with pytest.raises(CacheError, match=r"without rows \[140, .*10 in all"):
        build_cache(tmp_path / "4", lambda wanted: batches(wanted[:140]), encode, spec_of())
    with pytest.raises(ValueError, match="complex64"):
        Field("a", (1,), "complex64")


def test_a_subset_yields_its_rows_in_order():
    subset = Subset([{"x": i} for i in range(10)], np.array([7, 2]))
    assert len(subset) == 2 and [example["x"] for example in subset] == [7, 2]


def test_shards_hold_at_most_64_rows_and_about_128_megabytes():
    large = CacheSpec("taps", 100, (Field("a", (3, 32, 32, 1920), "float16"),), {})
    assert large.shard_rows == 11 and large.num_shards == 10
    assert sum(len(large.rows_of(shard)) for shard in range(10)) == 100
    assert spec_of().shard_rows == 64


def test_a_cache_of_small_rows_may_have_larger_shards_under_a_key_of_its_own():
    small = CacheSpec("taps", 5000, (Field("a", (8,)),), {}, most_rows=1024)
    assert small.shard_rows == 1024 and small.num_shards == 5
    assert small.key != dataclasses.replace(small, most_rows=64).key
    assert "most_rows" not in spec_of().content  # caches made before are found


def test_a_cache_of_many_shards_holds_few_files_open(tmp_path):
    spec = CacheSpec("taps", 80, (Field("b", (4,)),), {}, most_rows=1)
    build_cache(tmp_path, batches, lambda batch: [encode(batch)[1]], spec)
    cache, before = open_cache(tmp_path, spec), len(os.listdir("/proc/self/fd"))
    found = [cache[row][0][0] for row in (*range(80), 3)]
    assert found == [*range(80), 3]
    assert len(os.listdir("/proc/self/fd")) - before <= cache_module.OPEN_SHARDS


def test_waiting_says_what_is_missing_and_looks_at_that_only(tmp_path, monkeypatch, capsys):
    spec, real, asked = spec_of(), cache_module.shard_paths, []
    build_cache(tmp_path, batches, encode, spec, host=0, num_hosts=2)

    def look(folder, shard):
        asked.append(shard)
        return real(folder, shard)

    def build_rest(seconds):
        del asked[:]
        build_cache(tmp_path, batches, encode, spec, host=1, num_hosts=2)

    monkeypatch.setattr(cache_module, "shard_paths", look)
    monkeypatch.setattr(cache_module.time, "sleep", build_rest)
    assert len(wait_for_cache(tmp_path, spec)) == ROWS
    assert f"1 of 3 shards of {tmp_path / spec.folder} are missing" in capsys.readouterr().err
    assert asked[-4:] == [1, 0, 1, 2]  # the missing one, then all as it is opened


def test_the_description_lies_beside_the_shards(tmp_path):
    spec = spec_of()
    folder = build_cache(tmp_path, batches, encode, spec)
    text = json.loads((folder / "spec.json").read_text())
    assert text["identity"] == {"model": "m"} and text["key"] == spec.key
    assert os.path.basename(folder).startswith("taps-" + spec.key[:24])


def test_reading_a_cache_needs_no_jax():
    code = "import sys, satdifuser_jax.cache; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_evaluation_pipeline_over_a_subset_feeds_a_build(tmp_path):
    from data.pipeline import eval_batches

    source, seen = [{"x": np.float32(row)} for row in range(ROWS)], []

    def from_pipeline(wanted):
        return eval_batches(Subset(source, wanted), batch_size=8)

    def checked(batch):
        real = batch["mask"]
        seen.extend(batch["index"][real].tolist())
        np.testing.assert_array_equal(batch["x"][real], batch["index"][real])
        return encode(batch)

    spec = spec_of()
    for host in (1, 0):
        build_cache(tmp_path, from_pipeline, checked, spec, host=host, num_hosts=2)
    assert sorted(seen) == list(range(ROWS))
    np.testing.assert_array_equal(open_cache(tmp_path, spec)[149][0], values(149)[0])
