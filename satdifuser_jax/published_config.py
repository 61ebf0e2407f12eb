"""Reading a published config.json: sizes are taken, everything else must be what we implement."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping


def take_fields(
    cls: type, config: Mapping, *, fixed: Mapping, ignored: Collection[str] = ()
) -> dict:
    """The entries of `config` that are fields of the dataclass `cls`.

    `fixed` lists keys implemented for one value only; `ignored` keys change nothing. Keys that
    start with an underscore are notes. A key that nobody knows may be null, false or empty.
    Raises ValueError naming the key and the value that is not implemented.
    """
    own = {field.name for field in dataclasses.fields(cls)}
    for key, value in config.items():
        if key in own or key in ignored or key.startswith("_"):
            continue
        if key in fixed and value != fixed[key]:
            raise ValueError(
                f"{cls.__name__}: {key}={value!r} is not implemented, only {fixed[key]!r} is"
            )
        if key not in fixed and value:
            raise ValueError(
                f"{cls.__name__}: {key}={value!r} is unknown here; if it changes nothing, remove it"
            )
    return {key: config[key] for key in own if key in config}


def to_json(config) -> dict:
    """The fields of a config dataclass with lists for tuples, as json has them."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config).items()
    }
