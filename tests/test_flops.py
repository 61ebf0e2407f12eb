from __future__ import annotations

import jax
import jax.numpy as jnp

from common_jax.attention import attend, planned_for
from common_jax.flops import count_flops

A = jax.ShapeDtypeStruct((5, 7), jnp.float32)
B = jax.ShapeDtypeStruct((7, 11), jnp.float32)
PRODUCT = 2 * 5 * 7 * 11


def test_a_matrix_product_costs_two_operations_for_each_multiplication():
    assert count_flops(jnp.dot, A, B) == PRODUCT
    batched = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in (A, B)]
    assert count_flops(jnp.matmul, *batched) == 3 * PRODUCT


def test_a_convolution_counts_its_window_and_channels():
    image = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 4, 6), jnp.float32)

    def convolve(image, kernel):
        settings = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        return jax.lax.conv_general_dilated(image, kernel, (1, 1), **settings)

    assert count_flops(convolve, image, kernel) == 2 * (2 * 8 * 8 * 6) * (3 * 3 * 4)


def test_the_body_of_a_scan_counts_as_often_as_it_runs():
    def run(a, b):
        return jax.lax.scan(lambda x, _: (x, a @ b), 0, None, length=13)[1]

    assert count_flops(jax.jit(run), A, B) == 13 * PRODUCT


def test_of_the_branches_of_a_condition_the_dearest_counts():
    def choose(a, b):
        return jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: 2 * (a @ b) @ b.T @ b)

    assert count_flops(choose, A, B) == 3 * PRODUCT


def test_what_the_backward_pass_computes_again_is_counted():
    def loss(a, b):
        return jnp.sum(jnp.sin(a @ b) @ b.T)

    plain = count_flops(jax.grad(loss, argnums=(0, 1)), A, B)
    again = count_flops(jax.grad(jax.checkpoint(loss), argnums=(0, 1)), A, B)
    assert again > plain >= 5 * PRODUCT


def test_a_product_by_groups_counts_every_row_once():
    def loss(x, matrices, sizes):
        return jnp.sum(jax.lax.ragged_dot(x, matrices, sizes) ** 2)

    x, matrices = jnp.ones((12, 5)), jnp.ones((3, 5, 7))
    sizes = jnp.array([4, 4, 4])
    one = 2 * 12 * 5 * 7
    assert count_flops(loss, x, matrices, sizes) == one
    assert count_flops(jax.grad(loss, argnums=(0, 1)), x, matrices, sizes) == 3 * one


def test_the_products_of_a_fused_attention_are_counted():
    q, k = (jax.ShapeDtypeStruct((2, n, 3, 8), jnp.bfloat16) for n in (6, 10))
    product = 2 * (2 * 6 * 3 * 8) * 10
    with planned_for("gpu"):
        assert count_flops(attend, q, k, k) == 2 * product
        total = lambda q, k: jnp.sum(attend(q, k, k).astype(jnp.float32))  # noqa: E731
        assert count_flops(jax.grad(total), q, k) == (2 + 5) * product
