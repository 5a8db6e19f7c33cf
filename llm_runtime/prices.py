"""Measure what a training step costs at half, at the same and at double the batch, where that is cheap.

It is done once per device and model, before the first step and outside of the run's seconds and joules, as for the
precisions. The passes' gradients are dropped, so the optimizer's own time is not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainpilot.llm_runtime.config import Precision, StepPrice
from trainpilot.llm_runtime.energy.meter import EnergyMeter, energy_between, sum_known
from trainpilot.llm_runtime.json_records import JsonRecord

COST_SHARE = 0.005
"""The measurement takes at most this share of a run's steps; a run that is too short for it does without."""
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class PriceList(JsonRecord):
    """Prices that were measured together."""

    measured: str
    """Device, model, sequence length and so on."""
    prices: tuple[StepPrice, ...]


def affordable_rounds(batch_sizes: Sequence[int], n_sequences: int) -> int:
    """Return how many rounds over these batches a run of `n_sequences` affords, besides one to warm up."""
    return min(int(COST_SHARE * n_sequences / sum(batch_sizes)) - 1, ROUNDS)


def batch_prices(
    passes: Mapping[int, Callable[[], None]],
    precision: Precision,
    meter: EnergyMeter,
    *,
    rounds: int,
    path: Path,
    label: str,
    wait: Callable[[], None],
) -> tuple[StepPrice, ...]:
    """Return the price of a step at each batch, from the file of an earlier measurement or measured now.

    Args:
        passes: One forward and backward pass at each batch.
        precision: Their precision.
        meter: Energy meter; joules of a batch that was not timed for as long as its resolution are unknown.
        rounds: Timed rounds over the batches; with less than one, nothing is measured.
        path: File that keeps the result.
        label: What the result holds for.
        wait: Waits until the device has done what it was asked.
    """
    kept = PriceList.read(path)
    if kept is not None and kept.measured == label and {each.batch_size for each in kept.prices} == set(passes):
        return kept.prices
    if rounds < 1:
        return ()
    prices = _measured(passes, precision, meter, rounds, wait)
    with suppress(OSError):  # a cache that cannot be written only costs time
        PriceList(measured=label, prices=prices).write(path)
    return prices


def _measured(
    passes: Mapping[int, Callable[[], None]],
    precision: Precision,
    meter: EnergyMeter,
    rounds: int,
    wait: Callable[[], None],
) -> tuple[StepPrice, ...]:
    seconds: dict[int, list[float]] = {batch_size: [] for batch_size in passes}
    joules: dict[int, list[float | None]] = {batch_size: [] for batch_size in passes}
    for index in range(1 + rounds):
        for batch_size, run in passes.items():
            wait()
            before, start_s = meter.read(), time.perf_counter()
            run()
            wait()
            lasted_s, after = time.perf_counter() - start_s, meter.read()
            if index:  # the first round warms up
                seconds[batch_size].append(max(lasted_s, 1e-9))
                joules[batch_size].append(energy_between(before, after)[0])
    prices = []
    for batch_size, times in seconds.items():
        time_s, total_j = statistics.median(times), sum_known(joules[batch_size])
        lasted = sum(times) >= meter.resolution_s and total_j
        energy_j = total_j / sum(times) * time_s if total_j is not None and lasted else None
        prices.append(StepPrice(batch_size=batch_size, precision=precision, time_s=time_s, energy_j=energy_j))
    return tuple(prices)
