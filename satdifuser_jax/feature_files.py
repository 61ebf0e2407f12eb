"""Feature files for any use outside this project: .npz per image or ArrayRecord, with a manifest.

    manifest.json                  what every field, axis and channel is; names and files, by row
    <image name>.npz               npz: scale_0 [T,H,W,C], scale_1, ... fine to coarse
    features-00000.array_record    array_record: 64 images a file, a record = the bytes of an .npz

Values of type bfloat16 are stored as uint16 bits (the manifest says so); `FeatureFolder` undoes it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from common_jax.files import atomic_path, read_json, write_json
from common_jax.lock import locked
from common_jax.progress import Progress
from satdifuser_jax.cache import Batches, Encode, encode_rows, require_space
from satdifuser_jax.cache_spec import DTYPES, CacheSpec, to_disk

RECORDS_PER_FILE = {"npz": 1, "array_record": 64}


class FeatureError(RuntimeError):
    """Feature files that cannot be written or read as asked."""


def write_features(
    out: str | os.PathLike,
    batches: Batches,
    encode: Encode,
    spec: CacheSpec,
    *,
    names: Sequence[str],
    about: Mapping | None = None,
    file_format: str = "npz",
) -> Path:
    """Write the features of each image; returns the manifest's path. Goes on where it was stopped.

    names: relative path of each image, row by row. about: JSON that the manifest keeps for the
    reader (keys, taps, prompt). `batches` and `encode` as in `build_cache`.
    Raises FeatureError when `out` holds features of another kind, naming what differs.
    """
    out = Path(out)
    if file_format not in RECORDS_PER_FILE:
        raise ValueError(f"format={file_format!r} is not one of {tuple(RECORDS_PER_FILE)}")
    manifest = _manifest(spec, names, about, file_format)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock"):
        _start(out, manifest)
        writer = _Writer(out, spec, manifest["files"])
        wanted = np.flatnonzero(writer.left)
        needed = len(wanted) * spec.record.itemsize
        require_space(out, "feature files", needed, "float16, fewer taps, pooled features")
        if len(wanted):
            for rows, take, outputs in encode_rows(batches, encode, wanted, writer.wants):
                writer.add(rows, take, outputs)
            writer.finish(names)
        write_json(out / "manifest.json", {**manifest, "complete": True})
    return out / "manifest.json"


def _manifest(spec: CacheSpec, names: Sequence[str], about, file_format: str) -> dict:
    if len(names) != spec.rows or len(set(names)) != len(names):
        found = f"{len(names)} names ({len(set(names))} different)"
        raise FeatureError(f"{found} for {spec.rows} images; every image needs its own")
    per_file = RECORDS_PER_FILE[file_format]
    files = [f"features-{row // per_file:05d}.array_record" for row in range(len(names))]
    return {
        "key": spec.key,
        **spec.content,
        "file_format": file_format,
        "about": dict(about or {}),
        "names": list(names),
        "files": [f"{_safe(n)}.npz" for n in names] if file_format == "npz" else files,
        "complete": False,
    }


def _safe(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise FeatureError(f"image name {name!r} must be a path inside the folder of features")
    return str(path)


def _start(out: Path, manifest: dict) -> None:
    """Write the manifest, or check that the one there is of the same features."""
    path = out / "manifest.json"
    for stale in out.rglob(".*.partial"):  # left behind by a process that was killed
        stale.unlink(missing_ok=True)
    if not path.exists():
        write_json(path, manifest)
        return
    found = read_json(path)
    if all(found.get(k) == manifest[k] for k in ("key", "file_format", "names")):
        return
    old, new = ({**m, **m.get("identity", {})} for m in (found, manifest))
    ignored = ("key", "identity", "about", "files", "complete")
    differing = [k for k in sorted(new) if old.get(k) != new[k] and k not in ignored]
    raise FeatureError(
        f"{out} holds other features (different: {', '.join(differing) or 'taps'}); choose another "
        "folder or delete this one"
    )


class _Writer:
    """Collects the images of a file and writes it once they are all there."""

    def __init__(self, out: Path, spec: CacheSpec, files: Sequence[str]):
        self.out, self.spec, self.files = out, spec, files
        here = {name: (out / name).exists() for name in dict.fromkeys(files)}
        self.left = np.array([not here[name] for name in files], bool)
        self.waiting: dict[str, dict[int, bytes | None]] = {}
        for row in np.flatnonzero(self.left):
            self.waiting.setdefault(files[row], {})[int(row)] = None
        self.progress = Progress("features", max(int(self.left.sum()), 1), spec.record.itemsize)

    def wants(self, rows: np.ndarray) -> np.ndarray:
        return self.left[np.minimum(rows, len(self.left) - 1)]

    def add(self, rows: np.ndarray, take: np.ndarray, outputs: Sequence) -> None:
        fields = self.spec.fields
        columns = [to_disk(f, a, rows, take) for f, a in zip(fields, outputs, strict=True)]
        for i, row in enumerate(int(row) for row in rows[take]):
            if self.left[row]:
                self.left[row] = False
                buffer = io.BytesIO()
                np.savez(buffer, **{f.name: column[i] for f, column in zip(fields, columns)})
                self._keep(row, buffer.getvalue())
        self.progress.add(int(take.sum()))

    def _keep(self, row: int, record: bytes) -> None:
        name = self.files[row]
        records = self.waiting[name]
        records[row] = record
        if all(r is not None for r in records.values()):
            with atomic_path(self.out / name) as partial:
                if name.endswith(".npz"):
                    partial.write_bytes(record)
                else:
                    _write_records(partial, [records[row] for row in sorted(records)])
            del self.waiting[name]

    def finish(self, names: Sequence[str]) -> None:
        self.progress.close()
        absent = [names[row] for row in np.flatnonzero(self.left)]
        if absent:
            raise FeatureError(f"the batches ended without {absent[:4]} ({len(absent)} in all)")


def _write_records(path: Path, records: Sequence[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


class FeatureFolder:
    """Random access to feature files: [i] -> {"name": ..., "scale_0": [T,H,W,C], ...}."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise FeatureError(f"{self.folder} has no manifest.json: no features were written here")
        self.manifest = read_json(path)
        if not self.manifest["complete"]:
            raise FeatureError(f"{self.folder} is not complete; run the same extraction again")

    def __len__(self) -> int:
        return len(self.manifest["names"])

    def __getitem__(self, i: int) -> dict:
        i = range(len(self))[i]
        with np.load(io.BytesIO(self._content(i)), allow_pickle=False) as arrays:
            fields = self.manifest["fields"]
            values = {name: arrays[name].view(DTYPES[dtype][1]) for name, _, dtype in fields}
        return {"name": self.manifest["names"][i], **values}

    def _content(self, i: int) -> bytes:
        path = self.folder / self.manifest["files"][i]
        if path.suffix == ".npz":
            return path.read_bytes()
        reader = ArrayRecordReader(str(path))
        try:
            return reader.read([i % RECORDS_PER_FILE["array_record"]])[0]
        finally:
            reader.close()
