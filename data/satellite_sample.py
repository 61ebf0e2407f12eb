"""One picture for pretraining as it is stored: file or pixels, caption, what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.images import NamedBytes, decode_8bit
from data.transforms import METADATA_FIELDS, normalise_metadata
from data.wording import Wording, always, compose

CAPTION = "a satellite image"
# Stand-ins for what is not known: their places become 0 after normalisation.
_NEUTRAL = dict(zip(METADATA_FIELDS, (0.0, 0.0, 1.0, 0.0, 2000.0, 1.0, 1.0), strict=True))


@dataclass(frozen=True)
class Sample:
    """One picture as it is stored.

    picture: the bytes of its file, or uint8 [H, W, 3]. fields: what is known of METADATA_FIELDS, in
    the units of `normalise_metadata`, gsd that of the stored picture.
    """

    id: str
    picture: bytes | np.ndarray
    wording: Wording = compose(always(CAPTION))
    fields: Mapping[str, float] = field(default_factory=dict)

    def pixels(self) -> np.ndarray:
        """uint8 [H, W, 3]. Raises ImageError naming the sample."""
        if isinstance(self.picture, np.ndarray):
            return self.picture
        return decode_8bit(NamedBytes(self.picture, self.id))


def metadata_vector(fields: Mapping[str, float], scale: float = 1.0) -> np.ndarray:
    """float32 [7], normalised; 0 where a field is not known. scale: multiplies the gsd.

    Raises ValueError on a value that cannot be right and on a field that is none of the seven.
    """
    if not fields:
        return np.zeros(len(METADATA_FIELDS), np.float32)
    strange = sorted(fields.keys() - _NEUTRAL.keys())
    if strange:
        raise ValueError(f"metadata {', '.join(strange)}; known: {', '.join(METADATA_FIELDS)}")
    values = _NEUTRAL | {name: float(value) for name, value in fields.items()}
    values["gsd"] *= scale
    vector = normalise_metadata(**values)
    for place, name in enumerate(METADATA_FIELDS):
        if name not in fields:
            vector[place] = 0.0
    return vector


def read_fields(row: Mapping[str, Any]) -> dict[str, float]:
    """What a row of a table or a JSON object says of METADATA_FIELDS; `date` is 2019-08-31..."""
    fields = {name: float(row[name]) for name in METADATA_FIELDS if row.get(name) not in (None, "")}
    if row.get("date"):
        fields |= read_date(str(row["date"]))
    return fields


def read_date(text: str) -> dict[str, float]:
    """Year, month and day of `2019-08-31` and of longer texts that begin so."""
    parts = text.strip()[:10].split("-")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise ValueError(f"date '{text:.40}': need YEAR-MONTH-DAY")
    return dict(zip(("year", "month", "day"), map(float, parts), strict=True))
