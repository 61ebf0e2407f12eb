"""Encoded conversations become arrays of one fixed length: answers filled up, pictures put in.

Why answers are filled up. Decoding starts from a window of a fixed number of masks (16, 32 or 8).
`fill_answer` gives every trained answer that same window: the answer, its end-of-turn id, then
end-of-text ids up to `answer_length`, all of them targets. So a model in training never learns the
length of an answer from the number of masks, and knows what belongs behind the end. Published
training does the same with the longest text of a batch instead of a fixed window, which cannot be
had in batches of one shape. Behind the window nothing is attended and nothing is a target.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from geodit_jax.chat import NO_TARGET, Encoded, answer_start
from geodit_jax.config import IMAGE, GeoDiTConfig
from geodit_jax.image_layout import ImageLayout, max_rows_per_token, max_views
from geodit_jax.tokenizer import Tokenizer

ON_LONG = ("refuse", "cut")


class TooLongError(ValueError):
    """An answer or an example that does not fit and may not be cut."""


def pad_targets(tokenizer: Tokenizer, encoded: Encoded, count: int) -> Encoded:
    """Adds `count` end-of-text ids that are targets and belong to the last turn."""
    ids, labels, turns = encoded
    tail = [tokenizer.ids.eos] * count
    return ids + tail, labels + tail, turns + turns[-1:] * count


def fill_answer(
    tokenizer: Tokenizer, encoded: Encoded, answer_length: int, on_long: str = "refuse"
) -> tuple[Encoded, int]:
    """Makes the last answer exactly `answer_length` ids long; -> (encoded, ids cut away).

    The window begins behind the assistant's header, as decoding's does. Shorter answers end with
    end-of-text targets. Longer ones: `refuse` raises TooLongError; `cut` keeps the first
    `answer_length` ids, without end of turn, because the text does not end there.
    """
    _check_on_long(on_long)
    ids, labels, turns = encoded
    start = answer_start(tokenizer, ids)
    long = len(ids) - start - answer_length
    if long <= 0:
        return pad_targets(tokenizer, encoded, -long), 0
    if on_long == "refuse":
        raise TooLongError(
            f"an answer has {len(ids) - start} ids with its end, the window {answer_length}; "
            "raise answer_length, shorten the answer, or set on_long=cut"
        )
    end = start + answer_length
    return (ids[:end], labels[:end], turns[:end]), long


def expand(
    encoded: Encoded,
    layouts: Sequence[ImageLayout],
    config: GeoDiTConfig,
    eos: int,
    *,
    length: int,
    slots: int | None = None,
    on_long: str = "refuse",
) -> dict[str, np.ndarray]:
    """Arrays of one example of S = `length` positions; pictures take as many as they have tokens.

    layouts: one for each `IMAGE` in the ids, made by `lay_out(size, config, slots)`; the rows of a
    second picture follow the views of the first. slots: views in the array that holds them all
    (default: those of the largest picture).

    Returns ids int32 [S] (IMAGE at image tokens, `eos` behind the end), labels int32 [S] (-100 at
    images and behind the end), turns int32 [S], image_rows int32 [S,K], image_weights float32
    [S,K], length int32 (attended positions), cut int32 (positions that did not fit).

    Raises ValueError when pictures and `IMAGE` ids differ in number or exceed the slots,
    TooLongError when the example does not fit (refuse) or keeps no target (cut).
    """
    _check_on_long(on_long)
    ids, labels, turns = (np.asarray(part, np.int32) for part in encoded)
    pictures = ids == IMAGE
    if pictures.sum() != len(layouts):
        raise ValueError(f"ids hold {pictures.sum()} pictures, but {len(layouts)} are given")
    counts = np.ones(len(ids), np.int64)
    counts[pictures] = [len(layout.rows) for layout in layouts]
    source = np.repeat(np.arange(len(ids)), counts)
    cut = max(len(source) - length, 0)
    if cut and on_long == "refuse":
        raise TooLongError(
            f"an example needs {len(source)} positions ({counts[pictures].sum()} of pictures), "
            f"but sequences have {length}; raise the length or set on_long=cut"
        )
    if cut and (labels != NO_TARGET).any() and (labels[source[:length]] == NO_TARGET).all():
        raise TooLongError(f"no target is within the first {length} positions; raise the length")
    rows, weights = _image_rows(layouts, config, slots)
    place = pictures[source]
    return {
        "ids": _fit(ids[source], length, eos),
        "labels": _fit(labels[source], length, NO_TARGET),
        "turns": _fit(turns[source], length, turns[-1]),
        "image_rows": _fit(_spread(rows, place), length, 0),
        "image_weights": _fit(_spread(weights, place), length, 0),
        "length": np.int32(min(len(source), length)),
        "cut": np.int32(cut),
    }


def _image_rows(
    layouts: Sequence[ImageLayout], config: GeoDiTConfig, slots: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows int32 and weights float32 [T,K] of all image tokens, in the order of the pictures."""
    taps = max_rows_per_token(config) if config.tower else 1
    rows, weights = [np.zeros((0, taps), np.int32)], [np.zeros((0, taps), np.float32)]
    views = 0
    for layout in layouts:
        per_view = config.tower.grid**2
        newline = (max_views(config) if slots is None else slots) * per_view
        if layout.rows.max() > newline or (views + layout.num_views) * per_view > newline:
            raise ValueError(
                f"{views + layout.num_views} views do not fit the {newline // per_view} slots of "
                "an example; give lay_out and expand the same, larger number of slots"
            )
        own = np.where(layout.rows == newline, newline, layout.rows + views * per_view)
        wide = ((0, 0), (0, taps - own.shape[1]))
        rows.append(np.pad(own, wide).astype(np.int32))
        weights.append(np.pad(layout.weights, wide).astype(np.float32))
        views += layout.num_views
    return np.concatenate(rows), np.concatenate(weights)


def _spread(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    """[T,K] -> [positions,K]: values where `place` is True, zeros elsewhere."""
    out = np.zeros((len(place), values.shape[1]), values.dtype)
    out[place] = values
    return out


def _fit(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    """Cuts or pads the first axis to `length`."""
    values = values[:length]
    more = [(0, length - len(values))] + [(0, 0)] * (values.ndim - 1)
    return np.pad(values, more, constant_values=fill)


def _check_on_long(on_long: str) -> None:
    if on_long not in ON_LONG:
        raise ValueError(f"on_long={on_long!r}: use one of {ON_LONG}")
