"""Checkpoints: the only place that knows Orbax (v0 API, which its documentation gives for loops).

`checkpoints/<step>/` holds the rolling ones, `best/<step>/` the one that won on validation.
Each is written beside its final name and renamed, so a kill leaves the older ones whole. Every
process writes and reads the parts of arrays that it holds; process 0 names a finished one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from common_jax.distributed import is_any
from common_jax.metric_log import say

SAVE_SECONDS = 1800  # for all processes to finish writing one checkpoint


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or none could be read; the message says which and why."""


class Checkpoints:
    """Rolling and best checkpoints of one workdir. `tree` is any pytree of jax arrays."""

    def __init__(self, workdir: Path, *, keep: int = 2, keep_every: int = 0):
        """keep: how many of the newest stay. keep_every: multiples of this step stay for good."""
        # Orbax wants absolute paths.
        self.folders = {name: (workdir / name).resolve() for name in ("checkpoints", "best")}
        self.started: dict[str, int] = {}
        self.managers = {
            name: ocp.CheckpointManager(
                folder,
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
            state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave({"step": step, **meta})
        )
        try:
            manager = self.managers[name]
            if step in manager.all_steps():
                return
            self.started[name] = step
            manager.save(step, args=args, force=True)
        except jax.errors.JaxRuntimeError:  # another process is gone: no fault of the disk
            raise
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
            except jax.errors.JaxRuntimeError:
                raise
            except (OSError, ValueError, RuntimeError) as error:
                raise self._failed(name, self.started.get(name), error) from error

    def _failed(self, name: str, step, error: Exception) -> CheckpointError:
        kept = self.steps(best=name == "best")
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

        A damaged newest checkpoint is reported and the one before it used, by all processes also
        when only one of them cannot read its part. Raises CheckpointError when checkpoints exist
        and none can be read.
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
            except (OSError, ValueError, KeyError, TypeError) as error:
                problem = str(error).splitlines()[0][:200]
                say(f"checkpoint {self.folders[name]}/{step} cannot be read ({problem})", here=True)
            if not is_any(bool(problem)):
                return found.state, found.meta
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

    def close(self) -> None:
        """Release threads and files; a write that failed is named, not raised over its cause."""
        for name, manager in self.managers.items():
            try:
                manager.close()
            except (OSError, ValueError, RuntimeError) as error:
                say(f"closing {self.folders[name]}: {str(error).splitlines()[0][:200]}")


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


def read_checkpoint(workdir: Path, parts: Sequence[str]) -> tuple[dict, str]:
    """(parts of the best checkpoint or else of the newest, as host arrays; where they came from).

    Only `parts` of the saved tree are read, not the optimiser's. Nothing in the workdir changes, so
    a run that is still going may be read. A damaged checkpoint is reported and an older one taken.
    Raises CheckpointError when there is none, or none can be read.
    """
    problems = []
    for name in ("best", "checkpoints"):
        folder = (workdir / name).resolve()
        if not folder.is_dir():
            continue
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        manager = open_reader(folder, f"{name}-parts", handlers)
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                return _read_parts(manager, step, parts), f"{name}/{step}"
            except (OSError, ValueError, KeyError, TypeError) as error:
                problems.append(f"{name}/{step}: {str(error).splitlines()[0][:200]}")
                say(f"checkpoint {folder}/{step} cannot be read ({problems[-1]})")
    why = f"none can be read: {'; '.join(problems)}" if problems else "there is none yet"
    raise CheckpointError(f"no checkpoint in {workdir}: {why}. Train first: `launch.py train`")


def _read_parts(manager, step: int, parts: Sequence[str]) -> dict:
    stored = manager.item_metadata(step).state
    wanted = {part: stored[part] for part in parts}
    as_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_host, partial_restore=True)
    return manager.restore(step, args=ocp.args.Composite(state=args)).state
