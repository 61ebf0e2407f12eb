from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from common_jax.optim import count_steps, make_optimizer, make_schedule, update_ema
from configs.base import base_config


def optim(**changes):
    config = base_config().optim
    config.update(changes)
    return config


def test_the_epoch_schedule_has_the_published_values():
    batch, examples = 32, 2000  # m-eurosat: 62.5 steps an epoch
    schedule = make_schedule(optim(), examples=examples, batch_size=batch)
    published = {0: 2e-5, 1: 0.002016, 2: 0.004012, 3: 0.006008, 4: 0.008004, 5: 0.01}
    published |= {6: 0.0099799, 20: 0.0061165, 39: 3.0108e-5}  # rounded to five digits
    for epoch, value in published.items():
        first = -(-epoch * examples // batch)
        assert abs(float(schedule(first)) - value) < 5e-5 * value, epoch
    # Constant inside an epoch.
    assert float(schedule(125)) == float(schedule(187)) != float(schedule(188))
    assert count_steps(optim(), examples=examples, batch_size=batch) == 2500


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_updates_equal_torch(name):
    settings = optim(name=name, weight_decay=0.1, lr=0.01)
    tx = make_optimizer(settings, lambda step: 0.01)
    start = np.linspace(-1, 1, 6, dtype=np.float32)
    weight = torch.nn.Parameter(torch.tensor(start))
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    other = kind([weight], lr=0.01, weight_decay=0.1)
    params = jnp.asarray(start)
    state = tx.init(params)
    for step in range(5):
        updates, state = tx.update(jnp.sin(params + step), state, params)
        params = params + updates
        weight.grad = torch.sin(weight.detach() + step)
        other.step()
    np.testing.assert_allclose(np.asarray(params), weight.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_the_average_follows_the_published_ramp():
    ema, params = jnp.zeros(3), jnp.ones(3)
    np.testing.assert_allclose(update_ema(ema, params, 0, 0.9999), 0.9, rtol=1e-6)
    np.testing.assert_allclose(update_ema(ema, params, 90, 0.9999), 9 / 100, rtol=1e-5)
    np.testing.assert_allclose(update_ema(ema, params, 10**7, 0.9999), 1e-4, rtol=1e-3)


def test_clipping_limits_the_global_norm():
    tx = make_optimizer(optim(name="adamw", clip=1.0, lr=1.0), lambda step: 1.0)
    state = tx.init(jnp.zeros(2))
    grads = jnp.array([300.0, 400.0])
    _, state = tx.update(grads, state, jnp.zeros(2))
    moments = [x for x in jax.tree.leaves(state) if x.shape == (2,)]
    np.testing.assert_allclose(moments[0], 0.1 * np.array([0.6, 0.8]), rtol=1e-5)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="use adam or adamw"):
        make_optimizer(optim(name="sgd"), lambda step: 1.0)
    with pytest.raises(ValueError, match="epoch_cosine"):
        make_schedule(optim(schedule="linear"), examples=1, batch_size=1)


def test_a_warm_up_by_share_and_a_cosine_to_zero_equal_the_common_schedule_per_step():
    settings = optim(
        schedule="cosine", warmup_share=0.03, warmup_lr=0.0, min_lr=0.0, lr=1e-3, epochs=1.0
    )
    examples, batch = 9_600, 96  # 100 steps, 3 of them warm up
    schedule = make_schedule(settings, examples=examples, batch_size=batch)
    weight = torch.nn.Parameter(torch.zeros(1))
    published = transformers.get_cosine_schedule_with_warmup(
        torch.optim.SGD([weight], lr=1e-3), num_warmup_steps=3, num_training_steps=100
    )
    for step in range(100):
        assert abs(float(schedule(step)) - published.get_last_lr()[0]) < 1e-9, step
        published.optimizer.step()
        published.step()
    settings.steps = 101
    rising = make_schedule(settings, examples=examples, batch_size=batch)
    assert abs(float(rising(3)) - 0.75e-3) < 1e-9  # ceil(3.03) = 4 steps


def test_factors_change_the_step_of_the_leaves_they_name_and_no_other():
    params = {"tower": {"kernel": jnp.ones(2)}, "core": {"kernel": jnp.ones(2)}}
    grads = jax.tree.map(lambda x: 0.3 * x, params)
    steps = {}
    for name, factors in {"one": (), "two": ((r"^tower/", 0.2),)}.items():
        tx = make_optimizer(optim(name="adamw", weight_decay=0.1), lambda step: 0.01, factors)
        steps[name], _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(
        steps["two"]["tower"]["kernel"], 0.2 * steps["one"]["tower"]["kernel"], rtol=1e-6
    )
    np.testing.assert_array_equal(steps["two"]["core"]["kernel"], steps["one"]["core"]["kernel"])
