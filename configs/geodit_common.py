"""What the three GeoDiT configs share: the model, the objective, the records, the optimiser.

`size=8b` takes the values of the GeoDiT paper, which continues from trained weights. The smaller
sizes are trained from scratch, which needs larger steps; the built-in scenes are their default.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import base_config, parse_arg, shrink

ARGUMENTS = {"size": "tiny", "data": "scenes", "tiny": False}


def geodit_config(stage: str, arg: str | None) -> tuple[ConfigDict, bool, bool]:
    """(config of a stage, whether it is the paper's size, whether it is `tiny`); still open."""
    chosen = parse_arg(arg, ARGUMENTS)
    published = chosen["size"] == "8b"
    c = base_config()
    c.task = "geodit"

    c.model = ConfigDict()
    c.model.weights = ""  # folder of LLaDA, LLaDA-V or GeoDiT; "" = from scratch, of `size`
    c.model.tower_weights = ""  # SigLIP folder, where `weights` has no tower
    c.model.tokenizer = ""  # folder; "" = that of `weights`, else made from the training texts
    c.model.size = chosen["size"]  # 8b | 1b | 100m | tiny
    c.model.image_mode = ""  # square | pad | anyres; "" = that of the weights, else square
    c.model.merge = ""  # flat | spatial | spatial_unpad; "" = that of the weights
    c.model.prefix_lm = False  # questions see no answers: the prefix cache is then exact
    c.model.dtype = "bfloat16" if published else "float32"  # of the computation
    c.model.remat = "full" if published else "none"  # none | dots | full: computed again

    c.train = ConfigDict()
    c.train.stage = stage  # align | sft | pretrain
    c.train.label_policy = "llada_v"  # llada_v | response_only
    c.train.loss_weighting = "1/p"  # 1/p | none
    c.train.turn_mask = False  # a turn sees no later turn
    c.train.antithetic = False  # times spread evenly over a batch
    c.train.complementary = False  # every answer twice, with opposite masks
    c.train.at_least_one = False  # no sequence without a masked target

    c.lora = ConfigDict()  # adapters on the text core, trained instead of everything else
    c.lora.rank = 0  # 0 = off: train.stage says what is trained
    c.lora.alpha = 32.0  # their product counts alpha / rank times
    c.lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    c.data = ConfigDict()
    c.data.name = chosen["data"]  # record sets, joined by `+`
    c.data.root = ""  # their files or folders, joined by `+`
    c.data.weights = ()  # how often each is drawn; () = by their lengths
    c.data.size = 8192 if chosen["data"] == "scenes" else 0  # training records, 0 = all
    c.data.val = ""  # sets for validation; "" = those of training (of sets without splits, pictures
    # held out of it), none = no validation
    c.data.val_root = ""
    c.data.val_size = 250  # records of each set, 0 = all
    c.data.side = 0  # pixels of scenes; 0 = what the tower takes
    c.data.kinds = ()  # scenes: kinds of records in turn, twice = twice as often; () = every kind
    c.data.max_boxes = 2  # scenes: detection asks for objects that come at most so often, 0 = any
    c.data.keep = 2**31  # bytes of decoded pictures that stay in memory
    c.data.on_bad = "refuse"  # refuse | skip records that cannot be used
    c.data.codec = "unit2" if published else "int100"  # boxes: unit2 | int100 | int1000 | pixel
    c.data.prompts = ""  # TOML file that replaces single texts of geodit_jax/prompts.toml
    c.data.system = "llada_v" if published else "none"  # the system message: llada_v | none
    c.data.text_length = 512 if published else 96  # positions for text, beside those of pictures
    c.data.on_long = "cut"  # cut | refuse texts that do not fit
    c.data.blind = False  # leave pictures out
    c.data.workers = 0

    c.answer = ConfigDict()  # window of the last answer by task, in tokens; 0 = as long as it is
    c.answer.caption = 16 if published else 32
    c.answer.grounding = 32
    c.answer.detection = 32 if published else 40
    c.answer.vqa = 8
    c.answer.classification = 8
    c.answer.chat = 0

    c.optim.name = "adamw"
    c.optim.b2 = 0.95
    c.optim.min_lr = 0.0
    c.optim.warmup_lr = 0.0
    c.optim.schedule = "cosine"
    c.optim.warmup_epochs = 0.0
    c.optim.warmup_share = 0.03
    c.optim.epochs = 1.0
    c.optim.clip = 1.0
    c.optim.tower_lr = 0.0  # of the vision tower; 0 = as the rest

    c.eval.every = 1000 if published else 250
    c.eval.select = "val/loss"
    c.eval.lower = True
    c.log.every = 10 if published else 50
    if chosen["tiny"]:
        shrink(c)
        c.optim.warmup_share = 0.0
        c.data.size, c.data.val_size = 64, 8
    return c, published, chosen["tiny"]
