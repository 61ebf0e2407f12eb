"""Sizes and choices of one GeoDiT model, and the models that have a name."""

from __future__ import annotations

import dataclasses

IMAGE_MODES = ("square", "pad", "anyres")
MERGES = ("flat", "spatial", "spatial_unpad")
IMAGE = -200
"""The id at every position that an image token fills; no tokenizer has it."""


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The LLaDA core; defaults: LLaDA-8B."""

    vocab_rows: int = 126464
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    mlp: int = 12288
    rope_theta: float = 500_000.0
    eps: float = 1e-5
    rope_cast: str = "float32"
    """Where rotation happens: `float32` (LLaDA) or `activation`, the compute dtype (LLaDA-V)."""

    def __post_init__(self):
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"width={self.width}, heads={self.heads}, kv_heads={self.kv_heads}: heads must "
                "divide width, and kv_heads must divide heads"
            )
        if self.rope_cast not in ("float32", "activation"):
            raise ValueError(f"rope_cast={self.rope_cast!r}: use float32 or activation")

    @property
    def head_width(self) -> int:
        return self.width // self.heads


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """The SigLIP tower; defaults: SO400M patch14-384 with the 26 blocks that run."""

    image_size: int = 384
    patch: int = 14
    width: int = 1152
    layers: int = 26
    heads: int = 16
    mlp: int = 4304
    eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Tokens per side of a view; pixels beyond grid * patch are not seen."""
        return self.image_size // self.patch


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Special ids of a tokenizer; defaults: LLaDA-8B."""

    mask: int = 126336
    eos: int = 126081
    bos: int = 126080
    start_header: int = 126346
    end_header: int = 126347
    eot: int = 126348
    size: int = 126349
    """Length of the tokenizer: rows of the vocabulary beyond it are never written."""

    @property
    def banned(self) -> tuple[int, ...]:
        """Ids that an answer may not hold, as published: only eot can end one."""
        return (self.eos, self.bos, self.start_header, self.end_header)


@dataclasses.dataclass(frozen=True)
class GeoDiTConfig:
    """A whole model: text core, tower (None: text only), token ids, and how pictures enter."""

    text: TextConfig = TextConfig()
    tower: TowerConfig | None = TowerConfig()
    tokens: TokenIds = TokenIds()
    image_mode: str = "square"
    merge: str = "spatial_unpad"
    grid_pinpoints: tuple[tuple[int, int], ...] = ()
    """Canvases [width, height] in pixels for `anyres`; empty: all of 1..6 x 1..6 tiles."""
    max_tiles: int = 4
    """k of `anyres_max_k`: the map of tiles is shrunk to about k views; 0 = never."""
    newline_on_single: bool = True
    """A picture of one view ends with the newline vector (training); False: upstream evaluation."""
    prefix_lm: bool = False
    """Trained so that prompts cannot see answers: the prefix cache is then exact."""

    def __post_init__(self):
        if self.image_mode not in IMAGE_MODES:
            raise ValueError(f"image_mode={self.image_mode!r}: use one of {IMAGE_MODES}")
        if self.merge not in MERGES:
            raise ValueError(f"merge={self.merge!r}: use one of {MERGES}")


def _small(vocab: int, text: TextConfig, tower: TowerConfig) -> GeoDiTConfig:
    """A model for a vocabulary of `vocab` whose last 11 ids are the special ones."""
    first = vocab - 11
    tokens = TokenIds(
        bos=first,
        eos=first + 1,
        mask=first + 4,
        start_header=first + 8,
        end_header=first + 9,
        eot=first + 10,
        size=vocab,
    )
    return GeoDiTConfig(dataclasses.replace(text, vocab_rows=vocab), tower, tokens)


SIZES = {
    "8b": GeoDiTConfig(),
    "1b": GeoDiTConfig(
        text=TextConfig(width=1536, layers=20, heads=12, kv_heads=12, mlp=4608),
    ),
    "100m": _small(
        32_000,
        TextConfig(width=768, layers=12, heads=12, kv_heads=12, mlp=2048),
        TowerConfig(image_size=224, width=384, layers=6, heads=6, mlp=1536),
    ),
    "tiny": _small(
        1024,
        TextConfig(width=128, layers=3, heads=2, kv_heads=2, mlp=352),
        TowerConfig(image_size=64, patch=8, width=96, layers=2, heads=4, mlp=256),
    ),
}


def find_size(name: str) -> GeoDiTConfig:
    """Raises ValueError on an unknown name, listing the known ones."""
    if name not in SIZES:
        raise ValueError(f"size={name!r} is unknown; use one of {', '.join(SIZES)}")
    return SIZES[name]
