"""Find the tuned static setting of each simulated instance: the baseline of a policy, and the unit of its reward.

`ScheduleTable` and `Progress` tabulate a base schedule by decision, as arrays: mean and last factor of each interval,
including cool-downs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from trainpilot.llm_runtime.budget import Currency
from trainpilot.llm_runtime.schedules import BUDGET_SHARES, COOLDOWN_SHARE, Schedule, ScheduleName, neutral_factor
from trainpilot.llm_runtime.simulator.instances import FINE_TUNING, TINY, Instances
from trainpilot.llm_runtime.simulator.physics import DEAD, DIVERGED_FACTOR, PhysicsState, advance, loss
from trainpilot.llm_runtime.simulator.records import Bools, Floats, Ints, Rows

_TOKENS = 1_000_000  # of a nominal budget: factors depend on shares only
_POINTS = 16


@dataclass(frozen=True, kw_only=True)
class ScheduleTable:
    """Factors of the learning rate, of shape (decisions,)."""

    mean: Floats
    last: Floats
    start: Floats
    """Factor at the beginning of the interval."""

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, name: ScheduleName, warmup_share: float, decisions: int) -> ScheduleTable:
        """Return the table of a schedule over `decisions` equal intervals; it is shared, and must not be changed."""
        schedule = Schedule(name=name, budget_tokens=_TOKENS, warmup_tokens=round(warmup_share * _TOKENS))
        points = (np.arange(decisions * _POINTS) + 0.5) / (decisions * _POINTS) * _TOKENS
        factors = np.array([schedule.factor(int(at), 0) for at in points]).reshape(decisions, _POINTS)
        start = np.array([schedule.factor(int(at), 0) for at in np.arange(decisions) / decisions * _TOKENS])
        return cls(mean=factors.mean(axis=1), last=factors[:, -1], start=start)


@dataclass(kw_only=True)
class Progress(Rows):
    """Positions of many runs in their schedules, in units of intervals; arrays of shape (n_runs,)."""

    position: Floats
    end: Floats
    """End of the run: the number of decisions, or the end of its cool-down."""
    cooldown_start: Floats
    """Begin of the cool-down; NaN before it."""
    cooldown_factor: Floats

    @classmethod
    def fresh(cls, n_runs: int, decisions: int) -> Progress:
        """Return the state before the first interval."""
        unknown = np.full(n_runs, np.nan)
        return cls(
            position=np.zeros(n_runs),
            end=np.full(n_runs, float(decisions)),
            cooldown_start=unknown,
            cooldown_factor=unknown.copy(),
        )

    @property
    def finishing(self) -> Bools:
        """Whether the cool-down has begun."""
        return ~np.isnan(self.cooldown_start)

    def restart(self, rows: Ints, decisions: int) -> None:
        """Reset some runs to the beginning."""
        self.put(rows, Progress.fresh(len(rows), decisions))

    def begin_cooldown(self, requested: Bools, table: ScheduleTable) -> None:
        """Begin the requested cool-downs that have not begun: a fall to zero over a fifth of the tokens so far."""
        rows = np.flatnonzero(requested & ~self.finishing)
        if not rows.size:
            return
        at = self.position[rows]
        least = 1.0 / 8  # about one step
        self.cooldown_start[rows] = at
        self.cooldown_factor[rows] = table.start[np.minimum(at.astype(np.int64), len(table.start) - 1)]
        self.end[rows] = np.minimum(at + np.maximum(COOLDOWN_SHARE * at, least), self.end[rows])

    def next_interval(self, table: ScheduleTable) -> tuple[Floats, Floats, Floats]:
        """Return the next interval's length (in intervals), and the schedule's mean and last factor in it."""
        length = np.clip(self.end - self.position, 0.0, 1.0)
        index = np.minimum(self.position.astype(np.int64), len(table.mean) - 1)
        mean, last = table.mean[index], table.last[index]
        if (cooling := self.finishing).any():
            span = np.maximum(self.end - self.cooldown_start, 1e-9)
            left = np.maximum(self.end - self.position, 0.0)
            middle = self.cooldown_factor * (left - length / 2) / span
            final = self.cooldown_factor * (left - 0.95 * length) / span
            mean, last = np.where(cooling, middle, mean), np.where(cooling, final, last)
        return length, mean, last


DECISIONS = 50
FIRST_RATES = np.geomspace(1e-4, 0.1, 13)
"""Learning rates of the coarse search, at the instance's own batch, in factors of 1.8."""
FINE_FACTORS = (0.75, 1.33)
LOWER_FACTORS = (0.03, 0.1, 0.3)
FINE_TUNING_GAIN = 0.01
"""Least gain of a doubled budget in fine-tuning, as a share of the loss. There more budget may gain nothing or do harm,
and a compute-equivalent would call a loss that is hardly higher worthless."""
WIDE_RATES = np.geomspace(10**-1.5, 10**1.5, 13)
"""Learning rates of the search for larger models, at each batch, over the rate where it is expected."""


@dataclass(kw_only=True)
class References(Rows):
    """The tuned static of each instance; arrays of shape (n_instances,) unless said otherwise."""

    rate: Floats
    """Tuned learning rate, converted to the instance's starting batch by the neutral rule."""
    batch: Ints
    losses: Floats
    """Loss at each of `BUDGET_SHARES`, tuned at each budget, shape (n_instances, 3), in nats/token. Those of smaller
    budgets are raised where fine-tuning gains less than `FINE_TUNING_GAIN` from a doubling."""
    time_s: Floats
    """Seconds of the tuned static's run, the unit of a policy's time."""
    energy_j: Floats
    """Joules of the tuned static's run, the unit of a policy's energy."""


def static_losses(
    instances: Instances,
    rate: Floats,
    batch: Floats,
    table: ScheduleTable,
    share: float = 1.0,
    *,
    currency: Currency = "tokens",
) -> Floats:
    """Return the final validation losses of static settings, in nats/token; infinite for diverging ones.

    Args:
        instances: Instances to train.
        rate: Peak learning rate at `batch`.
        batch: Sequences per step.
        table: Schedule of the whole run.
        share: Budget of the run as a share of the instance's.
        currency: What the budget is counted in.
    """
    state = PhysicsState.fresh(len(instances))
    sequences = instances.static_sequences(batch, currency) * share
    steps = sequences / len(table.mean) / batch
    with np.errstate(over="ignore", invalid="ignore"):
        for factor in table.mean:
            advance(instances.physics, state, steps, rate * factor, batch)
        final = loss(instances.physics, state)
    final = final + instances.sensors.validation_gap + overfit(instances, sequences)
    lives = np.isfinite(final) & (final < DIVERGED_FACTOR * instances.physics.initial_loss) & (state.damage <= DEAD)
    return np.where(lives, final, np.inf)


def overfit(instances: Instances, sequences: Floats) -> Floats:
    """Return validation loss minus training loss through overfitting, in nats/token: 0 in the first epoch."""
    repeated: Floats = np.maximum(sequences / instances.data - 1.0, 0.0)
    return instances.overfitting * repeated**1.3


def find_references(
    instances: Instances, schedule: ScheduleName = "wsd", warmup_share: float = 0.1, currency: Currency = "tokens"
) -> References:
    """Tune learning rate and batch of each instance on a grid, and the learning rate at the smaller budgets.

    In tokens small batches are best for tiny models: there the search ends at twice the starting batch. In seconds and
    joules, and for larger models, it tries all. Under budgets in seconds and joules the precision is the fastest.
    """
    table = ScheduleTable.of(schedule, warmup_share, DECISIONS)
    tiny = instances.kind == TINY
    best = _Best(len(instances))
    for mine, search in ((tiny, _search), (~tiny, _search_wide)):
        if (rows := np.flatnonzero(mine)).size:
            best.put(rows, search(instances.take(rows), table, currency))
    shorter = [_shorter(best, instances, table, share, currency) for share in BUDGET_SHARES[:-1]]
    losses = np.stack([*shorter, best.loss], axis=1)
    least = best.loss[:, None] * (1.0 + FINE_TUNING_GAIN * np.log2(1.0 / np.array(BUDGET_SHARES)))
    losses = np.where((instances.kind == FINE_TUNING)[:, None], np.maximum(losses, least), losses)
    time_s, energy_j = _cost(instances, best.batch, currency)
    return References(
        rate=best.rate,
        batch=best.batch.astype(np.int64),
        losses=losses,
        time_s=time_s,
        energy_j=energy_j,
    )


def _search(instances: Instances, table: ScheduleTable, currency: Currency) -> _Best:
    best = _Best(len(instances))
    low, high = instances.batch_limits(DECISIONS)
    largest = np.minimum(high, 2 * instances.start_batch) if currency == "tokens" else high
    for power in range(int(np.log2(np.max(largest / low))) + 1):
        doubled = low * 2.0**power
        batch = np.where(doubled <= largest, doubled, low)
        for at_start in FIRST_RATES:
            _try(best, instances, at_start, batch, table, currency=currency)
    for factor in FINE_FACTORS:
        _try(best, instances, best.rate * factor, best.batch, table, currency=currency)
    return best


def _search_wide(instances: Instances, table: ScheduleTable, currency: Currency) -> _Best:
    """Search three decades of learning rates and the machine's batches: coarsely, then finely around the best."""
    best = _Best(len(instances))
    low, high = (limit.astype(np.float64) for limit in instances.batch_limits(DECISIONS))
    for power in range(0, int(np.log2(np.max(high / low))) + 2, 2):
        batch = np.minimum(low * 2.0**power, high)
        for rate in WIDE_RATES[:, None] * instances.searched_rate:
            _try(best, instances, rate / neutral_factor(batch, instances.start_batch), batch, table, currency=currency)
    centre, middle = best.rate, best.batch
    for halving in (0.5, 2.0):
        batch = np.clip(middle * halving, low, high)
        for factor in (0.56, 1.0, 1.78):
            _try(best, instances, centre * neutral_factor(middle, batch) * factor, batch, table, currency=currency)
    for factor in (*FINE_FACTORS, 0.87, 1.15):
        _try(best, instances, best.rate * factor, best.batch, table, currency=currency)
    return best


class _Best(Rows):
    """Best setting so far, by instance."""

    def __init__(self, n: int) -> None:
        self.rate = np.full(n, 1e-3)
        self.batch = np.ones(n)
        self.loss = np.full(n, np.inf)


def _try(
    best: _Best,
    instances: Instances,
    at_start: Floats | float,
    batch: Floats,
    table: ScheduleTable,
    *,
    currency: Currency,
) -> None:
    rate = at_start * neutral_factor(batch, instances.start_batch)
    losses = static_losses(instances, rate, batch, table, currency=currency)
    better = losses < best.loss
    best.rate = np.where(better, at_start, best.rate)
    best.batch = np.where(better, batch, best.batch)
    best.loss = np.where(better, losses, best.loss)


def _shorter(best: _Best, instances: Instances, table: ScheduleTable, share: float, currency: Currency) -> Floats:
    rate, factors = best.rate * neutral_factor(best.batch, instances.start_batch), (0.56, 1.0, 1.8, 3.2)
    found = [static_losses(instances, rate * factor, best.batch, table, share, currency=currency) for factor in factors]
    least: Floats = np.minimum.reduce(found)
    if (rows := np.flatnonzero(instances.kind != TINY)).size:  # a shorter warm-up may need a far lower rate
        some, slow, batch = instances.take(rows), rate[rows], best.batch[rows]
        lower = [static_losses(some, slow * factor, batch, table, share, currency=currency) for factor in LOWER_FACTORS]
        least[rows] = np.minimum.reduce([least[rows], *lower])
    return least


def _cost(instances: Instances, batch: Floats, currency: Currency) -> tuple[Floats, Floats]:
    hardware, n = instances.hardware, len(instances)
    precision = np.zeros(n, dtype=np.int64) if currency == "tokens" else hardware.fastest_precision()
    step_s = hardware.step_s(batch, precision, np.zeros(n))
    time_s = step_s * instances.static_sequences(batch, currency) / batch
    return time_s, time_s * hardware.power_w(batch)
