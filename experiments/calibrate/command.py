"""Run `trainpilot calibrate`: make the missing live runs, fit the physics, measure its error, and write the result."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainpilot.experiments import elsewhere
from trainpilot.experiments.calibrate.calibration import (
    FILE_NAME,
    BestRate,
    CalibratedPhysics,
    Calibration,
    CalibrationCost,
    FitError,
    best_rates,
    fit,
    fit_error,
    rank_correlation,
)
from trainpilot.experiments.calibrate.design import CalibrationSetting, design
from trainpilot.experiments.calibrate.runs import EVALUATE_EVERY, WIDE_PROBE_SEQUENCES, RunFile, carry_out, run_key
from trainpilot.experiments.costs.measure import measure_cost_table
from trainpilot.experiments.costs.table import CostTable
from trainpilot.experiments.elsewhere import check_same
from trainpilot.experiments.engines import Engine, engine_of
from trainpilot.experiments.options import CalibrateOptions
from trainpilot.experiments.progress import progress_bar
from trainpilot.experiments.run_store import versions
from trainpilot.experiments.workers import Workers
from trainpilot.llm_runtime.config import PRECISIONS, Precision, RunConfig
from trainpilot.llm_runtime.data.text_sources import content_digest
from trainpilot.llm_runtime.energy.meter import sum_known
from trainpilot.llm_runtime.files import write_json
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.plain_values import read_json
from trainpilot.llm_runtime.process import available_cores, use_threads
from trainpilot.llm_runtime.simulator.physics import PARAMETERS

MEANINGS = {"floor": "loss after endless training, nats/token"}
"""Meanings of fitted values whose unit differs from that in the simulator's table."""
OPEN_FROM = 1.5
"""A standard error (of the logarithm) above this means that the runs do not determine the value; the prior has 2."""
CAPTION = "x/÷ 1.5: likely within a factor of 1.5; open: the runs do not tell; rate unit: a learning rate of 0.001"


def print_calibration(calibration: Calibration, console: Console) -> None:
    """Print the short form of a calibration."""
    console.print(_values(calibration.physics))
    console.print(_errors(calibration))
    console.print(_rates(calibration.best_rates))
    console.print(_ranks(calibration.grid_rank_correlation), soft_wrap=True)
    console.print(_cost_line(calibration), soft_wrap=True)


def _values(physics: CalibratedPhysics) -> Table:
    table = Table(title="fitted physics", title_justify="left", caption=CAPTION, caption_justify="left")
    table.add_column("what")
    for column in ("value", "uncertainty"):
        table.add_column(column, justify="right")
    for name, value in physics.values.items():
        what = f"{name.replace('_', ' ')}: {MEANINGS.get(name) or PARAMETERS[name].meaning}"
        table.add_row(escape(what), _figure(value), _factor(physics.uncertainty[name]))
    return table


def _factor(error: float) -> str:
    """Format the standard error of a logarithm as a factor."""
    return f"x/÷ {math.exp(error):.2f}" if error < OPEN_FROM else "open"


def _errors(calibration: Calibration) -> Table:
    table = Table(title="mean absolute error, nats/token", title_justify="left")
    columns = ("runs", "diverged", "final loss", "its worst", "along the run", "best to worst run")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    table.add_row("held out", *_error_cells(calibration.held_out))
    table.add_row("fitted", *_error_cells(calibration.fitted))
    return table


def _error_cells(error: FitError) -> list[str]:
    figures = (error.final_loss, error.final_loss_worst, error.trajectory, error.final_loss_range)
    cells = ["-" if figure is None else f"{figure:.3f}" for figure in figures]
    return [str(error.n_runs), str(error.n_diverged), *cells]


def _rates(rates: tuple[BestRate, ...]) -> Table:
    table = Table(title="best learning rate (WSD)", title_justify="left")
    for column in ("batch", "as the fit sees it", "measured on the grid"):
        table.add_column(column, justify="right")
    for rate in rates:
        edge = ", edge of the grid" if rate.at_edge else ""
        table.add_row(str(rate.batch_size), _figure(rate.fitted) + edge, _figure(rate.measured))
    return table


def _ranks(correlation: float | None) -> str:
    if correlation is None:
        return "settings ranked as measured: cannot be said, all ended alike"
    return (
        f"grid of learning rates and batches, in the order measured: rank correlation {correlation:.2f} (1 is the same)"
    )


def _cost_line(calibration: Calibration) -> str:
    cost = calibration.cost
    joules = "joules unknown" if cost.energy_j is None else f"{cost.energy_j:,.0f} J ({cost.energy_source})"
    return f"{cost.n_runs} runs took {cost.run_time_s:,.0f} s in all, {joules}; the fit took {cost.fit_time_s:.0f} s"


def _figure(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "-"


TIMED_BATCHES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""Batches of the cost table, as factors on the start's."""


@dataclass(frozen=True, kw_only=True)
class PreparedCalibration:
    """Everything that is determined before the first run."""

    base: RunConfig
    settings: tuple[CalibrationSetting, ...]
    keys: dict[str, str]
    """Key of each setting's run, by name."""
    table: CostTable
    evaluation_sequences: int
    jobs: int
    engine: Engine | None
    """Where the runs are carried out, if not on this machine."""


def calibrate(options: CalibrateOptions, console: Console) -> None:
    """Calibrate the simulator on one model and text, and write `calibration.json`.

    Raises:
        ValueError: an option cannot be used (checked before the first run), or a run failed.
    """
    prepared = prepare(options, console)
    with nullcontext() if prepared.engine is None else closing(prepared.engine):
        files = _run(prepared, options.out / "runs", console)
    calibration = _fit(prepared, files, options, console)
    path = options.out / FILE_NAME
    calibration.write(path)
    print_calibration(calibration, console)
    console.print(f"calibration: {escape(str(path))}", soft_wrap=True)


def prepare(options: CalibrateOptions, console: Console) -> PreparedCalibration:
    """Validate all options before the first run, and measure the cost table."""
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"out must be a folder, got the file {options.out}; choose another")
    use_threads(1)  # as in the runs
    base = options.run_config()
    design(base, options.effort)  # checks that the budget is large enough
    engine = engine_of(options, [base.device], options.out)
    with console.status("model, text and precisions") as status:
        run = LiveRun(base, probe=False)
        precisions = _precisions(base, run)
        prunes = _prunes(base, console)
        settings = design(base, options.effort, precisions=precisions, prunes=prunes)
        content = content_digest(base)
        status.update("cost table")
        table = _cost_table(base, precisions, prunes, content, options.out / "cost_table.json")
    return PreparedCalibration(
        base=base,
        settings=settings,
        keys={setting.name: run_key(setting, content) for setting in settings},
        table=table,
        evaluation_sequences=run.evaluation_sequences,
        jobs=options.jobs or (available_cores() if engine is None else engine.jobs),
        engine=engine,
    )


def _precisions(base: RunConfig, run: LiveRun) -> list[Precision]:
    """Return the base's precision and those that were measured to be faster on this device."""
    masked = run.limits().masked_precisions
    return [name for name in PRECISIONS if name == base.precision or name not in masked]


def _prunes(base: RunConfig, console: Console) -> bool:
    """Return whether channels of the model can be removed; print the reason if not."""
    try:
        LiveRun(replace(base, pruning="width"), probe=False)
    except ValueError as error:
        console.print(f"[yellow]no pruning run: {escape(str(error))}[/yellow]", soft_wrap=True)
        return False
    return True


def _cost_table(base: RunConfig, precisions: Sequence[Precision], prunes: bool, content: str, path: Path) -> CostTable:
    """Return the cost table, from its file if it was measured for the same settings before."""
    asked = [content, base.model, base.sequence_length, base.batch_size, base.device, list(precisions), prunes]
    if base.vocabulary != RunConfig.vocabulary:  # version 0.1 asked for bytes alone
        asked.append(base.vocabulary)
    try:
        kept = read_json(path)
        if kept["asked"] == asked:
            return CostTable.from_json(kept["table"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never measured here, or a damaged file: measure it
    table = measure_cost_table(
        base,
        batch_sizes=sorted({max(1, round(base.batch_size * factor)) for factor in TIMED_BATCHES}),
        precisions=precisions,
        prunings=("width",) if prunes else (),
    )
    write_json(path, {"asked": asked, "table": table.to_json()})
    return table


def _run(prepared: PreparedCalibration, folder: Path, console: Console) -> dict[str, RunFile]:
    """Make the missing runs, and return every run by its setting's name."""
    kept = {setting.name: RunFile.read(folder / f"{setting.name}.json") for setting in prepared.settings}
    files = {name: file for name, file in kept.items() if file is not None and file.key == prepared.keys[name]}
    missing = sorted((each for each in prepared.settings if each.name not in files), key=_steps, reverse=True)
    console.print(
        f"{len(prepared.settings)} runs, {len(files)} of them kept from before: about "
        f"{_expected_s(prepared, missing) / 60:.0f} min with {prepared.jobs} side by side",
        soft_wrap=True,
    )
    failures: list[str] = []
    with progress_bar(console, "runs", len(prepared.settings)) as advance:
        work = [(setting, prepared.keys[setting.name]) for setting in missing]
        for setting, result in run_all(work, prepared.jobs, prepared.engine):
            if isinstance(result, str):
                failures.append(f"{setting.name}: {result}")
                continue
            result.write(folder / f"{setting.name}.json")
            files[setting.name] = result
            advance(len(files), escape(_line(setting, result)))
    if failures:
        raise ValueError(f"{len(failures)} of {len(prepared.settings)} runs failed, the first one {failures[0]}")
    return {setting.name: files[setting.name] for setting in prepared.settings}


def run_all(
    work: Sequence[tuple[CalibrationSetting, str]], jobs: int, engine: Engine | None = None
) -> Iterator[tuple[CalibrationSetting, RunFile | str]]:
    """Run settings in processes of one thread, and yield each setting with its run as the runs end.

    For a failed run, the reason is yielded instead as one line of text.

    Raises:
        ValueError: a process was killed; the runs that have been yielded are complete.
    """

    def killed(*_: object) -> RunFile | str:
        raise ValueError(
            "jobs: the process of a run was killed, perhaps for lack of memory; the same command goes on where it "
            f"was, got {jobs}; fewer need less"
        )

    if engine is None:
        workers = Workers(partial(_attempt, jobs=jobs), jobs, on_death=killed)
    else:
        attempt = partial(_attempt_elsewhere, jobs=engine.share_meter)
        workers = Workers(attempt, jobs, attempts=elsewhere.ATTEMPTS, on_death=killed, executor=engine)
    with workers:
        for (setting, _), result in workers.run(work):
            yield setting, result


@cache
def _content(text: tuple[str, ...], model: str) -> str:
    return content_digest(RunConfig(text=text, model=model))


def _attempt_elsewhere(setting: CalibrationSetting, key: str, *, jobs: int | None) -> RunFile | str:
    config = setting.config
    content = partial(_content, config.text, config.model)
    check_same(
        lambda: run_key(setting, content()), key, f"the text {' '.join(config.text)} and the model {config.model}"
    )
    return _attempt(setting, key, jobs=jobs)


def _attempt(setting: CalibrationSetting, key: str, *, jobs: int | None) -> RunFile | str:
    try:
        return carry_out(setting, key, jobs=jobs)
    except (ValueError, RuntimeError, MemoryError, OSError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _steps(setting: CalibrationSetting) -> float:
    """Number of steps of a run; the longest runs begin first, so that all processes end at about the same time."""
    return setting.config.tokens / setting.config.batch_size


def _expected_s(prepared: PreparedCalibration, settings: Sequence[CalibrationSetting]) -> float:
    """Return the seconds that the runs will take, by the cost table."""
    total = 0.0
    for setting in settings:
        config, table = setting.config, prepared.table
        looks = config.decisions // EVALUATE_EVERY + 1
        total += table.step(config.batch_size, config.precision).time_s * config.n_sequences() / config.batch_size
        total += table.probe(WIDE_PROBE_SEQUENCES, config.batch_size).time_s * config.decisions
        total += table.evaluation(prepared.evaluation_sequences, config.batch_size).time_s * looks
    return total / prepared.jobs


def _line(setting: CalibrationSetting, result: RunFile) -> str:
    ended = "diverged" if result.run.diverged else f"loss {result.run.final_loss:.3f}"
    return f"{setting.name}, {ended}"


def _fit(
    prepared: PreparedCalibration, files: dict[str, RunFile], options: CalibrateOptions, console: Console
) -> Calibration:
    runs = {setting.name: replace(files[setting.name].run, role=setting.role) for setting in prepared.settings}
    grid = [runs[setting.name] for setting in prepared.settings if setting.grid]
    start = time.monotonic()
    with console.status("fit"):
        physics: CalibratedPhysics = fit(list(runs.values()))
    return Calibration(
        config=prepared.base,
        effort=options.effort,
        n_parameters=grid[0].n_parameters,
        physics=physics,
        cost_table=prepared.table,
        held_out=fit_error(physics, [run for run in runs.values() if run.role == "held-out"]),
        fitted=fit_error(physics, [run for run in runs.values() if run.role == "fit"]),
        grid_rank_correlation=rank_correlation(physics, grid),
        best_rates=best_rates(physics, grid),
        cost=_calibration_cost(list(files.values()), time.monotonic() - start),
        device=prepared.table.device,
        versions=versions(),
        command=_command(options),
        date=datetime.now(UTC).date().isoformat(),
    )


def _command(options: CalibrateOptions) -> str:
    """Return the command line that reproduces this calibration."""
    words = ["trainpilot", "calibrate"]
    for field in fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def _calibration_cost(files: Sequence[RunFile], fit_time_s: float) -> CalibrationCost:
    return CalibrationCost(
        n_runs=len(files),
        run_time_s=sum(file.time_s for file in files),
        fit_time_s=fit_time_s,
        energy_j=sum_known(file.energy_j for file in files),
        energy_source=files[-1].energy_source,
    )
