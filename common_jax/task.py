"""The seam between an experiment and the one training loop: a Task is a bundle of pure functions.

The loop (train_loop.py) owns steps, devices, checkpoints and logs; a Task owns everything that has
to do with a model or a dataset. A Task object is built from a config and holds no mutable training
state: what training changes is `params` (optimised) and `state` (BatchNorm statistics, counters).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Tree = Any
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Evaluator:
    """One evaluation set and how its predictions become numbers.

    source: random-access examples (data/ protocol). transforms: numpy callables for the pipeline.
    update: (outputs, batch) -> tree of numpy counts, which are summed over batches and hosts;
        padded rows are marked False in batch["mask"] and must not count.
    finish: summed counts -> {metric: float}.
    """

    source: Any
    transforms: Sequence[Callable]
    update: Callable[[Tree, Batch], Tree]
    finish: Callable[[Tree], dict[str, float]]


@dataclass(frozen=True)
class PlanRow:
    """A part of a run for `launch.py plan`: its abstract parameters and what lies beside them."""

    name: str
    shapes: Tree
    trainable: bool = False
    note: str = ""
    extra_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A compiled part of a run, by abstract arguments: function(weights, batch).

    weights lie where `rules` say (see `Task.sharding_rules`), rows of the batch on the axes of the
    batch. count: how often one step runs it; 0: no step does, it is a run of its own on one device.
    passes: how often its loop of a length that depends on data runs at most.
    """

    function: Callable
    weights: Tree
    batch: Tree
    rules: Sequence[tuple[str, tuple]] = ()
    count: int = 1
    passes: int = 1


@dataclass(frozen=True)
class Sketch:
    """A run by shapes alone, for plans: nothing is loaded, nothing allocated.

    params, state: as `init` makes them. batch: as `loss` gets it. programs: what the run compiles
    beside its training and evaluation steps, by name; `encode` is what precedes every step.
    """

    params: Tree
    state: Tree
    batch: Batch
    programs: Mapping[str, Program] = field(default_factory=dict)


class Task:
    """Defaults of the seam; an experiment overrides what it needs."""

    trainable: str = ".*"
    """Regex on parameter paths (`a/b/kernel`); the rest carries no gradient, no optimiser state."""

    lr_factors: Sequence[tuple[str, float]] = ()
    """(regex on parameter paths, factor of the learning rate); first match wins, else 1."""

    sharding_rules: Sequence[tuple[str, tuple]] = ()
    """(regex on parameter paths, PartitionSpec entries); first match wins, else replicated."""

    accumulates: bool = True
    """Whether a step may be split into microbatches (False with BatchNorm)."""

    selection: str = ""
    """Metric of the `val` set that `eval.select=auto` follows (larger is better)."""

    def __init__(self, config):
        self.config = config

    def init(self, seed: int) -> tuple[Tree, Tree]:
        """(params, state) as host arrays, pretrained weights already in place."""
        raise TypeError(f"{type(self).__name__} does not define init")

    def prepare(self, mesh, batches: Callable) -> None:
        """Load frozen parts and build caches before step 0. batches: data.pipeline.eval_batches."""

    def train_source(self):
        """Random-access training examples."""
        raise TypeError(f"{type(self).__name__} does not define train_source")

    def transforms(self, split: str) -> Sequence[Callable]:
        """Numpy callables (example, rng) -> example of the input pipeline."""
        return ()

    def phase(self, step: int, train: bool = True) -> Hashable:
        """Static part of the program for step `step` (steps done so far): one program a value."""
        return None

    def encode(self, batch: Batch) -> Batch:
        """Device work outside the gradient (a frozen backbone); default: none."""
        return batch

    def loss(self, params: Tree, state: Tree, batch: Batch, key, phase: Hashable):
        """-> (loss_sum, weight_sum, state, metrics): sums over rows, so that splitting is exact.

        metrics: {name: (sum, weight)}; the quotient is logged as train/<name>.
        """
        raise TypeError(f"{type(self).__name__} does not define loss")

    def predict(self, params: Tree, state: Tree, batch: Batch, phase: Hashable):
        """-> (outputs, state): outputs is a tree of arrays with a leading batch axis."""
        raise TypeError(f"{type(self).__name__} does not define predict")

    def evaluators(self) -> dict[str, Evaluator]:
        """Named evaluation sets; `val` selects the best checkpoint, `test` is scored at the end."""
        return {}

    def draws(self) -> bool:
        """Whether `during` uses the parameters; else it gets None, and nothing is gathered."""
        return bool(self.config.eval.get("samples", 1))

    def during(self, step: int, params: Tree, workdir: str) -> None:
        """Called at every evaluation with the parameters under test (samples, pictures).

        Of several processes only the first one calls it.
        """

    def report(self, params: Tree, state: Tree, results: dict, workdir: str) -> None:
        """Write figures and exports once, after the final evaluation (process 0 only)."""

    def flops(self) -> Mapping[str, float]:
        """Model FLOPs of one training example by the program that computes them: `train`, forward
        and backward, and what of `Sketch.programs` a step runs. {} when they are not counted."""
        return {}

    def plan(self) -> list[PlanRow]:
        """Parts of the run by abstract shapes, nothing allocated."""
        return []

    def sketch(self, mesh, rows: int) -> Sketch:
        """The programs of the run for a batch of `rows` on `mesh` (None: nowhere), by shapes."""
        raise TypeError(
            f"{type(self).__name__} does not define sketch: it cannot be compiled ahead"
        )
