"""Captions whose parts may be left out, made of lists that JSON can hold.

A wording is a sequence of pieces, a piece a sequence of (chance, text): one of the texts is drawn,
and what the chances lack to 1 draws nothing. `compose(always("a"), sometimes(" fmow", 0.1))` is
"a fmow" in nine of ten draws, else "a".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Piece = tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Wording:
    """Pieces in order. A class of its own, so that a batch does not take it for an array."""

    pieces: tuple[Piece, ...]


def always(text: str) -> Piece:
    return ((1.0, text),)


def sometimes(text: str, dropped: float) -> Piece:
    """A piece that is left out with chance `dropped`; an empty text stays empty."""
    return ((1.0 - dropped, text),) if text else ()


def compose(*pieces: Piece) -> Wording:
    return Wording(pieces)


def read_wording(value: Sequence) -> Wording:
    """A wording from the JSON lists of its pieces. Raises ValueError on chances that are none."""
    pieces = tuple(tuple((float(chance), str(text)) for chance, text in piece) for piece in value)
    for piece in pieces:
        chances = [chance for chance, _ in piece]
        if any(chance < 0 for chance in chances) or sum(chances) > 1 + 1e-6:
            raise ValueError(f"wording: chances {chances} of one piece; need them in 0..1 together")
    return Wording(pieces)


def full_caption(wording: Wording) -> str:
    """Nothing left out; of several texts the first."""
    return "".join(piece[0][1] for piece in wording.pieces if piece)


def draw_caption(wording: Wording, rng: np.random.Generator) -> str:
    return "".join(_draw(piece, rng.random()) for piece in wording.pieces)


def _draw(piece: Piece, at: float) -> str:
    for chance, text in piece:
        if at < chance:
            return text
        at -= chance
    return ""


class DrawCaption:
    """(example, rng) -> the example with a `caption` drawn from its `wording`."""

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return dict(example) | {"caption": draw_caption(example["wording"], rng)}
