from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common_jax import host_memory

ROOT = Path(__file__).parent.parent
PROGRAM = """
import os, sys
from common_jax.host_memory import use_huge_pages
print("start", len(sys.argv), os.environ.get("GLIBC_TUNABLES"))
use_huge_pages()
print("goes on")
"""


def start(tmp_path, **environment):
    (tmp_path / "program.py").write_text(PROGRAM)
    plain = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-W", "ignore", str(tmp_path / "program.py"), "a b", "--c=d"]
    environment = plain | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


@pytest.mark.skipif(
    not host_memory.SWITCH.is_file() or "[madvise]" not in host_memory.SWITCH.read_text(),
    reason="this system does not give huge pages on request",
)
@pytest.mark.parametrize("before", ["", "glibc.malloc.arena_max=4"])
def test_a_program_starts_once_more_with_its_arguments_and_the_setting(tmp_path, before):
    given = {"GLIBC_TUNABLES": before} if before else {}
    setting = f"{before}:{host_memory.SETTING}" if before else host_memory.SETTING
    expected = [f"start 3 {before or None}", f"start 3 {setting}", "goes on"]
    assert start(tmp_path, **given).splitlines() == expected


def test_a_setting_of_ones_own_stays(tmp_path):
    own = "glibc.malloc.hugetlb=0"
    assert start(tmp_path, GLIBC_TUNABLES=own).splitlines() == [f"start 3 {own}", "goes on"]


def test_nothing_happens_where_there_is_no_such_switch(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "SWITCH", tmp_path / "none")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    host_memory.use_huge_pages()
    assert "GLIBC_TUNABLES" not in os.environ


def test_freed_memory_can_be_given_back_on_any_system(monkeypatch):
    host_memory.release_freed_memory()
    monkeypatch.setattr(
        host_memory.ctypes, "CDLL", lambda name: object()
    )  # a libc that is not glibc
    host_memory.release_freed_memory()
