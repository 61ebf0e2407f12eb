"""The one input pipeline: the batch is a function of the step.

Training order, fixed so that it does not depend on the number of hosts, workers or restarts:
source, seed, shuffle, repeat, then every map (random ones too), then batch, then this host's
batches, then the steps already done. With global batch G = n * b, host h of n at step k holds the
stream rows [k*G + h*b, k*G + (h+1)*b). Slicing before batching would keep the set of rows of a
step but not their order. The generator of a random transform is seeded by (seed, stream index).
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.shared_memory import SharedMemory
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray

from data.workers import end_with_parent

Example = dict[str, Any]
Transform = Callable[[Example, np.random.Generator], Example]

BUFFERED = 4  # batches read ahead, by this process and by every worker
NUMBERS = "biuf"  # kinds of dtype
SHARED = Path("/dev/shm")  # where Linux keeps shared memory, as files


class _Read:
    """Row of a source -> its example after all transforms in order, which share its generator.

    Grain is given rows to shuffle, not the source: of what it reads itself it measures every leaf,
    a tenth of the time of decoding a small JPEG.
    """

    def __init__(self, source: Any, transforms: Sequence[Transform]):
        self.source, self.transforms = source, tuple(transforms)

    def __call__(self, row: int, rng: np.random.Generator) -> Example:
        example = self.source[row]
        for transform in self.transforms:
            example = transform(example, rng)
        return example


class _Padded:
    """A source stretched to `length`; rows past the end repeat the last one, mask = False."""

    def __init__(self, source: Any, length: int):
        self.source, self.length = source, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Example:
        real = i < len(self.source)
        example = dict(self.source[i if real else len(self.source) - 1])
        if "mask" in example:
            raise ValueError(
                "examples may not hold a key 'mask': it marks the real rows; use 'label'"
            )
        return example | {"mask": np.bool_(real)}


def _add_index(index: int, example: Example) -> Example:
    return dict(example) | {"index": np.int64(index)}


class RecycledMemory:
    """Makes arrays in shared memory, of batches that grain hands to another process, and uses the
    memory again when that process has let go of them.

    Fresh pages cost a worker as much as half of decoding a small JPEG. Each piece of memory has a
    name of its own; every array over it gets one more, which grain removes when the array is gone.
    """

    def __init__(self):
        self.pieces: dict[int, list[SharedMemoryArray]] = {}

    def __call__(self, shape: Sequence[int], dtype) -> SharedMemoryArray:
        """An array whose values are yet to be written."""
        if not self.pieces:  # now, in the process that uses it: it was made in another one
            Finalize(None, self.close, exitpriority=0)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        pieces = self.pieces.setdefault(size, [])
        piece = next((piece for piece in pieces if self._is_free(piece)), None)
        if piece is None:
            piece = SharedMemoryArray((size,), np.uint8)
            pieces.append(piece)
        name = f"batch_{secrets.token_hex(8)}"
        os.link(SHARED / piece.shm.name, SHARED / name)
        array = piece.view(dtype).reshape(shape)
        array.shm = SharedMemory(name)  # for its name: what is written goes through the piece
        return array

    @staticmethod
    def _is_free(piece: SharedMemoryArray) -> bool:
        return os.stat(SHARED / piece.shm.name).st_nlink == 1

    def close(self) -> None:
        """Give the memory back as soon as the arrays over it are gone."""
        for piece in sum(self.pieces.values(), []):
            piece.shm.unlink()
        self.pieces.clear()


class _Stack:
    """Examples -> their batch; keys, shapes and types must agree over it.

    Grain asks it for shared memory in worker processes: pictures are then copied once on their way.
    """

    def __init__(self, only_numbers: bool):
        self.only_numbers, self.empty = only_numbers, np.empty

    def enable_shared_memory_output(self) -> None:
        self.empty = RecycledMemory() if SHARED.is_dir() else SharedMemoryArray

    def __call__(self, values: Sequence) -> dict[str, np.ndarray]:
        examples = values[0] if isinstance(values[0], list) else values
        batch = {}
        for key, value in examples[0].items():
            if self.only_numbers and np.asarray(value).dtype.kind not in NUMBERS:
                continue
            try:
                batch[key] = self._stack([np.asarray(example[key]) for example in examples])
            except (KeyError, ValueError) as error:
                found = [np.shape(e[key]) if key in e else "absent" for e in examples]
                raise ValueError(
                    f"examples {[e.get('id', '?') for e in examples]} cannot be batched: "
                    f"'{key}' has shapes {found}; add a transform that brings them to one shape"
                ) from error
        return batch

    def _stack(self, arrays: list[np.ndarray]) -> np.ndarray:
        types = {array.dtype for array in arrays}
        if not arrays[0].size or any(it.kind not in NUMBERS for it in types):
            return np.stack(arrays)
        shape = len(arrays), *arrays[0].shape
        return np.stack(arrays, out=self.empty(shape, np.result_type(*types)))


def _local_batch(batch_size: int, host: int, num_hosts: int) -> int:
    if batch_size < 1 or num_hosts < 1 or batch_size % num_hosts:
        raise ValueError(
            f"batch_size={batch_size} (global) is not divisible by {num_hosts} hosts; "
            f"use a multiple of {num_hosts}"
        )
    if not 0 <= host < num_hosts:
        raise ValueError(f"host={host} is not in 0..{num_hosts - 1}")
    return batch_size // num_hosts


def _iterate(
    dataset: grain.MapDataset, size: int, ours: slice, stack: _Stack, workers: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of `size` examples, those of all batches that are `ours`."""
    dataset = dataset.batch(size, drop_remainder=True, batch_fn=list if workers else stack)
    # Threads of one process wait for each other's Python: beside its own, a worker has one.
    reading = grain.ReadOptions(num_threads=1 if workers else 2, prefetch_buffer_size=BUFFERED)
    iterable = dataset[ours].to_iter_dataset(reading)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # worker processes refuse unparsed absl flags
        # Stacked last, where grain takes shared memory from it.
        iterable = iterable.batch(1, batch_fn=stack).mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
            worker_init_fn=end_with_parent,
        )
    return iter(iterable)


def train_batches(
    source: Any,
    transforms: Sequence[Transform] = (),
    *,
    batch_size: int,
    seed: int,
    host: int = 0,
    num_hosts: int = 1,
    step: int = 0,
    workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless training batches of this host, starting at `step`.

    batch_size is global: every host gets batch_size / num_hosts rows of each step. Each batch
    holds the numeric keys of the examples, stacked, and `index` (int64, the stream index; epoch =
    index // len(source)). Strings are dropped. workers = 0 reads by threads, else by that many
    spawned processes, with identical batches; then the caller needs a `__main__` guard and should
    call `.close()` on the iterator.
    """
    local = _local_batch(batch_size, host, num_hosts)
    if not len(source):
        raise ValueError(
            f"source '{getattr(source, 'name', source)}' is empty: nothing to train on"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} is not in 0..2**32-1")
    dataset = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    dataset = dataset.random_map(_Read(source, transforms)).map_with_index(_add_index)
    ours = slice(host + step * num_hosts, None, num_hosts)
    return _iterate(dataset, local, ours, _Stack(only_numbers=True), workers)


def eval_batches(
    source: Any,
    transforms: Sequence[Transform] = (),
    *,
    batch_size: int,
    host: int = 0,
    num_hosts: int = 1,
    workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """One pass in order, the same number of whole batches on every host.

    batch_size is global. `mask` (bool) is False on rows that only fill the last batches, which
    repeat the last example; `index` is the row in the source. Strings (`id`) are kept.
    """
    local = _local_batch(batch_size, host, num_hosts)
    steps = -(-len(source) // batch_size)
    if not steps:
        return iter(())
    padded = _Padded(source, steps * batch_size)
    dataset = grain.MapDataset.range(len(padded)).seed(0)
    dataset = dataset.random_map(_Read(padded, transforms)).map_with_index(_add_index)
    ours = slice(host, None, num_hosts)
    return _iterate(dataset, local, ours, _Stack(only_numbers=False), workers)
