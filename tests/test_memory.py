from __future__ import annotations

import pickle

import numpy as np

from data.memory import InMemory


class Counting:
    name = "counting"

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 5

    def __getitem__(self, i):
        self.reads += 1
        return {"image": np.full((10, 10, 3), i, np.uint8)}


def test_each_picture_is_read_once_and_attributes_pass_through():
    source = InMemory(Counting())
    for _ in range(3):
        for i in range(5):
            assert source[i]["image"][0, 0, 0] == i
    assert source.source.reads == 5
    assert (len(source), source.name) == (5, "counting")
    source[0]["new"] = 1
    assert "new" not in source[0]


def test_pictures_beyond_the_limit_are_read_again_and_pickles_stay_small():
    source = InMemory(Counting(), limit=700)
    for _ in range(2):
        for i in range(5):
            source[i]
    assert source.source.reads == 2 + 3 * 2
    assert len(pickle.dumps(source)) < 500
    assert pickle.loads(pickle.dumps(source))[3]["image"].shape == (10, 10, 3)
