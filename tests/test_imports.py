"""The import rule of docs/architecture.md, checked on the source text."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"common_jax", "satdifuser_jax", "geodit_jax", "data", "configs", "launch"}
ALLOWED = {
    "common_jax": {"common_jax"},
    "satdifuser_jax": {"satdifuser_jax", "common_jax", "data"},
    "geodit_jax": {"geodit_jax", "common_jax", "data"},
    "data": {"data", "common_jax.files"},
    "configs": {"configs"},
}
# Only tasks read datasets; models, samplers and heads are a library without `data`.
READS_DATA = {
    "probe.py",
    "pretrain_data.py",
    "sample_files.py",
    "task.py",
    "inference.py",
    "sweep.py",
}
FORBIDDEN = {"tensorflow", "torch", "diffusers", "clu"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("**/*.py"))


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_each_package_imports_only_what_the_rule_allows(package):
    for path in sources(package):
        for name in imported(path):
            top = name.split(".")[0]
            assert top not in FORBIDDEN, f"{path.name} imports {name}"
            if top not in OURS:
                continue
            allowed = ALLOWED[package]
            ok = top in allowed or any(name == a or name.startswith(a + ".") for a in allowed)
            # `from common_jax import files` names the package and the module.
            ok = ok or (name == top and any(a.startswith(top + ".") for a in allowed))
            assert ok, f"{package}/{path.name} imports {name}"
            if top == "data" and package.endswith("_jax"):
                assert path.name in READS_DATA, f"{package}/{path.name} reads data"


def test_data_never_imports_jax():
    for path in sources("data"):
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & {"jax", "flax", "optax"}, path.name


def test_package_inits_are_import_light():
    for package in ALLOWED:
        assert not imported(ROOT / package / "__init__.py"), package


def test_no_private_jax_and_no_file_over_350_lines():
    for package in (*ALLOWED, "."):
        paths = [ROOT / "launch.py"] if package == "." else sources(package)
        for path in paths:
            if path.exists():
                text = path.read_text()
                assert "jax._src" not in text, path
                assert text.count("\n") <= 350, f"{path} has {text.count(chr(10))} lines"
