"""What a cache holds: its arrays, its key, its layout on disk. No jax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from common_jax.files import sha256_json

FORMAT = 1  # raise it when what is computed or how it is stored changes
SHARD_BYTES, SHARD_ROWS = 128 * 2**20, 64
# dtype -> (what it is on disk, what readers see); bfloat16 is no numpy type, its bits are kept.
DTYPES = {
    "float32": ("<f4", np.dtype(np.float32)),
    "float16": ("<f2", np.dtype(np.float16)),
    "bfloat16": ("<u2", np.dtype(ml_dtypes.bfloat16)),
    "uint8": ("|u1", np.dtype(np.uint8)),
    "int16": ("<i2", np.dtype(np.int16)),  # label maps
    "int32": ("<i4", np.dtype(np.int32)),
}


class CacheError(RuntimeError):
    """A cache that cannot be built or read as asked."""


@dataclass(frozen=True)
class Field:
    """One array of every image, without the batch axis."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"cache dtype {self.dtype!r} is not one of {tuple(DTYPES)}")


@dataclass(frozen=True)
class CacheSpec:
    """What a cache holds. identity: a JSON value naming everything the numbers depend on.

    most_rows: of a shard, which holds fewer where a row is large.
    """

    kind: str
    rows: int
    fields: tuple[Field, ...]
    identity: Mapping[str, Any]
    most_rows: int = SHARD_ROWS

    @property
    def content(self) -> dict:
        fields = [[f.name, list(f.shape), f.dtype] for f in self.fields]
        shards = {} if self.most_rows == SHARD_ROWS else {"most_rows": self.most_rows}
        return shards | {
            "format": FORMAT,
            "kind": self.kind,
            "rows": self.rows,
            "fields": fields,
            "identity": dict(self.identity),
        }

    @property
    def key(self) -> str:
        return sha256_json(self.content)

    @property
    def folder(self) -> str:
        return f"{self.kind}-{self.key[:24]}"

    @property
    def record(self) -> np.dtype:
        """The numpy type of one image on disk."""
        return np.dtype([(f.name, DTYPES[f.dtype][0], f.shape) for f in self.fields])

    @property
    def total_bytes(self) -> int:
        return self.rows * self.record.itemsize

    @property
    def shard_rows(self) -> int:
        return int(np.clip(SHARD_BYTES // self.record.itemsize, 1, self.most_rows))

    @property
    def num_shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """The rows of the data set in one shard; the last one may be short."""
        first = shard * self.shard_rows
        return range(first, min(first + self.shard_rows, self.rows))


def shard_paths(folder: Path, shard: int) -> tuple[Path, Path]:
    """(records, seal) of one shard."""
    return folder / f"{shard:05d}.bin", folder / f"{shard:05d}.json"


def to_disk(field: Field, values, rows: np.ndarray, take: np.ndarray) -> np.ndarray:
    """The rows to keep of one output, in the type on disk; checked for shape and finite values."""
    values = np.asarray(values)
    if values.shape != (len(rows), *field.shape):
        raise CacheError(
            f"{field.name} has shape {values.shape}, the cache was described with "
            f"{(len(rows), *field.shape)}"
        )
    disk, seen = DTYPES[field.dtype]
    values = values[take]
    with np.errstate(over="ignore"):
        cast = values.astype(seen, copy=False)
    good = cast == values if seen.kind in "iu" else np.isfinite(cast)
    good = good.all(axis=tuple(range(1, good.ndim)))
    if not good.all():
        row = rows[take][~good][0]
        hint = "; float16 ends at 65504, try bfloat16" if field.dtype == "float16" else ""
        raise CacheError(f"{field.name} of row {row} does not fit into finite {field.dtype}{hint}")
    return cast.view(disk)
