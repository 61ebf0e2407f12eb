"""A masked-diffusion training step of the 100m text core, side by side with torch on the CPU.

    python -m benchmarks.train_step [--batch=4] [--length=768] [--answer=0] [--repeats=4]

Both sides have the same weights, tokens and masks, float32, AdamW, clipping. Ours is the step of
the training loop. The peer is the public way: transformers' LlamaModel with a 4-D mask of zeros,
logits of all positions, cross-entropy of the masked ones. Sides alternate in one process; medians,
tokens per second and their ratio are printed, then the peak memory of one child process a side.
--answer: targets at the end of each sequence; 0 makes every position one (pretraining). About 4
minutes on 2 cores; 12 GB.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's waiting threads would slow ours
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(".cache/xla").absolute()))

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.measure import alternate, peak_during, run_child
from common_jax.compiler import compiler_options
from common_jax.files import write_json
from common_jax.host_memory import use_huge_pages
from common_jax.optim import make_optimizer
from common_jax.report import format_table
from common_jax.train_step import TrainState, make_step
from configs.geodit_pretrain import get_config
from geodit_jax.flops import core_flops, head_flops
from geodit_jax.masking import IGNORED, draw_masks
from geodit_jax.task import GeoDiTTask

BATCH = flags.DEFINE_integer("batch", 4, "Sequences a step.")
LENGTH = flags.DEFINE_integer("length", 768, "Tokens of a sequence.")
ANSWER = flags.DEFINE_integer("answer", 0, "Targets at the end of a sequence; 0 is all tokens.")
REPEATS = flags.DEFINE_integer("repeats", 4, "Timed steps a side; medians are reported.")
OUT = flags.DEFINE_string("out", "benchmarks/results/train_step.json", "Where the numbers go.")
MEMORY = flags.DEFINE_enum("memory", "", ["", "ours", "torch"], "Internal: steps, then peak.")
LEARNING_RATE = 1e-4


def make_batches(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    batches = []
    for step in range(count):
        ids = rng.integers(0, 31_000, (BATCH.value, LENGTH.value)).astype(np.int32)
        labels = ids.copy()
        labels[:, : -ANSWER.value or 0] = IGNORED
        batches.append(
            {
                "ids": ids,
                "labels": labels,
                "turns": np.zeros_like(ids),
                "length": np.full(BATCH.value, LENGTH.value, np.int32),
                "cut": np.zeros(BATCH.value, np.int32),
                "index": np.arange(BATCH.value) + step * BATCH.value,
            }
        )
    return batches


def make_config():
    config = get_config("size=100m,data=jsonl")
    with config.unlocked():
        config.optim.lr, config.optim.weight_decay = LEARNING_RATE, 0.0
    return config


class Ours:
    """The step of the training loop, on one device."""

    def __init__(self, batches):
        config = make_config()
        self.task, self.batches, self.key = GeoDiTTask(config), batches, jax.random.key(0)
        tx = make_optimizer(config.optim, lambda step: LEARNING_RATE)
        params = jax.device_put(self.task.init(0)[0])
        state = TrainState(jnp.zeros((), jnp.int32), params, {}, {}, jax.jit(tx.init)(params))
        step = jax.jit(
            make_step(self.task, tx, config),
            static_argnums=4,
            donate_argnums=0,
            compiler_options=compiler_options(),
        )
        self.program = step.lower(state, {}, self._batch(0), self.key, None).compile()
        self.state, self.done, self.losses = state, 0, []

    def _batch(self, number: int):
        return jax.device_put(self.batches[number % len(self.batches)])

    def step(self):
        self.state, metrics = self.program(self.state, {}, self._batch(self.done), self.key)
        jax.block_until_ready(self.state)
        self.losses.append(float(metrics["loss"]))
        self.done += 1


def draw(batch, key):
    """The masks that our step draws, as numpy: (where, p)."""
    masks = draw_masks(key, jnp.asarray(batch["index"]), batch["labels"] != IGNORED)
    return np.array(masks.where), np.array(masks.p)


def make_llama(core, text):
    """(LlamaModel, head) of torch with the weights of a core."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    with torch.device("meta"):
        model = LlamaModel(
            LlamaConfig(
                vocab_size=text.vocab_rows,
                hidden_size=text.width,
                intermediate_size=text.mlp,
                num_hidden_layers=text.layers,
                num_attention_heads=text.heads,
                num_key_value_heads=text.kv_heads,
                rms_norm_eps=text.eps,
                rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
            )
        )
        head = torch.nn.Linear(text.width, text.vocab_rows, bias=False)
    state = {
        "embed_tokens.weight": core["embed_tokens"]["embedding"],
        "norm.weight": core["norm"]["scale"],
    }
    layers, _ = jax.tree_util.tree_flatten_with_path(core["layers"])
    for path, stack in layers:
        *names, leaf = (key.key for key in path)
        for i, value in enumerate(stack):
            state[f"layers.{i}.{'.'.join(names)}.weight"] = value.T if leaf == "kernel" else value
    state = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in state.items()}
    model.load_state_dict(state, assign=True)
    kernel = torch.tensor(np.ascontiguousarray(core["lm_head"]["kernel"].T))
    head.load_state_dict({"weight": kernel}, assign=True)
    model.rotary_emb = type(model.rotary_emb)(model.config)  # its table is no parameter
    return model.train(), head


class Torch:
    """LlamaModel, a head on every position, AdamW."""

    def __init__(self, batches):
        import torch

        torch.set_num_threads(os.cpu_count())
        task = GeoDiTTask(make_config())
        self.torch, self.mask = torch, task.model.tokens.mask
        self.model, self.head = make_llama(task.init(0)[0]["core"], task.model.text)
        self.weights = [*self.model.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
        )
        key = jax.random.key(0)
        self.batches = [(batch, *draw(batch, key)) for batch in batches]
        self.done, self.losses = 0, []

    def step(self):
        torch = self.torch
        batch, where, p = self.batches[self.done % len(self.batches)]
        where, p = torch.from_numpy(where), torch.from_numpy(p)[:, None]
        ids, labels = (torch.from_numpy(batch[name]).long() for name in ("ids", "labels"))
        noisy = torch.where(where, self.mask, ids)
        visible = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
        hidden = self.model(input_ids=noisy, attention_mask=visible, use_cache=False)
        logits = self.head(hidden.last_hidden_state).float()
        nll = torch.nn.functional.cross_entropy(logits[where], labels[where], reduction="none")
        counts = (labels != IGNORED).sum(1, keepdim=True)
        loss = (nll / (p * counts).expand(labels.shape)[where]).sum() / len(ids)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.done += 1


def count_operations() -> float:
    """TFLOP of a step where half of the targets are masked, nothing computed twice."""
    text = GeoDiTTask(make_config()).model.text
    rows = (ANSWER.value or LENGTH.value) / 2
    one = core_flops(text, LENGTH.value) + head_flops(text, rows)
    return 3 * BATCH.value * one / 1e12


def main(_):
    batches = make_batches(REPEATS.value + 2)
    if MEMORY.value:
        side = Ours(batches) if MEMORY.value == "ours" else Torch(batches)
        side.step()
        print(peak_during(side.step))
        return
    ours, peer = Ours(batches), Torch(batches)
    found = alternate({"torch step": peer.step, "our step": ours.step}, REPEATS.value)
    worst = max(abs(a / b - 1) for a, b in zip(ours.losses, peer.losses))
    median = {name: statistics.median(times) for name, times in found.items()}
    flags_ = [f"--{f.name}={f.value}" for f in (BATCH, LENGTH, ANSWER)]
    memory = {
        side: run_child("benchmarks.train_step", [f"--memory={side}", *flags_])
        for side in ("torch", "ours")
    }
    tokens = BATCH.value * LENGTH.value
    rows = [
        {
            "side": side,
            "s": median[name],
            "tokens/s": tokens / median[name],
            "peak GiB": memory[side],
        }
        for side, name in (("torch", "torch step"), ("ours", "our step"))
    ]
    ratio = median["torch step"] / median["our step"]
    rows.append({"side": "ratio (bars 1.5, 1)", "tokens/s": ratio,
                 "peak GiB": memory["ours"] / memory["torch"]})  # fmt: skip
    title = (
        f"One step of the 100m text core, {BATCH.value} x {LENGTH.value}, "
        f"{ANSWER.value or LENGTH.value} targets a sequence, {os.cpu_count()} cores"
    )
    columns = ["side", ("s", ".2f"), ("tokens/s", ".2f"), ("peak GiB", ".2f")]
    print(format_table(rows, columns, title=title))
    rate = count_operations() / median["our step"]
    print(f"losses of {len(ours.losses)} steps differ by at most {worst:.1e} (relative)")
    print(f"ours: {count_operations():.2f} TFLOP a step, {rate * 1000:.0f} GFLOP/s")
    write_json(OUT.value, {"seconds": found, "ratio": ratio, "peak GiB": memory, "losses": worst})


if __name__ == "__main__":
    use_huge_pages()
    app.run(main)
