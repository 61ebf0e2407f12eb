"""Pretrain a small DiffusionSat-style UNet, in pixel space or on the latents of a VAE.

    python launch.py train --config=configs/satdifuser_pretrain.py --workdir=runs/pretrain
    python launch.py train --config=configs/satdifuser_pretrain.py:dataset=folder \
        --config.data.train=IMAGES --workdir=runs/pretrain

On the built-in scenes (the default) about 15 minutes on 2 CPU cores; the validation loss falls from
1.0 to about 0.35 and `samples/` shows scenes. The trained pipeline lies in WORKDIR/export, in the
public layout that `--config.model.weights=` of a probe reads. `:tiny` runs in seconds.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import base_config, parse_arg, shrink


def get_config(arg: str | None = None) -> ConfigDict:
    chosen = parse_arg(arg, {"dataset": "scenes", "tiny": False})
    c = base_config()
    c.task = "satdifuser_pretrain"
    c.batch_size = 32

    c.model = ConfigDict()
    c.model.weights = ""  # pipeline folder to continue from; "" = from scratch with the sizes below
    c.model.patch = 4  # pixels per latent pixel, without a VAE
    c.model.vae = ""  # folder of a VAE; "" = space-to-depth by `patch`
    c.model.channels = (64, 128, 192)  # width per level
    c.model.layers_per_block = 2
    c.model.heads = (2, 4, 6)
    c.model.attention_levels = (False, True, True)  # transformers per level
    c.model.context_dim = 64
    c.model.metadata = True  # the seven metadata embeddings
    c.model.prediction_type = "v_prediction"  # v_prediction | epsilon
    c.model.min_snr_gamma = 5.0  # 0 = plain mean squared error
    c.model.min_snr_mode = "corrected"  # corrected | published (epsilon form on v targets)
    c.model.metadata_dropout = 0.1  # chance of each field of each image to become 0
    c.model.dtype = "float32"

    c.data = ConfigDict()
    c.data.name = chosen["dataset"]
    c.data.train = ""  # folders, separated by commas (dataset=folder)
    c.data.exclude = ""  # JSON list of image names that must not be seen
    c.data.size = 100_000  # scenes drawn for training; each is made when it is read
    c.data.val_size = 256
    c.data.holdout = 0.05  # share of images for the validation loss (dataset=folder)
    c.data.side = 64  # pixels
    c.data.smallest_crop = 40  # pixels of the picture before resizing; 0 = centre crop
    c.data.largest_crop = 0  # 0 = the short side
    c.data.flips = True  # flips and quarter turns: a nadir image has no up
    c.data.on_corrupt = "refuse"  # refuse | skip
    c.data.workers = 0

    c.optim.name = "adamw"
    c.optim.lr = 1e-3
    c.optim.min_lr = 1e-5
    c.optim.warmup_lr = 0.0
    c.optim.schedule = "cosine"
    c.optim.warmup_epochs = 1.0
    c.optim.steps = 6000
    c.optim.weight_decay = 1e-2
    c.optim.clip = 1.0
    c.optim.ema_decay = 0.999

    c.eval.every = 1000
    c.eval.select = ""
    c.eval.lower = True
    c.eval.samples = 16  # pictures drawn at each evaluation; 0 = none
    c.eval.sample_steps = 20
    c.log.every = 50

    if chosen["tiny"]:
        shrink(c)
        c.model.channels = (16, 32)
        c.model.heads = (2, 2)
        c.model.attention_levels = (False, True)
        c.model.layers_per_block = 1
        c.model.context_dim = 16
        c.data.side = 32
        c.data.size = 64
        c.data.val_size = 8
        c.eval.samples = 4
        c.eval.sample_steps = 2
    return c.lock()
