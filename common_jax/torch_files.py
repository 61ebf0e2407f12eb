"""Zip-format torch files (`.bin`, `.pth`) without torch: the pickle inside passes through the
restricted unpickler of `common_jax.files`, which here knows tensors too, and nothing that runs.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from common_jax.files import atomic_path, restricted_loads

_STORAGE_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor on disk: its shape and dtype are known, its values are read on demand."""

    shape: tuple[int, ...]
    dtype: np.dtype
    source: str
    load: Callable[[tuple | slice | int], np.ndarray] = dataclasses.field(repr=False)

    def read(self, index: tuple | slice | int = ()) -> np.ndarray:
        """The values as a fresh array, or those at a numpy `index` (only that part is copied)."""
        return self.load(index)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def slabs(self, slab_bytes: int = 1 << 20) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, values) of about `slab_bytes` each, in order; a scalar is one slab."""
        if not self.shape:
            yield slice(0, 1), self.read().reshape(1)
            return
        step = max(1, slab_bytes * self.shape[0] // max(self.nbytes, 1))
        for start in range(0, self.shape[0], step):
            rows = slice(start, min(start + step, self.shape[0]))
            yield rows, self.read(rows)


def load_torch(path: str | os.PathLike):
    """The object in a zip-format torch file with every tensor as a LazyTensor. Torch is not needed.

    Raises UnsafePickleError when the pickle asks for anything but tensors and plain containers,
    ValueError when the file is damaged or of the format before torch 1.6.
    """
    path = Path(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is not a zip-format torch file: damaged, or written before torch 1.6. "
            'Download it again, or convert it once where torch is installed: python -c "import '
            f"torch; torch.save(torch.load('{path}', weights_only=True), '{path}')\""
        )
    try:
        archive = _TorchArchive(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged ({error}); download it again") from error
    return restricted_loads(
        archive.pickle,
        source=str(path),
        allowed=archive.globals,
        persistent_load=archive.storage,
    )


def tensors_of(state, source: str) -> dict[str, LazyTensor]:
    """The tensors of a state dict; refuses an object that is not one."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{source}: holds a {type(state).__name__}, wanted a state dict")
    return {name: value for name, value in state.items() if isinstance(value, LazyTensor)}


class _TorchArchive:
    """The zip of one torch file: `<root>/data.pkl` and one raw file per storage."""

    def __init__(self, path: Path):
        self._path = path
        self._starts: dict[str, int] = {}
        # Kept open: its list of members, one a tensor, is then read once.
        self._archive = archive = zipfile.ZipFile(path)
        members = archive.infolist()
        if any(info.compress_type != zipfile.ZIP_STORED for info in members):
            raise ValueError(f"{path}: compressed inside; torch never writes such files")
        self._sizes = {info.filename: info.file_size for info in members}
        pickles = [name for name in self._sizes if name.count("/") == 1]
        pickles = [name for name in pickles if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{path}: a zip without one data.pkl is not a torch weight file")
        self._root = pickles[0].removesuffix("data.pkl")
        order = f"{self._root}byteorder"
        if order in self._sizes and archive.read(order) != b"little":
            raise ValueError(f"{path}: written on a big-endian machine; not supported")
        self.pickle = archive.read(pickles[0])
        self.globals = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
            **{("torch", name): dtype for name, dtype in _STORAGE_DTYPES.items()},
        }

    def storage(self, pid) -> tuple[str, np.dtype, int]:
        kind, dtype, key, _device, count = pid
        dtype, member = np.dtype(dtype), f"{self._root}data/{key}"
        if kind != "storage" or self._sizes.get(member) != count * dtype.itemsize:
            raise ValueError(f"storage {key} is lacking or has the wrong size")
        return member, dtype, count

    def _read(self, member: str) -> bytes:
        try:
            return self._archive.read(member)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self._path}: {error}; download it again") from error

    def _start(self, member: str) -> int:
        """Where the bytes of a member begin. The first call for it checks its checksum."""
        if member not in self._starts:
            try:
                with self._archive.open(member) as stream:
                    while stream.read(1 << 20):
                        pass
            except zipfile.BadZipFile as error:
                raise ValueError(f"{self._path}: {error}; download it again") from error
            entry = self._archive.getinfo(member).header_offset
            with open(self._path, "rb") as file:
                file.seek(entry + 26)  # lengths of the name and of the padding, in the entry itself
                name, padding = struct.unpack("<HH", file.read(4))
            self._starts[member] = entry + 30 + name + padding
        return self._starts[member]

    def _tensor(self, storage, offset, shape, strides, *_rest) -> LazyTensor:
        member, dtype, count = storage
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if min((offset, *shape, *strides)) < 0 or (0 not in shape and last >= count):
            raise ValueError(f"a tensor of shape {shape} reaches beyond its storage {member}")

        def load(index) -> np.ndarray:
            if index == () or not count:
                flat = np.frombuffer(self._read(member), dtype)
            else:
                flat = np.memmap(self._path, dtype, "r", self._start(member), (count,))
            steps = tuple(s * dtype.itemsize for s in strides)
            view = np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)
            return np.array(view[index])

        return LazyTensor(tuple(shape), dtype, f"{self._path}:{member}", load)


def save_torch(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict that `torch.load(path, weights_only=True)` reads, atomically."""
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    with atomic_path(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        archive.writestr("archive/data.pkl", _pickle_state(arrays))
        archive.writestr("archive/byteorder", b"little")
        for i, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{i}", array.tobytes())
        archive.writestr("archive/version", b"3\n")


def _pickle_state(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The protocol 2 pickle of an OrderedDict of tensors, storage i holding tensor i."""

    def text(value: str) -> bytes:
        raw = value.encode()
        return b"X" + struct.pack("<I", len(raw)) + raw

    def integers(values: Iterable[int]) -> bytes:
        return b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values)

    names = {np.dtype(dtype): name.encode() for name, dtype in _STORAGE_DTYPES.items()}
    empty_dict = b"ccollections\nOrderedDict\n)R"
    parts = [b"\x80\x02", empty_dict, b"("]
    for i, (name, array) in enumerate(arrays.items()):
        if array.dtype not in names:
            raise ValueError(f"tensor {name}: torch files hold no {array.dtype}")
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        storage = text("storage") + b"ctorch\n" + names[array.dtype] + b"\n"
        storage += text(str(i)) + text("cpu") + integers([array.size])
        shape = b"(" + integers(array.shape) + b"t(" + integers(strides) + b"t"
        parts += [text(name), b"ctorch._utils\n_rebuild_tensor_v2\n((", storage, b"tQ"]
        parts += [integers([0]), shape, b"\x89", empty_dict, b"tR"]
    return b"".join([*parts, b"u."])
