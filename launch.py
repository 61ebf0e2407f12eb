"""The only entry point.

    python launch.py train       --config=configs/satdifuser_probe.py:fuser=gw --workdir=runs/a
    python launch.py eval        --workdir=runs/a [--sweep=timesteps,taps]
    python launch.py extract     --config=... --images=FILE_OR_FOLDER --out=FOLDER
    python launch.py predict     --workdir=runs/a --images=FILE_OR_FOLDER [--out=FOLDER]
    python launch.py predict     --weights=FOLDER --image=FILE --ask="..." [--history]
    python launch.py eval        --weights=FOLDER --records=NAME --out=FOLDER
    python launch.py sample      --workdir=runs/a [--prompt="..." --sampling=guidance=4]
    python launch.py convert     --weights=FOLDER --to=public|flax-diffusers --out=FOLDER
    python launch.py verify      --weights=FOLDER
    python launch.py plan        --config=... [--topology=v5e:16x16] [--mesh=fsdp=256]
    python launch.py show_config --config=...

Settings: --config.group.key=value. `:tiny` makes any config a smoke test that runs in seconds.
`python launch.py VERB --help` says what a verb does and lists its flags.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
import warnings
from pathlib import Path

# The compilation cache makes the second start of a run quick; set the variable to move it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(".cache/xla").absolute()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# float32 means float32: left alone, GPUs compute its products in 19 bits and TPUs in 16.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from common_jax.command_line import Verb, choose, need, parse
from common_jax.host_memory import use_huge_pages

TASKS = {
    "satdifuser_probe": ("satdifuser_jax.probe", "ProbeTask"),
    "satdifuser_pretrain": ("satdifuser_jax.pretrain", "PretrainTask"),
    "geodit": ("geodit_jax.task", "GeoDiTTask"),
}

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with an optional :arg.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same command resumes it.")
WEIGHTS = flags.DEFINE_string("weights", None, "Checkpoint folder in the public layout.")
RESOLUTION = flags.DEFINE_integer("resolution", None, "Which one, where a release has several.")
IMAGES = flags.DEFINE_string("images", None, "A picture or a folder of pictures.")
IMAGE = flags.DEFINE_string("image", None, "One picture to ask about (GeoDiT).")
ASK = flags.DEFINE_string("ask", None, "A question about every picture (GeoDiT).")
HISTORY = flags.DEFINE_bool("history", False, "Also draw the passes of the decoder (GeoDiT).")
KIND = flags.DEFINE_string("kind", "chat", "Sets the answer window: caption, grounding, vqa, ...")
DECODE = flags.DEFINE_list("decode", [], "Decoder, as in steps=8,cache=prefix (GeoDiT).")
DTYPE = flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Of its answers.")
RECORDS = flags.DEFINE_list("records", [], "Record sets, as NAME[@SPLIT][=ROOT], or a JSONL file.")
PREDICTIONS = flags.DEFINE_string("predictions", None, "A predictions.jsonl to score.")
PROFILE = flags.DEFINE_enum(
    "metric_profile", "standard", ["standard", "paper_compat"], "How answers are scored."
)
OUT = flags.DEFINE_string("out", None, "Where results are written.")
TO = flags.DEFINE_enum(
    "to", "public", ["public", "flax-diffusers", "llava", "llada"], "Layout to convert to."
)
FORMAT = flags.DEFINE_enum("format", "npz", ["npz", "array_record"], "Feature file format.")
SWEEP = flags.DEFINE_list("sweep", [], "Linear probes of single timesteps and/or taps.")
TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:16x16 (TPUs), H200:8 (GPUs), or here.")
MESH = flags.DEFINE_list("mesh", [], "Its axes, as in fsdp=64,tensor=4; 1 where not named.")
PROGRAMS = flags.DEFINE_list("programs", [], "train, eval, encode, decode, ...; a step's if none.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "What is drawn; may be given several times.")
METADATA = flags.DEFINE_list("metadata", [], "Of it, as in gsd=1,latitude=48,date=2019-08-31.")
SAMPLING = flags.DEFINE_list("sampling", [], "As in count=8,steps=50,guidance=7.5,seed=0,side=256.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if not found.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many run together; 1 is alone.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def make_task(config, method: str | None = None):
    """The Task that `config.task` names; refuses one that cannot do what is asked."""
    if config.task not in TASKS:
        raise app.UsageError(f"config.task={config.task!r} is unknown; known: {', '.join(TASKS)}")
    module, name = TASKS[config.task]
    kind = getattr(importlib.import_module(module), name)
    if method and not callable(getattr(kind, method, None)):
        raise app.UsageError(f"config.task={config.task!r} cannot {method.replace('_', ' ')}")
    return kind(config)


def join() -> None:
    """Find the other processes of this run and say which one this is; before any other work."""
    from common_jax.distributed import join_processes

    join_processes(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)


def find_config(verb: str):
    """--config where given, else what the workdir was made with, as a nested locked ConfigDict."""
    if CONFIG.present:
        return need(CONFIG, verb)
    from common_jax.workdir import read_config

    config = ConfigDict(read_config(need(WORKDIR, verb)))
    # The devices of this machine, not of the one that trained: a score depends on neither.
    config.mesh = ConfigDict({"dcn": 1, "data": -1, "fsdp": 1, "tensor": 1})
    return config.lock()


def train() -> int:
    """Train in WORKDIR; the same command goes on after an interruption.

    Ends with scores in WORKDIR/results.json. Status 75: saved and stopped by SIGTERM.
    Several processes find each other under SLURM, Kubernetes and on TPU pods; elsewhere each is
    given --coordinator, --num_processes and --process_id.
    """
    from common_jax.train_loop import Pipeline
    from common_jax.train_loop import train as run
    from data.pipeline import eval_batches, train_batches

    config, workdir = need(CONFIG, "train"), need(WORKDIR, "train")
    join()
    return run(make_task(config), config, workdir, Pipeline(train_batches, eval_batches))


def evaluate() -> int:
    """Score the best checkpoint of WORKDIR, also while it is still training: WORKDIR/eval.json.

    --sweep=timesteps,taps: instead, a linear probe on the features of each timestep and tap alone
    (or of each timestep, or of each tap): sweep.md, sweep.json, sweep.png. With --config the
    WORKDIR of a sweep may be new. Without --config the one in WORKDIR is used.
    --predictions=FILE: instead, score a prediction file, which is all that it needs.
    --records=NAME,...: instead, answer record sets with the GeoDiT model in --weights, or the
    export of --workdir, and score the answers: OUT/predictions.jsonl, OUT/scores.json.
    """
    if PREDICTIONS.value:
        from geodit_jax.scoring.score import main_score

        main_score(PREDICTIONS.value, OUT.value and Path(OUT.value) / "scores.json", PROFILE.value)
        return 0
    if RECORDS.value:
        from geodit_jax.inference import score_records

        responder = load_model_that_answers("eval")
        score_records(responder, RECORDS.value, OUT.value or "scores", PROFILE.value)
        return 0
    workdir, config = need(WORKDIR, "eval"), find_config("eval")
    if SWEEP.value:
        return make_task(config, "sweep").sweep(workdir, SWEEP.value)
    from common_jax.evaluate import evaluate_workdir
    from data.pipeline import eval_batches

    join()
    return evaluate_workdir(make_task(config), workdir, eval_batches)


def extract() -> int:
    """Write the features of pictures, a file each (npz) or packed (array_record), and a manifest.

    Needs no labels and no head; the same command goes on after an interruption. Settings:
    model.weights (none: a small random network), model.save_timesteps or model.timesteps,
    model.layers (which taps), model.pool=none|mean|mean_std, data.side (pixels),
    data.cache_dtype, data.on_corrupt=refuse|skip.
    """
    task = make_task(need(CONFIG, "extract"), "extract")
    return task.extract(need(IMAGES, "extract"), need(OUT, "extract"), FORMAT.value)


def predict() -> int:
    """Run the trained head of WORKDIR on pictures; OUT is WORKDIR/predictions by default.

    Prints a table and writes predictions.jsonl; a segmentation head also writes masks/ (class
    numbers) and overlays/. Without --config the one in WORKDIR is used.
    With --ask (or --images=FILE.jsonl): answers of the GeoDiT model in --weights, or the export of
    --workdir, in text, with boxes drawn on the picture; --history draws how a text came about.
    --dtype=auto computes as the run did; --weights in bfloat16 on an accelerator, else float32.
    """
    if ASK.value or str(IMAGES.value).endswith((".jsonl", ".json")):
        from geodit_jax.inference import ask_pictures

        ask_pictures(
            load_model_that_answers("predict"),
            IMAGE.value or need(IMAGES, "predict"),
            ASK.value or "",
            OUT.value or "predictions",
            task=KIND.value if flags.FLAGS["kind"].present else "",
            history=HISTORY.value,
        )
        return 0
    workdir, config = need(WORKDIR, "predict"), find_config("predict")
    task = make_task(config, "predict_images")
    return task.predict_images(workdir, need(IMAGES, "predict"), OUT.value)


def sample() -> int:
    """Draw pictures with the pretraining in WORKDIR (also while it goes on), or the pipeline in
    --weights: OUT/0000.png and so on, grid.png, samples.jsonl. OUT is WORKDIR/drawn by default.

    --prompt: what is drawn, in turn where there are several; --metadata: where, when, how fine,
    whatever is not given counts as unknown. --sampling: count (4), steps (50), guidance (1; above,
    prompt and metadata weigh more), seed (0), side in pixels (that of the model), batch (8).
    """
    from satdifuser_jax import sample_files

    drawing = sample_files.parse_drawing(SAMPLING.value)
    fields = sample_files.parse_metadata(METADATA.value)
    if WEIGHTS.value:
        out = need(OUT, "sample")
        sampler = sample_files.load_sampler(WEIGHTS.value, RESOLUTION.value)
    else:
        workdir = need(WORKDIR, "sample")
        out = OUT.value or Path(workdir) / "drawn"
        sampler = make_task(find_config("sample"), "sampler").sampler(workdir)
    print(sample_files.write_samples(sampler, drawing, PROMPT.value, fields, out))
    return 0


def load_model_that_answers(verb: str):
    """The GeoDiT model in --weights, or what the training in --workdir exported."""
    from geodit_jax.decode_config import TRAINED_HERE, parse_decode
    from geodit_jax.inference import choose_dtype, load_responder, responder_of_run

    if WEIGHTS.value:
        dtype = choose_dtype(DTYPE.value)
        return load_responder(WEIGHTS.value, parse_decode(DECODE.value), dtype=dtype)
    decode = parse_decode(DECODE.value, TRAINED_HERE)
    return responder_of_run(need(WORKDIR, verb), decode, DTYPE.value)


def convert() -> int:
    """Rewrite a folder: a pipeline as public (safetensors, present names) or flax-diffusers.

    GeoDiT, LLaDA-V or LLaDA: as llava (for transformers users) or llada (text core alone).
    """
    if TO.value in ("llava", "llada"):
        from geodit_jax.convert import convert_folder

        print(convert_folder(need(WEIGHTS, "convert"), need(OUT, "convert"), TO.value))
        return 0
    from satdifuser_jax.convert import convert_pipeline

    weights, out = need(WEIGHTS, "convert"), need(OUT, "convert")
    print(convert_pipeline(weights, out, TO.value, RESOLUTION.value))
    return 0


def verify() -> int:
    """Check a pipeline folder: counts, dtypes, scheduler, one picture through every part.

    Where torch and diffusers are installed, each part is compared with theirs. --images: the
    picture, instead of a built-in pattern. Status 1 when the folder cannot be used. Of a GeoDiT,
    LLaDA-V or LLaDA folder: layout, counts, dtypes and what is left over.
    """
    if (Path(need(WEIGHTS, "verify")) / "config.json").is_file():
        from geodit_jax.convert import describe_folder

        text, is_usable = describe_folder(WEIGHTS.value)
        print(text)
        return 0 if is_usable else 1
    from data.images import decode
    from satdifuser_jax.verify import verify as check

    def ask_torch(stage, parts, inputs):
        from benchmarks.torch_peer import run_stage

        return run_stage(stage, parts, inputs)

    has_torch = all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))
    result = check(
        need(WEIGHTS, "verify"),
        resolution=RESOLUTION.value,
        image=decode(IMAGES.value) if IMAGES.value else None,
        peer=ask_torch if has_torch else None,
    )
    print(result)
    return 0 if result.ok else 1


def plan() -> int:
    """List parts, parameters and memory of a run; no weights and no pictures are read.

    --topology: also compile its --programs (what a step runs, if none are given) for that machine:
    a TPU slice, which needs no TPU but the extra tpu-plan, --mesh=dcn=2 for two of them. Told are
    memory of a chip, what is exchanged over which axis, the shortest time of a step, and the
    nearest setting that fits. --mesh alone, or GPUs that are not here: shapes and bytes.
    """
    from common_jax.plan import plan_run, run_in_child, set_mesh
    from common_jax.plan_text import plan_table

    config, topology = need(CONFIG, "plan"), TOPOLOGY.value or ""
    status = run_in_child(topology)
    if status is not None:
        return status
    print(plan_table(make_task(config).plan()))
    if topology or MESH.value:
        set_mesh(config.mesh, MESH.value)
        for paragraph in plan_run(make_task, config, topology, PROGRAMS.value):
            print(f"\n{paragraph}", flush=True)
    return 0


def show_config() -> int:
    """Print every setting of a config, or of WORKDIR."""
    print(find_config("show_config"))
    return 0


PLACE = ("coordinator", "num_processes", "process_id")
ANSWERING = ("weights", "decode", "dtype", "out")  # of a GeoDiT model
SCORING = ("sweep", *ANSWERING, "records", "predictions", "metric_profile")
ASKING = ("image", *ANSWERING, "ask", "kind", "history")
DRAWING = ("resolution", "prompt", "metadata", "sampling", "out")
VERBS = {
    "train": Verb(train, ("config", "workdir", *PLACE)),
    "eval": Verb(evaluate, ("workdir", "config", *SCORING, *PLACE)),
    "extract": Verb(extract, ("config", "images", "out", "format")),
    "predict": Verb(predict, ("workdir", "config", "images", *ASKING)),
    "sample": Verb(sample, ("workdir", "config", "weights", *DRAWING)),
    "convert": Verb(convert, ("weights", "out", "to", "resolution")),
    "verify": Verb(verify, ("weights", "resolution", "images")),
    "plan": Verb(plan, ("config", "topology", "mesh", "programs")),
    "show_config": Verb(show_config, ("config", "workdir")),
}


def main(words: list[str]) -> int:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
    warnings.formatwarning = lambda message, kind, *_: f"{kind.__name__}: {message}\n"
    try:
        return choose(words, VERBS).run()
    except app.UsageError as error:
        print(f"launch.py: {error}\n(python launch.py --help says more)", file=sys.stderr)
        return 2
    except Exception as error:
        from common_jax.distributed import LostHostError, leave

        told = isinstance(error, (ValueError, OSError, RuntimeError, FloatingPointError, KeyError))
        if not told or os.environ.get("EO_TRACEBACK"):
            traceback.print_exc()
        else:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            print("(set EO_TRACEBACK=1 for the full traceback)", file=sys.stderr)
        # Whatever it was: one of several processes must be gone at once, not wait for the others.
        return leave(error.status if isinstance(error, LostHostError) else 1)


if __name__ == "__main__":
    use_huge_pages()
    app.run(main, flags_parser=lambda argv: parse(argv, VERBS, __doc__))
