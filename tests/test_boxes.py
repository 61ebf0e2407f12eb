"""Boxes as text and back: notations, styles, odd answers, and any text at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from geodit_jax.boxes import (
    CODECS,
    STYLES,
    count_objects,
    format_boxes,
    guess_codec,
    parse_boxes,
    pluralise,
)

SIZE = (800, 600)
STEP = {"unit2": 0.01 * 800, "int100": 8.0, "int1000": 0.8, "pixel": 1.0}
BOX = (80.0, 60.0, 400.0, 330.0)


@pytest.mark.parametrize(
    "codec, size, text",
    [
        ("unit2", (800, 800), "[0.10,0.07,0.50,0.41]"),
        ("unit2", (800, 600), "[0.10,0.20,0.50,0.54]"),  # 100 rows of padding above
        ("unit2", (600, 800), "[0.23,0.07,0.62,0.41]"),  # 100 columns of padding to the left
        ("unit2", (800, 601), "[0.10,0.20,0.50,0.54]"),  # half of an odd margin, rounded down
        ("int100", (800, 600), "[10,10,50,55]"),
        ("int1000", (800, 600), "[100,100,500,550]"),
        ("pixel", (800, 600), "[80,60,400,330]"),
    ],
)
def test_a_box_in_each_notation(codec, size, text):
    assert format_boxes([BOX], size, codec) == text
    np.testing.assert_allclose(parse_boxes(text, size, codec)[0], BOX, atol=STEP[codec] / 2 + 1e-9)


def test_two_boxes_in_each_style():
    boxes = [(0, 0, 8, 6), (400, 300, 800, 600)]
    texts = {style: format_boxes(boxes, SIZE, "int100", style) for style in STYLES}
    assert texts == {
        "brackets": "[0,0,1,1;50,50,100,100]",
        "lists": "[[0,0,1,1],[50,50,100,100]]",
        "angles": "{<0><0><1><1>}{<50><50><100><100>}",
    }
    for text in texts.values():
        np.testing.assert_allclose(parse_boxes(text, SIZE), boxes)


@pytest.mark.parametrize("style", STYLES)
def test_no_boxes_are_written_and_read_as_none(style):
    assert parse_boxes(format_boxes([], SIZE, "pixel", style), SIZE).shape == (0, 4)


corner = st.floats(0, 600, allow_nan=False)
some_boxes = st.lists(st.tuples(corner, corner, corner, corner), max_size=5)


@given(some_boxes, st.sampled_from(CODECS), st.sampled_from(STYLES), st.integers(1, 600))
def test_every_box_comes_back_within_half_a_step(boxes, codec, style, height):
    size = (600, height)
    found = parse_boxes(f"There are {format_boxes(boxes, size, codec, style)}.", size, codec)
    given_ = np.array(boxes).reshape(-1, 2, 2)
    expected = np.concatenate([given_.min(1), given_.max(1)], axis=1)
    expected = np.clip(expected, 0, [*size, *size])
    step = {"unit2": 6, "int100": 6, "int1000": 0.6, "pixel": 1}[codec]
    np.testing.assert_allclose(found, expected, atol=step / 2 + 1e-9)


def test_reversed_corners_are_sorted_and_parts_beyond_the_frame_cut():
    expected = [[80, 60, 400, 330]]
    assert format_boxes([(400, 330, 80, 60)], SIZE, "pixel") == "[80,60,400,330]"
    np.testing.assert_allclose(parse_boxes("[400,60,80,330]", SIZE, "pixel"), expected)
    assert format_boxes([(-5, -5, 900, 700)], SIZE, "int100") == "[0,0,100,100]"
    np.testing.assert_allclose(parse_boxes("[-5,0,120,101]", SIZE, "int100"), [[0, 0, 800, 600]])


@pytest.mark.parametrize(
    "text",
    [
        "It is at [10, 10, 50, 55].",
        "There are <p>13 ships</p>[10,10,50,55]",
        "13 [10,10,50,55",  # the window ended
        "{<10><10><50><55>|<90>}",
        "{ <10> <10> <50> <55> }",
        "<box>(10,10),(50,55)</box>",
        "[[10,10],[50,55]]",
        '{"bbox_2d": [10, 10, 50, 55], "label": "ship"}',
        "[10 10 50 55]",
        "10,10,50,55",
        "[10.0,10.,50,+55.00]",
        "[10,10,50,55;60,7",  # the second is not complete
    ],
)
def test_boxes_are_found_in_many_kinds_of_answers(text):
    np.testing.assert_allclose(parse_boxes(text, SIZE), [BOX])


@pytest.mark.parametrize(
    "text",
    ["", "no ships", "[1,2,3]", "There are 13 ships.", "[a,b,c,d]", "1.2.3.4", "[]", None, 7],
)
def test_answers_without_a_box_give_none(text):
    assert parse_boxes(text, SIZE).shape == (0, 4)


def test_a_count_before_a_bracket_is_no_coordinate():
    np.testing.assert_allclose(parse_boxes("2 [10,10,50,55]", SIZE), [BOX])
    np.testing.assert_allclose(parse_boxes("2,[10,10,50,55]", SIZE), [BOX])


@pytest.mark.parametrize(
    "largest, codec",
    [(1, "unit2"), (1.01, "int100"), (100, "int100"), (999, "int1000"), (1001, "pixel")],
)
def test_the_range_of_numbers_tells_the_notation(largest, codec):
    assert guess_codec(np.array([[0, 0, 0.5, largest]])) == codec


def test_a_named_notation_wins_over_the_guess():
    text = "[10,10,50,55]"
    np.testing.assert_allclose(parse_boxes(text, SIZE, "int1000"), [[8, 6, 40, 33]])
    np.testing.assert_allclose(parse_boxes(text, SIZE, "pixel"), [[10, 10, 50, 55]])


near_boxes = st.text(alphabet="0123456789.,;-+[](){}<>| \n", max_size=80)


@given(st.one_of(st.text(), near_boxes), st.sampled_from([None, *CODECS]))
@example("[" + "9" * 20 + "," + "9" * 20 + ",1,1]", "unit2")
@example("9" * 5000, None)
@example("[1," + " " * 5000, None)
def test_no_text_breaks_the_parser(text, codec):
    found = parse_boxes(text, SIZE, codec)
    assert found.dtype == np.float64 and found.shape[1:] == (4,)
    assert np.isfinite(found).all()
    assert (found >= 0).all() and (found <= [*SIZE, *SIZE]).all()
    assert (found[:, :2] <= found[:, 2:]).all()


@pytest.mark.parametrize(
    "boxes, size, codec, style, message",
    [
        ([BOX], SIZE, "int10", "brackets", "codec='int10'"),
        ([BOX], SIZE, "int100", "xml", "style='xml'"),
        ([BOX], None, "int100", "brackets", "size=None"),
        ([BOX], (0, 5), "int100", "brackets", r"size=\(0, 5\)"),
        ([(1, 2, 3)], SIZE, "int100", "brackets", r"must be \[n,4\]"),
        ([(1, 2, 3, float("nan"))], SIZE, "int100", "brackets", "finite"),
        ([(1, 2), (3, 4)], SIZE, "int100", "brackets", r"must be \[n,4\]"),
    ],
)
def test_boxes_that_cannot_be_written_are_refused(boxes, size, codec, style, message):
    with pytest.raises(ValueError, match=message):
        format_boxes(boxes, size, codec, style)


def test_counts_are_english():
    assert [count_objects("ship", n) for n in (0, 1, 13)] == ["no ships", "1 ship", "13 ships"]
    words = ["bus", "harbors", "city", "railway", "box", "glass", "beach", ""]
    plurals = ["buses", "harbors", "cities", "railways", "boxes", "glasses", "beaches", ""]
    assert [pluralise(word) for word in words] == plurals
