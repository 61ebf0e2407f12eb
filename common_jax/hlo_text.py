"""The text of a compiled program as computations, instructions, shapes and groups of devices."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import numpy as np

ITEM_BYTES = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0}  # others: the digits are bits
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_PART = re.compile(r"'(\w+)':\((\d+)\)(\d+)")


@dataclass(frozen=True)
class Shape:
    """Array of one device. fast: in a memory beside the core (TPU: VMEM, SMEM), not in HBM."""

    dims: tuple[int, ...]
    bytes: float
    fast: bool


@dataclass
class Instruction:
    name: str
    opcode: str
    shapes: list[Shape]  # of the result, tuples flattened
    operands: list[str]
    rest: str  # attributes
    is_root: bool


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    times: float = 0.0  # it runs in one run of the program
    is_inner: bool = False  # of a fusion or a reduction: its values never reach memory
    caller: str = ""  # of a fusion: the computation that it stands in, and where it is called
    fusion: Instruction | None = None

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)


def parse(text: str) -> dict[str, Computation]:
    """Computations by name, in the order of the text: callees stand before callers."""
    computations, current = {}, None
    for line in text.splitlines():
        stripped = line.strip()
        if current is None:
            head = re.match(r"(?:ENTRY )?%?([\w.\-]+) (?:\(|\{).*\{$", stripped)
            if head and " = " not in stripped.split("{")[0]:
                current = Computation(head[1], times=float(stripped.startswith("ENTRY ")))
                computations[current.name] = current
        elif stripped == "}":
            current = None
        else:
            made = parse_instruction(stripped)
            if made:
                current.instructions[made.name] = made
    return computations


def parse_instruction(line: str) -> Instruction | None:
    """`ROOT %name = type opcode(operands), attributes`; None for any other line."""
    head = re.match(r"(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _close(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, after = rest[:end], rest[end:].strip()
    opcode = re.match(r"([\w\-]+)\(", after)
    if not opcode:
        return None
    close = _close(after, opcode.end() - 1)
    inside = after[opcode.end() : close - 1]
    # A constant's and a parameter's parentheses hold a value, which `rest` keeps.
    is_value = opcode[1] in ("constant", "parameter")
    operands = [] if is_value else re.findall(r"%([\w.\-]+)", inside)
    return Instruction(
        head[2],
        opcode[1],
        parse_shapes(kind),
        operands,
        inside if is_value else after[close:],
        bool(head[1]),
    )


def parse_shapes(text: str) -> list[Shape]:
    found = []
    for kind, dims, layout in _SHAPE.findall(text):
        sizes = tuple(int(d) for d in dims.split(",") if d)
        item = ITEM_BYTES.get(kind)
        if item is None:
            item = int(re.search(r"\d+", kind)[0]) / 8 if re.search(r"\d", kind) else 0
        found.append(
            Shape(sizes, math.prod(sizes) * item, re.search(r"S\([1-9]\)", layout) is not None)
        )
    return found


def _close(text: str, start: int) -> int:
    """Place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place + 1
    return len(text)


def read_group(text: str) -> tuple[int, ...]:
    """The first group of devices in the attributes of a collective; () where none is named.

    Raises ValueError for a notation that is not known.
    """
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        groups, dims, turned = (
            [int(x) for x in part.split(",")] if part else None for part in iota.groups()
        )
        places = np.arange(math.prod(dims)).reshape(dims)
        places = places.transpose(turned) if turned else places
        return tuple(int(x) for x in places.reshape(groups)[0])
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
        r" ?\{([^}]*)\}",
        text,
    )
    if named:
        return _group_of_axes(*named.groups())
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", text)
    if not listed and re.search(r"replica_groups=(?!\{\})", text):
        raise ValueError(f"unknown notation of devices in {text[:200]!r}")
    return tuple(int(x) for x in listed[1].split(",") if x) if listed else ()


def _group_of_axes(mesh: str, dims: str, turned: str, along: str) -> tuple[int, ...]:
    """Group 0 of `'a'=2,'b'=4` along `'b'`, or along a part of it, `'b':(before)size`.

    dims, turned: the devices are numbered in an array of these sizes, transposed by `turned`.
    """
    sizes, names = [], []
    parts = {name: (int(before), int(size)) for name, before, size in _PART.findall(along)}
    whole = set(re.findall(r"'(\w+)'(?!:)", along))
    for name, length in re.findall(r"'(\w+)'=(\d+)", mesh):
        before, size = parts.get(name, (1, int(length)))
        sizes += [before, size, int(length) // (before * size)]
        names += [None, name if name in whole | parts.keys() else None, None]
    places = np.arange(math.prod(sizes))
    if turned:
        order = [int(x) for x in turned.split(",")]
        places = places.reshape([int(x) for x in dims.split(",")]).transpose(order)
    places = places.reshape(sizes)
    return tuple(int(x) for x in places[tuple(slice(None) if n else 0 for n in names)].flat)
