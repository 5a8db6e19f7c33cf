"""Searches on a known surface: they find the best setting, repeat, cost what they say, and do not believe in luck."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import optuna
import pytest
from comparison_runs import (
    CASE,
    CONFIG,
    TUNING_SEEDS,
    Bowl,
    Run,
    drive,
    made_ledger,
    made_result,
    made_table,
    with_config,
)

from trainpilot.experiments.compare.cases import TUNED_SCHEDULES, WARMUP_SHARES, StaticSetting, all_sizes
from trainpilot.experiments.compare.execute import failed
from trainpilot.experiments.compare.programs import search_program
from trainpilot.experiments.compare.search import (
    GENERATIONS,
    HALVING_TRIALS,
    MAX_MOVES,
    N_CONFIRMED,
    N_JUDGED,
    N_RECONFIRMED,
    POPULATION,
    TPE_CONFIRMED,
    TPE_GENERATION,
    TPE_TRIALS,
    Front,
    Halved,
    StudyStorage,
    Trials,
    final_loss,
    halving,
    judged,
    nsga2,
    retune,
    suggest,
    tpe,
    tune,
)
from trainpilot.experiments.results import RunResult, RunSpec, SteeringSpec, cost_key
from trainpilot.llm_runtime.models import PRESETS
from trainpilot.llm_runtime.schedules import ScheduleName

SETTING = StaticSetting(learning_rate=1e-2, batch_size=8, schedule="linear", warmup_share=0.1, precision="fp32")
HALF_A_STEP = 1 / 16
"""Half of the last step of the learning rate, in decades."""


def search(run: Run, **options: Any) -> tuple[Trials, list[list[RunSpec]]]:
    return drive(tune(CONFIG, options.pop("precisions", ["fp32"]), TUNING_SEEDS, **options), run)


def best_of(trials: Trials, schedules: Sequence[ScheduleName] = TUNED_SCHEDULES) -> StaticSetting:
    return trials.best_confirmed(schedules).setting


def rate_error(found: StaticSetting, wanted: float) -> float:
    return abs(math.log10(found.learning_rate / wanted))


@pytest.mark.parametrize(
    "bowl",
    [
        Bowl(),
        Bowl(learning_rate=3.7e-3, schedule="cosine"),
        Bowl(learning_rate=2.1e-3, batch_size=1, warmup_share=0.02, schedule="wsd"),
        Bowl(learning_rate=2e-5, batch_size=16),  # below the grid
        Bowl(learning_rate=0.5, batch_size=32, warmup_share=0.4, schedule="cosine"),  # above the grid
    ],
)
def test_the_search_finds_the_best_setting_also_beyond_its_grid(bowl: Bowl) -> None:
    trials, _ = search(bowl)
    found = best_of(trials)

    assert rate_error(found, bowl.learning_rate) <= HALF_A_STEP + 1e-3
    assert (found.batch_size, found.schedule) == (bowl.batch_size, bowl.schedule)
    assert found.warmup_share == bowl.warmup_share


def test_every_schedule_gets_its_own_best_rate() -> None:
    """Here a cosine wants three times the rate of the others."""

    def run(spec: RunSpec) -> RunResult:
        cosine = spec.config.schedule == "cosine"
        return Bowl(learning_rate=3e-2 if cosine else 1e-2)(spec)

    trials, _ = search(run, extra=["constant"])

    assert rate_error(best_of(trials, ["linear"]), 1e-2) <= HALF_A_STEP + 1e-3
    assert rate_error(best_of(trials, ["cosine"]), 3e-2) <= HALF_A_STEP + 1e-3
    assert rate_error(best_of(trials, ["constant"]), 1e-2) <= HALF_A_STEP + 1e-3


def test_an_extra_schedule_is_searched_but_never_the_tuned_static() -> None:
    trials, _ = search(Bowl(schedule="constant"), extra=["constant"])

    assert best_of(trials).schedule != "constant"
    best = trials.mean_loss(best_of(trials, ["constant"]))
    assert best < trials.mean_loss(best_of(trials))
    assert "constant" not in {setting.schedule for setting in search(Bowl())[0].tried}


def test_the_better_precision_wins() -> None:
    trials, _ = search(Bowl(precision="bf16"), precisions=["fp32", "bf16"])

    assert best_of(trials).precision == "bf16"


def test_every_run_is_asked_for_once() -> None:
    trials, waves = search(Bowl(learning_rate=0.5, batch_size=1), extra=["constant"])
    configs = [spec.config for wave in waves for spec in wave]

    assert len(set(configs)) == len(configs) == len(trials.all_trials())
    assert len(waves[0]) == 45
    tried = [config for config in configs if config.seed == TUNING_SEEDS[0]]
    assert len(tried) == len(trials.tried)
    assert len(configs) - len(tried) == 2 * len(trials.confirmed) == 2 * 4 * N_CONFIRMED


def test_a_trial_is_looked_at_only_at_its_end() -> None:
    _, waves = search(Bowl())

    for spec in (spec for wave in waves for spec in wave):
        assert spec.steering.evaluate_every == spec.config.decisions
        assert spec.steering.kind == "keep"


def test_the_search_is_the_same_every_time() -> None:
    bowl = Bowl(learning_rate=3.7e-3, batch_size=2)

    assert search(bowl)[1] == search(bowl)[1]


# What diverges, fails or was lucky


def test_a_run_without_a_loss_counts_as_infinite() -> None:
    spec = RunSpec(config=CONFIG)

    assert final_loss(made_result(spec, 2.5)) == 2.5
    assert final_loss(made_result(spec, None)) == math.inf
    assert final_loss(failed(spec, "ab", "killed")) == math.inf


def test_the_search_goes_up_to_where_runs_diverge_and_not_beyond() -> None:
    trials, _ = search(Bowl(learning_rate=0.1, diverges_from=5e-2))
    found = best_of(trials)

    assert 5e-2 / 10**0.125 <= found.learning_rate < 5e-2
    assert trials.on_edge(trials.tried[found]) == ()


def test_where_everything_diverges_the_search_ends_with_an_infinite_loss() -> None:
    trials, waves = search(lambda spec: made_result(spec, None))

    assert trials.mean_loss(best_of(trials)) == math.inf
    assert len(waves) < 30


def test_a_setting_that_was_lucky_once_is_not_chosen() -> None:
    lucky = {3.16e-2, 3.16e-3}

    def run(spec: RunSpec) -> RunResult:
        result = Bowl()(spec)
        if spec.config.base_learning_rate not in lucky or spec.config.schedule != "linear":
            return result
        loss = 1.5 if spec.config.seed == TUNING_SEEDS[0] else None  # best of all, or diverged
        return made_result(spec, loss)

    trials, _ = search(run)

    assert trials.ranked()[0].setting.learning_rate in lucky
    assert best_of(trials).learning_rate not in lucky


def test_the_mean_is_taken_over_all_tuning_seeds() -> None:
    trials, _ = search(Bowl())

    # 1 + 1, and 0, 0.003 and 0.006 for the three seeds
    assert trials.mean_loss(SETTING) == pytest.approx(2.003)
    assert [trial.spec.config.seed for trial in trials.confirmed[SETTING]] == [1_001, 1_002]


# Edges


def test_a_best_value_inside_what_was_tried_is_on_no_edge() -> None:
    trials, _ = search(Bowl())

    assert trials.on_edge(trials.best_confirmed(TUNED_SCHEDULES)) == ()


def test_the_smallest_batch_there_can_be_is_no_edge() -> None:
    trials, _ = search(Bowl(batch_size=1))

    assert best_of(trials).batch_size == 1
    assert trials.on_edge(trials.best_confirmed(TUNED_SCHEDULES)) == ()


def test_the_largest_batch_that_leaves_enough_steps_is_an_edge() -> None:
    trials, _ = search(Bowl(batch_size=32))

    assert trials.on_edge(trials.best_confirmed(TUNED_SCHEDULES)) == ("batch_size",)


def test_the_longest_warm_up_is_an_edge() -> None:
    trials, _ = search(Bowl(warmup_share=0.4))

    assert trials.on_edge(trials.best_confirmed(TUNED_SCHEDULES)) == ("warmup_share",)


@pytest.mark.parametrize("rate", [1e20, 1e-20])
def test_a_rate_beyond_the_last_move_is_an_edge(rate: float) -> None:
    trials, waves = search(Bowl(learning_rate=rate))

    assert trials.on_edge(trials.best_confirmed(TUNED_SCHEDULES)) == ("learning_rate",)
    assert len(waves) <= 1 + 2 * MAX_MOVES + 3 * (2 + 2 * MAX_MOVES)


# Other budgets


def test_tuning_again_starts_from_the_best_setting_on_its_own_budget() -> None:
    trials = Trials(CONFIG, TUNING_SEEDS, 0.25)
    best, waves = drive(
        retune(trials, SETTING, ["learning_rate", "batch_size"]), Bowl(learning_rate=3e-2, batch_size=4)
    )

    assert waves[0] == [trials.spec(SETTING, TUNING_SEEDS[0])]
    assert {spec.config.tokens for wave in waves for spec in wave} == {3_200}
    assert rate_error(best.setting, 3e-2) <= 0.125 + 1e-3
    assert best.setting.batch_size == 4
    assert len(trials.confirmed) == N_RECONFIRMED


def test_tuning_again_leaves_alone_what_it_shall_not_respect() -> None:
    trials = Trials(CONFIG, TUNING_SEEDS, 0.5)
    bowl = Bowl(learning_rate=3e-2, batch_size=1, warmup_share=0.4, schedule="wsd")
    best, _ = drive(retune(trials, SETTING, ["learning_rate"]), bowl)

    assert best.setting == replace(SETTING, learning_rate=best.setting.learning_rate)
    assert {replace(setting, learning_rate=1e-2) for setting in trials.tried} == {SETTING}


def test_ranked_begins_with_the_lowest_loss_and_the_first_of_equals() -> None:
    trials = Trials(CONFIG, TUNING_SEEDS)
    settings = [
        replace(SETTING, learning_rate=rate, schedule=name) for rate in (1e-3, 1e-2) for name in TUNED_SCHEDULES
    ]
    drive(trials.run(settings), lambda spec: made_result(spec, 2.0 + (spec.config.base_learning_rate < 5e-3)))

    assert [trial.setting for trial in trials.ranked()] == [*settings[3:], *settings[:3]]
    assert [trial.setting.learning_rate for trial in trials.ranked("wsd")] == [1e-2, 1e-3]


# Optuna -------------------------------------------------------------------------------------------------------------


OTHER_SEEDS = (2_000, 2_001, 2_002)
Waves = list[list[RunSpec]]


def diverges(spec: RunSpec) -> RunResult:
    return made_result(spec, None)


# What may be suggested


def test_suggestions_stay_within_the_grid_and_repeat() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for trial in (study.ask() for _ in range(200)):
        setting = suggest(trial, CONFIG, ["fp32", "bf16"])

        assert suggest(trial, CONFIG, ["fp32", "bf16"]) == setting
        assert 3.16e-4 <= setting.learning_rate <= 3.17e-2
        assert setting.batch_size in (2, 4, 8, 16)
        assert setting.schedule in TUNED_SCHEDULES
        assert setting.warmup_share in WARMUP_SHARES
        assert setting.precision in ("fp32", "bf16")
        assert setting.on(CONFIG, seed=0).tokens == CONFIG.tokens


# TPE


def tpe_search(seeds: tuple[int, ...] = TUNING_SEEDS) -> tuple[Trials, Waves]:
    return drive(tpe(CONFIG, ["fp32"], seeds), Bowl())


def test_tpe_is_the_same_every_time_and_another_with_another_seed() -> None:
    assert tpe_search()[1] == tpe_search()[1] != tpe_search(OTHER_SEEDS)[1]


def test_tpe_asks_in_generations_and_confirms_its_best() -> None:
    trials, waves = tpe_search()
    *generations, confirmation = waves

    assert len(generations) == TPE_TRIALS // TPE_GENERATION
    assert all(len(wave) <= TPE_GENERATION for wave in generations)
    assert len(trials.confirmed) == TPE_CONFIRMED
    assert Counter(spec.config.seed for spec in confirmation) == {1_001: TPE_CONFIRMED, 1_002: TPE_CONFIRMED}
    assert set(trials.confirmed) == {trial.setting for trial in trials.ranked()[:TPE_CONFIRMED]}


def test_tpe_learns_from_what_it_is_told() -> None:
    trials, _ = tpe_search()
    losses = [final_loss(trial.result) for trial in trials.tried.values()]

    assert median(losses[len(losses) // 2 :]) < median(losses[: TPE_TRIALS // 4])
    assert trials.mean_loss(trials.best_confirmed(TUNED_SCHEDULES).setting) < 2.15  # 2.003 is the best there is


def test_tpe_bears_that_everything_diverges() -> None:
    trials, _ = drive(tpe(CONFIG, ["fp32"], TUNING_SEEDS), diverges)

    assert trials.mean_loss(trials.best_confirmed(TUNED_SCHEDULES).setting) == math.inf


# Successive halving


def halving_search(seeds: tuple[int, ...] = TUNING_SEEDS) -> tuple[Halved, Waves]:
    return drive(halving(CONFIG, ["fp32"], seeds), Bowl())


def test_halving_is_the_same_every_time_and_another_with_another_seed() -> None:
    assert halving_search()[1] == halving_search()[1] != halving_search(OTHER_SEEDS)[1]


def test_halving_gives_the_better_ones_twice_the_budget_again_and_again() -> None:
    found, waves = halving_search()

    assert [{spec.config.tokens for spec in wave} for wave in waves] == [{1_600}, {3_200}, {6_400}, {12_800}]
    assert len(waves[0]) == HALVING_TRIALS
    assert [len(wave) for wave in waves] == sorted((len(wave) for wave in waves), reverse=True)
    for shorter, longer in zip(found.trials, found.trials[1:], strict=False):
        assert set(longer.tried) <= set(shorter.tried)
        assert shorter.ranked()[0].setting in longer.tried  # the best of a rung always goes on
    assert found.best == found.trials[-1].ranked()[0]


def test_halving_takes_about_eight_runs() -> None:
    def runs(seed: int) -> float:
        _, waves = halving_search((seed, seed + 1))
        return sum(spec.config.tokens for wave in waves for spec in wave) / CONFIG.tokens

    # Sixteen eighths, and as much again on each of three rungs, if half of them goes on.
    taken = [runs(seed) for seed in range(1_000, 1_030)]
    assert fmean(taken) == pytest.approx(8, rel=0.2)
    assert max(taken) < 16


def test_halving_bears_that_everything_diverges() -> None:
    found, _ = drive(halving(CONFIG, ["fp32"], TUNING_SEEDS), diverges)

    assert final_loss(found.best.result) == math.inf


# NSGA-II


def size_of(spec: RunSpec) -> int:
    model = spec.config.model
    content = PRESETS[model] if model in PRESETS else json.loads(Path(model).read_text())
    return int(content["hidden_size"] * content["num_hidden_layers"])


def larger_is_better(spec: RunSpec) -> RunResult:
    """The bowl, and a little less loss for a larger model."""
    return made_result(spec, (Bowl().loss(spec.config) or 0) + 20 / size_of(spec))


def cost(result: RunResult) -> float:
    """Larger models and smaller batches cost more."""
    return size_of(result.spec) * (1 + 4 / result.spec.config.batch_size)


def front_search(seed: int = 1_000) -> tuple[Front, Waves]:
    return drive(nsga2(CONFIG, ["fp32"], seed, cost), larger_is_better)


def test_nsga2_is_the_same_every_time_and_another_with_another_seed() -> None:
    assert front_search()[1] == front_search()[1] != front_search(2_000)[1]


def test_nsga2_runs_generations_of_one_size() -> None:
    front, waves = front_search()

    assert [len(wave) for wave in waves] == [POPULATION] * GENERATIONS
    assert list(front.tried) == [spec for wave in waves for spec in wave]
    assert {spec.config.seed for spec in front.tried} == {1_000}
    assert {spec.steering.evaluate_every for spec in front.tried} == {10}
    assert len({spec.config.model for spec in front.tried}) > 3  # width and depth vary


def test_nothing_that_was_tried_beats_a_judged_point_in_both() -> None:
    for seed in (1_000, 1_005, 2_000):
        front, _ = front_search(seed)
        tried = [(final_loss(larger_is_better(spec)), cost(larger_is_better(spec))) for spec in front.tried]
        points = [(final_loss(larger_is_better(spec)), cost(larger_is_better(spec))) for spec in front.best]

        assert 2 <= len(points) == len({spec.config for spec in front.best}) <= N_JUDGED
        assert not [(a, b) for a in tried for b in points if a != b and a[0] <= b[0] and a[1] <= b[1]]
        assert [price for _, price in points] == sorted(price for _, price in points)
        assert min(price for _, price in tried) == points[0][1]
        assert min(loss for loss, _ in tried) == points[-1][0]


def test_what_diverged_is_not_on_the_front() -> None:
    def run(spec: RunSpec) -> RunResult:
        return diverges(spec) if spec.config.batch_size > 4 else larger_is_better(spec)

    front, _ = drive(nsga2(CONFIG, ["fp32"], 1_000, cost), run)
    assert {spec.config.batch_size for spec in front.best} <= {2, 4}


def test_nsga2_bears_that_everything_diverges() -> None:
    front, _ = drive(nsga2(CONFIG, ["fp32"], 1_000, cost), diverges)

    assert 1 <= len(front.best) <= N_JUDGED


def test_a_model_of_fixed_size_is_searched_over_settings_alone() -> None:
    config = replace(CONFIG, model="owner/name")
    front, _ = drive(nsga2(config, ["fp32"], 1_000, lambda result: 1 / result.spec.config.batch_size), Bowl())

    assert {spec.config.model for spec in front.tried} == {"owner/name"}


def test_a_judged_point_is_its_run_with_another_seed_and_looks_on_the_way() -> None:
    front, _ = front_search()
    spec = judged(front.best[0], 3)

    assert spec == RunSpec(config=replace(front.best[0].config, seed=3), steering=SteeringSpec())


# Their rows


@pytest.mark.parametrize(
    ("name", "tokens"), [("tuned-tpe", {12_800}), ("tuned-halving", {1_600, 3_200, 6_400, 12_800})]
)
def test_a_search_notes_its_sweep_and_judges_its_best(name: str, tokens: set[int]) -> None:
    ledger = made_ledger(seeds=(0, 1))
    _, waves = drive(search_program(ledger, CASE, name), Bowl())
    sweep = [row for row in ledger.rows if row.role == "sweep"]
    methods = [row for row in ledger.rows if row.role == "method"]

    assert {row.method for row in ledger.rows} == {name}
    assert {round(row.budget * CONFIG.tokens) for row in sweep} == tokens
    assert len(sweep) == sum(len(wave) for wave in waves[:-1])
    assert [row.seed for row in methods] == [0, 1]
    assert [spec.steering for spec in waves[-1]] == [RunSpec(config=CONFIG).steering] * 2 or name == "tuned-tpe"


def test_nsga2_needs_a_cost_table_for_every_size_and_judges_its_front() -> None:
    case = with_config(model="llama-nano")
    ledger = made_ledger(case=case)
    ledger.tables = {cost_key(sized): made_table() for sized in all_sizes(case.config)}
    drive(search_program(ledger, case, "nsga2"), larger_is_better)
    judged_rows = Counter(row.method for row in ledger.rows if row.role == "method")

    assert set(judged_rows.values()) == {2}
    assert list(judged_rows) == [f"nsga2-{number}" for number in range(1, len(judged_rows) + 1)]
    assert {row.method for row in ledger.rows if row.role == "sweep"} == {"nsga2"}


# Studies that are kept --------------------------------------------------------------------------------------


def test_a_study_ends_with_every_trial_told() -> None:
    studies: list[optuna.Study] = []
    kept, _ = drive(halving(CONFIG, ["fp32"], TUNING_SEEDS, studies.append), Bowl())
    plain, _ = halving_search()

    assert kept.best.setting == plain.best.setting
    states = Counter(trial.state.name for trial in studies[0].trials)
    assert states.total() == HALVING_TRIALS
    assert set(states) == {"PRUNED", "COMPLETE"}
    assert studies[0].best_value == pytest.approx(final_loss(kept.best.result))


def test_a_study_is_kept_under_its_name_in_place_of_an_earlier_one(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    keep = StudyStorage(url).keep("case nsga2")
    for value in (2.0, 1.0):
        study = optuna.create_study(directions=["minimize", "minimize"])
        study.add_trial(optuna.trial.create_trial(values=[value, 3.0], user_attrs={"from": "test"}))
        keep(study)

    assert optuna.get_all_study_names(url) == ["case nsga2"]
    kept = optuna.load_study(study_name="case nsga2", storage=url)
    assert [trial.values for trial in kept.trials] == [[1.0, 3.0]]


def test_a_storage_that_cannot_be_opened() -> None:
    with pytest.raises(ValueError, match=r"^optuna_storage must be a storage of Optuna, such as .*, got 'nothing', "):
        StudyStorage("nothing")
