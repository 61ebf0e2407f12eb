"""Every line that the code prints is in docs/logs.md, by its fixed words."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRINTS = {"say", "_say", "print", "warning", "warn", "_warn_once"}
PACKAGES = ("common_jax", "satdifuser_jax", "geodit_jax", "data")


def fixed_words(node: ast.expr) -> str:
    """The longest part of a text that is the same whenever it is printed."""
    parts = [""]
    for value in getattr(node, "values", [node]):
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            parts += re.split(r"%[sd]|\n", value.value)
    return max((" ".join(part.split()) for part in parts), key=lambda part: len(part.split()))


def printed_lines(package: str):
    """(place, fixed words) of every call that prints a text of its own, named before or not."""
    for path in sorted((ROOT / package).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        named: dict[str, list] = {}
        for node in nodes:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                named.setdefault(node.targets[0].id, []).append(node.value)
        for node in nodes:
            name = getattr(node, "func", None)
            name = getattr(name, "id", getattr(name, "attr", ""))
            if name not in PRINTS or not node.args:
                continue
            text = node.args[0]
            for one in named.get(getattr(text, "id", ""), [text]):
                words = fixed_words(one)
                if re.search("[a-z]{3}", words):
                    yield f"{package}/{path.name}:{node.lineno}", words


@pytest.mark.parametrize("package", PACKAGES)
def test_every_printed_line_is_explained(package):
    known = " ".join((ROOT / "docs" / "logs.md").read_text().replace("\\|", "|").split())
    found = list(printed_lines(package))
    assert found
    missing = [f"{place}: {words}" for place, words in found if words not in known]
    assert not missing, "add these to docs/logs.md:\n" + "\n".join(missing)


def test_every_kind_of_error_is_explained():
    known = (ROOT / "docs" / "logs.md").read_text()
    kinds = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            kinds |= set(re.findall(r"^class (\w+Error)\(", path.read_text(), re.MULTILINE))
    assert len(kinds) > 10
    assert not sorted(kind for kind in kinds if f"`{kind}`" not in known)


def test_what_is_fixed_of_a_line_is_found():
    one = ast.parse('f"checkpoint {a}/{b} cannot be read ({c})"').body[0].value
    assert fixed_words(one) == "cannot be read ("
    assert fixed_words(ast.parse('"%s: skipped all of %d"').body[0].value) == ": skipped all of"
