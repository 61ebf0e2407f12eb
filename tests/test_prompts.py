from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import golden_cases, read_golden, rel_error

from satdifuser_jax import prompts
from satdifuser_jax.prompts import PromptError, load_embedding, load_tokenizer, prompt_embeddings

# Ids of the CLIP vocabulary that the published prompts use.
CLIP_IDS = {"a": 320, "satellite": 10316, "image": 2867, "of": 539, "new": 686, "zealand": 7618}


def write_tokenizer(folder, *, map_pad="!", config_pad="<|endoftext|>"):
    """A CLIP tokenizer that knows a few words under their real ids."""
    folder.mkdir(parents=True)
    vocab, merges = {"!": 0, "<|startoftext|>": 49406, "<|endoftext|>": 49407}, ["#version: 0.2"]
    spare = iter(range(1, 320))
    for word, number in CLIP_IDS.items():
        *letters, last = word
        pieces = [*letters, last + "</w>"]
        for piece in pieces:
            vocab.setdefault(piece, next(spare))
        while len(pieces) > 1:
            left, right = pieces[:2]
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
            pieces[:2] = [left + right]
            vocab.setdefault(left + right, next(spare))
        vocab[word + "</w>"] = number
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(merges))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special["unk_token"] = "<|endoftext|>"
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": config_pad}
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, **config}))
    if map_pad:
        text = json.dumps({**special, "pad_token": map_pad})
        (folder / "special_tokens_map.json").write_text(text)
    return folder


def test_ids_are_start_words_end_then_zero_padding(tmp_path):
    tokenize = load_tokenizer(write_tokenizer(tmp_path / "tok"))
    ids = tokenize(["A satellite image", "A satellite image of New Zealand", ""])
    assert ids.shape == (3, 77) and ids.dtype == np.int32
    assert ids[0].tolist() == [49406, 320, 10316, 2867, 49407] + [0] * 72
    assert ids[1, 4:8].tolist() == [539, 686, 7618, 49407]
    assert ids[2].tolist() == [49406, 49407] + [0] * 75


def test_padding_follows_the_special_tokens_map_then_the_config(tmp_path):
    assert load_tokenizer(write_tokenizer(tmp_path / "map")).pad == 0
    assert load_tokenizer(write_tokenizer(tmp_path / "config", map_pad=None)).pad == 49407


def test_a_long_prompt_is_cut_and_keeps_its_end_token(tmp_path):
    ids = load_tokenizer(write_tokenizer(tmp_path / "tok"))(["satellite " * 100])[0]
    assert ids[0] == 49406 and ids[-1] == 49407 and set(ids[1:-1]) == {10316}


def test_a_folder_without_vocabulary_is_refused(tmp_path):
    with pytest.raises(PromptError, match="vocab.json, merges.txt not found"):
        load_tokenizer(tmp_path)


@pytest.fixture
def tower(tmp_path, monkeypatch):
    """Folders of a pretend text tower whose calls are counted."""
    tokenizer, encoder = tmp_path / "tokenizer", tmp_path / "text_encoder"
    for folder in (tokenizer, encoder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    (encoder / "model.safetensors").write_bytes(b"weights 1")
    calls = []

    def encode(texts, *folders):
        calls.append(list(texts))
        scale = len((encoder / "model.safetensors").read_bytes())
        return np.stack([np.full((77, 4), scale * len(text), np.float32) for text in texts])

    monkeypatch.setattr(prompts, "encode_prompts", encode)
    paths = {"tokenizer": tokenizer, "text_encoder": encoder, "cache": tmp_path / "cache"}
    return paths, calls


def test_a_known_prompt_is_not_encoded_again_and_needs_no_tower(tower, tmp_path):
    paths, calls = tower
    first = prompt_embeddings(["roads", "", "roads"], **paths)
    assert calls == [["roads", ""]] and first.shape == (3, 77, 4)
    again = prompt_embeddings(["", "roads"], **paths)
    without = prompt_embeddings(["", "roads"], cache=paths["cache"])
    gone = prompt_embeddings([""], cache=paths["cache"], text_encoder=tmp_path / "gone")
    np.testing.assert_array_equal(again, first[[1, 0]])
    np.testing.assert_array_equal(without, again)
    np.testing.assert_array_equal(gone, again[:1])
    assert len(calls) == 1


def test_another_text_encoder_never_gets_a_stored_embedding(tower):
    paths, calls = tower
    old = prompt_embeddings(["roads"], **paths)
    (paths["text_encoder"] / "model.safetensors").write_bytes(b"other weights")
    new = prompt_embeddings(["roads"], **paths)
    assert len(calls) == 2 and not np.array_equal(old, new)
    with pytest.raises(PromptError, match="different text encoders"):
        prompt_embeddings(["roads"], cache=paths["cache"])


def test_an_unknown_prompt_without_a_tower_says_what_to_do(tower):
    paths, _ = tower
    prompt_embeddings(["roads"], **paths)
    with pytest.raises(PromptError, match="no embedding of 'fields'.*text_encoder/"):
        prompt_embeddings(["fields"], cache=paths["cache"])


def test_a_damaged_embedding_is_named(tower):
    paths, _ = tower
    prompt_embeddings(["roads"], **paths)
    (file,) = paths["cache"].iterdir()
    assert load_embedding(file)[0] == "roads"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(PromptError, match=file.name):
        prompt_embeddings(["roads"], **paths)


@pytest.mark.parametrize("folder", golden_cases("satdifuser_*"))
def test_golden_prompt_embeddings(folder, tmp_path):
    meta, arrays = read_golden(folder)
    checkpoint = folder / "checkpoint"
    embeddings = prompt_embeddings(
        [meta["inversion"]["prompt"]],
        tokenizer=checkpoint / "tokenizer",
        text_encoder=checkpoint / "text_encoder",
        cache=tmp_path,
    )
    expected = arrays["inversion/prompt_embeds"]
    assert rel_error(np.broadcast_to(embeddings, expected.shape), expected) < 2e-5


@pytest.mark.parametrize("folder", golden_cases("satdifuser_*"))
def test_golden_tokenizer_pads_with_the_published_id(folder):
    pytest.importorskip("transformers")
    path = folder / "checkpoint" / "tokenizer"
    special = json.loads((path / "special_tokens_map.json").read_text())["pad_token"]
    vocab = json.loads((path / "vocab.json").read_text())
    pad = vocab[special if isinstance(special, str) else special["content"]]
    ids = load_tokenizer(path)([read_golden(folder)[0]["inversion"]["prompt"], ""])
    config = json.loads((path.parent / "text_encoder" / "config.json").read_text())
    assert (ids[1, 2:] == pad).all() and pad == config["pad_token_id"]
    assert (ids[:, 0] == config["bos_token_id"]).all()
    assert ids[1, 1] == config["eos_token_id"]
