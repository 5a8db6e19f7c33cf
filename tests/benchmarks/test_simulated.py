"""The simulator's benchmarks: what a loss is worth, steering side by side, and static settings that are known."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from planted_comparison import Planted
from second_physics.runs import MultiPowerRuns

from trainpilot.agents.heuristics import SchedulePoint
from trainpilot.agents.simulator_training import SimulatorStage
from trainpilot.envs.decision import Preference
from trainpilot.experiments.analysis.modelled_cost import Runs
from trainpilot.llm_runtime.simulator.references import ScheduleTable, static_losses
from trainpilot.llm_runtime.simulator.runs import Pool, SimulatedRuns
from trainpilot.llm_runtime.simulator.shipped import shipped_physics

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = {
            "simulated": "_simulated", "bed": "policy_in_simulator", "preferences": "preferences",
            "ablations": "ablations",
        }  # fmt: skip
        yield SimpleNamespace(**{short: import_module(name) for short, name in names.items()})
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool.draw(6, 3, shipped_physics())


# What a loss is worth -------------------------------------------------------------------------------------------


def test_the_budget_for_a_loss_lies_on_a_line_in_log_log(modules: Any) -> None:
    shares, curve = (0.25, 1.0, 2.0), np.array([[4.0, 1.0, 1.0]])  # the loss falls as 1 over the budget, then no more
    losses = np.array([[4.0], [2.0], [1.0]])

    found = modules.simulated.needed(losses, shares, curve)

    assert found[:, 0] == pytest.approx([0.25, 0.5, 1.0])


def test_beyond_the_budgets_the_curve_goes_on_for_a_factor_of_two(modules: Any) -> None:
    shares, curve = (0.5, 1.0), np.array([[2.0, 1.0]])
    losses = np.array([[2.5], [400.0], [1 / 1.6], [1e-3], [np.inf], [np.nan]])

    found = modules.simulated.needed(losses, shares, curve)

    assert found[:, 0] == pytest.approx([0.4, 0.25, 1.6, 2.0, 0.0, 0.0])


def test_a_curve_that_never_falls_tells_better_from_worse(modules: Any) -> None:
    found = modules.simulated.needed(np.array([[0.9], [1.1]]), (0.5, 1.0), np.array([[1.0, 1.0]]))

    assert found[:, 0] == pytest.approx([0.5, 0.25])


def test_an_interval_draws_groups_and_not_rows(modules: Any) -> None:
    one_group = modules.simulated.estimate(np.array([1.0, 2.0, 9.0]), np.zeros(3, dtype=np.int64))
    three = modules.simulated.estimate(np.array([1.0, 2.0, 9.0]), np.arange(3))

    assert one_group == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert (three["low"], three["high"]) == (1.0, 9.0)


def test_every_start_belongs_to_one_group(modules: Any) -> None:
    groups = modules.simulated.start_groups(np.array([1 / 30, 0.18, 1.0, 9.9, 10.0]))

    assert [rows.tolist() for rows in groups.values()] == [[0], [1], [2], [3, 4]]


# Steering -------------------------------------------------------------------------------------------------------


def test_a_held_rate_ends_where_the_static_schedule_does(modules: Any, pool: Pool) -> None:
    runs = SimulatedRuns(16, 5, pool)
    scale = runs.best_learning_rate / runs.start_rate
    rate, batch = runs.best_learning_rate.copy(), runs.instances.start_batch.astype(np.float64)

    outcome = modules.simulated.steer(runs, modules.simulated.held(scale))

    static = static_losses(runs.instances, rate, batch, ScheduleTable.of("wsd", 0.1, 50))
    assert outcome.loss == pytest.approx(static, rel=1e-12)
    assert (outcome.used == 1).all()
    assert (outcome.intervals == 50).all()


def test_the_tuned_rate_of_the_multi_power_law_is_worth_the_budget(modules: Any) -> None:
    bed = modules.bed.multi_power_run_set(32)

    outcome = modules.simulated.steer(bed.fresh(), modules.simulated.held(1 / bed.start))

    assert bed.multiplier(outcome.loss) == pytest.approx(1.0, abs=0.02)


def test_a_blind_cooldown_ends_a_run_early_and_counts_no_joule_after_it(modules: Any, pool: Pool) -> None:
    points = [SchedulePoint(share=i / 50, batch_factor=1.0, finish=i >= 25) for i in range(50)]

    outcome = modules.simulated.steer(SimulatedRuns(8, 5, pool), modules.simulated.blindly(points))

    assert outcome.used == pytest.approx(0.6)  # a cool-down lasts a fifth of what was before it
    assert (outcome.intervals == 30).all()
    assert (outcome.energy < 0.8).all()


def test_blind_replays_take_the_nearest_batch_and_of_two_the_smaller(modules: Any) -> None:
    runs = MultiPowerRuns(8, 1)
    limits = runs.limits()

    for factor, powers in ((2.0, 1), (2.0**0.5, 0), (2.0**0.51, 1), (0.25, -2)):
        wanted = limits.start.batch_size * 2.0**powers
        found = modules.simulated._nearest_batch(limits, factor)
        inside = (wanted >= limits.min_batch_size) & (wanted <= limits.max_batch_size)
        assert (found[inside] == wanted[inside]).all()


def test_steered_runs_average_to_the_schedule_that_steered_them(modules: Any, pool: Pool) -> None:
    runs = SimulatedRuns(4, 5, pool)
    limits = runs.limits()
    points = tuple(SchedulePoint(share=i / 50, learning_rate_scale=1 + i / 50, precision="fp32") for i in range(50))

    average = modules.simulated.steer(runs, modules.simulated.blindly(points)).average(limits)

    assert [point.learning_rate_scale for point in average] == pytest.approx([1 + i / 50 for i in range(50)])


# Static settings ------------------------------------------------------------------------------------------------


def test_the_grid_holds_the_tuned_static_and_nothing_better_is_left_out(modules: Any, pool: Pool) -> None:
    losses = modules.simulated.sweep(pool.instances, 1.0, [("wsd", 0.1)])

    assert losses.shape == (1, len(modules.simulated.RATES), len(modules.simulated.POWERS), len(pool))
    assert (losses.min(axis=(0, 1, 2)) <= pool.references.losses[:, -1] + 0.01).all()


def test_a_setting_tried_alone_is_that_of_the_grid(modules: Any, pool: Pool) -> None:
    runs = modules.simulated.RunsAndReferences(instances=pool.instances, references=pool.references)
    base = modules.simulated.BASES.index(("wsd", 0.1))
    setting = np.array([[np.log2(modules.simulated.RATES[12]), 0.0, base + 0.5, 0.0, 0.0]])

    quality, _ = modules.simulated.try_settings(setting, runs, "time")

    wanted = runs.quality(modules.simulated.sweep(pool.instances, 1.0, [("wsd", 0.1)])[0, 12, 4])
    assert quality[0] == pytest.approx(wanted)


@pytest.mark.parametrize("cost", ["time", "energy"])
def test_tuned_batch_at_the_first_precision_costs_as_the_reference(modules: Any, pool: Pool, cost: str) -> None:
    runs = modules.simulated.RunsAndReferences(instances=pool.instances, references=pool.references)
    powers = np.log2(pool.references.batch / pool.instances.start_batch)
    settings = np.array([[-9.0, power, 0.0, share, 0.0] for power in powers for share in (0.0, -1.0)])

    _, spent = modules.simulated.try_settings(settings, runs, cost)

    assert np.diag(spent[::2]) == pytest.approx(1.0)
    assert np.diag(spent[1::2]) == pytest.approx(0.5)


def test_nsga2_finds_settings_that_trade_quality_for_time(modules: Any, pool: Pool) -> None:
    runs = modules.simulated.RunsAndReferences(instances=pool.instances, references=pool.references)

    settings = modules.simulated.nsga2_settings(runs, "time", n_simulated=600)
    points = modules.simulated.medians(*modules.simulated.try_settings(settings, runs, "time"))

    assert len(settings) >= 3
    assert min(cost for _, cost in points) < 0.5 * max(cost for _, cost in points)


# Preferences and ablations --------------------------------------------------------------------------------------


def test_order_is_told_by_rank_correlation_and_by_neighbours(modules: Any) -> None:
    rows = np.arange(3)
    falling = np.tile(np.linspace(1.0, 0.2, 9)[:, None], (1, 3))
    swapped = falling.copy()
    swapped[[3, 4]] = falling[[4, 3]]

    assert modules.preferences._spearman(falling, rows) == pytest.approx(-1.0)
    assert modules.preferences._violations(falling, rows) == 0
    assert modules.preferences._violations(swapped, rows) == 1
    assert modules.preferences._spearman(np.ones((9, 3)), rows) == 0.0


def test_live_preferences_stand_beside_the_tuned_static(modules: Any) -> None:
    asked = [Preference(quality=1, energy=0, time=0), Preference(quality=0.5, energy=0.5, time=0)]
    names = [modules.preferences._method("p", each) for each in asked]
    made = Planted(efficiencies={"cosine": 0.5, "tuned": 1.0, names[0]: 0.8, names[1]: 0.5})

    found = modules.preferences.figures(Runs(made.comparison(), made.results, made.tables()), "p", asked)

    assert names == ["policy:p@quality=1", "policy:p@quality=0.5+energy=0.5"]
    assert [one["compute_over_worth"] for one in found["preferences"]] == pytest.approx([1.25, 2.0], rel=0.05)
    assert found["costs"]["energy"]["non_dominated"] == 1  # both cost the same here
    assert found["costs"]["time"]["on_front"] == [str(asked[0])]


def test_every_variant_changes_one_thing(modules: Any) -> None:
    stage = SimulatorStage()

    changed = {name: modules.ablations.changed(stage, name) for name in modules.ablations.VARIANTS}

    assert changed["full"] == stage
    assert changed["no-probe"] == replace(stage, hide=("curvature", "relative_update"))
    assert changed["no-noise-scale"] == replace(stage, hide=("noise_scale",))
    assert changed["no-stack"] == replace(stage, stack=1)
    assert changed["no-randomisation"].widening.spread == 0
    assert changed["no-law"].observe == ("basic", "history", "prices", "currency")
    assert changed["no-edges"].widening.edges == 0
    assert not changed["no-privileged-critic"].privileged_critic
    assert len(modules.ablations.calibrations_of(stage, "no-randomisation")) == 1
