"""Build the report's tables: headline, cases, fronts, checks, settings and failures, and the CSV files.

A `Table` holds columns and groups of lines; the template draws it. The CSV files hold the same figures unrounded, with
empty cells where a figure is unknown.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from trainpilot.agents.logging.run_log import flatten, text
from trainpilot.experiments.analysis.figures import AXES, BASELINES, CaseFigures, Estimate
from trainpilot.experiments.analysis.modelled_cost import modelled_cost
from trainpilot.experiments.report.formatting import (
    Cell,
    count,
    dash,
    interval,
    listed,
    loss,
    multiplier,
    nats,
    percent,
    quantity,
    rate,
    ratio,
    score,
    share,
    si,
    sign_test,
)
from trainpilot.experiments.report.report_data import NOTHING, ReportData, by_kind
from trainpilot.experiments.results import Case, Role, Row, RunResult, TunedBaseline, cost_key
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.files import whole_file


@dataclass(frozen=True, kw_only=True)
class Column:
    """The head of a column."""

    name: str
    over: str = ""
    """What stands above it and its neighbours of the same group."""
    title: str = ""
    """Tooltip text."""
    left: bool = False
    """Holds words, which stand on the left."""
    wraps: bool = False
    """Holds sentences, which wrap; figures never do."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row: its name and its cells."""

    name: str
    cells: tuple[Cell, ...]
    title: str = ""
    strong: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table in groups of rows, as the template draws it."""

    corner: str
    """Head of the first column."""
    columns: tuple[Column, ...]
    groups: tuple[tuple[str, tuple[Line, ...]], ...]
    """Rows under their headings; an empty heading is not drawn."""
    caption: str = ""

    @property
    def heads(self) -> list[tuple[str, int]]:
        """Headings over neighbouring columns, each with how many it spans; none if there are no headings."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.over:
                spans[-1] = (column.over, spans[-1][1] + 1)
            else:
                spans.append((column.over, 1))
        return spans if any(over for over, _ in spans) else []


@dataclass(frozen=True, kw_only=True)
class Fold:
    """A table that opens on a click."""

    summary: str
    table: Table
    about: str = ""


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


def methods_table(data: ReportData) -> Table:
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
        (heading, tuple(_method_line(data, name, wanted) for name in names)) for heading, names in by_kind(data)
    )
    return Table(corner="method", columns=columns, groups=groups)


def _method_line(data: ReportData, name: str, wanted: Sequence[tuple[str, str]]) -> Line:
    found, note = data.by_method.get(name), data.notes[name]
    n_cases = len(data.case_names)
    of = "cases" if n_cases > 1 else "seeds"
    worth = [multiplier(data.multiplier(name, b, a), _why_no_multiplier(data, b, a), of) for b, a in wanted]
    test = found.sign_tests.get("tuned", {}).get("tokens") if found else None
    tail = (
        sign_test(test),
        score(found.product_score if found else NOTHING),
        share(found.n_diverged + found.n_failed, found.n_runs) if found else dash("there was no run"),
    )
    return Line(name=note.title, cells=(*worth, *tail), title=note.description, strong=note.kind == "policy")


def _why_no_multiplier(data: ReportData, baseline: str, axis: str) -> str:
    if not any(data.multiplier(name, baseline).value is not None for name in data.notes):
        return f"no curve of the {BASELINE_NAMES[baseline]} was measured"
    return "it has no loss to compare" if axis == "tokens" else f"{AXIS_NAMES[axis]} are unknown, or it has no loss"


def glance(data: ReportData, subject: str) -> Table:
    """Return one method's multipliers: a row per baseline, a column per unit."""
    found, of = data.by_method.get(subject), "cases" if len(data.case_names) > 1 else "seeds"
    columns = (*(Column(name=AXIS_NAMES[axis]) for axis in AXES), Column(name="better on, in tokens"))
    lines = tuple(
        Line(
            name=name,
            cells=(
                *(multiplier(data.multiplier(subject, b, a), _why_no_multiplier(data, b, a), of) for a in AXES),
                sign_test(found.sign_tests.get(b, {}).get("tokens") if found else None),
            ),
        )
        for b, name in AGAINST.items()
    )
    return Table(corner=f"multiplier of {data.title(subject)}", columns=columns, groups=(("", lines),))


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


def case_tables(data: ReportData) -> list[Fold]:
    """Return one folded table per case, a row per method."""
    return [
        Fold(
            summary=case,
            about=_target_text(data, case),
            table=Table(
                corner="method",
                columns=CASE_COLUMNS,
                groups=tuple(
                    (heading, tuple(_case_line(data, case, name) for name in names))
                    for heading, names in by_kind(data, data.judged_on(case))
                ),
            ),
        )
        for case in data.case_names
        if data.judged_on(case)
    ]


def _target_text(data: ReportData, case: str) -> str:
    target = data.figures.targets.get(case)
    return "No target loss." if target is None else f"Target loss: {target:.4f} nats/token."


def _case_line(data: ReportData, case: str, name: str) -> Line:
    found = data.by_case[case, name]
    return Line(
        name=data.title(name),
        title=data.notes[name].description,
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


def front_table(data: ReportData) -> Table | None:
    """Return how good each family's set of points is; `None` where nobody worked it out."""
    if not data.figures.fronts:
        return None
    columns = (
        Column(name="hypervolume", title="How much of the plane of loss and cost it dominates; more is better."),
        Column(name="IGD+", title="Distance from the best front known; less is better."),
        Column(name="expected utility", title="Mean over preferences of the best point's utility; more is better."),
        Column(name="points"),
    )
    lines = tuple(
        Line(
            name=_family(data, front.family),
            cells=(
                *(_plain(e) for e in (front.hypervolume, front.igd_plus, front.expected_utility)),
                Cell(text=str(front.n_points)),
            ),
        )
        for front in data.figures.fronts
    )
    return Table(corner="family", columns=columns, groups=(("", lines),))


def _family(data: ReportData, family: str) -> str:
    members = [note for note in data.notes.values() if note.family == family]
    return members[0].title if len(members) == 1 else family


def _plain(estimate: Estimate) -> Cell:
    if estimate.value is None:
        return dash("its points are too few or unknown")
    return Cell(text=f"{estimate.value:.3f}", interval=interval(estimate, lambda value: f"{value:.3f}"))


def check_table(data: ReportData) -> Table | None:
    """Return what was expected, what was found and whether that passes; `None` without any check."""
    if not data.figures.checks:
        return None
    verdicts = {
        True: Cell(text="passed"),
        False: Cell(text="FAILED", tone="bad"),
        None: Cell(text="not tried", title="The methods that it needs were not compared."),
    }
    lines = tuple(
        Line(name=check.name, cells=(Cell(text=check.expected), Cell(text=check.found), verdicts[check.passed]))
        for check in data.figures.checks
    )
    columns = (Column(name="expected", wraps=True), Column(name="found", wraps=True), Column(name="verdict"))
    return Table(corner="check", columns=columns, groups=(("", lines),))


def break_even(data: ReportData) -> list[str]:
    """Return, for each policy whose training was measured, after how many steered runs its energy is earned back."""
    sentences = []
    for name, found in data.by_method.items():
        runs = found.break_even_runs
        if runs is None or (runs.value is None and not runs.censored):
            continue
        sign = {"<": "at most ", ">": "more than ", "": ""}[runs.censored]
        number = "never" if runs.value is None else f"{sign}{ratio(runs.value)} {interval(runs, ratio)} runs"
        sentences.append(f"{data.title(name)}: {' '.join(number.split())}")
    return sentences


EQUAL = {"tokens": "tokens", "time_s": "seconds", "energy_j": "joules"}
_WORDS = Column(name="", wraps=True)


def settings_table(data: ReportData) -> Table:
    """Return each case's own settings and those that the search found for equal tokens, seconds and joules."""
    columns = (
        *(Column(name=name) for name in ("learning rate", "batch", "schedule", "warm-up", "precision")),
        Column(name="search"),
        Column(name="trials"),
        Column(name="on the edge", title="Settings whose best value lies on the edge of what was tried.", wraps=True),
    )
    groups = tuple(
        (case.name, (_own_line(case), *(_tuned_line(alike) for alike in _alike(_baselines(data, case.name)))))
        for case in data.comparison.cases
    )
    return Table(corner="settings", columns=columns, groups=groups)


def _baselines(data: ReportData, case: str) -> tuple[TunedBaseline, ...]:
    return tuple(data.comparison.baselines.get(case, ()))


def _own_line(case: Case) -> Line:
    nothing = (dash("nothing was searched"),) * 2
    return Line(name="the case's own", cells=(*_setting(case.config), *nothing, Cell(text="")))


def _alike(baselines: tuple[TunedBaseline, ...]) -> list[list[TunedBaseline]]:
    """Return the baselines in groups of one setting: the best for equal tokens often is the best for seconds too."""
    settings = dict.fromkeys(found.config for found in baselines)
    return [[found for found in baselines if found.config == config] for config in settings]


def _tuned_line(alike: list[TunedBaseline]) -> Line:
    found = alike[0]
    edge = list(dict.fromkeys(name.replace("_", " ") for one in alike for name in one.on_edge))
    tail = (
        Cell(text=found.search),
        Cell(text=str(found.n_trials)),
        Cell(text=listed(edge), tone="bad" if edge else ""),
    )
    name = f"tuned for equal {listed([EQUAL.get(one.axis, one.axis) for one in alike])}"
    return Line(name=name, cells=(*_setting(found.config), *tail), title=f"rows: {found.method}")


def _setting(config: RunConfig) -> tuple[Cell, ...]:
    return (
        Cell(text=rate(config.base_learning_rate)),
        Cell(text=str(config.batch_size), title=f"sequences of {config.sequence_length} tokens"),
        Cell(text=config.schedule),
        Cell(text=percent(config.warmup() / config.tokens)),
        Cell(text=config.precision),
    )


def cases_table(data: ReportData) -> Table:
    """Return what each case is."""
    columns = (
        *(Column(name=n) for n in ("architecture", "parameters", "budget", "batch", "sequence", "learning rate")),
        Column(name="target loss", title="In nats/token."),
        Column(name="text", wraps=True),
    )
    lines = tuple(_described_case(data, case) for case in data.comparison.cases)
    return Table(corner="case", columns=columns, groups=(("", lines),))


def _described_case(data: ReportData, case: Case) -> Line:
    config, target = case.config, data.figures.targets.get(case.name)
    sizes = [run.n_parameters for name in data.notes for run in data.runs(case.name, name)]
    return Line(
        name=case.name,
        title=Path(config.model).name,
        cells=(
            Cell(text=case.architecture),
            Cell(text=si(sizes[0])) if sizes else dash("there was no run"),
            Cell(text=f"{si(config.tokens)} tokens"),
            Cell(text=str(config.batch_size)),
            Cell(text=str(config.sequence_length)),
            Cell(text=rate(config.base_learning_rate)),
            dash("there is none") if target is None else Cell(text=nats(target)),
            Cell(text=", ".join(config.text) + _vocabulary(config)),
        ),
    )


def _vocabulary(config: RunConfig) -> str:
    return "" if config.vocabulary == RunConfig.vocabulary else f" (BPE, vocabulary {config.vocabulary:,})"


def sweep_table(data: ReportData) -> Table | None:
    """Return what the tuned static's search used on each case, over the budget of one run."""
    costs = data.figures.sweep_costs
    if not costs:
        return None
    columns = tuple(Column(name=AXIS_NAMES[axis]) for axis in AXES)
    lines = tuple(
        Line(name=case, cells=tuple(_sweep_cell(costs[case].get(axis), AXIS_UNITS[axis]) for axis in AXES))
        for case in data.case_names
        if case in costs
    )
    return Table(corner="the search on", columns=columns, groups=(("", lines),))


def _sweep_cell(value: float | None, unit: str) -> Cell:
    return dash("unknown") if value is None else Cell(text=si(value, unit))


def went_wrong(run: RunResult | None) -> str:
    """Return how a run diverged or failed, or an empty text."""
    if run is None:
        return "its file is missing"
    parts = [f"diverged after {si(run.tokens)} tokens"] if run.diverged else []
    return "; ".join([*parts, *([f"failed: {run.failure}"] if run.failure is not None else [])])


def ended_early(run: RunResult | None) -> str:
    """Return where a method ended a run before its budget was used up, or an empty text."""
    if run is None or not run.stopped_early:
        return ""
    return f"stopped early by the method, after {si(run.tokens)} of {si(run.spec.config.tokens)} tokens"


def failures_table(data: ReportData, *roles: Role, early: bool = False) -> Table | None:
    """Return the runs of these roles that diverged, failed or are missing, one line each; or those that ended early."""
    say = ended_early if early else went_wrong
    found = [(row, data.results.get(row.key)) for row in data.comparison.rows if row.role in roles]
    lines = tuple(
        Line(name=row.case, cells=(Cell(text=data.title(row.method)), *_place(row, run), Cell(text=said)))
        for row, run in found
        if (said := say(run))
    )
    columns = (
        Column(name="method", left=True),
        Column(name="seed"),
        Column(name="setting", left=True),
        Column(name="what", wraps=True),
    )
    return Table(corner="case", columns=columns, groups=(("", lines),)) if lines else None


def _place(row: Row, run: RunResult | None) -> tuple[Cell, Cell]:
    budget = "" if row.budget == 1 else f", {row.budget:g} x budget"
    if run is None:
        return Cell(text=str(row.seed)), Cell(text=budget.removeprefix(", ") or "its own")
    config = run.spec.config
    setting = f"{rate(config.base_learning_rate)}, batch {config.batch_size}, {config.schedule}{budget}"
    return Cell(text=str(row.seed)), Cell(text=setting, title=config.precision)


def edges(data: ReportData) -> list[str]:
    """Return a sentence for every tuned optimum on the edge of what was tried."""
    return [
        f"{case.name}: {listed([name.replace('_', ' ') for name in found.on_edge])}, tuned for equal "
        f"{EQUAL.get(found.axis, found.axis)} ({count(found.n_trials, 'run')}): the grid was too small there"
        for case in data.comparison.cases
        for found in _baselines(data, case.name)
        if found.on_edge
    ]


def run_files(data: ReportData) -> Table:
    """Return which file holds which judged run."""
    groups = tuple(
        (case, tuple(_files_line(data, case, name) for name in data.judged_on(case)))
        for case in data.case_names
        if data.judged_on(case)
    )
    return Table(corner="method", columns=(Column(name="files in runs/, by seed", wraps=True),), groups=groups)


def _files_line(data: ReportData, case: str, name: str) -> Line:
    keys = ", ".join(f"{row.seed}: {row.key}" for row in data.rows(case, name))
    return Line(name=data.title(name), cells=(Cell(text=keys) if keys else dash("it was not run here"),))


def provenance_table(provenance: Mapping[str, Any]) -> Table:
    """Return command, versions and machine as a table of two columns."""
    flat = {key: value for key, value in flatten(provenance).items() if key != "command"}
    lines = tuple(Line(name=key.replace("_", " "), cells=(Cell(text=text(value)),)) for key, value in flat.items())
    return Table(corner="", columns=(_WORDS,), groups=(("", lines),))


Sheet = list[dict[str, Any]]


def write_sheets(folder: Path, data: ReportData) -> None:
    """Write `per_case.csv`, `methods.csv` and `runs.csv`."""
    write_csv(folder / "per_case.csv", [flat(found) for found in data.figures.cases])
    write_csv(folder / "methods.csv", [flat(found) for found in data.figures.methods])
    write_csv(folder / "runs.csv", [_run(data, row) for row in data.comparison.rows])


def write_csv(path: Path, sheet: Sheet) -> None:
    """Write rows under the union of their columns, whole."""
    columns = list(dict.fromkeys(column for row in sheet for column in row))
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        writer.writerows(sheet)


def flat(record: Any, prefix: str = "") -> dict[str, Any]:
    """Return a record's fields as columns: nested names joined by `_`, an estimate's ends behind its value."""
    columns: dict[str, Any] = {}
    for name, value in _items(record):
        column = f"{prefix}{name}"
        if isinstance(value, Estimate):
            ends = {f"{column}_{end}": getattr(value, end) for end in ("low", "high", "n", "censored")}
            columns |= {column: value.value} | ends
        elif is_dataclass(value) or isinstance(value, Mapping):
            columns |= flat(value, f"{column}_")
        else:
            columns[column] = value
    return columns


def _items(record: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(record, Mapping):
        return record.items()
    return ((field.name, getattr(record, field.name)) for field in fields(record))


def _run(data: ReportData, row: Row) -> dict[str, Any]:
    place = flat(row)
    result = data.results.get(row.key)
    if result is None:
        return place | {"failure": "its file is missing"}
    return place | _settings(result) | _outcome(result) | _measured(result) | _modelled(data, result)


def _settings(result: RunResult) -> dict[str, Any]:
    config = result.spec.config
    names = ("optimizer", "base_learning_rate", "batch_size", "schedule", "precision", "pruning", "sequence_length")
    settings = {name: getattr(config, name) for name in names}
    return settings | {"warmup_tokens": config.warmup(), "steering": result.spec.steering.kind}


def _outcome(result: RunResult) -> dict[str, Any]:
    names = ("initial_validation_loss", "final_validation_loss", "final_test_loss", "tokens", "diverged")
    return {name: getattr(result, name) for name in (*names, "stopped_early", "failure", "n_parameters")}


def _measured(result: RunResult) -> dict[str, Any]:
    """Return measured seconds and joules, evaluation included; a sum of which a part is unknown is empty."""
    return {
        "measured_time_s": sum(i.time_s + i.evaluation_time_s for i in result.intervals),
        "measured_energy_j": _joules(result),
        "energy_source": result.energy_source,
        "energy_shared": result.energy_shared,
        "device": result.device,
    }


def _joules(result: RunResult) -> float | None:
    training = [interval.energy_j for interval in result.intervals]
    evaluation = [interval.evaluation_energy_j for interval in result.intervals if interval.evaluation_sequences]
    parts = training + evaluation
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) and parts else None


def _modelled(data: ReportData, result: RunResult) -> dict[str, Any]:
    table = data.tables.get(cost_key(result.spec.config))
    try:
        cost = modelled_cost(result, table, data.tables) if table is not None else None
    except ValueError:
        cost = None  # the table lacks something that the run used: unknown
    if cost is None:
        return {"modelled_time_s": None, "modelled_energy_j": None}
    return {"modelled_time_s": cost.time_s, "modelled_energy_j": cost.energy_j}
