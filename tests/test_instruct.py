from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from data.records import Record
from geodit_jax import instruct
from geodit_jax.chat import IMAGE
from geodit_jax.config import find_size
from geodit_jax.image_layout import max_image_tokens
from geodit_jax.instruct import (
    ExampleSpec,
    PackedText,
    ToExample,
    ToTextBlock,
    hide_answers,
    make_conversation,
    texts_of,
)
from geodit_jax.prompts import load_prompts
from geodit_jax.sequence import TooLongError
from geodit_jax.tokenizer import Tokenizer
from geodit_jax.views import make_views

CONFIG = find_size("tiny")
PROMPTS = load_prompts()
SIZE = (80, 64)
WINDOWS = {"caption": 24, "grounding": 32, "detection": 64, "vqa": 8, "classification": 8}
RECORDS = {
    "caption": Record(
        "c", "a.png", "caption", answers=("a harbour with two boats", "boats at a quay"), size=SIZE
    ),
    "grounding": Record(
        "g", "a.png", "grounding", "the white boat", boxes=((8.0, 8.0, 24.0, 20.0),), size=SIZE
    ),
    "detection": Record(
        "d",
        "a.png",
        "detection",
        "boat",
        boxes=((8.0, 8.0, 24.0, 20.0), (30.0, 8.0, 70.0, 60.0)),
        labels=("boat", "boat"),
        size=SIZE,
    ),
    "vqa": Record("v", "a.png", "vqa", "Is there a boat?", ("yes",), size=SIZE),
    "classification": Record(
        "k", "a.png", "classification", "", ("harbour",), classes=("harbour", "farm"), size=SIZE
    ),
    "chat": Record(
        "m",
        "a.png",
        "chat",
        conversations=(
            ("human", "What is it?\n<image>"),
            ("gpt", "a harbour"),
            ("human", "How many boats?"),
            ("gpt", "two"),
        ),
        size=SIZE,
    ),
    "text": Record(
        "t", None, "chat", conversations=(("human", "Say yes."), ("gpt", "yes")), size=None
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(list(texts_of(RECORDS.values(), PROMPTS, "unit2")) * 5, 1024)


def spec(**changes):
    settings = {"text_length": 160, "answer_lengths": WINDOWS, "system": "none"} | changes
    return ExampleSpec(**settings)


def picture():
    return np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)


def example_of(name, tokenizer, config=CONFIG, seed=0, **changes):
    record = RECORDS[name]
    image = picture() if record.image else None
    transform = ToExample(config, tokenizer, PROMPTS, spec(**changes))
    return transform(
        {"record": record, "image": image, "id": record.id}, np.random.default_rng(seed)
    )


def target_text(example, tokenizer):
    return tokenizer.decode(example["labels"][example["labels"] >= 0])


@pytest.mark.parametrize("name", RECORDS)
def test_every_task_gives_arrays_of_one_shape(name, tokenizer):
    example = example_of(name, tokenizer)
    length = 160 + max_image_tokens(CONFIG)
    assert {k: (v.shape, v.dtype) for k, v in example.items() if k != "id"} == {
        "ids": ((length,), np.int32),
        "labels": ((length,), np.int32),
        "turns": ((length,), np.int32),
        "image_rows": ((length, 1), np.int32),
        "image_weights": ((length, 1), np.float32),
        "length": ((), np.int32),
        "cut": ((), np.int32),
        "pixels": ((1, 64, 64, 3), np.uint8),
    }
    images = (example["ids"] == IMAGE).sum()
    assert images == (0 if name == "text" else max_image_tokens(CONFIG))
    assert (example["ids"][example["length"] :] == tokenizer.ids.eos).all()
    assert (example["labels"][example["length"] :] == -100).all()


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("grounding", "[0.10,0.20,0.30,0.35]"),
        ("vqa", "yes"),
        ("classification", "harbour"),
        ("chat", "a harbourtwo"),
        ("text", "yes"),
    ],
)
def test_targets_of_a_response_are_the_answer_and_its_end(name, answer, tokenizer):
    example = example_of(name, tokenizer, label_policy="response_only")
    assert target_text(example, tokenizer) == answer
    window = WINDOWS.get(RECORDS[name].task)
    if window:  # filled up with end-of-text ids, all of them targets
        targets = example["labels"][example["labels"] != -100]
        assert len(targets) == window
        end = list(targets).index(tokenizer.ids.eot)
        assert (targets[end + 1 :] == tokenizer.ids.eos).all() and end < window - 1
        assert example["length"] == np.flatnonzero(example["labels"] != -100)[-1] + 1


def test_the_picture_is_that_of_the_tower_and_none_is_black(tokenizer):
    seen, unseen = example_of("vqa", tokenizer), example_of("text", tokenizer)
    np.testing.assert_array_equal(seen["pixels"], make_views(picture(), CONFIG))
    assert not unseen["pixels"].any() and not unseen["image_weights"].any()


def test_captions_are_drawn_by_the_generator_of_the_example(tokenizer):
    found = {
        target_text(
            example_of("caption", tokenizer, seed=s, label_policy="response_only"), tokenizer
        )
        for s in range(20)
    }
    assert found == set(RECORDS["caption"].answers)
    one, other = (example_of("caption", tokenizer, seed=3) for _ in range(2))
    np.testing.assert_array_equal(one["ids"], other["ids"])


def test_a_blind_example_has_no_picture_and_the_same_text(tokenizer):
    seen, blind = example_of("chat", tokenizer), example_of("chat", tokenizer, blind=True)
    assert "pixels" not in blind and not (blind["ids"] == IMAGE).any()
    words = [
        tokenizer.decode(e["ids"][: e["length"]][e["ids"][: e["length"]] != IMAGE])
        for e in (seen, blind)
    ]
    assert words[0].replace("\n", "") == words[1].replace("\n", "")
    assert "<image>" not in words[1]


def test_stage_one_is_the_picture_then_the_caption_and_a_newline(tokenizer):
    example = example_of("caption", tokenizer, plain=True, answer_lengths={})
    tokens, end = max_image_tokens(CONFIG), example["length"]
    assert (example["ids"][:tokens] == IMAGE).all()
    text = tokenizer.decode(example["ids"][tokens:end])
    assert text.removesuffix("\n") in RECORDS["caption"].answers and text.endswith("\n")
    np.testing.assert_array_equal(example["labels"][tokens:end], example["ids"][tokens:end])


def test_long_answers_are_cut_and_counted_or_refused(tokenizer):
    cut = example_of("detection", tokenizer, answer_lengths={"detection": 10})
    whole = example_of("detection", tokenizer, answer_lengths={})
    assert cut["cut"] > 0 and cut["length"] + cut["cut"] == whole["length"]
    with pytest.raises(TooLongError, match="the window 10"):
        example_of("detection", tokenizer, answer_lengths={"detection": 10}, on_long="refuse")


def test_no_question_sees_its_answer_under_the_prefix_stages(tokenizer):
    plain, staged = example_of("chat", tokenizer), example_of("chat", tokenizer, sight="prefix")
    end = int(plain["length"])
    np.testing.assert_array_equal(staged["turns"][:end] // 2, plain["turns"][:end])
    odd = staged["turns"][:end] % 2 == 1
    answers = example_of("chat", tokenizer, label_policy="response_only")["labels"][:end] != -100
    np.testing.assert_array_equal(odd, answers)


def test_the_window_of_a_filled_answer_belongs_to_the_answer(tokenizer):
    ids = [tokenizer.ids.end_header, *tokenizer.encode("\n\n"), 5, tokenizer.ids.eos]
    assert hide_answers(tokenizer, ids, [0] * len(ids))[-2:] == [1, 1]


def test_anyres_pictures_fill_their_slots_and_leave_the_rest_black(tokenizer):
    config = dataclasses.replace(CONFIG, image_mode="anyres", grid_pinpoints=((64, 64), (128, 64)))
    example = example_of("vqa", tokenizer, config=config)
    views = make_views(picture(), config)
    assert example["pixels"].shape[0] == 3 and len(views) == 3
    small = ToExample(config, tokenizer, PROMPTS, spec())(
        {"record": RECORDS["vqa"], "image": picture()[:40, :40]}, np.random.default_rng(0)
    )
    assert small["pixels"].shape == example["pixels"].shape
    assert small["pixels"][1].any() and not small["pixels"][2].any()


def test_a_record_with_several_questions_keeps_them_all():
    turns = make_conversation(RECORDS["chat"], PROMPTS, "unit2", np.random.default_rng(0))
    assert [role for role, _ in turns] == ["user", "assistant"] * 2


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="sight='some'"):
        spec(sight="some")
    with pytest.raises(ValueError, match=r"data\.system='x'"):
        spec(system="x")


# -------------------------------------------------------------------------------------- plain text
def test_packed_text_is_all_texts_in_blocks_with_ends_between(tokenizer):
    texts = ["a harbour with two boats", "yes", "How many boats?"] * 3
    source = PackedText(texts, tokenizer, 16)
    blocks = [
        ToTextBlock(16, source.eos, 0.0)(source[i], np.random.default_rng(0))
        for i in range(len(source))
    ]
    ids = np.concatenate([b["ids"][: b["length"]] for b in blocks])
    assert tokenizer.decode(ids, skip_special=False) == "<|endoftext|>".join([*texts, ""])
    for block in blocks:
        end = block["length"]
        np.testing.assert_array_equal(block["labels"][:end], block["ids"][:end])
        assert (block["labels"][end:] == -100).all() and len(block["ids"]) == 16


def test_texts_are_tokenised_in_portions_and_kept_in_four_bytes_an_id(tokenizer, monkeypatch):
    texts = [f"picture {k} shows a harbour" for k in range(10)]
    whole = PackedText(texts, tokenizer, 16).ids
    portions, encode = [], tokenizer.encode_many
    monkeypatch.setattr(instruct, "TEXTS_AT_ONCE", 4)
    monkeypatch.setattr(tokenizer, "encode_many", lambda t: portions.append(len(t)) or encode(t))
    packed = PackedText(iter(texts), tokenizer, 16)
    np.testing.assert_array_equal(packed.ids, whole)
    assert packed.ids.dtype == np.int32 and portions == [4, 4, 2]


def test_the_asked_share_of_blocks_is_shortened(tokenizer):
    source = PackedText(["a harbour with two boats"] * 40, tokenizer, 16)
    rng = np.random.default_rng(0)
    always = [int(ToTextBlock(16, source.eos, 1.0)(source[0], rng)["length"]) for _ in range(200)]
    never = [int(ToTextBlock(16, source.eos, 0.0)(source[0], rng)["length"]) for _ in range(20)]
    assert set(always) == set(range(1, 17)) and set(never) == {16}


def test_no_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no text to train on"):
        PackedText([], tokenizer, 16)


def test_texts_of_records_hold_every_question_and_every_answer():
    texts = list(texts_of(RECORDS.values(), PROMPTS, "unit2"))
    for expected in ("boats at a quay", "a harbour with two boats", "[0.10,0.20,0.30,0.35]"):
        assert expected in texts
    assert "How many boats?" in texts and "two" in texts
    assert not any("<image>" in text for text in texts)


def test_plain_texts_are_for_pretraining_alone():
    plain = Record("p", None, "text", answers=("a road\n",))
    assert list(texts_of([plain], PROMPTS, "unit2")) == ["a road\n"]
    with pytest.raises(ValueError, match="record p is plain text: only train.stage=pretrain"):
        make_conversation(plain, PROMPTS, "unit2", None)
