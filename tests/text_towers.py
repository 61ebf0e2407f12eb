"""A CLIP text tower and its tokenizer, small enough for every test, in the public layout."""

from __future__ import annotations

from pathlib import Path

from test_prompts import write_tokenizer

from satdifuser_jax.convert import export_component
from satdifuser_jax.text_encoder import TextConfig, init_text_encoder

# The tokenizer knows few words, but under their ids of 49,408.
SMALL = TextConfig(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=77,  # what every tokenizer pads to
)


def write_tower(folder: Path) -> Path:
    export_component(folder / "text_encoder", "text_encoder", SMALL, init_text_encoder(SMALL, 0))
    write_tokenizer(folder / "tokenizer")
    return folder
