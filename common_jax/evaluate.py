"""Score a set: one compiled program, whole padded batches, integer counts summed over hosts."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from common_jax.checkpoint import read_checkpoint
from common_jax.compiler import compiler_options
from common_jax.distributed import (
    batch_share,
    blame_lost_host,
    check_same_examples,
    local_rows,
    sum_over_hosts,
)
from common_jax.files import write_json
from common_jax.metric_log import say
from common_jax.report import format_table
from common_jax.sharding import (
    BATCH_AXES,
    check_batch,
    merge_trees,
    on_mesh,
    open_mesh,
    put_batch,
    put_tree,
    replicated,
    split_tree,
    tree_shardings,
)
from common_jax.task import Evaluator, Task
from common_jax.workdir import check_config


class Scorer:
    """Runs `task.predict` over evaluation sets. `batches` is data.pipeline.eval_batches.

    at: told before every batch what comes, "evaluation", or "compiling" with the first of a phase.
    """

    def __init__(self, task: Task, mesh, batches, batch_size: int, at: Callable = lambda _: None):
        self.task, self.mesh, self.batches, self.batch_size = task, mesh, batches, batch_size
        self.at, self.compiled = at, set()
        self.share = batch_share(mesh)
        self.predict = jax.jit(
            on_mesh(mesh, task.predict),
            static_argnums=3,
            # Each process counts its own rows, so none of them needs the others' outputs.
            out_shardings=(NamedSharding(mesh, P(BATCH_AXES)), replicated(mesh)),
            compiler_options=compiler_options(),
        )

    def score(self, evaluator: Evaluator, params, state, phase):
        """-> ({metric: value}, state); state changes only where evaluation counts as a call."""
        totals = None
        loader = self.batches(
            evaluator.source,
            evaluator.transforms,
            batch_size=self.batch_size,
            host=self.share.index,
            num_hosts=self.share.count,
        )
        for batch in loader:
            self.at("evaluation" if phase in self.compiled else "compiling")
            self.compiled.add(phase)
            encoded = self.task.encode(put_batch(batch, self.mesh))
            outputs, state = self.predict(params, state, encoded, phase)
            counts = evaluator.update(local_rows(outputs), batch)
            totals = counts if totals is None else jax.tree.map(np.add, totals, counts)
        if totals is None:
            raise ValueError("evaluation set is empty: nothing to score")
        return evaluator.finish(sum_over_hosts(totals, self.share)), state


class Trained(NamedTuple):
    """What a run has learnt so far: arrays on a mesh, the step, and which checkpoint it is."""

    params: Any
    state: Any
    step: int
    source: str


def restore_trained(task: Task, workdir: str | os.PathLike, mesh) -> Trained:
    """The parameters that a run scores (averaged ones if it keeps them), best checkpoint first.

    Raises CheckpointError when the run has no readable checkpoint.
    """
    config = task.config
    scored = "ema" if config.optim.ema_decay and config.eval.params == "ema" else "params"
    tree, source = read_checkpoint(Path(workdir).expanduser(), (scored, "state", "step"))
    params = tree[scored]
    if task.trainable != Task.trainable:
        params = merge_trees(split_tree(task.init(task.config.seed)[0], task.trainable)[1], params)
    params = put_tree(params, tree_shardings(params, task.sharding_rules, mesh))
    state = put_tree(tree["state"], tree_shardings(tree["state"], (), mesh))
    return Trained(params, state, int(tree["step"]), source)


def evaluate_workdir(task: Task, workdir: str | os.PathLike, batches: Callable) -> int:
    """Score the sets of a task on a run's best checkpoint; prints a table, writes eval.json.

    Nothing else in the workdir changes: a run that is still going may be scored. batches:
    data.pipeline.eval_batches. Returns the exit status 0; raises WorkdirError, CheckpointError.
    """
    with blame_lost_host(lambda: "an evaluation"):
        return _evaluate_workdir(task, workdir, batches)


def _evaluate_workdir(task: Task, workdir: str | os.PathLike, batches: Callable) -> int:
    started, config = time.perf_counter(), task.config
    folder = check_config(workdir, config)
    mesh = open_mesh(config.mesh)
    batch_size = config.eval.batch_size or config.batch_size
    check_batch(batch_size, mesh)
    task.prepare(mesh, batches)
    trained = restore_trained(task, folder, mesh)
    say(f"scoring {folder}/{trained.source}")
    scorer, state, scores = Scorer(task, mesh, batches, batch_size), trained.state, {}
    for name, evaluator in task.evaluators().items():
        check_same_examples(name, evaluator.source)
        phase = task.phase(trained.step, train=False)
        scores[name], state = scorer.score(evaluator, trained.params, state, phase)
    if not scores:
        raise ValueError(f"config.task={config.task!r} has no evaluation sets: nothing to score")
    if jax.process_index() == 0:
        print(format_scores(scores, f"step {trained.step} ({trained.source})"))
        found = {f"eval/{n}/{k}": v for n, values in scores.items() for k, v in values.items()}
        found = {k: v if math.isfinite(v) else None for k, v in found.items()}  # JSON has no NaN
        about = {"selected_step": trained.step, "checkpoint": trained.source}
        seconds = round(time.perf_counter() - started, 2)
        write_json(folder / "eval.json", found | about | {"seconds": seconds})
    return 0


def is_better(value: float, best: float | None, lower: bool) -> bool:
    """Whether a score beats the best so far; NaN never does, and never stays."""
    if not math.isfinite(value):
        return False
    if best is None or not math.isfinite(best):
        return True
    return value < best if lower else value > best


def format_scores(scores: dict[str, dict[str, float]], title: str) -> str:
    """Text table of {set: {metric: value}}, a line per metric, a column per set."""
    metrics = list(dict.fromkeys(metric for values in scores.values() for metric in values))
    rows = [
        {"metric": metric, **{name: values.get(metric) for name, values in scores.items()}}
        for metric in metrics
    ]
    return format_table(rows, ["metric", *((name, ".4f") for name in scores)], title=title)
