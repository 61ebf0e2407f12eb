"""Shared defaults, the `:arg` of a config file, and the `tiny` shrinker.

`--config=configs/satdifuser_probe.py:fuser=moe,dataset=m-eurosat,tiny` calls
`get_config("fuser=moe,dataset=m-eurosat,tiny")`: words are switches, `key=value` are choices.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def parse_arg(arg: str | None, allowed: dict) -> dict:
    """Split `a=1,tiny` into {"a": "1", "tiny": True}, checked against `allowed` {name: default}.

    Raises ValueError on an unknown name, listing the known ones.
    """
    values = dict(allowed)
    for part in filter(None, (arg or "").split(",")):
        name, has_value, value = part.partition("=")
        if name not in allowed:
            raise ValueError(f"config argument {name!r} is unknown; known: {', '.join(allowed)}")
        if isinstance(allowed[name], bool) == bool(has_value):
            form = name if isinstance(allowed[name], bool) else f"{name}=VALUE"
            raise ValueError(f"config argument {part!r}: write it as {form}")
        values[name] = value if has_value else True
    return values


def base_config() -> ConfigDict:
    """Groups that every experiment has; a family adds `model` and `data` and changes values."""
    c = ConfigDict()
    c.task = ""  # which Task launch.py builds
    c.seed = 42
    c.batch_size = 32  # global, over all devices and hosts

    c.optim = ConfigDict()
    c.optim.name = "adam"  # adam (L2 in the gradient) | adamw (decoupled)
    c.optim.lr = 1e-2
    c.optim.min_lr = 1e-5
    c.optim.warmup_lr = 2e-5
    c.optim.schedule = "epoch_cosine"  # epoch_cosine | cosine (per step) | constant
    c.optim.warmup_epochs = 5.0
    c.optim.warmup_share = 0.0  # warm-up as a part of all steps, instead of warmup_epochs
    c.optim.epochs = 40.0  # length of the run, unless steps is given
    c.optim.steps = 0
    c.optim.weight_decay = 0.0
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8
    c.optim.clip = 0.0  # global gradient norm, 0 = off
    c.optim.ema_decay = 0.0  # 0 = off
    c.optim.accumulate = 1  # microbatches per step

    c.mesh = ConfigDict()  # devices per axis; one may be -1 (what is left)
    c.mesh.dcn = 1  # slices that only a data-centre network joins
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.tensor = 1

    c.eval = ConfigDict()
    c.eval.every = 0  # steps; 0 = once per epoch
    c.eval.first = False  # score before step 1, as the published trainer does
    c.eval.batch_size = 0  # 0 = batch_size
    c.eval.select = ""  # "val/<metric>" keeps the best checkpoint; "" = the last one is scored
    c.eval.lower = False  # the smaller the better
    c.eval.patience = 0  # evaluations without a new best before the run ends; 0 = never
    c.eval.params = "ema"  # ema | raw; ema only where optim.ema_decay > 0

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # steps
    c.checkpoint.minutes = 10.0  # also so long after the last one, at a logged step; 0 = never
    c.checkpoint.keep = 2  # the newest
    c.checkpoint.keep_every = 0  # steps whose multiples are kept for good; 0 = none

    c.log = ConfigDict()
    c.log.every = 10  # steps
    c.log.profile = 0  # steps traced into WORKDIR/profile, from the third on
    c.log.stall = 300.0  # seconds without progress before the slow host is named; 0 = never
    c.log.wandb = ""  # W&B project; needs the wandb extra
    return c


def shrink(c: ConfigDict) -> None:
    """What `:tiny` means for the loop: three steps, everything saved and shown."""
    c.batch_size = 4
    c.optim.steps = 3
    c.optim.warmup_epochs = 0.0
    c.eval.every = 3
    c.eval.first = False
    c.log.every = 1
    c.checkpoint.every = 3
