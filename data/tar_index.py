"""Where the members of a tar file lie, and which of it is damaged.

Python's reader ends at the first damaged header without a word, and everything behind it would be
lost. Here reading goes on at the next good header, and what was passed over is told.

`open_samples` puts members together to samples, and keeps what it found in a file beside the tar,
`.NAME.tar.index.npz`, or in the cache folder of the user where it may not write there.
"""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from common_jax.files import atomic_path, sha256_json
from data.images import SUFFIXES, ImageError

_BLOCK = 512
ARRAYS = ("input.npy", "rgb.npy", "npy")
INDEX_FORMAT = 1
WORTH_KEEPING = 1000
"""Members of a tar whose index is written to disk; a smaller one is read as fast."""


@dataclass(frozen=True)
class TarIndex:
    """members: {name: (first byte, bytes)}, in order. broken: what cannot be read, and where."""

    members: dict[str, tuple[int, int]]
    broken: tuple[str, ...]


def index_tar(path: str | os.PathLike) -> TarIndex:
    """Reads all headers of a plain tar file. Raises ImageError when it is none."""
    path, size = str(path), os.path.getsize(path)
    members: dict[str, tuple[int, int]] = {}
    broken: list[str] = []
    with open(path, "rb") as file:
        _refuse_other_files(file.read(_BLOCK), path)
        file.seek(0)
        end = 0
        with _opened(file, path) as archive:
            for member in _members(archive, size):
                if member.offset > end and _holds_data(path, end, member.offset):
                    broken.append(f"{path}: damaged header at byte {end}")
                padded = -(-member.size // _BLOCK) * _BLOCK if member.isreg() else 0
                end = member.offset_data + padded
                if member.isreg() and member.offset_data + member.size > size:
                    broken.append(f"{path}: member {member.name} is cut off at the end of the file")
                elif member.isreg():
                    members[member.name] = (member.offset_data, member.size)
        if end < size and _holds_data(path, end, size):
            broken.append(f"{path}: damaged header at byte {end}")
    return TarIndex(members, tuple(broken))


def _opened(file: IO[bytes], path: str) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:", ignore_zeros=True)
    except tarfile.ReadError as error:
        raise ImageError(f"{path}: not a plain tar archive ({error}); download it again") from error


def _refuse_other_files(first: bytes, path: str) -> None:
    if first[:2] == b"\x1f\x8b" or first[:4] == b"\x28\xb5\x2f\xfd" or first[:3] == b"BZh":
        raise ImageError(f"{path}: not a plain tar archive; unpack compressed archives first")
    if len(first) < _BLOCK or (first[257:262] != b"ustar" and not _is_header(first)):
        raise ImageError(f"{path}: not a plain tar archive; download it again")


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return not any(block)  # an empty archive is zeros
    return True


def _members(archive: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """Members in order; a long name whose header is damaged is passed over."""
    while True:
        try:
            member = archive.next()
        except tarfile.ReadError:
            if archive.offset >= size:
                return
            archive.offset += _BLOCK
            archive.fileobj.seek(min(archive.offset, size))
            continue
        if member is None:
            return
        yield member


def _holds_data(path: str, start: int, stop: int) -> bool:
    with open(path, "rb") as file:
        file.seek(start)
        while start < stop:
            block = file.read(min(1 << 20, stop - start))
            if not block:
                return False
            if block.strip(b"\0"):
                return True
            start += len(block)
    return False


# ---------------------------------------------------------------------------------------- samples
class TarSamples:
    """Samples of one tar: members whose names agree up to their first dot. N samples, P members.

    Compact, since a set has millions: keys uint8 (all names, one behind the other), key_ends int64
    [N], first int64 [N+1] (members of a sample are first[i]:first[i+1]), part int32 [P] (place in
    `parts`: what follows the key), start and size int64 [P] in bytes, picture int64 [N] (which
    member is the picture). broken: what cannot be read, samples without a picture included.
    """

    FIELDS = ("keys", "key_ends", "first", "part", "start", "size", "picture")

    def __init__(self, parts: Sequence[str], broken: Sequence[str], **arrays: np.ndarray):
        self.parts, self.broken = tuple(parts), tuple(broken)
        for name in self.FIELDS:
            setattr(self, name, arrays[name])

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, i: int) -> str:
        start = self.key_ends[i - 1] if i else 0
        return self.keys[start : self.key_ends[i]].tobytes().decode("utf-8", "surrogateescape")

    def members(self, i: int) -> dict[str, tuple[int, int]]:
        """{what follows the key: (first byte, bytes)}, in the order of the tar."""
        places = range(int(self.first[i]), int(self.first[i + 1]))
        return {self.parts[self.part[k]]: (int(self.start[k]), int(self.size[k])) for k in places}

    def picture_part(self, i: int) -> str:
        return self.parts[self.part[self.picture[i]]]


def split_name(name: str) -> tuple[str, str]:
    """(key, what follows it) of a member: folder and name up to the first dot, the rest."""
    path = PurePosixPath(name)
    key, _, rest = path.name.partition(".")
    return str(path.parent / key), rest.lower()


def _picture_of(parts: Sequence[str]) -> str | None:
    arrays = (name for name in ARRAYS if name in parts)
    files = (name for name in parts if f".{name.rpartition('.')[2]}" in SUFFIXES)
    return next(arrays, None) or next(files, None)


def read_samples(path: str) -> TarSamples:
    """Reads all headers of a tar, see `index_tar`."""
    index = index_tar(path)
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name, place in index.members.items():
        key, rest = split_name(name)
        found.setdefault(key, {})[rest] = place
    known: dict[str, int] = {}
    keys, ends, first, members, pictures = bytearray(), [], [0], [], []
    broken = list(index.broken)
    for key, parts in found.items():
        picture = _picture_of(tuple(parts))
        if picture is None:
            broken.append(f"{path}: {key} has no picture")
            continue
        keys += key.encode("utf-8", "surrogateescape")
        ends.append(len(keys))
        pictures.append(len(members) + list(parts).index(picture))
        members += [(known.setdefault(rest, len(known)), *parts[rest]) for rest in parts]
        first.append(len(members))
    part, start, size = np.array(members, np.int64).reshape(-1, 3).T
    return TarSamples(
        tuple(known),
        broken,
        keys=np.frombuffer(bytes(keys), np.uint8),
        key_ends=np.array(ends, np.int64),
        first=np.array(first, np.int64),
        part=part.astype(np.int32),
        start=start.copy(),
        size=size.copy(),
        picture=np.array(pictures, np.int64),
    )


def stamp_of(path: str | os.PathLike) -> tuple[int, int]:
    """(bytes, time of the last change in ns) of a file; -1 twice for an absent one."""
    try:
        state = os.stat(path)
    except FileNotFoundError:
        return -1, -1
    return state.st_size, state.st_mtime_ns


def open_samples(path: str) -> TarSamples:
    """The samples of a tar, from the index an earlier run wrote where the tar is unchanged."""
    stamp = [INDEX_FORMAT, *stamp_of(path)]
    for file in _index_files(path):
        kept = _load(file, stamp, path)
        if kept:
            return kept
    samples = read_samples(path)
    if len(samples.part) >= WORTH_KEEPING:
        for file in _index_files(path):
            with contextlib.suppress(OSError):  # a folder that may not be written, a full disk
                _save(file, samples, stamp, path)
                break
    return samples


def _index_files(path: str) -> list[Path]:
    whole = Path(path).absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    beside = whole.with_name(f".{whole.name}.index.npz")
    return [
        beside,
        cache / "eo-diffusion-jax" / "tar-index" / f"{sha256_json(str(whole))[:32]}.npz",
    ]


def _save(file: Path, samples: TarSamples, stamp: Sequence[int], path: str) -> None:
    broken = [text.removeprefix(f"{path}: ") for text in samples.broken]
    head = json.dumps({"stamp": stamp, "parts": samples.parts, "broken": broken}).encode()
    arrays = {name: getattr(samples, name) for name in TarSamples.FIELDS}
    with atomic_path(file) as partial, partial.open("wb") as out:
        np.savez(out, head=np.frombuffer(head, np.uint8), **arrays)


def _load(file: Path, stamp: Sequence[int], path: str) -> TarSamples | None:
    """None when there is no index, it is of another state of the tar, or damaged."""
    try:
        with np.load(file, allow_pickle=False) as found:
            head = json.loads(found["head"].tobytes())
            if head["stamp"] != list(stamp):
                return None
            broken = [f"{path}: {text}" for text in head["broken"]]
            return TarSamples(head["parts"], broken, **{n: found[n] for n in TarSamples.FIELDS})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
