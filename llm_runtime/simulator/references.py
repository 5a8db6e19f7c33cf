"""Find what static settings reach on simulated instances: the opponent of a policy, and the unit of its reward."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from trainpilot.llm_runtime.schedules import ScheduleName
from trainpilot.llm_runtime.simulator.instances import Instances
from trainpilot.llm_runtime.simulator.physics import PhysicsState, advance, loss
from trainpilot.llm_runtime.simulator.records import Floats, Ints
from trainpilot.llm_runtime.simulator.schedule_table import ScheduleTable

BUDGET_SHARES = (0.25, 0.5, 1.0)
"""Shares of the budget at which the tuned static is known; those of a live run's reference."""
DECISIONS = 50
FIRST_RATES = np.geomspace(1e-4, 0.1, 13)
"""Learning rates that are tried first, at the instance's own batch: factors of 1.8."""
FINE_FACTORS = (0.75, 1.33)


@dataclass(kw_only=True)
class References:
    """The tuned static of each instance; arrays of shape (n_instances,) unless said otherwise."""

    rate: Floats
    """Its learning rate, by the neutral rule at the instance's starting batch."""
    batch: Ints
    losses: Floats
    """Its loss at each of `BUDGET_SHARES`, tuned again at each, shape (n_instances, 3), in nats/token."""
    time_s: Floats
    """Seconds of the tuned static's run: the unit of a policy's time, as its losses are the unit of quality."""
    energy_j: Floats
    """Joules of the same."""

    def take(self, rows: Ints) -> References:
        """Return copies of some instances' references."""
        return References(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def put(self, rows: Ints, other: References) -> None:
        """Replace some by those of `other`."""
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(other, field.name)


def static_losses(
    instances: Instances, rate: Floats, batch: Floats, table: ScheduleTable, share: float = 1.0
) -> Floats:
    """Return the validation losses that static settings end with, in nats/token; infinite where they diverge.

    Args:
        instances: What is trained.
        rate: Peak learning rate at `batch`.
        batch: Sequences per step.
        table: The schedule, over the whole of the run.
        share: Share of the budget that the run has.
    """
    state = PhysicsState.fresh(len(instances))
    sequences = instances.sequences * share
    steps = sequences / len(table.mean) / batch
    with np.errstate(over="ignore", invalid="ignore"):
        for factor in table.mean:
            advance(instances.physics, state, steps, rate * factor, batch)
        final = loss(instances.physics, state)
    final = final + instances.meters.validation_gap + overfit(instances, sequences)
    return np.where(np.isfinite(final) & (final < 1.3 * instances.physics.initial_loss), final, np.inf)


def overfit(instances: Instances, sequences: Floats) -> Floats:
    """Return what validation loses to training after `sequences`, in nats/token: nothing in the first epoch."""
    repeated: Floats = np.maximum(sequences / instances.data - 1.0, 0.0)
    return instances.overfitting * repeated**1.3


def find_references(instances: Instances, schedule: ScheduleName = "wsd", warmup_share: float = 0.1) -> References:
    """Tune learning rate and batch of each instance on a grid, the learning rate again at a quarter and a half."""
    table = ScheduleTable.of(schedule, warmup_share, DECISIONS)
    best = _Best(len(instances))
    low, high = instances.batch_limits(DECISIONS)
    for power in range(7):
        doubled = low * 2.0**power
        batch = np.where(doubled <= np.minimum(high, 2 * instances.start_batch), doubled, low)
        for at_start in FIRST_RATES:
            _try(best, instances, at_start, batch, table)
    for factor in FINE_FACTORS:
        _try(best, instances, best.rate * factor, best.batch, table)
    shorter = [_shorter(best, instances, table, share) for share in BUDGET_SHARES[:-1]]
    time_s, energy_j = _cost(instances, best.batch)
    return References(
        rate=best.rate,
        batch=best.batch.astype(np.int64),
        losses=np.stack([*shorter, best.loss], axis=1),
        time_s=time_s,
        energy_j=energy_j,
    )


class _Best:
    """The best setting so far."""

    def __init__(self, n: int) -> None:
        self.rate = np.full(n, 1e-3)
        self.batch = np.ones(n)
        self.loss = np.full(n, np.inf)


def _try(best: _Best, instances: Instances, at_start: Floats | float, batch: Floats, table: ScheduleTable) -> None:
    rate = at_start * np.sqrt(batch / instances.start_batch)
    losses = static_losses(instances, rate, batch, table)
    better = losses < best.loss
    best.rate = np.where(better, at_start, best.rate)
    best.batch = np.where(better, batch, best.batch)
    best.loss = np.where(better, losses, best.loss)


def _shorter(best: _Best, instances: Instances, table: ScheduleTable, share: float) -> Floats:
    rate = best.rate * np.sqrt(best.batch / instances.start_batch)
    found = [static_losses(instances, rate * factor, best.batch, table, share) for factor in (0.56, 1.0, 1.8, 3.2)]
    least: Floats = np.minimum.reduce(found)
    return least


def _cost(instances: Instances, batch: Floats) -> tuple[Floats, Floats]:
    zeros = np.zeros(len(instances))
    step_s = instances.hardware.step_s(batch, zeros.astype(np.int64), zeros)
    time_s = step_s * instances.sequences / batch
    return time_s, time_s * instances.hardware.power_w(batch)
