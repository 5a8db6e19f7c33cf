"""Print a run, several runs, a policy bundle or a training folder in the terminal (`trainpilot inspect`).

For a run it prints key figures, curves, a breakdown of time and energy, the decisions and the refusals. Curves are
always printed as sparklines, and as larger charts if plotext is installed. Of several runs it prints a line each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from trainpilot.agents.bundle import policy_path, shipped_policies
from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.logging.tags import opening_link
from trainpilot.envs.action import ACTION_FIELDS
from trainpilot.experiments.inspect_policy import print_policy, print_reasons, titled_table
from trainpilot.experiments.report.controls import CONTROLS, Curve
from trainpilot.experiments.stored_run import (
    StoredRun,
    cost_parts,
    counted_refusals,
    is_figure,
    read_run,
    read_runs,
    taken,
)
from trainpilot.llm_runtime.config import PRECISIONS
from trainpilot.llm_runtime.telemetry import Telemetry

SPARKS, PLAIN_SPARKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
Value = Callable[[Telemetry], float | None]

KEY_FIGURES = (
    ("validation loss, nats/token", "final_validation_loss", ".4f"),
    ("test loss, nats/token", "final_test_loss", ".4f"),
    ("tokens", "tokens", ",.0f"),
    ("time, s", "time_s", ",.1f"),
    ("energy, J", "energy_j", ",.1f"),
    ("CO2e, g", "co2e_g", ",.3f"),
    ("quality (1 = as good as the reference)", "quality", ".3f"),
    ("time over the reference", "time_ratio", ".3f"),
    ("energy over the reference", "energy_ratio", ".3f"),
)
CURVES: tuple[Curve, ...] = (
    ("training loss, nats/token", lambda t: t.train_loss, ".3f"),
    ("validation loss, nats/token", lambda t: t.validation_loss, ".3f"),
    *(control.curve for control in CONTROLS if control.curve is not None),
    ("noise scale, sequences", lambda t: t.noise_scale, ".3g"),
    ("speed, tokens/s", lambda t: t.tokens_per_s, ",.0f"),
    ("energy, mJ/token", lambda t: _times(t.energy_per_token_j, 1000), ".3g"),
    ("power, W", lambda t: t.power_w, ".3g"),
)
CHARTS = (CURVES[0], CURVES[2])
"""Curves that are also drawn as large charts if plotext is installed."""
NARROW, LEFT_OUT = 110, ("policy", "test loss")
"""Below this width the table of several runs leaves out these columns."""
FLAT = 0.005
"""Values that differ by less than this share are drawn as a flat line."""


def print_run(folder: Path, console: Console) -> StoredRun:
    """Print a run's results, costs and decisions, and return it.

    Raises:
        ValueError: the folder has no `telemetry.jsonl`, or an empty one.
    """
    run = read_run(folder)
    records, summary = run.records, run.summary
    telemetry = [record.telemetry for record in records]
    console.print(_heading(summary, telemetry[-1]))
    if summary:
        console.print(_key_figures(summary))
    if charts := _charts(telemetry, console):
        console.print(Columns(charts))
    console.print(_curves(telemetry, console))
    console.print(_costs(run))
    console.print(_decisions(records))
    if refused := _refusals(records):
        console.print(refused)
    console.print(Text(f"\nas a page: trainpilot report {folder} --out {folder.name}.html"), soft_wrap=True)
    if (folder / "tb").is_dir():
        console.print(
            Text(f"for details: tensorboard --logdir {folder / 'tb'}\nthen open {opening_link()}"), soft_wrap=True
        )
    return run


def _heading(summary: Mapping[str, Any], last: Telemetry) -> Text:
    parts = [str(summary[name]) for name in ("model", "device") if name in summary]
    if "policy" in summary:
        advises = summary.get("mode") == "advise"  # version 0.2 did not write it
        parts.append(f"policy {summary['policy']}" + (", which only advised" if advises else ""))
    state = "diverged" if last.diverged else "finished" if last.finished else "not finished"
    parts.append(f"{state} at {last.budget_used:.0%} of the budget, {last.tokens:,} tokens")
    return Text("\n" + ", ".join(parts), style="bold")


def _key_figures(summary: Mapping[str, Any]) -> Table:
    reference = summary.get("reference")
    reference = reference if isinstance(reference, dict) else {}
    table = titled_table("Key figures", "", "this run", *(["reference"] if reference else []))
    for label, key, form in KEY_FIGURES:
        if key in summary or key in reference:
            own = _number(summary.get(key, reference.get(key)), form)
            beside = _number(reference[key], form) if key in summary and key in reference else ""
            table.add_row(label, own, *([beside] if reference else []))
    table.add_row(
        "energy source", escape(str(summary.get("energy_source") or "no meter")), *([""] if reference else [])
    )
    return table


def _charts(telemetry: Sequence[Telemetry], console: Console) -> list[Text]:
    """Return charts drawn by plotext; none if it is missing or too old, or if the terminal cannot print Unicode."""
    if len(telemetry) < 3 or not _speaks_unicode(console):
        return []
    try:
        import plotext

        width = min(console.width, 160) // 2 - 2 if console.width >= 100 else min(console.width, 80)
        return [_chart(plotext.figure, telemetry, value, title, width) for title, value, _ in CHARTS]
    except Exception:  # a failing plot must not end the command; the sparklines show the same data
        return []


def _chart(figure: Any, telemetry: Sequence[Telemetry], value: Value, title: str, width: int) -> Text:
    points = [(t.tokens, y) for t in telemetry if (y := value(t)) is not None and math.isfinite(y)]
    end = telemetry[-1].tokens
    ticks = [end * index / 4 for index in range(5)]
    figure.clear()
    figure.plot_size(width, 12)
    signal = figure.signal([x for x, _ in points], [y for _, y in points], marker="braille")
    figure.draw(signal.lines())
    figure.title(title)
    figure.ruler("x").lim(0, end)
    figure.ruler("x").ticks(ticks, [_tokens(tick) for tick in ticks])
    drawing = figure.build().string(colorless=True)
    figure.clear()
    return Text(drawing, style="cyan", no_wrap=True)


def _curves(telemetry: Sequence[Telemetry], console: Console) -> Table:
    table = titled_table("Curves", "", "course", "first", "last", "lowest", "highest")
    table.columns[0].no_wrap, table.columns[1].justify = True, "left"
    levels = SPARKS if _speaks_unicode(console) else PLAIN_SPARKS
    width = max(min(console.width - 72, 50), 8)
    for label, value, form in CURVES:
        known = [v for t in telemetry if (v := value(t)) is not None and math.isfinite(v)]
        if known:
            figures = (known[0], known[-1], min(known), max(known))
            table.add_row(label, sparkline(known, width, levels), *(_number(v, form) for v in figures))
    codes = [float(PRECISIONS.index(t.requested.precision)) for t in telemetry]
    used = (telemetry[0].precision, telemetry[-1].precision)
    table.add_row("precision", sparkline(codes, width, levels), *used, "", "")
    return table


def sparkline(values: Sequence[float], width: int, levels: str = SPARKS) -> str:
    """Return one line of at most `width` block characters, each showing the mean of its share of the values."""
    width = min(width, len(values))
    cuts = [round(index * len(values) / width) for index in range(width + 1)]
    parts = [values[a:b] for a, b in pairwise(cuts)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    span = high - low if high - low > FLAT * max(abs(high), abs(low)) else math.inf
    return "".join(levels[min(int((mean - low) / span * len(levels)), len(levels) - 1)] for mean in means)


def _costs(run: StoredRun) -> Table:
    """Return the breakdown of time and energy."""
    parts = cost_parts(run)
    total = sum(seconds for seconds, _ in parts.values())
    table = titled_table("Where time and energy went", "", "time, s", "share", f"energy, J ({run.energy_source})")
    for name, (seconds, joules) in parts.items():
        shown = "not counted" if name == "evaluation" else _number(joules, ",.2f")
        table.add_row(name, f"{seconds:,.2f}", f"{seconds / max(total, 1e-9):.1%}", shown)
    return table


def _decisions(records: Sequence[DecisionRecord]) -> Table:
    advised = any(record.advice is not None for record in records)
    heads = ("advised", "choices that were advised") if advised else ("changed", "choices that took effect")
    table = titled_table(f"{len(records)} decisions", "control", *heads)
    table.columns[2].justify = "left"
    actions = [taken(record) for record in records]
    for index, field in enumerate(ACTION_FIELDS):
        chosen = Counter(action[index] for action in actions)
        changes = [f"{field.choices[c]}: {n}" for c, n in sorted(chosen.items()) if c != field.keep]
        table.add_row(field.name, str(len(records) - chosen[field.keep]), escape(", ".join(changes)) or "-")
    return table


def _refusals(records: Sequence[DecisionRecord]) -> Table | None:
    """Count refusals by reason; reasons that differ only in their numbers are counted as one."""
    counted = counted_refusals(records)
    if not counted:
        return None
    table = titled_table("Refused by the action masks", "", "times")
    for reason, count in counted:
        table.add_row(escape(reason), str(count))
    return table


def _speaks_unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _tokens(count: float) -> str:
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * limit:  # 999,936 are 1 M, not 1e+03 k
            return f"{count / limit:.3g} {letter}"
    return f"{count:.0f}"


def _number(value: Any, form: str) -> str:
    return format(value, form) if is_figure(value) else "unknown"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


RUNS_COLUMNS: tuple[tuple[str, Callable[[StoredRun], str]], ...] = (
    ("policy", lambda run: run.policy),
    ("state", lambda run: run.state),
    ("loss", lambda run: _number(run.validation_loss, ".4f")),
    ("test loss", lambda run: _number(run.test_loss, ".4f")),
    ("tokens", lambda run: _tokens(run.last.tokens)),
    ("time, s", lambda run: _number(run.time_s, ",.1f")),
    ("energy, J", lambda run: _number(run.energy_j, ",.1f")),
    ("changed", lambda run: str(run.n_changes)),
    ("refused", lambda run: str(run.n_refusals)),
    ("rollbacks", lambda run: str(len(run.rollbacks))),
)


def print_runs(folders: Sequence[Path], console: Console) -> None:
    """Print several runs as a table, a line for each.

    Raises:
        ValueError: a folder holds no run.
    """
    runs = read_runs(folders)
    columns = [each for each in RUNS_COLUMNS if console.width >= NARROW or each[0] not in LEFT_OUT]
    table = titled_table(f"{len(runs)} runs", "", *(name for name, _ in columns))
    for run in runs:
        table.add_row(escape(run.name), *(escape(shown(run)) for _, shown in columns))
    console.print(table)
    sources = ", ".join(sorted({run.energy_source for run in runs}))
    about = f"loss: validation, in nats/token; changed: decisions; refused: choices; source of the joules: {sources}"
    console.print(Text(about, style="dim"))
    page = " ".join(["trainpilot report", *map(str, folders), "--out runs.html"])
    console.print(Text(f"as one page: {page}"), soft_wrap=True)


def inspect_paths(paths: Sequence[Path], console: Console, *, everything: bool = False) -> None:
    """Print what `inspect_path` prints of one path, and of several runs a line each.

    Raises:
        ValueError: there is no path, one of several is no run, or as `inspect_path`.
    """
    if not paths:
        raise ValueError("path must be given, got none; try trainpilot inspect default")
    if len(paths) == 1:
        inspect_path(paths[0], console, everything=everything)
    else:
        print_runs(paths, console)


def inspect_path(path: Path, console: Console, *, everything: bool = False) -> None:
    """Print the bundle, run or training folder at `path`, or the shipped policy of that name.

    Args:
        path: What to print.
        console: Where.
        everything: Print the whole provenance of a bundle, not only what fits one screen.

    Raises:
        ValueError: `path` is none of these.
    """
    if path.is_file():
        print_policy(path, console, everything=everything)
    elif (path / "telemetry.jsonl").is_file():
        print_reasons(print_run(path, console), console)
    elif (path / "policy.safetensors").is_file():
        print_policy(path / "policy.safetensors", console, everything=everything)
        console.print(f"training curves: tensorboard --logdir {path / 'tb'}", soft_wrap=True)
    elif not path.exists() and str(path) in shipped_policies():
        print_policy(policy_path(str(path)), console, everything=everything)
    else:
        shipped = ", ".join(shipped_policies()) or "none"
        raise ValueError(
            f"path must be a bundle, a run's folder or an agent's folder, got {path}; "
            f"policies that come with trainpilot: {shipped}"
        )
