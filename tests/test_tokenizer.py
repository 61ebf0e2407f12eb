"""Ids of text: the special ids of a checkpoint, small vocabularies of our own, and faults."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from data.scene_text import captions, phrases, questions
from data.scenes import draw_scene
from geodit_jax.chat import render
from geodit_jax.config import TokenIds, find_size
from geodit_jax.tokenizer import LAST_TEXTS, SPECIAL, Tokenizer
from tests.conftest import golden_cases

GOLDEN = golden_cases("llada_v")


def scene_texts(count: int = 60) -> list[str]:
    texts = []
    for scene in (draw_scene(3, "train", k, side=32) for k in range(count)):
        texts += captions(scene) + [phrase for phrase, _ in phrases(scene)]
        texts += [text for q in questions(scene) for text in (q.question, q.answer)]
    return texts


TEXTS = scene_texts()
SMALL = Tokenizer.train(TEXTS, 1024)


@pytest.mark.parametrize("folder", GOLDEN)
def test_special_ids_of_a_checkpoint_are_read_from_its_tokenizer(folder):
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = Tokenizer.load(folder / "checkpoint")
    found = dataclasses.asdict(tokenizer.ids)
    assert found.pop("size") == meta["tokenizer_length"]
    assert found == {role: meta["ids"][role] for role in found}
    assert tokenizer.encode("assistant") == meta["ids"]["assistant"]


@pytest.mark.parametrize("folder", GOLDEN)
def test_ids_equal_those_of_transformers(folder):
    path = folder / "checkpoint" / "tokenizer.json"
    peer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    tokenizer = Tokenizer.load(path)
    for text in [
        *TEXTS[:40],
        *SPECIAL.values(),
        "ein Fluß, 1234 m²\r\n\n x",
        " <role>a",
        "It's 'LL",
    ]:
        ids = tokenizer.encode(text)
        assert ids == peer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special=False) == peer.decode(
            ids, clean_up_tokenization_spaces=False
        )


def test_the_small_sizes_expect_the_ids_of_a_trained_tokenizer():
    SMALL.check(find_size("tiny").tokens)
    Tokenizer.train(TEXTS, 32_000).check(find_size("100m").tokens)
    last = range(1024 - len(LAST_TEXTS), 1024)
    assert [SMALL.encode(text) for text in LAST_TEXTS] == [[number] for number in last]


def test_a_trained_tokenizer_shortens_its_texts_and_splits_digits():
    length = sum(len(SMALL.encode(text)) for text in TEXTS)
    assert length < 0.3 * sum(len(text.encode()) for text in TEXTS)
    digits = SMALL.encode("0123456789")
    assert len(digits) == 10
    assert SMALL.encode("[0.75,0.10]") == [SMALL.encode(c)[0] for c in "[0.75,0.10]"]


def test_training_twice_gives_the_same_tokenizer():
    assert Tokenizer.train(TEXTS, 1024).engine.to_str() == SMALL.engine.to_str()


def test_texts_too_poor_for_the_vocabulary_leave_reserved_texts():
    tokenizer = Tokenizer.train(["a road"], 400)
    assert tokenizer.ids.size == 400 and tokenizer.ids.bos == 389
    assert tokenizer.encode("<|reserved_token_1|>")[0] < 389
    assert tokenizer.decode(tokenizer.encode("<|reserved_token_1|>a road")) == "a road"


@given(st.text(max_size=60))
def test_every_text_comes_back(text):
    ids = SMALL.encode(text)
    assert all(0 <= number < SMALL.ids.size for number in ids)
    assert SMALL.decode(ids, skip_special=False) == text


def test_half_a_surrogate_pair_does_not_stop_encoding():
    assert SMALL.decode(SMALL.encode("a\ud83d b")) == "a? b"
    assert SMALL.encode_many(["a\ud83d b"]) == [SMALL.encode("a? b")]


def test_many_texts_at_once_have_the_ids_of_each():
    texts = [*TEXTS, *LAST_TEXTS, "", " <|mdm_mask|> a\n\n"]
    assert SMALL.encode_many(texts) == [SMALL.encode(text) for text in texts]


def test_decoding_skips_special_texts_or_keeps_them():
    ids = [SMALL.ids.bos, *SMALL.encode("two boats"), SMALL.ids.eot, SMALL.ids.mask, SMALL.ids.eos]
    assert SMALL.decode(ids) == "two boats"
    assert SMALL.decode(ids, skip_special=False) == (
        "<|startoftext|>two boats<|eot_id|><|mdm_mask|><|endoftext|>"
    )


@pytest.mark.parametrize("wrong", [-200, 1024])
def test_decoding_refuses_ids_without_text(wrong):
    with pytest.raises(ValueError, match=f"id {wrong} has no text.*0 to 1023"):
        SMALL.decode([5, wrong])


def test_saved_and_loaded_it_is_the_same(tmp_path):
    SMALL.save(tmp_path)
    again = Tokenizer.load(tmp_path, expected=SMALL.ids)
    assert again.engine.to_str() == SMALL.engine.to_str()
    assert pickle.loads(pickle.dumps(again)).encode(TEXTS[4]) == SMALL.encode(TEXTS[4])
    peer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert peer.encode(TEXTS[4], add_special_tokens=False) == SMALL.encode(TEXTS[4])
    assert peer.pad_token_id == peer.eos_token_id == SMALL.ids.eos
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi\n"}]
    assert peer.apply_chat_template(messages, tokenize=False) == render(
        [("user", "Hi")], "Be brief."
    )


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    SMALL.save(tmp_path)
    with pytest.raises(ValueError, match="eot 1023, model 126348"):
        Tokenizer.load(tmp_path, expected=TokenIds())


def test_a_missing_damaged_or_foreign_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text("{broken")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable"):
        Tokenizer.load(tmp_path)
    SMALL.save(tmp_path)
    path.write_text(path.read_text().replace("<|eot_id|>", "<|other|>"))
    with pytest.raises(ValueError, match=r"has no <\|eot_id\|>"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "texts, size, message", [([""], 400, "no text"), (["a"], 266, "least 267")]
)
def test_training_refuses_what_cannot_work(texts, size, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.train(texts, size)
