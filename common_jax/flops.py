"""Floating point operations of a function, counted in its traced program.

Matrix products and convolutions alone, two operations for a multiply and add; the body of a scan
counts as often as it runs. The compiler's own count has it once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax


def count_flops(function: Callable, *arguments) -> float:
    """Operations of `function(*arguments)`; arguments may be shapes, nothing is computed.

    A loop of unknown length counts once; of the branches of a condition the dearest counts.
    """
    return count_traced(jax.make_jaxpr(function)(*arguments).jaxpr)


def count_traced(jaxpr) -> float:
    """The same of an open `jax.extend.core.Jaxpr`."""
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation) -> float:
    name, settings = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = settings["dimension_numbers"]
        return _of_product(equation, contracted)
    if name == "ragged_dot_general":
        numbers = settings["ragged_dot_dimension_numbers"]
        (contracted, _), _ = numbers.dot_dimension_numbers
        is_summed = set(numbers.lhs_ragged_dimensions) & set(contracted)  # a result for each group
        groups = equation.outvars[0].aval.shape[0] if is_summed else 1
        return _of_product(equation, contracted) / groups
    if name.startswith("dot_product_attention"):  # cuDNN: two products forward, five backward
        query, key = (variable.aval.shape for variable in equation.invars[:2])
        products = 5 if "bwd" in name else 2
        return products * 2.0 * math.prod(query) * key[1]  # [B,N,H,D], [B,M,H,D]
    if name == "conv_general_dilated":
        features = settings["dimension_numbers"].rhs_spec[0]
        kernel = equation.invars[1].aval.shape
        return 2.0 * _size(equation.outvars[0]) * math.prod(kernel) / kernel[features]
    if name == "cond":
        return max(map(count_traced, _inner(settings["branches"])))
    times = settings["length"] if name == "scan" else 1
    return times * sum(map(count_traced, _inner(settings.values())))


def _of_product(equation, contracted) -> float:
    left = equation.invars[0].aval.shape
    return 2.0 * _size(equation.outvars[0]) * math.prod(left[axis] for axis in contracted)


def _size(variable) -> int:
    return math.prod(variable.aval.shape)


def _inner(values) -> list:
    """Programs among the settings of an equation, closed or open, alone or in sequences."""
    found = []
    for value in values:
        for part in value if isinstance(value, (tuple, list)) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                found.append(part)
    return found
