"""The runs of a calibration spread over what a policy may do, and a quarter of them is never fitted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes import make_limits

from trainpilot.experiments.calibrate.design import CalibrationSetting, design
from trainpilot.experiments.calibrate.runs import pilot, run_key
from trainpilot.experiments.options import CalibrateOptions, Effort
from trainpilot.llm_runtime.config import Controls, RunConfig

BASE = RunConfig(tokens=131_072, batch_size=8, sequence_length=64, base_learning_rate=3e-3, schedule="wsd")


def settings(effort: Effort = "standard") -> tuple[CalibrationSetting, ...]:
    return design(BASE, effort, precisions=("fp32", "bf16"))


def test_standard_grid_is_six_rates_by_three_batches() -> None:
    grid = [setting.config for setting in settings() if setting.grid]

    rates = sorted({config.base_learning_rate for config in grid})
    assert rates == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    assert {config.batch_size for config in grid} == {1, 4, 16}
    assert len(grid) == 18
    assert {config.schedule for config in grid} == {"wsd"}
    assert {config.warmup() for config in grid} == {13_107}


@pytest.mark.parametrize(
    ("effort", "held_out"),
    [
        ("standard", [(3e-4, 4), (1e-3, 4), (3e-3, 1), (3e-3, 16), (1e-2, 4)]),
        ("quick", [(6e-4, 1), (4.5e-3, 16)]),
    ],
)
def test_points_of_the_grid_that_are_held_out_lie_between_fitted_ones(
    effort: Effort, held_out: list[tuple[float, int]]
) -> None:
    grid = {(s.config.base_learning_rate, s.config.batch_size): s.role for s in settings(effort) if s.grid}
    rates, batches = (sorted(set(axis)) for axis in zip(*grid, strict=True))
    held = sorted(point for point, role in grid.items() if role == "held-out")

    assert held == held_out
    for rate, batch in held:
        row, column = rates.index(rate), batches.index(batch)
        above_and_below = [(rates[row - 1], batch), (rates[row + 1], batch)]
        beside = [(rate, batches[column - 1]), (rate, batches[(column + 1) % len(batches)])]
        between_rates = {grid[point] for point in above_and_below} == {"fit"}
        assert between_rates or (0 < column < len(batches) - 1 and {grid[point] for point in beside} == {"fit"})


@pytest.mark.parametrize(("effort", "n_runs", "n_held_out"), [("quick", 15, 4), ("standard", 40, 9), ("long", 48, 11)])
def test_about_a_quarter_is_held_out(effort: Effort, n_runs: int, n_held_out: int) -> None:
    chosen = settings(effort)

    assert len(chosen) == n_runs
    assert sum(setting.role == "held-out" for setting in chosen) == n_held_out
    assert len({setting.name for setting in chosen}) == n_runs


def test_two_schedules_a_walk_a_ramp_and_two_longer_runs_are_held_out() -> None:
    held = [setting for setting in settings("long") if setting.role == "held-out" and not setting.grid]

    assert [(setting.config.schedule, setting.config.base_learning_rate, setting.walk) for setting in held] == [
        ("cosine", 1e-3, None),
        ("linear", 6e-3, None),
        ("wsd", 2e-3, 1),
        ("wsd", 1.5e-3, None),
        ("wsd", 3e-3, None),
        ("wsd", 6e-4, None),
    ]


def test_some_runs_have_eight_times_the_budget() -> None:
    longer = [setting for setting in settings("long") if setting.config.tokens != BASE.tokens]

    assert {setting.config.tokens for setting in longer} == {8 * 131_072}
    assert {(each.config.base_learning_rate, each.config.batch_size) for each in longer if each.role == "fit"} == {
        (1.8e-3, 8), (1e-3, 2), (5.4e-3, 8), (3e-3, 32),
    }  # fmt: skip
    assert [each.name for each in longer if each.walk is not None or each.plan is not None] == [
        "longer-walk-lr0.0018-batch8",
        "longer-drop-lr0.0018-batch8",
        "longer-swell-lr0.0018-batch8",
    ]
    assert {setting.config.warmup() for setting in longer} == {104_857}


def test_learning_rates_are_round_where_the_base_is() -> None:
    rates = {setting.config.base_learning_rate for setting in settings("long")}

    assert rates == {
        1e-4, 3e-4, 6e-4, 1e-3, 1.5e-3, 1.8e-3, 2e-3, 3e-3, 3.5e-3, 5.4e-3, 6e-3, 1e-2, 2e-2, 3e-2, 3.5e-2,
    }  # fmt: skip


def test_roles_do_not_depend_on_what_the_device_or_the_model_can_do() -> None:
    plain = design(BASE, "standard", prunes=False)
    full = {setting.name: setting.role for setting in settings()}

    assert {setting.name: setting.role for setting in plain}.items() <= full.items()
    assert len(full) == len(plain) + 2


def test_a_start_of_one_sequence_has_no_two_runs_alike() -> None:
    chosen = design(replace(BASE, batch_size=1), "long")

    assert {setting.config.batch_size for setting in chosen} == {1, 2, 4}
    assert len({run_key(setting, "") for setting in chosen}) == len(chosen)


def test_the_budget_must_do_for_the_largest_batch() -> None:
    assert design(replace(BASE, tokens=51_200), "quick")
    with pytest.raises(ValueError, match=r"tokens must give every decision a step .* = 51,200, got 51,199"):
        design(replace(BASE, tokens=51_199), "quick")


def test_a_plain_run_keeps_its_base_schedule() -> None:
    setting = settings()[0]
    decide = pilot(setting, make_limits())

    assert {decide(decision) for decision in range(50)} == {setting.config.start()}


def test_the_pruning_run_loses_a_fifth_of_its_channels_at_half_its_budget() -> None:
    [setting] = [setting for setting in settings() if setting.prune]
    decide = pilot(setting, make_limits(pruning="width"))

    assert setting.config.pruning == "width"
    assert [decide(decision).sparsity for decision in range(50)] == [0.0] * 25 + [0.2] * 25


def planned_paths() -> dict[str, list[Controls]]:
    """Return the controls of every run that follows a plan, by its plan."""
    chosen = {setting.plan: pilot(setting, make_limits()) for setting in settings("long") if setting.plan}
    return {plan: [decide(decision) for decision in range(50)] for plan, decide in chosen.items()}


def test_planned_batches_rise_from_an_eighth_or_drop_to_it() -> None:
    batches = {plan: [controls.batch_size for controls in path] for plan, path in planned_paths().items()}

    assert batches == {
        "ramp": [4, 2] + [1] * 13 + [2] * 15 + [4] * 10 + [8] * 10,
        "middle-ramp": [4, 2] + [1] * 8 + [2] * 10 + [4] * 10 + [8] * 20,
        "early-ramp": [4, 2] + [1] * 4 + [2] * 6 + [4] * 8 + [8] * 30,
        "half-ramp": [4, 2] + [1] * 4 + [2] * 9 + [4] * 35,
        "drop": [8] * 20 + [4, 2] + [1] * 28,
        "swell": [4, 2, 1, 1, 2, 2, 4, 4, 8, 8, 16, 16] + [32] * 24 + [16, 16, 8, 8, 4, 4, 2, 2] + [1] * 6,
        "hot-tenth": [4, 2] + [1] * 48,
        "hot-twentieth": [4, 2] + [1] * 48,
    }


def test_hot_starts_are_cooled_in_three_decisions() -> None:
    scales = {plan: [controls.learning_rate_scale for controls in path] for plan, path in planned_paths().items()}

    assert scales["hot-tenth"] == [0.71, 0.355, 0.177] + [0.1] * 47
    assert scales["hot-twentieth"] == [0.71, 0.355, 0.177] + [0.05] * 47
    assert set(scales["ramp"] + scales["drop"]) == {1.0}
    assert {s.config.base_learning_rate for s in settings() if s.plan and "hot" in s.plan} == {0.035}


def test_planned_batches_stay_within_their_limits() -> None:
    setting = next(setting for setting in settings() if setting.plan == "drop")
    decide = pilot(setting, make_limits(min_batch_size=2))

    assert {decide(decision).batch_size for decision in range(50)} == {8, 4, 2}


def test_walk_changes_both_controls_within_limits_and_repeats() -> None:
    walks = [setting for setting in settings() if setting.walk is not None]
    limits = make_limits(min_batch_size=4, max_batch_size=16)
    paths = []
    for setting in walks:
        first, second = pilot(setting, limits), pilot(setting, limits)
        path = [first(decision) for decision in range(400)]
        assert path == [second(decision) for decision in range(400)]
        paths.append(path)

    for path in paths:
        scales = [controls.learning_rate_scale for controls in path]
        assert len(set(scales)) > 10
        assert 2.0**-6 <= min(scales) < max(scales) <= 2.0**6
        assert {controls.batch_size for controls in path} == {4, 8, 16}
    assert paths[0] != paths[1] != paths[2]


def test_a_key_tells_apart_all_that_changes_a_run_but_not_its_role() -> None:
    one = settings()[0]
    others = [
        replace(one, config=replace(one.config, seed=1)),
        replace(one, walk=0),
        replace(one, plan="ramp"),
        replace(one, prune=True),
    ]

    assert run_key(one, "text") == run_key(replace(one, role="held-out"), "text")
    assert len({run_key(one, "text"), run_key(one, "other"), *(run_key(other, "text") for other in others)}) == 6


def test_the_options_defaults_make_a_design() -> None:
    options = CalibrateOptions(out=None)  # type: ignore[arg-type]

    assert design(options.run_config(), options.effort)
