from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_task import LinearTask, linear_config
from ml_collections import ConfigDict

from common_jax import plan
from common_jax.chips import CHIPS, GIB
from common_jax.hlo import Collective, Cost
from common_jax.plan import count, human_bytes, kept_bytes, neighbours, plan_table, set_mesh
from common_jax.sharding import AXES
from common_jax.task import PlanRow
from common_jax.topology import Compiled, Machine, OutOfMemoryError
from satdifuser_jax.unet import UNetConfig, unet_shapes


def test_parameters_tensors_and_bytes_are_counted_by_shape():
    shapes = {"a": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16), "b": jnp.zeros(5)}
    assert count(shapes) == (17, 2, 24 + 20)
    assert human_bytes(1536) == "1.5 KiB"


def test_the_table_shows_the_full_size_model_and_what_training_adds():
    rows = [
        PlanRow("unet", unet_shapes(UNetConfig.sd21(metadata=True)), note="frozen"),
        PlanRow("head", {"w": jnp.zeros(1000)}, trainable=True, extra_bytes={"cache": 2**20}),
    ]
    table = plan_table(rows)
    assert "880,264,644      714" in table
    assert "11.7 KiB" in table  # gradient and two moments
    assert "1.0 MiB" in table and "880,265,644      715" in table


def test_a_mesh_is_given_by_the_sizes_that_matter():
    mesh = ConfigDict({"dcn": 1, "data": -1, "fsdp": 1, "tensor": 1})
    set_mesh(mesh, [])
    assert mesh.data == -1
    set_mesh(mesh, ["fsdp=64", "tensor=2"])
    assert dict(mesh) == {"dcn": 1, "data": 1, "fsdp": 64, "tensor": 2}
    for wrong in ("fsd=2", "fsdp=0", "fsdp"):
        with pytest.raises(ValueError, match="--mesh: .*axes are dcn, data, fsdp, tensor"):
            set_mesh(mesh, [wrong])


def config_for(batch_size: int, **mesh):
    config = linear_config().copy_and_resolve_references().unlock()
    config.batch_size = batch_size
    config.model.remat = "none"
    config.mesh.update(mesh)
    return config


def test_the_nearest_settings_keep_the_batch_as_long_as_they_can():
    tried = list(neighbours(config_for(32), Machine("v5e:2x4", CHIPS["v5e"], 8)))
    both = {"model.remat": "full", "mesh.data": 1, "mesh.fsdp": 8}
    assert tried[0] == {"model.remat": "full"}
    assert tried[1] == {"mesh.data": 1, "mesh.fsdp": 8}
    assert tried[2] == both
    assert tried[3:5] == [both | {"optim.accumulate": n} for n in (2, 4)]
    assert [c["batch_size"] for c in tried[5:]] == [16, 8]


def test_the_nearest_setting_that_fits_is_found(monkeypatch):
    def compile_program(task, mesh, name):
        if task.config.model.remat == "full" and task.config.optim.accumulate == 4:
            return Compiled(name, 5, 11, Cost(1.0, 1.0, (), 0), 1.0, 1)
        raise OutOfMemoryError(3 * GIB, 2 * GIB)

    monkeypatch.setattr(plan, "compile_program", compile_program)
    monkeypatch.setattr(plan, "lay_out_mesh", lambda machine, mesh: None)
    machine = Machine("v5e:2x4", CHIPS["v5e"], 8)
    changes, compiled = plan.find_fit(LinearTask, config_for(64), machine)
    assert changes["optim.accumulate"] == 4 and compiled.peak == 11
    told = plan.describe_fit(changes, compiled)
    assert "--config.model.remat=full" in told and "--config.optim.accumulate=4" in told
    assert plan.find_fit(LinearTask, config_for(8), machine)[1] is None


def test_what_is_not_compiled_is_told_as_shapes_and_bytes():
    config = config_for(64, data=-1)
    told = "\n".join(plan.plan_run(LinearTask, config, "H200:8", ["train"]))
    assert "H200:8: 8 chips, 141 GiB each; mesh dcn=1 data=8" in told
    assert "not compiled" in told and "of 141.0 GiB: may fit" in told
    assert f"{'parameters in training':<28}{'36 B':>12}" in told  # 2 x 3 and 3
    assert f"{'optimiser':<28}" in told
    with pytest.raises(ValueError, match="batch_size=12 is not divisible by 8"):
        list(plan.plan_run(LinearTask, config_for(12, data=-1), "H200:8", ["train"]))


def test_what_the_backward_pass_needs_grows_with_the_batch():
    task = LinearTask(linear_config())
    one, two = (kept_bytes(task, rows) for rows in (10, 20))
    assert 10 * 3 * 4 <= one < two <= 2 * one  # at least the logits of ten rows


def test_a_program_is_told_with_its_exchanges_and_its_shortest_time(monkeypatch):
    devices = np.empty(4, object)
    devices[:] = [types.SimpleNamespace(coords=(x, y, 0)) for x in (0, 1) for y in (0, 1)]
    mesh = types.SimpleNamespace(devices=devices.reshape(1, 1, 4, 1), axis_names=AXES)
    machine = Machine("v5e:2x2", CHIPS["v5e"], 4, list(devices))
    gather = Collective("all-gather", (0, 1, 2, 3), 32, 100e9)  # a second over two links
    cost = Cost(197e12 / 2, 0.819e12 / 4, (gather,), 1)
    compiled = Compiled("train", 3 * GIB, 6 * GIB, cost, 7.0, 1)
    task = types.SimpleNamespace(
        flops=lambda: {"train": 197e12 / 10}, config=ConfigDict({"batch_size": 8})
    )
    monkeypatch.setattr(plan, "state_rows", lambda task, mesh: [("parameters", 3 * GIB)])
    told = plan.describe_program(machine, mesh, task, compiled)
    assert "6.0 GiB of 16.0 GiB a chip" in told
    assert f"{'activations and workspace':<28}{'3.0 GiB':>12}" in told
    assert "all-gather" in told and "fsdp" in told and "1000.0 ms" in told
    assert "at least 1000.0 ms by network (arithmetic 500.0 ms, memory 250.0 ms" in told
    # 8 examples of a tenth of a second of one chip, on four chips, in one second.
    assert "MFU at most 20 %" in told and "1 loops of a length" in told


def test_only_slices_of_tpus_need_a_process_of_their_own(monkeypatch):
    assert plan.run_in_child("H200:8") is None and plan.run_in_child("here") is None
    monkeypatch.setenv(plan.CHILD, "1")
    assert plan.run_in_child("v5e:8x8") is None


def test_a_compiler_that_dies_is_told(monkeypatch):
    monkeypatch.delenv(plan.CHILD, raising=False)
    ended = types.SimpleNamespace(returncode=-6)
    monkeypatch.setattr(plan.subprocess, "run", lambda argv, env: ended)
    with pytest.raises(RuntimeError, match="ended with signal 6"):
        plan.run_in_child("v5e:8x8")
