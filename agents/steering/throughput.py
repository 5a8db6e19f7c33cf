"""The throughput floor: which batches are too slow on this device, from the seconds of the run itself.

A small batch spends most of its time on what every step costs, whatever its size. `Throughput` keeps what a token costs
at each batch over what it costs at the starting one. Two batches are compared where one follows the other, by the last
intervals of the one and the first of the other, so that a machine that becomes busy in between does not count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median_low

from trainpilot.envs.action import Situation
from trainpilot.llm_runtime.config import ControlLimits
from trainpilot.llm_runtime.telemetry import Telemetry

PROVEN = 2
"""Intervals at a batch before it is judged, so that a single slow one says nothing."""
NEWEST = 3
"""Most intervals on either side of a change of batch that are compared: by their lower median, the faster of two."""


@dataclass(kw_only=True)
class Throughput:
    """What a token costs at each batch, from the intervals so far. A rollback does not restore it."""

    costs: dict[int, float] = field(default_factory=dict)
    """Seconds per token at each batch, all over the same unknown speed of the machine."""
    batch_size: int = 0
    """The batch of the newest intervals; 0 before the first."""
    stayed: int = 0
    """Intervals at it since it was chosen."""
    newest: list[float] = field(default_factory=list)
    """Seconds per token of the newest of these."""
    machine: float | None = None
    """Seconds per token at a cost of 1, by the last batch before this one that has proven itself; `None` without."""

    def begin(self, limits: ControlLimits) -> None:
        """Before the first interval, take the prices at the starting batch and at half of it, where both are known."""
        start = limits.start
        if self.costs or self.stayed:
            return
        prices = {
            each.batch_size: each.time_s / each.batch_size
            for each in limits.prices
            if each.precision == start.precision and each.batch_size <= start.batch_size
        }
        if len(prices) > 1 and start.batch_size in prices:
            self.costs = {batch_size: price / prices[start.batch_size] for batch_size, price in prices.items()}

    def take(self, telemetry: Telemetry) -> None:
        """Add an interval; probe and changes of controls apart."""
        training_s = telemetry.time_s - telemetry.probe_time_s - telemetry.switch_time_s
        if not (telemetry.interval_tokens > 0 and math.isfinite(training_s) and training_s > 0):
            return
        batch_size = telemetry.requested.batch_size
        if batch_size != self.batch_size:
            if self.stayed >= PROVEN and self.batch_size in self.costs:
                self.machine = median_low(self.newest) / self.costs[self.batch_size]
            self.batch_size, self.stayed, self.newest = batch_size, 0, []
        self.stayed += 1
        self.newest = [*self.newest, training_s / telemetry.interval_tokens][-NEWEST:]
        if PROVEN <= self.stayed <= NEWEST:
            if self.machine is not None:
                self.costs[batch_size] = median_low(self.newest) / self.machine
            else:  # the first batch of all, by which the others are judged
                self.costs.setdefault(batch_size, 1.0)

    def share(self, batch_size: int) -> float | None:
        """Return a batch's tokens/s over those of the fastest batch so far; `None` where it cannot be said yet.

        A batch that is smaller than all so far is predicted from the two smallest: a step takes a fixed time and a time
        per sequence, so a token costs a / B + c, where neither is below 0.
        """
        cost = self.costs.get(batch_size)
        if cost is None and len(self.costs) > 1 and batch_size < min(self.costs):
            small, large = sorted(self.costs)[:2]
            fixed = (self.costs[small] - self.costs[large]) / (1 / small - 1 / large)
            fixed = min(max(fixed, 0.0), self.costs[small] * small)
            cost = self.costs[small] + fixed * (1 / batch_size - 1 / small)
        return None if cost is None else min(self.costs.values()) / cost

    def refuses(self, batch_size: int, situation: Situation, floor: float) -> str | None:
        """Return why a smaller batch is refused; `None` where it may be tried or gives the share `floor`."""
        now = situation.controls.batch_size
        if batch_size >= min(now, situation.limits.start.batch_size):
            return None
        if now not in self.costs:
            return f"not before {PROVEN} intervals at batch {now}, which throughput_floor compares it with"
        share = self.share(batch_size)
        if share is None or share >= floor:
            return None
        return f"batch {batch_size} would give {share:.2f} of this machine's best tokens/s; throughput_floor={floor:g}"

    def too_slow(self, situation: Situation, floor: float) -> str | None:
        """Return why the batch in force has to grow, having proven too slow; `None` where it may stay."""
        now, share = situation.controls.batch_size, self.share(situation.controls.batch_size)
        proven = now == self.batch_size and self.stayed >= PROVEN
        if now >= situation.limits.start.batch_size or not proven or share is None or share >= floor:
            return None
        return f"batch {now} gives {share:.2f} of this machine's best tokens/s; throughput_floor={floor:g}"
