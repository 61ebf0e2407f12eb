"""Where the members of a tar file lie, and which of it is damaged.

Python's reader ends at the first damaged header without a word, and everything behind it would be
lost. Here reading goes on at the next good header, and what was passed over is told.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from data.images import ImageError

_BLOCK = 512


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
