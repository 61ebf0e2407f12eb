"""The batch is a function of the step: hosts, restarts and workers change nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from grain.multiprocessing import SharedMemoryArray
from processes import children, wait_until_gone

from data.pipeline import SHARED, RecycledMemory, eval_batches, train_batches


class Numbers:
    """N examples; picklable, so that worker processes can read it."""

    name = "numbers"

    def __init__(self, n: int):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        image, boxes = np.full((2, 2, 3), i, np.uint8), np.zeros((0, 4), np.float32)
        return {"image": image, "label": np.int32(i), "boxes": boxes, "id": f"n{i}"}


def jitter(example, rng):
    return example | {"noise": rng.random(3, dtype=np.float32)}


def take(steps, n=10, **options):
    settings = {"batch_size": 8, "seed": 3} | options
    batches = train_batches(Numbers(n), [jitter], **settings)
    taken = [next(batches) for _ in range(steps)]
    batches.close()
    return taken


def joined(parts):
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize("hosts", [2, 4])
def test_every_number_of_hosts_gives_the_same_global_rows(hosts):
    alone = take(5)
    parts = [take(5, host=h, num_hosts=hosts) for h in range(hosts)]
    for step, whole in enumerate(alone):
        assert_equal(joined([part[step] for part in parts]), whole)


def test_rows_of_a_step_have_consecutive_stream_indices():
    for step, batch in enumerate(take(3)):
        np.testing.assert_array_equal(batch["index"], np.arange(step * 8, step * 8 + 8))
    second = take(2, host=1, num_hosts=2)[1]
    np.testing.assert_array_equal(second["index"], [12, 13, 14, 15])


def test_restart_at_a_step_continues_the_stream_with_its_augmentation():
    whole = take(6)
    resumed = take(3, step=3)
    for a, b in zip(resumed, whole[3:]):
        assert_equal(a, b)


def test_restart_may_change_the_number_of_hosts():
    whole = take(4)
    parts = [take(1, step=3, host=h, num_hosts=4)[0] for h in range(4)]
    assert_equal(joined(parts), whole[3])


def test_each_epoch_sees_every_example_once_in_another_order():
    labels = np.concatenate([batch["label"] for batch in take(5)])
    epochs = labels.reshape(4, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert any((epochs[0] != epoch).any() for epoch in epochs[1:])


def test_random_transforms_differ_between_epochs_and_seeds():
    noise = np.concatenate([batch["noise"] for batch in take(5)])
    assert len(np.unique(noise[:, 0])) == 40
    assert (take(1, seed=4)[0]["noise"] != take(1)[0]["noise"]).any()


def test_worker_processes_give_the_same_batches_as_threads():
    for a, b in zip(take(4, workers=2), take(4)):
        assert_equal(a, b)


@pytest.mark.skipif(not SHARED.is_dir(), reason="names of shared memory are counted on Linux only")
def test_memory_of_a_batch_is_used_again_once_its_reader_has_let_go():
    memory = RecycledMemory()

    def write(value):
        array = memory((4, 3), np.float32)
        array[:] = value
        return array.__array_interface__["data"][0], array.metadata

    def read(metadata):
        array = SharedMemoryArray.from_metadata(metadata)
        array.unlink_on_del()
        return array

    first, sent = write(1)
    other, sent_too = write(2)
    assert other != first  # nobody has read the first one yet
    held = read(sent)
    third, sent_last = write(3)
    assert third not in (first, other) and (held == 1).all()
    del held
    until = time.monotonic() + 10  # grain may leave it to a thread
    while not memory._is_free(memory.pieces[48][0]) and time.monotonic() < until:
        time.sleep(0.01)
    last, sent = write(4)
    assert last == first and (read(sent) == 4).all()
    assert (read(sent_too) == 2).all() and (read(sent_last) == 3).all()
    names = [piece.shm.name for piece in memory.pieces[48]]
    assert all((SHARED / name).exists() for name in names)
    memory.close()
    assert not any((SHARED / name).exists() for name in names)


READS_FOR_EVER = """
import time
from data.pipeline import train_batches
from test_pipeline import Numbers
if __name__ == "__main__":
    batches = train_batches(Numbers(10), batch_size=8, seed=0, workers=1)
    print(next(batches)["label"].shape, flush=True)
    time.sleep(600)
"""


def test_worker_processes_of_a_killed_run_end_too(tmp_path):
    (tmp_path / "reads.py").write_text(READS_FOR_EVER)
    paths = os.pathsep.join(str(it) for it in (Path(__file__).parent, Path(__file__).parent.parent))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "reads.py")],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"(8,)\n"
    workers = children(process.pid)
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until_gone(workers)


def test_worker_processes_honour_hosts_and_restart():
    for a, b in zip(
        take(2, workers=2, host=1, num_hosts=2, step=3), take(5, host=1, num_hosts=2)[3:]
    ):
        assert_equal(a, b)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_evaluation_pads_whole_batches_and_counts_each_row_once(hosts):
    per_host = [
        list(eval_batches(Numbers(11), batch_size=8, host=h, num_hosts=hosts)) for h in range(hosts)
    ]
    assert {len(batches) for batches in per_host} == {2}
    rows = joined([joined(batches) for batches in per_host])
    assert len(rows["mask"]) == 16 and rows["mask"].sum() == 11
    assert sorted(rows["label"][rows["mask"]]) == list(range(11))
    assert (rows["label"][~rows["mask"]] == 10).all()
    assert sorted(rows["id"][rows["mask"]]) == sorted(f"n{i}" for i in range(11))


def test_training_batches_hold_numbers_only():
    assert set(take(1)[0]) == {"image", "label", "boxes", "noise", "index"}


def test_batch_not_divisible_by_hosts_is_refused():
    with pytest.raises(ValueError, match="not divisible by 3 hosts"):
        train_batches(Numbers(9), batch_size=8, seed=0, num_hosts=3)


def test_host_out_of_range_and_empty_source_are_refused():
    with pytest.raises(ValueError, match="host=2"):
        eval_batches(Numbers(9), batch_size=8, host=2, num_hosts=2)
    with pytest.raises(ValueError, match="empty"):
        train_batches(Numbers(0), batch_size=8, seed=0)
    assert list(eval_batches(Numbers(0), batch_size=8)) == []


class Ragged(Numbers):
    def __getitem__(self, i):
        return {"image": np.zeros((i + 1, 2, 3), np.uint8), "id": f"n{i}"}


def test_examples_of_unequal_shape_are_named():
    with pytest.raises(ValueError, match="'image' has shapes"):
        next(iter(eval_batches(Ragged(4), batch_size=2)))


class Clashing(Numbers):
    def __getitem__(self, i):
        return {"mask": np.zeros((2, 2), np.int32)}


def test_a_source_may_not_use_the_key_that_marks_real_rows():
    with pytest.raises(ValueError, match="'mask'"):
        next(iter(eval_batches(Clashing(4), batch_size=2)))
