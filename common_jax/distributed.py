"""Several processes as one run: finding the others, whose rows are whose, agreeing, leaving.

JAX's own runtime does the work (`jax.distributed`, its coordination service and collectives). Here
is only what a run asks of it. "Host" in messages is a process: one per machine on TPUs, one per GPU
under SLURM.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from common_jax.sharding import BATCH_AXES

JOIN_SECONDS = 600  # machines of a slice boot, and pull images, minutes apart
HEARTBEAT_SECONDS = 100  # a process silent for so long counts as dead: the others end
SHUTDOWN_SECONDS = 60  # at a regular end, for processes that finish later
LINGER_SECONDS = 2  # that process 0 outlives a failure, for the others to say theirs


class JoinError(RuntimeError):
    """The processes of a run did not find each other."""


class Share(NamedTuple):
    """Part `index` of `count` of every global batch; one process of those with it `counts` it."""

    index: int
    count: int
    counts: bool


# ------------------------------------------------------------------------------------ beginning
def find_cluster(environ: Mapping[str, str] = os.environ) -> str:
    """What started this process as one of several; "" where nothing says so.

    Only the question "is there one" is answered here: who is who is read by `jax.distributed`.
    """

    def size(name: str) -> int:
        return int(environ.get(name) or 1)

    # A batch script itself has SLURM_NTASKS too, but only srun starts that many processes.
    if size("SLURM_STEP_NUM_TASKS") > 1:
        return "SLURM"
    if size("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in names or size("MEGASCALE_NUM_SLICES") > 1:
        return "TPU pod"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "Kubernetes"
    has_chips = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    on_cpu = environ.get("JAX_PLATFORMS", "").startswith("cpu")
    if has_chips and not on_cpu and importlib.util.find_spec("libtpu"):
        return "TPU VM"
    return ""


def join_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    seconds: int = JOIN_SECONDS,
) -> None:
    """Become one of several processes where flags or the surroundings say so; prints the place.

    coordinator: HOST:PORT of process 0, with num_processes and process_id, where nothing can be
    found out; num_processes=1 alone means this process is by itself whatever is around it.
    Before anything else touches a device. Raises JoinError, ValueError on half a set of flags.
    """
    given = [coordinator, num_processes, process_id]
    cluster = "flags" if coordinator else "" if num_processes == 1 else find_cluster()
    if any(value is not None for value in given) and None in given and num_processes != 1:
        raise ValueError(
            "--coordinator=HOST:PORT, --num_processes and --process_id belong together: "
            f"found {given}; under SLURM, Kubernetes and on TPU pods leave all three out"
        )
    if cluster:
        where = coordinator or "as detected"
        waits = f"joining the other processes ({cluster}; coordinator {where}), up to {seconds} s"
        print(waits, file=sys.stderr, flush=True)  # JAX itself may end a process that waits in vain
        try:
            jax.distributed.initialize(
                *given,
                cluster_detection_method="deactivate" if coordinator else None,
                initialization_timeout=seconds,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise JoinError(
                f"{socket.gethostname()} did not find the other processes ({cluster}; coordinator "
                f"{where}, waited up to {seconds} s): {error}. Are all of them started, is the "
                "port open? --num_processes=1 runs without the others"
            ) from error
    print(describe_place(cluster), file=sys.stderr, flush=True)


def describe_place(cluster: str = "") -> str:
    """`host 1/4 (node-3, SLURM): 4 of 16 devices, TPU v5 lite`."""
    found = ", ".join(filter(None, (socket.gethostname(), cluster)))
    local, all_devices = jax.local_devices(), jax.devices()
    kinds = ", ".join(sorted({device.device_kind for device in all_devices}))
    place = f"host {jax.process_index()}/{jax.process_count()} ({found})"
    return f"{place}: {len(local)} of {len(all_devices)} devices, {kinds}"


def leave(status: int) -> int:
    """`status`; of one of several processes that failed, ends the process at once.

    The regular end waits for the others, which may be waiting for this process in the middle of a
    step. Gone at once, its connections break and the others end as well.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1 and status:
        if jax.process_index() == 0:  # without their coordinator JAX aborts the others
            time.sleep(LINGER_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


# ------------------------------------------------------------------------------------- whose rows
def batch_share(mesh: Mesh) -> Share:
    """Which part of a global batch this process holds; ValueError where the mesh forbids parts."""
    ways = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    rows: dict[int, set] = {}
    for device, (index,) in NamedSharding(mesh, P(BATCH_AXES)).devices_indices_map((ways,)).items():
        rows.setdefault(device.process_index, set()).add(index.start or 0)
    return find_share(rows, jax.process_index())


def find_share(rows: Mapping[int, set], process: int) -> Share:
    """Share of `process`, from the rows (numbers from 0) that each process holds.

    Processes that only differ along `tensor` hold the same rows: they have one index, and the first
    of them counts. Rows need not be neighbours: parts are ordered by their first row.
    """
    held = {number: tuple(sorted(part)) for number, part in rows.items()}
    parts = sorted(set(held.values()))
    every = [row for part in parts for row in part]
    if len(every) != len(set(every)) or len({len(part) for part in parts}) > 1:
        raise ValueError(
            f"the mesh gives the processes rows {held} of a batch, which overlap and differ; "
            "choose mesh.tensor as a divisor or a multiple of the devices of a process"
        )
    mine = held[process]
    first = min(number for number, part in held.items() if part == mine)
    return Share(parts.index(mine), len(parts), first == process)


def local_rows(tree):
    """Rows of global arrays that this process holds, as numpy, in the order it put them in."""

    def one(array) -> np.ndarray:
        parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    return jax.tree.map(one, tree)


def gather_tree(tree):
    """Whole arrays as numpy in every process; every process must call it.

    What lies whole on this process already is not sent. One process: the tree itself.
    """
    if jax.process_count() == 1:
        return tree

    def one(array):
        if not isinstance(array, jax.Array) or array.is_fully_replicated:
            return np.asarray(array)
        return multihost_utils.process_allgather(array, tiled=True)

    return jax.tree.map(one, tree)


# -------------------------------------------------------------------------------------- agreeing
def sum_over_hosts(counts, share: Share):
    """Sum of a tree of numpy counts over the parts of a batch: each part once."""
    if jax.process_count() == 1:
        return counts
    mine = jax.tree.map(lambda x: np.asarray(x) if share.counts else np.zeros_like(x), counts)
    # Bytes travel, not numbers: without 64-bit mode a device would round float64 and cut int64.
    return jax.tree.map(lambda rows: rows.sum(0), _gather_exactly(mine))


def _gather_exactly(tree):
    def one(array):
        array = np.ascontiguousarray(array)
        sent = np.frombuffer(array.tobytes(), np.uint8)
        rows = np.asarray(multihost_utils.process_allgather(sent))
        return np.stack([np.frombuffer(r.tobytes(), array.dtype) for r in rows]).reshape(
            -1, *array.shape
        )

    return jax.tree.map(one, tree)


def is_any(flag: bool) -> bool:
    """Whether the flag is set in any process; every process must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.asarray(multihost_utils.process_allgather(np.int32(flag))).any())


def ask_first(flag: bool) -> bool:
    """The flag of process 0, in every process."""
    return bool(multihost_utils.broadcast_one_to_all(np.int32(flag)))


def check_same(what: str, number: int) -> None:
    """Refuse a run whose processes disagree about `number` (a size, the head of a hash)."""
    if jax.process_count() == 1:
        return
    found = _gather_exactly(np.int64(number)).reshape(-1).tolist()
    if len(set(found)) > 1:
        listed = ", ".join(f"host {i}: {value}" for i, value in enumerate(found[:16]))
        raise ValueError(
            f"{what} differs between the processes of this run ({listed}): all must see the same "
            "files and get the same command"
        )
