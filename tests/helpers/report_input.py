"""A made-up comparison with its runs and figures, for the tests of the report: plausible, and of any size."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainpilot.experiments.analysis.figures import (
    AXES,
    BASELINES,
    BaselineCurve,
    CaseFigures,
    Estimate,
    FamilyFront,
    Figures,
    FrontPoint,
    MethodFigures,
    SanityCheck,
    SignTest,
    TargetFigures,
)
from trainpilot.experiments.costs.table import CostRow, CostTable
from trainpilot.experiments.results import (
    Case,
    Comparison,
    IntervalResult,
    MethodNote,
    Row,
    RunResult,
    RunSpec,
    SteeringSpec,
    TunedBaseline,
    cost_key,
)
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.timing import Cost

NOTES = (
    ("policy:agent", "agent", "policy", 1.04),
    ("policy:agent@0,1,1", "agent, saving first", "policy", 0.97),
    ("tuned", "tuned static", "tuned", 1.0),
    ("tuned-time", "tuned for time", "tuned", 0.95),
    ("tuned-wsd", "tuned WSD", "tuned", 0.98),
    ("constant", "constant", "untuned", 0.38),
    ("cosine", "cosine to 10 %", "untuned", 0.52),
    ("linear", "linear to zero", "untuned", 0.55),
    ("wsd", "WSD", "untuned", 0.53),
    ("plateau", "reduce on plateau", "heuristic", 0.41),
    ("noise-batch", "noise-scale batch", "heuristic", 0.58),
    ("seesaw", "Seesaw", "heuristic", 0.5),
    ("gradual-pruning", "gradual pruning", "heuristic", 0.45),
    ("random", "random policy", "heuristic", 0.2),
    ("schedule-free", "schedule-free AdamW", "tuning-free", 0.8),
    ("prodigy", "Prodigy", "tuning-free", 0.88),
    ("check-self", "check: itself", "check", 1.0),
    ("check-budget", "check: 1.25 x budget", "check", 1.25),
    ("check-rate", "check: rate / 4", "check", 0.6),
    ("tuned-tpe", "tuned by TPE", "tuned", 1.01),
)
"""Name, title, kind and true compute multiplier against the tuned static."""
WORTH = {name: worth for name, _, _, worth in NOTES}


@dataclass(frozen=True)
class ReportInput:
    """What `write_report` takes."""

    comparison: Comparison
    results: dict[str, RunResult]
    tables: dict[str, CostTable]
    figures: Figures

    def all(self) -> tuple[Comparison, dict[str, RunResult], dict[str, CostTable], Figures]:
        return self.comparison, self.results, self.tables, self.figures


def report_input(
    n_cases: int = 3, methods: Sequence[str] = tuple(WORTH), seeds: Sequence[int] = (1, 2, 3)
) -> ReportInput:
    """Return a comparison of `methods` on `n_cases` cases."""
    cases = tuple(_case(index) for index in range(n_cases))
    results: dict[str, RunResult] = {}
    rows = []
    for case in cases:
        for method in methods:
            for seed in seeds:
                rows.append(
                    Row(case=case.name, method=method, role="method", seed=seed, key=f"{case.name}-{method}-{seed}")
                )
                results[rows[-1].key] = _run(case, method, seed, rows[-1].key)
        if "tuned" in methods:
            key = f"{case.name}-sweep"
            rows.append(Row(case=case.name, method="tuned", role="sweep", seed=99, key=key))
            results[key] = _run(case, "tuned", 99, key, diverged=True)
    notes = tuple(
        MethodNote(name=n, title=title, description=f"About {title}.", family=_family(n), kind=kind)
        for n, title, kind, _ in NOTES
        if n in methods
    )
    comparison = Comparison(
        cases=cases,
        methods=notes,
        seeds=tuple(seeds),
        rows=tuple(rows),
        baselines={case.name: _baselines(case) for case in cases} if "tuned" in methods else {},
        provenance={"command": "trainpilot compare --cases test --seeds 3", "versions": {"torch": "2.13"}, "jobs": 2},
    )
    tables = {cost_key(case.config): cost_table(case.config) for case in cases}
    return ReportInput(comparison, results, tables, _figures(comparison, results))


def estimate(value: float | None, spread: float = 0.05, n: int = 3, **more: Any) -> Estimate:
    if value is None:
        return Estimate(value=None)
    return Estimate(value=value, low=value * (1 - spread), high=value * (1 + spread), n=n, **more)


def cost_table(config: RunConfig) -> CostTable:
    """Return a table in which a sequence takes a millisecond and 20 mJ, and half of it in bf16."""
    rows = []
    for precision, share in (("fp32", 1.0), ("bf16", 0.5)):
        for batch in (1, 64):
            for kind, passes in (("step", 3), ("forward", 1)):
                cost = Cost(time_s=1e-3 * batch * share * passes / 3, energy_j=0.02 * batch * share * passes / 3)
                rows.append(CostRow(kind=kind, precision=precision, batch_size=batch, cost=cost))  # type: ignore[arg-type]
    return CostTable(
        device="a machine",
        model=config.model,
        sequence_length=config.sequence_length,
        energy_source="estimated",
        rows=tuple(rows),
        probe_overhead=Cost(time_s=1e-3, energy_j=0.02),
        extras={name: Cost(time_s=1e-4, energy_j=2e-3) for name in ("schedule-free", "prodigy", "magnitude")},
        switches={"batch": Cost(time_s=1e-3, energy_j=0.02), "precision": Cost(time_s=0.01, energy_j=0.2)},
        rounds=3,
        spread=1.1,
    )


def loss_at(case: int, budget: float) -> float:
    """Return the tuned static's loss after `budget` times the case's tokens."""
    return 1.7 + 0.12 * case + 0.55 * math.pow(budget, -0.32)


def _case(index: int) -> Case:
    architecture = ("llama", "gpt2", "gpt_neox", "qwen2", "opt")[index % 5]
    config = RunConfig(
        model=f"models/{architecture}-{index}",
        text=("stdlib:asyncio",),
        tokens=163840,
        batch_size=8,
        sequence_length=64,
        base_learning_rate=3e-4,
        schedule="cosine",
        decisions=50,
    )
    return Case(name=f"{architecture}-{index}", config=config, architecture=architecture)


def _family(name: str) -> str:
    return name.partition("@")[0]


def _baselines(case: Case) -> tuple[TunedBaseline, ...]:
    config = replace(case.config, base_learning_rate=1.5e-3, schedule="linear", precision="bf16")
    edge = ("batch_size",) if case.name.endswith("1") else ()
    return tuple(
        TunedBaseline(
            method="tuned",
            axis=axis,
            config=config,
            search="grid",
            n_trials=57,
            on_edge=edge if axis == "tokens" else (),
        )
        for axis in AXES
    )


def _run(case: Case, method: str, seed: int, key: str, *, diverged: bool = False) -> RunResult:
    noise = random.Random(key)
    index = int(case.name.rpartition("-")[2])
    diverged = diverged or (method == "random" and seed == 2 and index == 0)
    final = loss_at(index, WORTH[method] * math.exp(noise.gauss(0, 0.05)))
    kind = "policy" if method.startswith("policy") else method if method in ("seesaw", "plateau") else "keep"
    if kind == "plateau" and seed == 1:
        intervals = _intervals(case, kind, final, noise)[:40]
    else:
        intervals = _intervals(case, kind, final, noise)
    return RunResult(
        key=key,
        spec=RunSpec(config=replace(case.config, seed=seed), steering=SteeringSpec(kind=kind, probe=kind == "policy")),
        n_parameters=412_000 + 50_000 * index,
        initial_validation_loss=5.55,
        final_validation_loss=None if diverged else final,
        final_test_loss=None if diverged else final + 0.02,
        diverged=diverged,
        stopped_early=len(intervals) < 50,
        failure="killed by signal 9" if method == "prodigy" and index == 1 and seed == 3 else None,
        energy_source="measured_counter",
        energy_shared=True,
        device="a machine, 2 threads",
        intervals=tuple(intervals[:20] if diverged else intervals),
    )


def _intervals(case: Case, kind: str, final: float, noise: random.Random) -> list[IntervalResult]:
    found, scale, batch, decisions = [], 1.0, 8.0, case.config.decisions
    schedule = case.config.base_schedule()
    for index in range(decisions):
        share = (index + 1) / decisions
        if kind == "policy" and index in (3, 5, 9):
            scale *= 1.41 if noise.random() < 0.8 else 2
        if (kind == "policy" and index == 25) or (kind == "seesaw" and index in (20, 35)):
            batch *= 2
        loss = final + 0.9 * (share**-0.35 - 1) + noise.gauss(0, 0.004)
        looks = index % 10 == 9 or (kind == "plateau" and index % 2)
        tokens = round(case.config.tokens * share)
        found.append(
            IntervalResult(
                tokens=tokens,
                steps=round(case.config.tokens / decisions / 64 / batch),
                train_loss=loss - 0.03 + noise.gauss(0, 0.02),
                validation_loss=(final if index == decisions - 1 else loss) if looks else None,
                learning_rate=case.config.base_learning_rate * scale * schedule.factor(tokens - 1, 1),
                learning_rate_scale=scale,
                batch_size=batch,
                precision="bf16" if kind == "policy" and index > 10 else "fp32",
                sparsity=0.0,
                probe_sequences=4 if kind == "policy" else 0,
                evaluation_sequences=32 if looks else 0,
                time_s=0.4,
                probe_time_s=0.02 if kind == "policy" else 0.0,
                switch_time_s=0.0,
                evaluation_time_s=0.1 if looks else 0.0,
                energy_j=8.0,
                evaluation_energy_j=2.0 if looks else None,
            )
        )
    return found


def _figures(comparison: Comparison, results: dict[str, RunResult]) -> Figures:
    names = [note.name for note in comparison.methods]
    cases = [
        _case_figures(case, index, name, results, comparison)
        for index, case in enumerate(comparison.cases)
        for name in names
    ]
    return Figures(
        cases=tuple(cases),
        methods=tuple(_method_figures(name, comparison) for name in names),
        points=tuple(_points(comparison, cases)),
        fronts=tuple(
            FamilyFront(
                family=family,
                hypervolume=estimate(0.61),
                igd_plus=estimate(0.03),
                expected_utility=estimate(0.92),
                n_points=1,
            )
            for family in dict.fromkeys(note.family for note in comparison.methods)
        ),
        curves=tuple(curve for index, case in enumerate(comparison.cases) for curve in _curves(case, index, names)),
        checks=(
            SanityCheck(name="cosine over constant", expected="cosine ends lower", found="0.08 lower", passed=True),
            SanityCheck(name="planted budget", expected="1.25", found="1.31 [1.27, 1.35]", passed=False),
            SanityCheck(name="bf16 pays", expected="fewer joules", found="", passed=None),
        ),
        targets={case.name: loss_at(i, 0.5) for i, case in enumerate(comparison.cases)},
        sweep_costs={
            case.name: {"tokens": 57 * 163840.0, "time_s": 380.0, "energy_j": None} for case in comparison.cases
        },
        rests_on="Conclusions rest on modelled seconds and joules: runs shared the machine.",
        notes=("On opt-4 the tuned curve is extrapolated above its largest budget.",),
    )


def _case_figures(
    case: Case, index: int, name: str, results: dict[str, RunResult], comparison: Comparison
) -> CaseFigures:
    worth = WORTH[name] * (1 + 0.04 * math.sin(3 * index + len(name)))
    runs = [
        results[row.key] for row in comparison.rows if (row.case, row.method, row.role) == (case.name, name, "method")
    ]
    cost = 0.6 if name.startswith(("policy", "tuned")) else 1.0
    joules = {
        "training": 400 * cost,
        "probe": 22.0 if name.startswith("policy") else 0.0,
        "evaluation": 12.0,
        "switching": 2.0,
    }
    unknown = name == "prodigy"
    loss = loss_at(index, worth)
    spread = {"n": len(runs)}
    return CaseFigures(
        case=case.name,
        method=name,
        n_runs=len(runs),
        n_diverged=sum(run.diverged for run in runs),
        n_failed=sum(run.failure is not None for run in runs),
        n_stopped_early=sum(run.stopped_early for run in runs),
        validation_loss=estimate(loss, 0.004, **spread),
        test_loss=estimate(loss + 0.02, 0.004, **spread),
        tokens=estimate(float(case.config.tokens), 0.0, **spread),
        measured_time_s=estimate(22.0, **spread),
        measured_energy_j=estimate(430.0, **spread),
        energy_source="measured_counter",
        energy_shared=True,
        time_s=estimate(8.0 * cost, 0.01, **spread),
        energy_j=estimate(None if unknown else sum(joules.values()), 0.01, **spread),
        time_parts_s={part: value / 50 for part, value in joules.items()},
        energy_parts_j=None if unknown else joules,
        to_target=TargetFigures(
            n_reached=len(runs) if worth > 0.5 else 0,
            n_runs=len(runs),
            tokens=estimate(min(0.5 / worth, 1.0) * case.config.tokens, censored="" if worth > 0.5 else ">"),
            time_s=estimate(4.0),
            energy_j=estimate(None if unknown else 200.0),
        ),
        multipliers=_multipliers(worth, len(runs), 0.06, unknown, "tuned" in WORTH and bool(comparison.baselines)),
        product_score=estimate(None if unknown else 1.1 / (0.6 + worth)),
    )


def _multipliers(worth: float, n: int, spread: float, unknown: bool, tuned: bool) -> dict[str, dict[str, Estimate]]:
    found = {}
    for baseline, factor in zip(BASELINES, (1 / 0.52, 1.0, 58.0), strict=True):
        found[baseline] = {
            axis: estimate(worth * factor * (1.0, 1.05, 1.1)[i], spread, n) for i, axis in enumerate(AXES)
        }
        if unknown:
            found[baseline]["energy_j"] = Estimate(value=None)
        if not tuned and baseline != "untuned":
            found[baseline] = {axis: Estimate(value=None) for axis in AXES}
    if worth < 0.3:
        low = found["tuned"]["tokens"]
        if low.value is not None:
            found["tuned"]["tokens"] = Estimate(value=0.25, low=0.25, high=0.3, n=n, censored="<")
    return found


def _method_figures(name: str, comparison: Comparison) -> MethodFigures:
    worth, tuned = WORTH[name], bool(comparison.baselines)
    n_cases, n_seeds = len(comparison.cases), len(comparison.seeds)
    wins = n_cases if worth > 1.1 else n_cases // 2 if abs(worth - 1) < 0.05 else 0
    test = SignTest(wins=wins, losses=n_cases - wins, ties=0, p_value=1.0 if 0 < wins < n_cases else 2 * 0.5**n_cases)
    return MethodFigures(
        method=name,
        n_runs=n_cases * n_seeds,
        n_diverged=1 if name == "random" and n_seeds > 1 else 0,
        n_failed=1 if name == "prodigy" and n_cases > 1 and n_seeds > 2 else 0,
        multipliers=_multipliers(worth, n_cases, 0.04, name == "prodigy", tuned),
        sign_tests={baseline: {axis: test for axis in AXES} for baseline in BASELINES} if tuned else {},
        product_score=estimate(None if name == "prodigy" else 1.1 / (0.6 + worth), 0.03),
        break_even_runs=estimate(140.0, 0.2) if name == "policy:agent" else None,
    )


def _points(comparison: Comparison, cases: list[CaseFigures]) -> list[FrontPoint]:
    points = [
        FrontPoint(
            case=found.case,
            method=found.method,
            family=_family(found.method),
            role="method",
            validation_loss=found.validation_loss.value,
            time_s=found.time_s.value * (1 + 0.03 * len(found.method) % 0.2),
            energy_j=found.energy_j.value or 440.0,
            on_front=found.method == "tuned",
        )
        for found in cases
        if found.validation_loss.value is not None and found.time_s.value is not None
    ]
    noise = random.Random(1)
    for index, case in enumerate(comparison.cases):
        for _ in range(40 if comparison.baselines else 0):
            share = noise.uniform(0.5, 1.3)
            points.append(
                FrontPoint(
                    case=case.name,
                    method="tuned",
                    family="tuned",
                    role="sweep",
                    validation_loss=loss_at(index, share * noise.uniform(0.3, 0.95)),
                    time_s=8 * share,
                    energy_j=400 * share,
                    on_front=False,
                )
            )
    return points


def _curves(case: Case, index: int, names: Sequence[str]) -> list[BaselineCurve]:
    curves = []
    for baseline, method, shares in (
        ("untuned", "cosine", (0.25, 0.5, 1.0, 2.0, 4.0)),
        ("tuned", "tuned", (0.125, 0.25, 0.5, 1.0, 2.0)),
    ):
        if method in names:
            for axis, unit in zip(AXES, (case.config.tokens, 8.0, 430.0), strict=True):
                losses = tuple(loss_at(index, WORTH[method] * share) for share in shares)
                budgets = tuple(share * unit for share in shares)
                curves.append(
                    BaselineCurve(case=case.name, baseline=baseline, axis=axis, budgets=budgets, losses=losses)
                )
    return curves
