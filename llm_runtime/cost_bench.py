"""Offer one pass of everything that a cost table holds: steps, forward passes, probes and switches of a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from trainpilot.llm_runtime.config import Controls, OptimizerName, Precision, Pruning, RunConfig
from trainpilot.llm_runtime.live_run import Trainer, resolve_device
from trainpilot.llm_runtime.models import load_model
from trainpilot.llm_runtime.precision import synchronise
from trainpilot.llm_runtime.process import threads_in_use

LEARNING_RATE = 1e-6
"""So small that hundreds of steps on random tokens leave the weights about as they are."""
REMOVED = 0.5
"""Share of the feed-forward channels that the narrow model lacks."""
MASKED, MASKED_MORE = 0.25, 0.3
"""Sparsity before and after masks are raised."""
FEW_SEQUENCES = 8
"""An evaluation is timed on about so many sequences at least, or its fixed part would count as the passes'."""

Pass = Callable[[], object]


class Setting(NamedTuple):
    """What is timed."""

    kind: str
    """`step`, `forward`, `probe`, `switch`, or `raise` (of masks)."""
    precision: Precision = "fp32"
    batch_size: int = 0
    removed: float = 0.0
    name: str = ""
    """The optimiser or pruning where it is not the plain trainer's, or what is switched."""


class CostBench:
    """The trainers that are timed, and one pass of each setting. The plain trainer has AdamW and prunes nothing."""

    def __init__(self, config: RunConfig, batch_sizes: Sequence[int], precisions: Sequence[Precision]) -> None:
        self.config = replace(config, optimizer="adamw", pruning="none", precision="fp32")
        self.device = resolve_device(config.device)
        self.clock = _clock(self.device)
        self.batch_sizes = sorted(set(batch_sizes))
        self.precisions = list(dict.fromkeys(precisions))
        shape = (2 * max(FEW_SEQUENCES, *batch_sizes), config.sequence_length + 1)
        self.tokens = np.random.default_rng(0).integers(0, 256, shape, dtype=np.int64)
        self.plain_step = Setting("step", self.precisions[0], self.batch_sizes[0])
        """What the steps of other optimisers and of masks are compared with."""
        self.plain = self._trainer(self.config)
        self.narrowing_s: float | None = None
        """Seconds that one removal of channels took."""

    def passes(
        self, optimizers: Sequence[OptimizerName], prunings: Sequence[Pruning]
    ) -> Iterator[tuple[Setting, Pass]]:
        """Yield one pass of each setting; the plain steps first, as the probe and the switches need their buffers."""
        yield from self._rows(self.plain, 0.0)
        yield from self._probe_and_switches()
        for optimizer in optimizers:
            trainer = self._trainer(replace(self.config, optimizer=optimizer))
            yield self.plain_step._replace(name=optimizer), self._step(trainer, self.plain_step)
        for pruning in prunings:
            trainer = self._trainer(replace(self.config, pruning=pruning))
            yield from self._narrow_rows(trainer) if pruning == "width" else self._masked(trainer, pruning)

    def _trainer(self, config: RunConfig) -> Trainer:
        return Trainer(load_model(config.model, config.seed).model, config, self.device)

    def _rows(self, trainer: Trainer, removed: float) -> Iterator[tuple[Setting, Pass]]:
        for batch_size in self.batch_sizes:
            for precision in self.precisions:
                setting = Setting("step", precision, batch_size, removed)
                yield setting, self._step(trainer, setting)
            evaluate = partial(self._evaluate, trainer, batch_size)
            yield Setting("forward", batch_size=batch_size, removed=removed), evaluate

    def _step(self, trainer: Trainer, setting: Setting) -> Pass:
        tokens = self.tokens[: setting.batch_size]

        def step() -> None:
            if trainer.precision != setting.precision:
                trainer.set_precision(setting.precision)
            trainer.step(tokens, LEARNING_RATE)

        return step

    def _evaluate(self, trainer: Trainer, batch_size: int) -> None:
        trainer.batch_size = batch_size  # an evaluation goes through the model in batches of this size
        trainer.evaluate(self.tokens[: batch_size * forward_passes(batch_size)])

    def _probe_and_switches(self) -> Iterator[tuple[Setting, Pass]]:
        yield Setting("probe"), self._probe
        yield Setting("switch", name="batch"), self._switch_batch
        if len(self.precisions) > 1:
            yield Setting("switch", name="precision"), self._switch_precision

    def _probe(self) -> None:
        self.plain.batch_size = self.batch_sizes[0]
        self.plain.probe(self.tokens[: self.batch_sizes[0]])

    def _switch_batch(self) -> None:
        """Double the batch and halve it again."""
        batch_size = self.plain.batch_size
        for wanted in (2 * batch_size, batch_size):
            self.plain.apply(Controls(batch_size=wanted, precision=self.plain.precision))

    def _switch_precision(self) -> None:
        """Switch to the second precision and back to the first."""
        for precision in self.precisions[1::-1]:
            self.plain.set_precision(precision)

    def _masked(self, trainer: Trainer, pruning: Pruning) -> Iterator[tuple[Setting, Pass]]:
        assert trainer.masks is not None
        trainer.masks.prune_to(MASKED)
        yield Setting("raise", name=pruning), partial(_raise, trainer, trainer.masks.state_dict())
        yield self.plain_step._replace(name=pruning), self._step(trainer, self.plain_step)

    def _narrow_rows(self, trainer: Trainer) -> Iterator[tuple[Setting, Pass]]:
        self._step(trainer, self.plain_step)()  # gives the optimiser its buffers: they must be cut too
        self.narrowing_s = min(self._narrow(trainer, share) for share in (REMOVED / 2, REMOVED))
        yield from self._rows(trainer, trainer.sparsity())

    def _narrow(self, trainer: Trainer, share: float) -> float:
        """Remove channels for good, so that it can be timed but once; return the seconds."""
        synchronise(self.device)
        start = self.clock()
        trainer.apply(Controls(batch_size=trainer.batch_size, precision=trainer.precision, sparsity=share))
        synchronise(self.device)
        return self.clock() - start


def _clock(device: torch.device) -> Callable[[], float]:
    """Return CPU seconds for one thread on a CPU, what a pass takes if no other program keeps it waiting; else wall."""
    fine = time.get_clock_info("process_time").resolution < 1e-4  # 16 ms on Windows
    return time.process_time if device.type == "cpu" and threads_in_use() == 1 and fine else time.perf_counter


def forward_passes(batch_size: int) -> int:
    """Return how many forward passes of `batch_size` the timed evaluation makes."""
    return -(-FEW_SEQUENCES // batch_size)


def _raise(trainer: Trainer, before: dict[str, object]) -> None:
    """Raise the masks once; putting them back before is a small part of it."""
    assert trainer.masks is not None
    trainer.masks.load_state_dict(before)
    trainer.prune_towards(MASKED, MASKED_MORE, 1.0)
