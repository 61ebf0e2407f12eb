"""The text tower against torch transformers, the published code's golden vectors, and itself."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import golden_cases, read_golden, rel_error
from torch_oracle import randomise, tree_from_torch

from satdifuser_jax.convert import load_text_encoder
from satdifuser_jax.text_encoder import (
    CLIPTextModel,
    TextConfig,
    init_text_encoder,
    text_encoder_shapes,
)

TINY = TextConfig(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=20,
)


def run(config, params, ids):
    model = CLIPTextModel(config)
    return jax.jit(lambda p, ids: model.apply({"params": p}, ids))(params, ids)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_text_tower_equals_torch_transformers_on_random_weights(activation):
    config = TextConfig.from_dict(TINY.to_dict() | {"hidden_act": activation})
    torch.manual_seed(0)
    settings = transformers.CLIPTextConfig(**config.to_dict(), eos_token_id=98)
    tower = randomise(transformers.CLIPTextModel(settings))
    ids = np.random.default_rng(0).integers(0, 99, (3, 20)).astype(np.int32)
    state = {name.removeprefix("text_model."): value for name, value in tower.state_dict().items()}
    with torch.no_grad():
        expected = tower(torch.from_numpy(ids).long()).last_hidden_state
    hidden = run(config, tree_from_torch(state), ids)
    assert rel_error(hidden, expected.numpy()) < 1e-5


def test_a_token_sees_no_later_token():
    params = init_text_encoder(TINY, 0)
    ids = np.arange(20, dtype=np.int32)[None]
    changed = ids.copy()
    changed[0, 12] = 77
    before, after = run(TINY, params, ids), run(TINY, params, changed)
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert np.abs(before[:, 12:] - after[:, 12:]).max(axis=(0, 2)).min() > 1e-4


def test_full_size_has_the_published_number_of_tensors():
    leaves = jax.tree.leaves(text_encoder_shapes(TextConfig()))
    assert len(leaves) == 372
    assert round(sum(leaf.size for leaf in leaves) / 1e6, 1) == 340.4


def test_config_round_trips_and_refuses_what_is_not_implemented():
    assert TextConfig.from_dict(TINY.to_dict()) == TINY
    published = transformers.CLIPTextConfig(**TINY.to_dict(), eos_token_id=98).to_dict()
    assert TextConfig.from_dict(published) == TINY
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        TextConfig(hidden_act="relu")
    with pytest.raises(ValueError, match="hidden_size=33 is not divisible"):
        TextConfig.from_dict(TINY.to_dict() | {"hidden_size": 33})


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="S <= 20"):
        run(TINY, init_text_encoder(TINY, 0), np.zeros((1, 21), np.int32))


@pytest.mark.parametrize("folder", golden_cases("satdifuser_*"))
def test_golden_prompt_embedding(folder):
    meta, arrays = read_golden(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(
        folder / "checkpoint" / "tokenizer", pad_token="!"
    )
    config, params, report = load_text_encoder(folder / "checkpoint" / "text_encoder")
    report.raise_if_bad()
    ids = tokenizer(
        meta["inversion"]["prompt"], padding="max_length", max_length=77, return_tensors="np"
    )["input_ids"].astype(np.int32)
    embeds = arrays["inversion/prompt_embeds"]
    hidden = run(config, params, ids)
    assert rel_error(np.broadcast_to(hidden, embeds.shape), embeds) < 2e-5
