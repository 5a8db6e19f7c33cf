"""Turn the runs of a comparison into its figures. Pure: the same runs always give the same figures."""

from __future__ import annotations

from collections.abc import Mapping

from trainpilot.experiments.compare.comparison import Comparison
from trainpilot.experiments.compare.records import RunResult
from trainpilot.experiments.measuring.baselines import case_baselines
from trainpilot.experiments.measuring.figures import Figures
from trainpilot.experiments.measuring.method_figures import case_figures, method_figures, method_on_case
from trainpilot.experiments.measuring.points import case_points, family_fronts
from trainpilot.experiments.measuring.remarks import remarks, rests_on
from trainpilot.experiments.measuring.runs import Runs
from trainpilot.experiments.measuring.sanity import sanity_checks
from trainpilot.experiments.measuring.targets import target_loss
from trainpilot.llm_runtime.cost_table import CostTable


def analyse(comparison: Comparison, results: Mapping[str, RunResult], tables: Mapping[str, CostTable]) -> Figures:
    """Return the figures of a comparison.

    Diverged and failed runs count as worst. What rests on runs that are not there is an estimate without a value.

    Args:
        comparison: Which run stands for what.
        results: Runs by key; rows without one are left out and told of.
        tables: Cost tables by `cost_key`.
    """
    runs = Runs(comparison, results, tables)
    names = [case.name for case in comparison.cases]
    baselines = {case.name: case_baselines(runs, case) for case in comparison.cases}
    targets = {case.name: target_loss(case, runs) for case in comparison.cases}
    on_cases = [
        method_on_case(runs, baselines[case], method)
        for case in names
        for method in runs.notes
        if runs.of(case, method)
    ]
    cases = [case_figures(found, targets[found.case]) for found in on_cases]
    methods = [method_figures(method, on_cases, cases) for method in runs.notes]
    points = [point for case in names for point in case_points(runs, case)]
    return Figures(
        cases=tuple(cases),
        methods=tuple(methods),
        points=tuple(points),
        fronts=tuple(family_fronts(runs, points, baselines)),
        curves=tuple(curve for case in names for curve in baselines[case].curves()),
        checks=sanity_checks(cases, methods, runs.notes, baselines),
        targets=targets,
        sweep_costs={case: baselines[case].search for case in names},
        rests_on=rests_on(runs),
        notes=remarks(runs, baselines, methods),
    )
