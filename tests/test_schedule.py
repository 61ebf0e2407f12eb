from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import golden_cases, rel_error

from satdifuser_jax.schedule import Schedule, ScheduleError, ddim_step

SCHEDULE = Schedule()
ZERO_SNR = Schedule(rescale_betas_zero_snr=True)
# Published constants: t, alpha_bar, sqrt(alpha_bar), sqrt(1 - alpha_bar).
CONSTANTS = [
    (1, 0.99829602, 0.99914765, 0.04127926),
    (21, 0.98038065, 0.99014176, 0.14006908),
    (41, 0.96087265, 0.98024112, 0.19780634),
    (61, 0.93978274, 0.96942395, 0.24539205),
    (81, 0.91713762, 0.95767301, 0.28785825),
    (101, 0.89298022, 0.94497633, 0.32713878),
    (121, 0.86736965, 0.93132687, 0.36418450),
    (141, 0.84038156, 0.91672331, 0.39952278),
    (161, 0.81210744, 0.90117007, 0.43346575),
    (181, 0.78265423, 0.88467747, 0.46620357),
]


@pytest.mark.parametrize("t,a,root,noise", CONSTANTS)
def test_alpha_bar_has_the_published_constants(t, a, root, noise):
    found = np.asarray(SCHEDULE.alpha_bar(t))
    assert found.dtype == np.float32
    assert abs(float(found) - a) < 6e-9  # the eight printed digits
    roots = np.sqrt([found, 1 - found])
    np.testing.assert_allclose(roots, [root, noise], rtol=1.2e-7)  # one float32 rounding


def test_alpha_bar_is_one_below_zero_and_takes_vectors_of_floats():
    found = np.asarray(SCHEDULE.alpha_bar(np.array([-1.0, 0.0, 21.0, 999.0])))
    assert found[0] == 1.0
    np.testing.assert_array_equal(found[1:], SCHEDULE.alphas_cumprod[[0, 21, 999]])


def test_table_noise_velocity_and_sampling_equal_diffusers():
    torch = pytest.importorskip("torch")
    from diffusers import DDIMScheduler

    for ours in (SCHEDULE, Schedule(prediction_type="epsilon"), ZERO_SNR):
        theirs = DDIMScheduler.from_config(ours.to_config())
        table = theirs.alphas_cumprod.numpy()
        if ours.rescale_betas_zero_snr:  # diffusers goes from the table to betas and back, rounded
            np.testing.assert_allclose(ours.alphas_cumprod, table, rtol=2e-5, atol=1e-9)
        else:
            np.testing.assert_array_equal(ours.alphas_cumprod, table)
        rng = np.random.default_rng(0)
        x, n, out = rng.normal(size=(3, 3, 4, 4, 2)).astype(np.float32)
        t = np.array([0, 333, 999])
        peer = theirs.add_noise(torch.tensor(x), torch.tensor(n), torch.tensor(t))
        assert rel_error(ours.add_noise(x, n, t), peer) < 1e-6
        peer = theirs.get_velocity(torch.tensor(x), torch.tensor(n), torch.tensor(t))
        assert rel_error(ours.velocity_target(x, n, t), peer) < 1e-6
        theirs.set_timesteps(10)
        steps, a, b = ours.sampling_steps(10)
        assert steps.tolist() == theirs.timesteps.tolist()
        for i in (0, 4, 9):
            peer = theirs.step(torch.tensor(out), int(steps[i]), torch.tensor(x))
            after, x0 = ddim_step(x, ours.to_epsilon(out, x, steps[i]), a[i], b[i])
            assert rel_error(after, peer.prev_sample) < 2e-5
            assert rel_error(x0, peer.pred_original_sample) < 2e-5


def test_ddim_step_is_its_own_inverse_when_the_noise_is_the_same():
    rng = np.random.default_rng(1)
    x, e = rng.normal(size=(2, 2, 4, 4, 4)).astype(np.float32)
    up, x0 = ddim_step(x, e, 0.9, 0.5)
    back, again = ddim_step(up, e, 0.5, 0.9)
    assert rel_error(back, x) < 1e-6
    assert rel_error(again, x0) < 1e-5


def test_first_inversion_step_from_minus_one_leaves_x0_untouched():
    rng = np.random.default_rng(2)
    z, e = rng.normal(size=(2, 1, 4, 4, 4)).astype(np.float32)
    a = SCHEDULE.alpha_bar(np.array([-1.0, 1.0]))
    noisy, x0 = ddim_step(z, e, a[0], a[1])
    np.testing.assert_array_equal(np.asarray(x0), z)
    assert rel_error(noisy, SCHEDULE.add_noise(z, e, 1)) < 1e-7


def test_v_prediction_converts_to_the_noise_that_made_v():
    rng = np.random.default_rng(3)
    z, n = rng.normal(size=(2, 5, 4, 4, 2)).astype(np.float32)
    t = np.array([0, 21, 161, 500, 999])
    v, x = SCHEDULE.velocity_target(z, n, t), SCHEDULE.add_noise(z, n, t)
    assert rel_error(SCHEDULE.to_epsilon(v, x, t), n) < 2e-6
    np.testing.assert_array_equal(np.asarray(SCHEDULE.to_epsilon(v, x, t, "as_epsilon")), v)
    with pytest.raises(ScheduleError, match="sample"):
        SCHEDULE.to_epsilon(v, x, t, "sample")


def test_keys_count_from_the_noisy_end():
    expected = {49: -1, 48: 1, 47: 21, 46: 41, 45: 61, 44: 81, 40: 161, 0: 961}
    for key, t in expected.items():
        assert SCHEDULE.key_to_timestep(key, 50) == t
        assert SCHEDULE.timestep_to_key(t, 50) == key
    assert [SCHEDULE.key_to_timestep(k, 10) for k in (9, 8, 7)] == [-1, 1, 101]
    assert SCHEDULE.generation_key_to_timestep(40, 50) == 181  # one step noisier than inversion


@pytest.mark.parametrize("key", [-1, 50, 47.5])
def test_a_key_outside_the_grid_is_named_with_the_range(key):
    with pytest.raises(ScheduleError, match=rf"key {key} .*49 .*t=-1.*down to 0"):
        SCHEDULE.key_to_timestep(key, 50)


@pytest.mark.parametrize("t", [0, 20, 100, 981, 1000])
def test_a_timestep_outside_the_grid_names_its_neighbours(t):
    with pytest.raises(ScheduleError, match=f"timestep {t} .*nearest are .*noising"):
        SCHEDULE.timestep_to_key(t, 50)


def test_min_snr_weights_published_and_corrected():
    t = np.array([1, 161, 500, 900])
    a = SCHEDULE.alphas_cumprod[t].astype(np.float64)
    snr = a / (1 - a)
    published = np.minimum(snr, 5) / snr
    assert rel_error(SCHEDULE.min_snr_weight(t), published) < 1e-5
    corrected = np.minimum(snr, 5) / (snr + 1)
    assert rel_error(SCHEDULE.min_snr_weight(t, mode="corrected"), corrected) < 1e-5
    epsilon = Schedule(prediction_type="epsilon")
    assert rel_error(epsilon.min_snr_weight(t, mode="corrected"), published) < 1e-5
    with pytest.raises(ScheduleError, match="official"):
        SCHEDULE.min_snr_weight(t, mode="official")


def test_a_schedule_that_ends_in_noise_keeps_its_start_and_finite_weights():
    table = ZERO_SNR.alphas_cumprod
    assert table[0] == SCHEDULE.alphas_cumprod[0] and table[-1] == 0
    assert np.all(np.diff(table) < 0)
    np.testing.assert_array_equal(ZERO_SNR.min_snr_weight(np.array([999])), [1.0])
    np.testing.assert_array_equal(ZERO_SNR.min_snr_weight(np.array([999]), mode="corrected"), [0.0])
    with pytest.raises(ScheduleError, match="needs prediction_type=v_prediction"):
        Schedule(prediction_type="epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(ScheduleError, match="999 sampling steps begin at pure noise"):
        ZERO_SNR.sampling_steps(999)


@pytest.mark.parametrize(
    "key,value",
    [
        ("_class_name", "EulerDiscreteScheduler"),
        ("steps_offset", 0),
        ("prediction_type", "sample"),
        ("beta_schedule", "squaredcos_cap_v2"),
        ("timestep_spacing", "trailing"),
        ("clip_sample", True),
    ],
)
def test_an_unsupported_scheduler_setting_is_refused_by_name(key, value):
    with pytest.raises(ScheduleError, match=f"somewhere.json: {key}='?{value}"):
        Schedule.from_config({**SCHEDULE.to_config(), key: value}, source="somewhere.json")


def test_the_scheduler_of_stable_diffusion_base_is_read_and_exported_as_ddim():
    base = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012}
    base |= {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "trained_betas": None}
    base |= {"prediction_type": "epsilon", "skip_prk_steps": True, "steps_offset": 1}
    found = Schedule.from_config(base)
    assert found == Schedule(prediction_type="epsilon", set_alpha_to_one=False)
    assert found.to_config()["_class_name"] == "DDIMScheduler"


def test_config_round_trip_and_defaults_of_absent_fields():
    linear = Schedule(prediction_type="epsilon", beta_schedule="linear")
    for schedule in (SCHEDULE, ZERO_SNR, linear):
        assert Schedule.from_config(schedule.to_config()) == schedule
    bare = SCHEDULE.to_config()
    del bare["prediction_type"]
    assert Schedule.from_config(bare).prediction_type == "epsilon"
    del bare["steps_offset"]
    with pytest.raises(ScheduleError, match="steps_offset=0"):
        Schedule.from_config(bare)


@pytest.mark.parametrize("folder", golden_cases("satdifuser_*"))
def test_golden_scheduler_config_is_read(folder):
    text = (folder / "checkpoint" / "scheduler" / "scheduler_config.json").read_text()
    config = json.loads(text)
    schedule = Schedule.from_config(config)
    assert schedule.prediction_type == config["prediction_type"]
    assert len(schedule.alphas_cumprod) == config["num_train_timesteps"]
