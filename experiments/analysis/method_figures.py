"""Compute the figures of each method on each case and over all cases, including the cost of reaching a target loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from trainpilot.experiments.analysis.figures import (
    AXES,
    BASELINES,
    PARTS,
    CaseFigures,
    Estimate,
    MethodFigures,
    TargetFigures,
)
from trainpilot.experiments.analysis.modelled_cost import Amounts, Run, Runs, cumulative
from trainpilot.experiments.analysis.multiplier import (
    CaseBaselines,
    Multipliers,
    break_even_runs,
    multipliers,
    product_scores,
)
from trainpilot.experiments.analysis.statistics import NEVER, Bounded, above, exactly, over_cases, over_seeds, sign_test
from trainpilot.experiments.results import UNTUNED, Case
from trainpilot.llm_runtime.energy.meter import sum_known


@dataclass(frozen=True)
class EvaluatedLoss:
    """A measured validation loss with the costs up to that point."""

    loss: float
    """In nats/token."""
    used: Amounts
    """Modelled costs up to then."""


def target_loss(case: Case, runs: Runs) -> float | None:
    """Return the case's own target, or the untuned default's median final loss, in nats/token."""
    if case.target_loss is not None:
        return case.target_loss
    losses = [math.inf if run.loss is None else run.loss for run in runs.of(case.name, UNTUNED)]
    return found if losses and math.isfinite(found := median(losses)) else None


def target_figures(runs: Sequence[Run], target: float | None) -> TargetFigures:
    """Return the costs of reaching `target`, over a method's seeds."""
    needed = [used_to_reach(run, target) for run in runs] if target is not None else []
    return TargetFigures(
        n_reached=sum(found["tokens"] is not None and math.isfinite(found["tokens"].high) for found in needed),
        n_runs=len(runs),
        tokens=over_seeds([value for found in needed if (value := found["tokens"])]),
        time_s=over_seeds([value for found in needed if (value := found["time_s"])]),
        energy_j=over_seeds([value for found in needed if (value := found["energy_j"])]),
    )


def used_to_reach(run: Run, target: float) -> dict[str, Bounded | None]:
    """Return the costs, by axis, at which the run first reached `target`; a lower bound if it never did.

    Costs and loss are interpolated linearly between two evaluations.
    """
    losses = _evaluated_losses(run)
    index = next((index for index, each in enumerate(losses) if each.loss <= target), None)
    if index is None:
        return {axis: None if (spent := run.spent[axis]) is None else above(spent) for axis in AXES}
    before, after = losses[max(index - 1, 0)], losses[index]
    share = (before.loss - target) / (before.loss - after.loss) if index else 0.0
    return {axis: _between(before.used[axis], after.used[axis], share) for axis in AXES}


def _between(before: float | None, after: float | None, share: float) -> Bounded | None:
    return None if before is None or after is None else exactly(before + (after - before) * share)


def _evaluated_losses(run: Run) -> list[EvaluatedLoss]:
    """Return all evaluations of the validation loss, including the one before the first step."""
    result = run.result
    costs = cumulative(result, run.table, run.tables) if run.cost is not None and run.table is not None else None
    losses = []
    if result.initial_validation_loss is not None:
        start = {axis: None if spent is None else 0.0 for axis, spent in run.spent.items()}
        losses.append(EvaluatedLoss(result.initial_validation_loss, start))
    for index, interval in enumerate(result.intervals):
        if interval.validation_loss is not None:
            used = {
                "tokens": float(interval.tokens),
                "time_s": costs[index].time_s if costs else None,
                "energy_j": costs[index].energy_j if costs else None,
            }
            losses.append(EvaluatedLoss(interval.validation_loss, used))
    return losses


@dataclass(frozen=True, kw_only=True)
class MethodOnCase:
    """Results of one method on one case, by seed."""

    case: str
    method: str
    runs: Sequence[Run]
    multipliers: Multipliers
    product_scores: Sequence[Bounded]
    break_even: Sequence[Bounded]


def method_on_case(runs: Runs, baselines: CaseBaselines, method: str) -> MethodOnCase:
    """Measure a method on a case against its baselines."""
    judged = runs.of(baselines.case, method)
    training_j = runs.note(method).training_energy_j
    return MethodOnCase(
        case=baselines.case,
        method=method,
        runs=judged,
        multipliers=multipliers(judged, baselines, runs.own_search(baselines.case, method)),
        product_scores=product_scores(judged, baselines.base_runs),
        break_even=[] if training_j is None else break_even_runs(judged, baselines, training_j),
    )


def case_figures(found: MethodOnCase, target: float | None) -> CaseFigures:
    """Return a method's figures on one case."""
    runs, results = found.runs, [run.result for run in found.runs]
    return CaseFigures(
        case=found.case,
        method=found.method,
        n_runs=len(runs),
        n_diverged=sum(result.diverged for result in results),
        n_failed=_n_failed(runs),
        n_stopped_early=sum(result.stopped_early for result in results),
        validation_loss=over_seeds(_losses(runs, lambda run: run.loss)),
        test_loss=over_seeds(_losses(runs, lambda run: run.result.final_test_loss)),
        tokens=_median(run.spent["tokens"] for run in runs),
        measured_time_s=_median(_measured_time_s(run) for run in runs),
        measured_energy_j=_median(_measured_energy_j(run) for run in runs),
        energy_source=_sources(runs),
        energy_shared=any(result.energy_shared for result in results),
        time_s=_median(run.spent["time_s"] for run in runs),
        energy_j=_median(run.spent["energy_j"] for run in runs),
        time_parts_s=_mean_parts([run.cost.time_parts_s for run in runs if run.cost]) or {},
        energy_parts_j=_mean_parts([run.cost.energy_parts_j for run in runs if run.cost and run.cost.energy_parts_j]),
        to_target=target_figures(runs, target),
        multipliers=_each(lambda baseline, axis: over_seeds(found.multipliers[baseline][axis])),
        product_score=over_seeds(found.product_scores),
    )


def method_figures(name: str, on_cases: Sequence[MethodOnCase], cases: Sequence[CaseFigures]) -> MethodFigures:
    """Return a method's figures over the cases on which it was run."""
    on_cases = [found for found in on_cases if found.method == name]
    cases = [found for found in cases if found.method == name]
    break_even = [found.break_even for found in on_cases if found.break_even]
    return MethodFigures(
        method=name,
        n_runs=sum(found.n_runs for found in cases),
        n_diverged=sum(found.n_diverged for found in cases),
        n_failed=sum(found.n_failed for found in cases),
        multipliers=_each(lambda baseline, axis: over_cases([f.multipliers[baseline][axis] for f in on_cases])),
        sign_tests={
            baseline: {axis: sign_test(found.multipliers[baseline][axis] for found in cases) for axis in AXES}
            for baseline in BASELINES
        },
        product_score=over_cases([found.product_scores for found in on_cases]),
        break_even_runs=over_cases(break_even) if break_even else None,
    )


def _each(estimate: Callable[[str, str], Estimate]) -> dict[str, dict[str, Estimate]]:
    return {baseline: {axis: estimate(baseline, axis) for axis in AXES} for baseline in BASELINES}


def _n_failed(runs: Sequence[Run]) -> int:
    return sum(run.loss is None and not run.result.diverged for run in runs)


def _losses(runs: Sequence[Run], loss: Callable[[Run], float | None]) -> list[Bounded]:
    """Return the final losses; for a run without one, the loss before its first step is a lower bound."""
    found = []
    for run in runs:
        value, initial = loss(run), run.result.initial_validation_loss
        failed = NEVER if initial is None else above(initial)
        found.append(failed if value is None else exactly(value))
    return found


def _median(values: Iterable[float | None]) -> Estimate:
    return over_seeds([exactly(value) for value in values if value is not None])


def _measured_time_s(run: Run) -> float:
    return sum(interval.time_s + interval.evaluation_time_s for interval in run.result.intervals)


def _measured_energy_j(run: Run) -> float | None:
    """Return the measured joules including evaluation; `None` without intervals, or if those of one are unknown."""
    intervals = run.result.intervals
    evaluations = [interval.evaluation_energy_j for interval in intervals if interval.evaluation_sequences]
    return sum_known([*(interval.energy_j for interval in intervals), *evaluations]) if intervals else None


def _sources(runs: Sequence[Run]) -> str | None:
    return ", ".join(sorted({run.result.energy_source for run in runs if run.result.energy_source})) or None


def _mean_parts(parts: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    return {part: fmean(found[part] for found in parts) for part in PARTS} if parts else None
