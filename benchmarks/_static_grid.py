"""Find the best static schedule of every simulated instance on a fine grid, at several budgets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainpilot.llm_runtime.schedules import SCHEDULES, ScheduleName
from trainpilot.llm_runtime.simulator.instances import Instances
from trainpilot.llm_runtime.simulator.records import Floats, Ints
from trainpilot.llm_runtime.simulator.references import DECISIONS, ScheduleTable, static_losses

RATES: Floats = 1e-3 * 2.0 ** (np.arange(-8, 16) / 2)
"""Learning rates at the instance's starting batch, 6e-5 to 0.18 by sqrt 2; at other batches by the neutral rule."""
POWERS = np.arange(-4, 5)
"""Doublings of the starting batch. An instance that cannot do one takes the nearest that it can."""
WARMUPS = (0.02, 0.1, 0.4, 0.6, 0.8)
BASES: tuple[tuple[ScheduleName, float], ...] = tuple((name, warmup) for name in SCHEDULES for warmup in WARMUPS)
"""Schedules, and their warm-up's share of the budget."""
SHARES = (0.25, 0.5, 1.0, 2.0)
"""Budgets at which the best static schedule is sought, over the run's own."""
WHOLE = SHARES.index(1.0)
BEYOND = 2.0
"""A curve is believed up to this factor outside its budgets; what lies further is told as that limit."""


@dataclass(frozen=True, kw_only=True)
class StaticGrid:
    """What static schedules reach on each instance."""

    losses: Floats
    """Of every setting at the whole budget, shape (bases, rates, powers, n_instances), in nats/token."""
    best: Floats
    """Of the best setting at each of `SHARES`, shape (n_instances, budgets); a larger budget may stop earlier."""

    @classmethod
    def search(cls, instances: Instances) -> StaticGrid:
        """Try every setting at every budget: four minutes or so for 512 instances."""
        losses = [sweep(instances, share) for share in SHARES]
        best = np.stack([found.min(axis=(0, 1, 2)) for found in losses], axis=1)
        return cls(losses=losses[WHOLE], best=np.minimum.accumulate(best, axis=1))

    def of_base(self, base: tuple[ScheduleName, float]) -> Floats:
        """Return the lowest loss of each instance under one base schedule."""
        found: Floats = self.losses[BASES.index(base)].min(axis=(0, 1))
        return found

    def best_single(self) -> tuple[dict[str, Any], Floats]:
        """Return the setting whose median multiplier over the instances is highest, and the loss of each under it."""
        worth = needed(self.losses, SHARES, self.best)
        base, rate, power = np.unravel_index(np.median(worth, axis=-1).argmax(), worth.shape[:-1])
        setting = {
            "schedule": BASES[base][0],
            "warmup_share": BASES[base][1],
            "learning_rate": round(float(RATES[rate] * 2.0 ** (POWERS[power] / 2)), 7),
            "batch_over_start": float(2.0 ** POWERS[power]),
        }
        return setting, self.losses[base, rate, power]

    def describe(self) -> dict[str, Any]:
        """Return what the grid was, which settings won, and how often the best one lies on its edge."""
        n = self.losses.shape[-1]
        at = np.unravel_index(self.losses.reshape(-1, n).argmin(axis=0), self.losses.shape[:-1])
        bases = Counter(f"{BASES[i][0]}, warm-up {BASES[i][1]:.0%}" for i in at[0])
        return {
            "learning_rates_at_starting_batch": [float(f"{rate:.4g}") for rate in RATES],
            "batches_over_start": [float(2.0**power) for power in POWERS],
            "bases": [list(base) for base in BASES],
            "budgets": list(SHARES),
            "runs_per_instance": len(SHARES) * int(np.prod(self.losses.shape[:-1])),
            "best_base": {name: round(count / n, 4) for name, count in bases.most_common()},
            "learning_rate_on_edge": float(np.isin(at[1], (0, len(RATES) - 1)).mean()),
            "warmup_on_edge": round(float(np.mean([BASES[i][1] in (WARMUPS[0], WARMUPS[-1]) for i in at[0]])), 4),
        }


def sweep(instances: Instances, share: float, bases: Sequence[tuple[ScheduleName, float]] = BASES) -> Floats:
    """Return the loss of every setting at a share of the budget, shape (bases, rates, powers, n_instances)."""
    powers = nearest_power(instances, POWERS[:, None])
    rows, columns = np.nonzero(powers == POWERS[:, None])  # what takes another batch is not run twice
    each = instances.take(columns)
    batch = each.start_batch * 2.0 ** POWERS[rows]
    losses = np.empty((len(bases), len(RATES), len(POWERS), len(instances)))
    for i, (name, warmup) in enumerate(bases):
        table = ScheduleTable.of(name, warmup, DECISIONS)
        for j, at_start in enumerate(RATES):
            rate = at_start * np.sqrt(batch / each.start_batch)
            losses[i, j, rows, columns] = static_losses(each, rate, batch, table, share)
    taken = np.searchsorted(POWERS, powers)
    return losses[:, :, taken, np.arange(len(instances))]


def nearest_power(instances: Instances, power: Ints) -> Ints:
    """Return the doublings of the starting batch that the instances can do, next to those wanted."""
    low, high = instances.batch_limits(DECISIONS)
    start = instances.start_batch
    least, most = np.ceil(np.log2(low / start)), np.floor(np.log2(high / start))
    return np.clip(power, least, most).astype(np.int64)


def needed(loss: Floats, shares: Sequence[float], curve: Floats) -> Floats:
    """Return the budget at which a curve reaches a loss, interpolated in log-log, 0 for a loss that is not finite.

    Args:
        loss: Losses reached, shape (..., n_runs).
        shares: Budgets of the curve, rising.
        curve: Losses there, shape (n_runs, budgets), not rising.

    Returns:
        Shares of the whole budget, within `BEYOND` of the first and the last of `shares`.
    """
    with np.errstate(all="ignore"):
        x, points, y = np.log(loss), np.log(curve), np.log(np.asarray(shares))
        found = np.full(x.shape, np.nan)
        for i in range(len(y) - 1):
            fall = points[:, i] - points[:, i + 1]
            piece = y[i] + (y[i + 1] - y[i]) / fall * (points[:, i] - x)
            begins = (x < points[:, i] - 1e-12) | np.isnan(found)
            found = np.where((fall > 1e-9) & begins, piece, found)
        # A curve that never falls tells better from worse, and no more.
        flat = np.where(x <= points[:, 0], y[0], -np.inf)
        share = np.exp(np.where(np.isnan(found), flat, found))
    low, high = shares[0] / BEYOND, shares[-1] * BEYOND
    return np.where(np.isfinite(loss) & (loss > 0), np.clip(share, low, high), 0.0)
