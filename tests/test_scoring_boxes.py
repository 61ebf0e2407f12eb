"""Box scores against pycocotools, by hand, and as properties."""

from __future__ import annotations

import contextlib
import io
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from geodit_jax.scoring import boxes

CORNER = st.integers(0, 60)
BOX = st.tuples(CORNER, CORNER, st.integers(1, 40), st.integers(1, 40)).map(
    lambda v: [v[0], v[1], v[0] + v[2], v[1] + v[3]]
)
BOXES = st.lists(BOX, max_size=6)
CONVENTIONS = pytest.mark.parametrize("convention", boxes.CONVENTIONS)


# ----------------------------------------------------------------------------------------- overlap
@CONVENTIONS
@settings(max_examples=60, deadline=None)
@given(a=BOXES, b=BOXES)
def test_overlap_is_symmetric_and_between_zero_and_one(convention, a, b):
    found = boxes.iou(a, b, convention)
    assert found.shape == (len(a), len(b))
    np.testing.assert_array_equal(found, boxes.iou(b, a, convention).T)
    assert ((found >= 0) & (found <= 1)).all()


@given(st.lists(st.floats(), min_size=4, max_size=4), BOX)
def test_overlap_of_any_numbers_is_between_zero_and_one(numbers, box):
    for convention in boxes.CONVENTIONS:
        found = boxes.iou([numbers], [box], convention)[0, 0]
        assert 0 <= found <= 1


@given(BOX)
def test_a_box_overlaps_itself_fully(box):
    for convention in boxes.CONVENTIONS:
        assert boxes.iou([box], [box], convention)[0, 0] == 1


def test_overlap_by_hand_in_each_convention():
    a, b = [[0, 0, 10, 10]], [[5, 0, 15, 10]]
    assert boxes.iou(a, b)[0, 0] == 50 / 150
    assert boxes.iou(a, b, "pixel")[0, 0] == 66 / (121 + 121 - 66)
    # Corners read as sizes: b becomes 5..20 by 0..10 and a stays; the overlap changes.
    assert boxes.iou(a, b, "corner_size")[0, 0] == 50 / (100 + 150 - 50)
    assert boxes.iou([[50, 50, 60, 60]], [[58, 58, 66, 66]])[0, 0] < 0.05
    assert boxes.iou([[50, 50, 60, 60]], [[58, 58, 66, 66]], "corner_size")[0, 0] > 0.5


def test_empty_reversed_and_infinite_boxes_overlap_nothing():
    odd = [[5, 5, 5, 5], [9, 9, 1, 1], [0, 0, np.inf, 9], [np.nan, 0, 5, 5]]
    assert not boxes.iou(odd, [[0, 0, 10, 10], [5, 5, 5, 5]]).any()
    assert boxes.iou([], odd).shape == (0, 4)


def test_wrong_shapes_and_names_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 3\)"):
        boxes.iou([[1, 2, 3]], [])
    with pytest.raises(ValueError, match="convention='xywh'"):
        boxes.iou([], [], "xywh")
    with pytest.raises(ValueError, match="matching='best'"):
        boxes.count_matches([], [], matching="best")


# --------------------------------------------------------------------------------------- grounding
def test_grounding_takes_the_first_box_and_an_unreadable_answer_is_wrong():
    truth = [[[0, 0, 10, 10]], [[0, 0, 10, 10]], [[0, 0, 10, 10]]]
    answers = [[[0, 0, 10, 5], [0, 0, 10, 10]], [], [[0, 0, 10, 10]]]
    overlaps = boxes.grounding_overlaps(answers, truth)
    assert overlaps.tolist() == [0.5, 0, 1]
    assert boxes.reaches(overlaps, 0.5).tolist() == [True, False, True]
    assert boxes.reaches(overlaps, 0.5, strict=True).tolist() == [False, False, True]


def test_of_several_targets_the_best_counts():
    overlaps = boxes.grounding_overlaps([[[0, 0, 4, 4]]], [[[50, 50, 60, 60], [0, 0, 4, 4]]])
    assert overlaps.tolist() == [1]


def test_grounding_needs_a_target_for_each_answer():
    with pytest.raises(ValueError, match="1 answers for 2 expressions"):
        boxes.grounding_overlaps([[]], [[], []])


# --------------------------------------------------------------------------------------- detection
def coco_ap(images, threshold):
    """AP of pycocotools for one class and equal confidences."""
    truth, found = [], []
    for image, (predicted, true) in enumerate(images, 1):
        for x0, y0, x1, y1 in np.asarray(true, float).reshape(-1, 4).tolist():
            box = [x0, y0, x1 - x0, y1 - y0]
            truth.append(
                {"id": len(truth) + 1, "image_id": image, "category_id": 1, "bbox": box}
                | {"area": box[2] * box[3], "iscrowd": 0}
            )
        for x0, y0, x1, y1 in np.asarray(predicted, float).reshape(-1, 4).tolist():
            box = [x0, y0, x1 - x0, y1 - y0]
            found.append({"image_id": image, "category_id": 1, "bbox": box, "score": 1.0})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": image} for image in range(1, len(images) + 1)],
            "categories": [{"id": 1, "name": "ship"}],
            "annotations": truth,
        }
        coco.createIndex()
        results = coco.loadRes(found)
        run = COCOeval(coco, results, "bbox")
        run.params.iouThrs = np.array([threshold])
        run.evaluate()
        run.accumulate()
    return float(run.eval["precision"][0, :, 0, 0, -1].mean())


def random_images(seed, count=25):
    draw = np.random.default_rng(seed)

    def some(most):
        corners = draw.uniform(0, 80, (draw.integers(0, most + 1), 2))
        return np.concatenate([corners, corners + draw.uniform(5, 40, corners.shape)], 1)

    images = []
    for _ in range(count):
        truth = some(6)
        near = truth[draw.random(len(truth)) < 0.7]
        near = near + np.tile(draw.normal(0, 3, (len(near), 2)), 2) + [0, 0, 2, 1]
        mixed = draw.permutation(np.concatenate([near, some(4)]))
        images.append((mixed, truth))
    return images


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("threshold", [0.5, 0.75])
def test_average_precision_is_that_of_pycocotools(seed, threshold):
    images = random_images(seed)
    wanted = coco_ap(images, threshold)
    assert 0.001 < wanted < 0.9
    assert boxes.average_precision(images, threshold) == pytest.approx(wanted, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(BOXES, BOXES), min_size=1, max_size=5))
def test_average_precision_of_whole_numbers_with_ties_is_that_of_pycocotools(images):
    if not any(predicted for predicted, _ in images):
        return  # pycocotools cannot load an empty list of results
    found = boxes.average_precision(images)
    if not any(truth for _, truth in images):
        assert found is None and coco_ap(images, 0.5) == -1
    else:
        assert found == pytest.approx(coco_ap(images, 0.5), abs=1e-6)


def test_average_precision_looks_at_a_hundred_boxes_like_pycocotools():
    wrong = [[200 + i, 200, 201 + i, 201] for i in range(100)]
    images = [([*wrong, [0, 0, 9, 9]], [[0, 0, 9, 9]]), ([[0, 0, 5, 5]], [[0, 0, 5, 5]])]
    assert boxes.average_precision(images) == pytest.approx(coco_ap(images, 0.5), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(BOX, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_a_perfect_answer_in_any_order_has_every_score_one(truth, generator):
    answer = generator.sample(truth, len(truth))
    assert boxes.average_precision([(answer, truth)]) == 1
    assert boxes.eleven_point(answer, truth) == 1
    for matching in ("greedy", "hungarian"):
        assert boxes.count_matches(answer, truth, matching=matching) == len(truth)
    assert boxes.f1(len(truth), len(answer), len(truth)) == 1


def test_eleven_points_by_hand():
    truth = [[0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]]
    answer = [truth[0], [70, 70, 80, 80], truth[1]]
    # Recall 1/3 at precision 1 covers 0..0.3 (4 points), recall 2/3 at 2/3 covers 0.4..0.6 (3).
    assert boxes.eleven_point(answer, truth) == pytest.approx((4 + 3 * 2 / 3) / 11)
    assert boxes.eleven_point([], truth) == 0 and boxes.eleven_point(answer, []) == 0
    assert boxes.eleven_point([], []) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(BOX, max_size=4), st.lists(BOX, max_size=4))
def test_hungarian_finds_the_most_pairs_there_can_be(predicted, truth):
    good = boxes.iou(predicted, truth) >= 0.3
    short = good if len(good) <= len(good.T) else good.T
    orders = itertools.permutations(range(short.shape[1]), len(short))
    most = max(sum(short[i, j] for i, j in enumerate(order)) for order in orders)
    greedy = boxes.count_matches(predicted, truth, 0.3)
    assert boxes.count_matches(predicted, truth, 0.3, "hungarian") == most >= greedy
    assert 2 * greedy >= most


def test_hungarian_beats_greedy_where_the_best_pair_blocks_two():
    truth = [[0, 0, 10, 10], [4, 0, 14, 10]]
    predicted = [[3, 0, 13, 10], [7, 0, 17, 10]]
    # The best overlap, 9/11, takes the only true box that the second answer reaches.
    assert boxes.count_matches(predicted, truth) == 1
    assert boxes.count_matches(predicted, truth, matching="hungarian") == 2


def test_f1_of_nothing_is_undefined():
    assert np.isnan(boxes.f1(0, 0, 0)) and boxes.f1(0, 3, 0) == 0
