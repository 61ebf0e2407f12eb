"""The command line: what a person sees when something is asked for, or wrong."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image
from tiny_pipeline import write_pipeline

import launch
from common_jax import distributed
from common_jax.distributed import LostHostError
from satdifuser_jax.convert import find_components, load_unet
from satdifuser_jax.feature_files import FeatureFolder

ROOT = Path(__file__).parent.parent
PROBE = "--config=configs/satdifuser_probe.py:tiny"


def run(*words, cwd=ROOT):
    command = [sys.executable, str(ROOT / "launch.py"), *map(str, words)]
    found = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evil"], "no verb 'evil'; the first word must be one of: train, eval, extract,"),
        (["plan", "twice", PROBE], "unknown words: twice"),
        (["plan", "--cfg=1"], "Unknown command line flag 'cfg'"),
        (["plan", "--images=x", PROBE], "does not take --images; it takes --config"),
        (["train", PROBE], "`launch.py train` needs --workdir=..."),
        (["sample", "--weights=x"], "`launch.py sample` needs --out=..."),
        (["convert", "--to=onnx"], "--to=onnx: value should be one of <public|flax-"),
        (["plan", f"{PROBE},tinny"], "config argument 'tinny' is unknown; known: dataset,"),
        (["plan", PROBE, "--config.model.fusser=gw"], "--config.model.fusser: the config has no"),
        (["plan", PROBE, "--config.model.fusser=gw"], "such setting; fuser?"),
        (["plan", PROBE, "--config.modell.fuser=gw"], "--config.modell.fuser: the config has no"),
        (["plan", PROBE, "--config.batch_size=many"], "--config.batch_size=many: invalid literal"),
        (["plan", "--config=configs/none.py"], "there is no such file; known: configs/geodit_"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_in_one_line(words, told):
    status, out, err = run(*words)
    lines = err.strip().splitlines()
    assert (status, out) == (2, "") and len(lines) == 2, err
    assert lines[0].startswith("launch.py: ") and told in lines[0], err
    assert "--help" in lines[1]


def test_float32_products_are_not_rounded_to_less_on_any_device():
    ask = "import launch, jax; print(jax.config.jax_default_matmul_precision)"
    found = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.strip() == "highest"


def test_help_names_every_verb_and_each_verb_its_flags():
    status, text, _ = run("--help")
    assert status == 0
    verbs = "train eval extract predict sample convert verify plan show_config"
    for verb in verbs.split():
        assert f"launch.py {verb} " in text
    status, text, _ = run("extract", "--help")
    assert status == 0 and "Write the features of pictures" in text and "show_config" in text
    for flag in ("--config", "--images", "--out", "--format"):
        assert flag in text
    assert "--workdir" not in text


def test_a_failure_is_told_without_a_traceback_unless_asked_for(tmp_path):
    status, _, err = run("eval", f"--workdir={tmp_path}")
    assert status == 1 and "no run was started in this workdir" in err
    assert "Traceback" not in err and "EO_TRACEBACK=1" in err
    status, _, err = run("verify", f"--weights={tmp_path / 'nothing'}")
    assert status == 1 and "nothing: no such folder" in err


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [(TypeError("odd"), 101), (ValueError("wrong"), 101), (LostHostError("gone"), 169)],
)
def test_whatever_fails_the_process_leaves_at_once(monkeypatch, capsys, error, status, shown):
    def fail(*_):
        raise error

    monkeypatch.setenv("EO_TRACEBACK", "1" if shown else "")
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(launch, "choose", fail)
    monkeypatch.setattr(distributed, "leave", lambda status: 100 + status)
    assert launch.main([]) == status
    told = capsys.readouterr().err
    assert f"{type(error).__name__}: {error}" in told
    assert ("Traceback" in told) == (shown or isinstance(error, TypeError))


def test_a_task_that_cannot_do_what_is_asked_says_so(tmp_path):
    config = "--config=configs/satdifuser_pretrain.py:tiny"
    status, _, err = run("extract", config, f"--images={tmp_path}", f"--out={tmp_path}")
    assert status == 2 and "config.task='satdifuser_pretrain' cannot extract" in err


@pytest.mark.slow
def test_a_plan_is_printed_without_weights():
    status, out, err = run("plan", PROBE)
    assert status == 0 and "head (gw)" in out and "total" in out, err
    status, out, err = run("plan", PROBE, "--mesh=fsdp=2")
    assert status == 0 and "any device: 2 chips; mesh dcn=1 data=1 fsdp=2 tensor=1" in out, err
    assert "train (not compiled: shapes and bytes), a chip" in out


@pytest.mark.slow
def test_a_release_of_two_resolutions_is_converted_by_the_one_that_is_chosen(tmp_path):
    root = tmp_path / "release" / "resolution64"
    write_pipeline(root)
    (tmp_path / "release" / "resolution128").mkdir()
    words = ["convert", f"--weights={root.parent}", f"--out={tmp_path / 'out'}"]
    status, _, err = run(*words)
    assert status == 1 and "choose one of [128, 64]" in err
    status, out, err = run(*words, "--resolution=64")
    assert status == 0 and "tensors loaded, 0 missing" in out, err
    load_unet(find_components(tmp_path / "out").unet)


@pytest.mark.slow
def test_extraction_runs_from_the_command_line_without_weights(tmp_path):
    Image.new("RGB", (40, 32), "green").save(tmp_path / "green.png")
    words = ["extract", PROBE, "--config.model.pool=mean", "--config.model.save_timesteps=(48,)"]
    status, out, err = run(
        *words, f"--images={tmp_path / 'green.png'}", f"--out={tmp_path / 'out'}"
    )
    assert status == 0 and "THEY MEAN NOTHING" in out, err
    folder = FeatureFolder(tmp_path / "out")
    assert folder.manifest["names"] == ["green.png"] and folder.manifest["about"]["times"] == [1]
    assert folder[0]["scale_0"].ndim == 2
