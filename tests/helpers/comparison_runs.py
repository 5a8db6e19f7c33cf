"""Made-up runs on a loss surface that is known, and what drives a comparison's programs without training anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from trainpilot.experiments.compare.cases import WARMUP_SHARES
from trainpilot.experiments.compare.programs import ComparisonLedger
from trainpilot.experiments.costs.table import CostRow, CostTable
from trainpilot.experiments.results import Case, IntervalResult, RunResult, RunSpec, cost_key
from trainpilot.experiments.run_store import run_key
from trainpilot.llm_runtime.config import Precision, RunConfig
from trainpilot.llm_runtime.timing import Cost

T = TypeVar("T")

CONFIG = RunConfig(
    model="llama-nano",
    text=("stdlib:this",),
    tokens=12_800,
    batch_size=8,
    sequence_length=16,
    decisions=10,
    base_learning_rate=1e-3,
    schedule="cosine",
    device="cpu",
)
"""A hundred steps; a search may take batches from 1 to 32."""
CASE = Case(name="made", config=CONFIG, architecture="llama")
TUNING_SEEDS = (1_000, 1_001, 1_002)

Run = Callable[[RunSpec], RunResult]


def made_interval(config: RunConfig, **changes: Any) -> IntervalResult:
    """Return the whole run as one interval."""
    steps = math.ceil(config.n_sequences() / config.batch_size)
    usual: dict[str, Any] = {
        "tokens": config.tokens,
        "steps": steps,
        "train_loss": 2.5,
        "validation_loss": 2.25,
        "learning_rate": config.base_learning_rate,
        "learning_rate_scale": 1.0,
        "finishing": False,
        "batch_size": float(config.batch_size),
        "precision": config.precision,
        "sparsity": 0.0,
        "probe_sequences": 0,
        "evaluation_sequences": 0,
        "time_s": 2.0,
        "probe_time_s": 0.0,
        "switch_time_s": 0.0,
        "evaluation_time_s": 0.25,
        "energy_j": 100.0,
        "evaluation_energy_j": 5.0,
    }
    return IntervalResult(**usual | changes)


def made_result(spec: RunSpec, loss: float | None = 2.0, *, key: str | None = None, **changes: Any) -> RunResult:
    """Return the result of a run that ended with `loss`, or diverged where it is `None`."""
    usual: dict[str, Any] = {
        "key": run_key(spec) if key is None else key,
        "spec": spec,
        "n_parameters": 1_000,
        "initial_validation_loss": 5.5,
        "final_validation_loss": loss,
        "final_test_loss": None if loss is None else loss + 0.125,
        "diverged": loss is None,
        "stopped_early": False,
        "failure": None,
        "energy_source": "estimated",
        "energy_shared": False,
        "device": "a test",
        "intervals": (made_interval(spec.config, validation_loss=loss),),
    }
    return RunResult(**usual | changes)


@dataclass(frozen=True, kw_only=True)
class Bowl:
    """Losses with one best setting: quadratic in the logarithms of rate, batch and warm-up, falling in the budget."""

    learning_rate: float = 1e-2
    batch_size: float = 8
    batch_weight: float = 0.1
    warmup_share: float = 0.1
    schedule: str = "linear"
    precision: str = "fp32"
    diverges_from: float = math.inf
    """Learning rate from which on runs diverge."""

    def __call__(self, spec: RunSpec) -> RunResult:
        return made_result(spec, self.loss(spec.config))

    def loss(self, config: RunConfig) -> float | None:
        """Return the final loss in nats/token, `None` where the run diverges."""
        if config.base_learning_rate >= self.diverges_from:
            return None
        share = config.warmup() / config.tokens
        warmup = min(WARMUP_SHARES, key=lambda known: abs(known - share))
        return (
            1
            + math.pow(config.tokens / CONFIG.tokens, -0.25)
            + math.log10(config.base_learning_rate / self.learning_rate) ** 2
            + self.batch_weight * math.log2(config.batch_size / self.batch_size) ** 2
            + 0.05 * math.log2(warmup / self.warmup_share) ** 2
            + 0.02 * (config.schedule != self.schedule)
            + 0.01 * (config.precision != self.precision)
            + 0.003 * (config.seed % 1_000)
        )


def drive(program: Generator[list[RunSpec], list[RunResult], T], run: Run) -> tuple[T, list[list[RunSpec]]]:
    """Carry a program out by hand; return what it returns, and its waves."""
    waves: list[list[RunSpec]] = []
    results: list[RunResult] | None = None
    while True:
        try:
            wave = next(program) if results is None else program.send(results)
        except StopIteration as stop:
            return stop.value, waves
        waves.append(wave)
        results = [run(spec) for spec in wave]


def made_table(
    *,
    config: RunConfig = CONFIG,
    joules: bool = True,
    per_step: float = 1.0,
    per_row: float = 0.0,
    precisions: Iterable[str] = ("fp32", "bf16"),
    extras: Iterable[str] = ("schedule-free", "prodigy", "magnitude"),
) -> CostTable:
    """Return a table where a step takes `per_step` + `per_row` x batch seconds and joules, and all else is free."""

    def cost(time_s: float) -> Cost:
        return Cost(time_s=time_s, energy_j=time_s if joules else None)

    steps = [(precision, batch) for precision in precisions for batch in (1, 64)]
    rows = [
        CostRow(kind="step", precision=precision, batch_size=batch, cost=cost(per_step + per_row * batch))
        for precision, batch in steps
    ]
    rows += [CostRow(kind="forward", precision="fp32", batch_size=batch, cost=cost(0.0)) for batch in (1, 64)]
    return CostTable(
        device="a test",
        model=config.model,
        sequence_length=config.sequence_length,
        energy_source="estimated" if joules else None,
        rows=tuple(rows),
        probe_overhead=cost(0.0),
        extras={name: cost(0.0) for name in extras},
        rounds=4,
        spread=1.0,
    )


def made_ledger(
    table: CostTable | None = None,
    *,
    case: Case = CASE,
    seeds: Sequence[int] = (0, 1),
    precisions: Iterable[Precision] = ("fp32",),
    warnings: list[str] | None = None,
) -> ComparisonLedger:
    """Return a ledger of one case; what it warns of goes to `warnings`."""
    tables = {} if table is None else {cost_key(case.config): table}
    said = [] if warnings is None else warnings
    return ComparisonLedger(seeds, TUNING_SEEDS, tables, {case.name: tuple(precisions)}, said.append)


def with_config(case: Case = CASE, **changes: Any) -> Case:
    """Return a case with some of its run's fields changed."""
    return replace(case, config=replace(case.config, **changes))
