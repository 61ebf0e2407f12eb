"""Questions about pictures become answers: prompts in, text and its history out.

A `Responder` holds a model that is ready to answer. Questions of one answer length run in batches
of one shape: pictures are encoded once, prefixes are padded to a multiple of `BUCKET` tokens, so
few programs are compiled.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from common_jax.compiler import jit
from geodit_jax import llada
from geodit_jax.chat import NO_TARGET, PLACEHOLDER, SYSTEM, encode_prompt
from geodit_jax.config import GeoDiTConfig
from geodit_jax.decode_config import DecodeConfig, fit_window
from geodit_jax.image_layout import lay_out
from geodit_jax.model import encode_images, merge
from geodit_jax.prompts import Prompts, load_prompts
from geodit_jax.sampler import generate
from geodit_jax.sequence import expand
from geodit_jax.tokenizer import Tokenizer
from geodit_jax.views import make_views

BUCKET = 64
# Windows of the GeoDiT paper; a box in words needs more than the 8 it gives to "other" tasks.
ANSWER_LENGTHS = {
    "caption": 16,
    "grounding": 32,
    "detection": 32,
    "vqa": 8,
    "classification": 8,
    "chat": 32,
}


@dataclasses.dataclass(frozen=True)
class Question:
    """Text for one picture (uint8 [H,W,3]; None: text alone), and the task it belongs to."""

    text: str
    image: np.ndarray | None = None
    task: str = "chat"


@dataclasses.dataclass(frozen=True)
class Answer:
    """Text, and how it came about.

    tokens: before the end. steps: passes of the core. seconds: share of its batch.
    pieces: text of every position, "" behind the end; committed_at int [L]: the pass that fixed a
    position, -1 for none; confidence float [L]: its probability in that pass.
    """

    text: str
    tokens: int
    steps: int
    seconds: float
    pieces: tuple[str, ...]
    committed_at: np.ndarray
    confidence: np.ndarray


class Responder:
    """A model that answers, as it was trained to be asked.

    params: host or device arrays. lengths: answer window by task. system: the system message, ""
    for none. blind: pictures are left out. prompts, codec: wording and notation of boxes.
    """

    def __init__(
        self,
        params,
        config: GeoDiTConfig,
        tokenizer: Tokenizer,
        decode: DecodeConfig = DecodeConfig(),  # noqa: B008  frozen
        *,
        lengths: Mapping[str, int] = ANSWER_LENGTHS,
        prompt_after_image: str = "keep",
        system: str = SYSTEM,
        dtype=jnp.float32,
        blind: bool = False,
        prompts: Prompts | None = None,
        codec: str = "unit2",
    ):
        self.config, self.tokenizer, self.decode = config, tokenizer, decode
        self.lengths, self.system, self.dtype = dict(lengths), system, dtype
        self.prompt_after_image = prompt_after_image
        self.prompts, self.codec = prompts or load_prompts(), codec
        self.sees = config.tower is not None and not blind
        # One tree a layer: else a layer's weights are copied out of the stack at every pass.
        core = llada.unstack(params["core"])
        self.params = jax.device_put({**params, "core": core})
        self._embed = jit(self._embed_batch)

    def _embed_batch(self, params, arrays):
        tokens = rows = weights = None
        if self.sees:
            tokens = encode_images(params, self.config, arrays["pixels"], self.dtype)
            rows, weights = arrays["image_rows"], arrays["image_weights"]
        return merge(params, self.config, arrays["ids"], tokens, rows, weights, self.dtype)

    def answer(
        self, questions: Sequence[Question], *, batch_size: int = 8, seed: int = 0
    ) -> Iterator[tuple[int, Answer]]:
        """(place in `questions`, Answer), batch by batch, grouped by answer length.

        Raises ValueError for a picture that cannot be read or a question with special texts in it.
        """
        prepared = [self._prepare(question) for question in questions]
        groups: dict[tuple[int, int, int], list[int]] = {}
        for place, (question, arrays) in enumerate(zip(questions, prepared)):
            window = self.lengths.get(question.task) or self.decode.length
            shape = (window, len(arrays["ids"]), len(arrays.get("pixels", ())))
            groups.setdefault(shape, []).append(place)
        keys = jax.random.split(jax.random.key(seed), max(len(questions), 1))
        for (window, *_), places in sorted(groups.items()):
            decode = fit_window(self.decode, window)
            for start in range(0, len(places), batch_size):
                chosen = places[start : start + batch_size]
                # The last batch is filled up: one more shape would be one more program.
                filled = chosen + chosen[-1:] * (min(batch_size, len(places)) - len(chosen))
                yield from self._answer_batch(prepared, chosen, filled, keys, decode)

    def _answer_batch(self, prepared, chosen, filled, keys, decode):
        begin = time.perf_counter()
        batch = {name: np.stack([prepared[k][name] for k in filled]) for name in prepared[0]}
        prefix = self._embed(self.params, batch)
        found = generate(
            self.params["core"],
            self.config,
            prefix,
            jnp.asarray(batch["length"]),
            keys[np.asarray(filled)],
            decode,
        )
        found = jax.tree.map(np.asarray, found)
        seconds = (time.perf_counter() - begin) / len(chosen)
        for row, place in enumerate(chosen):
            yield place, self._read(jax.tree.map(lambda part, r=row: part[r], found), seconds)

    def _read(self, found, seconds: float) -> Answer:
        ids = [int(n) for n in found.ids[: int(found.length)]]
        pieces = [self.tokenizer.decode([n], skip_special=False) for n in ids]
        return Answer(
            text=self.tokenizer.decode(ids).strip(),
            tokens=len(ids),
            steps=int(found.steps),
            seconds=seconds,
            pieces=(*pieces, *[""] * (len(found.ids) - len(ids))),
            committed_at=found.committed_at,
            confidence=found.confidence,
        )

    def _prepare(self, question: Question) -> dict[str, np.ndarray]:
        """Arrays of one prompt, padded to a multiple of BUCKET positions."""
        image = question.image if self.sees else None
        text = question.text if image is None else f"{PLACEHOLDER}\n{question.text}"
        ids = encode_prompt(
            self.tokenizer,
            [("user", text)],
            prompt_after_image=self.prompt_after_image,
            system=self.system,
        )
        layouts, slots = [], None
        if self.sees:
            # As many views as the picture has: the tower runs on every slot. Without one, a blank.
            size = (image.shape[1], image.shape[0]) if image is not None else None
            slots = lay_out(size, self.config).num_views if size else 1
            layouts = [lay_out(size, self.config, slots)] if size else []
        count = len(ids) + sum(len(layout.rows) - 1 for layout in layouts)
        nothing = [NO_TARGET] * len(ids)
        arrays = expand(
            (ids, nothing, [0] * len(ids)),
            layouts,
            self.config,
            self.tokenizer.ids.eos,
            length=-(-count // BUCKET) * BUCKET,
            slots=slots,
        )
        wanted = (
            ("ids", "length", "image_rows", "image_weights") if self.sees else ("ids", "length")
        )
        arrays = {name: arrays[name] for name in wanted}
        if self.sees:
            side = self.config.tower.image_size
            arrays["pixels"] = np.zeros((slots, side, side, 3), np.uint8)
            if image is not None:
                views = make_views(image, self.config)
                arrays["pixels"][: len(views)] = views
        return arrays
