"""Pretraining of the text core alone: every token of a text is a target (LLaDA).

    python launch.py train --config=configs/geodit_pretrain.py --workdir=runs/pretrain
    python launch.py train --config=configs/geodit_pretrain.py:size=100m,data=jsonl \
        --workdir=runs/text --config.data.root=TEXTS.jsonl --config.data.val=none \
        --config.eval.select=

TEXTS.jsonl has a text a line, `{"text": "..."}`, or records. Texts stand one behind the other in
blocks of `data.text_length` tokens, each ended by an end-of-text token; one block in a hundred is
cut to a random length. Instruction tuning on text is `geodit_sft.py` with chat records that have no
picture. `:tiny` runs in seconds.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.geodit_common import geodit_config


def get_config(arg: str | None = None) -> ConfigDict:
    c, published, tiny = geodit_config("pretrain", arg)
    c.data.text_length = 4096 if published else 128
    if not tiny:
        c.batch_size = 32
        c.optim.steps = 0 if published else 1000
        if c.data.name == "scenes":
            c.data.size = 2000  # all are drawn before the first step
    c.optim.lr = 4e-4 if published else 1e-3
    c.optim.weight_decay = 0.1
    return c.lock()
