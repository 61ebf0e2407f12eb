"""Worker processes end with the process that started them, however that one ended."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent(*_) -> None:
    """Called in a new worker, of `multiprocessing` or of grain: it ends when its parent is gone.

    Else a worker whose parent was killed waits for it for ever: at every restart of a run the
    memory of some more workers is lost, and shards may be written beside their new writer.
    """

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, name="end_with_parent", daemon=True).start()
