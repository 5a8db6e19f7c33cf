"""Say in words what the figures rest on, and what a reader must know about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainpilot.experiments.compare.comparison import TUNED, UNTUNED
from trainpilot.experiments.measuring.baselines import Baseline, CaseBaselines
from trainpilot.experiments.measuring.figures import MethodFigures
from trainpilot.experiments.measuring.runs import Runs

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
    """Return what a reader must know, a sentence or two each."""
    found = [
        *_about_the_design(runs),
        *_about_missing_runs(runs, methods),
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


def _about_edges(runs: Runs) -> list[str]:
    return [
        f"{case}: the best {' and '.join(found.on_edge)} of {found.method} ({found.axis}) lies on the edge of what was "
        "tried, so the tuned static may be better than it looks here."
        for case, baselines in runs.comparison.baselines.items()
        for found in baselines
        if found.on_edge
    ]


def _about_curves(runs: Runs, baselines: CaseBaselines) -> list[str]:
    """Tell of curves, in tokens, that are missing, were put in order, or are used beyond their ends."""
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
