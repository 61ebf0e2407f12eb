"""config.json of LLaDA, LLaDA-V and GeoDiT folders -> GeoDiTConfig.

Files spell the same sizes in two ways (`d_model` and `hidden_size`), and say less than a model
needs: no size of the tower, often no `mm_*` key. So every size that tensors show is read from them,
and the config only decides what they cannot show. `model_type` decides nothing.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from geodit_jax.config import MERGES, GeoDiTConfig, TextConfig, TokenIds, TowerConfig
from geodit_jax.image_layout import pinpoints
from geodit_jax.torch_names import Place

Shapes = Mapping[Place, tuple[int, ...]]
OWN = "geodit_jax"
"""Key in config.json for what the published spelling has no words for."""

# Keys that mean another computation than ours unless they have one of these values, or null.
_REFUSED = {
    **dict.fromkeys(("hidden_act", "activation_type"), ("silu",)),
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "mm_projector_type": ("mlp2x_gelu",),
    **dict.fromkeys(
        ("attention_bias", "include_bias", "include_qkv_bias", "bias_for_layer_norm", "alibi"),
        (False,),
    ),
    **dict.fromkeys(("scale_logits", "input_emb_norm", "attention_layer_norm"), (False,)),
}
# Attention heads of the SigLIP towers by width, for configs that leave them to the library.
_TOWER_HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}
_ANYRES = re.compile(r"anyres(?:_max_(\d+))?$")


def read_config(
    raw: Mapping,
    shapes: Shapes,
    tokens: TokenIds,
    *,
    vision: Mapping | None = None,
    has_head: bool = False,
) -> GeoDiTConfig:
    """The config of a model from its config.json `raw` and the torch shapes of its tensors.

    vision: config of the tower where it has one; has_head: the tower comes with its pooling head,
    so with a last layer that does not run. Raises ValueError where the keys ask for a computation
    that is not implemented, or contradict the tensors in what those cannot show (heads).
    """
    _refuse_others(raw)
    own = raw.get(OWN, {})
    text = _read_text(raw, shapes)
    if tokens.size > text.vocab_rows:
        raise ValueError(
            f"the tokenizer has {tokens.size} entries and the model {text.vocab_rows} rows; take "
            "tokenizer and weights from one folder"
        )
    if not any(place.path.startswith("tower/") for place in shapes):
        return GeoDiTConfig(text=text, tower=None, tokens=tokens, prefix_lm=_prefix_lm(own))
    tower = _read_tower(raw, vision or {}, shapes, has_head)
    mode, max_tiles, merge = _read_image_mode(raw, Place("newline/embedding") in shapes)
    config = GeoDiTConfig(
        text=text,
        tower=tower,
        tokens=tokens,
        image_mode=mode,
        merge=merge,
        max_tiles=max_tiles,
        newline_on_single=bool(own.get("newline_on_single", True)),
        prefix_lm=_prefix_lm(own),
    )
    grid = read_pinpoints(raw.get("image_grid_pinpoints"), tower.image_size)
    if grid != pinpoints(config):
        config = dataclasses.replace(config, grid_pinpoints=grid)
    pinpoints(config)  # refuses canvases that are no whole number of tiles
    return config


def read_pinpoints(value, side: int) -> tuple[tuple[int, int], ...]:
    """Canvases [width, height] in pixels, from any spelling of `image_grid_pinpoints`.

    `"(1x1),...,(6x6)"` is a range of tiles of `side` pixels, width outer; a list of pairs is in
    pixels, also when it is written as a string; null is the range 1..6 x 1..6.
    """
    if value is None:
        value = "(1x1),...,(6x6)"
    if isinstance(value, str) and "x" in value:
        ends = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", value)]
        if ends:
            (low_i, low_j), (high_i, high_j) = ends[0], ends[-1]
            columns, rows = range(low_i, high_i + 1), range(low_j, high_j + 1)
            return tuple((side * i, side * j) for i in columns for j in rows)
    try:
        pairs = ast.literal_eval(value) if isinstance(value, str) else value
        grid = tuple((int(width), int(height)) for width, height in pairs)
    except (ValueError, TypeError, SyntaxError):
        grid = ()
    if not grid:
        raise ValueError(
            f"image_grid_pinpoints={value!r:.80}: use pairs [[384, 384], ...] in pixels, or a "
            'range of tiles as "(1x1),...,(6x6)"'
        )
    return grid


# ------------------------------------------------------------------------------- keys and tensors
def _refuse_others(raw: Mapping) -> None:
    for key, known in _REFUSED.items():
        if raw.get(key) is not None and raw[key] not in known:
            wanted = " or ".join(repr(value) for value in known)
            raise ValueError(
                f"config.json: {key}={raw[key]!r} is not implemented; only {wanted} is"
            )
    scaling = raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in (None, "default"):
        raise ValueError(f"config.json: rope_scaling={scaling!r} is not implemented; use null")


def _first(raw: Mapping, *keys: str):
    """The value of the first key that is there and not null, else None."""
    return next((raw[key] for key in keys if raw.get(key) is not None), None)


def _vote(sizes: Iterable[int], declared: int | None, what: str) -> int:
    """The size most tensors agree on; where they tie, the declared one if it is among them.

    One misshapen tensor then does not make all others look misshapen.
    """
    counts = Counter(sizes)
    if not counts:
        if declared is None:
            raise ValueError(f"no tensor shows the {what}, and config.json does not tell it")
        return int(declared)
    most = max(counts.values())
    winners = [size for size, count in counts.items() if count == most]
    return int(declared) if declared in winners else winners[0]


def _axis(shapes: Shapes, pattern: str, axis: int, rank: int) -> list[int]:
    """Sizes of one axis (torch layout) of every tensor of `rank` whose path matches."""
    found = [shape for place, shape in shapes.items() if re.search(pattern, place.path)]
    return [shape[axis] for shape in found if len(shape) == rank]


def _count_layers(shapes: Shapes, prefix: str) -> int:
    layers = [p.layer for p in shapes if p.layer is not None and p.path.startswith(prefix)]
    return max(layers, default=-1) + 1


def _read_text(raw: Mapping, shapes: Shapes) -> TextConfig:
    if not any(place.path.startswith("core/") for place in shapes):
        raise ValueError("no tensor of a LLaDA text core among the weights")
    declared = _first(raw, "hidden_size", "d_model")
    width = _vote(_axis(shapes, r"^core/.*scale$", 0, 1), declared, "width (hidden_size)")
    rows = _axis(shapes, r"^core/(embed_tokens/embedding|lm_head/kernel)$", 0, 2)
    wide = _axis(shapes, r"^core/.*(gate|up)_proj/kernel$", 0, 2)
    mlp = wide + _axis(shapes, r"^core/.*down_proj/kernel$", 1, 2)
    heads, kv_heads = _read_heads(raw, shapes, width)
    declared_layers = _first(raw, "num_hidden_layers", "n_layers") or 0
    parameters = raw.get("rope_parameters") or {}
    full = raw.get("rope_full_precision", True)
    return TextConfig(
        vocab_rows=_vote(rows, _first(raw, "vocab_size", "embedding_size"), "vocabulary"),
        width=width,
        # More layers than declared are a wrong config; fewer are tensors that lack.
        layers=max(_count_layers(shapes, "core/"), int(declared_layers)),
        heads=heads,
        kv_heads=kv_heads,
        mlp=_vote(mlp, _first(raw, "intermediate_size", "mlp_hidden_size"), "width of the MLP"),
        rope_theta=float(
            _first(raw, "rope_theta") or parameters.get("rope_theta") or TextConfig.rope_theta
        ),
        eps=float(_first(raw, "rms_norm_eps", "layer_norm_eps") or TextConfig.eps),
        rope_cast=raw.get(OWN, {}).get("rope_cast") or ("float32" if full else "activation"),
    )


def _read_heads(raw: Mapping, shapes: Shapes, width: int) -> tuple[int, int]:
    """Heads cannot be seen in the tensors: they are declared, and must fit."""
    heads = _first(raw, "num_attention_heads", "n_heads")
    if heads is None:
        if width != TextConfig.width:
            raise ValueError(
                f"config.json has neither num_attention_heads nor n_heads, and tensors of width "
                f"{width} do not tell; add the key"
            )
        heads = TextConfig.heads
    heads, declared = int(heads), _first(raw, "num_key_value_heads", "n_kv_heads")
    if heads < 1 or width % heads:
        raise ValueError(
            f"config.json says {heads} heads, which do not divide the width {width} of the tensors"
        )
    head = width // heads
    rows = _axis(shapes, r"^core/.*[kv]_proj/kernel$", 0, 2)
    rows = _vote(rows, declared and int(declared) * head, "number of key-value heads")
    if rows % head or heads % (rows // head) or (declared and rows != int(declared) * head):
        also = f" and {declared} key-value heads" if declared else ""
        raise ValueError(
            f"config.json says {heads} heads{also}, so that a head is {head} wide, but k_proj and "
            f"v_proj have {rows} rows; take config.json and weights from one folder"
        )
    return heads, rows // head


def _read_tower(raw: Mapping, vision: Mapping, shapes: Shapes, has_head: bool) -> TowerConfig:
    width = _vote(
        _axis(shapes, r"^tower/layers/layer_norm", 0, 1),
        _first(vision, "hidden_size") or _first(raw, "mm_hidden_size"),
        "width of the tower",
    )
    layers, total = _count_layers(shapes, "tower/"), _first(vision, "num_hidden_layers")
    total = 27 if total is None else int(total)
    if layers == total or (has_head and layers != total - 1):
        layers -= 1  # the last one of a whole SigLIP does not run
    heads = int(_first(vision, "num_attention_heads") or _TOWER_HEADS.get(width, 0))
    if heads < 1 or width % heads:
        raise ValueError(
            f"vision_config.num_attention_heads={heads or None} does not fit a tower of width "
            f"{width}; add the right number to config.json"
        )
    patch = _axis(shapes, r"patch_embedding/kernel$", 3, 4)
    patch = _vote(patch, _first(vision, "patch_size") or TowerConfig.patch, "patch size")
    return TowerConfig(
        image_size=_read_image_size(raw, vision, shapes, patch),
        patch=patch,
        width=width,
        layers=layers,
        heads=heads,
        mlp=_vote(
            _axis(shapes, r"^tower/.*fc1/kernel$", 0, 2),
            _first(vision, "intermediate_size"),
            "width of the tower's MLP",
        ),
        eps=float(_first(vision, "layer_norm_eps") or TowerConfig.eps),
    )


def _read_image_size(raw: Mapping, vision: Mapping, shapes: Shapes, patch: int) -> int:
    """Pixels per side: declared, in the tower's name, or 384; they must fit the position table."""
    declared = _first(vision, "image_size")
    rows = _axis(shapes, r"position_embedding/embedding$", 0, 2)
    rows = rows[0] if rows else (int(declared or TowerConfig.image_size) // patch) ** 2
    grid = math.isqrt(rows)
    named = re.search(r"-(\d{3,4})/?$", str(raw.get("mm_vision_tower", "")))
    guesses = [int(named[1])] if named else []
    guesses = [int(declared)] if declared else [*guesses, TowerConfig.image_size, grid * patch]
    for side in guesses:
        if (side // patch) ** 2 == rows:
            return side
    raise ValueError(
        f"the tower has {rows} positions, which is not the grid of pictures of {guesses[0]} pixels "
        f"in patches of {patch}; take config.json and tower from one folder"
    )


def _read_image_mode(raw: Mapping, has_newline: bool) -> tuple[str, int, str]:
    """(image_mode, max_tiles, merge). Missing keys: tiles with unpadding where the checkpoint has
    a newline vector, as LLaDA-V was tuned; else one squashed view."""
    mode = raw.get("image_aspect_ratio") or ("anyres_max_4" if has_newline else "square")
    merge = raw.get("mm_patch_merge_type") or ("spatial_unpad" if has_newline else "flat")
    if merge not in MERGES:
        raise ValueError(f"config.json: mm_patch_merge_type={merge!r}: use one of {MERGES}")
    if mode in ("square", "pad"):
        return mode, raw.get(OWN, {}).get("max_tiles", GeoDiTConfig.max_tiles), merge
    tiles = _ANYRES.match(str(mode))
    if not tiles:
        raise ValueError(
            f"config.json: image_aspect_ratio={mode!r}: use square, pad, anyres or anyres_max_<k>"
        )
    return "anyres", int(tiles[1] or 0), merge


def _prefix_lm(own: Mapping) -> bool:
    return bool(own.get("prefix_lm", False))


__all__ = ["OWN", "read_config", "read_pinpoints"]
