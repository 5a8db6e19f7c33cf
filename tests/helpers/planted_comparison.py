"""Make comparisons whose compute multipliers are known: every loss follows one power law of the tokens."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trainpilot.experiments.analysis.analyse import analyse
from trainpilot.experiments.analysis.figures import Figures
from trainpilot.experiments.costs.table import CostRow, CostTable
from trainpilot.experiments.results import (
    Case,
    Comparison,
    IntervalResult,
    MethodNote,
    Role,
    Row,
    RunResult,
    RunSpec,
    SteeringSpec,
    TunedBaseline,
    cost_key,
)
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.energy.meter import EnergySource
from trainpilot.llm_runtime.timing import Cost

TOKENS, BATCH, SEQUENCE, INTERVALS = 200_000, 10, 100, 5
STEP_TOKENS = BATCH * SEQUENCE
STEP_S, STEP_J = 0.02, 1.0
EVALUATION_SEQUENCES = 20
TUNING_SEED = 1_000
CURVE_SHARES = (0.125, 0.25, 0.5, 2.0)
UNTUNED_CURVE_SHARES = (0.25, 0.5, 2.0, 4.0)

EFFICIENCIES: Mapping[str, float] = {
    "cosine": 0.5,
    "constant": 0.3,
    "schedule-free": 0.7,
    "prodigy": 0.6,
    "tuned": 1.0,
    "tuned-linear": 1.0,
    "tuned-cosine": 0.9,
    "tuned-constant": 0.5,
    "check-self": 1.0,
    "check-budget": 1.0,
    "check-rate": 1 / 3,
    "policy:planted": 0.95,
}
"""Share of its tokens that a method needs if it were the tuned static: its compute multiplier against that."""


@dataclass(frozen=True)
class PowerLaw:
    """Loss in nats/token after so many tokens, at the efficiency of the tuned static."""

    floor: float = 2.0
    scale: float = 1.0
    exponent: float = 0.25

    def loss(self, tokens: float) -> float:
        return self.floor + self.scale * math.pow(tokens / TOKENS, -self.exponent)


@dataclass
class Planted:
    """A comparison in the making, its runs and its cost table."""

    law: PowerLaw = field(default_factory=PowerLaw)
    efficiencies: Mapping[str, float] = field(default_factory=lambda: dict(EFFICIENCIES))
    seeds: Sequence[int] = (0, 1, 2)
    cases: Sequence[str] = ("planted-a", "planted-b")
    noise: float = 0.0
    """Standard deviation of the final loss, relative; half of its variance is the seed's own, shared by all runs."""
    failing: Collection[tuple[str, str, int]] = ()
    """(case, method, seed) of runs that diverge halfway."""
    energy_source: EnergySource | None = "estimated"
    energy_shared: bool = False
    n_trials: int = 4
    """Runs of the tuned static's search on each case; each finds something a little worse."""
    rows: list[Row] = field(default_factory=list)
    results: dict[str, RunResult] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._seed_noise = {(case, seed): self._rng.normal() for case in self.cases for seed in self.seeds}
        for case in self.cases:
            for method in self.efficiencies:
                for seed in self.seeds:
                    extra = 1.25 if method == "check-budget" else 1.0
                    if method != "check-self":
                        self.add(case, method, seed, budget=extra, counted_budget=1.0)
            if "check-self" in self.efficiencies:  # the same run, counted once more
                tuned = [row for row in self.rows if (row.case, row.method) == (case, "tuned")]
                self.rows += [replace(row, method="check-self") for row in tuned]
            self._curves_and_sweep(case)

    def _curves_and_sweep(self, case: str) -> None:
        if "cosine" in self.efficiencies:
            for share in UNTUNED_CURVE_SHARES:
                self.add(case, "cosine", self.seeds[0], role="curve", budget=share)
        if "tuned" in self.efficiencies:
            for share in CURVE_SHARES:
                for seed in self.seeds:
                    self.add(case, "tuned", seed, role="curve", budget=share)
            for trial in range(self.n_trials):
                config = {"base_learning_rate": 1e-3 * 2.0**-trial}
                self.add(case, "tuned", TUNING_SEED, role="sweep", efficiency=0.95**trial, **config)

    def add(
        self,
        case: str,
        method: str,
        seed: int,
        *,
        role: Role = "method",
        budget: float = 1.0,
        counted_budget: float | None = None,
        efficiency: float | None = None,
        **config: Any,
    ) -> RunResult:
        """Run a method, in name, and note its row."""
        worth = self.efficiencies.get(method, 1.0) if efficiency is None else efficiency
        run_config = replace(self.config(case), tokens=round(budget * TOKENS), seed=seed, **config)
        key = "-".join(map(str, [case, method, role, seed, budget, *config.values()]))
        failing = role == "method" and (case, method, seed) in self.failing
        result = self._result(key, run_config, worth, self._noise(case, seed), failing=failing)
        self.results[key] = result
        counted = budget if counted_budget is None else counted_budget
        self.rows.append(
            Row(case=case, method=method, role=role, seed=seed, budget=budget, counted_budget=counted, key=key)
        )
        return result

    def config(self, case: str) -> RunConfig:
        return RunConfig(
            model=f"model-of-{case}",
            tokens=TOKENS,
            batch_size=BATCH,
            sequence_length=SEQUENCE,
            decisions=INTERVALS,
            schedule="cosine",
        )

    def _noise(self, case: str, seed: int) -> float:
        own = self._rng.normal()
        return math.exp(self.noise * math.sqrt(0.5) * (self._seed_noise.get((case, seed), 0.0) + own))

    def _result(self, key: str, config: RunConfig, worth: float, noise: float, *, failing: bool) -> RunResult:
        ends = [round(config.tokens * (i + 1) / INTERVALS / STEP_TOKENS) * STEP_TOKENS for i in range(INTERVALS)]
        losses = [self.law.loss(end * worth) * noise for end in ends]
        kept = INTERVALS // 2 if failing else INTERVALS
        intervals = tuple(
            _interval(config, end, end - before, loss, self.energy_source is not None)
            for before, end, loss in zip([0, *ends], ends, losses, strict=False)
        )[:kept]
        return RunResult(
            key=key,
            spec=RunSpec(config=config, steering=SteeringSpec(evaluate_every=1)),
            n_parameters=10_000,
            initial_validation_loss=8.0,
            final_validation_loss=None if failing else losses[-1],
            final_test_loss=None if failing else losses[-1] + 0.01,
            diverged=failing,
            stopped_early=False,
            failure=None,
            energy_source=self.energy_source,
            energy_shared=self.energy_shared,
            device="a planted machine",
            intervals=intervals,
        )

    def tables(self) -> dict[str, CostTable]:
        """Return cost tables in which a step takes STEP_S and STEP_J, and an evaluation nothing."""
        return {cost_key(self.config(case)): self._table(case) for case in self.cases}

    def _table(self, case: str) -> CostTable:
        known = self.energy_source is not None
        free = Cost(time_s=0.0, energy_j=0.0 if known else None)
        step = Cost(time_s=STEP_S, energy_j=STEP_J if known else None)
        return CostTable(
            device="a planted machine",
            model=f"model-of-{case}",
            sequence_length=SEQUENCE,
            energy_source=self.energy_source,
            rows=(
                CostRow(kind="step", precision="fp32", batch_size=BATCH, cost=step),
                CostRow(kind="forward", precision="fp32", batch_size=BATCH, cost=free),
            ),
            probe_overhead=free,
            rounds=1,
            spread=1.0,
        )

    def comparison(self) -> Comparison:
        """Return the manifest; the tuned static is the same for tokens, seconds and joules."""
        baselines = {
            case: tuple(
                TunedBaseline(
                    method="tuned", axis=axis, config=self.config(case), search="grid", n_trials=self.n_trials
                )
                for axis in ("tokens", "time_s", "energy_j")
            )
            for case in self.cases
            if "tuned" in self.efficiencies
        }
        return Comparison(
            cases=tuple(Case(name=case, config=self.config(case), architecture="llama") for case in self.cases),
            methods=tuple(note(method) for method in self.efficiencies),
            seeds=tuple(self.seeds),
            rows=tuple(self.rows),
            baselines=baselines,
            provenance={"command": "planted", "jobs": 1, "threads": 1},
        )

    def figures(self) -> Figures:
        return analyse(self.comparison(), self.results, self.tables())


KINDS = {"policy": "policy", "tuned": "tuned", "check": "check"}


def note(method: str) -> MethodNote:
    """Return a method's note; the kind follows from its name."""
    start = method.replace(":", "-").partition("-")[0]
    tuning_free = "tuning-free" if method in ("schedule-free", "prodigy") else "untuned"
    kind = KINDS.get(start, tuning_free)
    return MethodNote(
        name=method,
        title=method,
        description=f"The planted method {method}.",
        family="tuned static" if method in ("tuned", "tuned-time", "tuned-energy") else method.partition("@")[0],
        kind=kind,
        training_energy_j=1_000.0 if kind == "policy" else None,
    )


def _interval(config: RunConfig, end: int, tokens: int, loss: float, energy: bool) -> IntervalResult:
    steps = tokens // STEP_TOKENS
    return IntervalResult(
        tokens=end,
        steps=steps,
        train_loss=loss + 0.02,
        validation_loss=loss,
        learning_rate=config.base_learning_rate * (1 - end / config.tokens),
        batch_size=float(config.batch_size),
        precision="fp32",
        sparsity=0.0,
        probe_sequences=0,
        evaluation_sequences=EVALUATION_SEQUENCES,
        time_s=1.1 * STEP_S * steps,
        probe_time_s=0.0,
        switch_time_s=0.0,
        evaluation_time_s=0.01,
        energy_j=1.2 * STEP_J * steps if energy else None,
        evaluation_energy_j=0.1 if energy else None,
    )
