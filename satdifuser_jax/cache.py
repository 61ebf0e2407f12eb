"""Latents or taps of a whole data set on disk: written once, resumable, impossible to use stale.

A cache is a folder `<kind>-<key>/` whose key is a hash of everything its numbers depend on; change
any of it and another folder is meant. Inside, shard k holds rows [k*R, (k+1)*R) in `<k>.bin`
(records of all arrays of one image, one after the other) and its checksum in `<k>.json`, written
after it. A shard counts only with both, so `kill -9` costs the shards in hand. Host h of n builds
shards h, h+n, ... on a file system that all hosts see.
No jax here: data-loading processes read caches too.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from common_jax.files import atomic_path, read_json, sha256_file, write_json
from common_jax.lock import locked
from common_jax.progress import Progress, format_size
from satdifuser_jax.cache_spec import DTYPES, CacheError, CacheSpec, shard_paths, to_disk

Batch = Mapping[str, Any]
Batches = Callable[[np.ndarray], Iterable[Batch]] | Iterable[Batch]
Encode = Callable[[Batch], Sequence]  # device or numpy arrays, one [b, ...] per field

CACHE_SECONDS = 2 * 3600.0  # without a new shard: then nobody seems to make the missing ones
POLL_SECONDS, TELL_SECONDS = 2.0, 60.0  # between two looks at most, and between two lines
OPEN_SHARDS = 64  # files a cache holds open: a process may have 1024, and several caches


class Subset(Sequence):
    """Some rows of a source, in the order of `rows`: what `batches(wanted)` reads from."""

    def __init__(self, source: Any, rows: np.ndarray):
        self.source, self.rows = source, np.asarray(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int):
        return self.source[int(self.rows[i])]


def spread_rows(total: int, count: int) -> np.ndarray:
    """Row numbers of at most `count` rows, evenly over all `total` from the first to the last.

    Sets lie in the order of their classes or places: neighbours look alike.
    """
    return np.linspace(0, total - 1, min(count, total)).round().astype(int)


# --------------------------------------------------------------------------------------- building
def build_cache(
    root: str | os.PathLike,
    batches: Batches,
    encode: Encode,
    spec: CacheSpec,
    *,
    host: int = 0,
    num_hosts: int = 1,
    verify: str = "full",
) -> Path:
    """Fill what is missing of this host's shards; returns the cache's folder.

    batches: batches(wanted) -> dicts with `index` [b], the position in `wanted` (an int64 array of
        rows of the data set), `mask` [b] (False = padding) and what `encode` needs; or, simpler,
        an iterable of such dicts over the whole data set, `index` then being the row itself.
    encode: batch -> one array [b, *shape] per field; `index` in its batch is the row of the data
        set. It runs one batch ahead of the writing, and only for batches with a missing row.
    verify: "full" compares the checksum of every shard that is already there, "size" only its size.
    A second process that wants the same cache waits for the first and then finds it done.
    Raises CacheError before the first `encode` when the disk is too small.
    """
    folder = _prepare(Path(root), spec)
    mine = range(host, spec.num_shards, num_hosts)
    with locked(folder / f"build-{host}.lock"):
        whole = _check_shards(folder, spec, mine, verify)
        missing = [shard for shard, ok in zip(mine, whole) if not ok]
        one, total = format_size(spec.record.itemsize), format_size(spec.total_bytes)
        what = f"{spec.kind} cache ({spec.rows:,} images x {one} = {total})"
        needed = sum(len(spec.rows_of(shard)) for shard in missing) * spec.record.itemsize
        require_space(folder, what, needed, "float16, fewer taps, cache=latents, cache=none")
        if missing:
            writer = _Writer(folder, spec, missing)
            wanted = np.concatenate([spec.rows_of(shard) for shard in missing])
            for rows, take, outputs in encode_rows(batches, encode, wanted, writer.wants):
                writer.add(rows, take, outputs)
            writer.finish()
    return folder


def encode_rows(
    batches: Batches, encode: Encode, wanted: np.ndarray, wants: Callable[[np.ndarray], np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray, Sequence]]:
    """Yields (rows of the data set [b], which to keep [b], outputs of `encode`), one batch late.

    Being late lets the device work on a batch while the one before it is written. See `build_cache`
    for `batches`; batches without a row that `wants` are not encoded.
    """
    is_callable, pending = callable(batches), None
    for batch in batches(wanted) if is_callable else batches:
        rows = np.asarray(batch["index"], np.int64)
        rows = wanted[np.minimum(rows, len(wanted) - 1)] if is_callable else rows
        take = np.asarray(batch["mask"], bool) & wants(rows)
        if not take.any():
            continue
        ahead = (rows, take, encode({**batch, "index": rows}))
        if pending is not None:
            yield pending
        pending = ahead
    if pending is not None:
        yield pending


def wait_for_cache(
    root: str | os.PathLike, spec: CacheSpec, timeout_s: float = CACHE_SECONDS
) -> Cache:
    """Open a cache once the other processes have written their shards; says what is waited for.

    CacheError names the missing shards when none was finished for `timeout_s` seconds.
    """
    folder = Path(root) / spec.folder
    lacking = _find_lacking(folder, spec, range(spec.num_shards))
    newest, told, pause = time.monotonic(), -TELL_SECONDS, 0.1
    while lacking:
        now = time.monotonic()
        if now - newest >= timeout_s:
            raise CacheError(
                f"{_describe_lacking(folder, spec, lacking)}; none was finished for "
                f"{timeout_s:.0f} s"
            )
        if now - told >= TELL_SECONDS:
            _say(
                f"waiting for other processes: {len(lacking)} of {spec.num_shards} shards of "
                f"{folder} are missing (given up after {timeout_s:.0f} s without a new one)"
            )
            told = now
        time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS)
        left = _find_lacking(folder, spec, lacking)
        newest = newest if len(left) == len(lacking) else time.monotonic()
        lacking = left
    return open_cache(root, spec)


def _prepare(root: Path, spec: CacheSpec) -> Path:
    """The folder of the cache, with its description; a folder of something else is refused."""
    folder = root / spec.folder
    description = folder / "spec.json"
    if not description.exists():
        write_json(description, {"key": spec.key, **spec.content})
    found = read_json(description).get("key")
    if found != spec.key:
        raise CacheError(f"{folder} holds key {found}, expected {spec.key}; delete the folder")
    return folder


def _check_shards(folder: Path, spec: CacheSpec, shards: Sequence[int], verify: str) -> list[bool]:
    if verify not in ("full", "size"):
        raise ValueError(f"verify={verify!r} is not one of ('full', 'size')")

    def check(shard: int) -> bool:
        data, seal = shard_paths(folder, shard)
        if not (data.exists() and seal.exists()):
            return False
        size = len(spec.rows_of(shard)) * spec.record.itemsize
        try:
            known = read_json(seal)["sha256"]
        except (ValueError, KeyError):
            known = ""
        ok = data.stat().st_size == size and (verify == "size" or sha256_file(data) == known)
        if not ok:
            _say(f"{data} does not match its checksum or size: it will be computed again")
        return ok

    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        return list(pool.map(check, shards))


def require_space(folder: Path, what: str, needed: int, smaller: str) -> None:
    """CacheError when `needed` bytes do not fit where `folder` is; `smaller` is what to try."""
    free = shutil.disk_usage(folder).free
    _say(f"{what} in {folder}: {format_size(needed)} to write, {format_size(free)} free")
    if needed > free - 2**20:
        raise CacheError(
            f"{what} needs {format_size(needed)} more in {folder}, but only {format_size(free)} "
            f"are free; free some space, choose another folder, or something smaller ({smaller})"
        )


class _Writer:
    """Collects rows until a shard is whole, then writes it and its seal."""

    def __init__(self, folder: Path, spec: CacheSpec, missing: list[int]):
        self.folder, self.spec = folder, spec
        self.left = {shard: np.ones(len(spec.rows_of(shard)), bool) for shard in missing}
        self.open: dict[int, np.ndarray] = {}
        self.done = 0
        total = sum(len(rows) for rows in self.left.values())
        self.progress = Progress(f"{spec.kind} cache", total, spec.record.itemsize)
        for shard in missing:  # left behind by a build that was killed
            for stale in folder.glob(f".{shard:05d}.*.partial"):
                stale.unlink(missing_ok=True)

    def wants(self, rows: np.ndarray) -> np.ndarray:
        shards, places = np.divmod(rows, self.spec.shard_rows)
        wanted = [
            row < self.spec.rows and shard in self.left and self.left[shard][place]
            for row, shard, place in zip(rows, shards, places)
        ]
        return np.array(wanted, bool)

    def add(self, rows: np.ndarray, take: np.ndarray, outputs: Sequence) -> None:
        take = take & self.wants(rows)  # a row may have come twice
        fields = self.spec.fields
        columns = [to_disk(f, a, rows, take) for f, a in zip(fields, outputs, strict=True)]
        for i, row in enumerate(rows[take]):
            shard, place = divmod(int(row), self.spec.shard_rows)
            if shard not in self.open:
                self.open[shard] = np.empty(len(self.left[shard]), self.spec.record)
            for field, column in zip(self.spec.fields, columns):
                self.open[shard][field.name][place] = column[i]
            self.left[shard][place] = False
            if not self.left[shard].any():
                self._write(shard)
        self.progress.add(int(take.sum()))

    def _write(self, shard: int) -> None:
        data, seal = shard_paths(self.folder, shard)
        records = self.open.pop(shard)
        try:
            with atomic_path(data) as partial:
                records.tofile(partial)
            digest = hashlib.sha256(records.view(np.uint8)).hexdigest()
            write_json(seal, {"sha256": digest, "rows": len(records)})
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise CacheError(
                f"the disk of {self.folder} is full; {self.done} shards written in this run are "
                "kept. Free some space and run the same command: it goes on from there"
            ) from error
        self.done += 1
        del self.left[shard]

    def finish(self) -> None:
        self.progress.close()
        if self.left:
            absent = [
                row
                for shard, left in self.left.items()
                for row, is_left in zip(self.spec.rows_of(shard), left)
                if is_left
            ]
            raise CacheError(
                f"the batches ended without rows {absent[:8]} ({len(absent)} in all) of "
                f"{self.spec.rows}; the source yields fewer images than the cache was asked for"
            )


# ---------------------------------------------------------------------------------------- reading
class Cache:
    """Random access to a finished cache. Picklable; the shards read last stay open."""

    def __init__(self, folder: Path, spec: CacheSpec):
        self.folder, self.spec = folder, spec
        self._shard = functools.lru_cache(OPEN_SHARDS)(self._open)  # threads may share it

    def __reduce__(self):
        return Cache, (self.folder, self.spec)

    def __len__(self) -> int:
        return self.spec.rows

    def __getitem__(self, row: int) -> tuple[np.ndarray, ...]:
        """The arrays of one image, one per field: read-only views of the file, not copies."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of a cache of {len(self)} images")
        shard, place = divmod(int(row) % len(self), self.spec.shard_rows)
        record = self._shard(shard)[place]
        return tuple(record[f.name].view(DTYPES[f.dtype][1]) for f in self.spec.fields)

    def read(self, rows: Sequence[int]) -> tuple[np.ndarray, ...]:
        """The arrays of several images, one [len(rows), *shape] per field, copied."""
        return tuple(np.stack(column) for column in zip(*(self[row] for row in rows)))

    def _open(self, shard: int) -> np.ndarray:
        return np.memmap(shard_paths(self.folder, shard)[0], self.spec.record, mode="r")


def open_cache(root: str | os.PathLike, spec: CacheSpec) -> Cache:
    """The cache of exactly this spec; CacheError names the shards it still lacks."""
    folder = Path(root) / spec.folder
    if not (folder / "spec.json").exists():
        raise CacheError(f"no {spec.kind} cache of this key in {root}; build it with build_cache")
    _prepare(Path(root), spec)
    lacking = _find_lacking(folder, spec, range(spec.num_shards))
    if lacking:
        raise CacheError(_describe_lacking(folder, spec, lacking))
    return Cache(folder, spec)


def _find_lacking(folder: Path, spec: CacheSpec, shards: Iterable[int]) -> list[int]:
    """Those of `shards` that are not whole: no seal, no records, or of another size."""
    lacking = []
    for shard in shards:
        data, seal = shard_paths(folder, shard)
        size = len(spec.rows_of(shard)) * spec.record.itemsize
        if not (seal.exists() and data.exists() and data.stat().st_size == size):
            lacking.append(shard)
    return lacking


def _describe_lacking(folder: Path, spec: CacheSpec, lacking: Sequence[int]) -> str:
    return (
        f"{folder} lacks shards {list(lacking[:8])} ({len(lacking)} of {spec.num_shards}); run the "
        "building command again, on every host: finished shards are kept"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
