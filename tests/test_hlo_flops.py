from __future__ import annotations

import numpy as np
import pytest

from common_jax.hlo_flops import convolution_flops, count_pairs, dot_flops, ragged_flops


def test_a_product_counts_two_operations_a_multiply_add():
    assert dot_flops((8, 16), (8, 4), "lhs_contracting_dims={1}") == 2 * 8 * 16 * 4
    assert convolution_flops((8, 16), (4, 16), (8, 4), "dim_labels=bf_oi->bf") == 2 * 8 * 16 * 4


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pad", [0, 1, 3])
@pytest.mark.parametrize("holes", [1, 2])
@pytest.mark.parametrize("spread", [1, 3])
def test_pairs_along_an_axis_are_those_of_a_plain_loop(stride, pad, holes, spread):
    values = np.zeros((7 - 1) * holes + 1)
    values[::holes] = 1
    padded = np.pad(values, pad)
    out = (len(padded) - 2 * spread - 1) // stride + 1
    met = sum(padded[o * stride + k * spread] for o in range(out) for k in range(3))
    assert count_pairs(7, 3, out, stride, holes, spread, pad) == met


def test_a_batched_product_written_as_a_convolution_counts_once():
    """Four products [8,16] x [16,32]: the batch is an axis that meets itself in one place each."""
    attributes = "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf"
    found = convolution_flops((4, 8, 16), (4, 16, 32), (4, 8, 32), attributes)
    assert found == 4 * 2 * 8 * 16 * 32


def test_groups_divide_what_is_multiplied():
    features = "window={size=1}, dim_labels=b0f_0io->b0f, feature_group_count=4"
    assert convolution_flops((2, 5, 16), (1, 4, 8), (2, 5, 8), features) == 2 * 2 * 5 * 4 * 8
    batches = "window={size=1}, dim_labels=b0f_0io->b0f, batch_group_count=2"
    assert convolution_flops((2, 5, 16), (1, 16, 8), (1, 5, 8), batches) == 2 * 1 * 5 * 16 * 8


def test_of_a_product_by_groups_every_row_meets_its_own_matrix():
    forward = "lhs_contracting_dims={1}, rhs_contracting_dims={1}, lhs_ragged_dims={0}"
    assert ragged_flops((12, 5), (12, 7), forward) == 2 * 12 * 5 * 7
    # The gradient by the three matrices sums over rows, each of which belongs to one of them.
    backward = "lhs_contracting_dims={0}, rhs_contracting_dims={0}, lhs_ragged_dims={0}"
    assert ragged_flops((12, 5), (3, 5, 7), backward) == 2 * 12 * 5 * 7
