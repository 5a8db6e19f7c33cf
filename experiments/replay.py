"""Steer one run with a policy, resumably, and write down what happened."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.controller import Controller, keep
from trainpilot.agents.run_record import DecisionRecord
from trainpilot.agents.run_writer import RunWriter
from trainpilot.envs.live_training import device_label, live_plant
from trainpilot.envs.preference import Preference
from trainpilot.envs.reference import Reference, reference_for
from trainpilot.envs.reward import RewardMeter, current_loss
from trainpilot.experiments.options import ReplayOptions
from trainpilot.experiments.progress import progress_bar
from trainpilot.experiments.run_folder import RunFolder
from trainpilot.experiments.versions import versions
from trainpilot.llm_runtime.carbon import DEFAULT_GRID_INTENSITY_SOURCE, device_hours, grams_co2e
from trainpilot.llm_runtime.files import whole_folder
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.run_config import RunConfig
from trainpilot.llm_runtime.telemetry import Telemetry
from trainpilot.llm_runtime.threads import use_threads


@dataclass
class _Measured:
    """What a run has measured outside its intervals; kept in the checkpoint."""

    initial_loss: float = math.nan
    evaluation_s: float = 0.0
    records: list[DecisionRecord] = field(default_factory=list)


def replay(options: ReplayOptions, console: Console) -> dict[str, Any]:
    """Run, or go on with, the run that `options` describe, and return its summary.

    Raises:
        ValueError: an option cannot be used; nothing has been written then.
    """
    bundle = None if options.policy == "none" else PolicyBundle.load(Path(options.policy))
    preference = Preference.parse(options.preference)
    if not (math.isfinite(options.grid_intensity) and options.grid_intensity >= 0):
        raise ValueError(f"grid_intensity must be a number >= 0, got {options.grid_intensity}")
    config = options.run_config(bundle.decisions if bundle is not None else 50)
    threads = use_threads(options.threads)
    run = LiveRun(config, probe=options.probe)
    settings = {**asdict(config), "policy": options.policy, "preference": str(preference), "probe": options.probe}
    folder = RunFolder(options.out, settings)
    if (summary := folder.summary()) is not None:
        console.print(f"[dim]{options.out} is already finished[/dim]", soft_wrap=True)
        print_summary(summary, console)
        return summary
    limits = run.limits() if bundle is not None else run.base_limits()
    policy = bundle.act if bundle is not None else keep
    controller = Controller(policy, limits, preference)
    reference = _reference(options, config, console)
    measured = _train(run, controller, folder, reference, console)
    summary = _summarise(run, measured, reference, options, threads)
    _finish(run, folder, summary, reference, measured)
    print_summary(summary, console)
    return summary


def _reference(options: ReplayOptions, config: RunConfig, console: Console) -> Reference | None:
    if not options.reference:
        return None
    with console.status("reference run") as status:
        return reference_for(config, live_plant(), device=device_label(config), progress=status.update)


def _train(
    run: LiveRun, controller: Controller, folder: RunFolder, reference: Reference | None, console: Console
) -> _Measured:
    """Decide, train an interval, write it down; until the run has finished or diverged."""
    measured, telemetry = _resume(run, controller, folder)
    meter = RewardMeter(reference) if reference is not None else None
    for record in measured.records if meter is not None else []:
        meter.weigh(record.telemetry, record.telemetry.train_loss)  # type: ignore[union-attr]
    writer = RunWriter(folder.path / "tb", purge_step=telemetry.tokens if telemetry is not None else None)
    if reference is not None:
        writer.write_reference(reference)
    with progress_bar(console, run.config.model, 1.0) as advance:
        while telemetry is None or not (telemetry.finished or telemetry.diverged):
            controls = controller.decide(telemetry)
            telemetry = run.advance(controls, 1 / run.config.decisions)
            loss = current_loss(run, telemetry)
            record = controller.record(telemetry, meter.weigh(telemetry, loss) if meter is not None else None)
            measured.records.append(record)
            folder.append(record)
            writer.write(record)
            advance(telemetry.budget_used, _line(telemetry))
            if folder.checkpoint_due():
                folder.write_checkpoint(
                    {"snapshot": run.snapshot(), "initial_loss": measured.initial_loss}, measured.records
                )
    writer.close()
    return measured


def _resume(run: LiveRun, controller: Controller, folder: RunFolder) -> tuple[_Measured, Telemetry | None]:
    kept = folder.resume()
    if kept is None:
        return _Measured(initial_loss=run.evaluate()), None
    checkpoint, records = kept
    run.restore(checkpoint["snapshot"])
    return _Measured(initial_loss=checkpoint["initial_loss"], records=records), controller.resume(records)


def _summarise(
    run: LiveRun, measured: _Measured, reference: Reference | None, options: ReplayOptions, threads: int
) -> dict[str, Any]:
    intervals = [record.telemetry for record in measured.records]
    last = intervals[-1]
    time_s = sum(t.time_s for t in intervals)
    energy_j = _total(t.energy_j for t in intervals)
    summary: dict[str, Any] = {
        "policy": options.policy,
        "preference": str(Preference.parse(options.preference)),
        "model": options.model,
        "pretrained": run.loaded.pretrained,
        "n_parameters": run.loaded.n_parameters,
        "text": list(options.text),
        "device": device_label(run.config),
        "threads": threads,
        "tokens": last.tokens,
        "initial_validation_loss": measured.initial_loss,
        "final_validation_loss": None if last.diverged else run.validation_loss,
        "final_test_loss": None if last.diverged else run.test(),
        "time_s": time_s,
        "probe_time_s": sum(t.probe_time_s for t in intervals),
        "switch_time_s": sum(t.switch_time_s for t in intervals),
        "evaluation_time_s": sum(t.evaluation_time_s for t in intervals),
        "tokens_per_s": last.tokens / time_s,
        "energy_j": energy_j,
        "energy_source": last.energy_source,
        "energy_meter": run.meter.description,
        "device_hours": device_hours(time_s),
        "co2e_g": grams_co2e(energy_j, options.grid_intensity),
        "grid_intensity_g_per_kwh": options.grid_intensity,
        "grid_intensity_source": _intensity_source(options.grid_intensity),
        "n_decisions": len(intervals),
        "n_changes": sum(a.requested != b.requested for a, b in pairwise(intervals)),
        "diverged": last.diverged,
        "final_controls": asdict(last.requested),
        "final_effective": {"precision": last.precision, "sparsity": last.sparsity, "batch_size": last.batch_size},
        "versions": versions(),
    }
    if reference is not None:
        summary["reference"] = _against(reference, summary)
    return summary


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


def _finish(
    run: LiveRun, folder: RunFolder, summary: dict[str, Any], reference: Reference | None, measured: _Measured
) -> None:
    """Write model and TensorBoard summary first and summary.json last: it says that the run is complete."""
    if not summary["diverged"]:
        with whole_folder(folder.path / "model") as temporary:
            run.loaded.save(temporary)
    writer = RunWriter(folder.path / "tb")
    writer.write_summary(summary)
    names = ("final_validation_loss", "final_test_loss", "time_s", "energy_j")
    metrics = {name: float(summary[name]) for name in names if summary[name] is not None}
    writer.write_hparams(_flat(asdict(run.config) | {"policy": summary["policy"]}), metrics)
    writer.close()
    folder.write_summary(summary)


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Print a run's key figures, with the reference beside them where there is one."""
    reference = summary.get("reference")
    table = Table(title=f"{summary['model']}, {summary['n_parameters']:,} parameters, policy {summary['policy']}")
    table.add_column("")
    table.add_column("this run", justify="right")
    if reference:
        table.add_column("base schedule", justify="right")
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("validation loss, nats/token", lambda s: _number(s.get("final_validation_loss"), "{:.4f}")),
        ("test loss, nats/token", lambda s: _number(s.get("final_test_loss"), "{:.4f}")),
        ("tokens", lambda s: _number(s.get("tokens"), "{:,}")),
        ("time, s", lambda s: _number(s.get("time_s"), "{:.1f}")),
        (f"energy, J ({summary['energy_source'] or 'no meter'})", lambda s: _number(s.get("energy_j"), "{:.1f}")),
        (f"CO2e, g at {summary['grid_intensity_g_per_kwh']:g} g/kWh", lambda s: _number(s.get("co2e_g"), "{:.3f}")),
    ]
    for label, show in rows:
        table.add_row(label, show(summary), *([show(reference)] if reference else []))
    console.print(table)
    if summary["diverged"]:
        console.print("[red]the run diverged: its loss is not finite; lower --base-learning-rate[/red]")


def _number(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _intensity_source(intensity: float) -> str:
    default = ReplayOptions.__dataclass_fields__["grid_intensity"].default
    return DEFAULT_GRID_INTENSITY_SOURCE if intensity == default else "given with --grid-intensity"


def _total(values: Any) -> float | None:
    known = list(values)
    return None if None in known else sum(known)


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    return {key: " ".join(value) if isinstance(value, list | tuple) else value for key, value in config.items()}


def _line(telemetry: Telemetry) -> str:
    controls = telemetry.requested
    return (
        f"loss {telemetry.train_loss:.3f}  lr {telemetry.learning_rate:.1e}  batch {controls.batch_size}"
        f"  {telemetry.precision}  {telemetry.tokens_per_s:,.0f} tok/s"
    )
