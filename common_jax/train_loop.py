"""The only training loop.

Order: restore -> first evaluation if asked -> for step: data -> step -> log one step late ->
evaluate -> checkpoint -> preemption check; then final save, test scores, results.json, DONE.
Several processes run it in step: whatever decides the way through the loop is the same in all.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils

from common_jax.checkpoint import Checkpoints, is_time_to_save, list_steps, wait_for_all
from common_jax.compiler import trim_after_compiling
from common_jax.distributed import (
    batch_share,
    blame_lost_host,
    check_same_examples,
    gather_tree,
)
from common_jax.evaluate import Scorer, is_better
from common_jax.files import write_atomic, write_json
from common_jax.metric_log import MetricLog, Profile, Progress, find_peak, say
from common_jax.optim import count_steps, make_optimizer, make_schedule
from common_jax.sharding import check_batch, merge_trees, open_mesh, put_batch
from common_jax.stalls import StallWatch
from common_jax.task import Task
from common_jax.train_step import TrainState, jit_step, shapes_of, start_state
from common_jax.workdir import DONE, enter_workdir, is_finished

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
        self.folder, self.lock = enter_workdir(workdir, config)
        self.mesh = open_mesh(config.mesh)
        check_batch(config.batch_size, self.mesh)
        check_batch(config.eval.batch_size or config.batch_size, self.mesh, "eval.batch_size")
        self.share = batch_share(self.mesh)
        hosts = jax.process_index(), jax.process_count()
        self.watch = StallWatch(self.folder, *hosts, config.log.stall)
        self.stop = False
        self.progress = {"best": None, "best_step": None, "stale": 0}
        self.compiled: dict = {}

    def build(self) -> None:
        """Data, parameters, optimiser, checkpoints; restores the newest checkpoint, if any."""
        config, task, watch, at = self.config, self.task, self.watch, self.watch.at
        at(0, "preparing")
        task.prepare(self.mesh, self.pipeline.eval)
        rule = config.eval.select
        self.selected = f"val/{task.selection}" if rule == "auto" else rule
        at(0, "reading")
        self.source = task.train_source()
        check_same_examples("training", self.source)
        sizes = {"examples": len(self.source), "batch_size": config.batch_size}
        self.total = count_steps(config.optim, **sizes)
        self.schedule = make_schedule(config.optim, **sizes)
        self.tx = make_optimizer(config.optim, self.schedule, task.lr_factors)
        at(0, "placing")
        self.train, self.frozen = start_state(task, self.tx, config, self.mesh)
        rows = config.eval.batch_size or config.batch_size
        self.scorer = Scorer(
            task, self.mesh, self.pipeline.eval, rows, lambda what: at(watch.step, what)
        )
        self.evaluators = task.evaluators()
        for name, evaluator in self.evaluators.items():
            check_same_examples(name, evaluator.source)
        checkpoint = config.checkpoint
        self.saves = Checkpoints(
            self.folder, keep=checkpoint.keep, keep_every=checkpoint.keep_every
        )
        self.saved_at = time.monotonic()
        at(0, "restoring")
        if self.saves.steps():
            tree, meta = self.saves.restore(self.let_go())
            self.train = TrainState(**tree)
            self.progress = {k: meta[k] for k in self.progress}
        self.step = self.began = int(self.train.step)

    def let_go(self) -> dict:
        """Shapes and places of the training state, which is given up: two of it may not fit."""
        like, self.train = shapes_of(self.train), None
        return like._asdict()

    # -- one step ---------------------------------------------------------------------------

    def compile(self, batch, key, phase):
        """The program of one phase, compiled once; the seconds it took are logged."""
        if phase not in self.compiled:
            self.watch.at(self.step, "compiling")
            start = time.perf_counter()
            trim_after_compiling()
            step = jit_step(self.task, self.tx, self.config, self.train)
            lowered = step.lower(self.train, self.frozen, batch, key, phase)
            self.compiled[phase] = lowered.compile()
            spent = time.perf_counter() - start
            say(f"compiled the training step{f' ({phase})' if phase else ''} in {spent:.1f} s")
            self.log.write(self.step, {"perf/compile_s": spent})
            self.lap.reset(self.step)
        return self.compiled[phase]

    def report(self, step: int, metrics) -> None:
        """Read the scalars of a finished step; one that is not finite ends the run.

        The gradient too: after one that is not, the parameters are lost though the loss was good.
        """
        values = {f"train/{k}": float(v) for k, v in metrics.items()}
        loss, norm = values["train/loss"], values["train/grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.saves.wait()
            kept = list_steps(self.saves.folders["checkpoints"])
            raise LossError(
                f"loss is {loss}, gradient norm {norm} at step {step}; the last good checkpoint is "
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
        self.watch.at(self.step, "checkpoint")
        self.saves.save(self.step, self.train._asdict(), self.progress, best=best)
        if not best:
            self.saved_at = time.monotonic()

    # -- evaluation -------------------------------------------------------------------------

    def params_to_score(self):
        raw = self.config.eval.params == "raw" or not self.config.optim.ema_decay
        return merge_trees(self.frozen, self.train.params if raw else self.train.ema)

    def evaluate(self, names) -> dict[str, float]:
        """Score the named sets; the task's state moves on where evaluation counts as a call."""
        self.watch.at(self.step, "evaluation")
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
        if type(self.task).during is not Task.during:
            self.watch.at(self.step, "drawing")
            params = gather_tree(self.params_to_score()) if self.task.draws() else None
            if self.writer:  # process 0 draws alone
                self.task.during(self.step, params, str(self.folder))
        self.lap.reset(self.step)
        return found

    def select(self, found: dict[str, float]) -> bool:
        """Keep the best checkpoint; True when patience has run out."""
        rule = self.config.eval
        if not self.selected:
            return False
        value = found[f"eval/{self.selected}"]
        if is_better(value, self.progress["best"], rule.lower):
            self.progress |= {"best": value, "best_step": self.step, "stale": 0}
            self.save(best=True)
        else:
            self.progress["stale"] += 1
        return self.is_out_of_patience()

    def is_out_of_patience(self) -> bool:
        patience = self.config.eval.patience
        return bool(patience) and self.progress["stale"] >= patience

    # -- the run ----------------------------------------------------------------------------

    def go(self, started: float) -> int:
        """From the restored checkpoint to the end, or to SIGTERM; the exit status."""

        def ask_to_stop(*_):
            self.stop = True

        # Where processes are joined, JAX hears SIGTERM itself and tells the others.
        alone, log = not jax.distributed.is_initialized(), self.config.log
        previous = signal.signal(signal.SIGTERM, ask_to_stop) if alone else None
        try:
            self.build()
            self.log = MetricLog(
                self.folder, resume_step=self.step, is_writer=self.writer, wandb=log.wandb
            )
            self.lap = Progress(self.step, self.total, sum(self.task.flops().values()), find_peak())
            self.profile = Profile(self.folder, self.config.log.profile, self.step)
            say(f"{'continuing' if self.step else 'starting'} at step {self.step} of {self.total}")
            if not self.loop():
                self.saves.settle()
                say(f"stopped by SIGTERM at step {self.step}, saved; the same command continues")
                self.watch.at(self.step, "done")
                return PREEMPTED
            self.finish(started)
            say(f"done: {self.folder}")
            return 0
        finally:
            if alone:
                signal.signal(signal.SIGTERM, previous)
            self.close()

    def loop(self) -> bool:
        """Train until the last step, patience or SIGTERM; True when the run is complete."""
        config, key = self.config, jax.random.key(self.config.seed)
        every = config.eval.every or max(1, round(len(self.source) / config.batch_size))
        if self.step == 0 and config.eval.first and self.evaluators:
            self.evaluate(self.evaluators)
        self.batches = self.pipeline.train(
            self.source,
            self.task.transforms("train"),
            batch_size=config.batch_size,
            seed=config.seed,
            host=self.share.index,
            num_hosts=self.share.count,
            step=self.step,
            workers=config.data.workers,
        )
        # A run that ended early may have been cut off before it was scored.
        pending, done = None, self.step >= self.total or self.is_out_of_patience()
        while not done:
            self.watch.at(self.step, "data")
            waited = time.perf_counter()
            batch = put_batch(next(self.batches), self.mesh)
            self.lap.waited += time.perf_counter() - waited
            self.watch.at(self.step, "encoding" if self.compiled else "compiling")
            batch = self.task.encode(batch)
            program = self.compile(batch, key, self.task.phase(self.step))
            self.watch.at(self.step, "step")
            self.train, metrics = program(self.train, self.frozen, batch, key)
            self.step += 1
            self.profile.at(self.step, metrics)
            if pending:
                self.report(*pending)
            pending = (self.step, metrics)
            last = self.step >= self.total
            evaluates = "val" in self.evaluators and (self.step % every == 0 or last)
            saves = is_time_to_save(config, self.step, self.saved_at) or last
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
        if not jax.distributed.is_initialized():
            return self.stop
        # A notice to one reaches all. They agree on the step after the last asked about, from 1 on.
        return multihost_utils.reached_preemption_sync_point(self.step - self.began)

    def finish(self, started: float) -> dict:
        """Score the best checkpoint on every set, draw, write results.json and DONE."""
        self.saves.wait()
        results: dict = {"step": self.step, "selected_step": self.step}
        if self.selected and self.saves.steps(best=True):
            tree, meta = self.saves.restore_selected(self.let_go())
            self.train = TrainState(**tree)
            # The published trainer tests a checkpoint in the phase it was chosen in.
            self.step = results["selected_step"] = meta["step"]
        if self.evaluators:
            results |= self.evaluate(self.evaluators)
        results["seconds"] = round(time.perf_counter() - started, 2)
        scored = gather_tree((self.params_to_score(), self.train.state))
        self.watch.at(self.step, "report" if self.writer else "done")
        if self.writer:
            self.task.report(*scored, results, str(self.folder))
            write_json(self.folder / "results.json", results)
            write_atomic(self.folder / DONE, b"")
            self.watch.at(self.step, "done")
        wait_for_all("report")  # JAX waits a minute only, and then aborts all of them
        return results

    def close(self) -> None:
        """Release files and threads; a failed process among several waits for no other one."""
        parts = ["watch", "profile", "log", "batches"]  # batches: its processes would outlive us
        if jax.process_count() == 1 or sys.exc_info()[0] is None:
            parts += ["saves", "lock"]
        for part in parts:
            if hasattr(getattr(self, part, None), "close"):
                getattr(self, part).close()


def train(task: Task, config, workdir: str, pipeline: Pipeline) -> int:
    """Run `task` in `workdir`; the same call continues a run that was cut off.

    Returns the exit status: 0 when complete, PREEMPTED after SIGTERM. Raises LossError on a loss
    that is not finite, CheckpointError, WorkdirError, ValueError on settings that cannot work.
    """
    run = None

    def describe() -> str:
        return f"{run.watch.doing} of step {run.watch.step}" if run else "the start"

    with blame_lost_host(describe):
        started = time.perf_counter()
        if is_finished(workdir, config):
            say(f"{workdir} is finished (results in results.json); nothing to do")
            return 0
        run = Run(task, config, workdir, pipeline)
        return run.go(started)


def train_whole(task: Task, config, workdir: str | Path, pipeline: Pipeline) -> float:
    """Seconds of `train`, for scripts that do more. Raises SystemExit where SIGTERM stopped it."""
    start = time.perf_counter()
    status = train(task, config, str(workdir), pipeline)
    if status:
        sys.exit(status)
    return time.perf_counter() - start
