"""What models cost in use, and the modelled cost of runs in which another model goes on; by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
from comparison_runs import CASE, CONFIG, made_interval, made_result

from trainpilot.experiments.analysis.analyse import analyse
from trainpilot.experiments.analysis.modelled_cost import cumulative, modelled_cost
from trainpilot.experiments.costs.table import CostRow, CostTable
from trainpilot.experiments.costs.use import UseCost, use_key
from trainpilot.experiments.results import Comparison, Compression, MethodNote, Row, RunResult, RunSpec, cost_key
from trainpilot.llm_runtime.timing import Cost

SMALL = replace(CONFIG, model="small.json")


def table(model: str, step_s: float, forward_s: float) -> CostTable:
    """Return a table in which passes take the same at any batch, and two watts are drawn."""
    kinds: tuple[tuple[Literal["step", "forward"], float], ...] = (("step", step_s), ("forward", forward_s))
    rows = [
        CostRow(kind=kind, precision="fp32", batch_size=batch, cost=Cost(time_s=time_s, energy_j=2 * time_s))
        for kind, time_s in kinds
        for batch in (1, 64)
    ]
    nothing = Cost(time_s=0.0, energy_j=0.0)
    return CostTable(
        device="a test", model=model, sequence_length=16, energy_source="estimated", rows=tuple(rows),
        probe_overhead=nothing, rounds=4, spread=1.0,
    )  # fmt: skip


TABLES = {cost_key(CONFIG): table(CONFIG.model, 3.0, 1.0), cost_key(SMALL): table(SMALL.model, 1.0, 0.25)}


def compressed(**changes: Any) -> RunResult:
    """Return a run of ten intervals of ten steps of eight sequences, the model cut after six of them."""
    usual: dict[str, Any] = {"sizes": {"ffn": 96, "depth": 2}, "small": SMALL.model, "whole": 0.6, "rest": 0.4}
    intervals = tuple(made_interval(CONFIG, tokens=1_280 * (i + 1), steps=10) for i in range(10))
    spec = RunSpec(config=CONFIG, compression=Compression(**usual | changes))
    return made_result(spec, key=f"{changes}", intervals=intervals, n_parameters=500)


def test_a_cut_run_pays_each_model_and_the_ranking() -> None:
    found = modelled_cost(compressed(), TABLES[cost_key(CONFIG)], TABLES)

    assert found.time_parts_s["training"] == pytest.approx(6 * 10 * 3.0 + 4 * 10 * 1.0)
    # two parts x 512 sequences of 16 tokens, in batches of 8 through the whole model
    assert found.time_parts_s["switching"] == pytest.approx(2 * 512 / 8 * 1.0)
    assert found.energy_j == pytest.approx(2 * found.time_s)


def test_a_taught_run_pays_its_teacher_too() -> None:
    run = compressed(taught=True)
    found = modelled_cost(run, TABLES[cost_key(CONFIG)], TABLES)

    assert found.time_parts_s["training"] == pytest.approx(180 + 4 * 10 * (1.0 + 1.0))
    assert cumulative(run, TABLES[cost_key(CONFIG)], TABLES)[-1].time_s == pytest.approx(found.time_s)
    student = modelled_cost(compressed(taught=True, new=True), TABLES[cost_key(CONFIG)], TABLES)
    assert student.time_parts_s == {**found.time_parts_s, "switching": 0.0}


def test_without_the_small_models_table_the_cost_is_unknown() -> None:
    with pytest.raises(ValueError, match=r"no cost table for small\.json"):
        modelled_cost(compressed(), TABLES[cost_key(CONFIG)])


def use(n_bytes: int, latency_s: float | None) -> UseCost:
    return UseCost(
        n_parameters=n_bytes // 4, weight_bytes=n_bytes, bits_per_weight=32.0, latency_s=latency_s,
        energy_j=latency_s, energy_source=None if latency_s is None else "estimated", device="a test",
    )  # fmt: skip


def test_methods_are_weighed_against_what_their_models_cost() -> None:
    runs = {
        "tuned": replace(made_result(RunSpec(config=CONFIG), 2.0), key="a"),
        "prune-ffn": replace(compressed(), key="b", final_validation_loss=2.2),
        "distil": replace(compressed(taught=True, new=True), key="c", final_validation_loss=2.3),
        "shift-add": replace(compressed(format="bcq"), key="d", final_validation_loss=2.4),
        "linear": replace(made_result(RunSpec(config=CONFIG), None), key="e"),
    }
    notes = tuple(MethodNote(name=n, title=n, description="", family=n, kind="compressed") for n in runs)
    rows = tuple(Row(case=CASE.name, method=name, role="method", seed=0, key=run.key) for name, run in runs.items())
    comparison = Comparison(cases=(CASE,), methods=notes, seeds=(0,), rows=rows, baselines={})
    uses = {use_key(CONFIG, None): use(800, 0.002), use_key(SMALL, None): use(400, 0.001)}
    uses[use_key(SMALL, "bcq")] = use(50, None)
    results = {run.key: run for run in runs.values()}
    points = {point.method: point for point in analyse(comparison, results, TABLES, uses).uses}

    assert set(points) == {"tuned", "prune-ffn", "distil", "shift-add"}  # no point for a run without a loss
    assert points["tuned"].on_front == ("training_j", "use_j", "weight_bytes", "latency_s")
    assert points["prune-ffn"].on_front == ("use_j", "weight_bytes", "latency_s")  # 696 J of training, tuned 600
    assert points["distil"].on_front == ("training_j",)  # 520 J
    assert points["shift-add"].on_front == ("weight_bytes",)
    assert (points["shift-add"].latency_s, points["shift-add"].use_j) == (None, None)
    assert points["tuned"].training_j == pytest.approx(2 * 3.0 * 100)
    assert "uses" not in analyse(comparison, results, TABLES).to_json()
