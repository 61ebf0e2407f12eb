from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_task import LinearTask, linear_config
from ml_collections import ConfigDict

from common_jax import plan, plan_fit, plan_sizes, plan_text
from common_jax.chips import CHIPS, GIB
from common_jax.hlo import Collective, Cost
from common_jax.plan import set_mesh
from common_jax.plan_fit import neighbours
from common_jax.plan_sizes import kept_bytes
from common_jax.plan_text import count, human_bytes, plan_table
from common_jax.sharding import AXES, make_mesh
from common_jax.task import PlanRow
from common_jax.topology import Compiled, Machine, OutOfMemoryError, lay_out_mesh
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


MACHINE = Machine("v5e:2x4", CHIPS["v5e"], 8, (), 16 * GIB)


def test_the_nearest_settings_keep_the_batch_as_long_as_they_can():
    tried = list(neighbours(config_for(48), MACHINE))
    both = {"model.remat": "full", "mesh.data": 1, "mesh.fsdp": 8}
    assert tried[0] == {"model.remat": "full"}
    assert tried[1] == {"mesh.data": 1, "mesh.fsdp": 8}
    assert tried[2] == both
    # Six rows a chip split by every divisor; smaller batches spare the second gradient.
    assert tried[3:6] == [both | {"optim.accumulate": n} for n in (2, 3, 6)]
    assert tried[6:] == [both | {"batch_size": 8 * n, "optim.accumulate": 1} for n in (3, 1)]


def test_a_task_that_cannot_be_split_gets_smaller_batches_only():
    config = config_for(32, fsdp=8, data=1)
    config.model = ConfigDict({"remat": False})
    assert list(neighbours(config, MACHINE, accumulates=False)) == [
        {"model.remat": True}, {"model.remat": True, "batch_size": 16},
        {"model.remat": True, "batch_size": 8},
    ]  # fmt: skip
    config.eval.batch_size = 16
    assert list(neighbours(config, MACHINE, "eval")) == [{"eval.batch_size": 8}]


def compiled(name="train", **given) -> Compiled:
    return Compiled(name, 5, 11, Cost(1.0, 1.0, (), 0), 1.0, 1, **given)


def test_the_nearest_setting_that_fits_is_found(monkeypatch):
    def compile_program(task, mesh, name):
        if task.config.model.remat == "full" and task.config.optim.accumulate == 4:
            return compiled(name)
        raise OutOfMemoryError(3 * GIB, 2 * GIB)

    monkeypatch.setattr(plan_fit, "compile_program", compile_program)
    monkeypatch.setattr(plan_fit, "lay_out_mesh", lambda machine, mesh: None)
    changes, needed = plan_fit.find_fit(LinearTask, config_for(64), MACHINE, "train")
    assert changes["optim.accumulate"] == 4 and needed == 11
    told = plan_text.describe_fit(changes, needed)
    assert "--config.model.remat=full" in told and "--config.optim.accumulate=4" in told
    assert plan_fit.find_fit(LinearTask, config_for(8), MACHINE, "train")[1] is None


def test_a_setting_that_is_refused_is_passed_over_and_its_mesh_not_tried_again(monkeypatch):
    tried = []

    def compile_program(task, mesh, name):
        tried.append((task.config.mesh.fsdp, task.config.optim.accumulate))
        if task.config.mesh.fsdp == 8:
            raise ValueError("kernel would lie whole on every device")
        if task.config.optim.accumulate < 4:
            raise OutOfMemoryError(3 * GIB, 2 * GIB)
        return compiled(name)

    monkeypatch.setattr(plan_fit, "compile_program", compile_program)
    monkeypatch.setattr(plan_fit, "lay_out_mesh", lambda machine, mesh: None)
    changes, _ = plan_fit.find_fit(LinearTask, config_for(32), MACHINE, "train")
    assert changes == {"model.remat": "full", "optim.accumulate": 4}
    assert tried == [(1, 1), (8, 1), (1, 2), (1, 4)]


def test_that_a_program_does_not_fit_is_told_before_the_search(monkeypatch):
    def search(*given):
        raise RuntimeError("the compiler died")

    def compile_program(task, mesh, name):
        return compiled(name, held=MACHINE.limit)

    monkeypatch.setattr(plan_fit, "compile_program", compile_program)
    monkeypatch.setattr(plan, "find_fit", search)
    monkeypatch.setattr(plan, "find_machine", lambda *given: MACHINE)
    monkeypatch.setattr(plan, "lay_out_mesh", lambda *given: make_mesh())
    told = plan.plan_run(LinearTask, config_for(8), "v5e:2x4", ["train"])
    assert "8 chips" in next(told)
    # Alone it would fit: what the run's other programs keep counts too.
    assert "train: does not fit, it needs 16.0 GiB of 16.0 GiB" in next(told)
    with pytest.raises(RuntimeError, match="died"):
        next(told)


def test_no_setting_is_searched_for_a_run_of_its_own(monkeypatch):
    monkeypatch.setattr(plan_fit, "compile_program", lambda *given: compiled(held=MACHINE.limit))
    monkeypatch.setattr(plan, "list_programs", lambda *given: {"train": 1, "alone": 0})
    monkeypatch.setattr(plan, "check_program", lambda *given: None)
    monkeypatch.setattr(plan, "find_machine", lambda *given: MACHINE)
    monkeypatch.setattr(plan, "lay_out_mesh", lambda *given: make_mesh())
    *_, told = plan.plan_run(LinearTask, config_for(8), "v5e:2x4", ["alone"])
    assert "no setting makes it smaller" in told


def test_without_names_all_that_a_step_runs_is_planned(monkeypatch):
    machine = Machine("H200:8", CHIPS["H200"], 8, jax.devices(), 16 * GIB)
    monkeypatch.setattr(plan, "find_machine", lambda *given: machine)
    told = list(plan.plan_run(LinearTask, config_for(8), "H200:8"))
    assert [text.split()[0] for text in told[1:-1]] == ["twice,", "train"]
    assert told[-1].startswith("a step: twice ") and " + train " in told[-1]
    with pytest.raises(ValueError, match="eval.batch_size=9 is not divisible by"):
        config = config_for(8)
        config.eval.batch_size = 9
        list(plan.plan_run(LinearTask, config, "H200:8", ["eval"]))


def test_what_is_not_compiled_is_told_as_shapes_and_bytes():
    config = config_for(64, data=-1)
    told = "\n".join(plan.plan_run(LinearTask, config, "H200:8", ["eval"]))
    assert "H200:8: 8 chips, 139.8 GiB each; mesh dcn=1 data=8" in told
    assert "not compiled" in told and "of 139.8 GiB: fits" in told
    assert f"{'parameters in training':<28}{'36 B':>12}" in told  # 2 x 3 and 3
    assert f"{'optimiser':<28}" in told and f"{'held by other programs':<28}{'16 B':>12}" in told
    assert "--programs is not looked at" in told
    with pytest.raises(ValueError, match="batch_size=12 is not divisible by 8"):
        list(plan.plan_run(LinearTask, config_for(12, data=-1), "H200:8"))


def test_microbatches_need_a_second_gradient_and_keep_their_rows_alone():
    def rows(machine, config):
        mesh = lay_out_mesh(machine, config.mesh)
        return dict(plan_sizes.size_rows(machine, mesh, LinearTask(config)))

    machine = Machine("H200:8", CHIPS["H200"], 8, limit=1.0)
    whole = rows(machine, config_for(64, data=-1))
    parts = config_for(64, data=-1)
    parts.optim.accumulate = 2
    split = rows(machine, parts)
    assert split["gradients of a microbatch"] == split["gradients"] == 36
    kept = "kept for the backward pass"
    assert split[kept] < whole[kept]
    # Rows lie on four of the two times four devices: a chip keeps twice as much.
    assert rows(machine, config_for(64, data=4, tensor=2))[kept] == pytest.approx(
        2 * whole[kept], abs=2
    )


def test_a_gpu_that_is_too_small_is_judged_and_a_setting_found_without_compiling(monkeypatch):
    machine = Machine("H200", CHIPS["H200"], 1, limit=16e3)
    monkeypatch.setattr(plan, "find_machine", lambda *given: machine)
    told = list(plan.plan_run(LinearTask, config_for(512), "H200"))
    assert "does not fit" in told[1]
    assert "fits with --config.model.remat=full --config.optim.accumulate=" in told[2]
    for share, word in ((0.5, "fits"), (0.9, "too close"), (1.1, "does not fit")):
        assert plan_sizes.judge(machine, share * machine.limit) == word


def test_what_the_backward_pass_needs_grows_with_the_batch():
    task = LinearTask(linear_config())
    one, two = (kept_bytes(task, rows) for rows in (10, 20))
    assert 10 * 3 * 4 <= one < two <= 2 * one  # at least the logits of ten rows


def test_a_program_is_told_with_its_exchanges_and_its_shortest_time(monkeypatch):
    devices = np.empty(4, object)
    devices[:] = [types.SimpleNamespace(coords=(x, y, 0)) for x in (0, 1) for y in (0, 1)]
    mesh = types.SimpleNamespace(devices=devices.reshape(1, 1, 4, 1), axis_names=AXES)
    machine = Machine("v5e:2x2", CHIPS["v5e"], 4, list(devices), 16 * GIB)
    gather = Collective("all-gather", (0, 1, 2, 3), 32, 100e9)  # a second over two links
    cost = Cost(197e12 / 2, 0.819e12 / 4, (gather,), 1)
    # Eight examples of a tenth of a second of one chip, on four chips, in one second.
    model = 8 * 197e12 / 10
    compiled = Compiled("train", 3 * GIB, 6 * GIB, cost, 7.0, 1, held=GIB, model_flops=model)
    monkeypatch.setattr(plan_text, "state_rows", lambda task, mesh: [("parameters", 3 * GIB)])
    told = plan_text.describe_program(machine, mesh, None, compiled)
    assert "7.0 GiB of 16.0 GiB a chip" in told
    assert f"{'activations and workspace':<28}{'3.0 GiB':>12}" in told
    assert f"{'held by other programs':<28}{'1.0 GiB':>12}" in told
    assert "all-gather" in told and "fsdp" in told and "1000.0 ms" in told
    assert "at least 1000.0 ms by network (arithmetic 500.0 ms, memory 250.0 ms" in told
    assert "MFU at most 20 %" in told and "1 loops of a length" in told
    answer = dataclasses.replace(compiled, name="decode", passes=8, model_flops=8 * model)
    told = plan_text.describe_roofline(machine, mesh, answer)
    assert "8 passes: at least 8000.0 ms" in told[1] and "MFU at most 20 %" in told[-1]
    nothing = dataclasses.replace(compiled, cost=Cost(0.0, 1.0, (), 0))
    assert "MFU" not in "\n".join(plan_text.describe_roofline(machine, mesh, nothing))


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
