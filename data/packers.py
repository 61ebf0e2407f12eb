"""How the examples of each kind of set become bytes, and sources over prepared examples again.

A packer has `len`, `name`, `fingerprint`, `about`, `left_out` (how many were left out when the set
was opened, and what is wrong with some of them) and `pack(i) -> bytes`; it can be pickled, since
worker processes pack. `pack` looks at what it packs: a picture that cannot be decoded is not
written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.folders import fingerprint_of
from data.images import NamedBytes, decode_8bit
from data.packing import pack, pack_array, pack_picture, unpack_array
from data.record_pictures import INSIDE, mark_of, read_member, scene_of
from data.satellite_sample import metadata_vector
from data.shards import PackedExamples, split_folder

MAX_PROBLEMS = 20


@dataclass(frozen=True)
class PictureRules:
    """side: longer short sides are reduced to so many pixels; 0: all stay. quality: of the JPEG
    that reduced pictures and arrays become; 0: PNG, without loss. Other files keep their bytes.
    """

    side: int = 0
    quality: int = 0

    def apply(self, picture: bytes | np.ndarray, where: str) -> tuple[bytes, float]:
        """(bytes, by how much a pixel has grown). Raises ImageError when it cannot be decoded."""
        stored = isinstance(picture, bytes)
        pixels = decode_8bit(NamedBytes(picture, where)) if stored else picture
        short = min(pixels.shape[:2])
        if not self.side or short <= self.side:
            return (picture if stored else pack_picture(pixels, self.quality)), 1.0
        size = [max(1, round(n * self.side / short)) for n in (pixels.shape[1], pixels.shape[0])]
        small = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
        return pack_picture(np.asarray(small), self.quality), short / self.side


class SatellitePacker:
    """Samples of a reader of satellite.py: picture, wording, metadata."""

    kind = "satellite"

    def __init__(self, reader: Any, rows: Sequence[int], rules: PictureRules):
        self.reader, self.rows, self.rules = reader, rows, rules
        self.name, self.about = reader.name, {}
        self.left_out = len(reader.problems), tuple(reader.problems[:MAX_PROBLEMS])
        self.fingerprint = fingerprint_of(reader.fingerprint, [str(list(rows)), str(rules)])

    def __len__(self) -> int:
        return len(self.rows)

    def pack(self, i: int) -> bytes:
        sample = self.reader.sample(self.rows[i])
        picture, grown = self.rules.apply(sample.picture, sample.id)
        fields = dict(sample.fields)
        if "gsd" in fields:
            fields["gsd"] *= grown
        metadata_vector(fields)  # raises on what cannot be right
        header = {"id": sample.id, "wording": sample.wording.pieces, "fields": fields}
        return pack(header, {"picture": picture})


class PicturePacker:
    """Pictures of records by name (record_pictures.py); the texts go into a file of their own."""

    kind = "records"

    left_out: tuple[int, Sequence[str]] = 0, ()

    def __init__(self, name: str, pictures: Sequence[str], rules: PictureRules):
        self.name, self.pictures, self.rules, self.about = name, list(pictures), rules, {}
        marks = [f"{picture} {mark_of(picture)}" for picture in self.pictures]
        self.fingerprint = fingerprint_of(name, [*marks, str(rules)])

    def __len__(self) -> int:
        return len(self.pictures)

    def pack(self, i: int) -> bytes:
        name = self.pictures[i]
        if name.startswith("scene:"):
            content: bytes | np.ndarray = scene_of(name).image
        elif INSIDE in name:
            content = read_member(name)
        else:
            content = Path(name).read_bytes()
        picture, _ = self.rules.apply(content, name)
        return pack({"id": name.rpartition("/")[2]}, {"picture": picture})


class ExamplePacker:
    """Examples of a source of catalog.py: image and label, as they come, without loss."""

    kind = "examples"
    left_out: tuple[int, Sequence[str]] = 0, ()

    def __init__(self, source: Any):
        self.source, self.name, self.fingerprint = source, source.name, source.fingerprint
        self.about = {
            "task": source.task,
            "classes": list(source.classes),
            "native_side": source.native_side,
        }

    def __len__(self) -> int:
        return len(self.source)

    def pack(self, i: int) -> bytes:
        example = self.source[i]
        image, label = example["image"], np.asarray(example["label"])
        parts = {"label": pack_array(label)}
        if image.dtype == np.uint8:
            parts["picture"] = pack_picture(image)
        else:
            parts["image"] = pack_array(image)
        if example.get("metadata") is not None:
            parts["metadata"] = pack_array(np.asarray(example["metadata"], np.float32))
        return pack({"id": str(example["id"])}, parts)


class PreparedExamples:
    """Examples that ExamplePacker packed: image, label, id, and metadata where there were any."""

    def __init__(self, folder: Path):
        self.examples = PackedExamples(folder, "examples")
        manifest = self.examples.manifest
        self.name, self.fingerprint = manifest.name, manifest.fingerprint
        self.task, self.native_side = manifest.about["task"], manifest.about["native_side"]
        self.classes = tuple(manifest.about["classes"])

    def __len__(self) -> int:
        return len(self.examples)

    def labels(self) -> np.ndarray | None:
        """All labels, without decoding pictures; None for maps."""
        if self.task == "segmentation":
            return None
        found = (self.examples[i][1]["label"] for i in range(len(self)))
        return np.stack([unpack_array(label) for label in found])

    def __getitem__(self, i: int) -> dict[str, Any]:
        header, parts = self.examples[i]
        if "picture" in parts:
            image = decode_8bit(NamedBytes(parts["picture"], header["id"]))
        else:
            image = unpack_array(parts["image"])
        example = {"image": image, "label": unpack_array(parts["label"]), "id": header["id"]}
        if "metadata" in parts:
            example["metadata"] = unpack_array(parts["metadata"])
        return example


def open_prepared(root: str, split: str) -> PreparedExamples:
    """The examples data.prepare wrote below `root`, of a split of their own or of all."""
    return PreparedExamples(split_folder(root, split))
