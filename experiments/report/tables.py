"""Put the figures into tables: the headline, every case, targets, fronts and checks."""

from __future__ import annotations

from collections.abc import Sequence

from trainpilot.experiments.measuring.figures import AXES, BASELINES, CaseFigures, Estimate
from trainpilot.experiments.report.material import NOTHING, Material, by_kind
from trainpilot.experiments.report.numbers import (
    Cell,
    count,
    dash,
    interval,
    loss,
    multiplier,
    quantity,
    ratio,
    score,
    share,
    sign_test,
)
from trainpilot.experiments.report.table import Column, Fold, Line, Table

AXIS_NAMES = {"tokens": "tokens", "time_s": "modelled seconds", "energy_j": "modelled joules"}
AXIS_UNITS = {"tokens": "", "time_s": "s", "energy_j": "J"}
BASELINE_NAMES = {
    "untuned": "untuned default",
    "tuned": "tuned static",
    "tuned_with_sweep": "tuned, sweep paid",
}
AGAINST = {
    "tuned": "against the tuned static",
    "tuned_with_sweep": "the same with its search paid for",
    "untuned": "against the untuned default",
}


def headline_table(material: Material) -> Table:
    """Return one row per method: what it is worth, how surely, and how often it failed."""
    tokens = [Column(name=BASELINE_NAMES[b], over="in tokens, against the") for b in BASELINES]
    against = "against the tuned static, in"
    columns = (
        *tokens,
        *(Column(name=AXIS_NAMES[axis], over=against) for axis in AXES[1:]),
        Column(name="better than tuned", title="Cases, in tokens, with a two-sided sign test."),
        Column(name="product score", title="P^1.5 (a T + b E) against the untuned default: less is better."),
        Column(name="diverged or failed", title="Of the judged runs."),
    )
    wanted = [(baseline, "tokens") for baseline in BASELINES] + [("tuned", axis) for axis in AXES[1:]]
    groups = tuple(
        (heading, tuple(_headline_line(material, name, wanted) for name in names))
        for heading, names in by_kind(material)
    )
    return Table(corner="method", columns=columns, groups=groups)


def _headline_line(material: Material, name: str, wanted: Sequence[tuple[str, str]]) -> Line:
    found, note = material.by_method.get(name), material.notes[name]
    n_cases = len(material.case_names)
    of = "cases" if n_cases > 1 else "seeds"
    worth = [multiplier(material.multiplier(name, b, a), _why_no_multiplier(material, b, a), of) for b, a in wanted]
    test = found.sign_tests.get("tuned", {}).get("tokens") if found else None
    tail = (
        sign_test(test),
        score(found.product_score if found else NOTHING),
        share(found.n_diverged + found.n_failed, found.n_runs) if found else dash("there was no run"),
    )
    return Line(name=note.title, cells=(*worth, *tail), title=note.description, strong=note.kind == "policy")


def _why_no_multiplier(material: Material, baseline: str, axis: str) -> str:
    if not any(material.multiplier(name, baseline).value is not None for name in material.notes):
        return f"no curve of the {BASELINE_NAMES[baseline]} was measured"
    return "it has no loss to compare" if axis == "tokens" else f"{AXIS_NAMES[axis]} are unknown, or it has no loss"


def glance(material: Material, subject: str) -> Table:
    """Return one method's multipliers: a row per baseline, a column per unit."""
    found, of = material.by_method.get(subject), "cases" if len(material.case_names) > 1 else "seeds"
    columns = (*(Column(name=AXIS_NAMES[axis]) for axis in AXES), Column(name="better on, in tokens"))
    lines = tuple(
        Line(
            name=name,
            cells=(
                *(multiplier(material.multiplier(subject, b, a), _why_no_multiplier(material, b, a), of) for a in AXES),
                sign_test(found.sign_tests.get(b, {}).get("tokens") if found else None),
            ),
        )
        for b, name in AGAINST.items()
    )
    return Table(corner=f"multiplier of {material.title(subject)}", columns=columns, groups=(("", lines),))


def all_multipliers(material: Material) -> Table:
    """Return every multiplier over all cases: three baselines in three units."""
    pairs = [(baseline, axis) for baseline in BASELINES for axis in AXES]
    columns = tuple(Column(name=AXIS_NAMES[a], over=f"against the {BASELINE_NAMES[b]}") for b, a in pairs)
    groups = tuple(
        (
            heading,
            tuple(
                Line(
                    name=material.title(name),
                    cells=tuple(
                        multiplier(material.multiplier(name, b, a), _why_no_multiplier(material, b, a))
                        for b, a in pairs
                    ),
                )
                for name in names
            ),
        )
        for heading, names in by_kind(material)
    )
    return Table(corner="method", columns=columns, groups=groups)


CASE_COLUMNS = (
    Column(name="validation", over="final loss, nats/token"),
    Column(name="test", over="final loss, nats/token"),
    Column(name="tokens", over="used"),
    Column(name="time", over="modelled"),
    Column(name="energy", over="modelled"),
    Column(name="time", over="measured"),
    Column(name="energy", over="measured"),
    Column(name="tokens", over="to the target loss"),
    Column(name="energy", over="to the target loss", title="Modelled."),
    *(Column(name=BASELINE_NAMES[baseline], over="in tokens, against the") for baseline in BASELINES),
)


def case_tables(material: Material) -> list[Fold]:
    """Return one folded table per case, a row per method."""
    return [
        Fold(
            summary=case,
            about=_target_text(material, case),
            table=Table(
                corner="method",
                columns=CASE_COLUMNS,
                groups=tuple(
                    (heading, tuple(_case_line(material, case, name) for name in names))
                    for heading, names in by_kind(material, material.judged_on(case))
                ),
            ),
        )
        for case in material.case_names
        if material.judged_on(case)
    ]


def _target_text(material: Material, case: str) -> str:
    target = material.figures.targets.get(case)
    return "No target loss." if target is None else f"Target loss: {target:.4f} nats/token."


def _case_line(material: Material, case: str, name: str) -> Line:
    found = material.by_case[case, name]
    return Line(
        name=material.title(name),
        title=material.notes[name].description,
        cells=(
            loss(found.validation_loss),
            loss(found.test_loss),
            quantity(found.tokens, "", "no run ended"),
            quantity(found.time_s, "s", "there is no cost table for it"),
            quantity(found.energy_j, "J", "the cost table has no joules, or there is none"),
            quantity(found.measured_time_s, "s", "no run ended"),
            quantity(found.measured_energy_j, "J", "there was no energy meter"),
            _to_target(found, found.to_target.tokens, ""),
            _to_target(found, found.to_target.energy_j, "J"),
            *(multiplier(found.multipliers.get(b, {}).get("tokens"), of="seeds") for b in BASELINES),
        ),
    )


def _to_target(found: CaseFigures, estimate: Estimate, unit: str) -> Cell:
    reached = f"{found.to_target.n_reached} of {count(found.to_target.n_runs, 'seed')} reached it"
    return Cell(text=quantity(estimate, unit, reached).text, title=reached)


def front_table(material: Material) -> Table | None:
    """Return how good each family's set of points is; `None` where nobody worked it out."""
    if not material.figures.fronts:
        return None
    columns = (
        Column(name="hypervolume", title="How much of the plane of loss and cost it dominates; more is better."),
        Column(name="IGD+", title="Distance from the best front known; less is better."),
        Column(name="expected utility", title="Mean over preferences of the best point's utility; more is better."),
        Column(name="points"),
    )
    lines = tuple(
        Line(
            name=_family(material, front.family),
            cells=(
                *(_plain(e) for e in (front.hypervolume, front.igd_plus, front.expected_utility)),
                Cell(text=str(front.n_points)),
            ),
        )
        for front in material.figures.fronts
    )
    return Table(corner="family", columns=columns, groups=(("", lines),))


def _family(material: Material, family: str) -> str:
    members = [note for note in material.notes.values() if note.family == family]
    return members[0].title if len(members) == 1 else family


def _plain(estimate: Estimate) -> Cell:
    if estimate.value is None:
        return dash("its points are too few or unknown")
    return Cell(text=f"{estimate.value:.3f}", interval=interval(estimate, lambda value: f"{value:.3f}"))


def check_table(material: Material) -> Table | None:
    """Return what was expected, what was found and whether that passes; `None` without any check."""
    if not material.figures.checks:
        return None
    verdicts = {
        True: Cell(text="passed"),
        False: Cell(text="FAILED", tone="bad"),
        None: Cell(text="not tried", title="The methods that it needs were not compared."),
    }
    lines = tuple(
        Line(name=check.name, cells=(Cell(text=check.expected), Cell(text=check.found), verdicts[check.passed]))
        for check in material.figures.checks
    )
    columns = (Column(name="expected", wraps=True), Column(name="found", wraps=True), Column(name="verdict"))
    return Table(corner="check", columns=columns, groups=(("", lines),))


def break_even(material: Material) -> list[str]:
    """Return, for each policy whose training was measured, after how many steered runs its energy is earned back."""
    sentences = []
    for name, found in material.by_method.items():
        runs = found.break_even_runs
        if runs is None or (runs.value is None and not runs.censored):
            continue
        sign = {"<": "at most ", ">": "more than ", "": ""}[runs.censored]
        number = "never" if runs.value is None else f"{sign}{ratio(runs.value)} {interval(runs, ratio)} runs"
        sentences.append(f"{material.title(name)}: {' '.join(number.split())}")
    return sentences
