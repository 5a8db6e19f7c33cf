"""Gather the baselines of a case, and measure methods against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainpilot.experiments.compare.comparison import UNTUNED, Case
from trainpilot.experiments.measuring.figures import AXES, BaselineCurve
from trainpilot.experiments.measuring.multiplier import Curve, CurveRun, compute_multiplier, fit_curve
from trainpilot.experiments.measuring.product_score import product_score
from trainpilot.experiments.measuring.runs import Amounts, Run, Runs
from trainpilot.experiments.measuring.statistics import NEVER, Bounded

Multipliers = Mapping[str, Mapping[str, Sequence[Bounded]]]
"""By baseline and axis, one for each seed."""


@dataclass(frozen=True)
class Baseline:
    """A baseline's budget curve on one case, in one axis."""

    method: str
    """Whose rows it is made of."""
    curve: Curve


@dataclass(frozen=True, kw_only=True)
class CaseBaselines:
    """What the methods are compared with on one case. What is missing was not run, or gave no loss."""

    case: str
    untuned: Mapping[str, Baseline]
    """By axis."""
    tuned: Mapping[str, Baseline]
    """By axis: the setting that is best for equal tokens, seconds, joules."""
    search: Amounts
    """What the tuned static's search used."""
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
    """Return the baselines of a case, as far as they were run."""
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
    """Return a method's compute multipliers, seed by seed.

    With the sweep paid for, the baseline's side has its search on top, and so has that of a method which was itself
    found by a search.
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
    """Return the multipliers; of runs whose cost is unknown there are none, but a failure is one all the same."""
    if baseline is None or search is None or own is None:
        return []
    return [
        compute_multiplier(run.loss, (used or 0.0) + own, baseline.curve, seed=run.seed, search=search)
        for run in judged
        if (used := run.counted[axis]) is not None or run.loss is None
    ]


def product_scores(judged: Sequence[Run], base: Sequence[Run]) -> list[Bounded]:
    """Return a method's product scores against the base runs, seed by seed."""
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
    """Return after how many steered runs the policy's training is earned back in joules, seed by seed.

    A run saves what the tuned static needs for the same loss, its search included, less what the run used itself.
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
    """Return `cost` over what a run saves; never, where it saves nothing."""
    if saved.high <= 0:
        return NEVER
    return Bounded(cost / saved.high, cost / saved.low if saved.low > 0 else NEVER.high)
