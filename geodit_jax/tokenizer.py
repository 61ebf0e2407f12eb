"""Text to token ids and back: byte-level BPE with the special texts of LLaDA. No network, no jax.

`tokenizer.json` of a checkpoint is the whole truth; the ids of the special texts are read from it.
A small tokenizer for models trained from scratch is made by `Tokenizer.train`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from common_jax.files import write_atomic, write_json
from geodit_jax.config import TokenIds

SPECIAL = {
    "mask": "<|mdm_mask|>",
    "eos": "<|endoftext|>",
    "bos": "<|startoftext|>",
    "start_header": "<|start_header_id|>",
    "end_header": "<|end_header_id|>",
    "eot": "<|eot_id|>",
}
"""Texts of the ids in `TokenIds`, as LLaDA's tokenizer spells them."""

LAST_TEXTS = (
    SPECIAL["bos"],
    SPECIAL["eos"],
    "[CLS]",
    "[gMASK]",
    SPECIAL["mask"],
    "<role>",
    "</role>",
    "<|reserved_token_0|>",
    SPECIAL["start_header"],
    SPECIAL["end_header"],
    SPECIAL["eot"],
)
"""The end of every vocabulary that `Tokenizer.train` makes, in the order of the small sizes."""

# Contractions; letters after at most one other character; each digit alone; punctuation with a
# blank before and line ends after; blanks that end lines; other blanks, the last one apart.
PIECES = (
    r"(?i:'(?:[stmd]|re|ve|ll))"
    r"|[^\p{L}\p{N}\r\n]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\p{L}\p{N}\s]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

# Line ends stand inside expressions: readers of templates trim those outside.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
    "{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
)


def _whole(text: str) -> str:
    """Half a surrogate pair becomes `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


class Tokenizer:
    """A loaded tokenizer; `ids` are its special ids and its length."""

    def __init__(self, engine: Engine, source: str = "this tokenizer"):
        """Raises ValueError naming the special texts that `engine` lacks."""
        found = {role: engine.token_to_id(text) for role, text in SPECIAL.items()}
        missing = [SPECIAL[role] for role, number in found.items() if number is None]
        if missing:
            raise ValueError(
                f"{source} has no {', '.join(missing)}; it is not a tokenizer of LLaDA, LLaDA-V or "
                "GeoDiT: use the tokenizer.json that lies beside the weights"
            )
        added = engine.get_added_tokens_decoder()
        self.engine = engine
        self.source = source
        self.ids = TokenIds(
            **found, size=max(engine.get_vocab(with_added_tokens=True).values()) + 1
        )
        self._skipped = {number for number, token in added.items() if token.special}
        self._skipped |= set(found.values())

    @classmethod
    def load(cls, folder: str | os.PathLike, expected: TokenIds | None = None) -> Tokenizer:
        """Reads `tokenizer.json` in `folder` (or that file itself).

        Raises FileNotFoundError without the file, ValueError when it cannot be read, lacks a
        special text, or has other ids than `expected`.
        """
        path = Path(folder)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; need the tokenizer.json of the model")
        try:
            engine = Engine.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a readable tokenizer.json ({error})") from error
        tokenizer = cls(engine, str(path))
        if expected is not None:
            tokenizer.check(expected)
        return tokenizer

    def check(self, expected: TokenIds) -> None:
        """Raises ValueError when an id or the length differs from what the model was made for."""
        found, wanted = dataclasses.asdict(self.ids), dataclasses.asdict(expected)
        wrong = [f"{n} {found[n]}, model {wanted[n]}" for n in wanted if found[n] != wanted[n]]
        if wrong:
            raise ValueError(
                f"the ids of {self.source} are not those of the model: {'; '.join(wrong)}. "
                "Use the tokenizer that the model was trained with"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Special texts in it become their one id; nothing is put in front."""
        return self.engine.encode(_whole(text), add_special_tokens=False).ids

    def encode_many(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of `encode` for each text, by several threads."""
        whole = [_whole(text) for text in texts]
        return [e.ids for e in self.engine.encode_batch_fast(whole, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Raises ValueError on ids outside 0..size-1 (a picture's -200, rows beyond the vocabulary).
        """
        ids = [int(number) for number in ids]
        wrong = [number for number in ids if not 0 <= number < self.ids.size]
        if wrong:
            raise ValueError(
                f"id {wrong[0]} has no text: ids of {self.source} are 0 to {self.ids.size - 1}"
            )
        if skip_special:
            ids = [number for number in ids if number not in self._skipped]
        return self.engine.decode(ids, skip_special_tokens=False)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A byte-level BPE of `vocab_size` entries whose last eleven are `LAST_TEXTS`.

        Where the texts give fewer entries, reserved texts fill the gap in front of the eleven. The
        same texts give the same tokenizer. Raises ValueError when 256 bytes and the eleven do not
        fit, or when there is no text.
        """
        texts = list(texts)
        room = vocab_size - len(LAST_TEXTS)
        if room < 256:
            raise ValueError(f"vocab_size={vocab_size}: need at least {256 + len(LAST_TEXTS)}")
        if not any(texts):
            raise ValueError("no text to train a tokenizer on")
        engine = Engine(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PIECES), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        engine.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=room,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        engine.train_from_iterator(texts, trainer)
        fill = room - engine.get_vocab_size()
        engine.add_special_tokens([f"<|reserved_token_{k}|>" for k in range(1, fill + 1)])
        engine.add_special_tokens(list(LAST_TEXTS))
        return cls(engine)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json, and the two files with which `transformers` reads it."""
        folder = Path(folder)
        write_atomic(folder / "tokenizer.json", self.engine.to_str(pretty=True).encode())
        names = {
            "bos_token": SPECIAL["bos"],
            "eos_token": SPECIAL["eos"],
            "pad_token": SPECIAL["eos"],
        }
        write_json(folder / "special_tokens_map.json", names)
        extra = {
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "padding_side": "right",
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        write_json(folder / "tokenizer_config.json", names | extra)
