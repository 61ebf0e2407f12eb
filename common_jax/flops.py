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
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr) -> float:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation) -> float:
    name, settings = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = settings["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * _size(equation.outvars[0]) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        features = settings["dimension_numbers"].rhs_spec[0]
        kernel = equation.invars[1].aval.shape
        return 2.0 * _size(equation.outvars[0]) * math.prod(kernel) / kernel[features]
    if name == "cond":
        return max(map(_count, _inner(settings["branches"])))
    times = settings["length"] if name == "scan" else 1
    return times * sum(map(_count, _inner(settings.values())))


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
