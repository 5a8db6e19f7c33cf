"""Compute multipliers: the budget at which a baseline reaches a method's loss, over the budget that the method used.

`Curve` is the loss of a baseline over its budget on one case, `CaseBaselines` all baselines of a case. `product_score`
compares a run with a base run by one number: P^1.5 (a T + b E), as Wallace et al. 2025 do for inference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median
from typing import Any

import numpy as np

from trainpilot.envs.reward import MAX_LOSS_INCREASE, Outcome, budget_for_loss, product
from trainpilot.experiments.analysis.figures import AXES, BaselineCurve
from trainpilot.experiments.analysis.modelled_cost import Amounts, Run, Runs
from trainpilot.experiments.analysis.statistics import NEVER, Bounded, above, below, exactly
from trainpilot.experiments.results import UNTUNED, Case

BEYOND = 2.0
"""A curve is extrapolated up to this factor outside the measured budgets."""
SAME = 1e-12
"""Logarithms of losses that differ by less are considered equal."""

Point = tuple[float, float]
"""(logarithm of a budget over the whole one, logarithm of the loss over the whole run's)."""


WHOLE: Point = (0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class CurveRun:
    """One run of a baseline."""

    seed: int
    share: float
    """Share of the case's budget in tokens."""
    used: float
    """Budget used, in the axis's unit."""
    loss: float | None
    """Final validation loss in nats/token; `None` for a run that diverged or failed."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Final loss of a baseline as a function of its budget: one shape for all seeds, shifted to each seed's run."""

    points: tuple[Point, ...]
    """Rising in budget and strictly falling in loss; the whole run is (0, 0)."""
    measured: tuple[float, float]
    """Logarithms of the smallest and the largest budget measured, over the whole one."""
    n_pooled: int
    """Budgets whose losses were out of order and were pooled with a neighbour's."""
    flat_end: bool
    """Whether the largest budget reached no lower loss than those before it."""
    whole_beaten: bool
    """A smaller budget got at least as good as the whole one: methods look too good against that curve."""
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
        return self._beyond_the_points(y)

    @cached_property
    def _between(self) -> Any:
        """Monotone cubic pieces (Fritsch and Butland 1984) from -log loss to log budget.

        A loss with a floor is convex in the logarithms, so linear interpolation lies above it and would turn a gain of
        25 % into 26 %.
        """
        from scipy.interpolate import PchipInterpolator  # takes half a second to load

        return PchipInterpolator([-y for _, y in self.points], [x for x, _ in self.points])

    def _beyond_the_points(self, y: float) -> Bounded:
        """Extrapolate the end pieces linearly to `y`; return a bound if that is too far from the measured budgets."""
        low, high = math.exp(self.measured[0]) / BEYOND, math.exp(self.measured[1]) * BEYOND
        budgets, losses = np.exp(self.points).T
        share = float(budget_for_loss(math.exp(y), budgets, losses, limits=(low, high)))
        if y > 0:
            return exactly(share) if share > low else below(low)
        if share >= high or self.flat_end:  # a flat end would favour the baseline
            return above(share)
        return exactly(share)


def fit_curve(runs: Sequence[CurveRun]) -> Curve | None:
    """Fit the curve through a baseline's runs; `None` if no run of the whole budget has a final loss.

    The point of a budget is the median, over the seeds that have both runs, of its ratio to the whole run of the same
    seed. A failed run counts as infinitely bad. Budgets out of order are pooled (isotonic regression); the point of the
    whole run is fixed, so that its own loss has multiplier 1.
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
        search: Cost of the search for the baseline's setting, in the curve's unit, if it is to be charged.
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
    """Pool neighbouring points (ascending in budget) until the losses of the blocks decrease strictly.

    This is isotonic regression with the whole run as a fixed point, which scipy's implementation does not support.
    """
    blocks: list[list[Point]] = []
    for point in points:
        blocks.append([point])
        while len(blocks) > 1 and _place(blocks[-1])[1] >= _place(blocks[-2])[1] - SAME:
            last = blocks.pop()
            blocks[-1] += last
    return blocks


def _place(block: Sequence[Point]) -> Point:
    """Return the position of a block: the whole run if it contains that, otherwise its middle."""
    if WHOLE in block:
        return WHOLE
    return (fmean(x for x, _ in block), fmean(y for _, y in block))


TIME_WEIGHT, ENERGY_WEIGHT = 0.5, 0.5
"""a and b."""
WORST = math.exp(1.5 * MAX_LOSS_INCREASE)
"""A failed run is worth more (worse) than this: a loss as bad as any that counts, at the base run's cost."""


def product_score(
    loss: float | None,
    base_loss: float,
    *,
    time: float,
    energy: float | None,
    time_weight: float = TIME_WEIGHT,
    energy_weight: float = ENERGY_WEIGHT,
) -> Bounded:
    """Return P^1.5 (a T + b E), where 1 equals the base run and lower is better.

    P is the ratio of the perplexities, exp(loss - base_loss). It is capped where the loss is two nats above.

    Args:
        loss: Final validation loss in nats/token; `None` for a run that diverged or failed.
        base_loss: The base run's.
        time: T, seconds over the base run's.
        energy: E, joules over the base run's; `None` where unknown, which leaves the time alone (a = 1, b = 0).
        time_weight: a.
        energy_weight: b; a and b are scaled to sum to 1.
    """
    if loss is None:
        return above(WORST)
    weights = np.array([0.0, energy_weight if energy is not None else 0.0, time_weight])
    outcome = Outcome(energy=-(energy or 0.0), time=-time, loss_increase=loss - base_loss)
    return exactly(-float(product(outcome, weights)))


Multipliers = Mapping[str, Mapping[str, Sequence[Bounded]]]
"""By baseline and axis, one for each seed."""


@dataclass(frozen=True)
class Baseline:
    """A baseline's budget curve on one case, in one axis."""

    method: str
    """Method to whose rows the runs belong."""
    curve: Curve


@dataclass(frozen=True, kw_only=True)
class CaseBaselines:
    """Baselines of one case. Baselines that were not run, or have no final loss, are missing."""

    case: str
    untuned: Mapping[str, Baseline]
    """Untuned default, by axis."""
    tuned: Mapping[str, Baseline]
    """Tuned static by axis: the best setting for equal tokens, seconds or joules."""
    search: Amounts
    """Costs of the tuned static's search."""
    base_runs: Sequence[Run]
    """Runs of the untuned default."""

    def curves(self) -> list[BaselineCurve]:
        """Return the curves for the report."""
        found = [("untuned", axis, baseline.curve) for axis, baseline in self.untuned.items()]
        found += [(baseline.method, axis, baseline.curve) for axis, baseline in self.tuned.items()]
        return [
            BaselineCurve(case=self.case, baseline=name, axis=axis, budgets=curve.budgets, losses=curve.losses)
            for name, axis, curve in found
        ]


def case_baselines(runs: Runs, case: Case) -> CaseBaselines:
    """Return the baselines of a case that were run."""
    tuned = {found.axis: found.method for found in runs.comparison.baselines.get(case.name, ())}
    return CaseBaselines(
        case=case.name,
        untuned=_fitted(runs, case.name, dict.fromkeys(AXES, UNTUNED)),
        tuned=_fitted(runs, case.name, {axis: tuned[axis] for axis in AXES if axis in tuned}),
        search=runs.search_cost(case.name),
        base_runs=runs.of(case.name, UNTUNED),
    )


def _fitted(runs: Runs, case: str, methods: Mapping[str, str]) -> dict[str, Baseline]:
    curves = {axis: fit_curve(_curve_runs(runs, case, method, axis)) for axis, method in methods.items()}
    return {axis: Baseline(methods[axis], curve) for axis, curve in curves.items() if curve is not None}


def _curve_runs(runs: Runs, case: str, method: str, axis: str) -> list[CurveRun]:
    return [
        CurveRun(seed=run.seed, share=run.row.budget, used=used, loss=run.loss)
        for run in [*runs.of(case, method), *runs.of(case, method, "curve")]
        if (used := run.spent[axis]) is not None
    ]


def multipliers(judged: Sequence[Run], baselines: CaseBaselines, own_search: Amounts) -> Multipliers:
    """Return a method's compute multipliers, by seed.

    For the baseline `tuned_with_sweep`, the cost of the search is added to the baseline's budget, and the cost of the
    method's own search, if it has one, to the method's.
    """
    none = dict.fromkeys(AXES, 0.0)
    sides = {
        "untuned": (baselines.untuned, none, none),
        "tuned": (baselines.tuned, none, none),
        "tuned_with_sweep": (baselines.tuned, baselines.search, own_search),
    }
    return {
        name: {axis: _seed_by_seed(judged, curves.get(axis), axis, paid[axis], own[axis]) for axis in AXES}
        for name, (curves, paid, own) in sides.items()
    }


def _seed_by_seed(
    judged: Sequence[Run], baseline: Baseline | None, axis: str, search: float | None, own: float | None
) -> list[Bounded]:
    """Return the multipliers; runs of unknown cost are skipped, unless they failed."""
    if baseline is None or search is None or own is None:
        return []
    return [
        compute_multiplier(run.loss, (used or 0.0) + own, baseline.curve, seed=run.seed, search=search)
        for run in judged
        if (used := run.counted[axis]) is not None or run.loss is None
    ]


def product_scores(judged: Sequence[Run], base: Sequence[Run]) -> list[Bounded]:
    """Return a method's product scores against the base runs, by seed."""
    by_seed = {run.seed: run for run in base if run.loss is not None}
    typical = sorted(by_seed.values(), key=lambda run: (run.loss, run.seed))
    scores = []
    for run in judged:
        against = by_seed.get(run.seed) or (typical[len(typical) // 2] if typical else None)
        if against is not None and (score := _product_score(run, against)) is not None:
            scores.append(score)
    return scores


def _product_score(run: Run, base: Run) -> Bounded | None:
    time, energy = _ratio(run, base, "time_s"), _ratio(run, base, "energy_j")
    if base.loss is None or (time is None and run.loss is not None):
        return None
    return product_score(run.loss, base.loss, time=time or 0.0, energy=energy)


def _ratio(run: Run, base: Run, axis: str) -> float | None:
    above, below = run.counted[axis], base.counted[axis]
    return above / below if above is not None and below else None


def break_even_runs(judged: Sequence[Run], baselines: CaseBaselines, training_energy_j: float) -> list[Bounded]:
    """Return the number of steered runs after which the policy's training energy has been saved, by seed.

    A run saves the joules that the tuned static needs for the same loss, including its search, minus its own.
    """
    baseline, search = baselines.tuned.get("energy_j"), baselines.search["energy_j"]
    if baseline is None or search is None:
        return []
    found = []
    for run in judged:
        used = run.counted["energy_j"]
        if run.loss is None:
            found.append(NEVER)
        elif used is not None:
            found.append(_runs_until(training_energy_j, baseline.curve.needed(run.loss, run.seed).plus(search - used)))
    return found


def _runs_until(cost: float, saved: Bounded) -> Bounded:
    """Return `cost` divided by the saving of a run; `NEVER` if it saves nothing."""
    if saved.high <= 0:
        return NEVER
    return Bounded(cost / saved.high, cost / saved.low if saved.low > 0 else NEVER.high)
