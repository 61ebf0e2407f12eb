"""Answer windows and pictures in sequences: the published expansion, and what does not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from geodit_jax.chat import (
    IMAGE,
    NO_TARGET,
    answer_start,
    encode_chat,
    encode_plain,
    from_llava,
    number_turns,
    place_images,
)
from geodit_jax.config import GeoDiTConfig, TextConfig, TowerConfig
from geodit_jax.image_layout import lay_out, max_rows_per_token
from geodit_jax.sequence import TooLongError, expand, fill_answer, pad_targets
from geodit_jax.tokenizer import Tokenizer
from tests.conftest import golden_cases, read_golden

SMALL = Tokenizer.train(["a road near two boats, user assistant"], 320)
CONFIG = GeoDiTConfig(
    text=TextConfig(vocab_rows=320), tower=TowerConfig(image_size=8, patch=4), tokens=SMALL.ids
)
ANYRES = GeoDiTConfig(tower=CONFIG.tower, image_mode="anyres", tokens=SMALL.ids)
ASK = [("user", "<image>\nIs there a road?"), ("assistant", "yes")]
LAYOUT = lay_out((8, 8), CONFIG)
# case of the golden losses: records, pictures of each, image mode, merge type
CASES = {
    "chat": (["single_long"], [["photo"]], "anyres", "spatial_unpad"),
    "chat_batch": (
        ["single_long", "middle", "no_image"],
        [["photo"], ["photo2"], []],
        "anyres",
        "spatial_unpad",
    ),
    "two_turns": (["two_turns"], [["photo"]], "anyres", "spatial_unpad"),
    "square": (["single", "trailing"], [["photo"], ["photo2"]], "square", "spatial_unpad"),
    "plain": (["plain", "plain_spaces"], [["photo"], ["photo2"]], "square", "flat"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("folder", golden_cases("llada_v"))
def test_collated_and_expanded_labels_equal_the_published_ones(folder, case):
    meta, arrays = read_golden(folder)
    records = json.loads((folder / "chat.json").read_text())["train"]
    tokenizer = Tokenizer.load(folder / "checkpoint")
    names, pictures, mode, merge = CASES[case]
    config = GeoDiTConfig(tower=TowerConfig(image_size=meta["side"]), image_mode=mode, merge=merge)
    golden = {
        key: arrays[f"loss/{case}/{key}"] for key in ("input_ids", "labels", "labels_expanded")
    }
    for row, name in enumerate(names):
        turns, _ = place_images(from_llava(records[name]["conversations"]), len(pictures[row]))
        encode = encode_plain if case == "plain" else encode_chat
        encoded = encode(tokenizer, turns)
        encoded = pad_targets(tokenizer, encoded, golden["labels"].shape[1] - len(encoded[0]))
        assert encoded[0] == golden["input_ids"][row].tolist()
        assert encoded[1] == golden["labels"][row].tolist()
        layouts = [lay_out(meta[picture], config) for picture in pictures[row]]
        length = golden["labels_expanded"].shape[1]
        example = expand(encoded, layouts, config, tokenizer.ids.eos, length=length)
        np.testing.assert_array_equal(example["labels"], golden["labels_expanded"][row])
        if f"loss/{case}/conversation_ids" in arrays:
            turns = arrays[f"loss/{case}/conversation_ids"][row]
            np.testing.assert_array_equal(example["turns"], turns)
        if f"loss/{case}/embeds_are_zero" in arrays:
            zero = arrays[f"loss/{case}/embeds_are_zero"][row]
            np.testing.assert_array_equal(np.arange(length) >= example["length"], zero)


# ------------------------------------------------------------------------------- answer windows
def test_an_answer_fills_its_window_with_targets_to_the_end():
    encoded = encode_chat(SMALL, ASK, label_policy="response_only")
    (ids, labels, turns), cut = fill_answer(SMALL, encoded, 8)
    start = answer_start(SMALL, ids)
    assert cut == 0 and len(ids) == len(labels) == len(turns) == start + 8
    answer = [*SMALL.encode("yes"), SMALL.ids.eot]
    assert ids[start:] == labels[start:] == answer + [SMALL.ids.eos] * (8 - len(answer))
    assert set(labels[:start]) == {NO_TARGET}


def test_only_the_last_answer_is_filled_and_padding_joins_its_turn():
    encoded = encode_chat(SMALL, [*ASK, ("user", "How many?"), ("assistant", "two boats")])
    (ids, _, turns), _ = fill_answer(SMALL, encoded, 16)
    assert ids.count(SMALL.ids.eos) == 16 - len(SMALL.encode("two boats")) - 1
    assert turns == number_turns(SMALL, ids) and turns[-1] == 1


def test_a_caption_of_stage_one_is_filled_behind_its_picture():
    encoded = encode_plain(SMALL, ASK)
    (ids, labels, _), _ = fill_answer(SMALL, encoded, 12)
    assert ids[0] == IMAGE and len(ids) == 13 and labels[1:] == ids[1:]


def test_an_answer_beyond_its_window_is_refused_or_cut_and_counted():
    encoded = encode_chat(SMALL, ASK)
    have = len(SMALL.encode("yes")) + 1
    with pytest.raises(TooLongError, match=f"has {have} ids with its end, the window 2"):
        fill_answer(SMALL, encoded, 2)
    (ids, labels, _), cut = fill_answer(SMALL, encoded, 2, on_long="cut")
    assert cut == have - 2 and labels[-2:] == ids[-2:] == SMALL.encode("yes")[:2]
    assert fill_answer(SMALL, encoded, have) == (encoded, 0)


# ------------------------------------------------------------------------------------ sequences
def test_a_picture_takes_the_place_of_its_sentinel():
    encoded = encode_chat(SMALL, ASK)
    at, tokens = encoded[0].index(IMAGE), len(LAYOUT.rows)
    length = len(encoded[0]) + tokens + 4
    example = expand(encoded, [LAYOUT], CONFIG, SMALL.ids.eos, length=length)
    assert example["length"] == length - 5 and example["cut"] == 0
    assert example["ids"].tolist() == (
        encoded[0][:at] + [IMAGE] * tokens + encoded[0][at + 1 :] + [SMALL.ids.eos] * 5
    )
    assert example["labels"].tolist() == (
        encoded[1][:at] + [NO_TARGET] * tokens + encoded[1][at + 1 :] + [NO_TARGET] * 5
    )
    np.testing.assert_array_equal(example["image_rows"][at : at + tokens], LAYOUT.rows)
    np.testing.assert_array_equal(example["image_weights"].sum(1), example["ids"] == IMAGE)
    assert {name: value.dtype.name for name, value in example.items()} == {
        "ids": "int32",
        "labels": "int32",
        "turns": "int32",
        "image_rows": "int32",
        "image_weights": "float32",
        "length": "int32",
        "cut": "int32",
    }


def test_a_second_picture_reads_the_views_behind_the_first():
    turns = [("user", "<image> <image>"), ("assistant", "no")]
    layout = lay_out((8, 8), CONFIG, slots=3)
    example = expand(encode_chat(SMALL, turns), [layout] * 2, CONFIG, 0, length=400, slots=3)
    rows = example["image_rows"][example["ids"] == IMAGE, 0]
    assert rows.tolist() == [0, 1, 2, 3, 12, 4, 5, 6, 7, 12]


def test_shrunk_and_whole_pictures_have_arrays_of_one_shape():
    shapes = set()
    for size in ((8, 8), (48, 48)):
        layout = lay_out(size, ANYRES, slots=37)
        example = expand(encode_chat(SMALL, ASK), [layout], ANYRES, 0, length=400, slots=37)
        shapes.add(example["image_rows"].shape)
        count = example["image_weights"][example["ids"] == IMAGE].sum(1)
        np.testing.assert_allclose(count, 1, rtol=1e-6)
    assert shapes == {(400, max_rows_per_token(ANYRES))} and max_rows_per_token(ANYRES) == 4


def test_text_alone_has_empty_image_rows():
    turns = [("user", "Is there?"), ("assistant", "no")]
    text_only = GeoDiTConfig(tower=None)
    example = expand(encode_chat(SMALL, turns), [], text_only, 0, length=400)
    assert example["image_rows"].shape == (400, 1) and not example["image_weights"].any()


def test_an_example_beyond_the_length_is_refused_or_cut_and_counted():
    encoded = encode_chat(SMALL, ASK, label_policy="response_only")
    whole = len(encoded[0]) - 1 + len(LAYOUT.rows)
    with pytest.raises(TooLongError, match=rf"needs {whole} positions \(5 of pictures\)"):
        expand(encoded, [LAYOUT], CONFIG, 0, length=whole - 1)
    example = expand(encoded, [LAYOUT], CONFIG, 0, length=whole - 1, on_long="cut")
    assert example["cut"] == 1 and example["length"] == whole - 1
    with pytest.raises(TooLongError, match="no target"):
        expand(encoded, [LAYOUT], CONFIG, 0, length=10, on_long="cut")


def test_pictures_that_do_not_match_are_refused():
    encoded = encode_chat(SMALL, ASK)
    with pytest.raises(ValueError, match="hold 1 pictures, but 0 are given"):
        expand(encoded, [], CONFIG, 0, length=400)
    two = encode_chat(SMALL, [("user", "<image><image>"), ASK[1]])
    with pytest.raises(ValueError, match="2 views do not fit the 1 slots"):
        expand(two, [LAYOUT] * 2, CONFIG, 0, length=400)
    with pytest.raises(ValueError, match="slots"):
        expand(encoded, [lay_out((8, 8), CONFIG, slots=2)], CONFIG, 0, length=400, slots=1)
    with pytest.raises(ValueError, match="on_long='crop'"):
        expand(encoded, [LAYOUT], CONFIG, 0, length=400, on_long="crop")
