"""Checkpoints: the only place that knows Orbax (v0 API, which its documentation gives for loops).

`checkpoints/<step>/` holds the rolling ones, `best/<step>/` the one that won on validation.
Each is written beside its final name and renamed, so a kill leaves the older ones whole. Every
process writes and reads the parts of arrays that it holds; process 0 names a finished one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from common_jax.distributed import ask_first, is_any, is_lost_peer, tell_all
from common_jax.metric_log import say

SAVE_SECONDS = 1800  # for all processes to finish writing one checkpoint
REPORT_SECONDS = 12 * 3600  # for process 0 to draw and export while the others wait
UNREADABLE = (OSError, ValueError, KeyError, TypeError)


CUT_FROM_BYTES = 1 << 20
"""Where devices hold copies, each writes a part of an array. Of a small one cutting it costs more
than the rest of a save: a program for every shape, and a step that waits three times as long."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or none could be read; the message says which and why."""


class _Manager(ocp.CheckpointManager):
    """Leaves the agreement on the step to stop after to the loop.

    Orbax asks JAX as well, also in the thread that ends an earlier save. To JAX the step last asked
    for is where this process is: an older one from there made the others stop at a step that this
    process had passed.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """Rolling and best checkpoints of one workdir. `tree` is any pytree of jax arrays."""

    def __init__(self, workdir: Path, *, keep: int = 2, keep_every: int = 0):
        """keep: how many of the newest stay. keep_every: multiples of this step stay for good."""
        # Orbax wants absolute paths.
        self.folders = {name: (workdir / name).resolve() for name in ("checkpoints", "best")}
        self.started: dict[str, int] = {}
        self.damaged: dict[str, set] = {name: set() for name in self.folders}
        self.managers = {
            name: _Manager(
                folder,
                item_handlers=_make_handlers(name),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep if name == "checkpoints" else 1,
                    keep_period=(keep_every or None) if name == "checkpoints" else None,
                    async_options=ocp.AsyncOptions(timeout_secs=SAVE_SECONDS),
                    # Folders on a network may look older from another machine.
                    single_host_load_and_broadcast=True,
                    cleanup_tmp_directories=True,
                    # Hosts meet by name, and both folders may write the same step at once.
                    multiprocessing_options=ocp.options.MultiprocessingOptions(
                        barrier_sync_key_prefix=name
                    ),
                ),
            )
            for name, folder in self.folders.items()
        }

    def save(self, step: int, tree, meta: dict, *, best: bool = False) -> None:
        """Start writing; returns early when asynchronous. Earlier failures surface here."""
        name = "best" if best else "checkpoints"
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave({"step": step, **meta})
        )
        try:
            manager = self.managers[name]
            for damaged in self.damaged[name] & {*manager.all_steps()}:
                manager.delete(damaged)  # else it would count as one of those that are kept
            self.damaged[name].clear()
            if step in manager.all_steps():
                return
            self.started[name] = step
            manager.save(step, args=args, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(name, step, error) from error

    def wait(self) -> None:
        """Block until everything started by `save` is on disk."""
        for name, manager in self.managers.items():
            try:
                manager.wait_until_finished()
                check = getattr(manager, "check_for_errors", None)
                if check:
                    check()
            except (OSError, ValueError, RuntimeError) as error:
                raise self._failed(name, self.started.get(name), error) from error

    def settle(self) -> None:
        """`wait` until every process is done: process 0 tidies up for longer than the others, and
        JAX aborts all of them when one waits a minute at the end for another."""
        self.wait()
        wait_for_all("saved", SAVE_SECONDS)

    def _failed(self, name: str, step, error: Exception) -> CheckpointError:
        """What to say of the disk. Raises `error` itself where another process, or a device, is at
        fault; tensorstore is what writes the files."""
        is_of_peer = is_lost_peer(error) and "tensorstore" not in str(error)
        if is_of_peer or isinstance(error, jax.errors.JaxRuntimeError):
            raise error
        kept = list_steps(self.folders[name])  # by itself: the others know of no failure
        return CheckpointError(
            f"writing {self.folders[name]} failed at step {step}: {error}. Complete checkpoints "
            f"kept there: {kept or 'none'}. Free disk space or choose another --workdir, then run "
            f"the same command: it continues from the newest complete one."
        )

    def steps(self, *, best: bool = False) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        manager = self.managers["best" if best else "checkpoints"]
        manager.reload()
        return sorted(manager.all_steps())

    def restore(self, like, *, best: bool = False):
        """(tree, meta) of the newest readable checkpoint, on the shardings of `like`; else None.

        like: arrays, or abstract ones with shardings. A damaged newest checkpoint is reported and
        the one before it used, by all processes also when only one of them cannot read its part;
        the next save takes it away. Raises CheckpointError when checkpoints exist and none can be
        read.
        """
        name = "best" if best else "checkpoints"
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        steps, problems = self.steps(best=best), []
        reader = open_reader(self.folders[name], f"{name}-read") if steps else None
        for step in reversed(steps):
            found, problem = None, ""
            try:
                found = reader.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
                    ),
                )
            except UNREADABLE as error:
                problem = _first_line(error)
                say(f"checkpoint {self.folders[name]}/{step} cannot be read ({problem})", here=True)
            if not is_any(bool(problem)):
                return found.state, found.meta
            self.damaged[name].add(step)
            if not problem:
                problem = "another process cannot read its part"
                say(f"checkpoint {self.folders[name]}/{step}: {problem}")
            problems.append(f"step {step}: {problem}")
        if problems:
            raise CheckpointError(
                f"no checkpoint in {self.folders[name]} can be read: {'; '.join(problems)}. "
                f"Move the folder away to start anew."
            )
        return None

    def restore_selected(self, like):
        """`restore` of the best checkpoint; where it is damaged, which is said, of the newest."""
        try:
            return self.restore(like, best=True)
        except CheckpointError as error:
            say(f"{error} The newest checkpoint is scored instead")
            return self.restore(like)

    def close(self) -> None:
        """Release threads and files; a write that failed is named, not raised over its cause."""
        for name, manager in self.managers.items():
            try:
                manager.close()
            except (OSError, ValueError, RuntimeError) as error:
                say(f"closing {self.folders[name]}: {_first_line(error)}")


def is_time_to_save(config, step: int, saved_at: float) -> bool:
    """By steps, or by minutes since `saved_at` (time.monotonic()).

    For minutes the clock of process 0 counts, asked at logged steps.
    """
    checkpoint = config.checkpoint
    if step % checkpoint.every == 0:
        return True
    if not checkpoint.minutes or step % config.log.every:
        return False
    return ask_first(time.monotonic() - saved_at >= 60 * checkpoint.minutes)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def list_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending, as this process sees them."""
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def wait_for_all(name: str, seconds: int = REPORT_SECONDS) -> None:
    """Wait until every process is here; not on devices, whose collectives give up much sooner.

    One that dies meanwhile ends the wait of the others.
    """
    everybody = {*range(jax.process_count())}
    ocp.multihost.sync_global_processes(name, timeout=seconds, processes=everybody)


def open_reader(folder: Path, name: str, handlers=None) -> ocp.CheckpointManager:
    """A manager that only reads, for this process alone: it never waits for another one.

    So a process that cannot read its part finds out without leaving the others in a barrier.
    """
    me = jax.process_index()
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
            create=False,
            enable_async_checkpointing=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"{name}-{me}"
            ),
        ),
        item_handlers=handlers,
    )


def _make_handlers(name: str) -> dict:
    """What writes the two items of a checkpoint; processes meet under `name`."""
    types = ocp.type_handlers
    arrays = types.ArrayHandler(min_slice_bytes_for_replica_parallel=CUT_FROM_BYTES)
    registry = types.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, types.NumpyHandler())
    )
    place = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=name)
    state = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, multiprocessing_options=place
    )
    return {"state": state, "meta": ocp.JsonCheckpointHandler(multiprocessing_options=place)}


def read_checkpoint(workdir: Path, parts: Sequence[str]) -> tuple[dict, str]:
    """(parts of the best checkpoint or else of the newest, as host arrays; where they came from).

    Only `parts` of the saved tree are read, not the optimiser's. Nothing in the workdir changes, so
    a run that is still going may be read: process 0 chooses for all of them. A damaged checkpoint
    is reported and an older one taken. Raises CheckpointError when there is none, or none can be
    read.
    """
    tried: list[list] = []
    problems = []
    while found := tell_all(_choose(workdir, tried)):
        (name, step), tree, problem = found, None, ""
        tried.append(found)
        folder = (workdir / name).resolve()
        try:
            tree = _read_parts(folder, step, parts)
        except UNREADABLE as error:
            problem = _first_line(error)
            say(f"checkpoint {folder}/{step} cannot be read ({problem})", here=True)
        if not is_any(bool(problem)):
            return tree, f"{name}/{step}"
        problems.append(f"{name}/{step}: {problem or 'another process cannot read its part'}")
    why = f"none can be read: {'; '.join(problems)}" if problems else "there is none yet"
    raise CheckpointError(f"no checkpoint in {workdir}: {why}. Train first: `launch.py train`")


def _choose(workdir: Path, tried: Sequence) -> list | None:
    """[folder, step] of the next one to try; a run that goes on may have made new ones."""
    for name in ("best", "checkpoints"):
        for step in reversed(list_steps(workdir / name)):
            if [name, step] not in tried:
                return [name, step]
    return None


def _read_parts(folder: Path, step: int, parts: Sequence[str]) -> dict:
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    manager = open_reader(folder, f"{folder.name}-parts", handlers)
    stored = manager.item_metadata(step).state
    wanted = {part: stored[part] for part in parts}
    as_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_host, partial_restore=True)
    return manager.restore(step, args=ocp.args.Composite(state=args)).state
