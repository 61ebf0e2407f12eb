"""One example as bytes and back."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data.packing import PackingError, pack, pack_array, pack_picture, unpack, unpack_array


def test_header_and_parts_come_back():
    header = {"id": "Åland", "wording": [[[1.0, "a"]]], "fields": {"gsd": 0.3}}
    parts = {"picture": b"\x00\xff" * 9, "empty": b"", "label": b"7"}
    assert unpack(pack(header, parts), "x") == (header, parts)


@pytest.mark.parametrize(
    "spoil", [lambda c: c[:-1], lambda c: c + b"0", lambda c: c[:6], lambda c: b"JPEG" + c]
)
def test_bytes_that_are_cut_or_foreign_are_refused(spoil):
    with pytest.raises(PackingError, match="shard 3"):
        unpack(spoil(pack({"id": "a"}, {"picture": b"12345"})), "shard 3")


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.uint16])
def test_arrays_come_back_bit_for_bit(dtype):
    array = np.random.default_rng(0).normal(0, 1000, (7, 5, 3)).astype(dtype)[:, ::-1]
    found = unpack_array(pack_array(array))
    np.testing.assert_array_equal(found, array)
    assert found.dtype == dtype and unpack_array(pack_array(np.int32(3))) == 3


def test_pictures_are_stored_without_loss_or_as_jpeg():
    pixels = np.random.default_rng(0).integers(0, 255, (9, 11, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(pack_picture(pixels)))), pixels)
    assert Image.open(io.BytesIO(pack_picture(pixels, 95))).format == "JPEG"
