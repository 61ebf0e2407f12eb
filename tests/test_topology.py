from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from linear_task import LinearTask, linear_config
from ml_collections import ConfigDict

from common_jax import topology
from common_jax.chips import CHIPS
from common_jax.hlo import Collective
from common_jax.sharding import AXES
from common_jax.topology import (
    Machine,
    OutOfMemoryError,
    bytes_per_device,
    compile_program,
    find_machine,
    lay_out_mesh,
    place,
    send_rate,
)


def sizes(**given) -> ConfigDict:
    return ConfigDict({axis: given.get(axis, 1) for axis in AXES})


def test_a_machine_is_named_by_its_chip_and_size():
    machine = find_machine("H200:8", sizes())
    assert (machine.chip.name, machine.count, machine.devices) == ("H200", 8, None)
    assert find_machine("H100", sizes()).count == 1
    assert find_machine("", sizes(fsdp=4, tensor=2)).count == 8
    here = find_machine("here", sizes())
    assert here.count == jax.device_count() and here.devices is not None


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v9:2x2", "'v9' is not one of v4, v5e"),
        ("v5e:8", "v5e has slices such as v5e:4x4"),
        ("v5p:8x8", "v5p has slices such as v5p:4x4x4"),
        ("H200:2x2", "use H200:NUMBER"),
    ],
)
def test_a_machine_that_does_not_exist_is_refused(name, told):
    with pytest.raises(ValueError, match=told):
        find_machine(name, sizes())


def test_a_mesh_without_a_topology_needs_every_size():
    with pytest.raises(ValueError, match="every size must be given"):
        find_machine("", sizes(data=-1))


def test_a_mesh_without_devices_fills_one_size_and_must_cover_the_machine():
    machine = find_machine("H200:8", sizes())
    assert dict(lay_out_mesh(machine, sizes(data=-1, tensor=2)).shape) == {
        "dcn": 1, "data": 4, "fsdp": 1, "tensor": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match="does not cover 8 devices"):
        lay_out_mesh(machine, sizes(fsdp=3))


def test_bytes_of_a_device_follow_the_rules():
    mesh = AbstractMesh((1, 2, 4, 1), AXES)
    tree = {"a": jax.ShapeDtypeStruct((8, 3), jnp.float32), "b": jax.ShapeDtypeStruct((5,), "int8")}
    placed = place(tree, ((r"^a$", ("fsdp", None)),), mesh)
    assert bytes_per_device(placed) == 2 * 3 * 4 + 5


def grid(*lengths: int):
    """Mesh of all axes 1 but fsdp, over chips that know their place in a torus."""
    coords = np.stack(np.unravel_index(np.arange(np.prod(lengths)), lengths), axis=1)
    devices = np.empty(len(coords), object)
    devices[:] = [types.SimpleNamespace(coords=tuple(place)) for place in coords]
    return types.SimpleNamespace(devices=devices.reshape(1, 1, -1, 1), axis_names=AXES)


def test_the_rate_counts_the_links_that_a_group_spans():
    link = CHIPS["v5e"].link_bandwidth
    machine = Machine("v5e:16x4", CHIPS["v5e"], 64)

    def rate(group):
        return (
            send_rate(machine, grid(16, 4), Collective("all-gather", tuple(group), 1, 1.0)) / link
        )

    assert rate(range(64)) == 3  # a ring of 16 and a line of 4
    assert rate(range(0, 64, 4)) == 2
    assert rate(range(4)) == 1
    assert rate((0, 1)) == 1
    switched = Machine("H200:8", CHIPS["H200"], 8)
    assert send_rate(switched, grid(8), Collective("all-reduce", (0, 5), 1, 1.0)) == 450e9


def test_the_axes_of_an_exchange_are_those_its_devices_differ_in():
    mesh = types.SimpleNamespace(devices=np.empty((1, 2, 2, 2)), axis_names=AXES)

    def axes(*group):
        return topology.axes_of(Collective("all-reduce", group, 1, 1.0), mesh)

    assert (axes(0, 1), axes(0, 2), axes(0, 4), axes(0, 3, 5)) == (
        "tensor", "fsdp", "data", "data+fsdp+tensor",
    )  # fmt: skip


def test_the_steps_of_a_run_are_compiled_from_shapes():
    task = LinearTask(linear_config())
    mesh = lay_out_mesh(find_machine("here", sizes()), sizes(data=-1))
    train, scored, twice = (compile_program(task, mesh, n) for n in ("train", "eval", "twice"))
    state, frozen, _ = topology.sketch_state(task, task.sketch(mesh, 8), mesh)
    batch = topology.place_batch(task.sketch(mesh, 8).batch, mesh)
    # With the key, and without the frozen matrix, which this loss never reads.
    assert train.arguments == bytes_per_device((state, batch)) + 8
    assert bytes_per_device(frozen) > 0
    assert train.peak > train.arguments
    assert twice.cost.flops == 2 * (8 * 2 * 2) * 2 / mesh.size
    assert (train.count, twice.count) == (1, 3)
    assert scored.cost.flops < train.cost.flops
    with pytest.raises(ValueError, match="'decode' is not one of train, eval, twice"):
        compile_program(task, mesh, "decode")


@pytest.mark.parametrize(
    "told",
    [
        "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity "
        "by 4.75G.",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (20.50G) exceeds "
        "available HBM (15.75G).",
    ],
)
def test_what_the_compiler_says_of_memory_becomes_bytes(told):
    class Refused:
        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: " + told)

    with pytest.raises(OutOfMemoryError, match="needs 20.5 GiB of 15.8 GiB a chip") as error:
        topology._compile(Refused())
    assert error.value.limit == 15.75 * 2**30
