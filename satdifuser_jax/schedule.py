"""Noise schedule: alpha_bar, noising, what the network predicts, DDIM steps, keys.

Times count training steps, 0 (almost clean) to 999 (almost noise). Time -1 means "no noise at all":
alpha_bar(-1) = 1, which is how the published inversion makes its first evaluation.
Everything here is float32 and works on traced arrays; nothing depends on a network.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

# as_epsilon: the output is taken for epsilon whatever the network was trained to predict. The
# published extractor does so on a v-prediction backbone.
PREDICTION_TYPES = ("as_epsilon", "epsilon", "v_prediction")
TRAINED_TYPES = ("epsilon", "v_prediction")
SNR_MODES = ("published", "corrected")
BETA_SCHEDULES = ("scaled_linear", "linear")

# Classes whose betas, and whose times in steps of 20 with offset 1, are the same. Stable Diffusion
# 2.1 base names the second; its own sampling rule is left out, DDIM draws in its place.
CLASSES = ("DDIMScheduler", "PNDMScheduler")
# What a field means when scheduler_config.json leaves it out, and the one value supported here.
_REQUIRED = {
    "steps_offset": (0, 1),
    "clip_sample": (True, False),
    "thresholding": (False, False),
    "timestep_spacing": ("leading", "leading"),
    "trained_betas": (None, None),
}


class ScheduleError(ValueError):
    """A scheduler_config.json, key or timestep that this schedule cannot serve."""


@functools.lru_cache(maxsize=16)
def alpha_bar_table(
    kind: str, start: float, end: float, steps: int, zero_snr: bool = False
) -> np.ndarray:
    """prod_{s<=t} (1 - beta_s) as float32 [steps]; read-only.

    The roundings are those of the published table, so the values are the same bits: betas spaced
    in float32 from both ends, 1 - beta rounded to float32, the product carried in float64.
    zero_snr: roots shifted and stretched so that the first stays and the last is 0
    (arXiv 2305.08891, algorithm 1).
    """
    if kind == "scaled_linear":
        beta = _spaced(start**0.5, end**0.5, steps)
        beta = beta * beta
    else:
        beta = _spaced(start, end, steps)
    table = np.cumprod((np.float32(1) - beta).astype(np.float64))
    if zero_snr:
        root = np.sqrt(table)
        table = np.square((root - root[-1]) * (root[0] / (root[0] - root[-1])))
    table = table.astype(np.float32)
    table.setflags(write=False)
    return table


def _spaced(start: float, end: float, steps: int) -> np.ndarray:
    """float32 [steps] from start to end; the upper half counted down from the end."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(steps - 1))
    i = np.arange(steps)
    lower, upper = first + step * i, last - step * (steps - 1 - i)
    return np.where(i < steps // 2, lower, upper).astype(np.float32)


@dataclass(frozen=True)
class Schedule:
    """A DDIM schedule with leading spacing and offset 1; the defaults are those of SD 2.1 (768).

    `prediction_type` is what the network was trained to predict. With `rescale_betas_zero_snr` the
    last time is pure noise; without, 7 % of the picture are left there, and what is broad in it
    (brightness, colour) outweighs the noise. Hashable: a static argument of jitted functions.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "v_prediction"
    set_alpha_to_one: bool = False
    rescale_betas_zero_snr: bool = False

    def __post_init__(self):
        if self.prediction_type not in TRAINED_TYPES:
            raise ScheduleError(
                f"prediction_type={self.prediction_type!r} is not supported; use {TRAINED_TYPES}"
            )
        if self.beta_schedule not in BETA_SCHEDULES:
            raise ScheduleError(
                f"beta_schedule={self.beta_schedule!r} is not supported; use {BETA_SCHEDULES}"
            )
        if self.rescale_betas_zero_snr and self.prediction_type != "v_prediction":
            raise ScheduleError(
                "rescale_betas_zero_snr needs prediction_type=v_prediction: at its last time the "
                "noise is all there is, and a network that predicts it learns nothing"
            )

    @classmethod
    def from_config(cls, config: Mapping, *, source: str = "scheduler_config.json") -> Schedule:
        """Read a scheduler_config.json; what would change results is refused, naming the key."""
        kind = config.get("_class_name")
        if kind not in CLASSES:
            raise ScheduleError(
                f"{source}: _class_name={kind!r}, but only {' and '.join(CLASSES)} work (another "
                "class spaces timesteps differently, so keys would shift)"
            )
        if kind == "PNDMScheduler":  # it never clips, and its other defaults differ
            config = {"clip_sample": False, "set_alpha_to_one": False} | dict(config)
        for name, (default, wanted) in _REQUIRED.items():
            found = config.get(name, default)
            if found != wanted:
                raise ScheduleError(f"{source}: {name}={found!r}, but only {wanted!r} works")
        named = {
            name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None
        }
        # Absent fields have the meaning diffusers gives them, not that of SD 2.1.
        named.setdefault("prediction_type", "epsilon")
        named.setdefault("set_alpha_to_one", True)
        for name in ("beta_start", "beta_end", "beta_schedule"):
            if name not in named:
                raise ScheduleError(f"{source}: {name} is missing; SD 2.1 has 0.00085..0.012")
        try:
            return cls(**named)
        except ScheduleError as error:
            raise ScheduleError(f"{source}: {error}") from None

    def to_config(self) -> dict:
        """A scheduler_config.json from which `from_config` and diffusers get this schedule."""
        fixed = {name: wanted for name, (_, wanted) in _REQUIRED.items()}
        return {
            "_class_name": CLASSES[0],
            **fixed,
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
        }

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """alpha_bar at 0..num_train_timesteps-1, float32."""
        return alpha_bar_table(
            self.beta_schedule,
            self.beta_start,
            self.beta_end,
            self.num_train_timesteps,
            self.rescale_betas_zero_snr,
        )

    @property
    def final_alpha_bar(self) -> float:
        """alpha_bar after the last step of *sampling* (inversion uses 1 at t=-1 instead)."""
        return 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod[0])

    def alpha_bar(self, t) -> jax.Array:
        """alpha_bar of times t (any shape, int or float holding integers); 1 where t < 0."""
        t = jnp.asarray(t)
        index = jnp.clip(t.astype(jnp.int32), 0, self.num_train_timesteps - 1)
        return jnp.where(t < 0, 1.0, jnp.asarray(self.alphas_cumprod)[index]).astype(jnp.float32)

    def add_noise(self, z, noise, t) -> jax.Array:
        """sqrt(a) z + sqrt(1-a) noise; z, noise [B, ...], t [B] or scalar."""
        a = _over(self.alpha_bar(t), z)
        return jnp.sqrt(a) * z + jnp.sqrt(1.0 - a) * noise

    def velocity_target(self, z, noise, t) -> jax.Array:
        """v = sqrt(a) noise - sqrt(1-a) z."""
        a = _over(self.alpha_bar(t), z)
        return jnp.sqrt(a) * noise - jnp.sqrt(1.0 - a) * z

    def training_target(self, z, noise, t) -> jax.Array:
        """What the network is trained to output: noise or v, by `prediction_type`."""
        return noise if self.prediction_type == "epsilon" else self.velocity_target(z, noise, t)

    def to_epsilon(self, out, x, t, prediction_type: str | None = None) -> jax.Array:
        """The noise that network output `out` on x [B, ...] at t stands for, float32.

        v_prediction: sqrt(a) v + sqrt(1-a) x. as_epsilon and epsilon: `out` itself.
        """
        kind = prediction_type or self.prediction_type
        out = jnp.asarray(out, jnp.float32)
        if kind in ("as_epsilon", "epsilon"):
            return out
        if kind == "v_prediction":
            a = _over(self.alpha_bar(t), x)
            return jnp.sqrt(a) * out + jnp.sqrt(1.0 - a) * x
        raise ScheduleError(f"prediction_type={kind!r} is not one of {PREDICTION_TYPES}")

    def snr(self, t) -> jax.Array:
        """Signal-to-noise ratio a / (1 - a)."""
        a = self.alpha_bar(t)
        return a / (1.0 - a)

    def min_snr_weight(self, t, gamma: float = 5.0, mode: str = "published") -> jax.Array:
        """Loss weight of times t, float32, same shape (min-SNR, arXiv 2303.09556).

        published: min(snr, gamma)/snr whatever the target is, as DiffusionSat was trained.
        corrected: for v targets the divisor is snr + 1; the same as published for epsilon.
        """
        if mode not in SNR_MODES:
            raise ScheduleError(f"min_snr mode={mode!r} is not one of {SNR_MODES}")
        snr = self.snr(t)
        if mode == "corrected" and self.prediction_type == "v_prediction":
            return jnp.minimum(snr, gamma) / (snr + 1.0)
        return jnp.minimum(1.0, gamma / snr)  # 1 at snr 0

    def inversion_grid(self, num_timesteps: int) -> np.ndarray:
        """Times r*j + 1, j = 0..N-1, r = num_train_timesteps // N, int64 ascending."""
        if not 1 <= num_timesteps < self.num_train_timesteps:
            raise ScheduleError(
                f"num_timesteps={num_timesteps} must lie in 1..{self.num_train_timesteps - 1}"
            )
        return self.num_train_timesteps // num_timesteps * np.arange(num_timesteps) + 1

    def key_to_timestep(self, key: int, num_timesteps: int) -> int:
        """The time given to the network when inversion collects `key`; key N-1 is time -1.

        Keys are labels counted from the noisy end, not times: with N = 50, key 47 is time 21.
        """
        grid = self.inversion_grid(num_timesteps)
        if int(key) != key or not 0 <= key < num_timesteps:
            raise ScheduleError(
                f"key {key} is outside the grid: with num_timesteps={num_timesteps} keys run from "
                f"{num_timesteps - 1} (t=-1, clean) and {num_timesteps - 2} (t=1) down to 0 "
                f"(t={grid[num_timesteps - 2] if num_timesteps > 1 else -1})"
            )
        return -1 if key == num_timesteps - 1 else int(grid[num_timesteps - 2 - int(key)])

    def timestep_to_key(self, timestep: int, num_timesteps: int) -> int:
        """Inverse of `key_to_timestep`; refuses a time that inversion never visits."""
        reached = [-1, *self.inversion_grid(num_timesteps)[:-1].tolist()]
        if timestep not in reached:
            near = sorted(sorted(reached, key=lambda g: abs(g - timestep))[:2])
            raise ScheduleError(
                f"timestep {timestep} is outside the inversion grid of num_timesteps="
                f"{num_timesteps}: -1, then 1 to {reached[-1]} in steps of "
                f"{self.num_train_timesteps // num_timesteps}; nearest are {near}. Choose one of "
                "those, another num_timesteps, or mode=noising, which takes any timestep"
            )
        return num_timesteps - 1 - reached.index(timestep)

    def generation_key_to_timestep(self, key: int, num_timesteps: int) -> int:
        """Time of `key` in the published generation mode: one grid step above that of inversion."""
        self.key_to_timestep(key, num_timesteps)
        return int(self.inversion_grid(num_timesteps)[num_timesteps - 1 - int(key)])

    def sampling_steps(self, num_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(t, alpha_bar, alpha_bar of the next, cleaner time) of DDIM sampling, noisiest first."""
        t = self.inversion_grid(num_steps)[::-1]
        previous = t - self.num_train_timesteps // num_steps
        table = self.alphas_cumprod
        if table[t[0]] == 0:
            raise ScheduleError(
                f"{num_steps} sampling steps begin at pure noise, where epsilon says nothing; take "
                f"at most {self.num_train_timesteps // 2}"
            )
        after = np.where(previous >= 0, table[np.maximum(previous, 0)], self.final_alpha_bar)
        return t.copy(), table[t], after.astype(np.float32)


def ddim_step(x, epsilon, alpha_bar, alpha_bar_next) -> tuple[jax.Array, jax.Array]:
    """One deterministic DDIM step (arXiv 2010.02502 eq. 12, eta = 0), in either direction.

    x, epsilon [B, ...]; alpha_bar of x and of the result, scalar or [B]. Returns (x_next, x0).
    """
    x, epsilon = jnp.asarray(x, jnp.float32), jnp.asarray(epsilon, jnp.float32)
    a, b = _over(alpha_bar, x), _over(alpha_bar_next, x)
    x0 = (x - jnp.sqrt(1.0 - a) * epsilon) / jnp.sqrt(a)
    return jnp.sqrt(b) * x0 + jnp.sqrt(1.0 - b) * epsilon, x0


def _over(values, like) -> jax.Array:
    """`values` (scalar or [B]) shaped to broadcast over the trailing axes of `like` [B, ...]."""
    values = jnp.asarray(values, jnp.float32)
    return values if values.ndim == 0 else values.reshape((-1,) + (1,) * (jnp.ndim(like) - 1))
