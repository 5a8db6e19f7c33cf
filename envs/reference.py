"""Run a case under its unchanged base schedule, at three budgets, and cache the result as the case's reference.

Also makes the live runs of environments and their references; torch is loaded when the first one is made.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from trainpilot.envs.reward import Reference
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.drive import DrivenInterval, drive
from trainpilot.llm_runtime.energy import select_meter
from trainpilot.llm_runtime.energy.meter import EnergyMeter, sum_known
from trainpilot.llm_runtime.files import cache_dir, digest
from trainpilot.llm_runtime.schedules import BUDGET_SHARES
from trainpilot.llm_runtime.telemetry import Plant

FORMAT = 2
"""Version of the cached references; those of other versions are computed again."""

PlantFactory = Callable[[RunConfig], Plant]
Progress = Callable[[str], None]


def reference_for(
    config: RunConfig, make_plant: PlantFactory, *, setting: str, progress: Progress | None = None
) -> Reference:
    """Return the reference of a case: from the cache, or by running it (about 1.75 runs) and caching it.

    Args:
        config: The case.
        make_plant: Makes the plant that is run.
        setting: Device, threads and digest of the content, which are part of the cache's key, since seconds, joules and
            losses depend on them.
        progress: Called with a line of text before each run.

    Raises:
        ValueError: the base schedule itself diverges on this case.
    """
    path = cache_dir() / "reference" / f"{digest([FORMAT, config.settings(), setting], 10)}.json"
    kept = Reference.read(path)
    if kept is not None:
        return kept
    reference = run_reference(config, make_plant, progress)
    with suppress(OSError):  # a cache that cannot be written only costs time
        reference.write(path)
    return reference


def run_reference(config: RunConfig, make_plant: PlantFactory, progress: Progress | None = None) -> Reference:
    """Run the base schedule at each of `BUDGET_SHARES`, and return the reference.

    Raises:
        ValueError: the base schedule itself diverges on this case.
    """
    losses: list[float] = []
    intervals: list[DrivenInterval] = []
    initial = 0.0
    for share in BUDGET_SHARES:
        if progress is not None:
            progress(f"reference {config.model}, {share:.0%} of {config.budget or f'{config.tokens:,} tokens'}")
        plant = make_plant(_shortened(config, share))
        initial = plant.evaluate()
        intervals = _base_run(plant, config)
        losses.append(intervals[-1].loss)
    telemetry, budget = [interval.telemetry for interval in intervals], config.measured_budget()
    return Reference(
        currency="tokens" if budget is None else budget.currency,
        budgets=BUDGET_SHARES,
        losses=tuple(losses),
        initial_loss=initial,
        time_s=sum(t.time_s for t in telemetry),
        energy_j=sum_known(t.energy_j for t in telemetry),
        energy_source=telemetry[-1].energy_source,
        telemetry=tuple(telemetry),
    )


def _shortened(config: RunConfig, share: float) -> RunConfig:
    """Return the case with `share` of its budget and with intervals of the same length, so fewer of them."""
    decisions = max(1, int(config.decisions * share))  # rounding up could leave intervals without a step
    if (budget := config.measured_budget()) is not None:
        return replace(config, budget=str(budget * share), decisions=decisions)
    warmup = None if config.warmup_tokens is None else round(config.warmup_tokens * share)
    tokens = max(round(config.tokens * share), config.batch_size * config.sequence_length)
    return replace(config, tokens=tokens, decisions=decisions, warmup_tokens=warmup)


def _base_run(plant: Plant, config: RunConfig) -> list[DrivenInterval]:
    """Return the intervals of a whole run under the base schedule."""
    controls = config.start()
    intervals = list(drive(plant, lambda _: controls, plant.limits().decisions))
    if intervals[-1].telemetry.diverged or not math.isfinite(intervals[-1].loss):
        raise ValueError(
            f"base_learning_rate: the base schedule itself diverged on {config.model} at "
            f"{config.base_learning_rate}; lower it"
        )
    return intervals


def live_plant() -> PlantFactory:
    """Return a factory of live runs in this process, which share one energy meter per device."""
    meters: dict[str, EnergyMeter] = {}

    def make(config: RunConfig) -> Plant:
        from trainpilot.llm_runtime.live_run import LiveRun, resolve_device

        device = str(resolve_device(config.device))
        if device not in meters:
            meters[device] = select_meter(device)
        return LiveRun(config, meter=meters[device], counts_pauses=False)

    return make


def live_reference(
    config: RunConfig, make_plant: PlantFactory | None = None, progress: Progress | None = None
) -> Reference:
    """Return the reference of a live run, from the cache if text, model files, device and threads are the same."""
    from trainpilot.llm_runtime.data.text_sources import content_digest

    setting = f"{device_label(config)}, content {content_digest(config)}"
    return reference_for(config, make_plant or live_plant(), setting=setting, progress=progress)


def device_label(config: RunConfig) -> str:
    """Return a label of the device that a case runs on and of its number of threads."""
    from trainpilot.llm_runtime.live_run import resolve_device
    from trainpilot.llm_runtime.precision import device_name
    from trainpilot.llm_runtime.process import threads_in_use

    device = device_name(resolve_device(config.device))
    return f"{device}, {os.cpu_count()} cores, {threads_in_use()} threads"
