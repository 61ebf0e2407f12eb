"""How an answer is decoded: every choice of the sampler, and how many tokens a pass commits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from geodit_jax.config import TokenIds

CHOICES = {
    "remasking": ("low_confidence", "random"),
    "quota": ("linear", "cosine"),
    "banned": ("llada_v", "eos", "none"),
    "length_mode": ("fixed", "auto"),
    "cache": ("none", "prefix"),
}


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Defaults: the published GeoDiT decoder (eight greedy steps in one block).

    Raises ValueError when a choice is unknown or two of them contradict each other.
    """

    length: int = 32
    """Tokens of the answer, L."""
    steps: int = 8
    """Passes over all blocks; more than `length` are as good as `length`."""
    block: int = 0
    """Blocks of this many tokens are finished from left to right; 0: one block."""
    temperature: float = 0.0
    """Scale of the Gumbel noise on the logits. Confidence is that of the logits without noise."""
    guidance: float = 0.0
    """Scale c of u + (c + 1)(l - u), u: the logits where the prompt is replaced by masks."""
    remasking: str = "low_confidence"
    """What stays masked: the least confident tokens, or `random` ones."""
    quota: str = "linear"
    """Masks fall by the same number at each step, or like a quarter of a `cosine`."""
    banned: str = "llada_v"
    """Ids an answer cannot hold: those LLaDA-V forbids, `eos` alone, or `none`."""
    stop: bool = True
    """Once an answer holds the stop sequence, only the tokens before it are decoded."""
    length_mode: str = "fixed"
    """`auto`: the first pass decides where the answer ends; the rest is never decoded nor seen."""
    revisable: bool = False
    """Committed tokens compete again at every step, and may be masked again or replaced."""
    threshold: float = 0.0
    """Commit every token at least this probable, one at least; 0: off. `steps` has no effect."""
    factor: float = 0.0
    """Commit the n best, (n + 1)(1 - probability of the n-th) < factor, one at least; 0: off."""
    cache: str = "none"
    """`prefix`: keys and values of the prefix are kept from pass to pass."""
    refresh_every: int = 0
    """Passes from one computation of the kept prefix to the next; 0: computed once."""

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {known}")
        if self.length < 1 or self.steps < 1:
            raise ValueError(f"length={self.length}, steps={self.steps}: both must be at least 1")
        if self.block < 0 or self.length % self.block_length:
            raise ValueError(f"block={self.block} does not divide length={self.length}")
        for name in ("temperature", "guidance", "threshold", "factor", "refresh_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative")
        if self.refresh_every and self.cache == "none":
            raise ValueError(f"refresh_every={self.refresh_every} needs cache=prefix")
        if sum(map(bool, (self.threshold, self.factor, self.revisable))) > 1:
            raise ValueError(
                f"threshold={self.threshold}, factor={self.factor}, revisable={self.revisable}: "
                "each decides how many tokens stay; use one of them"
            )
        if self.counts_by_confidence and self.remasking == "random":
            raise ValueError("threshold and factor rank by confidence, not remasking=random")
        self.block_steps  # noqa: B018  raises where steps do not fit the blocks

    @property
    def block_length(self) -> int:
        return self.block or self.length

    @property
    def block_steps(self) -> int:
        """Steps of one block."""
        blocks = self.length // self.block_length
        steps = min(self.steps, self.length)
        if steps % blocks:
            raise ValueError(
                f"steps={self.steps} cannot be shared by {blocks} blocks (length={self.length}, "
                f"block={self.block}): use a multiple of {blocks}"
            )
        return steps // blocks

    @property
    def counts_by_confidence(self) -> bool:
        """A pass commits as many tokens as are sure enough, not a number known before."""
        return bool(self.threshold or self.factor)

    @property
    def passes_per_prefix(self) -> int:
        """Passes served by one computation of the prefix; 0: all."""
        return self.refresh_every if self.cache == "prefix" else 1


def fit_window(decode: DecodeConfig, window: int) -> DecodeConfig:
    """The same choices for an answer of `window` tokens; steps are rounded up to share by blocks.

    A block longer than the window is the window. Raises ValueError where it does not divide it.
    """
    block = min(decode.block, window)
    blocks = max(1, window // (block or window))
    steps = -(-decode.steps // blocks) * blocks
    return dataclasses.replace(decode, length=window, block=block, steps=steps)


TRAINED_HERE = DecodeConfig(banned="none")
"""For models of this project's training, which fills what an answer leaves of its window with
end-of-text: were it forbidden, other tokens would take its place."""


def parse_decode(settings: Sequence[str], base: DecodeConfig = DecodeConfig()) -> DecodeConfig:
    """`["steps=4", "cache=prefix"]` -> `base` with these. Raises ValueError naming a wrong one."""
    kinds = {field.name: type(field.default) for field in dataclasses.fields(DecodeConfig)}
    values = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in kinds or not text:
            raise ValueError(f"decoder setting {setting!r}: use NAME=VALUE of {', '.join(kinds)}")
        if kinds[name] is bool:
            values[name] = text.lower() in ("true", "1", "yes")
        else:
            values[name] = kinds[name](text)
    return dataclasses.replace(base, **values)


def make_quotas(masks: int, steps: int, kind: str) -> np.ndarray:
    """int32 [masks + 1, steps]: row m is the number of tokens each pass commits of m masks.

    A row sums to m. Steps that would commit nothing are left out: its zeros are all at the end.
    `linear`: LLaDA's equal shares, the remainder one by one to the first steps. `cosine`: after
    step k, floor(m cos(pi k / 2 steps)) masks are left (MaskGIT).
    """
    table = np.zeros((masks + 1, steps), np.int32)
    for m in range(masks + 1):
        if kind == "linear":
            shares = [m // steps + (step < m % steps) for step in range(steps)]
        else:
            left = [math.floor(m * math.cos(math.pi * k / (2 * steps))) for k in range(steps)]
            shares = -np.diff([*left, 0])
        shares = [share for share in shares if share]
        table[m, : len(shares)] = shares
    return table


def forbidden_ids(rows: int, tokens: TokenIds, banned: str) -> np.ndarray:
    """bool [rows]: what is never written, the banned ids, the mask and rows without a token."""
    ids = {"llada_v": tokens.banned, "eos": (tokens.eos,), "none": ()}[banned]
    forbidden = np.arange(rows) >= tokens.size
    forbidden[[tokens.mask, *ids]] = True
    return forbidden
