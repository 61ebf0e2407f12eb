"""Decoded pictures kept in memory: decoding JPEGs again every epoch can cost more than a step."""

from __future__ import annotations

from typing import Any


class InMemory:
    """A source whose examples are kept once read, until `limit` bytes of pictures are held."""

    def __init__(self, source: Any, limit: int = 2**31):
        self.source, self.limit = source, limit
        self.kept: dict[int, dict] = {}
        self.held = 0

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "source":  # pickle looks before __init__ ran
            raise AttributeError(name)
        return getattr(self.source, name)

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = int(i)
        example = self.kept.get(i)
        if example is None:
            example = self.source[i]
            size = example["image"].nbytes
            if self.held + size <= self.limit:
                self.kept[i] = example
                self.held += size
        return dict(example)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "kept": {}, "held": 0}
