"""The metadata vector and what a table says of a picture."""

from __future__ import annotations

import numpy as np
import pytest

from data.satellite_sample import Sample, metadata_vector, read_date, read_fields
from data.transforms import normalise_metadata

FIELDS = {
    "longitude": -43.2, "latitude": -22.9, "gsd": 0.5, "cloud_cover": 0.2,
    "year": 2019, "month": 8, "day": 31}  # fmt: skip


def test_known_fields_are_normalised_and_the_gsd_follows_the_resizing():
    np.testing.assert_array_equal(metadata_vector(FIELDS), normalise_metadata(**FIELDS))
    doubled = metadata_vector(FIELDS, scale=2.0)
    assert doubled[2] == 2 * metadata_vector(FIELDS)[2] and doubled.dtype == np.float32


@pytest.mark.parametrize("lost", list(FIELDS))
def test_a_field_that_is_not_known_is_zero_and_touches_no_other(lost):
    found = metadata_vector({k: v for k, v in FIELDS.items() if k != lost})
    expected = metadata_vector(FIELDS)
    expected[list(FIELDS).index(lost)] = 0
    np.testing.assert_array_equal(found, expected)


def test_impossible_or_unknown_metadata_are_refused():
    with pytest.raises(ValueError, match="longitude=181"):
        metadata_vector({"longitude": 181})
    with pytest.raises(ValueError, match="latitude=nan"):
        metadata_vector({"latitude": float("nan")})
    with pytest.raises(ValueError, match="metadata lat; known: longitude"):
        metadata_vector({"lat": 3})


def test_rows_of_tables_give_numbers_and_dates():
    row = {"path": "a.png", "gsd": "0.5", "latitude": "", "date": "2019-08-31T10:11:12Z"}
    assert read_fields(row) == {"gsd": 0.5, "year": 2019, "month": 8, "day": 31}
    with pytest.raises(ValueError, match="need YEAR-MONTH-DAY"):
        read_date("31.8.2019")
    with pytest.raises(ValueError, match="could not convert"):
        read_fields({"gsd": "half a metre"})


def test_pixels_are_passed_on():
    pixels = np.zeros((9, 9, 3), np.uint8)
    assert Sample("a", pixels).pixels() is pixels
