"""Blocks of numbers, nested few-label subsets, refused overlap."""

from __future__ import annotations

import numpy as np
import pytest

from data.splits import (
    Subset,
    block_cuts,
    few_labels,
    image_number,
    keep_fraction,
    labels_of,
    refuse_overlap,
    split_of,
)


@pytest.mark.parametrize(
    "name, number",
    [
        ("forest07.jpg", 7),
        ("009_x187_y0.jpg", 9),
        ("satImage_001.png", 1),
        ("a/12/S2_tile_34.tif", 34),
    ],
)
def test_numbers_are_read_off_names(name, number):
    assert image_number(name) == number


def test_a_name_without_number_says_what_to_do():
    with pytest.raises(ValueError, match="'field.png' has no number.*test=DIR"):
        image_number("field.png")


def test_the_highest_quarter_is_test_and_of_the_rest_validation():
    cuts = block_cuts({"a": range(100), "b": [5, 1, 9, 3]})
    parts = [split_of(cuts, "a", n) for n in range(100)]
    assert parts == ["train"] * 56 + ["val"] * 19 + ["test"] * 25
    assert [split_of(cuts, "b", n) for n in (1, 3, 5, 9)] == ["train", "train", "val", "test"]
    assert split_of(cuts, "b", 7) == "val"


def test_too_few_numbers_are_refused():
    with pytest.raises(ValueError, match="'a' has 2 numbered images"):
        block_cuts({"a": [1, 2, 2]})


def test_few_labels_are_stratified_nested_and_seeded():
    labels = np.repeat(np.arange(5), [200, 100, 50, 4, 1])
    chosen = {f: few_labels(labels, 355, f, 0) for f in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)}
    for small, large in zip(list(chosen), list(chosen)[1:]):
        assert set(chosen[small]) <= set(chosen[large])
    for fraction, indices in chosen.items():
        counts = np.bincount(labels[indices], minlength=5)
        assert (counts >= 1).all() and counts[0] == round(200 * fraction)
        assert (np.diff(indices) > 0).all()
    assert len(chosen[1.0]) == 355
    assert set(chosen[0.1]) != set(few_labels(labels, 355, 0.1, 1))
    np.testing.assert_array_equal(chosen[0.1], few_labels(labels, 355, 0.1, 0))


def test_few_labels_without_class_numbers_are_a_share_of_all():
    assert len(few_labels(None, 200, 0.05, 0)) == 10
    assert len(few_labels(np.ones((200, 3)), 200, 0.05, 0)) == 10
    for wrong in (0, -0.1, 1.5):
        with pytest.raises(ValueError, match="label_fraction"):
            few_labels(None, 200, wrong, 0)


class Rows:
    name, task, classes, native_side, fingerprint = "rows", "classification", ("a", "b"), 8, "rows"

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return {"label": np.int32(i % 2), "id": str(i)}


def test_a_subset_is_a_source_with_its_own_fingerprint():
    thin = keep_fraction(Rows(), 0.1, seed=3)
    assert len(thin) == 4 and sorted(labels_of(thin)) == [0, 0, 1, 1]
    assert (thin.name, thin.task, thin.classes, thin.native_side) == (
        "rows",
        "classification",
        ("a", "b"),
        8,
    )
    prints = {Rows.fingerprint, thin.fingerprint, keep_fraction(Rows(), 0.1, seed=4).fingerprint}
    assert len(prints) == 3
    whole = Rows()
    assert keep_fraction(whole, 1.0) is whole
    assert Subset(whole, [5], "x")[0]["id"] == "5"


def test_a_picture_in_two_splits_is_refused_by_name():
    refuse_overlap({"train": {"x": "a.png"}, "test": {"y": "b.png"}})
    with pytest.raises(ValueError, match=r"1 pictures are in train and in test: a\.png = c\.png"):
        refuse_overlap({"train": {"x": "a.png"}, "val": {}, "test": {"x": "c.png"}})
