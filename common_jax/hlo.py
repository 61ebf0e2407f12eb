"""Reading a compiled program: what one device computes, reads, writes and sends each time it runs.

The text is XLA's, after partitioning: shapes are those of one device. Bodies of loops count as
often as they run; a loop whose length is only known when it runs counts once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from common_jax.hlo_flops import convolution_flops, dot_flops, ragged_flops
from common_jax.hlo_text import Computation, Instruction, Shape, parse, read_group

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# No bytes of their own: names for what others made, or containers whose insides are counted.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
FREE |= {"call", "after-all", "partition-id", "replica-id", "async-start", "async-update"}
FREE |= {"optimization-barrier", "add-dependency"}
SLICES = ("dynamic-slice", "gather", "slice")
BETWEEN_SLICES = "between slices"
# Products that a GPU program leaves to a library: their text does not tell their arithmetic.
_LIBRARY = re.compile(r'custom_call_target="__(?:cublas|cudnn)')
_DEVICES = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_EITHER = re.compile(r"\b(?:true_computation|false_computation)=%?([\w.\-]+)")


@dataclass(frozen=True)
class Collective:
    """Exchanges of one kind over the same devices. group: places in the mesh of one such group.

    count: how often; bytes: sent by one device altogether.
    """

    kind: str
    group: tuple[int, ...]
    count: float
    bytes: float


@dataclass(frozen=True)
class Cost:
    """One run of a program on one device. open_loops: loops of unknown length, counted once.

    library_calls: products whose arithmetic is not in `flops` (cuBLAS, cuDNN).
    """

    flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    open_loops: int
    library_calls: int = 0


def read_program(text: str, slices: int = 1) -> Cost:
    """Cost of `compiled.as_text()`, one of `slices` equal slices that a mesh numbers in turn.

    What crosses between slices is no collective of the program, which is that of one slice, but a
    message to the host; it counts as an exchange of the kind BETWEEN_SLICES.
    """
    computations = parse(text)
    devices = max([1, *map(int, re.findall(_DEVICES, text))])
    everyone, across = tuple(range(devices)), tuple(range(0, slices * devices, devices))
    open_loops = _count_runs(computations)
    flops = moved = 0.0
    found: dict[tuple, list[float]] = {}
    begun, library_calls = set(), 0
    for computation in computations.values():
        for made in computation.instructions.values():
            flops += computation.times * _flops(computation, made)
            library_calls += bool(computation.times and _LIBRARY.search(made.rest))
            if not computation.is_inner:
                moved += computation.times * _moved(computations, computation, made)
            kind = made.opcode.removesuffix("-start")
            if kind in COLLECTIVES and not _is_continued(computation, made, begun):
                kind, group, sent = _exchange(computation, made, kind, everyone)
            elif kind == "send" and "xla_megascale" in made.rest:
                kind, group = BETWEEN_SLICES, across
                sent = _sent_across(computation, made, slices)
            else:
                continue
            if computation.times:
                total = found.setdefault((kind, group), [0.0, 0.0])
                total[0] += computation.times
                total[1] += computation.times * sent
    collectives = tuple(
        Collective(kind, group, count, sent)
        for (kind, group), (count, sent) in found.items()
        if len(group) > 1
    )
    return Cost(flops, moved, collectives, open_loops, library_calls)


# ------------------------------------------------------------------------------------------ runs
def _count_runs(computations: dict[str, Computation]) -> int:
    """Fills `times` and `is_inner`; returns the number of loops of unknown length.

    Of the branches of a condition, the one with the most arithmetic runs.
    """
    open_loops, work = 0, _weigh(computations)
    for caller in reversed(computations.values()):
        for made in caller.instructions.values():
            times = 1.0
            if made.opcode == "while":
                times = _trips(computations, made)
                open_loops += times is None and caller.times > 0
                times = times or 1.0
            for name in _called(computations, made, work):
                callee = computations[name]
                callee.times += caller.times * times
                is_applied = "to_apply=" in made.rest and made.opcode != "call"
                if made.opcode == "fusion":
                    callee.caller, callee.fusion = caller.name, made
                callee.is_inner |= caller.is_inner or made.opcode == "fusion" or is_applied
    return open_loops


def _called(computations, made: Instruction, work: dict[str, tuple]) -> list[str]:
    """Names of the computations that an instruction runs. work: see `_weigh`."""
    names = [name for _, name in _CALLED.findall(made.rest)]
    for several in _BRANCHES.findall(made.rest):
        names += re.findall(r"[\w.\-]+", several)
    names += _EITHER.findall(made.rest)
    names = [name for name in names if name in computations]
    return [max(names, key=work.get)] if made.opcode == "conditional" and names else names


def _weigh(computations: dict[str, Computation]) -> dict[str, tuple[float, float]]:
    """(operations, bytes of results) of one run of every computation with all that it calls."""
    work: dict[str, tuple[float, float]] = {}
    for computation in computations.values():
        flops = written = 0.0
        for made in computation.instructions.values():
            flops += _flops(computation, made)
            written += sum(shape.bytes for shape in made.shapes)
            times = _trips(computations, made) or 1.0 if made.opcode == "while" else 1.0
            for name in _called(computations, made, work):
                flops += times * work[name][0]
                written += times * work[name][1]
        work[computation.name] = flops, written
    return work


def _trips(computations, loop: Instruction) -> float | None:
    known = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.rest)
    if known:
        return float(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    made = computations[condition[1]].instructions if condition else {}
    limits = [i.rest for i in made.values() if i.opcode == "constant" and i.rest.isdigit()]
    compares = [i for i in made.values() if "direction=LT" in i.rest]
    is_counted = len(limits) == 1 and len(compares) == 1 and compares[0].is_root
    return float(limits[0]) if is_counted else None


# ------------------------------------------------------------------------------------------ costs
def _flops(computation: Computation, made: Instruction) -> float:
    if made.opcode not in ("dot", "ragged-dot", "convolution") or len(made.operands) < 2:
        return 0.0
    left, right = (computation.instructions[name].shapes[0].dims for name in made.operands[:2])
    out = made.shapes[0].dims
    if made.opcode == "ragged-dot":
        return ragged_flops(left, out, made.rest)
    if made.opcode == "dot":
        return dot_flops(left, out, made.rest)
    return convolution_flops(left, right, out, made.rest)


def _moved(computations, computation: Computation, made: Instruction) -> float:
    """Bytes of HBM that an instruction reads and writes."""
    if made.opcode in FREE or made.opcode.endswith("-done"):
        return 0.0
    operands = [computation.instructions.get(name) for name in made.operands]
    read = [_hbm(operand.shapes) if operand else 0.0 for operand in operands]
    written = _hbm(made.shapes)
    if made.opcode == "send":  # the result names the operand again
        return sum(read)
    if made.opcode.endswith("-start"):  # the result names the operand again
        if made.opcode == "slice-start":
            whole = sum(x.bytes for operand in operands if operand for x in operand.shapes)
            read = [sum(x.bytes for x in made.shapes) - whole]
            return sum(read) + max(written - whole, 0.0)
        return sum(read) + max(written - sum(read), 0.0)
    if made.opcode in SLICES:
        return 2 * written
    if made.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * (read[1] if made.opcode == "dynamic-update-slice" else read[-1])
    called = re.search(r"calls=%?([\w.\-]+)", made.rest)
    if made.opcode != "fusion" or not called or called[1] not in computations:
        return sum(read) + written
    inner = computations[called[1]].instructions
    if any(i.opcode in COLLECTIVES for i in inner.values()):  # it only hands these on
        for out, own in _aliases(made).items():
            read[own] = 0.0
            written -= _hbm(made.shapes[out : out + 1])
    for place, names in _parameters(inner).items():
        if place < len(read):
            read[place] = min(read[place], _read_of(inner, names))
    root = computations[called[1]].root
    parts = root.operands if root.opcode == "tuple" else [root.name]
    updates = [i for i in (_behind(inner, p) for p in parts) if i.opcode == "dynamic-update-slice"]
    if updates:
        whole = sum(_hbm(i.shapes) for i in updates)
        written -= min(whole, written)
        written += sum(i.bytes for u in updates for i in inner[u.operands[1]].shapes)
    return sum(read) + written


def _aliases(made: Instruction) -> dict[int, int]:
    """{result: operand} that lie in the same place."""
    told = made.rest.partition("output_to_operand_aliasing=")[2].partition("calls=")[0]
    return {int(out or 0): int(own) for out, own in re.findall(r"\{(\d*)\}: \((\d+),", told)}


def _hbm(shapes: list[Shape]) -> float:
    return sum(shape.bytes for shape in shapes if not shape.fast)


def _behind(inner, name: str) -> Instruction:
    """What a value is, behind changes of its shape alone."""
    made = inner[name]
    while made.opcode in ("bitcast", "copy") and made.operands and made.operands[0] in inner:
        made = inner[made.operands[0]]
    return made


def _parameters(inner) -> dict[int, list[str]]:
    """Names of every parameter of a fusion, and of its values in another shape."""
    names = {int(i.rest): [i.name] for i in inner.values() if i.opcode == "parameter"}
    for same in names.values():
        same += [i.name for i in inner.values() if i.opcode == "bitcast" and i.operands == same[:1]]
    return names


def _read_of(inner, names: list[str]) -> float:
    """Bytes of a fusion's operand that are read: of one that is only sliced, the slices."""
    total = 0.0
    for made in inner.values():
        if made.name in names or not set(made.operands) & set(names):
            continue
        if made.opcode in SLICES and made.operands[0] in names:
            total += sum(shape.bytes for shape in made.shapes)
        elif not (made.opcode == "dynamic-update-slice" and made.operands[0] in names):
            return math.inf
    return total


def _is_continued(computation: Computation, made: Instruction, begun: set) -> bool:
    """Whether an exchange in a fusion goes on with one that is in `begun`; else it is put there.

    A TPU program spreads an exchange over several fusions, from its start through products that
    run meanwhile to its end. Each has its text, and all but the first take what arrives in place.
    """
    fusion = computation.fusion
    channel = re.search(r"channel_id=(\d+)", made.rest)
    if not fusion or not channel:
        return False
    values = computation.instructions.values()
    inputs = {i.rest: i.shapes[0].dims for i in values if i.opcode == "parameter"}
    handed_on = [inputs[str(place)] for place in _aliases(fusion).values()]
    known = (computation.caller, channel[1]) in begun
    begun.add((computation.caller, channel[1]))
    return known and made.shapes[0].dims in handed_on


def _exchange(computation: Computation, made: Instruction, kind: str, everyone: tuple):
    """(kind, places of the first group, bytes that a device sends) of a collective.

    everyone: the group where none is named.
    """
    size = _size_of_operands(computation, made)
    group = read_group(made.rest) or (() if kind == "collective-permute" else everyone)
    ways = max(len(group), 1)
    # A sum of which every device keeps its part only is a reduce-scatter, however it is written.
    if kind == "all-reduce" and computation.is_inner and computation.root.opcode in SLICES:
        kind = "reduce-scatter"
    share = {"all-gather": ways - 1, "all-reduce": 2 * (ways - 1) / ways}
    share |= dict.fromkeys(("collective-permute", "collective-broadcast"), 1)
    return kind, group, size * share.get(kind, (ways - 1) / ways)


def _sent_across(computation: Computation, made: Instruction, slices: int) -> float:
    """Bytes that a device sends to its peers in the other slices, which share the work equally."""
    kind = re.search(r'megascale_transfer_type="(\w+)"', made.rest)
    share = {"ALL_GATHER": slices - 1, "ALL_REDUCE": 2 * (slices - 1) / slices, "ONE_TO_ONE": 1}
    usual = (slices - 1) / slices
    return _size_of_operands(computation, made) * share.get(kind[1] if kind else "", usual)


def _size_of_operands(computation: Computation, made: Instruction) -> float:
    known = (computation.instructions.get(name) for name in made.operands)
    return sum(shape.bytes for operand in known if operand for shape in operand.shapes)
