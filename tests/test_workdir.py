"""Who may use a folder, and when."""

from __future__ import annotations

import threading

import pytest

from common_jax import workdir as workdir_module
from common_jax.workdir import WorkdirError, enter_workdir, is_finished, lock_workdir
from tests.linear_task import linear_config
from tests.test_train_loop import run


def test_another_config_in_the_same_workdir_is_refused_naming_the_key(tmp_path):
    run(tmp_path)
    with pytest.raises(WorkdirError, match=r"optim\.lr: 0\.01 there, 0\.5 now"):
        run(tmp_path, **{"optim.lr": 0.5})
    with pytest.raises(WorkdirError, match=r"optim\.steps.*may only grow"):
        run(tmp_path, **{"optim.steps": 3})


def test_a_second_process_on_the_same_workdir_is_refused(tmp_path):
    held = lock_workdir(tmp_path)
    with pytest.raises(WorkdirError, match="in use by process"):
        run(tmp_path)
    held.close()


def test_a_new_workdir_may_be_seen_late_but_one_that_cannot_be_made_is_an_error(
    tmp_path, monkeypatch
):
    file = tmp_path / "config.json"
    assert not workdir_module._appears(file, 0.05)
    threading.Timer(0.2, file.touch).start()
    assert workdir_module._appears(file, 30)
    monkeypatch.setattr(workdir_module, "SHARED_SECONDS", 0)
    monkeypatch.setattr(workdir_module, "open_workdir", lambda *_, **__: None)
    with pytest.raises(WorkdirError, match="not one folder for all 1 processes"):
        enter_workdir(str(tmp_path / "other"), linear_config())
    with pytest.raises(OSError, match=r"config\.json"):
        enter_workdir(str(file / "below"), linear_config())


def test_whether_a_run_is_finished_is_what_process_0_sees(tmp_path, monkeypatch):
    config = linear_config()
    monkeypatch.setattr(workdir_module, "ask_first_for", lambda work, error: (work(), "told"))
    assert is_finished(tmp_path, config) == (False, "told")
