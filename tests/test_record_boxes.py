"""Boxes of any notation become corners in pixels, inside the frame, or are refused."""

from __future__ import annotations

from collections import Counter

import pytest

from data.record_boxes import RecordError, settle_box, to_pixels


@pytest.mark.parametrize(
    ("box_format", "box"),
    [
        ("pixel", (20, 10, 60, 40)),
        ("xywh", (20, 10, 40, 30)),
        ("unit", (0.1, 0.1, 0.3, 0.4)),
        ("int100", (10, 10, 30, 40)),
        ("int1000", (100, 100, 300, 400)),
        ("unit2", (0.1, 0.3, 0.3, 0.45)),  # square of 200, 50 pixels above
    ],
)
def test_every_notation_gives_the_same_corners(box_format, box):
    assert to_pixels(box, box_format, (200, 100)) == pytest.approx((20, 10, 60, 40), abs=1e-12)


def test_the_padded_square_of_a_tall_picture_is_shifted_sideways():
    # 101 x 200: (200 - 101) // 2 = 49 columns on the left
    assert to_pixels((0.5, 0.5, 0.6, 0.6), "unit2", (101, 200)) == pytest.approx((51, 100, 71, 120))


@pytest.mark.parametrize(
    ("box", "box_format", "said"),
    [
        ((1, 2, 3), "pixel", "need four numbers"),
        ((1, 2, 3, "x"), "pixel", "need four numbers"),
        ((1, 2, 3, float("nan")), "pixel", "not finite"),
        ((1, 2, 3, 4), "voc", "box_format 'voc' is none of pixel"),
        ((1, 2, 3, 4), "int100", "needs the size"),
    ],
)
def test_what_is_no_box_is_refused(box, box_format, said):
    with pytest.raises(RecordError, match=said):
        to_pixels(box, box_format, None)


@pytest.mark.parametrize(
    ("box", "fixed", "said"),
    [
        ((30, 20, 10, 5), (10, 5, 30, 20), "reversed"),
        ((-5, 5, 10, 120), (0, 5, 10, 100), "reaches beyond its picture of 200x100"),
        ((50, 10, 50, 20), (49.5, 10, 50.5, 20), "no area"),
        ((200, 10, 200, 20), (199, 10, 200, 20), "no area"),
    ],
)
def test_a_faulty_box_is_refused_or_fixed_and_counted(box, fixed, said):
    counts = Counter()
    with pytest.raises(RecordError, match=said):
        settle_box(box, (200, 100), False, counts)
    assert not counts
    assert settle_box(box, (200, 100), True, counts) == fixed
    assert sum(counts.values()) == 1


def test_one_pixel_beyond_the_frame_is_a_convention_and_no_fault():
    counts = Counter()
    assert settle_box((1, 1, 201, 101), (200, 100), False, counts) == (1, 1, 200, 100)
    assert not counts


def test_a_box_outside_the_picture_is_refused_even_when_fixing():
    with pytest.raises(RecordError, match="lies outside"):
        settle_box((210, 5, 220, 9), (200, 100), True, Counter())
