"""Does pretraining help on real images? UC Merced scene classes and road masks, small models.

    EO_DATA_DIR=... python -m benchmarks.real_images --workdir=runs/real [--minutes=40]

Pretrains a UNet of about 4 M parameters on the unlabelled images (no test image among them), then
compares it with the same network untrained. Scenes: logistic regression on pooled, standardised
taps (time and strength chosen on validation), nearest neighbours, and the heads of SatDiFuser.
Baseline: colour histogram and gradient histogram (HOG) with logistic regression. Every part is an
ordinary run of launch.py; the same command continues. Writes table.md, results.json, figures.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(".cache/xla").absolute()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import numpy as np
from absl import app, flags, logging
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from benchmarks.baselines import colour_and_hog, score_road_colours
from common_jax.checkpoint import Checkpoints
from common_jax.files import write_json
from common_jax.host_memory import use_huge_pages
from common_jax.metric_log import say
from common_jax.report import format_table, write_markdown_table
from common_jax.sharding import make_mesh
from common_jax.train_loop import Pipeline, train_whole
from configs import satdifuser_pretrain, satdifuser_probe
from data.catalog import open_source
from data.pipeline import eval_batches, train_batches
from data.real_images import held_out
from satdifuser_jax.figures import save_feature_pca
from satdifuser_jax.linear_probe import pool_taps
from satdifuser_jax.pretrain import PretrainTask
from satdifuser_jax.probe import ProbeTask
from satdifuser_jax.probe_report import spread_examples

WORKDIR = flags.DEFINE_string("workdir", "runs/real", "Folder of all runs.")
STEPS = flags.DEFINE_integer("steps", 2500, "Pretraining steps of 32 images.")
STAGES = flags.DEFINE_list("stages", ["pretrain", "pooled", "heads", "table"], "Parts to run.")
SEEDS = (0, 1, 2)
TIMES = (1, 21, 61, 121, 201, 401)
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # inverse regularisation of the logistic regression
EDGE = 3  # cells of feature maps that the pictures of them leave out
PIPELINE = Pipeline(train_batches, eval_batches)


def eo_data() -> str:
    folder = os.environ.get("EO_DATA_DIR")
    if not folder:
        sys.exit("EO_DATA_DIR is not set: it must name the folder of real images")
    return folder


# ------------------------------------------------------------------------------------ pretraining
def pretrain_config(folder: Path):
    exclude = folder / "exclude.json"
    write_json(exclude, held_out(eo_data(), splits=("test",)))
    c = satdifuser_pretrain.get_config("dataset=folder")
    with c.unlocked():
        roots = ("ucmerced", "nwpu_vhr10", "roads", "sentinel2_rgb")
        c.data.train = ",".join(f"{eo_data()}/{name}" for name in roots)
        c.data.exclude = str(exclude)
        c.data.smallest_crop, c.data.largest_crop = 128, 256
        c.model.channels, c.model.heads = (64, 128), (2, 4)
        c.model.attention_levels, c.model.layers_per_block = (False, True), 1
        c.model.metadata = False
        c.optim.steps, c.optim.warmup_epochs = STEPS.value, 4.0
        c.eval.every, c.checkpoint.every, c.checkpoint.keep = 500, 500, 100
    return c


def kept_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints of the pretraining, finished or stopped, ascending."""
    saves = Checkpoints(folder / "pretrain")
    steps = [step for step in saves.steps() if step % 500 == 0]
    saves.close()
    return steps


def export_step(folder: Path, step: int) -> Path:
    """Backbone of one checkpoint (its moving average), to see whether more steps help."""
    out = folder / f"export-{step}"
    if (out / "model_index.json").exists():
        return out
    config = pretrain_config(folder)
    task = PretrainTask(config)
    params, _ = task.init(config.seed)
    saves = Checkpoints(folder / "pretrain")
    restored = saves.managers["checkpoints"].restore(step)
    saves.close()
    ema = jax.tree.map(np.asarray, restored["state"]["ema"])
    assert jax.tree.structure(ema) == jax.tree.structure(params)
    task.report(ema, {}, {}, str(out))
    (out / "export").rename(out.with_suffix(".tmp"))
    out.rmdir()
    out.with_suffix(".tmp").rename(out)
    return out


# ------------------------------------------------------------------------------------ pooled taps
def probe_config(dataset: str, fuser: str, folder: Path, weights: Path, seed: int, untrained: bool):
    c = satdifuser_probe.get_config(f"dataset={dataset},fuser={fuser}")
    with c.unlocked():
        c.seed = seed
        c.model.weights, c.model.untrained = str(weights), untrained
        c.data.train = f"{eo_data()}/{'ucmerced' if dataset == 'folder' else 'roads'}"
        c.data.cache_dir = str(folder / "cache")
        c.model.mode = "noising"
    return c


def pooled(folder: Path, weights: Path, seed: int, untrained: bool):
    """{split: (vectors [N, T, D], labels [N])} of the scenes: mean and deviation of every tap."""
    name = f"pooled-{weights.name if not untrained else 'untrained'}-{seed}.npz"
    if (folder / name).exists():
        with np.load(folder / name) as found:
            return {s: (found[f"{s}_x"], found[f"{s}_y"]) for s in ("train", "val", "test")}
    c = probe_config("folder", "linear", folder, weights, seed, untrained)
    with c.unlocked():
        c.model.timesteps, c.data.side, c.data.cache = TIMES, 64, "none"
    task = ProbeTask(c)
    task.prepare(make_mesh(), eval_batches)
    pool, out = jax.jit(pool_taps), {}
    for split in ("train", "val", "test"):
        vectors, labels = [], []
        for batch in task.batches(task.cached[split], task.transforms(split)):
            rows = np.asarray(batch["mask"])
            arrays = {k: batch[k] for k in ("pixels", "index")}
            vectors.append(np.asarray(pool(task.encode(arrays)["features"]))[rows])
            labels.append(batch["label"][rows])
        out[split] = np.concatenate(vectors), np.concatenate(labels)
    np.savez(folder / name, **{f"{s}_{k}": v for s in out for k, v in zip("xy", out[s])})
    return out


def train_logistic(x, y, others, strength):
    """Fit on x, predict each of `others`. Penalised weights lie in the span of the rows of x, so
    the problem is solved there: the same answer with hundreds of columns instead of thousands."""
    scaler = StandardScaler().fit(x)
    x = scaler.transform(x)
    basis = np.linalg.svd(x, full_matrices=False)[2].T
    model = LogisticRegression(C=strength, max_iter=200, tol=1e-3).fit(x @ basis, y)
    return [model.predict(scaler.transform(other) @ basis) for other in others]


def fit_logistic(parts):
    """(validation accuracy, test hits [N]) of the strength that validates best."""
    (x, y), (xv, yv), (xt, yt) = (parts[s] for s in ("train", "val", "test"))
    scores = {c: np.mean(train_logistic(x, y, [xv], c)[0] == yv) for c in STRENGTHS}
    best = max(scores, key=scores.get)
    # The choice is made: validation images join the training set.
    both, labels = np.concatenate([x, xv]), np.concatenate([y, yv])
    return scores[best], train_logistic(both, labels, [xt], best)[0] == yt


def fit_neighbours(parts):
    (x, y), (xv, yv), (xt, yt) = (parts[s] for s in ("train", "val", "test"))
    scaler = StandardScaler().fit(x)
    scores = {}
    for k in (1, 3, 5, 9):
        model = KNeighborsClassifier(k, metric="cosine").fit(scaler.transform(x), y)
        scores[k] = model.score(scaler.transform(xv), yv)
    k = max(scores, key=scores.get)
    model = KNeighborsClassifier(k, metric="cosine")
    model.fit(scaler.transform(np.concatenate([x, xv])), np.concatenate([y, yv]))
    return scores[k], model.predict(scaler.transform(xt)) == yt


def at_best_time(parts, fit):
    """Fit at every time and on all together; keep what validates best. (name, hits)."""
    choices = {}
    for i, time_ in enumerate((*TIMES, "all")):
        take = slice(None) if time_ == "all" else i
        cut = {s: (x[:, take].reshape(len(x), -1), y) for s, (x, y) in parts.items()}
        choices[f"t={time_}"] = fit(cut)
    name = max(choices, key=lambda key: choices[key][0])
    return name, choices[name][1]


def baseline():
    """Accuracy of colour + HOG with logistic regression, and its hits."""
    parts = {}
    for split in ("train", "val", "test"):
        source = open_source("folder", split, train=f"{eo_data()}/ucmerced")
        rows = [source[i] for i in range(len(source))]
        x = np.stack([colour_and_hog(row["image"]) for row in rows])
        parts[split] = x, np.array([int(row["label"]) for row in rows])
    return fit_logistic(parts)[1]


def interval(one: list, two: list, draws: int = 4000) -> tuple[float, float, float]:
    """(difference, low, high) in points: 95 % bootstrap over seeds and test images together."""
    a, b = np.stack(one).astype(float), np.stack(two).astype(float)
    rng = np.random.default_rng(0)
    differences = []
    for _ in range(draws):
        images = rng.integers(a.shape[1], size=a.shape[1])
        rows = (rng.integers(len(m), size=len(m)) for m in (a, b))
        one_mean, two_mean = (m[np.ix_(r, images)].mean() for m, r in zip((a, b), rows))
        differences.append(100 * (one_mean - two_mean))
    low, high = np.percentile(differences, [2.5, 97.5])
    return 100 * (a.mean() - b.mean()), low, high


def run_pooled(folder: Path) -> dict:
    """Pooled taps of the pretrained network (also early) and the untrained one, all seeds."""
    networks = {f"pretrained, {s} steps": export_step(folder, s) for s in kept_steps(folder)}
    rows, hits, last = [], {}, list(networks)[-1]
    for name, weights in [*networks.items(), ("untrained", networks[last])]:
        untrained = name == "untrained"
        for probe, fit in (("linear on pooled taps", fit_logistic), ("kNN", fit_neighbours)):
            found = [at_best_time(pooled(folder, weights, seed, untrained), fit) for seed in SEEDS]
            hits[name, probe] = [h for _, h in found]
            accuracies = [100 * h.mean() for h in hits[name, probe]]
            rows.append(
                {
                    "network": name,
                    "probe": probe,
                    "time": "/".join(t for t, _ in found),
                    "accuracy": np.mean(accuracies),
                    "s.d.": np.std(accuracies, ddof=1),
                }
            )
            say(str(rows[-1]))
    rows.append({"network": "none", "probe": "colour + HOG", "accuracy": 100 * baseline().mean()})
    gains = {
        probe: interval(hits[last, probe], hits["untrained", probe])
        for probe in ("linear on pooled taps", "kNN")
    }
    return {"rows": rows, "gain over untrained (points, 95 % interval)": gains}


# ------------------------------------------------------------------------------------------ heads
def run_heads(folder: Path) -> dict:
    """gw, lw, moe and the linear head on cached taps, scenes and roads, one seed each."""
    rows, weights = [], export_step(folder, kept_steps(folder)[-1])
    for dataset, metric in (("folder", "accuracy"), ("masks", "miou")):
        for untrained in (False, True):
            for fuser in ("linear", "gw", "lw", "moe"):
                name = f"{dataset}-{'untrained' if untrained else 'pretrained'}-{fuser}"
                c = probe_config(dataset, fuser, folder, weights, 0, untrained)
                with c.unlocked():
                    c.model.timesteps, c.data.cache = (21, 61, 161), "taps"
                    c.data.side = 64 if dataset == "folder" else 96
                    c.model.projection_dim, c.model.channels, c.model.num_experts = 48, 32, 4
                    c.batch_size = 32 if dataset == "folder" else 4
                    c.optim.name, c.optim.lr, c.optim.schedule = "adamw", 3e-3, "cosine"
                    c.optim.warmup_epochs, c.optim.weight_decay = 1.0, 0.05
                    c.optim.epochs = 25.0 if dataset == "folder" else 30.0
                    c.eval.every = 0 if dataset == "folder" else 40
                seconds = train_whole(ProbeTask(c), c, folder / name, PIPELINE)
                results = json.loads((folder / name / "results.json").read_text())
                row = {"task": "scenes" if dataset == "folder" else "roads", "head": fuser}
                row["network"] = "untrained" if untrained else "pretrained"
                row[metric] = 100 * results[f"eval/test/{metric}"]
                if dataset == "masks":
                    row["road IoU"] = 100 * results["eval/test/iou_1"]
                rows.append(row | {"seconds": seconds})
    rows.append(
        {
            "task": "roads",
            "head": "colour + texture",
            "network": "none",
            **score_road_colours(f"{eo_data()}/roads"),
        }
    )
    return {"rows": rows}


def draw_pca(folder: Path) -> None:
    """Finest taps of test scenes as colours, pretrained beside untrained."""
    for untrained in (False, True):
        weights = export_step(folder, kept_steps(folder)[-1])
        c = probe_config("folder", "gw", folder, weights, 0, untrained)
        with c.unlocked():
            c.model.timesteps, c.data.side, c.data.cache = (61,), 128, "none"
        task = ProbeTask(c)
        task.prepare(make_mesh(), eval_batches)
        batch, images = spread_examples(task, 8)
        features = np.asarray(task.encode(batch)["features"][0])[:, 0]
        name = f"taps-{'untrained' if untrained else 'pretrained'}.png"
        # Zero padding marks the borders more than anything in the picture: show the inside.
        inside, edge = slice(EDGE, -EDGE), EDGE * images.shape[1] // features.shape[1]
        images = images[:, edge:-edge, edge:-edge]
        save_feature_pca(images, features[:, inside, inside], folder / name)


def main(_):
    logging.set_verbosity(logging.WARNING)
    folder = Path(WORKDIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    if "pretrain" in STAGES.value:
        config = pretrain_config(folder)
        train_whole(PretrainTask(config), config, folder / "pretrain", PIPELINE)
    for stage, run in (("pooled", run_pooled), ("heads", run_heads)):
        if stage in STAGES.value:
            write_json(folder / f"{stage}.json", run(folder))
    if "table" in STAGES.value:
        draw_pca(folder)
        found = json.loads((folder / "pooled.json").read_text())
        columns = ["network", "probe", "time", ("accuracy", ".1f"), ("s.d.", ".1f")]
        print(format_table(found.pop("rows"), columns, title="\nScenes, pooled taps, 3 seeds"))
        print(json.dumps(found, indent=1))
        rows = json.loads((folder / "heads.json").read_text())["rows"]
        columns = ["task", "network", "head", ("accuracy", ".1f"), ("miou", ".1f")]
        columns += [("road IoU", ".1f"), ("seconds", ".0f")]
        print(format_table(rows, columns, title="\nHeads, one seed"))
        write_markdown_table(rows, columns, folder / "table.md")


if __name__ == "__main__":
    use_huge_pages()
    app.run(main)
