"""Decoding one answer, side by side with the published sampler in torch.

    python -m benchmarks.decode [--batches=1,8] [--repeats=3] [--json=FILE]

A prompt of 805 tokens, 32 answer tokens, 8 steps, text core of size `100m`, float32, random
weights, the same ones on both sides. The peer is the published sampler over a LlamaModel of torch
`transformers` whose 4-D mask hides nothing: prompt and answer are computed at every step, the head
at all positions, confidence as a float64 softmax. Ours: the exact mode, and the prefix cache. Sides
alternate in one process; medians, ratios, the operations that the matmuls of each side need, and
the share of equal tokens are printed. About 15 minutes on 2 cores; 6 GB.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's waiting threads would slow ours

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import app, flags

from benchmarks.measure import alternate
from common_jax.files import write_json
from common_jax.host_memory import use_huge_pages
from common_jax.report import format_table
from geodit_jax import llada
from geodit_jax.config import GeoDiTConfig, find_size
from geodit_jax.decode_config import DecodeConfig
from geodit_jax.model import init_model
from geodit_jax.sampler import generate

SIZE = flags.DEFINE_string("size", "100m", "Name of the model.")
BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Prompts decoded at once.")
PREFIX = flags.DEFINE_integer("prefix", 805, "Tokens of a prompt.")
LENGTH = flags.DEFINE_integer("length", 32, "Tokens of an answer.")
STEPS = flags.DEFINE_integer("steps", 8, "Steps.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Alternating repetitions of batch 1; larger: one.")
JSON = flags.DEFINE_string("json", "", "Where the numbers go; empty: nowhere.")
BARS = {("exact", 1): 1.5, ("prefix cache", 1): 6.0, ("prefix cache", 8): 9.0}


# ------------------------------------------------------------------------------------------- peer
class Torch:
    """The published sampler: everything again at every step."""

    def __init__(self, config: GeoDiTConfig, core: dict):
        torch.set_num_threads(os.cpu_count())
        text = config.text
        settings = transformers.LlamaConfig(
            vocab_size=text.vocab_rows,
            hidden_size=text.width,
            intermediate_size=text.mlp,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            num_key_value_heads=text.kv_heads,
            rms_norm_eps=text.eps,
            rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
            tie_word_embeddings=False,
        )
        self.tokens = config.tokens
        self.model = transformers.LlamaForCausalLM(settings).eval()
        self.model.load_state_dict({name: _tensor(value) for name, value in _state(core)})

    @torch.inference_mode()
    def decode(self, prompt: np.ndarray, length: int, steps: int) -> np.ndarray:
        """Answers [B,length] to token ids [B,P]; one block, greedy, a linear quota."""
        prompt = torch.from_numpy(prompt)
        ids = torch.cat([prompt, torch.full((len(prompt), length), self.tokens.mask)], 1)
        start, total = prompt.shape[1], ids.shape[1]
        unhidden = torch.zeros(len(ids), 1, total, total)
        banned = [*self.tokens.banned, self.tokens.mask]
        for step in range(steps):
            logits = self.model(ids, attention_mask=unhidden, use_cache=False).logits
            masked = ids == self.tokens.mask
            logits[..., banned] = torch.where(masked[..., None], float("-inf"), logits[..., banned])
            choice = logits.argmax(-1)
            probability = torch.softmax(logits.double(), -1)
            confidence = probability.gather(-1, choice[..., None])[..., 0]
            confidence[~masked] = float("-inf")
            quota = length // steps + (step < length % steps)
            best = confidence[:, start:].topk(quota).indices + start
            ids.scatter_(1, best, choice.gather(1, best))
        return ids[:, start:].numpy()


def _state(core: dict):
    """(name in transformers, array) of every parameter; layers are stacked in `core`."""
    yield "model.embed_tokens.weight", core["embed_tokens"]["embedding"]
    yield "model.norm.weight", core["norm"]["scale"]
    yield "lm_head.weight", core["lm_head"]["kernel"].T
    for path, stack in jax.tree_util.tree_leaves_with_path(core["layers"]):
        name = ".".join(entry.key for entry in path[:-1])
        for i, value in enumerate(stack):
            yield f"model.layers.{i}.{name}.weight", value.T


def _tensor(value: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(value))


# ------------------------------------------------------------------------------------- prediction
def operations(config: GeoDiTConfig, prefix: int, length: int, steps: int) -> dict[str, float]:
    """Matmul operations of one answer by each side, in units of 10^9."""
    text, total = config.text, prefix + length
    keys = 2 * text.width * text.kv_heads * text.head_width * 2
    block = 2 * (2 * text.width**2 + 3 * text.width * text.mlp) + keys  # of a token
    head = 2 * text.width * text.vocab_rows  # of a token
    seen = 4 * text.width * total  # attention of a query

    def one_pass(queries: int, last: int, logits: int) -> float:
        """`last`: queries of the last block, which needs keys and values of all."""
        whole = (text.layers - 1) * queries * (block + seen)
        return whole + last * (block + seen) + (queries - last) * keys + logits * head

    naive = one_pass(total, total, total)
    exact = one_pass(total, length, length)
    cached = one_pass(length, length, length)
    found = {
        "torch": steps * naive,
        "exact": steps * exact,
        "prefix cache": exact + (steps - 1) * cached,
    }
    return {name: count / 1e9 for name, count in found.items()}


# ---------------------------------------------------------------------------------------- measure
def compare(config: GeoDiTConfig, core: dict, peer: Torch, batch: int, repeats: int) -> list[dict]:
    """One row a side."""
    rng = np.random.default_rng(batch)
    prompt = rng.integers(0, config.tokens.bos, (batch, PREFIX.value))
    answers: dict[str, np.ndarray] = {}
    exact = DecodeConfig(length=LENGTH.value, steps=STEPS.value, stop=False)
    modes = {"exact": exact, "prefix cache": dataclasses.replace(exact, cache="prefix")}

    def run_ours(name: str):
        prefix = llada.embed(core, jnp.asarray(prompt))
        found = generate(core, config, prefix, None, jax.random.key(0), modes[name])
        answers[name] = np.asarray(found.ids)

    def run_torch():
        answers["torch"] = peer.decode(prompt, LENGTH.value, STEPS.value)

    jobs = {"torch": run_torch} | {name: lambda name=name: run_ours(name) for name in modes}
    seconds = alternate(jobs, repeats)
    counts = operations(config, PREFIX.value, LENGTH.value, STEPS.value)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        {
            "batch": batch,
            "side": name,
            "s": median[name],
            "times torch": median["torch"] / median[name],
            "bar": BARS.get((name, batch)),
            "GFLOP": batch * counts[name],
            "predicted": counts["torch"] / counts[name],
            "GFLOP/s": batch * counts[name] / median[name],
            "as torch": float(np.mean(answers[name] == answers["torch"])),
            "as exact": float(np.mean(answers[name] == answers["exact"])),
            "seconds": seconds[name],
        }
        for name in jobs
    ]


def main(_):
    config = dataclasses.replace(find_size(SIZE.value), tower=None)
    core = init_model(config, 0)["core"]
    peer = Torch(config, core)
    core = llada.unstack(jax.device_put(core))
    rows = []
    for batch in map(int, BATCHES.value):
        rows += compare(config, core, peer, batch, REPEATS.value if batch == 1 else 1)
    shown = ["batch", "side", ("s", ".2f"), ("times torch", ".2f"), ("bar", ".1f")]
    shown += [("predicted", ".2f"), ("GFLOP", ".0f"), ("GFLOP/s", ".0f")]
    shown += [("as torch", ".3f"), ("as exact", ".3f")]
    title = (
        f"{SIZE.value}, prompt {PREFIX.value}, answer {LENGTH.value}, {STEPS.value} steps, "
        f"float32, {os.cpu_count()} cores, medians of {REPEATS.value} (batch 1); predicted: by "
        "matmul operations; as: share of equal tokens"
    )
    print(format_table(rows, shown, title=title))
    if JSON.value:
        write_json(JSON.value, {"title": title, "rows": rows})
        print(json.dumps({"written": JSON.value}))


if __name__ == "__main__":
    use_huge_pages()
    app.run(main)
