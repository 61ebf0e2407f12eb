"""Pretrain a DiffusionSat-style UNet, in pixel space or on the latents of a VAE.

    python launch.py train --config=configs/satdifuser_pretrain.py --workdir=runs/pretrain
    python launch.py train --config=configs/satdifuser_pretrain.py:dataset=folder \
        --config.data.train=IMAGES --workdir=runs/pretrain
    python launch.py train --config=configs/satdifuser_pretrain.py:dataset=satellite,published \
        --config.data.train=RECORDS --config.model.weights=SD21 --workdir=runs/diffusionsat

On the built-in scenes (the default) about 15 minutes on 2 CPU cores; the validation loss falls from
1.0 to about 0.35 and `samples/` shows scenes. The trained pipeline lies in WORKDIR/export, in the
public layout that `--config.model.weights=` of a probe reads. `size=sd21` is Stable Diffusion 2.1
from scratch, `published` that size with the recipe of DiffusionSat (`side=512`: that of its larger
release). `:tiny` runs in seconds.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import base_config, parse_arg, shrink


def get_config(arg: str | None = None) -> ConfigDict:
    allowed = {"dataset": "scenes", "size": "small", "side": "", "published": False}
    allowed |= {"tiny": False}
    chosen = parse_arg(arg, allowed)
    c = base_config()
    c.task = "satdifuser_pretrain"
    c.batch_size = 32

    c.model = ConfigDict()
    c.model.weights = ""  # pipeline folder to continue from; "" = from scratch with the sizes below
    c.model.patch = 4  # pixels per latent pixel, without a VAE
    c.model.vae = ""  # folder, or sd21 (only to plan); "" = that of the weights, else patches
    c.model.text = ""  # folder with text_encoder/ and tokenizer/, sd21, none; "" = as for the VAE
    c.model.channels = (64, 128, 192)  # width per level
    c.model.layers_per_block = 2
    c.model.heads = (2, 4, 6)
    c.model.attention_levels = (False, True, True)  # transformers per level
    c.model.context_dim = 64  # without a text tower
    c.model.metadata = True  # the seven metadata embeddings
    c.model.prediction_type = ""  # v_prediction | epsilon; "" = that of the weights, else v
    c.model.zero_snr = False  # the last time is pure noise; False = as SD 2.1, or the weights
    c.model.min_snr_gamma = 5.0  # 0 = plain mean squared error
    c.model.min_snr_mode = "corrected"  # corrected | published (epsilon form on v targets)
    c.model.metadata_dropout = 0.1  # chance of each field of each image to become 0
    c.model.caption_dropout = 0.1  # chance of the empty prompt instead of the caption
    c.model.noise_offset = 0.0  # of one more draw of noise a channel and image, added to the noise
    c.model.input_perturbation = 0.0  # of one more draw, added to what is seen, not to the target
    c.model.dtype = "float32"
    c.model.vae_dtype = "float32"  # of the frozen VAE: float32 | bfloat16 | float16
    c.model.remat = "none"  # none | dots | full: what the backward pass computes again

    c.data = ConfigDict()
    c.data.name = chosen["dataset"]
    c.data.train = ""  # folders, separated by commas (folder); tars, records or a CSV (satellite)
    c.data.weights = ()  # how often each of several is drawn; () = by length (satellite)
    c.data.places = ""  # CSV file with the polygons of fMoW, for tars (satellite)
    c.data.exclude = ""  # JSON list of image names that must not be seen
    c.data.size = 100_000  # scenes drawn for training; each is made when it is read
    c.data.val_size = 256  # pictures of the validation loss, spread over those held out; 0 = all
    c.data.holdout = 0.05  # share of images for the validation loss (folder, satellite)
    c.data.side = 64  # pixels
    c.data.smallest_crop = 40  # pixels of the picture before resizing; 0 = centre crop
    c.data.largest_crop = 0  # 0 = the short side
    c.data.flips = True  # flips and quarter turns: a nadir image has no up
    c.data.on_corrupt = "refuse"  # refuse | skip
    c.data.workers = 0
    c.data.cache = "none"  # none | latents | all (text embeddings too); needs fixed pixels
    c.data.cache_dir = ".cache/pretrain"

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
    c.eval.guidance = 1.0  # of those pictures; above 1 the caption and metadata weigh more
    c.log.every = 50

    if chosen["published"] or chosen["size"] == "sd21":
        enlarge(c, int(chosen["side"] or 256))
    elif chosen["size"] != "small":
        raise ValueError(f"size={chosen['size']!r}: known are small and sd21")
    if chosen["side"]:
        c.data.side = int(chosen["side"])
    if chosen["dataset"] == "satellite":
        keep_captions_true(c)
    if chosen["published"]:
        follow_diffusionsat(c)
    if chosen["tiny"]:
        shrink_model(c)
    return c.lock()


def enlarge(c: ConfigDict, side: int) -> None:
    """The sizes of Stable Diffusion 2.1, for pictures of `side` pixels."""
    c.model.vae = c.model.text = "sd21"
    c.model.channels = (320, 640, 1280, 1280)
    c.model.heads = (5, 10, 20, 20)
    c.model.attention_levels = (True, True, True, False)
    c.model.context_dim = 1024
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.data.side = side
    c.data.smallest_crop = side * 3 // 4
    c.batch_size = 64
    c.optim.lr = 1e-4
    c.optim.ema_decay = 0.9999
    c.optim.steps = 150_000


def keep_captions_true(c: ConfigDict) -> None:
    """Whole pictures, upright: captions tell places and numbers, "1 tower in the top left"."""
    c.data.smallest_crop = 0
    c.data.flips = False
    c.eval.guidance = 3.0


def follow_diffusionsat(c: ConfigDict) -> None:
    """What DiffusionSat was trained with: captions lose parts, they are never left out whole."""
    c.model.min_snr_mode = "published"
    c.model.caption_dropout = 0.0
    c.data.smallest_crop = 0
    c.data.flips = False
    c.optim.lr = 4e-6 if c.data.side < 512 else 2e-6
    c.optim.schedule = "constant"
    c.optim.warmup_epochs = 0.0
    c.checkpoint.every = 500
    c.checkpoint.keep_every = 10_000


def shrink_model(c: ConfigDict) -> None:
    """What `:tiny` means here, beside three steps: two narrow levels and 32 pixels."""
    shrink(c)
    c.model.vae = c.model.text = ""
    c.model.channels = (16, 32)
    c.model.heads = (2, 2)
    c.model.attention_levels = (False, True)
    c.model.layers_per_block = 1
    c.model.context_dim = 16
    c.model.dtype = "float32"
    c.data.side = 32
    c.data.size = 64
    c.data.val_size = 8
    c.eval.samples = 4
    c.eval.sample_steps = 2
