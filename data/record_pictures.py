"""Pictures of records, by name: a file, a member of an archive, or a scene that is drawn.

`DIR/a.jpg` is a file, `DIR/part.zip!images/a.jpg` a member of a zip or tar archive,
`DIR/00000.array_record!7` record 7 of a shard of data/prepare.py, and `scene:SEED/SPLIT/INDEX@SIDE`
a scene of data/scenes.py. Every picture is uint8 [H, W, 3].
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from data.images import (
    ImageError,
    NamedBytes,
    decode_8bit,
    digest_of,
    is_image,
    refuse_system_errors,
    some_of,
)
from data.scenes import Scene, draw_scene
from data.shards import SUFFIX, read_packed
from data.tar_index import index_tar

INSIDE = "!"
_SCENE = re.compile(r"scene:(\d+)/(\w+)/(\d+)@(\d+)$")


def scene_name(seed: int, split: str, index: int, side: int) -> str:
    return f"scene:{seed}/{split}/{index}@{side}"


def scene_of(name: str) -> Scene:
    """The scene a name stands for. Raises ImageError on a name that is none."""
    found = _SCENE.match(name)
    if not found:
        raise ImageError(f"{name}: not a scene; write scene:SEED/SPLIT/INDEX@SIDE")
    seed, split, index, side = found.groups()
    return draw_scene(int(seed), split, int(index), int(side))


@lru_cache(maxsize=64)
def _zip(path: str, process: int) -> zipfile.ZipFile:
    """An open archive; a forked process has its own, since a file offset is shared."""
    return zipfile.ZipFile(path)


@lru_cache(maxsize=64)
def _tar_members(path: str) -> dict[str, tuple[int, int]]:
    """{member: (first byte, number of bytes)} of a tar file that is not compressed."""
    index = index_tar(path)
    if index.broken:
        logging.warning("%d damaged members: %s", len(index.broken), some_of(index.broken))
    return index.members


def members(path: str | os.PathLike) -> list[str]:
    """Names inside a zip or tar archive, in its order. Raises ImageError on a damaged one."""
    path = str(path)
    if path.endswith(".tar"):
        return list(_tar_members(path))
    try:
        return [n for n in _zip(path, os.getpid()).namelist() if not n.endswith("/")]
    except zipfile.BadZipFile as error:
        raise ImageError(f"{path}: damaged archive ({error}); download it again") from error


def read_member(name: str) -> bytes:
    """The bytes of `archive!member`. Raises FileNotFoundError when the archive lacks it."""
    path, _, member = name.partition(INSIDE)
    if path.endswith(SUFFIX):
        return read_packed(path, int(member))[1]["picture"]
    if path.endswith(".tar"):
        if member not in _tar_members(path):
            raise FileNotFoundError(f"{path} has no member {member}")
        start, count = _tar_members(path)[member]
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(count)
    try:
        return _zip(path, os.getpid()).read(member)
    except KeyError:
        raise FileNotFoundError(f"{path} has no member {member}") from None
    except zipfile.BadZipFile as error:
        raise ImageError(f"{name}: damaged ({error}); download the archive again") from error


def read_picture(name: str) -> np.ndarray:
    """uint8 [H, W, 3]; 16-bit values are divided by 257. Raises ImageError naming the picture."""
    if name.startswith("scene:"):
        return scene_of(name).image
    return decode_8bit(NamedBytes(read_member(name), name) if INSIDE in name else name)


def _header(file, name: str) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            return image.size
    except Exception as error:  # decoders raise anything from OSError to struct.error
        refuse_system_errors(error)
        raise ImageError(
            f"{name}: cannot be read as a picture ({error}); replace or remove it"
        ) from error


def size_of(name: str) -> tuple[int, int]:
    """(width, height) from the header alone. Raises FileNotFoundError or ImageError."""
    if name.startswith("scene:"):
        found = _SCENE.match(name)
        if not found:
            scene_of(name)
        return int(found[4]), int(found[4])
    if INSIDE in name:
        return _header(NamedBytes(read_member(name), name), name)
    state = os.stat(name)
    return _size_once(name, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1_000_000)
def _size_once(name: str, size: int, changed: int) -> tuple[int, int]:
    return _header(name, name)


def mark_of(name: str) -> int:
    """A number that changes with the content, without reading it; -1 for an absent picture.

    The bytes of a file, of a member of a tar archive or of a shard; the checksum of a member of a
    zip archive.
    """
    if name.startswith("scene:"):
        return 0
    path, inside, member = name.partition(INSIDE)
    if not inside:
        return os.stat(name).st_size if os.path.exists(name) else -1
    if path.endswith(SUFFIX):
        return os.stat(path).st_size
    if path.endswith(".tar"):
        return _tar_members(path).get(member, (0, -1))[1]
    try:
        return _zip(path, os.getpid()).getinfo(member).CRC
    except KeyError:
        return -1


def _try_size(name: str) -> tuple[int, int] | str:
    try:
        return size_of(name)
    except FileNotFoundError:
        return f"there is no picture {name}; check the folder of the pictures"
    except ImageError as error:
        return str(error)


def _try_to_read(name: str) -> tuple[int, int] | str:
    found = _try_size(name)
    if isinstance(found, str):
        return found
    try:
        read_picture(name)
    except ImageError as error:
        return str(error)
    return found


def survey(names: Sequence[str], *, decoded: bool = False) -> dict[str, tuple[int, int] | str]:
    """{picture: (width, height), or what is wrong with it}; by threads.

    decoded=True also decodes every picture, and so finds the truncated ones.
    """
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(_try_to_read if decoded else _try_size, names)
        return dict(zip(names, found, strict=True))


class Finder:
    """Finds the pictures of a set by the names its annotations use.

    Looks below `folder`, also inside zip and tar archives: first by the path relative to it (or
    inside the archive), then by the file name, then by the name without suffix, for sets saved in
    another format than they were annotated in. A name that means several files finds none of them.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is not a folder (of pictures)")
        exact: dict[str, str] = {}
        for path in sorted(self.folder.rglob("*")):
            if is_image(path):
                exact[path.relative_to(self.folder).as_posix()] = str(path)
            elif path.suffix in (".zip", ".tar"):
                inside = (m for m in members(path) if is_image(Path(m)))
                exact |= {member: f"{path}{INSIDE}{member}" for member in inside}
        self._tables = [exact, _by(exact, lambda p: p.name), _by(exact, lambda p: p.stem)]

    def __len__(self) -> int:
        return len(self._tables[0])

    def find(self, name: str) -> str:
        """The picture. Raises ImageError saying what there is instead."""
        relative = PurePosixPath(name.removeprefix("./"))
        for table, key in zip(
            self._tables, (str(relative), relative.name, relative.stem), strict=True
        ):
            if key in table:
                if table[key]:
                    return table[key]
                raise ImageError(f"several pictures below {self.folder} are named {key}")
        known = ", ".join(list(self._tables[0])[:3])
        raise ImageError(
            f"no picture {name} below {self.folder} ({len(self)} pictures"
            f"{f', such as {known}' if known else ''}); check the folder of the pictures"
        )


def _by(exact: dict[str, str], key: Callable[[Path], str]) -> dict[str, str]:
    """{short name: picture, or "" where several have it}."""
    times = Counter(key(Path(name)) for name in exact)
    return {key(Path(n)): p if times[key(Path(n))] == 1 else "" for n, p in exact.items()}


def digests(names: Iterable[str]) -> dict[str, str]:
    """{hash of pixels: picture}, to find the same picture in two sets (splits.refuse_overlap)."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        names = list(dict.fromkeys(names))
        return dict(zip(pool.map(_digest, names), names, strict=True))


def _digest(name: str) -> str:
    return digest_of(read_picture(name))
