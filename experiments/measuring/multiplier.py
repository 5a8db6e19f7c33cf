"""Turn a loss into the budget at which a baseline reaches it, and that into a compute multiplier."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median
from typing import Any

from trainpilot.experiments.measuring.statistics import Bounded, above, below, exactly

BEYOND = 2.0
"""A curve is believed up to this factor outside the budgets that were measured."""
SAME = 1e-12
"""Logarithms of losses that differ by less are those of the same loss."""

Point = tuple[float, float]
"""(logarithm of a budget over the whole one, logarithm of the loss over the whole run's)."""


WHOLE: Point = (0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class CurveRun:
    """One run of a baseline."""

    seed: int
    share: float
    """Of the case's budget in tokens."""
    used: float
    """In the axis's unit."""
    loss: float | None
    """Final validation loss in nats/token; `None` for a run that diverged or failed."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Final loss of a baseline against its budget: one shape for all seeds, at the level of each seed's own run."""

    points: tuple[Point, ...]
    """Rising in budget and strictly falling in loss; the whole run is (0, 0)."""
    measured: tuple[float, float]
    """Logarithms of the smallest and the largest budget measured, over the whole one."""
    n_pooled: int
    """Budgets that were out of order and count as one with a neighbour."""
    flat_end: bool
    """The largest budget got no better than those before it."""
    whole_beaten: bool
    """A smaller budget got at least as good as the whole one: what is compared with that looks too good."""
    whole: tuple[float, float]
    """Budget and loss of the whole run, medians over seeds."""
    by_seed: Mapping[int, tuple[float, float]]
    """The same of each seed whose run ended with a loss."""

    @property
    def budgets(self) -> tuple[float, ...]:
        """Budgets of the points, in the axis's unit."""
        return tuple(self.whole[0] * math.exp(x) for x, _ in self.points)

    @property
    def losses(self) -> tuple[float, ...]:
        """Losses of the points, in nats/token."""
        return tuple(self.whole[1] * math.exp(y) for _, y in self.points)

    def needed(self, loss: float, seed: int | None = None) -> Bounded:
        """Return the budget at which the baseline reaches `loss`, at the level of `seed` where its run is known."""
        budget, level = self._level(seed)
        return self._share_needed(math.log(loss / level)).times(budget)

    def extrapolates(self, loss: float, seed: int | None = None) -> bool:
        """Return whether `loss` lies outside the losses of the points."""
        y = math.log(loss / self._level(seed)[1])
        return not self.points[-1][1] - SAME <= y <= self.points[0][1] + SAME

    def _level(self, seed: int | None) -> tuple[float, float]:
        return self.whole if seed is None else self.by_seed.get(seed, self.whole)

    def _share_needed(self, y: float) -> Bounded:
        if abs(y) <= SAME:
            return exactly(1.0)
        if len(self.points) == 1:
            return above(1.0) if y < 0 else below(1.0)
        if self.points[-1][1] <= y <= self.points[0][1]:
            return exactly(math.exp(float(self._between(-y))))
        return self._worse_than_all(y) if y > 0 else self._better_than_all(y)

    @cached_property
    def _between(self) -> Any:
        """Monotone cubic pieces (Fritsch and Butland 1984) from -log loss to log budget.

        A loss that falls towards a floor is curved in the logarithms, and its chords lie above it: straight pieces
        would make a gain of 25 % look like one of 26 %.
        """
        from scipy.interpolate import PchipInterpolator  # takes half a second to load

        return PchipInterpolator([-y for _, y in self.points], [x for x, _ in self.points])

    def _worse_than_all(self, y: float) -> Bounded:
        limit = self.measured[0] - math.log(BEYOND)
        x = _along(self.points[0], self.points[1], y)
        return exactly(math.exp(x)) if x >= limit else below(math.exp(limit))

    def _better_than_all(self, y: float) -> Bounded:
        limit = self.measured[1] + math.log(BEYOND)
        x = _along(self.points[-2], self.points[-1], y)
        if x > limit or self.flat_end:  # where more budget brought nothing, the line on is too kind to the baseline
            return above(math.exp(min(x, limit)))
        return exactly(math.exp(x))


def fit_curve(runs: Sequence[CurveRun]) -> Curve | None:
    """Return the curve through a baseline's runs, or `None` where its runs of the whole budget gave no loss.

    A budget's place is the median, over the seeds that have both runs, of its ratio to the same seed's whole run: a
    budget that only one seed was given is compared with that seed. A failed run counts as infinitely bad. Budgets out
    of order are pooled (isotonic regression); the whole run stays where it is, so that its own loss is worth 1.
    """
    whole = [run for run in runs if run.share == 1]
    level = median([_loss(run) for run in whole]) if whole else math.inf
    if not math.isfinite(level):
        return None
    ended = {run.seed: (run.used, run.loss) for run in whole if run.loss is not None}
    measured = sorted([WHOLE, *_other_points(runs, ended)])
    blocks = _in_order(measured)
    return Curve(
        points=tuple(_place(block) for block in blocks),
        measured=(measured[0][0], measured[-1][0]),
        n_pooled=len(measured) - len(blocks),
        flat_end=len(blocks[-1]) > 1,
        whole_beaten=any(WHOLE in block and block[0] != WHOLE for block in blocks),
        whole=(median([run.used for run in whole if run.loss is not None]), level),
        by_seed=ended,
    )


def compute_multiplier(
    loss: float | None, used: float, curve: Curve, *, seed: int | None = None, search: float = 0.0
) -> Bounded:
    """Return the budget that the baseline needs for `loss`, over the budget used.

    Args:
        loss: Final validation loss in nats/token; `None` for a run that diverged or failed, which is worth least.
        used: Budget used, in the curve's unit.
        curve: The baseline's.
        seed: The run's seed; the baseline's run with the same seed sets the level.
        search: What finding the baseline's setting used, in the curve's unit, if it is to be paid for.
    """
    return below(0.0) if loss is None else curve.needed(loss, seed).plus(search).times(1 / used)


def _loss(run: CurveRun) -> float:
    return math.inf if run.loss is None else run.loss


def _other_points(runs: Iterable[CurveRun], ended: Mapping[int, tuple[float, float]]) -> list[Point]:
    ratios: dict[float, list[Point]] = {}
    for run in runs:
        if run.share != 1 and run.seed in ended:
            used, loss = ended[run.seed]
            more = run.share if run.loss is None else run.used / used  # a failed run may have used nothing
            ratios.setdefault(run.share, []).append((math.log(more), math.log(_loss(run) / loss)))
    points = [(median([x for x, _ in found]), median([y for _, y in found])) for found in ratios.values()]
    return [point for point in points if math.isfinite(point[1])]


def _in_order(points: Sequence[Point]) -> list[list[Point]]:
    """Pool neighbours, points rising in budget, until each block's loss lies below that of the block before."""
    blocks: list[list[Point]] = []
    for point in points:
        blocks.append([point])
        while len(blocks) > 1 and _place(blocks[-1])[1] >= _place(blocks[-2])[1] - SAME:
            last = blocks.pop()
            blocks[-1] += last
    return blocks


def _place(block: Sequence[Point]) -> Point:
    """Return where a block lies: at the whole run if that is in it, otherwise in its middle."""
    if WHOLE in block:
        return WHOLE
    return (fmean(x for x, _ in block), fmean(y for _, y in block))


def _along(before: Point, after: Point, y: float) -> float:
    """Return the logarithm of the budget at which the line through two points reaches `y`."""
    (x0, y0), (x1, y1) = before, after
    return x0 + (x1 - x0) / (y1 - y0) * (y - y0)
