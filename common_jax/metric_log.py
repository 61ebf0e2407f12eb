"""What a run says while it goes: metrics.jsonl, TensorBoard, and a progress line."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

from common_jax.chips import peak_flops
from common_jax.files import write_atomic


class MetricLog:
    """Scalars by step into `metrics.jsonl` and `tb/`; only process 0 writes.

    On resume, lines after the restored step are dropped: the steps will be run, and logged, again.
    """

    def __init__(self, workdir: Path, *, resume_step: int, is_writer: bool, wandb: str = ""):
        self.is_writer = is_writer
        if not is_writer:
            return
        from tensorboardX import SummaryWriter

        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            kept = [
                line for line in self.path.read_text().splitlines() if _is_kept(line, resume_step)
            ]
            write_atomic(self.path, "".join(line + "\n" for line in kept).encode())
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(workdir / "tb"), purge_step=resume_step + 1)
        self.wandb = None
        if wandb:
            import wandb as client

            self.wandb = client.init(project=wandb, dir=str(workdir), resume="allow")

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self.is_writer:
            return
        clean = {k: float(v) for k, v in values.items()}
        # JSON has no NaN: null keeps the line readable by every parser.
        line = {k: (v if math.isfinite(v) else None) for k, v in clean.items()}
        try:
            self.file.write(json.dumps({"step": step, **line}) + "\n")
            self.file.flush()
            for name, value in clean.items():
                self.board.add_scalar(name, value, step)
        except OSError as error:
            say(f"metrics of step {step} could not be written to {self.path.parent}: {error}")
        if self.wandb:
            self.wandb.log(clean, step=step)

    def close(self) -> None:
        if not self.is_writer:
            return
        for part in (self.file, self.board):
            try:
                part.close()
            except OSError as error:  # a full disk: the error that ends the run says more
                say(f"metrics in {self.path.parent} could not be closed: {error}")
        if self.wandb:
            self.wandb.finish()


def _is_kept(line: str, resume_step: int) -> bool:
    try:
        return json.loads(line)["step"] <= resume_step
    except (ValueError, KeyError):  # a line cut short by a kill
        return False


def say(text: str, *, here: bool = False) -> None:
    """One line for the person watching; unbuffered, so that a log file is current.

    Process 0 speaks for all of them; `here` is for what only this process has seen.
    """
    import jax

    if jax.process_index() == 0 or here:
        host = f"host {jax.process_index()}: " if here and jax.process_count() > 1 else ""
        print(host + text, file=sys.stderr, flush=True)


def find_peak() -> float | None:
    """Operations a second of all devices at their peak; None for a kind that is not known."""
    import jax

    device = jax.devices()[0]
    one = peak_flops(device.device_kind)
    if not one and device.platform != "cpu":
        say(f"perf/mfu n/a: the peak of {device.device_kind} is not in common_jax/chips.py")
    return one and one * jax.device_count()


class Progress:
    """Speed, remaining time and share of time spent waiting for data since the last line.

    cost: operations of an example (forward and backward). peak: operations a second that all
    devices together could do. None where not known: then there is no MFU.
    """

    def __init__(self, step: int, total: int, cost: float | None = None, peak: float | None = None):
        self.total, self.cost, self.peak = total, cost, peak
        self.mark = time.perf_counter()
        self.mark_step = step
        self.waited = 0.0

    def lap(self, step: int, batch_size: int) -> dict[str, float]:
        """Averages since the last lap; step_time in seconds."""
        now = time.perf_counter()
        spent, steps = max(now - self.mark, 1e-9), max(step - self.mark_step, 1)
        lap = {
            "perf/step_time": spent / steps,
            "perf/examples_per_s": steps * batch_size / spent,
            "perf/data_wait_frac": min(self.waited / spent, 1.0),
        }
        if self.cost and self.peak:
            lap["perf/mfu"] = lap["perf/examples_per_s"] * self.cost / self.peak
        self.reset(step)
        return lap

    def reset(self, step: int) -> None:
        """Start counting here: time spent in evaluation or saving is not a step's."""
        self.mark, self.mark_step, self.waited = time.perf_counter(), step, 0.0

    def line(self, step: int, values: dict[str, float]) -> str:
        rate = 1.0 / max(values["perf/step_time"], 1e-9)
        left = (self.total - step) / rate
        hours, rest = divmod(int(left), 3600)
        shown = " ".join(
            f"{k.split('/', 1)[1]} {v:.4g}" for k, v in values.items() if k[:5] == "train"
        )
        mfu = f"  MFU {100 * values['perf/mfu']:.1f} %" if "perf/mfu" in values else ""
        return (
            f"step {step}/{self.total}  {shown}  {rate:.3g} steps/s  "
            f"ETA {hours}:{rest // 60:02d}:{rest % 60:02d}  "
            f"data wait {100 * values['perf/data_wait_frac']:.1f} %" + mfu
        )


class Profile:
    """A trace of `count` steps in WORKDIR/profile, from the third step of this process on."""

    def __init__(self, workdir: Path, count: int, step: int):
        self.folder, self.count, self.first = workdir / "profile", count, step + 2
        self.is_open = False

    def at(self, step: int, metrics) -> None:
        """Called after each step has been handed to the devices; metrics: its outputs."""
        if not self.count:
            return
        import jax

        if step == self.first:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(str(self.folder))
            self.is_open = True
        elif step == self.first + self.count:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if not self.is_open:
            return
        import jax

        jax.profiler.stop_trace()
        self.is_open = False
        say(f"profile in {self.folder}: open it with xprof or tensorboard --logdir")
