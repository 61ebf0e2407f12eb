"""`launch.py plan`: what a run holds, from abstract shapes; nothing is allocated or compiled."""

from __future__ import annotations

import math

import jax

from common_jax.task import PlanRow


def count(shapes) -> tuple[int, int, int]:
    """(parameters, tensors, bytes) of a tree of ShapeDtypeStruct or arrays."""
    leaves = jax.tree.leaves(shapes)
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    return sum(sizes), len(leaves), sum(n * leaf.dtype.itemsize for n, leaf in zip(sizes, leaves))


def human_bytes(n: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def plan_table(rows: list[PlanRow], optimizer_copies: int = 2) -> str:
    """Text table of parameters, tensors and bytes; trainable parts show what training adds.

    optimizer_copies: arrays of a parameter's size that the optimiser keeps (2 for Adam).
    """
    lines = [f"{'part':<24}{'parameters':>15}{'tensors':>9}{'weights':>12}{'training':>12}  note"]
    totals = [0, 0, 0, 0]
    for row in rows:
        parameters, tensors, size = count(row.shapes)
        # Gradients and optimiser moments are kept in float32 beside the parameters.
        training = 4 * parameters * (1 + optimizer_copies) if row.trainable else 0
        for i, value in enumerate((parameters, tensors, size, training)):
            totals[i] += value
        lines.append(
            f"{row.name:<24}{parameters:>15,}{tensors:>9}{human_bytes(size):>12}"
            f"{human_bytes(training) if training else '-':>12}  {row.note}"
        )
    lines.append(
        f"{'total':<24}{totals[0]:>15,}{totals[1]:>9}{human_bytes(totals[2]):>12}"
        f"{human_bytes(totals[3]):>12}"
    )
    extras = [(name, size) for row in rows for name, size in row.extra_bytes.items()]
    if extras:
        lines += ["", "beside the parameters"]
        lines += [f"  {name:<46}{human_bytes(size):>12}" for name, size in extras]
    return "\n".join(lines)
