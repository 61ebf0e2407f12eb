"""What README and docs tell people to type exists: commands, keys, links, imports, tables."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags
from tiny_pipeline import UNET, write_pipeline

import launch
from common_jax.command_line import all_flags
from common_jax.workdir import flatten_config
from data.catalog import GEOBENCH, defaults
from satdifuser_jax.heads import FUSERS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = [p for p in sorted((ROOT / "configs").glob("*.py")) if "def get_config" in p.read_text()]
PACKAGES = ("common_jax", "satdifuser_jax", "geodit_jax", "data", "configs")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
TOP = {"common_jax", "satdifuser_jax", "geodit_jax", "data", "configs", "launch", "examples"}


# ------------------------------------------------------------------------------------- commands
def find_commands(path: Path, start: str) -> list[str]:
    """Lines of code blocks, inline code and config docstrings that begin with `start`."""
    text = path.read_text()
    if path.suffix == ".py":
        blocks = [ast.get_docstring(ast.parse(text))]
    else:
        blocks = [body for _, body in FENCE.findall(text)]
        blocks += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    # Settings of the environment may stand before a command.
    plain = [re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line) for line in lines]
    return [line for line in plain if line.startswith(start)]


def parse_command(line: str) -> str:
    """The verb of a `python launch.py ...` line, every flag and key parsed as launch.py would."""
    words = shlex.split(line, comments=True)[2:]
    verb, *rest = words
    assert verb in launch.VERBS, f"unknown verb {verb}: {line}"
    values = flags.FlagValues()
    argv = ["launch.py", *rest]
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    for flag in flags.FLAGS.get_flags_for_module("launch"):
        if flag.name != "config":
            values[flag.name] = copy.deepcopy(flag)
    left = values(argv)
    assert left == ["launch.py"], f"words that are no flags: {left[1:]}: {line}"
    needed = re.findall(r"need\((\w+),", inspect.getsource(launch.VERBS[verb].run))
    # GeoDiT takes the first two; the third has a place of its own in a workdir.
    instead = {"workdir": ("weights", "predictions"), "images": ("image",), "out": ("workdir",)}
    for name in (getattr(launch, constant).name for constant in needed):
        if any(values[other].value for other in instead.get(name, ())):
            continue
        assert values[name].value, f"`launch.py {verb}` needs --{name}: {line}"
    for name in all_flags(launch.VERBS):
        assert not values[name].present or name in launch.VERBS[verb].flags, f"--{name}: {line}"
    if config.value:
        check_config(config.value)
    return verb


def check_config(config) -> None:
    assert config.task in launch.TASKS
    if config.task == "satdifuser_probe":
        defaults(config.data.name)  # raises on an unknown dataset
        assert config.model.fuser in FUSERS


COMMANDS = [
    pytest.param(line, id=f"{path.name}:{number}")
    for path in [*DOCUMENTS, *CONFIGS]
    for number, line in enumerate(find_commands(path, "python launch.py"))
]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    parse_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "python launch.py fly --config=configs/satdifuser_probe.py",
        "python launch.py train --config=configs/satdifuser_probe.py:tiny",
        "python launch.py train --config=configs/absent.py --workdir=a",
        "python launch.py train --config=configs/satdifuser_probe.py:tinny --workdir=a",
        "python launch.py train --config=configs/satdifuser_probe.py:dataset=m-x --workdir=a",
        "python launch.py train --config=configs/satdifuser_probe.py --workdir=a --config.lr=1",
        "python launch.py train --config=configs/satdifuser_probe.py --workdir=a --no_such_flag=1",
        "python launch.py train --config=configs/satdifuser_probe.py --workdir=a stray",
        "python launch.py plan --config=configs/satdifuser_probe.py --out=a",
    ],
)
def test_a_wrong_command_would_be_found(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exception, match=r"\w"):
        parse_command(line)


def test_the_documents_show_every_verb_and_every_config():
    lines = [param.values[0] for param in COMMANDS]
    assert {line.split()[2] for line in lines} == set(launch.VERBS)
    for config in CONFIGS:
        assert any(f"configs/{config.name}" in line for line in lines), config.name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_make_target_and_module_that_is_run_exists(path):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in find_commands(path, "make"):
        for word in shlex.split(line, comments=True)[1:]:
            assert "=" in word or word in targets, line
    modules = [*find_commands(path, "python -m"), *find_commands(path, ".venv/bin/python -m")]
    for line in modules:
        module = line.split()[2]
        if module.split(".")[0] in {*TOP, "benchmarks"}:
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), line


# ---------------------------------------------------------------------------------- links, paths
def find_anchors(path: Path) -> set[str]:
    """Anchors of the headings, made as the usual viewers of Markdown make them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_local_link_leads_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text())):
        if re.match(r"https?:|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name}: {link}"
        if anchor:
            assert anchor in find_anchors(target), f"{path.name}: {link}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_source_path_that_is_named_exists(path):
    named = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|toml|lock))`", path.read_text())
    ours = (*TOP, "tests", "docs", "benchmarks")
    for name in named:
        if name.split("/")[0] in ours:
            assert (ROOT / name).is_file(), f"{path.name} names {name}"


# ------------------------------------------------------------------------------------- examples
def find_examples(path: Path) -> list[str]:
    return [body for language, body in FENCE.findall(path.read_text()) if language == "python"]


EXAMPLES = [
    pytest.param(body, id=f"{path.name}:{number}")
    for path in DOCUMENTS
    for number, body in enumerate(find_examples(path))
]


@pytest.mark.parametrize("body", EXAMPLES)
def test_every_example_compiles_and_imports_what_exists(body):
    tree = compile(body, "example", "exec", ast.PyCF_ONLY_AST)
    compile(body, "example", "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in TOP:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_the_example_of_the_readme_runs_on_a_small_model(tmp_path, monkeypatch, capsys):
    import numpy as np
    from PIL import Image

    from satdifuser_jax.prompts import save_embedding

    (body,) = find_examples(ROOT / "README.md")
    lines = [line for line in body.splitlines() if line.strip()]
    assert len(lines) <= 12, f"{len(lines)} lines"
    write_pipeline(tmp_path / "DIFFUSIONSAT")
    embedding = np.ones((5, UNET.cross_attention_dim), np.float32)
    file = tmp_path / "DIFFUSIONSAT" / "prompts" / "prompt-0.npz"
    save_embedding(file, "A satellite image", embedding, "none")
    (tmp_path / "DIFFUSIONSAT" / "tokenizer" / "vocab.json").unlink()
    (tmp_path / "DIFFUSIONSAT" / "tokenizer").rmdir()
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(tmp_path / "scene.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(body.replace("256", "16"), "README.md", "exec"), {})  # pixels for two levels
    shapes = ast.literal_eval(capsys.readouterr().out.strip())
    assert shapes == [(1, 3, 8, 8, 4 * 16), (1, 3, 4, 4, 2 * 32)]


# --------------------------------------------------------------------------------------- tables
def test_the_table_of_geobench_sets_is_the_catalog():
    rows = {}
    for line in (ROOT / "docs" / "data.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].startswith("m-") and len(cells) == 9:
            rows[cells[0]] = cells[1:]
    assert list(rows) == list(GEOBENCH)
    for name, row in GEOBENCH.items():
        sizes = " / ".join(f"{size:,}" for size in row.sizes)
        numbers = [len(row.classes), row.native_side, row.side]
        expected = [row.task.replace("_", " "), *map(str, numbers), ", ".join(row.bands)]
        assert rows[name] == [*expected, f"{row.divisor:g}", row.scaling, sizes], name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_leaf_is_explained(path):
    text = (ROOT / "docs" / "training.md").read_text()
    leaves = flatten_config(importlib.import_module(f"configs.{path.stem}").get_config(""))
    names = {re.sub(r"^(model\.layers)\..*", r"\1", name) for name in leaves}
    missing = sorted(name for name in names if f"`{name}`" not in text)
    assert not missing, f"docs/training.md does not name {missing}"


def test_the_architecture_names_every_source_file():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([\w./]+\.py)`", text))
    files = [p for package in PACKAGES for p in sorted((ROOT / package).glob("[!_]*.py"))]
    missing = [
        str(p.relative_to(ROOT)) for p in files if not named & {p.name, f"{p.parent.name}/{p.name}"}
    ]
    assert not missing, f"docs/architecture.md does not name {missing}"
