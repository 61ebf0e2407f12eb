"""A run's folder: what defines the run, who holds it, whether it is done."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import jax

from common_jax.distributed import ask_first_for, check_same, is_any
from common_jax.files import read_json, sha256_json, write_atomic, write_json
from common_jax.metric_log import say

# Settings that change how a run is executed, not what it computes.
FREE_GROUPS = ("mesh", "log", "eval", "checkpoint")
LENGTHS = ("optim.steps", "optim.epochs")
FREE_KEYS = (*LENGTHS, "data.workers", "data.cache_dir", "model.pool")

# Settings that a task got later, with what its earlier runs computed; those are read with them.
ADDED = {
    "satdifuser_pretrain": {
        "model.zero_snr": False,
        "model.noise_offset": 0.0,
        "model.input_perturbation": 0.0,
        "model.vae_dtype": "float32",
        "data.places": "",
        "data.weights": [],
    }
}

DONE = "DONE"  # this file says that a run came to its end and was scored
SHARED_SECONDS = 90  # for a new folder to be seen everywhere: NFS remembers what was not there


class WorkdirError(RuntimeError):
    """The workdir belongs to another run, or to another process."""


def flatten_config(config, prefix: str = "") -> dict:
    """{"optim.lr": 0.01, ...} of a ConfigDict or nested dict."""
    flat = {}
    for key, value in dict(config).items():
        name = f"{prefix}{key}"
        if hasattr(value, "items"):
            flat |= flatten_config(value, name + ".")
        else:
            flat[name] = value
    return flat


def read_config(path: str | os.PathLike) -> dict:
    """The config a workdir was made with, as a nested dict; sequences are tuples again.

    Raises WorkdirError when no run was started there.
    """
    file = Path(path).expanduser() / "config.json"
    if not file.is_file():
        raise WorkdirError(f"{file} does not exist: no run was started in this workdir")
    config: dict = {}
    for name, value in _read_flat(file).items():
        *groups, leaf = name.split(".")
        place = config
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = _to_tuple(value)
    return config


def _read_flat(file: Path) -> dict:
    flat = read_json(file)
    return ADDED.get(flat.get("task"), {}) | flat


def _to_tuple(value):
    return tuple(map(_to_tuple, value)) if isinstance(value, list) else value


def check_config(path: str | os.PathLike, config, ignored: tuple[str, ...] = ()) -> Path:
    """Refuse to read a workdir with a config of another run; returns the folder, writes nothing.

    ignored: beginnings of keys that may differ, beside those that a resumed run may change.
    """
    folder = Path(path).expanduser()
    found = flatten_config(read_config(folder))
    wanted = json.loads(json.dumps(flatten_config(config)))
    wanted = {key: _to_tuple(value) for key, value in wanted.items()}
    differing = [
        f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now"
        for key in sorted({*found, *wanted})
        if found.get(key) != wanted.get(key) and not (_is_free(key) or key.startswith(ignored))
    ]
    if differing:
        raise WorkdirError(
            f"workdir {folder} holds a run with another config:\n  " + "\n  ".join(differing) + "\n"
            "Leave --config out to use the one stored there."
        )
    return folder


def _is_free(key: str) -> bool:
    return key.split(".")[0] in FREE_GROUPS or key in FREE_KEYS


def open_workdir(path: str, config, *, is_writer: bool) -> Path:
    """Create or re-enter a workdir; refuses a config that would be another run, naming the keys.

    Returns the folder. Files: config.json, command.txt, env.txt. With `is_writer` the run is open
    again, were it finished or not.
    """
    folder = Path(path).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(flatten_config(config)))
    known = folder / "config.json"
    if known.exists():
        _check_same_run(folder, _read_flat(known), wanted)
    if is_writer:
        (folder / DONE).unlink(missing_ok=True)
        write_json(known, wanted)
        with (folder / "command.txt").open("a") as file:
            file.write(shlex.join([Path(sys.executable).name, *sys.argv]) + "\n")
        write_atomic(folder / "env.txt", _environment().encode())
    return folder


def _check_same_run(folder: Path, found: dict, wanted: dict) -> None:
    changed = [k for k in sorted({*found, *wanted}) if found.get(k) != wanted.get(k)]
    free = [k for k in changed if _is_free(k)]
    fixed = [
        f"{k}: {found.get(k)!r} there, {wanted.get(k)!r} now" for k in changed if k not in free
    ]
    # More steps continue a run; fewer would end it before its checkpoint.
    for key in LENGTHS:
        if (wanted.get(key) or 0) < (found.get(key) or 0):
            fixed.append(f"{key}: {found[key]} there, {wanted.get(key)} now (may only grow)")
    if fixed:
        raise WorkdirError(
            f"workdir {folder} holds a run with another config:\n  " + "\n  ".join(fixed) + "\n"
            "Use another --workdir, or set these keys as they are there."
        )
    for key in free:
        say(f"config change kept: {key} was {found.get(key)!r}, now {wanted.get(key)!r}")


def is_finished(path: str | os.PathLike, config) -> bool:
    """Whether the run there came to its end; one that is to be longer now did not.

    Process 0 looks, for all of them. Raises WorkdirError when the run there has another config,
    ValueError when the processes were given different ones.
    """
    folder, wanted = Path(path).expanduser(), flatten_config(config)
    check_same("the config", int(sha256_json(wanted)[:12], 16))

    def look() -> bool:
        if not (folder / DONE).exists():
            return False
        found = _read_flat(folder / "config.json")
        if any((wanted.get(key) or 0) > (found.get(key) or 0) for key in LENGTHS):
            return False
        open_workdir(path, config, is_writer=False)
        return True

    return ask_first_for(look, WorkdirError)


def enter_workdir(path: str, config):
    """(folder, its lock) of a run about to train; process 0 holds the lock for all of them.

    Raises in every process alike: WorkdirError when another run is at work there or was started
    there with another config, or when the processes do not see one folder; OSError in process 0,
    WorkdirError in the others, when the folder cannot be made.
    """
    folder, locks = Path(path).expanduser(), []

    def enter() -> None:  # the lock first: a second run must not even change config.json
        folder.mkdir(parents=True, exist_ok=True)
        locks.append(lock_workdir(folder))
        try:
            open_workdir(path, config, is_writer=True)
        except BaseException:
            locks.pop().close()
            raise

    ask_first_for(enter, WorkdirError)
    if is_any(not _appears(folder / "config.json", SHARED_SECONDS)):
        raise WorkdirError(
            f"workdir {folder} is not one folder for all {jax.process_count()} processes: some do "
            "not see what process 0 wrote there. Use a folder on a shared file system"
        )
    return folder, locks[0] if locks else None


def _appears(file: Path, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not file.is_file():
        if time.monotonic() > end:
            return False
        time.sleep(min(1.0, seconds / 4))
    return True


def lock_workdir(folder: Path):
    """Hold the folder for this process; the lock goes with the process, however it ends.

    On a file system without locks the run goes on, after a warning that nothing guards the folder.
    """
    handle = (folder / ".lock").open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.seek(0)
        holder = handle.read().strip() or "unknown"
        raise WorkdirError(
            f"workdir {folder} is in use by process {holder}; wait for it or use another --workdir"
        ) from error
    except OSError as error:
        say(f"workdir {folder} cannot be locked ({error}): start no second run there")
    handle.truncate(0)
    handle.write(f"{os.getpid()} on {platform.node()}")
    handle.flush()
    return handle


def _environment() -> str:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    lines = [f"python {platform.python_version()}", f"platform {platform.platform()}"]
    for name in names:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} missing")
    return "\n".join(lines) + "\n"
