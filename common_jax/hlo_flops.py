"""Arithmetic of matrix products and convolutions, from their text in a compiled program.

Two operations a multiply-add. A TPU program has convolutions in place of batched products: the
batch is a spatial axis whose window is as long, and nearly all of it falls on padding or into the
holes of a dilation. Only pairs of real values count, as in XLA's own cost analysis.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence

import numpy as np


def dot_flops(left: Sequence[int], out: Sequence[int], attributes: str) -> float:
    """left, out: sizes of the first operand and of the result."""
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
    contracted = math.prod(left[int(a)] for a in axes[1].split(",") if a) if axes else 1
    return 2.0 * math.prod(out) * contracted


def ragged_flops(left: Sequence[int], out: Sequence[int], attributes: str) -> float:
    """The same where rows belong to groups, a matrix each: every row meets its own alone.

    Where the rows are what is summed over, the result has a matrix for each group, in front.
    """
    flops = dot_flops(left, out, attributes)
    axes = (
        re.search(name + r"=\{([\d,]*)\}", attributes)
        for name in ("lhs_ragged_dims", "lhs_contracting_dims")
    )
    ragged, contracted = (set(found[1].split(",")) if found else set() for found in axes)
    return flops / out[0] if ragged & contracted and out else flops


def convolution_flops(
    left: Sequence[int], right: Sequence[int], out: Sequence[int], attributes: str
) -> float:
    """left, right, out: sizes of input, kernel and result, in the order of `dim_labels`."""
    names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes).groups()
    sizes = [dict(zip(labels, dims)) for labels, dims in zip(names, (left, right, out))]
    window = re.search(r"window=\{([^}]*)\}", attributes)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    pairs = 1
    for place, axis in enumerate(sorted(label for label in names[0] if label.isdigit())):
        stride, holes, spread, pad = (
            settings[name].split("x")[place] if name in settings else usual
            for name, usual in (
                ("stride", "1"),
                ("lhs_dilate", "1"),
                ("rhs_dilate", "1"),
                ("pad", "0_0"),
            )
        )
        lengths = (size[axis] for size in sizes)
        pairs *= count_pairs(*lengths, int(stride), int(holes), int(spread), int(pad.split("_")[0]))
    # The kernel's input axis is already that of one group.
    batches = re.search(r"batch_group_count=(\d+)", attributes)
    rows = sizes[0]["b"] / (int(batches[1]) if batches else 1)
    return 2.0 * rows * sizes[1]["i"] * sizes[2]["f"] * pairs


@functools.lru_cache(maxsize=1024)
def count_pairs(
    length: int, window: int, out: int, stride: int, holes: int, spread: int, pad: int
) -> int:
    """(place of the result, place of the kernel) along one axis that meet a value of the input.

    length, window, out: of input, kernel and result. holes, spread: dilation of input and kernel.
    pad: padding before the input, may be negative.
    """
    at = np.arange(out)[:, None] * stride + np.arange(window)[None] * spread - pad
    real = (at >= 0) & (at < (length - 1) * holes + 1) & (at % holes == 0)
    return int(real.sum())
