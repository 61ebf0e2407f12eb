"""From records to arrays: what one example of training or validation is made of. Numpy only.

S positions of a sequence, V view slots, K table rows in an image token; see `sequence.expand`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from geodit_jax.chat import (
    PLACEHOLDER,
    SYSTEM,
    Conversation,
    answer_start,
    encode_chat,
    encode_plain,
    from_llava,
    place_images,
)
from geodit_jax.config import GeoDiTConfig
from geodit_jax.image_layout import lay_out, max_image_tokens, max_views
from geodit_jax.prompts import Prompts
from geodit_jax.sequence import expand, fill_answer
from geodit_jax.tokenizer import Tokenizer
from geodit_jax.views import make_views

SHORTENED = 0.01
"""Share of text blocks that are cut to a random length in pretraining (LLaDA)."""
TEXTS_AT_ONCE = 1000
"""So many texts are tokenised together; a list of their ids takes ten times the array's memory."""
STAGES_OF_SIGHT = ("all", "turns", "prefix")
SYSTEMS = {"llada_v": SYSTEM, "none": ""}


@dataclasses.dataclass(frozen=True)
class ExampleSpec:
    """How conversations become examples.

    text_length: positions for text, beside those of the largest picture. answer_lengths: window of
    the last answer by task of the record (`sequence.fill_answer`), 0: none. sight: what `turns`
    holds: turn numbers, or (`prefix`) twice the turn, and one more in answers, so that no prompt
    sees its answer. plain: stage I, caption behind picture without template. blind: pictures are
    left out, as if there were none.
    """

    text_length: int
    answer_lengths: Mapping[str, int]
    label_policy: str = "llada_v"
    codec: str = "unit2"
    on_long: str = "cut"
    sight: str = "all"
    system: str = "llada_v"
    plain: bool = False
    blind: bool = False

    def __post_init__(self):
        if self.sight not in STAGES_OF_SIGHT:
            raise ValueError(f"sight={self.sight!r}: use one of {STAGES_OF_SIGHT}")
        if self.system not in SYSTEMS:
            raise ValueError(f"data.system={self.system!r}: use one of {', '.join(SYSTEMS)}")


class ToExample:
    """({"record", "image"}, rng) -> arrays of one example (numpy).

    ids, labels, turns int32 [S], length int32, cut int32 (ids that were cut away); with pictures
    also image_rows int32 [S,K], image_weights float32 [S,K], pixels uint8 [V,side,side,3].
    """

    def __init__(
        self, config: GeoDiTConfig, tokenizer: Tokenizer, prompts: Prompts, spec: ExampleSpec
    ):
        self.config, self.tokenizer, self.prompts, self.spec = config, tokenizer, prompts, spec
        self.sees = config.tower is not None and not spec.blind
        self.length = spec.text_length + (max_image_tokens(config) if self.sees else 0)

    def __call__(self, example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        record, spec = example["record"], self.spec
        image = example["image"] if self.sees else None
        turns = make_conversation(record, self.prompts, spec.codec, rng)
        encoded = self._encode(turns, pictures=int(image is not None))
        window, lost = spec.answer_lengths.get(record.task, 0), 0
        if window:
            encoded, lost = fill_answer(self.tokenizer, encoded, window, spec.on_long)
        if spec.sight == "prefix":
            encoded = (*encoded[:2], hide_answers(self.tokenizer, encoded[0], encoded[2]))
        out = expand(
            encoded,
            self._layouts(image),
            self.config,
            self.tokenizer.ids.eos,
            length=self.length,
            slots=max_views(self.config) if self.sees else None,
            on_long=spec.on_long,
        )
        out["cut"] = np.int32(out["cut"] + lost)
        if self.sees:
            out["pixels"] = self._pixels(image)
        else:
            del out["image_rows"], out["image_weights"]
        return out | {name: example[name] for name in ("id", "mask") if name in example}

    def _encode(self, turns: Conversation, pictures: int):
        if not pictures:
            turns = [(role, _without_picture(text)) for role, text in turns]
        turns, _ = place_images(turns, pictures)
        if self.spec.plain:
            return encode_plain(self.tokenizer, turns)
        return encode_chat(
            self.tokenizer,
            turns,
            label_policy=self.spec.label_policy,
            has_image=bool(pictures),
            system=SYSTEMS[self.spec.system],
        )

    def _layouts(self, image) -> list:
        if image is None:
            return []
        return [lay_out((image.shape[1], image.shape[0]), self.config, max_views(self.config))]

    def _pixels(self, image) -> np.ndarray:
        side = self.config.tower.image_size
        pixels = np.zeros((max_views(self.config), side, side, 3), np.uint8)
        if image is not None:
            views = make_views(image, self.config)
            pixels[: len(views)] = views
        return pixels


def make_conversation(
    record, prompts: Prompts, codec: str, rng: np.random.Generator
) -> Conversation:
    """Messages of a record: those of a chat, else one question and one of its answers at random."""
    if record.task == "text":
        raise ValueError(f"record {record.id} is plain text: only train.stage=pretrain reads it")
    if record.task == "chat":
        return from_llava(record.conversations)
    if len(record.answers) > 1:
        chosen = record.answers[int(rng.integers(len(record.answers)))]
        record = dataclasses.replace(record, answers=(chosen,))
    return [("user", prompts.ask(record)), ("assistant", prompts.answer(record, codec))]


def hide_answers(tokenizer: Tokenizer, ids: list[int], turns: list[int]) -> list[int]:
    """Turn numbers doubled, plus one in answers: questions come before them, and see none.

    An answer begins behind its header, where decoding begins.
    """
    stages, ids = np.asarray(turns) * 2, np.asarray(ids)
    for turn in np.unique(turns):
        (places,) = np.nonzero(np.asarray(turns) == turn)
        start = answer_start(tokenizer, ids[places].tolist())
        stages[places[start:]] += 1
    return stages.tolist()


def _without_picture(text: str) -> str:
    return text.replace(f"{PLACEHOLDER}\n", "").replace(PLACEHOLDER, "")


# -------------------------------------------------------------------------------------- plain text
def texts_of(records: Iterable, prompts: Prompts, codec: str) -> Iterator[str]:
    """Every text of records: plain texts, messages of chats; else the question and all answers."""
    for record in records:
        if record.task == "text":
            yield record.answers[0]
            continue
        if record.task == "chat":
            yield from (_without_picture(text) for _, text in record.conversations)
            continue
        yield prompts.ask(record)
        for answer in record.answers or ("",):
            chosen = dataclasses.replace(record, answers=(answer,) if answer else ())
            yield prompts.answer(chosen, codec)


class PackedText:
    """Texts, an end-of-text id behind each, in blocks of `length` ids; the last may be shorter."""

    def __init__(self, texts: Iterable[str], tokenizer: Tokenizer, length: int):
        eos, texts, parts = tokenizer.ids.eos, iter(texts), []
        while some := list(itertools.islice(texts, TEXTS_AT_ONCE)):
            ids = itertools.chain.from_iterable((*i, eos) for i in tokenizer.encode_many(some))
            parts.append(np.fromiter(ids, np.int32))
        if not parts:
            raise ValueError("there is no text to train on")
        self.ids, self.length, self.eos = np.concatenate(parts), length, eos

    def __len__(self) -> int:
        return -(-len(self.ids) // self.length)

    def __getitem__(self, i: int) -> dict:
        return {"block": self.ids[int(i) * self.length :][: self.length], "id": str(int(i))}


class ToTextBlock:
    """(example of PackedText, rng) -> ids, labels, turns [S], length: every id is a target.

    length: S. shortened: share of blocks that are cut to a random length.
    """

    def __init__(self, length: int, eos: int, shortened: float = SHORTENED):
        self.length, self.eos, self.shortened = length, eos, shortened

    def __call__(self, example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        block = example["block"]
        if rng.random() < self.shortened:
            block = block[: int(rng.integers(1, len(block) + 1))]
        room = (0, self.length - len(block))
        out = {
            "ids": np.pad(block, room, constant_values=self.eos),
            "labels": np.pad(block, room, constant_values=-100),
            "turns": np.zeros(self.length, np.int32),
            "length": np.int32(len(block)),
            "cut": np.int32(0),
        }
        return out | {name: example[name] for name in ("id", "mask") if name in example}
