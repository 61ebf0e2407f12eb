"""What is extracted from a frozen diffusion model, and at which times. No arrays, no network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from satdifuser_jax.schedule import PREDICTION_TYPES, Schedule, ScheduleError
from satdifuser_jax.taps import Scale

PUBLISHED_KEYS = (47, 45, 40)
NO_GUIDANCE = -1.0

_CHOICES = {
    "mode": ("inversion", "noising", "generation"),
    "prediction_type": PREDICTION_TYPES,
    "metadata": ("none", "zeros", "record"),
    "posterior": ("mode", "sample"),
    "dtype": ("float32", "bfloat16", "float16"),
}


@dataclass(frozen=True)
class ExtractConfig:
    """What is extracted. Hashable; validated on construction, keys against a schedule by `times`.

    mode: "inversion" (published default) walks up the DDIM grid; "noising" adds noise directly,
        any number of times; "generation" is the published other mode, one key, noised directly.
    keys: labels counted from the noisy end of a grid of `num_timesteps`; or `timesteps`: the times
        given to the network. Kept sorted, cleanest first, whatever order they are given in.
    guidance_scale: -1 is off. metadata: "none" leaves its embeddings out (published), "zeros" is
        the value of a missing field in training, "record" that of each image.
    posterior: latent is the mean, or a draw by (seed, image index). dtype: of the features.
    """

    mode: str = "inversion"
    keys: tuple[int, ...] | None = None
    timesteps: tuple[int, ...] | None = None
    num_timesteps: int = 50
    prediction_type: str = "as_epsilon"
    guidance_scale: float = NO_GUIDANCE
    scales: tuple[Scale, ...] = ()
    metadata: str = "none"
    posterior: str = "mode"
    seed: int = 42
    dtype: str = "float32"

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {choices}")
        if self.guidance_scale < 0 and self.guidance_scale != NO_GUIDANCE:
            raise ValueError(f"guidance_scale={self.guidance_scale}: use -1 (off) or 0 and above")
        self._check_times()
        object.__setattr__(self, "scales", tuple(self.scales))

    def _check_times(self) -> None:
        if self.keys is not None and self.timesteps is not None:
            raise ValueError(f"give keys={self.keys} or timesteps={self.timesteps}, not both")
        if self.mode == "noising" and self.timesteps is None:
            raise ValueError(
                "mode=noising speaks raw times: set timesteps, for example (21,61,161)"
            )
        if self.mode == "generation" and (self.keys is None or len(self.keys) != 1):
            raise ValueError(
                f"mode=generation yields one key (the published code keeps the smallest and drops "
                f"the others), found keys={self.keys}; give one, or use mode=noising"
            )
        if self.keys is None and self.timesteps is None:
            object.__setattr__(self, "keys", PUBLISHED_KEYS)
        for name, is_falling in (("keys", True), ("timesteps", False)):
            values = getattr(self, name)
            if values is not None:
                ordered = tuple(sorted(set(values), reverse=is_falling))
                if not values or len(ordered) != len(values):
                    raise ValueError(f"{name}={tuple(values)} must be distinct and not empty")
                object.__setattr__(self, name, ordered)

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale != NO_GUIDANCE

    def times(self, schedule: Schedule) -> tuple[int, ...]:
        """The times given to the network, ascending [T]; refuses what the schedule has not."""
        if self.mode == "generation":
            return (schedule.generation_key_to_timestep(self.keys[0], self.num_timesteps),)
        if self.mode == "noising":
            last = schedule.num_train_timesteps - 1
            outside = [t for t in self.timesteps if int(t) != t or not -1 <= t <= last]
            if outside:
                raise ScheduleError(f"timesteps {outside} are outside the schedule: -1..{last}")
            return self.timesteps
        keys = self.inversion_keys(schedule)
        return tuple(schedule.key_to_timestep(key, self.num_timesteps) for key in keys)

    def inversion_keys(self, schedule: Schedule) -> tuple[int, ...]:
        """The labels that inversion collects at, descending [T]."""
        if self.keys is not None:
            return self.keys
        return tuple(schedule.timestep_to_key(t, self.num_timesteps) for t in self.timesteps)


class Step(NamedTuple):
    """One evaluation of the inversion: the time of the latent, the next one, the label."""

    t: int
    t_next: int
    key: int


def inversion_steps(config: ExtractConfig, schedule: Schedule) -> Iterator[Step]:
    """The published evaluations in order: t = -1, 1, 21, ... up to the smallest kept key.

    The first one is at t = -1, where alpha_bar is 1. Nothing runs after the last kept key.
    """
    count = config.num_timesteps
    grid = [-1, *schedule.inversion_grid(count).tolist()]
    config.times(schedule)  # refuses keys outside the grid
    for i in range(count - min(config.inversion_keys(schedule))):
        yield Step(grid[i], grid[i + 1], count - 1 - i)
