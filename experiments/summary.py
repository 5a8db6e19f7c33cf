"""Sum up a finished run: what it reached, what it cost, and how that compares with its reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from trainpilot.agents.controller import DecisionRecord
from trainpilot.envs.decision import Preference
from trainpilot.envs.reference import device_label
from trainpilot.envs.reward import Reference
from trainpilot.experiments.options import ReplayOptions
from trainpilot.experiments.versions import versions
from trainpilot.llm_runtime.carbon import (
    DEFAULT_GRID_INTENSITY_G_PER_KWH,
    DEFAULT_GRID_INTENSITY_SOURCE,
    device_hours,
    grams_co2e,
)
from trainpilot.llm_runtime.energy.meter import sum_known
from trainpilot.llm_runtime.live_run import LiveRun


def summarise(
    run: LiveRun,
    records: Sequence[DecisionRecord],
    initial_loss: float,
    reference: Reference | None,
    options: ReplayOptions,
) -> dict[str, Any]:
    """Return the run's summary as JSON values; losses are in nats/token."""
    intervals = [record.telemetry for record in records]
    last = intervals[-1]
    summary: dict[str, Any] = {
        "policy": options.policy,
        "preference": str(Preference.parse(options.preference)),
        "model": options.model,
        "pretrained": run.loaded.pretrained,
        "n_parameters": run.loaded.n_parameters,
        "text": list(options.text),
        "device": device_label(run.config),
        "tokens": last.tokens,
        "initial_validation_loss": initial_loss,
        "final_validation_loss": None if last.diverged else run.validation_loss,
        "final_test_loss": None if last.diverged else run.test(),
        "n_decisions": len(intervals),
        "n_changes": sum(before.requested != after.requested for before, after in pairwise(intervals)),
        "diverged": last.diverged,
        "final_controls": asdict(last.requested),
        "final_effective": {"precision": last.precision, "sparsity": last.sparsity, "batch_size": last.batch_size},
        "versions": versions(),
    }
    summary |= _cost(run, records, options)
    if reference is not None:
        summary["reference"] = _against(reference, summary)
    return summary


def _cost(run: LiveRun, records: Sequence[DecisionRecord], options: ReplayOptions) -> dict[str, Any]:
    """Return time, energy and what follows from them, of the intervals; evaluation is listed apart."""
    intervals = [record.telemetry for record in records]
    time_s = sum(t.time_s for t in intervals)
    energy_j = sum_known(t.energy_j for t in intervals)
    default = options.grid_intensity == DEFAULT_GRID_INTENSITY_G_PER_KWH
    return {
        "time_s": time_s,
        "probe_time_s": sum(t.probe_time_s for t in intervals),
        "switch_time_s": sum(t.switch_time_s for t in intervals),
        "evaluation_time_s": sum(t.evaluation_time_s for t in intervals),
        "tokens_per_s": intervals[-1].tokens / time_s,
        "energy_j": energy_j,
        "energy_source": intervals[-1].energy_source,
        "energy_meter": run.meter.description,
        "device_hours": device_hours(time_s),
        "co2e_g": grams_co2e(energy_j, options.grid_intensity),
        "grid_intensity_g_per_kwh": options.grid_intensity,
        "grid_intensity_source": DEFAULT_GRID_INTENSITY_SOURCE if default else "given with --grid-intensity",
    }


def _against(reference: Reference, summary: dict[str, Any]) -> dict[str, Any]:
    """Return the reference run's figures, and the run's as ratios to them."""
    loss, energy_j = summary["final_validation_loss"], summary["energy_j"]
    known = energy_j is not None and reference.energy_j
    return {
        "final_validation_loss": reference.losses[-1],
        "time_s": reference.time_s,
        "energy_j": reference.energy_j,
        "energy_source": reference.energy_source,
        "loss_difference": None if loss is None else loss - reference.losses[-1],
        "quality": None if loss is None else reference.quality(loss),
        "time_ratio": summary["time_s"] / reference.time_s,
        "energy_ratio": energy_j / reference.energy_j if known else None,
    }


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Print a run's key figures, with the reference beside them where there is one."""
    reference = summary.get("reference")
    policy = "no policy: the base schedule" if summary["policy"] == "none" else f"policy {summary['policy']}"
    table = Table(title=f"{summary['model']}, {summary['n_parameters']:,} parameters\n{policy}", title_style="bold")
    table.add_column("")
    table.add_column("this run", justify="right")
    if reference:
        table.add_column("base schedule", justify="right")
    for label, show in _rows(summary):
        table.add_row(label, show(summary), *([show(reference)] if reference else []))
    console.print(table)
    if summary["diverged"]:
        console.print("[red]the run diverged: its loss is not finite; lower --base-learning-rate[/red]")


def _rows(summary: dict[str, Any]) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    return [
        ("validation loss, nats/token", _shown("final_validation_loss", "{:.4f}")),
        ("test loss, nats/token", _shown("final_test_loss", "{:.4f}")),
        ("tokens", _shown("tokens", "{:,}")),
        ("time, s", _shown("time_s", "{:.1f}")),
        (f"energy, J ({summary['energy_source'] or 'no meter'})", _shown("energy_j", "{:.1f}")),
        (f"CO2e, g at {summary['grid_intensity_g_per_kwh']:g} g/kWh", _shown("co2e_g", "{:.3f}")),
    ]


def _shown(name: str, form: str) -> Callable[[dict[str, Any]], str]:
    return lambda figures: "-" if figures.get(name) is None else form.format(figures[name])
