"""The only training loop.

Order: restore -> first evaluation if asked -> for step: data -> step -> log one step late ->
checkpoint -> evaluate -> preemption check; then final save, test scores, results.json, DONE.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from common_jax.checkpoint import Checkpoints
from common_jax.compiler import compiler_options, trim_after_compiling
from common_jax.evaluate import Scorer
from common_jax.files import write_atomic, write_json
from common_jax.metric_log import MetricLog, Progress, say
from common_jax.optim import count_steps, make_optimizer, make_schedule
from common_jax.sharding import (
    check_batch,
    make_mesh,
    merge_trees,
    put_batch,
    put_tree,
    split_tree,
    tree_shardings,
)
from common_jax.task import Task
from common_jax.train_step import TrainState, make_step
from common_jax.workdir import lock_workdir, open_workdir

SHOWN_METRICS = 4  # of an evaluation on the screen; metrics.jsonl has all
PREEMPTED = 75  # exit status of a run that saved and stopped on SIGTERM (EX_TEMPFAIL: run again)


class LossError(FloatingPointError):
    """The loss of a step was not finite."""


class Pipeline(NamedTuple):
    """The two functions of data.pipeline; handed in, so that this package knows no dataset."""

    train: Callable
    eval: Callable


class Run:
    """One training run: what the loop reads at every step, built once by `train`."""

    def __init__(self, task: Task, config, workdir: str, pipeline: Pipeline):
        self.task, self.config, self.pipeline = task, config, pipeline
        self.writer = jax.process_index() == 0
        self.folder = open_workdir(workdir, config, is_writer=self.writer)
        self.lock = lock_workdir(self.folder) if self.writer else None
        self.mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        check_batch(config.batch_size, self.mesh)
        self.stop = False
        self.progress = {"best": None, "best_step": None, "stale": 0}
        self.compiled: dict = {}

    def build(self) -> None:
        """Data, parameters, optimiser, checkpoints; restores the newest checkpoint, if any."""
        config, task = self.config, self.task
        task.prepare(self.mesh, self.pipeline.eval)
        rule = config.eval.select
        self.selected = f"val/{task.selection}" if rule == "auto" else rule
        self.source = task.train_source()
        sizes = {"examples": len(self.source), "batch_size": config.batch_size}
        self.total = count_steps(config.optim, **sizes)
        self.schedule = make_schedule(config.optim, **sizes)
        self.tx = make_optimizer(config.optim, self.schedule, task.lr_factors)
        params, state = task.init(config.seed)
        params, self.frozen = split_tree(params, task.trainable)
        params = put_tree(params, tree_shardings(params, task.sharding_rules, self.mesh))
        self.frozen = put_tree(
            self.frozen, tree_shardings(self.frozen, task.sharding_rules, self.mesh)
        )
        state = put_tree(state, tree_shardings(state, (), self.mesh))
        opt = jax.eval_shape(self.tx.init, params)
        opt = jax.jit(
            self.tx.init, out_shardings=tree_shardings(opt, task.sharding_rules, self.mesh)
        )(params)
        ema = jax.tree.map(jnp.copy, params) if config.optim.ema_decay else {}
        step = put_tree(jnp.zeros((), jnp.int32), tree_shardings(jnp.zeros(()), (), self.mesh))
        self.train = TrainState(step, params, ema, state, opt)
        self.scorer = Scorer(
            task, self.mesh, self.pipeline.eval, config.eval.batch_size or config.batch_size
        )
        self.evaluators = task.evaluators()
        self.saves = Checkpoints(self.folder, keep=config.checkpoint.keep)
        restored = self.saves.restore(self.train._asdict())
        if restored:
            tree, meta = restored
            self.train = TrainState(**tree)
            self.progress = {k: meta[k] for k in self.progress}
        self.step = int(self.train.step)

    # -- one step ---------------------------------------------------------------------------

    def compile(self, batch, key, phase):
        """The program of one phase, compiled once; the seconds it took are logged."""
        if phase not in self.compiled:
            start = time.perf_counter()
            trim_after_compiling()
            step = jax.jit(
                make_step(self.task, self.tx, self.config),
                static_argnums=4,
                donate_argnums=0,
                compiler_options=compiler_options(),
            )
            lowered = step.lower(self.train, self.frozen, batch, key, phase)
            self.compiled[phase] = lowered.compile()
            spent = time.perf_counter() - start
            say(f"compiled the training step{f' ({phase})' if phase else ''} in {spent:.1f} s")
            self.log.write(self.step, {"perf/compile_s": spent})
            self.lap.reset(self.step)
        return self.compiled[phase]

    def report(self, step: int, metrics) -> None:
        """Read the scalars of a finished step; a loss that is not finite ends the run."""
        values = {f"train/{k}": float(v) for k, v in metrics.items()}
        if not math.isfinite(values["train/loss"]):
            self.saves.wait()
            kept = self.saves.steps()
            raise LossError(
                f"loss is {values['train/loss']} at step {step}; the last good checkpoint is "
                f"{'step ' + str(kept[-1]) if kept else 'none yet'} in {self.folder}. Lower "
                "optim.lr or set optim.clip, and use another --workdir for the changed config."
            )
        every = self.config.log.every
        if step % every == 0 or step == self.total or step == 1:
            values["train/lr"] = float(self.schedule(step - 1))
            values |= self.lap.lap(step, self.config.batch_size)
            self.log.write(step, values)
            say(self.lap.line(step, values))

    def save(self, *, best: bool = False) -> None:
        self.saves.save(self.step, self.train._asdict(), self.progress, best=best)

    # -- evaluation -------------------------------------------------------------------------

    def params_to_score(self):
        raw = self.config.eval.params == "raw" or not self.config.optim.ema_decay
        return merge_trees(self.frozen, self.train.params if raw else self.train.ema)

    def evaluate(self, names) -> dict[str, float]:
        """Score the named sets; the task's state moves on where evaluation counts as a call."""
        found, state = {}, self.train.state
        for name in names:
            start = time.perf_counter()
            metrics, state = self.scorer.score(
                self.evaluators[name],
                self.params_to_score(),
                state,
                self.task.phase(self.step, train=False),
            )
            found |= {f"eval/{name}/{k}": v for k, v in metrics.items()}
            shown = "  ".join(f"{k} {v:.4f}" for k, v in [*metrics.items()][:SHOWN_METRICS])
            say(f"step {self.step}  {name}: {shown}  ({time.perf_counter() - start:.1f} s)")
        self.train = self.train._replace(state=state)
        self.log.write(self.step, found)
        self.task.during(self.step, self.params_to_score(), str(self.folder))
        self.lap.reset(self.step)
        return found

    def select(self, found: dict[str, float]) -> bool:
        """Keep the best checkpoint; True when patience has run out."""
        rule = self.config.eval
        if not self.selected:
            return False
        value = found[f"eval/{self.selected}"]
        better = (
            value < (self.progress["best"] or 0)
            if rule.lower
            else value > (self.progress["best"] or 0)
        )
        if self.progress["best"] is None or better:
            self.progress |= {"best": value, "best_step": self.step, "stale": 0}
            self.save(best=True)
        else:
            self.progress["stale"] += 1
        return bool(rule.patience) and self.progress["stale"] >= rule.patience

    # -- the run ----------------------------------------------------------------------------

    def loop(self) -> bool:
        """Train until the last step, patience or SIGTERM; True when the run is complete."""
        config, key = self.config, jax.random.key(self.config.seed)
        every = config.eval.every or max(1, round(len(self.source) / config.batch_size))
        if self.step == 0 and config.eval.first and self.evaluators:
            self.evaluate(self.evaluators)
        batches = self.pipeline.train(
            self.source,
            self.task.transforms("train"),
            batch_size=config.batch_size,
            seed=config.seed,
            host=jax.process_index(),
            num_hosts=jax.process_count(),
            step=self.step,
            workers=config.data.workers,
        )
        pending, done = None, self.step >= self.total
        while not done:
            waited = time.perf_counter()
            batch = put_batch(next(batches), self.mesh)
            self.lap.waited += time.perf_counter() - waited
            batch = self.task.encode(batch)
            program = self.compile(batch, key, self.task.phase(self.step))
            self.train, metrics = program(self.train, self.frozen, batch, key)
            self.step += 1
            if pending:
                self.report(*pending)
            pending = (self.step, metrics)
            last = self.step >= self.total
            evaluates = "val" in self.evaluators and (self.step % every == 0 or last)
            saves = self.step % config.checkpoint.every == 0 or last
            stops = self._should_stop()
            if evaluates or saves or stops:
                self.report(*pending)  # nothing is saved or selected on an unread loss
                pending = None
            # Selection comes first: a checkpoint carries the best score known at its step.
            done = last
            if evaluates:
                done = self.select(self.evaluate(["val"])) or last
            if saves or stops or done:
                self.save()
            if stops and not done:
                return False
        return True

    def _should_stop(self) -> bool:
        if jax.process_count() == 1:
            return self.stop
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(jnp.asarray(self.stop)).any())

    def finish(self, started: float) -> dict:
        """Score the best checkpoint on every set, draw, write results.json and DONE."""
        self.saves.wait()
        best = self.saves.restore(self.train._asdict(), best=True) if self.selected else None
        results: dict = {"step": self.step, "selected_step": self.step}
        if best:
            self.train = TrainState(**best[0])
            results["selected_step"] = best[1]["step"]
            # The published trainer tests a checkpoint in the phase it was chosen in.
            self.step = best[1]["step"]
        if self.evaluators:
            results |= self.evaluate(self.evaluators)
        results["seconds"] = round(time.perf_counter() - started, 2)
        if self.writer:
            self.task.report(self.params_to_score(), self.train.state, results, str(self.folder))
            write_json(self.folder / "results.json", results)
            write_atomic(self.folder / "DONE", b"")
        return results


def train(task: Task, config, workdir: str, pipeline: Pipeline) -> int:
    """Run `task` in `workdir`; the same call continues a run that was cut off.

    Returns the exit status: 0 when complete, PREEMPTED after SIGTERM. Raises LossError on a loss
    that is not finite, CheckpointError, WorkdirError, ValueError on settings that cannot work.
    """
    started = time.perf_counter()
    if (Path(workdir) / "DONE").exists():
        open_workdir(workdir, config, is_writer=False)
        say(f"{workdir} is finished (results in results.json); nothing to do")
        return 0
    run = Run(task, config, workdir, pipeline)

    def ask_to_stop(*_):
        run.stop = True

    previous = signal.signal(signal.SIGTERM, ask_to_stop)
    try:
        run.build()
        run.log = MetricLog(
            run.folder, resume_step=run.step, is_writer=run.writer, wandb=config.log.wandb
        )
        run.lap = Progress(run.step, run.total)
        say(f"{'continuing at' if run.step else 'starting at'} step {run.step} of {run.total}")
        complete = run.loop()
        if not complete:
            run.saves.wait()
            say(f"stopped by SIGTERM at step {run.step}, saved; the same command continues")
            return PREEMPTED
        run.finish(started)
        say(f"done: {run.folder}")
        return 0
    finally:
        signal.signal(signal.SIGTERM, previous)
        for part in ("log", "saves"):
            if hasattr(run, part):
                getattr(run, part).close()
