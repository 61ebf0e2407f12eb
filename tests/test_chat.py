"""Ids, labels, prompts and turns of conversations: the published ones exactly; odd records."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment

from geodit_jax import chat
from geodit_jax.chat import IMAGE, NO_TARGET, encode_chat, encode_prompt, from_llava, place_images
from geodit_jax.tokenizer import CHAT_TEMPLATE, SPECIAL, Tokenizer
from tests.conftest import golden_cases, read_golden

GOLDEN = golden_cases("llada_v")
SMALL = Tokenizer.train(["a road near two boats, user assistant system and more"], 320)
ASK = [("user", "<image>\nIs there a road?"), ("assistant", "yes")]


@pytest.fixture(scope="module", params=GOLDEN)
def golden(request):
    """(tokenizer, cases of chat.json, arrays of reference.npz)"""
    folder = request.param
    cases = json.loads((folder / "chat.json").read_text())
    return Tokenizer.load(folder / "checkpoint"), cases, read_golden(folder)[1]


def place_as_published(turns):
    """Upstream places placeholders that are there and inserts none."""
    return place_images(turns, sum(text.count("<image>") for _, text in turns))[0]


def test_training_ids_and_labels_equal_the_published_ones(golden):
    tokenizer, cases, _ = golden
    assert cases["system"] == chat.SYSTEM
    for name, case in cases["train"].items():
        turns = from_llava(case["conversations"])
        turns = place_as_published(turns) if case["has_image"] else turns
        if case["format"] == "plain":
            ids, labels, _ = chat.encode_plain(tokenizer, turns)
        else:
            ids, labels, _ = encode_chat(tokenizer, turns, has_image=case["has_image"])
        assert ids == case["input_ids"], name
        assert labels == case["labels"], name


def test_prompt_texts_and_ids_equal_the_published_ones(golden):
    tokenizer, cases, _ = golden
    for name, case in cases["prompts"].items():
        roles = ["user", "assistant"] * len(case["messages"])
        turns = list(zip(roles, case["messages"]))
        assert chat.render(turns) == case["text"], name
        assert encode_prompt(tokenizer, turns) == case["input_ids_as_in_training"], name
        lost = encode_prompt(tokenizer, turns, prompt_after_image="drop_first")
        assert lost == case["input_ids_published"], name


def test_turn_numbers_equal_the_published_ones(golden):
    tokenizer, cases, arrays = golden
    names = [key.split("/")[1] for key in arrays if re.fullmatch("conversation/.*/ids", key)]
    assert names
    for name in names:
        case = cases["train"][name]
        turns = place_as_published(from_llava(case["conversations"]))
        ids, labels, numbers = encode_chat(tokenizer, turns, has_image=case["has_image"])
        assert labels == arrays[f"conversation/{name}/labels"].ravel().tolist()
        assert numbers == arrays[f"conversation/{name}/ids"].ravel().tolist(), name
        other = encode_chat(tokenizer, turns, label_policy="response_only")
        assert other[2] == numbers, "turns must not depend on the labels"


def test_the_prompt_is_the_training_sequence_up_to_the_answer(golden):
    tokenizer, _, _ = golden
    for turns in (ASK, [*ASK, ("user", "How many?"), ("assistant", "3")]):
        ids, _, _ = encode_chat(tokenizer, turns)
        start = chat.answer_start(tokenizer, ids)
        assert encode_prompt(tokenizer, turns[:-1]) == ids[:start]
        answer = tokenizer.decode(ids[start:], skip_special=False)
        assert answer == turns[-1][1] + SPECIAL["eot"]


def test_response_only_targets_are_answers_and_their_ends():
    turns = [*ASK, ("user", "And boats?"), ("assistant", "two boats")]
    _, labels, _ = encode_chat(SMALL, turns, label_policy="response_only")
    targets = SMALL.decode([n for n in labels if n != NO_TARGET], skip_special=False)
    assert targets == "yes<|eot_id|>two boats<|eot_id|>"


def test_without_a_system_text_there_is_no_system_message():
    ids, _, _ = encode_chat(SMALL, ASK, system="")
    assert ids[:3] == [SMALL.ids.bos, SMALL.ids.start_header, SMALL.encode("user")[0]]
    assert encode_prompt(SMALL, ASK[:1], system="") == ids[: chat.answer_start(SMALL, ids)]


# -------------------------------------------------------------------------------- odd records
def test_a_missing_placeholder_is_inserted_and_reported():
    turns, inserted = place_images([("user", "Is there a road?"), ("assistant", "yes")], 1)
    assert inserted and turns == ASK
    assert place_images(ASK, 1) == (ASK, False)


def test_a_single_placeholder_moves_to_the_front():
    for text in (
        "Is <image>there a road? ",
        " <image>Is there a road?",
        "Is there a road?\n<image>",
    ):
        assert place_images([("user", text), ASK[1]], 1)[0] == ASK
    kept = [("user", "<image>Is there\n a road?  ")]
    assert place_images(kept, 1)[0] == kept


@pytest.mark.parametrize(
    "text, pictures",
    [("a <image> b <image>", 1), ("<image>", 0), ("<image>", 2), ("none", 2), ("<image>" * 3, 2)],
)
def test_placeholders_that_do_not_match_the_pictures_are_refused(text, pictures):
    count = text.count("<image>")
    with pytest.raises(ValueError, match=f"{count} <image> placeholders for {pictures} pictures"):
        place_images([("user", text)], pictures)


def test_messages_before_the_user_are_dropped_and_unknown_roles_refused():
    pairs = [("gpt", "Hello!"), ("human", "Is there?"), ("gpt", "no")]
    records = [{"from": role, "value": text} for role, text in pairs]
    assert from_llava(records) == from_llava(pairs) == [("user", "Is there?"), ("assistant", "no")]
    with pytest.raises(ValueError, match="message 1 is from 'tool'"):
        from_llava([*records[1:2], {"from": "tool", "value": ""}])
    with pytest.raises(ValueError, match="message 0 has the text None"):
        from_llava([{"from": "human"}])
    with pytest.raises(ValueError, match="no message of the user"):
        from_llava([])


@pytest.mark.parametrize("special", SPECIAL.values())
def test_text_that_would_forge_the_structure_is_refused(special):
    turns = [("user", f"a{special}b"), ("assistant", "yes")]
    with pytest.raises(ValueError, match=rf"message 0 \(user\) holds {re.escape(special)}"):
        encode_chat(SMALL, turns)
    with pytest.raises(ValueError, match="holds"):
        encode_prompt(SMALL, turns[:1])


def test_choices_and_conversations_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="label_policy='all'"):
        encode_chat(SMALL, ASK, label_policy="all")
    with pytest.raises(ValueError, match="nothing to learn"):
        encode_chat(SMALL, ASK[:1])
    with pytest.raises(ValueError, match="prompt_after_image='x'"):
        encode_prompt(SMALL, ASK[:1], prompt_after_image="x")
    with pytest.raises(ValueError, match="nothing to answer"):
        encode_prompt(SMALL, ASK)
    with pytest.raises(ValueError, match="plain format"):
        chat.encode_plain(SMALL, [*ASK, *ASK])


# --------------------------------------------------------------------------------- any text
texts = st.text(max_size=30).filter(lambda text: not any(s in text for s in SPECIAL.values()))
conversations = st.lists(st.tuples(texts, texts), min_size=1, max_size=4).map(
    lambda pairs: [turn for a, b in pairs for turn in (("user", a), ("assistant", b))]
)


@given(conversations)
def test_any_conversation_decodes_to_what_was_said(turns):
    ids, labels, numbers = encode_chat(SMALL, turns, has_image=False)
    assert len(ids) == len(labels) == len(numbers)
    said = SMALL.decode(ids, skip_special=False).split("<|start_header_id|>")
    assert said[0] == "<|startoftext|>" and len(said) == 2 + len(turns)
    for (role, text), message in zip(turns, said[2:]):
        assert message == f"{role}<|end_header_id|>\n\n{text}<|eot_id|>"
    assert max(numbers) == len(turns) // 2 - 1
    assert all(label in (number, NO_TARGET) for label, number in zip(labels, ids))


@given(conversations.map(lambda turns: turns[:-1]))
def test_any_prompt_equals_the_chat_template(turns):
    messages = [("system", chat.SYSTEM), *turns]
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
    text = template.render(
        bos_token=SPECIAL["bos"],
        messages=[{"role": role, "content": text} for role, text in messages],
    )
    assert chat.render(turns) == text
    ids = encode_prompt(SMALL, turns)
    assert ids.count(IMAGE) == chat.render(turns).count("<image>")
    pieces = [piece.tolist() for piece in np.split(ids, np.flatnonzero(np.array(ids) == IMAGE))]
    spoken = [
        SMALL.decode([n for n in piece if n != IMAGE], skip_special=False) for piece in pieces
    ]
    assert "<image>".join(spoken) == text
