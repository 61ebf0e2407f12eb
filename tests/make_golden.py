"""Makes tests/golden/satdifuser_own: a tiny pipeline, its heads and their outputs, all by torch.

    python tests/make_golden.py

Same layout as the vectors of the published code, so every golden test runs on it. The networks are
those of torch diffusers and transformers; metadata embeddings, inversion, fusers and decoders are
written here and in torch_heads.py from their definition. Weights are rounded to float16 on disk.
"""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers.models.embeddings import TimestepEmbedding
from safetensors.torch import save_file
from torch_heads import TorchHead
from torch_oracle import randomise
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from satdifuser_jax.heads import HeadSpec
from satdifuser_jax.schedule import Schedule
from satdifuser_jax.taps import Scale
from satdifuser_jax.text_encoder import TextConfig
from satdifuser_jax.unet import UNetConfig
from satdifuser_jax.vae import VAEConfig

OUT = Path(__file__).parent / "golden" / "satdifuser_own"
PROMPT, SIDE, KEYS, STEPS = "A satellite image", 16, [48, 47, 44], 50
UNET = UNetConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=16,
    attention_head_dim=(2, 4),
    norm_num_groups=4,
    sample_size=8,
    num_metadata=7,
)
VAE = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=16)
TEXT = TextConfig(
    vocab_size=514,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
)
HEADS = {
    "gw_segmentation": dict(num_classes=3, output_side=20, channels=8, rescales=(1, 1)),
    "lw_classification": dict(num_classes=4),
    "moe_classification": dict(num_classes=4, num_experts=3),
}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def settle(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Parameters off their initial values, and exactly representable in float16."""
    for parameter in randomise(module, seed).parameters():
        parameter.data = parameter.data.half().float()
    return module


def half(state: dict) -> dict:
    return {
        name: value.half() if value.is_floating_point() else value
        for name, value in state.items()
        if not name.endswith("position_ids")
    }


class Pipeline:
    def __init__(self):
        torch.manual_seed(3)
        self.unet = diffusers.UNet2DConditionModel.from_config(UNET.to_dict())
        fields = (TimestepEmbedding(8, 32) for _ in range(UNET.num_metadata))
        self.unet.metadata_embedding = torch.nn.ModuleList(fields)
        self.vae = diffusers.AutoencoderKL.from_config(VAE.to_dict())
        config = transformers.CLIPTextConfig.from_dict(TEXT.to_dict())
        self.text = transformers.CLIPTextModel(config)
        for seed, module in enumerate((self.unet, self.vae, self.text)):
            settle(module, seed)
        self.metadata = None
        self.unet.time_embedding.register_forward_hook(self._add_metadata)
        schedule = Schedule().to_config()
        self.alphas = diffusers.DDIMScheduler.from_config(schedule).alphas_cumprod

    def _add_metadata(self, module, inputs, emb):
        for i, field in enumerate(self.unet.metadata_embedding):
            emb = emb + field(self.unet.time_proj(self.metadata[:, i]))
        return emb

    def call(self, x, t, context) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Epsilon and the taps by side: block by block, attn1 then conv2."""
        taps, hooks = {}, []
        names = [name for name, _ in self.unet.named_modules() if name.startswith("up_blocks")]
        for name in names:
            if name.endswith((".attn1", ".conv2")):
                hook = self._keeper(taps, name)
                hooks.append(self.unet.get_submodule(name).register_forward_hook(hook))
        y = self.unet(x, t, context).sample
        for hook in hooks:
            hook.remove()
        sides: dict[int, list[torch.Tensor]] = {}
        for block in range(2):
            for suffix in (".attn1", ".conv2"):
                for name in names:
                    if name.startswith(f"up_blocks.{block}.") and name.endswith(suffix):
                        sides.setdefault(taps[name].shape[-1], []).append(taps[name])
        return y, sides

    @staticmethod
    def _keeper(taps, name):
        def keep(module, inputs, out):
            if out.ndim == 3:  # tokens, row by row
                side = int(out.shape[1] ** 0.5)
                out = out.transpose(1, 2).reshape(len(out), -1, side, side)
            taps[name] = out

        return keep

    def invert(self, z0, context):
        """{key: (x0, taps by side)} of DDIM inversion, the output used as epsilon."""
        x, found, r = z0, {}, 1000 // STEPS
        for i in range(STEPS - min(KEYS)):
            t = -1 if i == 0 else r * (i - 1) + 1
            a = torch.tensor(1.0) if t < 0 else self.alphas[t]
            b = self.alphas[r * i + 1]
            e, taps = self.call(x, torch.full((len(x),), float(t)), context)
            x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
            if STEPS - 1 - i in KEYS:
                found[STEPS - 1 - i] = (x0, taps)
            x = b.sqrt() * x0 + (1 - b).sqrt() * e
        return found


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level vocabulary without merges; id 0 is "!", the padding of SD 2."""
    folder.mkdir(parents=True)
    letters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special["unk_token"] = "<|endoftext|>"
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    for name, extra in (
        ("tokenizer_config.json", {**config, "pad_token": "<|endoftext|>"}),
        ("special_tokens_map.json", {"pad_token": "!"}),
    ):
        (folder / name).write_text(json.dumps({**special, **extra}))
    return CLIPTokenizer.from_pretrained(folder, pad_token="!")


def write_checkpoint(pipeline: Pipeline, folder: Path) -> None:
    text = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 0}
    configs = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
    for name, config in configs.items():
        (folder / name).mkdir(parents=True)
        content = config.to_dict() | (text if name == "text_encoder" else {})
        (folder / name / "config.json").write_text(json.dumps(content, indent=1))
    (folder / "scheduler").mkdir()
    schedule = json.dumps(Schedule().to_config(), indent=1)
    (folder / "scheduler" / "scheduler_config.json").write_text(schedule)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(half(pipeline.unet.state_dict()), unet)
    vae = {}
    for name, value in half(pipeline.vae.state_dict()).items():
        for new, old in OLD_NAMES.items():
            if f".attentions.0.{new}." in name:
                name = name.replace(new, old)
        vae[name] = value
    torch.save(vae, folder / "vae" / "diffusion_pytorch_model.bin")
    state = half(pipeline.text.state_dict())
    state = {f"text_model.{name.removeprefix('text_model.')}": v for name, v in state.items()}
    save_file(state, folder / "text_encoder" / "model.safetensors")


def run_head(name: str, spec: HeadSpec, features, labels) -> tuple[dict, dict]:
    """(state dict, arrays) of one head in eval mode."""
    torch.manual_seed(7)
    head = settle(TorchHead(spec), 11)
    for module in head.modules():
        if hasattr(module, "gate_network"):  # off uniform, where the balance loss is all rounding
            module.gate_network[0].weight.data *= 16
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn_like(module.running_mean).half().float())
            module.running_var.copy_((torch.rand_like(module.running_var) + 0.5).half().float())
    logits, extra = head(features)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    norm = sum((p.grad**2).sum() for p in head.parameters() if p.grad is not None).sqrt()
    arrays = {"logits": logits, "loss": loss, "gradnorm": norm}
    if spec.fuser == "gw":
        arrays["mixing"] = extra
    elif spec.fuser == "lw":
        arrays |= {f"gate{i}": gate for i, gate in enumerate(extra)}
    else:
        arrays["logits_topk"], sparse = head(features, dense=False)
        arrays["lb_loss_warm"], arrays["lb_loss_topk"] = balance(extra), balance(sparse)
    return half(head.published_state()), {f"{name}/{key}": v for key, v in arrays.items()}


def balance(shares: list[list[torch.Tensor]]) -> torch.Tensor:
    """The published value: the last scale's sum over keys, divided by scales and keys."""
    total = 0.0
    for share in shares[-1]:
        u = share.mean(0)
        total -= (u * torch.log(len(u) * u + 1e-8)).sum()
    return total / (len(shares) * len(shares[-1]))


def backbone_arrays(pipeline: Pipeline, tokenizer, rng) -> tuple[dict, dict[int, list[int]]]:
    """(arrays of everything but the heads, widths of the taps by side, fine to coarse)."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, np.float32))

    images = torch.from_numpy(rng.uniform(-1, 1, (2, 3, SIDE, SIDE)).astype(np.float32))
    pipeline.metadata = torch.from_numpy(rng.uniform(0, 1000, (2, 7)).astype(np.float32))
    posterior = pipeline.vae.encode(images).latent_dist
    latents = posterior.mean * VAE.scaling_factor
    ids = tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt")
    context = pipeline.text(ids["input_ids"]).last_hidden_state.expand(2, -1, -1)
    x, emb, t = draw(2, 4, 8, 8), draw(2, 77, 16), torch.tensor([7, 501])
    arrays = {
        "images": images,
        "metadata": pipeline.metadata,
        "latent_mean": posterior.mean,
        "latent_logvar": posterior.logvar,
        "latents": latents,
        "vae_recon": pipeline.vae.decode(latents / VAE.scaling_factor).sample,
        "inversion/prompt_embeds": context,
        "unet/x": x,
        "unet/t": t,
        "unet/emb": emb,
        "unet/y": pipeline.call(x, t, emb)[0],
    }
    widths = {}
    for key, (x0, taps) in pipeline.invert(latents, context).items():
        arrays[f"inversion/x0/{key}"] = x0
        for side in sorted(taps, reverse=True):
            arrays[f"inversion/feats/{key}/{side}"] = torch.cat(taps[side], 1)
            widths[side] = [tap.shape[1] for tap in taps[side]]
    return arrays, widths


def head_spec(name: str, widths: dict[int, list[int]]) -> HeadSpec:
    fuser, task = name.split("_")
    return HeadSpec(
        task=task,
        fuser=fuser,
        scales=tuple(Scale(side, ("",) * len(w), tuple(w)) for side, w in widths.items()),
        num_keys=len(KEYS),
        projection_dim=128,
        lw_input="first_tap" if fuser == "lw" else "own_tap",  # as the published code has it
        pool_scales=(1, 2),
        **HEADS[name],
    )


def describe_head(spec: HeadSpec) -> dict:
    same = ("task", "fuser", "num_classes", "projection_dim", "num_experts", "top_k", "channels")
    return {
        **{name: getattr(spec, name) for name in (*same, "pool_scales", "ignore_index")},
        "save_timesteps": KEYS,
        "output_size": spec.output_side,
        "rescales": list(spec.rescales or (1,) * len(spec.scales)),
    }


def main() -> None:
    pipeline, rng = Pipeline(), np.random.default_rng(5)
    tokenizer = write_tokenizer(OUT / "checkpoint" / "tokenizer")
    write_checkpoint(pipeline, OUT / "checkpoint")
    with torch.no_grad():
        arrays, widths = backbone_arrays(pipeline, tokenizer, rng)
    maps = [[arrays[f"inversion/feats/{key}/{side}"] for key in KEYS] for side in widths]
    features = [torch.stack(keys, 1).permute(0, 1, 3, 4, 2) for keys in maps]
    arrays["labels"] = torch.from_numpy(rng.integers(0, 3, 2))
    arrays["seg_labels"] = torch.from_numpy(rng.integers(0, 3, (2, 20, 20)))
    arrays["seg_labels"][:, :4, :4] = -100
    heads = {}
    for name in HEADS:
        spec = head_spec(name, widths)
        labels = arrays["seg_labels" if task_is_dense(spec) else "labels"]
        state, found = run_head(name, spec, features, labels)
        torch.save(state, OUT / f"{name}.pth")
        arrays |= found
        heads[name] = describe_head(spec)
    arrays = {name: value.detach().numpy() for name, value in arrays.items()}
    np.savez_compressed(OUT / "reference.npz", **arrays)
    inversion = {
        "num_timesteps": STEPS,
        "save_timesteps": KEYS,
        "batch_size": 2,
        "resize_outputs": -1,
        "img_size": SIDE,
        "prompt": PROMPT,
        "diffusion_mode": "inversion",
        "layer_idxs": {"up_blocks": {"attn1": "all", "conv2": "all"}},
        "dims": {str(side): sizes for side, sizes in widths.items()},
    }
    meta = {"variant": "own", "inversion": inversion, "heads": heads}
    (OUT / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def task_is_dense(spec: HeadSpec) -> bool:
    return spec.task == "segmentation"


if __name__ == "__main__":
    main()
