"""Put the report's sections together and render them as one HTML page that needs nothing but itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from trainpilot.experiments.report.charts_controls import Moves, control_moves
from trainpilot.experiments.report.charts_learnt import Learnt, learnt
from trainpilot.experiments.report.charts_loss import (
    budget_panels,
    counts_joules,
    course_panels,
    front_panels,
)
from trainpilot.experiments.report.charts_methods import multiplier_panels, part_panels
from trainpilot.experiments.report.finding import Finding, finding
from trainpilot.experiments.report.looks import Look, Looks, choose
from trainpilot.experiments.report.material import Material
from trainpilot.experiments.report.numbers import count, listed
from trainpilot.experiments.report.svg import Panel, to_svg
from trainpilot.experiments.report.table import Fold, Table
from trainpilot.experiments.report.tables import (
    all_multipliers,
    break_even,
    case_tables,
    check_table,
    front_table,
    glance,
    headline_table,
)
from trainpilot.experiments.report.tables_runs import (
    cases_table,
    edges,
    failures_table,
    provenance_table,
    run_files,
    settings_table,
    sweep_table,
)

PART_NAMES = ("training", "curvature probe", "evaluation", "switching controls")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One panel, drawn."""

    title: str
    y: str
    svg: str


@dataclass(frozen=True, kw_only=True)
class Charts:
    """A figure of one or several panels with its legend."""

    drawings: tuple[Drawing, ...]
    legend: tuple[Look, ...] = ()
    heading: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the template shows, in the order of the page."""

    finding: Finding
    about: str
    """The line above the title: where it was run."""
    glance: Table | None
    """The figures behind the title."""
    headline: Table
    multipliers: Table
    break_even: list[str]
    front: Charts
    front_joules: bool
    fronts: Table | None
    courses: Charts
    controls: tuple[Charts, ...]
    learnt: tuple[Charts, ...]
    """Average schedules, one figure for each policy and preference; none without a policy or a tuned static."""
    forest: Charts
    second_axis: str | None
    """What the hollow marks of the forest stand for."""
    cases: list[Fold]
    budgets: Charts
    sweep: Table | None
    parts: Charts
    part_names: tuple[str, ...]
    checks: Table | None
    failures: Table | None
    early: Table | None
    """Runs that their method ended before the budget was used up."""
    other_failures: Table | None
    edges: list[str]
    command: str
    provenance: Table
    case_list: Table
    settings: Table
    run_files: Table
    chosen: str
    """Which methods the charts show, where that is not all of them."""


def render(material: Material) -> str:
    """Return the whole page."""
    from jinja2 import Environment, StrictUndefined

    folder = files("trainpilot.experiments.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(folder.joinpath("report.html.j2").read_text(encoding="utf-8"))
    css = folder.joinpath("report.css").read_text(encoding="utf-8")
    return template.render(page=build(material), css=css) + "\n"


def build(material: Material) -> Page:
    """Return everything that the page shows."""
    looks = choose(material)
    second = second_axis(material)
    provenance = dict(material.comparison.provenance)
    found = finding(material)
    return Page(
        finding=found,
        glance=glance(material, found.subject) if found.subject else None,
        about=_devices(material),
        headline=headline_table(material),
        multipliers=all_multipliers(material),
        break_even=break_even(material),
        front=_charts("front", front_panels(material, looks), looks.chosen),
        front_joules=all(counts_joules(material, point.case) for point in material.figures.points),
        fronts=front_table(material),
        courses=_charts("course", course_panels(material, looks), (*looks.baselines, *looks.subjects)),
        controls=tuple(_control_charts(moves) for moves in control_moves(material, looks)),
        learnt=tuple(_learnt_charts(index, found) for index, found in enumerate(learnt(material))),
        forest=_charts("forest", multiplier_panels(material, looks, second), ()),
        second_axis={"energy_j": "modelled joules", "time_s": "modelled seconds"}.get(second or ""),
        cases=case_tables(material),
        budgets=_charts("budget", budget_panels(material, looks), (*looks.baselines, *looks.subjects)),
        sweep=sweep_table(material),
        parts=_charts("part", part_panels(material, looks), ()),
        part_names=PART_NAMES,
        checks=check_table(material),
        failures=failures_table(material, "method"),
        early=failures_table(material, "method", early=True),
        other_failures=failures_table(material, "sweep", "curve"),
        edges=edges(material),
        command=str(provenance.get("command", "")),
        provenance=provenance_table(provenance),
        case_list=cases_table(material),
        settings=settings_table(material),
        run_files=run_files(material),
        chosen=_chosen(looks),
    )


def second_axis(material: Material) -> str | None:
    """Return in what else multipliers are drawn: joules where they are known, else seconds, else nothing."""
    for axis in ("energy_j", "time_s"):
        if any(material.multiplier(name, "tuned", axis).value is not None for name in material.notes):
            return axis
    return None


def _charts(name: str, panels: Sequence[Panel], legend: Sequence[Look], heading: str = "", note: str = "") -> Charts:
    drawings = tuple(
        Drawing(title=drawn.title, y=drawn.y, svg=to_svg(drawn, f"{name}{index}")) for index, drawn in enumerate(panels)
    )
    return Charts(drawings=drawings, legend=tuple(legend), heading=heading, note=note)


def _control_charts(moves: Moves) -> Charts:
    note = f"It never changed {listed(list(moves.unmoved))}." if moves.unmoved else ""
    name = "control" + re.sub(r"\W+", "", moves.look.color)
    return _charts(name, moves.panels, (moves.look,), moves.look.title, note)


def _learnt_charts(index: int, found: Learnt) -> Charts:
    return _charts(f"learnt{index}x", found.panels, found.looks, found.heading, found.note)


def _chosen(looks: Looks) -> str:
    if looks.n_grey <= 0:
        return ""
    rest = count(looks.n_grey, "other method")
    return (
        f"Charts show {count(len(looks.chosen), 'method')} in colour: the baselines, the policies, then the highest "
        f"multipliers among those that were not tuned. The {rest} stand in the tables, and as grey dots where a chart "
        "has dots."
    )


def _devices(material: Material) -> str:
    return "; ".join(dict.fromkeys(run.device for run in material.results.values()))
