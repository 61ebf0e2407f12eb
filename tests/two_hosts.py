"""One process of a run on two hosts: python tests/two_hosts.py PORT PROCESS WORKDIR."""

from __future__ import annotations

import sys

import jax
from absl import flags

if __name__ == "__main__":
    sys.path.insert(0, ".")
    flags.FLAGS.mark_as_parsed()
    jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
    from tests.test_train_loop import run

    sys.exit(run(sys.argv[3], **{"optim.ema_decay": 0.9}))
