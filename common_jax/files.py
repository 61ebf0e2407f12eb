"""Files: atomic writing, JSON, hashes, and the one restricted unpickler. numpy and stdlib only.

A file is either the old one or the whole new one, also after `kill -9`: it is written beside its
target, flushed to disk and renamed over it. Pickles from strangers never run code here: the
unpickler builds numbers, arrays, dates and inert stand-ins, and refuses every other class by name.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import json
import os
import pickle
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

# Classes of libraries that write metadata beside labels. They become records without behaviour.
INERT_PACKAGES = frozenset({"geobench", "ccb", "affine", "rasterio"})


# --------------------------------------------------------------------------------------- writing
@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the same folder; renames it over `path` when the body succeeds.

    When the body raises, the temporary file is removed and whatever stood at `path` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        os.chmod(partial, 0o666 & ~_umask())  # mkstemp's 0600 would lock colleagues out
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike, content: bytes) -> None:
    """Replaces the file at `path` by `content` in one step."""
    with atomic_path(path) as partial:
        partial.write_bytes(content)


def write_json(path: str | os.PathLike, value) -> None:
    """Writes `value` as indented JSON with sorted keys, atomically. NaN is refused (not JSON)."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def read_json(path: str | os.PathLike):
    """Parses a JSON file; a damaged one raises ValueError naming the file and the line."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore or delete it") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---------------------------------------------------------------------------------------- hashes
def sha256_file(path: str | os.PathLike) -> str:
    """Hex digest of a file's content, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value) -> str:
    """Hex digest of a JSON value; independent of key order and of spacing."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------------- unpickling
class UnsafePickleError(ValueError):
    """A pickle asked for a class or function outside the allow-list. Nothing of it was run."""


def restricted_loads(
    content: bytes,
    *,
    source: str,
    allowed: Mapping[tuple[str, str], object] | None = None,
    persistent_load: Callable | None = None,
):
    """Unpickles plain data: containers, numbers, strings, dates, numpy arrays and scalars.

    Classes of geobench, ccb, affine and rasterio become inert records (attributes in `__dict__`,
    constructor arguments in `args`). `allowed` adds (module, name) -> replacement and
    `persistent_load` resolves persistent ids, both for readers of a richer format.
    Raises UnsafePickleError naming `source` and the class for anything else, before it is called;
    ValueError naming `source` when the bytes are damaged.
    """
    reader = _RestrictedUnpickler(io.BytesIO(content), source, allowed or {}, persistent_load)
    try:
        return reader.load()
    except UnsafePickleError:
        raise
    except MemoryError as error:
        raise ValueError(f"{source}: the pickle asks for more memory than there is") from error
    except Exception as error:  # whatever a damaged stream raises, the file's name must be said
        raise ValueError(
            f"{source}: damaged or unsupported pickle ({type(error).__name__}: {error}); "
            "download the file again"
        ) from error


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(self, file, source: str, allowed: Mapping, persistent_load: Callable | None):
        super().__init__(file)
        self._source, self._allowed, self._persistent = source, allowed, persistent_load

    def find_class(self, module: str, name: str):
        for table in (self._allowed, _ALLOWED):
            if (module, name) in table:
                return table[module, name]
        if module.split(".")[0] in INERT_PACKAGES:
            return _inert_class(module, name)
        raise UnsafePickleError(
            f"{self._source}: the pickle refers to {module}.{name}, which is not on the list of "
            "harmless classes; it was refused and not run. If you trust where the file comes from, "
            "re-save its tensors or labels without that class in an environment of your own"
        )

    def persistent_load(self, pid):
        if self._persistent is None:
            raise UnsafePickleError(
                f"{self._source}: the pickle refers to outside data ({pid!r:.80}); refused"
            )
        return self._persistent(pid)


def _inert_class(module: str, name: str) -> type:
    """A class that remembers what it was given and does nothing."""

    def build(cls, *args, **kwargs):
        record = object.__new__(cls)
        record.args, record.kwargs = args, kwargs
        return record

    def set_state(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state

    members = {
        "__new__": build,
        "__init__": lambda self, *args, **kwargs: None,
        "__setstate__": set_state,
        "__module__": module,
    }
    return type(name.rpartition(".")[2], (), members)


class _Marker:
    """Stands for a class that may only be passed as an argument, never called."""

    def __init__(self, name: str):
        self.name = name


_NDARRAY, _OBJECT = _Marker("numpy.ndarray"), _Marker("object")


class _Dtype:
    """A plain number, text or object dtype. No fields or subarrays: their offsets are trusted."""

    def __init__(self, code, align=False, copy=False):
        self.real = np.dtype(str(code))

    def __setstate__(self, state):
        _version, order, subarray, names, fields = state[:5]
        if subarray is not None or names is not None or fields is not None:
            raise ValueError("a structured numpy dtype is not supported")
        if self.real.kind in "USV" or order not in ("<", ">"):
            return
        self.real = self.real.newbyteorder(order)


class _Array(np.ndarray):
    def __setstate__(self, state):
        version, shape, dtype, fortran, content = state
        super().__setstate__((version, shape, dtype.real, fortran, content))


def _reconstruct(cls, shape, code) -> np.ndarray:
    if cls is not _NDARRAY or tuple(shape) != (0,):
        raise ValueError("unexpected arguments of a numpy array")
    return np.ndarray.__new__(_Array, (0,), "b")


def _scalar(dtype: _Dtype, content: bytes = b""):
    if dtype.real.hasobject:
        raise ValueError("a numpy scalar of dtype object")
    return np.frombuffer(content, dtype.real, count=1)[0]


def _frombuffer(content, dtype: _Dtype, shape, order, axis_order=None) -> np.ndarray:
    array = np.frombuffer(content, dtype.real)
    if order == "K" and axis_order is not None:
        return array.reshape(shape).transpose(axis_order)
    return array.reshape(shape, order=order)


def _no_bytes() -> bytes:
    return b""  # how protocol 2 spells an empty byte string


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise ValueError(f"unexpected text encoding {encoding!r}")
    return text.encode("latin1")


def _reconstructor(cls, base, state):
    if not isinstance(cls, type) or base is not _OBJECT or state is not None:
        raise ValueError("unexpected arguments of an object of an old pickle protocol")
    return cls()


_ALLOWED: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("datetime", "date"): datetime.date,
    ("datetime", "datetime"): datetime.datetime,
    ("datetime", "time"): datetime.time,
    ("datetime", "timedelta"): datetime.timedelta,
    ("datetime", "timezone"): datetime.timezone,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _NDARRAY,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _no_bytes,
    ("__builtin__", "bytes"): _no_bytes,
    ("copyreg", "_reconstructor"): _reconstructor,
    ("copy_reg", "_reconstructor"): _reconstructor,
    ("builtins", "object"): _OBJECT,
    ("__builtin__", "object"): _OBJECT,
}
for _package in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_package}.multiarray", "_reconstruct"] = _reconstruct
    _ALLOWED[f"{_package}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"{_package}.numeric", "_frombuffer"] = _frombuffer
