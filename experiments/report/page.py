"""Write the report of a comparison: one self-contained HTML page, its figures as JSON and CSV, and TensorBoard runs.

`write_report` is the entry point. `find_headline` puts the result into one sentence that claims no more than the
figures carry; `build` collects all sections; the template `report.html.j2` draws them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainpilot.experiments.analysis.figures import PRESUMED_BUG, Estimate, Figures, SignTest
from trainpilot.experiments.costs.table import CostTable
from trainpilot.experiments.report.charts import (
    budget_panels,
    counts_joules,
    front_panels,
    loss_panels,
    multiplier_panels,
    part_panels,
)
from trainpilot.experiments.report.charts_controls import AverageSchedule, ControlChanges, control_changes, learnt
from trainpilot.experiments.report.charts_use import use_charts, use_looks, use_table
from trainpilot.experiments.report.drawing import PART_INKS, PART_NAMES, MethodStyles, choose
from trainpilot.experiments.report.formatting import count, listed, percent, ratio
from trainpilot.experiments.report.report_data import ReportData
from trainpilot.experiments.report.tables import (
    Fold,
    Table,
    break_even,
    case_tables,
    cases_table,
    check_table,
    edges,
    failures_table,
    front_table,
    glance,
    methods_table,
    provenance_table,
    run_files,
    settings_table,
    sweep_table,
    write_sheets,
)
from trainpilot.experiments.report.template import Charts, draw, render_page
from trainpilot.experiments.results import TUNED, UNTUNED, Comparison, RunResult
from trainpilot.llm_runtime.files import whole_file, write_json

PAGE = "report.html"


def write_report(
    folder: Path,
    comparison: Comparison,
    results: Mapping[str, RunResult],
    tables: Mapping[str, CostTable],
    figures: Figures,
    *,
    tensorboard: bool = True,
) -> Path:
    """Write the report and return the path of its page.

    Args:
        folder: Takes `report.html`, `figures.json`, `per_case.csv`, `methods.csv`, `runs.csv` and `tensorboard/`.
        comparison: What was run.
        results: The runs by key; those that are missing are listed as such.
        tables: What a run costs, by `cost_key`.
        figures: What came out.
        tensorboard: Whether to write every judged run's curves too.
    """
    data = ReportData(comparison, results, tables, figures)
    write_json(folder / "figures.json", figures.to_json())
    write_sheets(folder, data)
    if tensorboard:
        from trainpilot.experiments.report.tensorboard import write_events

        write_events(folder / "tensorboard", data)
    page = render(data)
    with whole_file(folder / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / PAGE


LEVEL = 0.05
SAME = 0.005
NAMES = {"untuned": "the untuned default", "tuned": "a tuned static schedule"}


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The top of the report."""

    subject: str | None
    """The method that the headline is about."""
    title: str
    """One sentence."""
    lead: tuple[str, ...]
    """Paragraphs behind it: how many cases and seeds, which baselines, the figures."""
    cautions: tuple[str, ...]
    """What keeps a reader from believing too much."""


def find_headline(data: ReportData) -> Headline:
    """Return what was found about the first policy, or else about what came out best."""
    tuned = TUNED if TUNED in data.notes else None
    subject = next(iter(data.of_kind("policy")), next(iter(data.ranked), tuned))
    return Headline(
        subject=subject,
        title=_title(data, subject),
        lead=tuple(part for part in (_compared(data), _subject_line(data, subject)) if part),
        cautions=tuple(_cautions(data, subject)),
    )


def _title(data: ReportData, subject: str | None) -> str:
    others = [b for b in NAMES if subject and (b, subject) not in (("tuned", TUNED), ("untuned", UNTUNED))]
    known = [b for b in others if subject and data.multiplier(subject, b).value is not None]
    if subject is None or not known:
        n_methods = count(len(data.notes), "method")
        return f"{n_methods} on {count(len(data.case_names), 'case')}: no compute multiplier could be worked out"
    title = data.title(subject)
    parts = [claim(title, data.multiplier(subject, b), _test(data, subject, b), NAMES[b]) for b in known[::-1]]
    return "; ".join([parts[0], *(f"it{part.removeprefix(title)}" for part in parts[1:])])


def claim(name: str, worth: Estimate, test: SignTest | None, baseline: str) -> str:
    """Return how a method stands to a baseline, in one clause.

    Clear is what both the interval and the sign test support; what only one of them does `seems` so.
    """
    value = worth.value
    if value is None:
        return f"{name} could not be compared with {baseline}"
    if value <= 0:
        return f"{name} diverged or failed in half of its runs or more"
    apart = (worth.low is not None and worth.low > 1) or (worth.high is not None and worth.high < 1)
    surely = test is not None and test.p_value <= LEVEL
    if not (apart or surely) or abs(value - 1) < SAME:
        return f"{name} is neither clearly better nor clearly worse than {baseline}"
    verb = "needs" if apart and surely else "seems to need"
    bound = "more than " if worth.censored == (">" if value > 1 else "<") else ""
    return f"{name} {verb} {bound}{_tokens(value)} {baseline}"


def _tokens(worth: float) -> str:
    """Return how many tokens a method with this multiplier needs, compared with the baseline's."""
    if worth > 1:
        return f"{percent(1 - 1 / worth)} fewer tokens than"
    return f"{percent(1 / worth - 1)} more tokens than" if worth > 1 / 2 else f"{ratio(1 / worth)} times the tokens of"


def _compared(data: ReportData) -> str:
    """Return how much was compared, and how to read a multiplier."""
    cases = [case for case in data.case_names if data.judged_on(case)]
    waiting = len(data.case_names) - len(cases)
    n_methods = sum(data.was_run(name) for name in data.notes)
    n_runs = len({row.key for row in data.comparison.rows if row.key in data.results})
    seeds = f"{count(len(data.comparison.seeds), 'paired seed')}{' each' if len(cases) > 1 else ''}"
    unfinished = f" The comparison is not finished: {count(waiting, 'case')} have no runs yet." if waiting else ""
    return (
        f"{count(n_methods, 'method')} on {count(len(cases), 'case')} with {seeds}, {count(n_runs, 'run')} in all."
        f"{unfinished} A compute multiplier of 1.10 means that the baseline needs 1.10 times the method's budget to "
        "reach the method's final validation loss. Medians with bootstrap 95 % intervals over "
        f"{'cases' if len(cases) > 1 else 'seeds'}."
    )


def _subject_line(data: ReportData, subject: str | None) -> str:
    """Return which method the headline is about, against which baselines, and on what grounds it was chosen."""
    if subject is None:
        return ""
    policies, title = data.of_kind("policy"), data.title
    why = "which came out best; no policy was compared"
    if policies:
        others = listed([title(name) for name in policies[1:]])
        why = f"the first policy that was named ({others}: see the table)" if others else "the policy"
    return (
        f"The headline is about {title(subject)}, {why}. The tuned static baseline is the best setting of a search"
        f"{_searched(data)}; the untuned default is {title(UNTUNED)} at the case's own settings."
    )


def _searched(data: ReportData) -> str:
    trials = [found.n_trials for b in data.comparison.baselines.values() for found in b if found.method == TUNED]
    if not trials:
        return ""
    runs = f"{min(trials)}" if min(trials) == max(trials) else f"{min(trials)} to {max(trials)}"
    return f" over {runs} runs on each case"


def _cautions(data: ReportData, subject: str | None) -> list[str]:
    figures, found = data.figures, []
    if len(data.case_names) == 1:
        found.append("One case says nothing about other models: the intervals hold the spread over seeds alone.")
    worth = data.multiplier(subject).value if subject else None
    if worth is not None and worth > PRESUMED_BUG:
        found.append(
            "A gain above 5 % over a tuned static schedule is presumed to be a fault in the baseline "
            "until a second look confirms it."
        )
    if failed := [check.name for check in figures.checks if check.passed is False]:
        found.append(f"Sanity checks that failed: {'; '.join(failed)}.")
    return [*found, *([figures.rests_on] if figures.rests_on else []), *figures.notes]


def _test(data: ReportData, method: str, baseline: str) -> SignTest | None:
    found = data.by_method.get(method)
    return found.sign_tests.get(baseline, {}).get("tokens") if found else None


@dataclass(frozen=True, kw_only=True)
class UseSection:
    """What the models of one case cost in use."""

    charts: Charts
    table: Table


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the template shows, in the order of the page."""

    headline: Headline
    about: str
    """The line above the title: where it was run."""
    glance: Table | None
    """The figures behind the title."""
    methods: Table
    break_even: list[str]
    front: Charts
    front_joules: bool
    fronts: Table | None
    uses: tuple[UseSection, ...]
    """What the models cost in use, case by case; none where that was not measured."""
    use_energy: str
    """Where the joules per generated token come from, as a sentence."""
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
    part_names: tuple[tuple[str, str], ...]
    """Colours and names of what time and energy went to."""
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

    @property
    def title(self) -> str:
        """Title of the page."""
        return self.headline.title


def render(data: ReportData) -> str:
    """Return the whole page."""
    return render_page("report.html.j2", build(data))


def build(data: ReportData) -> Page:
    """Return everything that the page shows."""
    looks = choose(data)
    second = second_axis(data)
    provenance = dict(data.comparison.provenance)
    found = find_headline(data)
    return Page(
        headline=found,
        glance=glance(data, found.subject) if found.subject else None,
        about=_devices(data),
        methods=methods_table(data),
        break_even=break_even(data),
        front=draw("front", front_panels(data, looks), looks.chosen),
        front_joules=all(counts_joules(data, point.case) for point in data.figures.points),
        fronts=front_table(data),
        uses=_uses(data),
        use_energy=_use_energy(data),
        courses=draw("course", loss_panels(data, looks), (*looks.baselines, *looks.subjects)),
        controls=tuple(_control_charts(moves) for moves in control_changes(data, looks)),
        learnt=tuple(_learnt_charts(index, found) for index, found in enumerate(learnt(data))),
        forest=draw("forest", multiplier_panels(data, looks, second), ()),
        second_axis={"energy_j": "modelled joules", "time_s": "modelled seconds"}.get(second or ""),
        cases=case_tables(data),
        budgets=draw("budget", budget_panels(data, looks), (*looks.baselines, *looks.subjects)),
        sweep=sweep_table(data),
        parts=draw("part", part_panels(data, looks), ()),
        part_names=tuple(zip(PART_INKS, PART_NAMES, strict=True)),
        checks=check_table(data),
        failures=failures_table(data, "method"),
        early=failures_table(data, "method", early=True),
        other_failures=failures_table(data, "sweep", "curve"),
        edges=edges(data),
        command=str(provenance.get("command", "")),
        provenance=provenance_table(provenance),
        case_list=cases_table(data),
        settings=settings_table(data),
        run_files=run_files(data),
        chosen=_chosen(looks),
    )


def second_axis(data: ReportData) -> str | None:
    """Return in what else multipliers are drawn: joules where they are known, else seconds, else nothing."""
    for axis in ("energy_j", "time_s"):
        if any(data.multiplier(name, "tuned", axis).value is not None for name in data.notes):
            return axis
    return None


def _uses(data: ReportData) -> tuple[UseSection, ...]:
    looks = use_looks(data)
    return tuple(
        UseSection(charts=draw(f"use{index}x", found.panels, looks, found.case), table=use_table(data, found.case))
        for index, found in enumerate(use_charts(data, looks))
    )


def _use_energy(data: ReportData) -> str:
    sources = {point.energy_source for point in data.figures.uses if point.use_j is not None}
    if not sources:
        return "No meter told the joules per generated token."
    if "estimated" in sources:
        return "Joules per generated token are estimated, seconds times an assumed power: they repeat the latency."
    return f"Joules per generated token are measured ({listed(sorted(map(str, sources)))})."


def _control_charts(moves: ControlChanges) -> Charts:
    note = f"It never changed {listed(list(moves.unmoved))}." if moves.unmoved else ""
    name = "control" + re.sub(r"\W+", "", moves.look.color)
    return draw(name, moves.panels, (moves.look,), moves.look.title, note)


def _learnt_charts(index: int, found: AverageSchedule) -> Charts:
    return draw(f"learnt{index}x", found.panels, found.looks, found.heading, found.note)


def _chosen(looks: MethodStyles) -> str:
    if looks.n_grey <= 0:
        return ""
    rest = count(looks.n_grey, "other method")
    return (
        f"Charts show {count(len(looks.chosen), 'method')} in colour: the baselines, the policies, then the highest "
        f"multipliers among those that were not tuned. The {rest} stand in the tables, and as grey dots where a chart "
        "has dots."
    )


def _devices(data: ReportData) -> str:
    return "; ".join(dict.fromkeys(run.device for run in data.results.values()))
