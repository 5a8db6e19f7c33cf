"""Write the page about one run or several (`trainpilot report`): one HTML file that needs no network.

It shows the losses, what steering did to the controls and why, what it cost, and what was refused or taken back. The
template `run.html.j2` draws what `build` collects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from trainpilot.agents.logging.run_log import flatten, text
from trainpilot.envs.action import ACTION_FIELDS
from trainpilot.experiments.options import ReportOptions
from trainpilot.experiments.report.controls import CONTROLS
from trainpilot.experiments.report.drawing import N_COLOURED, PART_INKS, PART_NAMES
from trainpilot.experiments.report.formatting import (
    Cell,
    count,
    dash,
    duration,
    listed,
    nats,
    percent,
    ratio,
    si,
)
from trainpilot.experiments.report.run_charts import (
    control_panels,
    cost_panels,
    looks_of,
    loss_panels,
)
from trainpilot.experiments.report.run_why import Why, never_changed, why
from trainpilot.experiments.report.tables import Column, Fold, Line, Table
from trainpilot.experiments.report.template import Charts, draw, render_page
from trainpilot.experiments.stored_run import (
    StoredRun,
    cost_parts,
    counted_refusals,
    is_figure,
    read_run,
    read_runs,
    reference_of,
    taken,
)
from trainpilot.llm_runtime.files import real_path, whole_file

N_DESCRIBED = 3
"""Runs that the top of the page describes in a sentence each."""
LONGEST_VALUE = 160
"""Characters of a setting that are shown."""
FINISH = [field.name for field in ACTION_FIELDS].index("finish")
ONE_TEXT = ("text", "vocabulary", "sequence_length")
"""Settings that must be the same where losses are compared."""


def report(options: ReportOptions, console: Console) -> None:
    """Write the page about the runs.

    Raises:
        ValueError: a folder holds no run, or the page's name is not one of an HTML file.
    """
    if not options.path:
        raise ValueError("path must name at least one run's folder, got none; try trainpilot report runs/steered")
    if options.out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"out must be the page to write, such as report.html, got {options.out}")
    if options.out.is_dir():
        raise ValueError(f"out must be a file, got the folder {options.out}")
    reference = read_run(options.reference) if options.reference is not None else None
    paths = [
        path for path in options.path if options.reference is None or real_path(path) != real_path(options.reference)
    ]
    page = render(read_runs(paths or options.path), reference if paths else None)
    with whole_file(options.out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    console.print(f"report: {options.out}", soft_wrap=True, highlight=False, markup=False)


@dataclass(frozen=True, kw_only=True)
class RunPage:
    """What the template shows, in the order of the page."""

    title: str
    eyebrow: str
    lead: tuple[str, ...]
    glance: Table
    cautions: tuple[str, ...]
    losses: Charts
    controls: Charts
    whys: tuple[Why, ...]
    parts: Charts
    part_names: tuple[tuple[str, str], ...]
    """Colours and names of what time and energy went to."""
    costs: Table
    incidents: Table | None
    refusals: Table | None
    settings: Table | None
    folds: tuple[Fold, ...]
    not_drawn: str


def render(runs: Sequence[StoredRun], reference: StoredRun | None = None) -> str:
    """Return the whole page about the runs.

    Args:
        runs: At least one.
        reference: What they are drawn against; by default the reference run that they were made with, if it is one.
    """
    return render_page("run.html.j2", build(runs, reference))


def build(runs: Sequence[StoredRun], reference: StoredRun | None = None) -> RunPage:
    """Return everything that the page shows."""
    reference = reference if reference is not None else _common_reference(runs)
    shown = looks_of(runs, reference)
    behind = shown[: len(shown) - min(len(runs), N_COLOURED)]
    panels, unmoved = control_panels(shown)
    controls = draw("control", panels, [each.look for each in shown], note=never_changed(unmoved))
    whys = tuple(found for index, each in enumerate(shown[len(behind) :]) if (found := why(index, each, behind)))
    if len(runs) == 1 and whys and whys[0].sentences:  # one figure of the controls, with the numbers in it
        controls = replace(whys[0].controls, legend=controls.legend)
        whys = (replace(whys[0], controls=draw("", (), ())),)
    everyone = [*runs, *([reference] if reference is not None else [])]
    return RunPage(
        title=_title(runs, reference),
        eyebrow=_eyebrow(runs),
        lead=tuple(_described(run, reference) for run in runs[:N_DESCRIBED]),
        glance=_glance(everyone),
        cautions=tuple(_cautions(runs, reference)),
        losses=draw("loss", loss_panels(shown), [each.look for each in shown]),
        controls=controls,
        whys=whys,
        parts=draw("part", cost_panels(shown), ()),
        part_names=tuple(zip(PART_INKS, PART_NAMES, strict=True)),
        costs=_costs(everyone),
        incidents=_incidents(runs),
        refusals=_refusals(runs),
        settings=_settings(runs),
        folds=tuple(_fold(run) for run in runs),
        not_drawn=_not_drawn(runs),
    )


def _common_reference(runs: Sequence[StoredRun]) -> StoredRun | None:
    """Return the reference run that all runs were made with, where they share one."""
    known = [run for run in runs if run.reference is not None]
    if not known or any(run.reference != known[0].reference for run in known):
        return None
    return reference_of(known[0])


# The top of the page ------------------------------------------------------------------------------------------------


def _title(runs: Sequence[StoredRun], reference: StoredRun | None) -> str:
    known = sorted((loss, index) for index, run in enumerate(runs) if (loss := run.validation_loss) is not None)
    if len(runs) == 1 and (runs[0].last.diverged or not known):
        run = runs[0]
        end = "diverged" if run.last.diverged else "trained without a validation loss"
        return f"{run.name} {end}, {percent(run.last.budget_used)} of its budget used"
    if not known:
        return f"{count(len(runs), 'run')}, none with a validation loss"
    loss, best = known[0]
    of = f"has the lowest validation loss of {len(runs)} runs" if len(runs) > 1 else "has a validation loss of"
    head = f"{runs[best].name} {of}{',' if len(runs) > 1 else ''} {nats(loss)}"
    return head + _against(loss, reference)


def _against(loss: float, reference: StoredRun | None) -> str:
    if reference is None or (base := reference.validation_loss) is None:
        return ""
    difference = loss - base
    if abs(difference) < 5e-5:
        return f", the same as {_named(reference)}"
    return f", {nats(abs(difference))} {'below' if difference < 0 else 'above'} {_named(reference)}"


def _named(reference: StoredRun) -> str:
    return "the reference run" if reference.name == "reference run" else reference.name


def _eyebrow(runs: Sequence[StoredRun]) -> str:
    values = (run.summary.get(name) or run.config.get(name) for name in ("model", "device") for run in runs)
    about = "; ".join(dict.fromkeys(str(value) for value in values if value))
    return f"trainpilot report{': ' if about else ''}{about}"


def _described(run: StoredRun, reference: StoredRun | None) -> str:
    """Return what steering did in a run and what that cost, in a few sentences."""
    n = len(run.records)
    who = f"{run.name} (policy {run.policy}, {run.state})"
    if run.policy == "none":
        did = f"{who} followed its base schedule."
    else:
        verb = "advised a change in" if run.advised else "changed something in"
        did = f"{who}: the policy {verb} {run.n_changes} of {count(n, 'decision')}{_moves(run)}."
        incidents = [f"{count(run.n_refusals, 'choice')} refused"] if run.n_refusals else []
        incidents += [f"{count(len(run.rollbacks), 'rollback')}"] if run.rollbacks else []
        did += f" {listed(incidents).capitalize()}." if incidents else " Nothing was refused or taken back."
    return f"{did} {_spent(run, reference)}"


def _moves(run: StoredRun) -> str:
    if run.advised:
        return ""
    telemetry = [run.records[place].telemetry for place in run.standing]
    parts = [told for control in CONTROLS if (told := control.told(telemetry))]
    cooled = [place for place in run.standing if taken(run.records[place])[FINISH] == 1]
    if cooled:
        parts.append(f"cool-down from {percent(run.began_at(cooled[0]))} of the budget")
    return f": {'; '.join(parts)}" if parts else ""


def _spent(run: StoredRun, reference: StoredRun | None) -> str:
    said = f"It took {duration(run.time_s)}"
    if run.energy_j is not None:
        said += f" and {si(run.energy_j, 'J')} ({run.energy_source})"
    if reference is not None and reference.time_s > 0:
        said += f", {ratio(run.time_s / reference.time_s)} times the seconds"
        if run.energy_j is not None and reference.energy_j:
            said += f" and {ratio(run.energy_j / reference.energy_j)} times the joules"
        said += f" of {_named(reference)}"
    return f"{said}, evaluation apart."


def _cautions(runs: Sequence[StoredRun], reference: StoredRun | None) -> list[str]:
    found = [caution for run in runs for caution in _cautions_of(run)]
    everyone = [*runs, *([reference] if reference is not None else [])]
    differing = [name for name in ONE_TEXT if len({text(run.config.get(name)) for run in everyone if run.config}) > 1]
    if differing:
        names = listed([name.replace("_", " ") for name in differing])
        found.append(f"The runs differ in {names}: their losses cannot be compared.")
    if reference is None and any(run.policy != "none" for run in runs):
        found.append(_without_reference(runs))
    if any(run.energy_source == "estimated" for run in runs):
        found.append("Joules are estimated from time and typical watts; no meter measured them.")
    if len(everyone) > 1:
        found.append("Each run is one seed: differences may be chance. trainpilot compare runs several.")
    return found


def _without_reference(runs: Sequence[StoredRun]) -> str:
    if any(run.reference is not None for run in runs):
        why = "The runs have different reference runs"
    elif unsteered := [run for run in runs if run.policy == "none"]:
        return (
            f"No run is the reference of the others: to compare them with {unsteered[0].name}, give it as --reference."
        )
    else:
        why = "There is no reference run"
    return f"{why}: what the same training reaches without steering is not shown. Add --reference."


def _cautions_of(run: StoredRun) -> list[str]:
    summary, found = run.summary, []
    if run.last.diverged:
        found.append(f"{run.name} diverged: its loss is not finite.")
    elif not run.last.finished:
        found.append(f"{run.name} is not finished: {percent(run.last.budget_used)} of its budget is used.")
    if summary.get("fallen_back"):
        at = summary.get("fallen_back_at_decision")
        found.append(f"{run.name} was left to its base schedule from decision {at} on: {summary['fallen_back']}.")
    if isinstance(busy := summary.get("busy_machine"), str):
        found.append(f"{run.name}: {busy}.")
    contract = summary.get("contract")
    if isinstance(contract, dict) and contract.get("held") is False:
        found.append(f"{run.name} broke its quality contract.")
    if run.advised:
        found.append(f"In {run.name} the policy only advised; broad, faint lines show the advice.")
    warnings = summary.get("domain_warnings")
    if isinstance(warnings, list) and warnings:
        found.append(f"{run.name} is outside of what its policy was trained on: {'; '.join(map(str, warnings))}.")
    return found


# Tables -------------------------------------------------------------------------------------------------------------


def _loss(value: float | None) -> Cell:
    return dash("it was not measured, or the run diverged") if value is None else Cell(text=nats(value))


def _joules(value: float | None) -> Cell:
    return dash("no meter, or one that failed") if value is None else Cell(text=si(value, "J"))


def _glance(runs: Sequence[StoredRun]) -> Table:
    columns = (
        Column(name="policy", left=True),
        Column(name="state", left=True),
        Column(name="validation loss"),
        Column(name="test loss"),
        Column(name="tokens"),
        Column(name="time"),
        Column(name="energy"),
        Column(name="changes", title="Decisions that changed something, or advised a change."),
        Column(name="refused", title="Choices that the action masks or the guardrails refused."),
        Column(name="rollbacks"),
    )
    lines = tuple(
        Line(
            name=run.name,
            cells=(
                Cell(text=run.policy),
                Cell(text=run.state, tone="bad" if run.last.diverged else ""),
                _loss(run.validation_loss),
                _loss(run.test_loss),
                Cell(text=si(run.last.tokens)),
                Cell(text=duration(run.time_s)),
                _joules(run.energy_j),
                Cell(text=str(run.n_changes)),
                Cell(text=str(run.n_refusals)),
                Cell(text=str(len(run.rollbacks)), tone="bad" if run.rollbacks else ""),
            ),
        )
        for run in runs
    )
    return Table(corner="run", columns=columns, groups=(("", lines),))


def _costs(runs: Sequence[StoredRun]) -> Table:
    columns = (
        *(Column(name=name, over="seconds") for name in PART_NAMES),
        Column(name="taken back", over="seconds", title="Part of the training, probe and switching."),
        Column(name="in all", over="joules"),
        Column(name="probe", over="joules"),
        Column(name="per token", over="joules"),
        Column(name="source", over="joules", left=True),
        Column(name="tokens/s"),
        Column(name="probes"),
        Column(name="CO2e"),
    )
    return Table(corner="run", columns=columns, groups=(("", tuple(_cost_line(run) for run in runs)),))


def _cost_line(run: StoredRun) -> Line:
    parts = cost_parts(run)
    lost = sum(run.records[place].telemetry.time_s for back in run.rollbacks for place in back.intervals)
    trained = sum(record.telemetry.interval_tokens for record in run.records)
    energy_j, co2e_g = run.energy_j, run.summary.get("co2e_g")
    per_token = None if energy_j is None or not trained else energy_j / trained
    cells = (
        *(Cell(text=duration(parts[name][0])) for name in PART_NAMES),
        Cell(text=duration(lost), tone="bad" if lost else ""),
        _joules(energy_j),
        _joules(parts["curvature probe"][1]),
        _joules(per_token),
        Cell(text=run.energy_source),
        Cell(text=f"{trained / max(run.time_s, 1e-9):,.0f}"),
        Cell(text=str(sum(record.telemetry.probe_time_s > 0 for record in run.records))),
        Cell(text=si(float(co2e_g), "g")) if is_figure(co2e_g) else dash("its summary does not say"),
    )
    return Line(name=run.name, cells=cells)


def _incidents(runs: Sequence[StoredRun]) -> Table | None:
    lines = []
    for run in runs:
        for back in run.rollbacks:
            first, last = (run.records[back.intervals[end]].telemetry for end in (0, -1))
            lost = count(len(back.intervals), "interval")
            where = f"{percent(run.began_at(back.intervals[0]))} to {percent(last.budget_used)}"
            cells = (Cell(text=where), Cell(text=f"{lost} from decision {first.decision} on"), Cell(text=back.reason))
            lines.append(Line(name=run.name, cells=cells))
    columns = (
        Column(name="share of the budget", left=True),
        Column(name="taken back", left=True),
        Column(name="why", wraps=True),
    )
    return Table(corner="run", columns=columns, groups=(("", tuple(lines)),)) if lines else None


def _refusals(runs: Sequence[StoredRun]) -> Table | None:
    lines = [
        Line(name=run.name, cells=(Cell(text=str(times)), Cell(text=reason)))
        for run in runs
        for reason, times in counted_refusals(run.records)
    ]
    columns = (Column(name="times"), Column(name="reason", wraps=True))
    return Table(corner="run", columns=columns, groups=(("", tuple(lines)),)) if lines else None


def _stated(run: StoredRun) -> dict[str, str]:
    return {key: _cut(text(value)) for key, value in flatten(run.config).items()}


def _cut(value: str) -> str:
    return value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}…"


def _settings(runs: Sequence[StoredRun]) -> Table | None:
    """Return the settings in which the runs differ."""
    stated = [_stated(run) for run in runs]
    names = [name for name in dict.fromkeys(key for each in stated for key in each) if _differs(stated, name)]
    lines = tuple(
        Line(name=name, cells=tuple(Cell(text=each.get(name, "not stated")) for each in stated)) for name in names
    )
    columns = tuple(Column(name=run.name, wraps=True) for run in runs)
    return Table(corner="setting", columns=columns, groups=(("", lines),)) if lines else None


def _differs(stated: Sequence[dict[str, Any]], name: str) -> bool:
    return len({each.get(name) for each in stated}) > 1


def _fold(run: StoredRun) -> Fold:
    kept = {key: value for key, value in run.summary.items() if key not in ("rollbacks", "refusals", "advice")}
    groups: tuple[tuple[str, Callable[[], dict[str, str]]], ...] = (
        ("settings", lambda: _stated(run)),
        ("summary", lambda: {key: _cut(text(value)) for key, value in flatten(kept).items()}),
    )
    lines = tuple(
        (name, tuple(Line(name=key, cells=(Cell(text=value),)) for key, value in stated().items()))
        for name, stated in groups
        if stated()
    )
    table = Table(corner="", columns=(Column(name="value", wraps=True),), groups=lines)
    return Fold(summary=f"{run.name}: settings and summary", table=table, about=f"Folder: {run.folder}")


def _not_drawn(runs: Sequence[StoredRun]) -> str:
    rest = len(runs) - N_COLOURED
    return f"The last {count(rest, 'run')} stand in the tables only." if rest > 0 else ""
