"""How programs are compiled: the options that XLA does not choose by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from common_jax.host_memory import release_freed_memory

COMPILED = "/jax/core/compile/backend_compile_duration"
LONG = 1.0  # seconds; what compiles faster leaves little behind

# By default XLA gives convolutions on a CPU to its newest library, which is slower at them than
# Eigen. With single matmuls and reductions alone left to it, a full-width UNet call takes 0.88 of
# the time, the VAE's encoder 0.79, a training step of a small UNet 0.87.
CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    )
}


def compiler_options() -> dict[str, str]:
    """For `jax.jit(f, compiler_options=...)` on the default backend; {} where none is of use.

    jax takes options on the outermost jit only. Programs compiled ahead for another platform must
    not have them.
    """
    return dict(CPU_OPTIONS) if jax.default_backend() == "cpu" and _are_accepted() else {}


def jit(function: Callable, **settings) -> Callable:
    """`jax.jit` with `compiler_options()`, also usable inside other programs and transformations.

    The options are looked up at the first call: decorating a function starts no backend.
    """
    plain = jax.jit(function, **settings)

    @functools.cache
    def tuned() -> Callable:
        trim_after_compiling()
        return jax.jit(function, compiler_options=compiler_options(), **settings)

    @functools.wraps(function)
    def call(*args, **kwargs):
        leaves = jax.tree.leaves((args, kwargs))
        is_inside = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        return (plain if is_inside else tuned())(*args, **kwargs)

    return call


@functools.cache
def trim_after_compiling() -> None:
    """From now on the memory of every longer compilation is given back when it is done."""

    def listen(event: str, seconds: float, **_) -> None:
        if event == COMPILED and seconds >= LONG:
            release_freed_memory()

    jax.monitoring.register_event_duration_secs_listener(listen)


@functools.cache
def _are_accepted() -> bool:
    try:
        jax.jit(lambda x: x + 1, compiler_options=CPU_OPTIONS).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # another version of XLA: the option is gone or renamed
        return False
    return True
