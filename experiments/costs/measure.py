"""Measure cost tables: what optimiser steps, forward passes, probes and switches of one model cost on one device.

`measure_cost_table` times one model; `cost_tables` measures every model of a comparison once and keeps the tables.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from trainpilot.experiments.costs.table import CostRow, CostTable
from trainpilot.experiments.results import Case, cost_key
from trainpilot.llm_runtime.config import PRECISIONS, OptimizerName, Precision, Pruning, RunConfig
from trainpilot.llm_runtime.energy import select_meter
from trainpilot.llm_runtime.energy.meter import EnergyMeter
from trainpilot.llm_runtime.files import digest
from trainpilot.llm_runtime.live_run import LiveRun, Trainer, resolve_device
from trainpilot.llm_runtime.models import load_model_of
from trainpilot.llm_runtime.precision import device_name, lacking, synchronise
from trainpilot.llm_runtime.process import threads_in_use
from trainpilot.llm_runtime.schedules import MASK_UPDATES, PROBE_PASSES
from trainpilot.llm_runtime.timing import Cost, Timing, alternate, median_spread

LEARNING_RATE = 1e-6
"""Learning rate so small that hundreds of steps on random tokens hardly change the weights."""
REMOVED = 0.5
"""Share of the feed-forward channels removed in the narrow model."""
MASKED, MASKED_MORE = 0.25, 0.3
"""Sparsity before and after masks are raised."""
FEW_SEQUENCES = 8
"""Least number of sequences of a timed evaluation; with fewer, its fixed costs would be attributed to the passes."""

Pass = Callable[[], object]


class TimedSetting(NamedTuple):
    """A setting to be timed."""

    kind: str
    """`step`, `forward`, `probe`, `switch`, or `raise` (of masks)."""
    precision: Precision = "fp32"
    batch_size: int = 0
    removed: float = 0.0
    name: str = ""
    """Optimiser or pruning if it differs from the plain trainer's, or the control that is switched."""


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
        self.plain_step = TimedSetting("step", self.precisions[0], self.batch_sizes[0])
        """Baseline for the steps of other optimisers and of masks."""
        self.plain = self._trainer(self.config)
        self.narrowing_s: float | None = None
        """Seconds that one removal of channels took."""

    def passes(
        self, optimizers: Sequence[OptimizerName], prunings: Sequence[Pruning]
    ) -> Iterator[tuple[TimedSetting, Pass]]:
        """Yield a function per setting that makes one pass; plain steps first, to allocate the optimiser's buffers."""
        yield from self._rows(self.plain, 0.0)
        yield from self._probe_and_switches()
        for optimizer in optimizers:
            trainer = self._trainer(replace(self.config, optimizer=optimizer))
            yield self.plain_step._replace(name=optimizer), self._step(trainer, self.plain_step)
        for pruning in prunings:
            trainer = self._trainer(replace(self.config, pruning=pruning))
            yield from self._narrow_rows(trainer) if pruning == "width" else self._masked(trainer, pruning)

    def _trainer(self, config: RunConfig) -> Trainer:
        return Trainer(load_model_of(config).model, config, self.device)

    def _rows(self, trainer: Trainer, removed: float) -> Iterator[tuple[TimedSetting, Pass]]:
        for batch_size in self.batch_sizes:
            for precision in self.precisions:
                setting = TimedSetting("step", precision, batch_size, removed)
                yield setting, self._step(trainer, setting)
            evaluate = partial(self._evaluate, trainer, batch_size)
            yield TimedSetting("forward", batch_size=batch_size, removed=removed), evaluate

    def _step(self, trainer: Trainer, setting: TimedSetting) -> Pass:
        tokens = self.tokens[: setting.batch_size]

        def step() -> None:
            if trainer.controls.precision != setting.precision:
                trainer.apply(replace(trainer.controls, precision=setting.precision))
            trainer.set_learning_rate(LEARNING_RATE)
            trainer.step(tokens)
            trainer.apply_masks()

        return step

    def _evaluate(self, trainer: Trainer, batch_size: int) -> None:
        _set_batch_size(trainer, batch_size)  # an evaluation goes through the model in batches of this size
        trainer.evaluate(self.tokens[: batch_size * forward_passes(batch_size)])

    def _probe_and_switches(self) -> Iterator[tuple[TimedSetting, Pass]]:
        yield TimedSetting("probe"), self._probe
        yield TimedSetting("switch", name="batch"), self._switch_batch
        if len(self.precisions) > 1:
            yield TimedSetting("switch", name="precision"), self._switch_precision

    def _probe(self) -> None:
        _set_batch_size(self.plain, self.batch_sizes[0])
        self.plain.probe_on(self.tokens[: self.batch_sizes[0]])

    def _switch_batch(self) -> None:
        """Double the batch and halve it again."""
        batch_size = self.plain.controls.batch_size
        for wanted in (2 * batch_size, batch_size):
            self.plain.apply(replace(self.plain.controls, batch_size=wanted))

    def _switch_precision(self) -> None:
        """Switch to the second precision and back to the first."""
        for precision in self.precisions[1::-1]:
            self.plain.apply(replace(self.plain.controls, precision=precision))

    def _masked(self, trainer: Trainer, pruning: Pruning) -> Iterator[tuple[TimedSetting, Pass]]:
        assert trainer.masks is not None
        trainer.masks.prune_to(MASKED)
        yield TimedSetting("raise", name=pruning), partial(_raise, trainer, trainer.masks.state_dict())
        yield self.plain_step._replace(name=pruning), self._step(trainer, self.plain_step)

    def _narrow_rows(self, trainer: Trainer) -> Iterator[tuple[TimedSetting, Pass]]:
        self._step(trainer, self.plain_step)()  # allocates the optimiser's buffers, which must be cut, too
        self.narrowing_s = min(self._narrow(trainer, share) for share in (REMOVED / 2, REMOVED))
        yield from self._rows(trainer, trainer.sparsity())

    def _narrow(self, trainer: Trainer, share: float) -> float:
        """Remove channels and return the seconds; this is irreversible, so it is timed only once."""
        synchronise(self.device)
        start = self.clock()
        trainer.apply(replace(trainer.controls, sparsity=share))
        synchronise(self.device)
        return self.clock() - start


def _set_batch_size(trainer: Trainer, batch_size: int) -> None:
    """Set the batch size, and leave the state of the optimizer as it is."""
    trainer.controls = replace(trainer.controls, batch_size=batch_size)


def _clock(device: torch.device) -> Callable[[], float]:
    """Return a clock: CPU seconds (unaffected by other programs) for one thread on a CPU, otherwise wall-clock time."""
    fine = time.get_clock_info("process_time").resolution < 1e-4  # 16 ms on Windows
    return time.process_time if device.type == "cpu" and threads_in_use() == 1 and fine else time.perf_counter


def forward_passes(batch_size: int) -> int:
    """Return how many forward passes of `batch_size` the timed evaluation makes."""
    return -(-FEW_SEQUENCES // batch_size)


def _raise(trainer: Trainer, before: dict[str, object]) -> None:
    """Raise the masks once; putting them back before is a small part of it."""
    assert trainer.masks is not None
    trainer.masks.load_state_dict(before)
    trainer.masks.prune_to(MASKED_MORE)


CPU_VISIT_S = 0.015
GPU_VISIT_S = 0.1
"""Least seconds of a visit on a GPU; longer if the energy meter requires it."""

Timings = Mapping[TimedSetting, Timing]


def measure_cost_table(
    config: RunConfig,
    *,
    batch_sizes: Sequence[int],
    precisions: Sequence[Precision],
    optimizers: Sequence[OptimizerName] = (),
    prunings: Sequence[Pruning] = (),
    meter: EnergyMeter | None = None,
    limit_s: float = 8.0,
    progress: Callable[[float], None] | None = None,
) -> CostTable:
    """Time the model of `config` on random tokens, all settings in alternating order, and return the table.

    On a busy machine: seconds are those of the fastest visit, so one undisturbed visit per setting is enough; with one
    thread on a CPU they are CPU seconds, which other programs hardly affect. Joules are the seconds times the power
    reading of the meter. RAPL and the meters of GPUs measure every program on the device, so other programs make the
    joules too high. The estimate for other CPUs covers only this process: idle power for its duration, plus the power
    of its busy threads. With one thread it uses CPU seconds, too; with several, waiting makes the joules too low.

    Not included: drawing batches, the norm of Adam's moments that a run computes every tenth step, and the copies that
    `schedule-free` makes for an evaluation.

    Args:
        config: Model, sequence length and device.
        batch_sizes: Sequences per step of AdamW, and per forward pass of an evaluation.
        precisions: Precisions of AdamW's steps; extras are measured in the first one, at the smallest batch.
        optimizers: Other optimisers, whose extra cost per step is measured.
        prunings: For `width`, everything is also measured on a narrower model; for masks, their extra cost per step.
        meter: Energy meter; by default the best one that the device has.
        limit_s: Seconds after which no further round begins; there are at least four rounds.
        progress: Called after each round with the share of the work done, in [0, 1].

    Raises:
        ValueError: the device lacks a precision, the model cannot be pruned so, or nothing is asked for.
    """
    _check(config, batch_sizes, precisions)
    bench = CostBench(config, batch_sizes, precisions)
    others = [name for name in dict.fromkeys(optimizers) if name != "adamw"]
    passes = dict(bench.passes(others, [name for name in dict.fromkeys(prunings) if name != "none"]))
    # an estimate counts the idle draw over the same seconds as the passes
    own = meter if meter is not None else select_meter(str(bench.device), clock=bench.clock)
    try:
        timings = alternate(
            passes,
            own,
            visit_s=_visit_s(bench.device, own),
            limit_s=limit_s,
            wait=partial(synchronise, bench.device),
            clock=bench.clock,
            progress=progress,
        )
    finally:
        if meter is None:
            own.close()
    return _table(bench, timings)


def _check(config: RunConfig, batch_sizes: Sequence[int], precisions: Sequence[Precision]) -> None:
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes must be one or more whole numbers from 1, got {list(batch_sizes)}")
    if not precisions:
        raise ValueError("precisions must name at least one, got none; fp32 works everywhere")
    missing = lacking(resolve_device(config.device))
    for name in precisions:
        if name in missing:
            raise ValueError(f"precisions must be ones that the device has, got {name!r}: {missing[name]}")


def _visit_s(device: torch.device, meter: EnergyMeter) -> float:
    return max(CPU_VISIT_S if device.type == "cpu" else GPU_VISIT_S, meter.resolution_s)


def _table(bench: CostBench, timings: Timings) -> CostTable:
    source = timings[bench.plain_step].source
    rows = tuple(_row(setting, timing.cost) for setting, timing in timings.items() if _is_row(setting))
    forward = next(row.cost for row in rows if row.kind == "forward")
    plain = timings[bench.plain_step].cost
    extras = {
        setting.name: _over(timing.cost, plain)
        for setting, timing in timings.items()
        if setting.kind == "step" and setting.name
    }
    return CostTable(
        device=f"{device_name(bench.device)}, {os.cpu_count()} cores, {threads_in_use()} threads",
        model=bench.config.model,
        sequence_length=bench.config.sequence_length,
        energy_source=source,
        rows=rows,
        probe_overhead=_over(timings[TimedSetting("probe")].cost, forward * PROBE_PASSES),
        extras=extras,
        switches=_switches(bench, timings),
        rounds=timings[bench.plain_step].rounds,
        spread=median_spread(timings),
    )


def _is_row(setting: TimedSetting) -> bool:
    return setting.kind in ("step", "forward") and not setting.name


def _row(setting: TimedSetting, cost: Cost) -> CostRow:
    passes = forward_passes(setting.batch_size) if setting.kind == "forward" else 1
    return CostRow(
        kind="forward" if setting.kind == "forward" else "step",
        precision=setting.precision,
        batch_size=setting.batch_size,
        removed=setting.removed,
        cost=cost * (1 / passes),
    )


def _switches(bench: CostBench, timings: Timings) -> dict[str, Cost]:
    """Return the costs of one switch (each timed pass made two). Masks are raised several times per interval."""
    switches = {
        setting.name: timing.cost * (0.5 if setting.kind == "switch" else MASK_UPDATES)
        for setting, timing in timings.items()
        if setting.kind in ("switch", "raise")
    }
    if bench.narrowing_s is not None:
        plain = timings[bench.plain_step].cost
        switches["width"] = plain * (bench.narrowing_s / plain.time_s)  # timed once: with the power of a step
    return switches


def _over(cost: Cost, base: Cost) -> Cost:
    """Return the excess of `cost` over `base`; zero if noise made it smaller."""
    difference = cost + base * -1.0
    energy_j = difference.energy_j
    return Cost(
        time_s=max(difference.time_s, 0.0),
        energy_j=None if energy_j is None else max(energy_j, 0.0),
    )


BATCH_FACTORS = (0.125, 0.25, 0.5, 1, 2, 4, 8)
"""Timed batch sizes, as factors on the case's own."""
OPTIMIZERS: tuple[OptimizerName, ...] = ("schedule-free", "prodigy")
PRUNINGS: tuple[Pruning, ...] = ("magnitude",)


def cost_tables(
    configs: Mapping[str, Sequence[RunConfig]],
    precisions: Mapping[str, Sequence[Precision]],
    folder: Path,
    progress: Callable[[str], None],
) -> dict[str, CostTable]:
    """Return the tables by `cost_key`; tables stored in `folder` are not measured again.

    Args:
        configs: Runs by case: the case's own, and others on its text whose models have another size.
        precisions: Precisions to measure, by case.
        folder: Folder in which each table is stored as a file.
        progress: Called with a line of text before each measurement.
    """
    tried: dict[str, dict[Precision, None]] = {}
    for name, sizes in configs.items():
        for config in sizes:
            tried.setdefault(cost_key(config), {}).update(dict.fromkeys(precisions[name]))
    tables: dict[str, CostTable] = {}
    for name, sizes in configs.items():
        for number, config in enumerate(sizes, start=1):
            key = cost_key(config)
            if key not in tables:
                progress(f"cost table of {name}" + (f", size {number} of {len(sizes)}" if len(sizes) > 1 else ""))
                tables[key] = _measured_table(config, tuple(tried[key]), folder)
    return tables


def _measured_table(config: RunConfig, precisions: Sequence[Precision], folder: Path) -> CostTable:
    path = folder / f"{digest(cost_key(config))}.json"
    kept = CostTable.read(path)
    if kept is not None and _holds(kept, config, precisions):
        return kept
    sizes = sorted({max(1, round(config.batch_size * factor)) for factor in BATCH_FACTORS})
    table = measure_cost_table(
        config,
        batch_sizes=sizes,
        precisions=precisions,
        optimizers=OPTIMIZERS,
        prunings=tuple(dict.fromkeys((*PRUNINGS, config.pruning))),
    )
    table.write(path)
    return table


def _holds(table: CostTable, config: RunConfig, precisions: Sequence[Precision]) -> bool:
    """Return whether a table covers everything that runs on `config` may use."""
    steps = {row.precision for row in table.rows if row.kind == "step"}
    narrowed = any(row.removed for row in table.rows)
    prunes = narrowed if config.pruning == "width" else config.pruning in ("none", *table.extras)
    return steps >= set(precisions) and prunes


def precisions_that_pay(case: Case) -> tuple[Precision, ...]:
    """Return the case's own precision and those that were measured to be faster than float32 on this device."""
    masked = LiveRun(case.config, probe=False).limits().masked_precisions
    return tuple(p for p in PRECISIONS if p == case.config.precision or p not in masked)
