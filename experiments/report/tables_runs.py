"""Put settings and runs into tables: what the search chose, what failed, and which file holds which run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainpilot.agents.logging.run_log import flatten, text
from trainpilot.experiments.compare.comparison import Case, TunedBaseline
from trainpilot.experiments.compare.records import Role, Row, RunResult
from trainpilot.experiments.measuring.figures import AXES
from trainpilot.experiments.report.material import Material
from trainpilot.experiments.report.numbers import Cell, count, dash, listed, nats, percent, rate, si
from trainpilot.experiments.report.table import Column, Line, Table
from trainpilot.experiments.report.tables import AXIS_NAMES, AXIS_UNITS
from trainpilot.llm_runtime.config import RunConfig

EQUAL = {"tokens": "tokens", "time_s": "seconds", "energy_j": "joules"}
_WORDS = Column(name="", wraps=True)


def settings_table(material: Material) -> Table:
    """Return each case's own settings and those that the search found for equal tokens, seconds and joules."""
    columns = (
        *(Column(name=name) for name in ("learning rate", "batch", "schedule", "warm-up", "precision")),
        Column(name="search"),
        Column(name="trials"),
        Column(name="on the edge", title="Settings whose best value lies on the edge of what was tried.", wraps=True),
    )
    groups = tuple(
        (case.name, (_own_line(case), *(_tuned_line(alike) for alike in _alike(_baselines(material, case.name)))))
        for case in material.comparison.cases
    )
    return Table(corner="settings", columns=columns, groups=groups)


def _baselines(material: Material, case: str) -> tuple[TunedBaseline, ...]:
    return tuple(material.comparison.baselines.get(case, ()))


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


def cases_table(material: Material) -> Table:
    """Return what each case is."""
    columns = (
        *(Column(name=n) for n in ("architecture", "parameters", "budget", "batch", "sequence", "learning rate")),
        Column(name="target loss", title="In nats/token."),
        Column(name="text", wraps=True),
    )
    lines = tuple(_described_case(material, case) for case in material.comparison.cases)
    return Table(corner="case", columns=columns, groups=(("", lines),))


def _described_case(material: Material, case: Case) -> Line:
    config, target = case.config, material.figures.targets.get(case.name)
    sizes = [run.n_parameters for name in material.notes for run in material.runs(case.name, name)]
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
            Cell(text=", ".join(config.text)),
        ),
    )


def sweep_table(material: Material) -> Table | None:
    """Return what the tuned static's search used on each case, over the budget of one run."""
    costs = material.figures.sweep_costs
    if not costs:
        return None
    columns = tuple(Column(name=AXIS_NAMES[axis]) for axis in AXES)
    lines = tuple(
        Line(name=case, cells=tuple(_sweep_cell(costs[case].get(axis), AXIS_UNITS[axis]) for axis in AXES))
        for case in material.case_names
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


def failures_table(material: Material, *roles: Role, early: bool = False) -> Table | None:
    """Return the runs of these roles that diverged, failed or are missing, one line each; or those that ended early."""
    say = ended_early if early else went_wrong
    found = [(row, material.results.get(row.key)) for row in material.comparison.rows if row.role in roles]
    lines = tuple(
        Line(name=row.case, cells=(Cell(text=material.title(row.method)), *_place(row, run), Cell(text=said)))
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


def edges(material: Material) -> list[str]:
    """Return a sentence for every tuned optimum on the edge of what was tried."""
    return [
        f"{case.name}: {listed([name.replace('_', ' ') for name in found.on_edge])}, tuned for equal "
        f"{EQUAL.get(found.axis, found.axis)} ({count(found.n_trials, 'run')}): the grid was too small there"
        for case in material.comparison.cases
        for found in _baselines(material, case.name)
        if found.on_edge
    ]


def run_files(material: Material) -> Table:
    """Return which file holds which judged run."""
    groups = tuple(
        (case, tuple(_files_line(material, case, name) for name in material.judged_on(case)))
        for case in material.case_names
        if material.judged_on(case)
    )
    return Table(corner="method", columns=(Column(name="files in runs/, by seed", wraps=True),), groups=groups)


def _files_line(material: Material, case: str, name: str) -> Line:
    keys = ", ".join(f"{row.seed}: {row.key}" for row in material.rows(case, name))
    return Line(name=material.title(name), cells=(Cell(text=keys) if keys else dash("it was not run here"),))


def provenance_table(provenance: Mapping[str, Any]) -> Table:
    """Return command, versions and machine as a table of two columns."""
    flat = {key: value for key, value in flatten(provenance).items() if key != "command"}
    lines = tuple(Line(name=key.replace("_", " "), cells=(Cell(text=text(value)),)) for key, value in flat.items())
    return Table(corner="", columns=(_WORDS,), groups=(("", lines),))
