"""Medians with bootstrap intervals over seeds and cases, and sign tests; also for numbers known only as bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from trainpilot.experiments.analysis.figures import Censored, Estimate, SignTest

N_RESAMPLES = 2_000
COVERED = 0.95
TIE = 1e-9
"""Multipliers that differ from 1 by less are ties; they occur if method and baseline are the same run."""


@dataclass(frozen=True)
class Bounded:
    """A number that is known to lie between `low` and `high`; an exact one if these are equal."""

    low: float
    high: float

    def plus(self, amount: float) -> Bounded:
        """Return the number with `amount` added."""
        return Bounded(self.low + amount, self.high + amount)

    def times(self, factor: float) -> Bounded:
        """Return the number times a positive factor."""
        return Bounded(self.low * factor, self.high * factor)


NEVER = Bounded(math.inf, math.inf)
"""Number of runs, or budget, of something that never happens."""


def exactly(value: float) -> Bounded:
    """Return an exactly known number."""
    return Bounded(value, value)


def below(value: float) -> Bounded:
    """Return a number of which only an upper bound is known."""
    return Bounded(-math.inf, value)


def above(value: float) -> Bounded:
    """Return a number of which only a lower bound is known."""
    return Bounded(value, math.inf)


def over_seeds(values: Sequence[Bounded]) -> Estimate:
    """Return the median of one case's numbers, one per seed, with an interval from resampling seeds."""
    return _estimate([values], len(values))


def over_cases(groups: Iterable[Sequence[Bounded]]) -> Estimate:
    """Return the median over cases of each case's median over its seeds.

    The interval comes from drawing cases with replacement, and within each drawn case its seeds.
    """
    known = [group for group in groups if group]
    return _estimate(known, len(known))


def _estimate(groups: Sequence[Sequence[Bounded]], n: int) -> Estimate:
    if not n:
        return Estimate(value=None)
    bounds = [np.array([(value.low, value.high) for value in group]).T for group in groups]  # each (2, seeds)
    low, high = _median(np.stack([_median(group) for group in bounds], axis=-1))
    value, censored = _median_and_bound(float(low), float(high))
    if value is None or sum(map(len, groups)) == 1:  # one number has no interval
        return Estimate(value=value, n=n, censored=censored)
    lowest, highest = _interval(bounds)
    return Estimate(
        value=value,
        low=0.0 if lowest == -math.inf else lowest,  # all numbers here are positive
        high=highest if math.isfinite(highest) else None,
        n=n,
        censored=censored,
    )


def _median_and_bound(low: float, high: float) -> tuple[float | None, Censored]:
    """Return the median of bounded numbers as a value: it lies between the medians of their two bounds."""
    if low == high:
        return (low, "") if math.isfinite(low) else (None, ">")
    if math.isfinite(high):
        return high, "<"
    return (low, ">") if math.isfinite(low) else (None, "")


def _interval(groups: Sequence[np.ndarray]) -> tuple[float, float]:
    if all((group == groups[0][:, :1]).all() for group in groups):  # as is usual for tokens
        return float(groups[0][0, 0]), float(groups[0][1, 0])
    medians = _resampled_medians(groups)
    tail = (1 - COVERED) / 2
    low = np.quantile(medians[0], tail, method="inverted_cdf")  # infinite numbers cannot be interpolated
    high = np.quantile(medians[1], 1 - tail, method="inverted_cdf")
    return float(low), float(high)


def _resampled_medians(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Return the medians of the two bounds in each resample, of shape (2, N_RESAMPLES)."""
    rng = np.random.default_rng(0)
    sizes = np.array([group.shape[-1] for group in groups])
    padded = np.full((2, len(groups), sizes.max()), np.nan)
    for index, group in enumerate(groups):
        padded[:, index, : sizes[index]] = group
    drawn = rng.integers(len(groups), size=(N_RESAMPLES, len(groups)))
    medians = np.empty((2, *drawn.shape))
    for size in np.unique(sizes):
        here = sizes[drawn] == size
        seeds = rng.integers(size, size=(int(here.sum()), size))
        medians[:, here] = _median(padded[:, drawn[here][:, None], seeds])
    return _median(medians)


def _median(bounds: np.ndarray) -> np.ndarray:
    """Return the medians over the last axis; the first one holds lower and upper bounds."""
    ranked = np.sort(bounds, axis=-1)
    upper = ranked.shape[-1] // 2
    lower = upper if ranked.shape[-1] % 2 else upper - 1
    with np.errstate(invalid="ignore"):
        medians: np.ndarray = ranked[..., lower] / 2 + ranked[..., upper] / 2
    unknown = np.array([-math.inf, math.inf]).reshape(2, *[1] * (medians.ndim - 1))
    return np.where(np.isnan(medians), unknown, medians)  # the mean of minus and plus infinity is unknown


def sign_test(multipliers: Iterable[Estimate]) -> SignTest:
    """Count the cases with a multiplier above and below 1, and return the p-value of these counts.

    A case without a multiplier is not counted; one whose bounds lie on both sides of 1 is a tie.
    """
    sides = [_side(estimate) for estimate in multipliers if estimate.value is not None]
    wins, losses = sides.count(1), sides.count(-1)
    return SignTest(wins=wins, losses=losses, ties=sides.count(0), p_value=_two_sided(wins, losses))


def _side(estimate: Estimate) -> int:
    above_one = (estimate.value or 0.0) - 1
    if estimate.censored == "<":
        return -1 if above_one <= TIE else 0
    if estimate.censored == ">":
        return 1 if above_one >= -TIE else 0
    return 0 if abs(above_one) <= TIE else round(math.copysign(1, above_one))


def _two_sided(wins: int, losses: int) -> float:
    from scipy.stats import binomtest  # takes half a second to load

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
