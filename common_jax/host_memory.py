"""Memory of the host: pages for large arrays, and what the heap keeps without need."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

SETTING = "glibc.malloc.hugetlb=1"
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Start this program anew with huge pages for large arrays, where Linux has them on request.

    XLA takes the buffers of a program on a CPU anew at every call. In pages of 4 KB, touching them
    first takes as long as a whole training step of a small model. glibc reads the setting only
    when a process starts; call this before anything else. Does nothing on other systems, or where
    GLIBC_TUNABLES already speaks of it.
    """
    found = os.environ.get("GLIBC_TUNABLES", "")
    on_request = SWITCH.is_file() and "[madvise]" in SWITCH.read_text()
    if not on_request or "glibc.malloc.hugetlb" in found:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [found, SETTING]))
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)


def release_freed_memory() -> None:
    """Give the system back what the heap holds of freed memory; nothing without glibc.

    Compiling a UNet of full width leaves 1.4 GiB that glibc would keep for later.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)
