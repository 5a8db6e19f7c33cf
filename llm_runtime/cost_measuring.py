"""Measure a cost table: what steps, passes and switches of one model cost on one device."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from trainpilot.llm_runtime.config import OptimizerName, Precision, Pruning, RunConfig
from trainpilot.llm_runtime.cost_bench import CostBench, Setting, forward_passes
from trainpilot.llm_runtime.cost_table import CostRow, CostTable
from trainpilot.llm_runtime.energy.host import CpuEstimateMeter
from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergySource, select_meter
from trainpilot.llm_runtime.live_run import MASK_UPDATES, resolve_device
from trainpilot.llm_runtime.precision import device_name, lacking, synchronise
from trainpilot.llm_runtime.process import threads_in_use
from trainpilot.llm_runtime.schedules import PROBE_PASSES
from trainpilot.llm_runtime.timing import Cost, Timing, alternate, median_spread

CPU_VISIT_S = 0.015
GPU_VISIT_S: Mapping[EnergySource | None, float] = {None: 0.1, "measured_counter": 0.5, "measured_power": 1.0}
"""Seconds of a visit: a GPU's energy counter advances every 0.1 s, its power may be a mean over 1 s."""

Timings = Mapping[Setting, Timing]


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

    On a busy machine: seconds are those of the fastest visit, so that one moment of quiet per setting is enough; with
    one thread on a CPU they are CPU seconds, which other programs hardly move. Joules are the seconds times the watts
    of the meter. RAPL and the meters of GPUs see every program on the device: what runs beside this makes the joules
    too high. The estimate for other CPUs sees this process alone: idle watts for as long as it takes, and watts of its
    busy threads. With one thread it runs on CPU seconds too; with several, waiting makes the joules too low.

    Left out: drawing batches, the norm of Adam's moments that a run looks at every tenth step, and the copies that
    `schedule-free` makes for an evaluation.

    Args:
        config: Model, sequence length and device.
        batch_sizes: Sequences per step of AdamW, and per forward pass of an evaluation.
        precisions: Of AdamW's steps; in the first one the extras are measured, at the smallest batch.
        optimizers: Others, whose extra per step is measured.
        prunings: `width` measures everything on a narrower model too; masks have their extra per step measured.
        meter: Energy meter; by default the best one that the device has.
        limit_s: No further round begins after so many seconds; there are four at least.
        progress: Called after each round with the share of the work done, in [0, 1].

    Raises:
        ValueError: the device lacks a precision, the model cannot be pruned so, or nothing is asked for.
    """
    _check(config, batch_sizes, precisions)
    bench = CostBench(config, batch_sizes, precisions)
    others = [name for name in dict.fromkeys(optimizers) if name != "adamw"]
    passes = dict(bench.passes(others, [name for name in dict.fromkeys(prunings) if name != "none"]))
    own = meter if meter is not None else _meter(bench)
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


def _meter(bench: CostBench) -> EnergyMeter:
    """Return the best meter there is; an estimate counts as idle time what the passes count as time."""
    meter = select_meter(str(bench.device))
    return CpuEstimateMeter(clock=bench.clock) if isinstance(meter, CpuEstimateMeter) else meter


def _visit_s(device: torch.device, meter: EnergyMeter) -> float:
    return CPU_VISIT_S if device.type == "cpu" else GPU_VISIT_S.get(meter.read().source, CPU_VISIT_S)


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
        probe_overhead=_over(timings[Setting("probe")].cost, forward * PROBE_PASSES),
        extras=extras,
        switches=_switches(bench, timings),
        rounds=timings[bench.plain_step].rounds,
        spread=median_spread(timings),
    )


def _is_row(setting: Setting) -> bool:
    return setting.kind in ("step", "forward") and not setting.name


def _row(setting: Setting, cost: Cost) -> CostRow:
    passes = forward_passes(setting.batch_size) if setting.kind == "forward" else 1
    return CostRow(
        kind="forward" if setting.kind == "forward" else "step",
        precision=setting.precision,
        batch_size=setting.batch_size,
        removed=setting.removed,
        cost=cost * (1 / passes),
    )


def _switches(bench: CostBench, timings: Timings) -> dict[str, Cost]:
    """Return the costs of one switch; each pass made two. Masks are raised several times along an interval."""
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
    """Return what `cost` has over `base`: nothing where noise made it the smaller one."""
    difference = cost + base * -1.0
    energy_j = difference.energy_j
    return Cost(
        time_s=max(difference.time_s, 0.0),
        energy_j=None if energy_j is None else max(energy_j, 0.0),
    )
