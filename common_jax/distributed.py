"""Several processes as one run: finding the others, whose rows are whose, agreeing, leaving.

JAX's own runtime does the work (`jax.distributed`, its coordination service and collectives). Here
is only what a run asks of it. "Host" in messages is a process: one per machine on TPUs, one per GPU
under SLURM.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
LISTED = 16  # hosts that a message names
# Of the runtime, when a peer is gone. What a process does wrong by itself (no memory, a program
# that cannot be compiled) has others: it would fail again.
LOST_PEER = "UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION"


class JoinError(RuntimeError):
    """The processes of a run did not find each other."""


class LostHostError(RuntimeError):
    """Another process of this run ended or failed. `status` is the exit status: run again."""

    status = 69  # EX_UNAVAILABLE


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


def is_lost_peer(error: Exception) -> bool:
    """Whether another process failed; reading an array reports it as ValueError."""
    return bool(re.match(f"({LOST_PEER}): ", str(error)))


@contextlib.contextmanager
def blame_lost_host(describe: Callable[[], str]) -> Iterator[None]:
    """Errors that another process caused become LostHostError. describe: what was going on here."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if jax.process_count() == 1 or not is_lost_peer(error):
            raise
        raise LostHostError(
            f"a process of this run is gone, or failed, in {describe()}: "
            f"{str(error).splitlines()[0][:300]}. Start all of them again with the same command"
        ) from error


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
    """Whole arrays as numpy in process 0, None in the others; every process must call it.

    What lies whole on this process already is not sent. One process: the tree itself.
    """
    if jax.process_count() == 1:
        return tree
    is_first = jax.process_index() == 0

    def one(array):
        array = _replicate(array)
        return np.asarray(array) if is_first else None

    # One at a time, so that a device never holds more than one of them whole.
    gathered = jax.tree.map(one, tree)
    return gathered if is_first else None


def gather_array(array) -> np.ndarray:
    """A whole array as numpy; every process must call it where processes hold parts of it."""
    return np.asarray(_replicate(array))


def _replicate(array):
    if not isinstance(array, jax.Array) or array.is_fully_replicated or array.is_fully_addressable:
        return array
    return jax.jit(_itself, out_shardings=NamedSharding(array.sharding.mesh, P()))(array)


def _itself(array):
    return array


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


def tell_all(value):
    """What process 0 says, in every process; JSON."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = text if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes())


def ask_first_for(work: Callable, failure: type[Exception]):
    """What process 0 gets from `work` (JSON), in every process. Where it raises, all do.

    Process 0 raises what happened, the others `failure` with the same words.
    """
    result, problem = None, None
    if jax.process_index() == 0:
        try:
            result = work()
        except (OSError, RuntimeError, ValueError) as error:
            problem = error
    result, told = tell_all([result, problem and f"{type(problem).__name__}: {problem}"])
    if told:
        raise problem or failure(f"process 0 could not go on: {told}")
    return result


def check_same(what: str, number: int) -> None:
    """Refuse a run whose processes disagree about `number` (a size, the head of a hash)."""
    if jax.process_count() == 1:
        return
    found = _gather_exactly(np.int64(number)).reshape(-1).tolist()
    usual, count = Counter(found).most_common(1)[0]
    others = [f"host {i}: {value}" for i, value in enumerate(found) if value != usual]
    if others:
        more = f" and {len(others) - LISTED} more" if len(others) > LISTED else ""
        raise ValueError(
            f"{what} differs between the processes of this run ({', '.join(others[:LISTED])}{more};"
            f" {count} of {len(found)} hosts: {usual}): all must see the same files and get the "
            "same command"
        )


def check_same_examples(name: str, source) -> None:
    """Refuse a run whose processes have other examples: by their number, and by the fingerprint of
    the source where it has one (which may take as long as looking at every file)."""
    if jax.process_count() == 1:
        return
    check_same(f"the number of {name} examples", len(source))
    content = str(getattr(source, "fingerprint", "")).encode()
    head = int(hashlib.sha256(content).hexdigest()[:15], 16)
    check_same(f"the content of the {name} examples (its fingerprint)", head)
