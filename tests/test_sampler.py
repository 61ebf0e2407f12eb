"""The sampler against the published ones, a plain loop, and itself on other batches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_cases, read_golden
from text_cores import IDS, SMALL, decode_plainly, random_core, read_core

from geodit_jax import llada
from geodit_jax.config import GeoDiTConfig, TextConfig, TokenIds
from geodit_jax.decode_config import DecodeConfig
from geodit_jax.sampler import generate

KEY = jax.random.key(0)
GREEDY = DecodeConfig(length=12, steps=4, banned="none", stop=False)


def make_config(published: dict, ids: dict, size: int) -> GeoDiTConfig:
    header = ids.get("header") or [ids["start_header"], ids["end_header"]]
    text = TextConfig(
        vocab_rows=published["vocab_size"],
        width=published["hidden_size"],
        layers=published["num_hidden_layers"],
        heads=published["num_attention_heads"],
        kv_heads=published["num_key_value_heads"],
        mlp=published["intermediate_size"],
        rope_theta=published["rope_theta"],
        eps=published["rms_norm_eps"],
    )
    tokens = TokenIds(
        ids["mask"], ids["eos"], ids["bos"], header[0], header[1], ids["eot"], size=size
    )
    return GeoDiTConfig(text, None, tokens)


@pytest.fixture(scope="module")
def core():
    return random_core()


@pytest.fixture(scope="module")
def prefixes():
    """Three prefixes of 9, 4 and 7 tokens, padded with nonsense."""
    return np.random.default_rng(0).normal(0, 0.02, (3, 9, SMALL.text.width)).astype(np.float32)


LENGTHS = np.array([9, 4, 7], np.int32)


# ----------------------------------------------------------------------------------------- golden
@pytest.mark.parametrize("folder", golden_cases("llada_[mg]*"))
def test_published_text_sampler_is_matched_id_for_id(folder):
    meta, arrays = read_golden(folder)
    core, published = read_core(folder)
    config = make_config(published, meta["ids"], published["vocab_size"])
    prompt = arrays["prompt"]
    prefix = llada.embed(core, prompt)
    for name, case in meta["gen"].items():
        decode = DecodeConfig(
            length=case["gen_length"],
            steps=case["steps"],
            block=case["block_length"],
            guidance=case["cfg_scale"],
            banned="eos" if case["logits_eos_inf"] else "none",
            stop=False,
        )
        found = generate(core, config, prefix, None, KEY, decode)
        expected = arrays[f"gen/{name}"]
        np.testing.assert_array_equal(expected[:, : prompt.shape[1]], prompt)
        np.testing.assert_array_equal(found.ids, expected[:, prompt.shape[1] :], err_msg=name)


@pytest.mark.parametrize("folder", golden_cases("llada_[mg]*"))
def test_published_sampler_from_embeddings_is_matched_id_for_id(folder):
    meta, arrays = read_golden(folder)
    core, published = read_core(folder)
    config = make_config(published, meta["ids"], published["vocab_size"])
    assert set(config.tokens.banned) == set(meta["gen_embeds"]["n8_l32"]["banned"])
    for name, case in meta["gen_embeds"].items():
        decode = DecodeConfig(case["gen_length"], case["steps"], case["block_length"], stop=False)
        found = generate(core, config, jnp.asarray(arrays["embeds"]), None, KEY, decode)
        np.testing.assert_array_equal(found.ids, arrays[f"gen_embeds/{name}"], err_msg=name)


GOLDEN_STEPS = {  # steps, length, block, guidance; the names of the arrays say the same
    "n8_l8": (8, 8, 0, 0.0),
    "n8_l32": (8, 32, 0, 0.0),
    "n8_l32_stop": (8, 32, 0, 0.0),
    "n16_l32_b8": (16, 32, 8, 0.0),
    "n16_l32_b8_stop": (16, 32, 8, 0.0),
    "n4_l16_cfg": (4, 16, 0, 1.5),
    "n8_l16_suffix": (8, 16, 0, 0.0),
}


@pytest.mark.parametrize("folder", golden_cases("llada_v"))
def test_published_answers_about_a_picture_are_matched_id_for_id(folder):
    meta, arrays = read_golden(folder)
    core, published = read_core(folder / "checkpoint")
    config = make_config(published, meta["ids"], meta["tokenizer_length"])
    prompt = arrays["model/prompt"].reshape(-1)
    (at,) = np.flatnonzero(prompt == -200)
    picture = arrays["model/spatial_unpad/anyres_max_4/image_tokens"].reshape(-1, config.text.width)
    before, after = (llada.embed(core, ids) for ids in (prompt[:at], prompt[at + 1 :]))
    prefix = jnp.concatenate([before, picture, after])[None]
    suffix = arrays["gen/suffix_ids"].tolist()
    names = {name.removeprefix("gen/") for name in arrays if name.startswith("gen/")}
    assert names - {"suffix_ids"} == set(GOLDEN_STEPS)
    for name, (steps, length, block, guidance) in GOLDEN_STEPS.items():
        stop, fixed = name.endswith("_stop"), suffix if name.endswith("_suffix") else []
        decode = DecodeConfig(length, steps, block, guidance=guidance, stop=stop)
        found = generate(core, config, prefix, None, KEY, decode, fixed)
        count = int(found.length[0]) if stop else length
        answer = [*found.ids[0, :count].tolist(), *fixed]
        assert answer == arrays[f"gen/{name}"].reshape(-1).tolist(), name


# ------------------------------------------------------------------------------- the plain loop
CASES = {
    "one block": GREEDY,
    "blocks": dataclasses.replace(GREEDY, block=4, steps=6),
    "more steps than tokens": dataclasses.replace(GREEDY, steps=50),
    "guidance": dataclasses.replace(GREEDY, guidance=1.5, banned="llada_v"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_while_loop_is_the_plain_loop(name, core, prefixes):
    decode = CASES[name]
    banned = IDS.banned if decode.banned == "llada_v" else ()
    found = generate(core, SMALL, prefixes, LENGTHS, KEY, decode)
    for row, length in enumerate(LENGTHS):
        ids, _, passes = decode_plainly(
            core, SMALL, jnp.asarray(prefixes[row, :length]), decode, banned=banned
        )
        np.testing.assert_array_equal(found.ids[row], ids)
        assert found.steps[row] == passes


def test_stop_and_suffix_are_those_of_the_plain_loop(core, prefixes):
    free = generate(core, SMALL, prefixes, LENGTHS, KEY, GREEDY, suffix_ids=(3, 5))
    order = np.argsort(np.asarray(free.committed_at[0]), kind="stable")
    stop = int(free.ids[0, order[0]])  # a token of the first pass ends row 0 early
    decode = dataclasses.replace(GREEDY, stop=True)
    found = generate(core, SMALL, prefixes, LENGTHS, KEY, decode, (3, 5), (stop,))
    ended = 0
    for row, length in enumerate(LENGTHS):
        prefix = jnp.asarray(prefixes[row, :length])
        ids, end, passes = decode_plainly(core, SMALL, prefix, decode, (3, 5), (stop,))
        np.testing.assert_array_equal(found.ids[row, :end], ids[:end])
        assert found.steps[row] == passes
        ended += end < decode.length
    assert ended
    without = generate(core, SMALL, prefixes, LENGTHS, KEY, GREEDY)
    assert (without.ids != free.ids).any()  # the suffix is seen


def test_an_answer_has_no_mask_and_ends_before_its_end_of_text(core, prefixes):
    decode = dataclasses.replace(GREEDY, stop=True)
    free = np.asarray(generate(core, SMALL, prefixes, LENGTHS, KEY, GREEDY).ids)
    row, at = 0, 2
    tokens = dataclasses.replace(IDS, eot=int(free[row, at]))
    config = dataclasses.replace(SMALL, tokens=tokens)
    for settings in (GREEDY, decode):
        found = generate(core, config, prefixes, LENGTHS, KEY, settings)
        ids, lengths = np.asarray(found.ids), np.asarray(found.length)
        assert not (ids == IDS.mask).any()
        assert lengths[row] <= at
        for one, length in zip(ids, lengths):
            ends = np.flatnonzero((one == tokens.eot) | (one == tokens.eos))
            assert length == (ends[0] if len(ends) else len(one))


# ------------------------------------------------------------------------------------ batches
EACH_ALONE = {
    "warm": dataclasses.replace(GREEDY, temperature=0.7, remasking="random"),
    "cached": dataclasses.replace(GREEDY, cache="prefix", refresh_every=2, length_mode="auto"),
    "guided": dataclasses.replace(GREEDY, guidance=0.5, block=6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH_ALONE)
def test_a_row_of_an_unequal_batch_is_decoded_as_it_is_alone(name, core, prefixes):
    decode = EACH_ALONE[name]
    keys = jax.random.split(KEY, 3)
    together = generate(core, SMALL, prefixes, LENGTHS, keys, decode)
    row = 1  # the shortest: five positions of padding
    one = prefixes[row : row + 1, : LENGTHS[row]]
    alone = generate(core, SMALL, one, None, keys[row : row + 1], decode)
    np.testing.assert_array_equal(together.ids[row], alone.ids[0])
    np.testing.assert_array_equal(together.committed_at[row], alone.committed_at[0])
    np.testing.assert_allclose(together.confidence[row], alone.confidence[0], rtol=1e-4)
    assert together.steps[row] == alone.steps[0]


def test_a_core_of_single_layers_decodes_as_the_stacked_one(core, prefixes):
    stacked = generate(core, SMALL, prefixes, LENGTHS, KEY, GREEDY)
    single = generate(llada.unstack(core), SMALL, prefixes, LENGTHS, KEY, GREEDY)
    np.testing.assert_array_equal(stacked.ids, single.ids)
    np.testing.assert_allclose(stacked.confidence, single.confidence, rtol=1e-4)


def test_one_key_serves_all_rows_and_repeats(core, prefixes):
    decode = EACH_ALONE["warm"]
    same = np.repeat(prefixes[:1], 3, 0)
    first = generate(core, SMALL, same, None, KEY, decode)
    again = generate(core, SMALL, same, None, KEY, decode)
    other = generate(core, SMALL, same, None, jax.random.key(1), decode)
    np.testing.assert_array_equal(first.ids, again.ids)
    assert (first.ids != other.ids).any()
    assert (first.ids[0] != first.ids[1]).any()


# ------------------------------------------------------------------------------------- savings
def test_the_head_sees_answer_rows_only_and_a_pass_runs_only_when_needed(
    core, prefixes, monkeypatch
):
    seen, rows, head = [], [], llada.logits
    monkeypatch.setattr(llada, "logits", lambda core, h: seen.append(h.shape) or head(core, h))
    run = llada.run
    monkeypatch.setattr(llada, "run", lambda *a, **k: rows.append(k["rows"]) or run(*a, **k))
    decode = DecodeConfig(length=7, steps=9, banned="none", stop=False)  # compiled here only
    found = generate(core, SMALL, prefixes, LENGTHS, KEY, decode, suffix_ids=(3,))
    assert seen == [(3, 7, SMALL.text.width)]
    assert rows == [8]  # the last block computes answer and suffix
    np.testing.assert_array_equal(found.steps, 7)


# ------------------------------------------------------------------- other precision, faults
def test_bfloat16_prefixes_are_decoded_in_bfloat16(core, prefixes):
    found = generate(core, SMALL, jnp.asarray(prefixes, jnp.bfloat16), LENGTHS, KEY, GREEDY)
    exact = generate(core, SMALL, prefixes, LENGTHS, KEY, GREEDY)
    assert not (found.ids == IDS.mask).any()
    assert found.confidence.dtype == jnp.float32
    first = np.asarray(exact.committed_at) == 0
    error = np.abs(found.confidence - exact.confidence)[first & (found.ids == exact.ids)]
    assert 0 < error.max() < 0.05


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prefix": np.zeros((2, 9, 16), np.float32)}, r"expected \[rows, tokens, 32\]"),
        ({"prefix": np.zeros((9, 32), np.float32)}, r"expected \[rows, tokens, 32\]"),
        ({"lengths": np.array([9])}, "expected one for each of 3 rows"),
        ({"suffix_ids": (48,)}, r"ids \[48\] are not among 48"),
        ({"stop_ids": (-1,)}, r"ids \[-1\]"),
        ({"key": jax.random.split(KEY, 2)}, "2 keys for 3 rows"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message, core, prefixes):
    arguments = {"prefix": prefixes, "lengths": LENGTHS, "key": KEY} | changes
    with pytest.raises(ValueError, match=message):
        generate(core, SMALL, decode=GREEDY, **arguments)
