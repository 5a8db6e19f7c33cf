"""Compute all figures of a comparison from its runs, with sanity checks and remarks for the reader.

`analyse` is a pure function: the same runs always give the same figures. `sanity_checks` tests whether planted effects
and known results from the literature come out. `remarks` lists caveats, such as extrapolated curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from types import MappingProxyType

from trainpilot.experiments.analysis.figures import (
    PRESUMED_BUG,
    CaseFigures,
    Estimate,
    Figures,
    MethodFigures,
    SanityCheck,
)
from trainpilot.experiments.analysis.method_figures import case_figures, method_figures, method_on_case, target_loss
from trainpilot.experiments.analysis.modelled_cost import Run, Runs
from trainpilot.experiments.analysis.multiplier import Baseline, CaseBaselines, case_baselines
from trainpilot.experiments.analysis.pareto import case_points, family_fronts
from trainpilot.experiments.analysis.statistics import TIE
from trainpilot.experiments.analysis.uses import Uses, use_points
from trainpilot.experiments.costs.table import CostTable
from trainpilot.experiments.results import TUNED, UNTUNED, Comparison, MethodNote, PolicyName, RunResult, is_policy

PLANTED_BUDGET = 1.25
INTERPOLATION = 0.01
"""Relative error by which interpolation of the curve may change a multiplier, in addition to its interval."""
PUBLISHED_QUARTER_RATE = 0.33
"""A quarter of the best peak costs 2.9 to 3.1 times the steps, for WSD on models of 25 to 400 M parameters."""
WIDE_MARGIN = 1.1
"""Least expected ratio of the tokens that a tuned constant rate needs; at equal peaks it is 1.56 to 2.2."""
ABOUT_EQUAL = 0.95
DECAYS = ("tuned-linear", "tuned-cosine", "tuned-wsd")
SOME_DECAY = "decay, the best of three schedules, beats a constant rate"
LINEAR_DECAY = "linear to zero beats a constant rate"
WHY_NO_MARGIN = (
    "short runs are limited by how far the weights have moved, and linear to zero moves them half as far; "
    "decay pays where gradient noise is the limit"
)
AT_EQUAL_PEAKS = "long runs at equal peaks gave 1.56 to 2.2"
AS_GOOD = "linear to zero is about as good as cosine to 10 %, or better"

Worths = Mapping[str, Estimate]
"""Compute multipliers over all cases by method, in tokens against the tuned static; known ones only."""


def sanity_checks(
    cases: Sequence[CaseFigures],
    methods: Sequence[MethodFigures],
    notes: Mapping[str, MethodNote],
    baselines: Mapping[str, CaseBaselines],
) -> tuple[SanityCheck, ...]:
    """Return the checks, all in tokens and against the tuned static."""
    found = {figures.method: figures.multipliers["tuned"]["tokens"] for figures in methods}
    worths = {name: estimate for name, estimate in found.items() if estimate.value is not None}
    return (
        _itself(worths),
        _planted_budget(worths),
        _quarter_rate(worths),
        _more_helps(baselines),
        _ratio(SOME_DECAY, _ratios(cases, DECAYS, "tuned-constant"), WIDE_MARGIN, AT_EQUAL_PEAKS),
        _ratio(LINEAR_DECAY, _ratios(cases, DECAYS[:1], "tuned-constant"), WIDE_MARGIN, AT_EQUAL_PEAKS),
        _ratio(AS_GOOD, _ratios(cases, DECAYS[:1], "tuned-cosine"), ABOUT_EQUAL, "both tuned"),
        *(_in_between(name, worths) for name in ("schedule-free", "prodigy")),
        _no_wonder({name: worth for name, worth in worths.items() if notes[name].kind != "check"}),
    )


def _itself(worths: Worths) -> SanityCheck:
    worth = worths.get("check-self")
    return _check(
        "the tuned static against itself",
        "1.00",
        _format(worth),
        worth is not None and not worth.censored and abs(_value(worth) - 1) <= TIE,
    )


def _planted_budget(worths: Worths) -> SanityCheck:
    worth = worths.get("check-budget")
    return _check(
        "the tuned static with a quarter more tokens, not counted",
        f"{PLANTED_BUDGET}, within its interval (and 1 % for the interpolation)",
        _format(worth),
        worth is not None and _low(worth) * (1 - INTERPOLATION) <= PLANTED_BUDGET <= _high(worth) * (1 + INTERPOLATION),
    )


def _quarter_rate(worths: Worths) -> SanityCheck:
    worth = worths.get("check-rate")
    return _check(
        "the tuned static with a quarter of its learning rate",
        f"clearly below 1; published {PUBLISHED_QUARTER_RATE} on larger models. At 1 the tuned rate would be too high",
        _format(worth),
        worth is not None and _high(worth) < 1,
    )


def _more_helps(baselines: Mapping[str, CaseBaselines]) -> SanityCheck:
    curves = {case: found.tuned["tokens"].curve for case, found in baselines.items() if "tokens" in found.tuned}
    known = [case for case, curve in curves.items() if len(curve.points) + curve.n_pooled > 1]
    beaten = [case for case in known if curves[case].whole_beaten]
    return _check(
        "the tuned static gets better with more budget",
        "no smaller budget is as good as the whole one; if one is, a lucky setting was taken for the best",
        (f"not on {', '.join(beaten)}" if beaten else f"on all of {len(known)} cases") if known else None,
        not beaten,
    )


def _ratio(name: str, ratios: Sequence[float], least: float, published: str) -> SanityCheck:
    found = f"{median(ratios):.2f} in the median of {len(ratios)} cases" if ratios else None
    expected = f"a ratio of multipliers of at least {least} ({published})"
    passed = bool(ratios) and median(ratios) >= least
    if found and not passed and name != AS_GOOD:
        found = f"{found}. A likely reason: {WHY_NO_MARGIN}"
    return _check(name, expected, found, passed)


def _ratios(cases: Sequence[CaseFigures], methods: Sequence[str], other: str) -> list[float]:
    """Return, by case, the best method's multiplier over another's; infinite if the other multiplier is 0."""
    worths = {(found.case, found.method): found.multipliers["tuned"]["tokens"].value for found in cases}
    names = dict.fromkeys(found.case for found in cases)
    found = []
    for case in names:
        known = [worth for method in methods if (worth := worths.get((case, method))) is not None]
        against = worths.get((case, other))
        if known and against is not None:
            found.append(max(known) / against if against else float("inf"))
    return found


def _in_between(name: str, worths: Worths) -> SanityCheck:
    untuned, worth = worths.get(UNTUNED), worths.get(name)
    expected = f"at least the untuned default, and at most {PRESUMED_BUG} times the tuned static"
    if untuned is None or worth is None:
        return _check(f"{name} lies between the untuned default and the tuned static", expected, None, False)
    return _check(
        f"{name} lies between the untuned default and the tuned static",
        expected,
        f"{_format(worth)}, the untuned default {_format(untuned)}",
        _value(untuned) <= _value(worth) <= PRESUMED_BUG,
    )


def _no_wonder(worths: Worths) -> SanityCheck:
    wonders = [f"{name} {_format(worth)}" for name, worth in worths.items() if _value(worth) > PRESUMED_BUG]
    found = ", ".join(wonders) or f"none of {len(worths)}"
    return _check(
        "no method beats the tuned static by more than 5 %",
        "none; if one does, presume a bug in the baseline and look a second time",
        found if worths else None,
        not wonders,
    )


def _check(name: str, expected: str, found: str | None, passed: bool) -> SanityCheck:
    """Return a check; `passed` is `None` if nothing was found."""
    return SanityCheck(name=name, expected=expected, found=found or "not compared", passed=passed if found else None)


def _format(worth: Estimate | None) -> str | None:
    if worth is None:
        return None
    interval = "" if worth.low is None else f" [{worth.low:.2f}, {_high(worth):.2f}]"
    return f"{worth.censored}{_value(worth):.2f}{interval}"


def _value(worth: Estimate) -> float:
    assert worth.value is not None
    return worth.value


def _low(worth: Estimate) -> float:
    return _value(worth) if worth.low is None else worth.low


def _high(worth: Estimate) -> float:
    """Return the interval's upper end; a single number is its own interval, and one without upper end has none."""
    if worth.high is not None:
        return worth.high
    return float("inf") if worth.censored == ">" or worth.low is not None else _value(worth)


SEEDS_FOR_A_LOOK, SEEDS_FOR_A_CLAIM = 3, 5
CASES_FOR_A_P_VALUE = 6
"""With fewer cases even winning all of them has p > 0.05."""

JOULES = {
    "measured_counter": "the tables' joules were read from an energy counter",
    "measured_power": "the tables' joules were summed from power readings",
    "estimated": "the tables' joules are estimated, not measured",
    None: "joules are unknown, as no meter was found, and product scores rest on time alone",
}


def rests_on(runs: Runs) -> str:
    """Return which time and energy the conclusions rest on, and why."""
    judged = {run.result.key: run for run in runs.judged()}
    shared = sum(run.result.energy_shared for run in judged.values())
    sources = {run.table.energy_source for run in judged.values() if run.table}
    joules = "; ".join(JOULES[source] for source in JOULES if source in sources)
    why = (
        f"{shared} of {len(judged)} judged runs had others beside them, whose work is in their measured figures"
        if shared
        else "they repeat, which measured ones do not"
    )
    return (
        "Multipliers, targets, fronts and scores rest on modelled seconds and joules: what a run did, times a cost "
        f"table that was measured apart. Measured ones stand beside them only: {why}." + _sentence(joules)
    )


def remarks(runs: Runs, baselines: Mapping[str, CaseBaselines], methods: Sequence[MethodFigures]) -> tuple[str, ...]:
    """Return remarks for the reader of the figures, one or two sentences each."""
    found = [
        *_about_the_design(runs),
        *_about_missing_runs(runs, methods),
        *_about_guardrails(runs),
        *_about_edges(runs),
        *(note for of_case in baselines.values() for note in _about_curves(runs, of_case)),
        *(f"{_count(n, 'run')} without a modelled cost: {reason}." for reason, n in runs.unknown_costs.items()),
    ]
    return tuple(found)


def _about_the_design(runs: Runs) -> list[str]:
    n_seeds, n_cases = len(runs.comparison.seeds), len(runs.comparison.cases)
    notes = []
    if n_seeds < SEEDS_FOR_A_CLAIM:
        enough = "enough for a look" if n_seeds >= SEEDS_FOR_A_LOOK else f"a look takes {SEEDS_FOR_A_LOOK}"
        notes.append(
            f"{_count(n_seeds, 'paired seed')} per method: {enough}, a claim takes {SEEDS_FOR_A_CLAIM}. On one case "
            "the interval is little more than the range of the seeds."
        )
    if n_cases < CASES_FOR_A_P_VALUE:
        least = 2 * 0.5**n_cases
        notes.append(f"With {_count(n_cases, 'case')} no sign test can give a p-value below {min(least, 1.0):.2g}.")
    return notes


def _about_missing_runs(runs: Runs, methods: Sequence[MethodFigures]) -> list[str]:
    notes = []
    if runs.n_missing:
        notes.append(
            f"{_count(runs.n_missing, 'run')} without a result yet, left out here: the comparison is not finished."
        )
    bad = [found for found in methods if found.n_diverged + found.n_failed]
    if bad:
        counts = ", ".join(f"{found.method} {found.n_diverged + found.n_failed} of {found.n_runs}" for found in bad)
        notes.append(f"Runs that diverged or failed count as worse than any other: {counts}.")
    return notes


def _about_guardrails(runs: Runs) -> list[str]:
    """Name policies whose runs were made before `compare` judged policies within guardrails."""
    bare = [
        method
        for method in runs.notes
        if is_policy(method)
        and PolicyName.parse(method).guarded
        and any(_ran_bare(run) for case in runs.comparison.cases for run in runs.of(case.name, method))
    ]
    if not bare:
        return []
    return [
        f"Run without guardrails, by an earlier version: {', '.join(bare)}. Compare again to judge them within "
        "guardrails, as they are used."
    ]


def _ran_bare(run: Run) -> bool:
    steering = run.result.spec.steering
    return steering.kind == "policy" and "guardrails" not in steering.settings


def _about_edges(runs: Runs) -> list[str]:
    return [
        f"{case}: the best {' and '.join(found.on_edge)} of {found.method} ({found.axis}) lies on the edge of what was "
        "tried, so the tuned static may be better than it looks here."
        for case, baselines in runs.comparison.baselines.items()
        for found in baselines
        if found.on_edge
    ]


def _about_curves(runs: Runs, baselines: CaseBaselines) -> list[str]:
    """Return remarks on curves in tokens that are missing, were made monotone, or are extrapolated."""
    notes = []
    for name, curves in ((UNTUNED, baselines.untuned), (TUNED, baselines.tuned)):
        baseline = curves.get("tokens")
        if baseline is None:
            if runs.of(baselines.case, name):
                notes.append(f"{baselines.case}: {name} gave no loss in half its runs or more: no multipliers.")
        elif texts := [*_put_in_order(baseline), *_used_beyond(runs, baselines.case, baseline)]:
            notes.append(f"{baselines.case}: on the curve of {name}, {'; '.join(texts)}.")
    return notes


def _put_in_order(baseline: Baseline) -> list[str]:
    n = baseline.curve.n_pooled
    flat = ", the largest among them" if baseline.curve.flat_end else ""
    beaten = " (the whole one too: what is compared with it looks too good)" if baseline.curve.whole_beaten else ""
    return (
        [f"{_count(n, 'budget')} gave no better loss than a smaller one, so that they were pooled{flat}{beaten}"]
        if n
        else []
    )


def _used_beyond(runs: Runs, case: str, baseline: Baseline) -> list[str]:
    judged = [run for method in runs.notes for run in runs.of(case, method) if run.loss is not None]
    beyond = [run for run in judged if run.loss and baseline.curve.extrapolates(run.loss, run.seed)]
    return (
        [f"the losses of {len(beyond)} of {len(judged)} judged runs lie outside those that were measured"]
        if beyond
        else []
    )


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _sentence(text: str) -> str:
    return f" {text[0].upper()}{text[1:]}." if text else ""


def analyse(
    comparison: Comparison,
    results: Mapping[str, RunResult],
    tables: Mapping[str, CostTable],
    uses: Uses = MappingProxyType({}),
) -> Figures:
    """Return the figures of a comparison.

    Diverged and failed runs count as worst. Estimates that depend on missing runs have no value.

    Args:
        comparison: Rows that assign runs to cases and methods.
        results: Runs by key; rows without a run are skipped and reported in `notes`.
        tables: Cost tables by `cost_key`.
        uses: What models cost in use, by `use_key`; empty where that was not measured.
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
        uses=tuple(point for case in names for point in use_points(runs, case, uses)) if uses else (),
    )
