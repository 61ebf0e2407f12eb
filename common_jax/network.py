"""Which way an exchange takes through the network of a machine, and how fast."""

from __future__ import annotations

import numpy as np

from common_jax.hlo import Collective
from common_jax.topology import Machine


def axes_of(collective: Collective, mesh) -> str:
    """Mesh axes along which its devices differ, as in `data+fsdp`."""
    places = np.array(np.unravel_index(collective.group, mesh.devices.shape))
    varies = (places != places[:, :1]).any(axis=1)
    return "+".join(axis for axis, moves in zip(mesh.axis_names, varies) if moves)


def send_rate(machine: Machine, mesh, collective: Collective) -> float:
    """Bytes a second that one device can send to the others of its group.

    In a torus, a dimension that the group spans gives two links a chip where it closes to a ring
    and one where it does not. Where the group takes every n-th chip of a dimension, the groups in
    between use the same links, and each has an n-th of them. Between slices it is `dcn_bandwidth`.
    """
    chip, group = machine.chip, mesh.devices.flatten()[list(collective.group)]
    if len({getattr(device, "slice_index", 0) for device in group}) > 1:
        return chip.dcn_bandwidth
    if not chip.torus:
        return chip.link_bandwidth
    everywhere = np.array([device.coords for device in mesh.devices.flat])
    inside = np.array([device.coords for device in group])
    lengths = [len(set(column)) for column in everywhere.T]
    # Slices of three dimensions close all their rings, or none.
    closes = chip.torus < 3 or all(length % chip.wraps_from == 0 for length in lengths)
    links = 0.0
    for column, length in zip(inside.T, lengths):
        taken = np.unique(column)
        if len(taken) > 1:
            stride = int(np.diff(taken).min())
            is_ring = len(taken) * stride == length >= chip.wraps_from and closes
            links += (2 if is_ring else 1) / stride
    return (links or 1) * chip.link_bandwidth
