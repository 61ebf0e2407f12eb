from __future__ import annotations

import dataclasses
import math
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
from common_jax.network import axes_of, send_rate
from common_jax.sharding import AXES
from common_jax.topology import (
    Machine,
    OutOfMemoryError,
    bytes_per_device,
    compile_program,
    find_machine,
    lay_out_mesh,
    place,
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
    # Every second chip of a column: two such groups share its links.
    assert rate((0, 2)) == 0.5 and rate(range(0, 64, 8)) == 2 / 2
    switched = Machine("H200:8", CHIPS["H200"], 8)
    assert send_rate(switched, grid(8), Collective("all-reduce", (0, 5), 1, 1.0)) == 450e9


def test_a_torus_of_three_dimensions_closes_only_where_all_are_multiples_of_four():
    def rate(*lengths):
        machine = Machine("v5p", CHIPS["v5p"], math.prod(lengths))
        group = Collective("all-gather", tuple(range(math.prod(lengths))), 1, 1.0)
        return send_rate(machine, grid(*lengths), group) / CHIPS["v5p"].link_bandwidth

    assert (rate(4, 4, 4), rate(4, 4, 2), rate(2, 2, 1)) == (6, 3, 2)


def test_devices_of_several_slices_have_only_the_network_of_the_data_centre():
    mesh = grid(4, 4)
    for number, device in enumerate(mesh.devices.flat):
        device.slice_index = number // 8
    machine = Machine("2 x v5e:2x4", CHIPS["v5e"], 16)
    across = Collective("between slices", (0, 8), 1, 1.0)
    assert send_rate(machine, mesh, across) == CHIPS["v5e"].dcn_bandwidth
    assert send_rate(machine, mesh, Collective("all-gather", (0, 1), 1, 1.0)) == 50e9


def test_the_axes_of_an_exchange_are_those_its_devices_differ_in():
    mesh = types.SimpleNamespace(devices=np.empty((1, 2, 2, 2)), axis_names=AXES)

    def axes(*group):
        return axes_of(Collective("all-reduce", group, 1, 1.0), mesh)

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
    # What is not its own argument stays there: the optimiser while the scores are computed.
    resident = bytes_per_device((state, frozen)) + 2 * 2 * 4
    assert train.held == resident - bytes_per_device(state) - 8
    assert scored.held > bytes_per_device(state.opt) and twice.held == resident - 2 * 2 * 4
    # Forward alone: the matrix of three columns, and two products of two rows.
    assert (scored.model_flops, twice.model_flops) == (8 * 2 * 2 * 3, 2 * (8 * 2 * 2) * 2)
    with pytest.raises(ValueError, match="'decode' is not one of twice, train, eval"):
        compile_program(task, mesh, "decode")


class Phased(LinearTask):
    """With twice the arithmetic from its fifth step on, and a run of its own on one device."""

    def phase(self, step, train=True):
        return "early" if step < 5 else "late"

    def loss(self, params, state, batch, key, phase):
        if phase == "late":
            batch = batch | {"x": batch["x"] @ (batch["x"].T @ batch["x"])}
        return super().loss(params, state, batch, key, phase)

    def sketch(self, mesh, rows):
        sketch = super().sketch(mesh, rows)
        alone = dataclasses.replace(sketch.programs["twice"], count=0, passes=5)
        return dataclasses.replace(sketch, programs={"alone": alone})


def test_the_step_of_the_last_phase_is_planned_beside_the_first():
    task = Phased(linear_config())
    mesh = lay_out_mesh(find_machine("here", sizes()), sizes(data=-1))
    assert topology.list_programs(task, mesh) == {"train": 1, "last": 1, "eval": 0, "alone": 0}
    first, last = (compile_program(task, mesh, name) for name in ("train", "last"))
    assert last.cost.flops > first.cost.flops


def test_a_run_of_its_own_is_compiled_for_one_device_alone():
    task = Phased(linear_config())
    many = lay_out_mesh(find_machine("here", sizes()), sizes(data=-1))
    with pytest.raises(ValueError, match="--programs=alone: this runs on one device, and the mesh"):
        compile_program(task, many, "alone")
    one = lay_out_mesh(Machine("one", None, 1, jax.devices()[:1]), sizes())
    alone = compile_program(task, one, "alone")
    assert (alone.count, alone.passes, alone.held) == (0, 5, 0)
    assert alone.model_flops == 5 * alone.cost.flops


def test_arithmetic_that_a_library_does_is_that_of_the_traced_program(monkeypatch):
    read = topology.read_program
    hidden = lambda text, slices: dataclasses.replace(  # noqa: E731
        read(text, slices), flops=1.0, library_calls=2
    )
    monkeypatch.setattr(topology, "read_program", hidden)
    mesh = lay_out_mesh(find_machine("here", sizes()), sizes(data=-1))
    twice = compile_program(LinearTask(linear_config()), mesh, "twice")
    assert twice.cost.flops == twice.model_flops / mesh.size > 1


@pytest.fixture
def libtpu(monkeypatch):
    pytest.importorskip("libtpu", reason="the extra tpu-plan is not installed")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # beside a plan that runs meanwhile
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")


def test_a_slice_has_a_device_for_every_chip(libtpu):
    for name, count in (("v4:2x2x2", 8), ("v5p:2x2x1", 4), ("v5e:1x1", 1), ("v6e:2x2", 4)):
        assert find_machine(name, sizes()).count == count
    two = find_machine("v4:2x2x1", sizes(dcn=2))
    assert (two.name, two.count) == ("2 x v4:2x2x1", 8)
    assert {device.slice_index for device in two.devices} == {0, 1}


def test_a_step_is_compiled_for_a_slice_and_for_two(libtpu):
    def plan(mesh):
        machine = find_machine("v5e:2x2", mesh)
        laid = lay_out_mesh(machine, mesh)
        made = compile_program(LinearTask(linear_config()), laid, "train")
        return machine, laid, {one.kind: one for one in made.cost.collectives}

    assert set(plan(sizes(data=4))[2]) == {"all-reduce"}
    machine, mesh, found = plan(sizes(dcn=2, data=4))
    between = found["between slices"]
    assert axes_of(between, mesh) == "dcn" and between.bytes > 0
    assert send_rate(machine, mesh, between) == CHIPS["v5e"].dcn_bandwidth


def test_a_topology_of_several_devices_a_chip_is_refused(monkeypatch):
    from jax.experimental import topologies

    found = types.SimpleNamespace(devices=[None] * 16)
    monkeypatch.setattr(topologies, "get_topology_desc", lambda **given: found)
    assert find_machine("v5e:4x4", sizes()).count == 16
    with pytest.raises(RuntimeError, match="knows 16 devices in place of 8"):
        find_machine("v4:2x2x2", sizes())


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
