"""Prompts to token ids to embeddings; embeddings are kept, so that a run needs no text tower.

A checkpoint's own tokenizer is used. Its padding token is read from special_tokens_map.json, which
overrides tokenizer_config.json: SD 2.x pads with "!" (id 0), not with the end token.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common_jax.files import atomic_path, read_json, sha256_file, sha256_json

MAX_LENGTH = 77
_TOKENIZER_FILES = ("vocab.json", "merges.txt")


class PromptError(ValueError):
    """A tokenizer folder, text encoder or stored embedding that cannot serve a prompt."""


@dataclass(frozen=True)
class PromptTokenizer:
    """Texts to int32 ids [n, length]: start, BPE ids, end, then padding; longer texts are cut."""

    backend: object  # transformers' CLIPTokenizer
    pad: int
    length: int = MAX_LENGTH

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        ids = np.full((len(texts), self.length), self.pad, np.int32)
        for row, text in zip(ids, texts):
            tokens = self.backend(text, truncation=True, max_length=self.length)["input_ids"]
            row[: len(tokens)] = tokens
        return ids


def load_tokenizer(folder: str | os.PathLike) -> PromptTokenizer:
    """The CLIP tokenizer of a checkpoint's tokenizer/ folder (vocab.json, merges.txt, two maps)."""
    from transformers import CLIPTokenizer

    folder = Path(folder)
    missing = [name for name in _TOKENIZER_FILES if not (folder / name).is_file()]
    if missing:
        raise PromptError(
            f"{folder}: {', '.join(missing)} not found; give the tokenizer/ folder of a checkpoint"
        )
    backend = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    pad = _special_token(folder, "pad_token") or backend.pad_token
    vocabulary = backend.get_vocab()
    if pad not in vocabulary:
        raise PromptError(f"{folder}: pad_token {pad!r} is not in vocab.json")
    return PromptTokenizer(backend, vocabulary[pad])


def _special_token(folder: Path, name: str) -> str | None:
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / file
        token = read_json(path).get(name) if path.is_file() else None
        if token is not None:
            return token["content"] if isinstance(token, dict) else token
    return None


def encode_prompts(
    texts: Sequence[str], tokenizer: str | os.PathLike, text_encoder: str | os.PathLike
) -> np.ndarray:
    """Embeddings float32 [n, 77, D]: last hidden state after the final norm, causal mask only."""
    import jax

    from satdifuser_jax.convert import load_text_encoder
    from satdifuser_jax.text_encoder import CLIPTextModel

    ids = load_tokenizer(tokenizer)(texts)
    config, params, report = load_text_encoder(text_encoder)
    report.raise_if_bad()
    if ids.max() >= config.vocab_size:
        raise PromptError(
            f"{tokenizer} gives id {ids.max()}, but {text_encoder} has vocab_size="
            f"{config.vocab_size}: tokenizer and text encoder are of different checkpoints"
        )
    model = CLIPTextModel(config)
    encode = jax.jit(lambda params, row: model.apply({"params": params}, row))
    # One row at a time: one compiled shape, and prompts are few.
    return np.concatenate([np.asarray(encode(params, row[None]), np.float32) for row in ids])


def text_fingerprint(tokenizer: str | os.PathLike, text_encoder: str | os.PathLike) -> str:
    """sha256 over every file of both folders: what an embedding depends on beside its text."""
    folders = [Path(tokenizer), Path(text_encoder)]
    return sha256_json(
        {
            f"{part}/{path.name}": sha256_file(path)
            for part, folder in enumerate(folders)
            for path in sorted(folder.iterdir())
            if path.is_file() and path.suffix in (".json", ".txt", ".safetensors", ".bin")
        }
    )


def prompt_embeddings(
    texts: Sequence[str],
    *,
    tokenizer: str | os.PathLike | None = None,
    text_encoder: str | os.PathLike | None = None,
    cache: str | os.PathLike | None = None,
) -> np.ndarray:
    """Embeddings float32 [n, 77, D] of `texts`, from the folder `cache` where they are known.

    With the two component folders, a stored embedding is used only if it was made by exactly these
    files. Without them (or where they do not exist) the stored ones are all there is: a text that
    is missing, or that two different encoders embedded, is refused by name.
    """
    is_here = all(folder and Path(folder).is_dir() for folder in (tokenizer, text_encoder))
    fingerprint = text_fingerprint(tokenizer, text_encoder) if is_here else None
    known = {text: _find(cache, text, fingerprint) for text in texts} if cache else {}
    missing = [text for text in dict.fromkeys(texts) if known.get(text) is None]
    if missing and not is_here:
        raise PromptError(
            f"no embedding of {missing[0]!r} in {cache} and no text encoder at {text_encoder}: "
            "give a checkpoint folder that has tokenizer/ and text_encoder/ once, it is then kept"
        )
    if missing:
        for text, embedding in zip(missing, encode_prompts(missing, tokenizer, text_encoder)):
            known[text] = embedding
            if cache:
                save_embedding(
                    Path(cache) / _file_name(text, fingerprint), text, embedding, fingerprint
                )
    return np.stack([known[text] for text in texts])


def save_embedding(
    path: str | os.PathLike, text: str, embedding: np.ndarray, fingerprint: str
) -> None:
    """One prompt's embedding [77, D] as .npz, with its text and the encoder's fingerprint."""
    with atomic_path(path) as partial, open(partial, "wb") as file:
        np.savez(file, embedding=embedding, text=np.array(text), encoder=np.array(fingerprint))


def load_embedding(path: str | os.PathLike) -> tuple[str, np.ndarray, str]:
    """(text, embedding [77, D], encoder fingerprint) of a file written by `save_embedding`."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return str(arrays["text"]), arrays["embedding"], str(arrays["encoder"])
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged zip fails in many ways; all mean the same to the user
        raise PromptError(f"{path}: not a prompt embedding ({error}); delete it") from error


def _file_name(text: str, fingerprint: str) -> str:
    return f"prompt-{sha256_json([text, fingerprint])[:24]}.npz"


def _find(cache: str | os.PathLike, text: str, fingerprint: str | None) -> np.ndarray | None:
    """The stored embedding of `text`; any single encoder's when `fingerprint` is None."""
    if fingerprint is not None:
        path = Path(cache) / _file_name(text, fingerprint)
        return _checked(path, text, fingerprint) if path.is_file() else None
    entries = [(path, load_embedding(path)) for path in sorted(Path(cache).glob("prompt-*.npz"))]
    found = [(path, entry) for path, entry in entries if entry[0] == text]
    if len({entry[2] for _, entry in found}) > 1:
        names = ", ".join(path.name for path, _ in found)
        raise PromptError(
            f"{cache} holds embeddings of {text!r} by different text encoders ({names}): delete "
            "the wrong ones or give the checkpoint's text_encoder/ folder"
        )
    return found[0][1][1] if found else None


def _checked(path: Path, text: str, fingerprint: str) -> np.ndarray:
    stored_text, embedding, encoder = load_embedding(path)
    if (stored_text, encoder) != (text, fingerprint):
        raise PromptError(f"{path}: holds another prompt than its name says; delete it")
    return embedding
