"""The benchmarks at scale and at larger budgets: pooling, targets, multipliers, and the tuned static's search."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trainpilot.experiments.compare.cases import StaticSetting, load_cases
from trainpilot.llm_runtime.simulator.runs import Pool, SimulatedRuns, Start
from trainpilot.llm_runtime.simulator.shipped import shipped_physics

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(scale=import_module("policy_at_scale"), live=import_module("live_budgets"))
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def runs(modules: Any) -> Any:
    """Twelve runs on four plants with an edge at twice the best rate, as advised."""
    pool = Pool.draw(4, 0, shipped_physics(), modules.scale.at_scale("step-law-429M", (2.0, 2.0)))
    start = Start(advised=1.0, advice_error=1.0)
    return modules.scale.Runs(edge=2.0, start="advised", fresh=lambda: SimulatedRuns(12, 0, pool, start))


def test_the_plants_have_the_size_the_budgets_and_the_edge_asked_for(runs: Any) -> None:
    plants = runs.fresh()
    instances, references = plants.instances, plants.references
    tokens = instances.sequences * instances.sequence_length

    np.testing.assert_allclose(instances.n_parameters, 429_260_800)
    assert (tokens >= 3.99e9).all()
    assert (tokens <= 1.01e11).all()
    assert (references.losses > 1.5).all()
    assert (instances.physics.values["edge_rate"] < 1e6).all()


def test_the_best_of_several_schedules_is_no_worse_than_the_tuned_static(modules: Any, runs: Any) -> None:
    best = runs.best_static(modules.scale.OTHER_BASES)
    assert (best.multiplier >= 1 - 1e-9).all()
    assert not best.lost.any()


def test_the_law_s_static_and_an_unsteered_run_are_judged_alike(runs: Any) -> None:
    law, untuned = runs.as_advised(), runs.judged(None)
    assert (law.multiplier <= 1.1).all()
    assert law.multiplier.shape == untuned.multiplier.shape == (12,)
    np.testing.assert_array_equal(law.index, untuned.index)


def test_pooled_runs_keep_their_instances_apart(modules: Any, runs: Any) -> None:
    one = runs.as_advised()
    pooled = modules.scale.Judged.pooled([one, one])
    assert len(np.unique(pooled["index"])) == 2 * len(np.unique(one.index))


def test_a_target_is_reached_on_its_own_side(modules: Any) -> None:
    found = {
        "all": {"median": {"value": 0.96}, "p10": {"value": 0.7}, "diverged": 0.01},
        "against_law": {"off": {"ratio": {"value": 1.5}}, "right": {"ratio": {"value": 0.97}}},
    }
    assert [each["reached"] for each in modules.scale.targets(found)] == [True, False, False, True, False]


def made(modules: Any, losses: dict[float, list[float]]) -> Any:
    case = load_cases("test")[0]
    first = StaticSetting(learning_rate=3e-3, batch_size=4, schedule="wsd", warmup_share=0.1, precision="fp32")
    return modules.live.CaseAtBudget(case=case, budget=8.0, seeds=[0], first=first, policies={}, static=losses)


def test_a_loss_is_worth_the_budget_that_the_tuned_static_needs_for_it(modules: Any) -> None:
    found = made(modules, {0.5: [2.0], 1.0: [1.0]})  # the loss falls as 1 over the budget

    def worth(loss: float | None, share: float = 1.0) -> float:
        tokens = share * found.case.config.tokens
        return float(found.multiplier(SimpleNamespace(final_validation_loss=loss, tokens=tokens)))

    assert worth(1.0) == pytest.approx(1.0)
    assert worth(0.5) == pytest.approx(2.0)  # extrapolated
    assert worth(1.0, share=0.5) == pytest.approx(2.0)  # with half of the tokens
    assert worth(None) == 0.0


def test_the_search_at_a_larger_budget_moves_until_nothing_is_better(modules: Any) -> None:
    found = made(modules, {})
    search = found._tune()
    wave = next(search)
    while True:
        losses = [abs(np.log(spec.config.base_learning_rate / 2e-3)) + spec.config.batch_size / 100 for spec in wave]
        try:
            wave = search.send([SimpleNamespace(final_validation_loss=loss, usable=True) for loss in losses])
        except StopIteration as end:
            tuned = end.value
            break

    assert tuned.batch_size == 4
    assert tuned.learning_rate == pytest.approx(2e-3, rel=0.2)
    assert len(found.tried) >= 11
