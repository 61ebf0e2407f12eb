"""Losses against torch; sums that add up over batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import rel_error
from head_cases import make_spec
from torch.nn import functional as F

from satdifuser_jax.losses import binary_cross_entropy, check_labels, cross_entropy, head_loss

RNG = np.random.default_rng(0)


def test_cross_entropy_equals_torch_with_ignored_pixels():
    logits = 30 * RNG.standard_normal((2, 5, 5, 4)).astype(np.float32)
    labels = RNG.integers(0, 4, (2, 5, 5))
    labels[0, :3] = 255
    total, weight = cross_entropy(logits, labels, ignore_index=255)
    nchw = torch.as_tensor(logits).permute(0, 3, 1, 2)
    expected = F.cross_entropy(nchw, torch.as_tensor(labels), ignore_index=255)
    assert weight == 50 - 15
    assert rel_error(total / weight, expected) < 1e-6


def test_binary_cross_entropy_equals_torch_at_any_size_of_logit():
    logits = np.concatenate([RNG.standard_normal((4, 6)), [[-200, 200, 0, 90, -90, 1]]])
    labels = (RNG.random((5, 6)) < 0.4).astype(np.float32)
    total, weight = binary_cross_entropy(logits.astype(np.float32), labels)
    expected = F.binary_cross_entropy_with_logits(torch.as_tensor(logits), torch.as_tensor(labels))
    assert weight == 30
    assert rel_error(total / weight, expected) < 1e-6


@pytest.mark.parametrize("loss", [cross_entropy, binary_cross_entropy])
def test_sums_of_padded_batches_add_up_to_the_whole(loss):
    logits = RNG.standard_normal((5, 3)).astype(np.float32)
    several = loss is binary_cross_entropy
    labels = RNG.integers(0, 2, (5, 3)) if several else RNG.integers(0, 3, 5)
    whole = loss(logits, labels)
    first = loss(logits[:3], labels[:3])
    rows = np.asarray([3, 4, 4])  # the last row is padding
    last = loss(logits[rows], labels[rows], mask=np.asarray([True, True, False]))
    assert rel_error(first[0] + last[0], whole[0]) < 1e-6
    assert first[1] + last[1] == whole[1]


def test_nothing_counted_is_zero_over_zero_not_nan():
    total, weight = cross_entropy(np.ones((2, 3), np.float32), np.full(2, -100))
    assert total == 0 and weight == 0


def test_balance_is_trained_only_when_asked():
    logits, labels = np.zeros((4, 2), np.float32), np.zeros(4, int)
    aux = {"balance": 0.5}
    plain, weight = head_loss(make_spec(fuser="moe"), logits, aux, labels)
    spec = make_spec(fuser="moe", balance_weight=0.1)
    balanced, _ = head_loss(spec, logits, aux, labels)
    assert rel_error(plain / weight, np.log(2)) < 1e-6
    assert rel_error(balanced / weight, np.log(2) + 0.05) < 1e-6


def test_the_task_chooses_the_loss():
    logits, labels = np.zeros((4, 4), np.float32), np.ones((4, 4))
    spec = make_spec(task="multi_label_classification")
    total, weight = head_loss(spec, logits, {}, labels)
    assert weight == 16 and rel_error(total / weight, np.log(2)) < 1e-6


def test_a_label_outside_the_classes_is_refused_on_the_host():
    check_labels([0, 2, -100], 3)
    with pytest.raises(ValueError, match="b.png: found class 7 in 2 elements.*num_classes is 3"):
        check_labels([[0, 7], [7, 1]], 3, source="b.png")
