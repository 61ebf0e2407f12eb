"""Compiler options: accepted where they are offered, absent elsewhere, harmless to the numbers."""

from __future__ import annotations

import functools

import jax
import numpy as np
from conftest import rel_error

from common_jax import compiler


def test_options_are_accepted_and_change_no_number_beyond_rounding():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 8, 8, 16), np.float32)
    kernel = rng.standard_normal((3, 3, 16, 16), np.float32)

    def convolve(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)

    fast = jax.jit(convolve, compiler_options=compiler.compiler_options())
    assert rel_error(fast(x, kernel), jax.jit(convolve)(x, kernel)) < 1e-6


def test_an_option_that_this_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(compiler, "CPU_OPTIONS", {"xla_cpu_no_such_option": "1"})
    compiler._are_accepted.cache_clear()
    assert compiler.compiler_options() == {}
    compiler._are_accepted.cache_clear()


def test_accelerators_get_no_option(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert compiler.compiler_options() == {}


def test_jit_works_outside_and_inside_other_programs():
    @functools.partial(compiler.jit, static_argnames=("power",))
    def raise_to(x, *, power):
        """Docs stay."""
        return x**power

    x = np.arange(3, dtype=np.float32)
    np.testing.assert_allclose(raise_to(x, power=3), x**3)
    np.testing.assert_allclose(jax.jit(lambda x: raise_to(x, power=2) + 1)(x), x**2 + 1)
    np.testing.assert_allclose(jax.grad(lambda x: raise_to(x, power=2).sum())(x), 2 * x)
    np.testing.assert_allclose(jax.vmap(lambda x: raise_to(x, power=2))(x), x**2)
    assert jax.eval_shape(lambda x: raise_to(x, power=2), x).shape == (3,)
    assert raise_to.__doc__ == "Docs stay."


def test_memory_of_a_long_compilation_is_given_back(monkeypatch):
    given_back = []
    monkeypatch.setattr(compiler, "release_freed_memory", lambda: given_back.append(True))
    compiler.trim_after_compiling()
    monkeypatch.setattr(compiler, "LONG", 1e9)
    jax.jit(lambda x: x * 3 + 1)(1.0)
    assert not given_back
    monkeypatch.setattr(compiler, "LONG", 0.0)
    jax.jit(lambda x: x * 3 + 2)(1.0)
    assert given_back
