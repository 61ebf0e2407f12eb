"""Alignment of GeoDiT: only the projector learns, captions behind pictures (stage I of the paper).

    python launch.py train --config=configs/geodit_align.py:size=8b,data=skyscript \
        --workdir=runs/stage1 --config.model.weights=LLADA --config.model.tower_weights=SIGLIP2 \
        --config.data.root=SKYSCRIPT/train.csv
    python launch.py train --config=configs/geodit_align.py --workdir=runs/align \
        --config.model.weights=runs/pretrain/export

Tower and text core are frozen: they carry no gradient and no optimiser state. Without
`model.weights` they are random, which only shows that it runs. `size=8b` has the values of the
paper: one epoch, batch 96, 1e-3. `:tiny` runs in seconds.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.geodit_common import geodit_config


def get_config(arg: str | None = None) -> ConfigDict:
    c, published, tiny = geodit_config("align", arg)
    c.model.merge = "flat"  # a picture is its tokens, without the newline vector
    if not tiny:
        c.batch_size = 96 if published else 32
        c.optim.steps = 0 if published else 1000
    c.optim.lr = 1e-3
    return c.lock()
