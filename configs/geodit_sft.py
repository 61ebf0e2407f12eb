"""Instruction tuning of GeoDiT: tower, projector and text core together (stage II of the paper).

    python launch.py train --config=configs/geodit_sft.py --workdir=runs/sft
    python launch.py train --config=configs/geodit_sft.py:size=8b,data=mmrs --workdir=runs/stage2 \
        --config.model.weights=runs/stage1/export --config.data.root=MMRS/data \
        --config.data.val=none --config.eval.select=

The first trains a small model on the built-in scenes from scratch, captions, boxes, questions and
classes together, on 2 CPU cores. `size=8b` has the values of the paper: one epoch, batch 24, 1e-5.
The model lies in WORKDIR/export; `launch.py predict --workdir=... --ask=...` asks it. `:tiny` runs
in seconds.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.geodit_common import geodit_config


def get_config(arg: str | None = None) -> ConfigDict:
    c, published, tiny = geodit_config("sft", arg)
    if not tiny:
        c.batch_size = 24 if published else 32
        c.optim.steps = 0 if published else 3000
    c.optim.lr = 1e-5 if published else 1e-3
    return c.lock()
