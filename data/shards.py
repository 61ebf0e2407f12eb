"""Prepared sets: a folder of ArrayRecord shards and the manifest that says what belongs to it.

    manifest.json           kind, counts, and of every file its bytes and sha256
    00000.array_record ...  packed examples (packing.py), one a record
    records.jsonl           with kind "records": the texts, one line a record

Opening a folder checks that the files are those of the manifest and have their sizes; `verify`
reads them all and compares the hashes.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import re
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from common_jax.files import atomic_path, read_json, sha256_file, sha256_json, write_json
from data.images import some_of
from data.packing import unpack

FORMAT = 1
MANIFEST = "manifest.json"
SUFFIX = ".array_record"
KINDS = ("satellite", "records", "examples")


class ShardError(ValueError):
    """A prepared folder that is not what its manifest says; the message names the file."""


@dataclass(frozen=True)
class FileNote:
    """A file of a prepared set. count: examples in it; 0 for texts."""

    file: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder holds. source: fingerprint of what was converted, and how. about: by kind."""

    kind: str
    name: str
    source: str
    files: tuple[FileNote, ...]
    skipped: int = 0
    problems: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shards(self) -> list[FileNote]:
        return [note for note in self.files if note.file.endswith(SUFFIX)]

    @property
    def count(self) -> int:
        return sum(note.count for note in self.files)

    @property
    def fingerprint(self) -> str:
        """Identity of the content."""
        return f"prepared-{sha256_json([[n.file, n.sha256] for n in self.files])[:32]}"


def is_prepared(folder: str | os.PathLike) -> bool:
    return (Path(folder) / MANIFEST).is_file()


def split_folder(root: str | os.PathLike, split: str) -> Path:
    """The prepared folder of a split: `root/split`, or `root` itself where it is one."""
    root = Path(root).expanduser()
    if is_prepared(root / split):
        return root / split
    if is_prepared(root):
        return root
    raise FileNotFoundError(
        f"neither {root / split} nor {root} holds a {MANIFEST}; a prepared set ends with one: run "
        "`python -m data.prepare` again to finish it"
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / MANIFEST, {"format": FORMAT} | asdict(manifest))


def read_manifest(folder: str | os.PathLike, kind: str = "") -> Manifest:
    """The manifest, its files checked by name and size. kind: refused when it is another.

    Raises FileNotFoundError without a manifest or when a listed file is absent, ShardError on files
    it does not list and on other sizes.
    """
    folder = Path(folder).expanduser()
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} is absent; {folder} is no finished set of data.prepare")
    found = read_json(path)
    if found.pop("format", None) != FORMAT:
        raise ShardError(f"{path}: not format {FORMAT}; prepare the set again with this version")
    files = tuple(FileNote(**note) for note in found.pop("files"))
    manifest = Manifest(**found | {"files": files, "problems": tuple(found["problems"])})
    if kind and manifest.kind != kind:
        raise ShardError(f"{folder} holds {manifest.kind}, but {kind} are needed")
    _check_files(folder, manifest)
    return manifest


def _check_files(folder: Path, manifest: Manifest) -> None:
    listed = {note.file: note for note in manifest.files}
    found = {p.name: p.stat().st_size for p in folder.glob(f"*{SUFFIX}")}
    strangers = sorted(found.keys() - listed.keys())
    if strangers:
        raise ShardError(
            f"{folder}: {some_of(strangers)} not in {MANIFEST}; a manifest of other shards? Remove "
            "them, or prepare the set again"
        )
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {len(listed)} files of {MANIFEST} are absent: "
            f"{some_of(missing)}; copy them, or run data.prepare again to make them"
        )
    wrong = [n.file for n in manifest.files if (folder / n.file).stat().st_size != n.bytes]
    if wrong:
        raise ShardError(f"{folder}: other sizes than in {MANIFEST}: {some_of(wrong)}; copy again")


def verify(folder: str | os.PathLike, workers: int = 2) -> list[str]:
    """What is wrong with a prepared folder, by reading all of it; [] when nothing is."""
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)

    def check(note: FileNote) -> str:
        path = folder / note.file
        if sha256_file(path) != note.sha256:
            return f"{path}: another sha256 than in {MANIFEST}"
        if note.count and count_records(path) != note.count:
            return f"{path}: {count_records(path)} records, {MANIFEST} says {note.count}"
        return ""

    with ThreadPoolExecutor(workers) as pool:
        return [problem for problem in pool.map(check, manifest.files) if problem]


# ----------------------------------------------------------------------------------------- shards
def shard_name(number: int) -> str:
    return f"{number:05d}{SUFFIX}"


def write_shard(path: Path, records: Iterable[bytes]) -> FileNote:
    """Writes records into one file, atomically, and reads back how many there are."""
    count = 0
    with atomic_path(path) as partial:
        # Pictures are compressed already; a group of one makes every record a read of its own.
        writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
        try:
            for record in records:
                writer.write(record)
                count += 1
        finally:
            writer.close()
        if count_records(partial) != count:
            raise OSError(f"{path}: {count} records did not all reach the disk; is it full?")
        size, digest = partial.stat().st_size, sha256_file(partial)
    return FileNote(path.name, count, size, digest)


def count_records(path: Path) -> int:
    reader = ArrayRecordReader(str(path))
    try:
        return reader.num_records()
    finally:
        reader.close()


# ---------------------------------------------------------------------------------------- reading
MOST_FILES = 65536
OPEN_SHARDS = 256
"""So many stay open in a process, or a quarter of what it may; opening one costs ten reads."""
FAILED = re.compile(r"\b\w+\(\) failed: ")
"""How array_record begins what the operating system said; everything else is about the content."""


def allow_open_files() -> int:
    """Raises the number of files this process may hold open as far as the system lets it; -> it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if 0 <= hard < MOST_FILES else MOST_FILES
    if 0 <= soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a system may allow less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft >= 0 else MOST_FILES


class _OpenShards:
    """Reads records by file and place, and keeps the files used last open. For many threads."""

    def __init__(self):
        self.most, self.lock = min(OPEN_SHARDS, max(1, allow_open_files() // 4)), threading.Lock()
        self.readers: OrderedDict[str, ArrayRecordReader] = OrderedDict()

    def _take(self, path: str) -> ArrayRecordReader:
        with self.lock:
            reader = self.readers.pop(path, None) or ArrayRecordReader(
                path, "readahead_buffer_size:0", file_reader_buffer_size=32768
            )
            self.readers[path] = reader
            while len(self.readers) > self.most:  # it closes when the last thread is done with it
                self.readers.popitem(last=False)
        return reader

    def read(self, path: str, place: int) -> bytes:
        try:
            (content,) = self._take(path).read([place])
        except (RuntimeError, ValueError, IndexError) as error:
            with self.lock:  # a file that could not be opened or read is opened anew next time
                self.readers.pop(path, None)
            if FAILED.search(str(error)):
                raise OSError(
                    f"{path}: the system cannot read it ({error}). This is no damage and "
                    "is never skipped: see that the file is there, that its disk answers, and that "
                    "`ulimit -n` is not too low, then start again"
                ) from error
            raise ShardError(
                f"{path} record {place}: damaged ({error}); run data.prepare --verify"
            ) from error
        return content


@cache
def _open_shards(process: int) -> _OpenShards:
    """A forked process has its own."""
    return _OpenShards()


class PackedExamples:
    """Random access to the packed examples of a folder: `[i] -> (header, parts)`.

    Raises ShardError on a damaged example, OSError when a file cannot be read at all.
    """

    def __init__(self, folder: str | os.PathLike, kind: str):
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(self.folder, kind)
        self._files = [str(self.folder / note.file) for note in self.manifest.shards]
        self._ends = [*itertools.accumulate(note.count for note in self.manifest.shards)]
        if not self.manifest.count:
            raise ShardError(f"{self.folder} holds no examples; all of them were skipped")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> tuple[dict[str, Any], dict[str, bytes]]:
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)} in {self.folder}")
        number = bisect.bisect_right(self._ends, i)
        start = self._ends[number - 1] if number else 0
        return read_packed(self._files[number], int(i) - start)


def read_packed(path: str, place: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(header, parts) of one record of one shard; raises as PackedExamples."""
    return unpack(_open_shards(os.getpid()).read(path, place), f"{path} record {place}")
