"""Run `trainpilot compare`: estimate the work, make the missing runs, compute the figures, and write the report."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape

from trainpilot.experiments.compare.cases import TUNED_SCHEDULES, all_sizes, grid, load_cases
from trainpilot.experiments.compare.compression import CompressedMethod, check_compressed, is_compressed
from trainpilot.experiments.compare.methods import (
    CHECKS,
    OPTIONAL_RUNS,
    PER_SCHEDULE,
    Chosen,
    choose_methods,
    members_of,
    rests_on_search,
    starts_from_tuned,
)
from trainpilot.experiments.compare.programs import (
    CURVE_BUDGETS,
    UNTUNED_CURVE_BUDGETS,
    ComparisonLedger,
    TunedStatic,
    compressed_program,
    direct_program,
    open_loop_program,
    search_program,
    untuned_curve,
)
from trainpilot.experiments.compare.scheduler import Program, Scheduler, run_workers
from trainpilot.experiments.compare.search import StudyStorage
from trainpilot.experiments.costs.measure import cost_tables, precisions_that_pay
from trainpilot.experiments.costs.measure_use import use_costs
from trainpilot.experiments.costs.table import CostTable
from trainpilot.experiments.costs.use import UseCost, Used, used_model
from trainpilot.experiments.engines import Engine, engine_of
from trainpilot.experiments.options import CompareOptions
from trainpilot.experiments.progress import progress_bar
from trainpilot.experiments.results import UNTUNED, Case, Comparison, RunResult, cost_key
from trainpilot.experiments.run_store import RunStore, run_key, versions
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.process import available_cores, use_threads

REFINEMENT_RUNS = 30
"""Estimated runs for refining a grid's best point."""
SCHEDULE_RUNS = 11
"""Estimated runs for refining one schedule's learning rate and confirming its best settings."""
SEARCHED_BATCH = 0.25
"""Typical batch of a search's runs relative to the case's: at equal tokens small batches are better on small models."""
SET_UP_S = 0.5
"""Estimated seconds for creating the model and evaluating its losses."""
RETUNE_RUNS = 10
"""Estimated runs for tuning again at another budget."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Estimated work of a comparison. Searches decide as they go, so the true number may differ."""

    n_runs: int
    """Runs, counting a run of half the budget as half."""
    time_s: float
    """Wall-clock seconds with the given number of processes."""


def estimate_workload(
    cases: Sequence[Case], names: Sequence[str], n_seeds: int, tables: Mapping[str, CostTable], jobs: int
) -> Workload:
    """Estimate the work of comparing `names` on `cases`, if nothing has been run before."""
    runs, seconds = 0.0, 0.0
    for case in cases:
        equivalents = runs_on_a_case(case, names, n_seeds)
        runs += equivalents
        seconds += equivalents * seconds_of_a_run(case, tables, searched=rests_on_search(names))
    return Workload(n_runs=round(runs), time_s=seconds / jobs)


def runs_on_a_case(case: Case, names: Sequence[str], n_seeds: int) -> float:
    """Return the number of runs of one case, in units of runs of the whole budget."""
    searched = [name for name in names if rests_on_search([name])]
    optional = [name for name in names if name in OPTIONAL_RUNS]
    alone = [name for name in names if name not in searched and name not in optional]
    runs: float = n_seeds * sum(map(members_of, alone))
    if UNTUNED in names:
        runs += sum(UNTUNED_CURVE_BUDGETS)
    if searched:
        per_curve = sum(CURVE_BUDGETS) * (RETUNE_RUNS + n_seeds)
        runs += len(grid(case.config, [case.config.precision])) + REFINEMENT_RUNS + n_seeds + per_curve
        runs += SCHEDULE_RUNS * len(TUNED_SCHEDULES) + sum(n_seeds for name in searched if name in PER_SCHEDULE)
        runs += sum(1.1 * n_seeds for name in searched if name in CHECKS)
        runs += sum(n_seeds for name in searched if starts_from_tuned(name))
    runs += sum(n_seeds * (CompressedMethod.parse(name).budget - 1) for name in names if is_compressed(name))
    return runs + sum(OPTIONAL_RUNS[name] + n_seeds for name in optional)


def seconds_of_a_run(case: Case, tables: Mapping[str, CostTable], *, searched: bool = False) -> float:
    """Return the modelled seconds of a run with the case's own batch, or with the smaller batch typical of a search."""
    config = case.config
    batch_size = max(1, round(config.batch_size * SEARCHED_BATCH)) if searched else config.batch_size
    step = tables[cost_key(config)].step(batch_size, config.precision)
    return SET_UP_S + step.time_s * config.n_sequences() / batch_size


TUNING_SEEDS = (1_000, 1_001, 1_002)
"""Seeds of the searches: the first is for trying settings, the others for confirming. Judged seeds begin at 0."""


@dataclass(frozen=True, kw_only=True)
class PreparedComparison:
    """Everything that is determined before the first run."""

    cases: tuple[Case, ...]
    chosen: Chosen
    ledger: ComparisonLedger
    tables: dict[str, CostTable]
    jobs: int
    engine: Engine | None
    """Where the runs are executed, if not on this machine."""


def compare(options: CompareOptions, console: Console) -> None:
    """Compare methods on cases and write the report.

    Raises:
        ValueError: an option, the cases file or a policy cannot be used. This is checked before the first run.
    """
    start = time.monotonic()
    prepared = prepare(options, console)
    with nullcontext() if prepared.engine is None else closing(prepared.engine):
        results = _runs(prepared, options, console)
    if results is None:
        return
    comparison = Comparison(
        cases=prepared.cases,
        methods=prepared.chosen.notes({row.method for row in prepared.ledger.rows}),
        seeds=prepared.ledger.seeds,
        rows=prepared.ledger.rows,
        baselines={case: tuple(found) for case, found in prepared.ledger.baselines.items()},
        provenance=_provenance(options, prepared.jobs, time.monotonic() - start),
    )
    comparison.write(options.folder / "comparison.json")
    _report(comparison, results, prepared, options, console)


def _runs(prepared: PreparedComparison, options: CompareOptions, console: Console) -> dict[str, RunResult] | None:
    """Say how much there is to do, and do it unless only that was asked; return every result by key."""
    plan = estimate_workload(prepared.cases, prepared.chosen.names, options.seeds, prepared.tables, prepared.jobs)
    console.print(
        f"{len(prepared.cases)} cases x {len(prepared.chosen.names)} methods x {options.seeds} seeds: about "
        f"{plan.n_runs:,} runs, about {_duration(plan.time_s)} with {prepared.jobs} side by side; "
        f"what is in {options.folder} is not run again",
        soft_wrap=True,
    )
    if options.plan:
        return None
    return _run(prepared, RunStore(options.folder / "runs"), options, console)


def prepare(options: CompareOptions, console: Console) -> PreparedComparison:
    """Validate all options before the first run, and measure the cost tables."""
    if options.folder.exists() and not options.folder.is_dir():
        raise ValueError(f"out must be a folder, got the file {options.folder}")
    studies = StudyStorage(options.optuna_storage)
    use_threads(options.threads)
    cases = load_cases(options.cases)
    chosen = choose_methods(options.methods)
    for case in cases:
        if case.config.budget is not None:
            raise ValueError(
                f"case {case.name}: budget must be in tokens to be compared, got {case.config.budget}; give tokens, "
                "which the report counts in seconds and joules too"
            )
        run_key(chosen.any_spec(case))  # checks that the text can be read
        _check_search(case, chosen)
    check_compressed(cases, chosen.compressed)
    if chosen.populations and not options.report_only:
        _check_ray_tune(chosen.populations[0], options)
    devices = [case.config.device for case in cases]
    engine = None if options.report_only else engine_of(options, devices, options.folder, options.threads)
    here = max(1, available_cores() // options.threads)
    jobs = options.jobs or (here if engine is None else engine.jobs)
    with console.status("precisions") as status:
        precisions = {case.name: precisions_that_pay(case) for case in cases}
        configs = {case.name: _models(case, chosen) for case in cases}
        tables = cost_tables(configs, precisions, options.folder / "costs", status.update)
    seeds = range(options.seeds)
    warn = _warner(console)
    ledger = ComparisonLedger(seeds, TUNING_SEEDS, tables, precisions, warn, studies=studies)
    return PreparedComparison(cases=cases, chosen=chosen, ledger=ledger, tables=tables, jobs=jobs, engine=engine)


def _models(case: Case, chosen: Chosen) -> list[RunConfig]:
    """Return runs on every model that may be trained on a case, the case's own first."""
    sizes = all_sizes(case.config) if chosen.varies_size else [case.config]
    return list(dict.fromkeys([*sizes, *(each for method in chosen.compressed for each in method.models(case.config))]))


def _check_ray_tune(name: str, options: CompareOptions) -> None:
    """Raise `ValueError` where there is no Ray Tune for a population, or it has no cluster to run on."""
    extra = 'pip install "trainpilot[ray]"'
    if options.on != "ray":
        raise ValueError(
            f"methods: {name} needs --on ray, got --on {options.on}; without --ray-address that is a cluster of this "
            f"machine alone ({extra})"
        )
    try:
        import trainpilot.experiments.compare.population_ray  # noqa: F401
    except ImportError as error:
        raise ValueError(f"methods: {name} needs Ray Tune, which is not installed; {extra}") from error


def _check_search(case: Case, chosen: Chosen) -> None:
    names = (*chosen.searched, *(method.note.name for method in chosen.started), *chosen.optional)
    if names and not grid(case.config, [case.config.precision]):
        raise ValueError(
            f"case {case.name}: tokens must give a search sixteen steps of half the case's batch, got "
            f"{case.config.tokens:,}; raise them or leave out {', '.join(names)}"
        )


def _run(
    prepared: PreparedComparison, store: RunStore, options: CompareOptions, console: Console
) -> dict[str, RunResult]:
    """Execute the programs, and return every result by key."""
    results: dict[str, RunResult] = {}
    names, n_seeds = prepared.chosen.names, options.seeds
    total = sum(runs_on_a_case(case, names, n_seeds) * case.config.tokens for case in prepared.cases)
    done = 0.0
    with (
        progress_bar(console, "runs", total) as advance,
        nullcontext()
        if options.report_only
        else run_workers(prepared.jobs, options.threads, prepared.engine) as workers,
    ):

        def take(result: RunResult, kept: bool) -> None:
            nonlocal done
            results[result.key] = result
            done = min(done + result.spec.config.tokens * result.spec.members, total)
            advance(done, f"{len(results):,} runs  {escape(_line(result, kept, prepared.cases))}")

        Scheduler(workers, store, take).run(list(_programs(prepared)))
        advance(total, f"{len(results):,} runs")
    return results


def _line(result: RunResult, kept: bool, cases: Sequence[Case]) -> str:
    """Return a line about a finished run: which one, and how it ended."""
    ran = result.spec.config
    on_text = [case for case in cases if case.config.text == ran.text]  # a resized model is no case's own
    name = next((case.name for case in on_text if case.config.model == ran.model), on_text[0].name if on_text else "")
    if result.failure is not None:
        return f"{name}: {result.failure}"
    loss = result.final_validation_loss
    ended = "diverged" if loss is None else f"loss {loss:.3f}"
    return f"{name}: {result.spec.steering.kind}, lr {ran.base_learning_rate:.2g}, {ended}{', kept' if kept else ''}"


def _programs(prepared: PreparedComparison) -> Iterator[Program]:
    """Return the programs, case after case, so that an interrupted comparison holds whole cases."""
    ledger, chosen = prepared.ledger, prepared.chosen
    for case in prepared.cases:
        for method in chosen.direct:
            yield direct_program(ledger, case, method)
        if UNTUNED in chosen.names:
            yield untuned_curve(ledger, case)
        for name in chosen.optional:
            yield search_program(ledger, case, name)
        if chosen.tunes:
            yield TunedStatic(ledger, case, chosen.searched, chosen.started, chosen.compressed).program()
        elif chosen.compressed:
            yield compressed_program(ledger, case, chosen.compressed)
    for closed, note in chosen.open_loop:
        yield open_loop_program(ledger, prepared.cases, closed, note)


def _report(
    comparison: Comparison,
    results: dict[str, RunResult],
    prepared: PreparedComparison,
    options: CompareOptions,
    console: Console,
) -> None:
    from trainpilot.experiments.analysis.analyse import analyse
    from trainpilot.experiments.report.page import write_report

    with console.status("figures and report") as status:
        uses = _uses(comparison, results, prepared, options, status.update)
        figures = analyse(comparison, results, prepared.tables, uses)
        page = write_report(
            options.folder, comparison, results, prepared.tables, figures, tensorboard=options.tensorboard
        )
    console.print(f"report: {page}", soft_wrap=True)


def _uses(
    comparison: Comparison,
    results: dict[str, RunResult],
    prepared: PreparedComparison,
    options: CompareOptions,
    progress: Callable[[str], None],
) -> dict[str, UseCost]:
    """Return what the models of all judged runs cost in use, measured now; nothing where no method is about that."""
    if not prepared.chosen.compressed:
        return {}
    used: dict[str, list[Used]] = {case.name: [] for case in prepared.cases}
    for row in comparison.rows:
        if row.role == "method" and row.key in results and (model := used_model(results[row.key])) is not None:
            used[row.case].append(model)
    return use_costs(used, options.folder / "costs", progress, measure=not options.report_only)


def _provenance(options: CompareOptions, jobs: int, wall_time_s: float) -> dict[str, Any]:
    return {
        "command": " ".join(["trainpilot", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "jobs": jobs,
        "threads": options.threads,
        "wall_time_s": wall_time_s,
        "tuning_seeds": TUNING_SEEDS,
    }


def _warner(console: Console) -> Any:
    return lambda text: console.print(f"[yellow]{escape(text)}[/yellow]", soft_wrap=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5_400 else f"{seconds / 3_600:.1f} h"
