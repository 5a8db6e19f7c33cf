"""The tuned static baseline on a surface that is known: every row is there, and every row is the right run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import replace

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

from trainpilot.experiments.compare.cases import StaticSetting
from trainpilot.experiments.compare.programs import (
    CURVE_BUDGETS,
    UNTUNED_CURVE_BUDGETS,
    ComparisonLedger,
    TunedStatic,
    at_budget,
    share_needed,
    untuned_curve,
)
from trainpilot.experiments.compare.search import Trials
from trainpilot.experiments.costs.table import CostTable
from trainpilot.experiments.results import Case, Row, RunResult, RunSpec, SteeringSpec, TunedBaseline
from trainpilot.experiments.run_store import run_key
from trainpilot.llm_runtime.config import RunConfig

PER_TOKEN = made_table(per_step=0.0, per_row=1.0)
"""A run costs its sequences, whatever its batch."""
PER_STEP = made_table()
"""A run costs its steps: twice the batch is half as dear."""


class Tuned:
    """One case's tuned static, carried out."""

    def __init__(
        self,
        run: Run,
        wanted: Collection[str] = ("tuned",),
        *,
        table: CostTable | None = PER_TOKEN,
        case: Case = CASE,
    ) -> None:
        self.warnings: list[str] = []
        self.ledger: ComparisonLedger = made_ledger(table, case=case, warnings=self.warnings)
        _, self.waves = drive(TunedStatic(self.ledger, case, wanted).program(), run)
        self.configs = {run_key(spec): spec.config for wave in self.waves for spec in wave}

    def rows(self, method: str, role: str = "method") -> list[Row]:
        return [row for row in self.ledger.rows if (row.method, row.role) == (method, role)]

    def runs(self, method: str, role: str = "method") -> list[RunConfig]:
        return [self.configs[row.key] for row in self.rows(method, role)]

    def baseline(self, axis: str) -> TunedBaseline:
        [found] = [baseline for baseline in self.ledger.baselines[CASE.name] if baseline.axis == axis]
        return found


ALL = (
    *("tuned", "tuned-linear", "tuned-cosine", "tuned-wsd", "tuned-constant"),
    *("check-self", "check-budget", "check-rate"),
)


def test_every_method_has_a_row_for_every_seed() -> None:
    tuned = Tuned(Bowl(), ALL)

    judged = Counter(row.method for row in tuned.ledger.rows if row.role == "method")
    assert judged == dict.fromkeys(ALL, 2)
    assert {row.seed for row in tuned.ledger.rows if row.role != "sweep"} == {0, 1}
    assert {row.role for row in tuned.ledger.rows} == {"method", "sweep", "curve"}
    assert tuned.warnings == []


def test_the_best_setting_is_judged_with_every_seed() -> None:
    tuned = Tuned(Bowl(schedule="wsd"))

    expected = replace(CONFIG, base_learning_rate=1e-2, schedule="wsd", warmup_tokens=1_280)
    assert tuned.runs("tuned") == [expected, replace(expected, seed=1)]
    assert [(row.budget, row.counted_budget) for row in tuned.rows("tuned")] == [(1.0, 1.0)] * 2


def test_judged_runs_are_looked_at_on_the_way() -> None:
    tuned = Tuned(Bowl())
    judged = {row.key for row in tuned.ledger.rows if row.role != "sweep"}

    specs = {run_key(spec): spec for wave in tuned.waves for spec in wave}
    assert all(specs[key].steering == SteeringSpec() for key in judged)
    assert SteeringSpec().evaluate_every == 10


def test_methods_per_schedule_have_their_schedules_and_their_own_rates() -> None:
    def run(spec: RunSpec) -> RunResult:
        return Bowl(learning_rate=3.16e-2 if spec.config.schedule == "cosine" else 1e-2)(spec)

    tuned = Tuned(run, ALL)

    for name in ("linear", "cosine", "wsd", "constant"):
        configs = tuned.runs(f"tuned-{name}")
        assert {config.schedule for config in configs} == {name}
        assert {config.base_learning_rate for config in configs} == {3.16e-2 if name == "cosine" else 1e-2}


def test_only_what_was_asked_for_is_judged() -> None:
    tuned = Tuned(Bowl(), ["check-rate", "tuned-wsd"])

    assert {row.method for row in tuned.ledger.rows} == {"tuned", "tuned-wsd", "check-rate"}


def test_planted_checks() -> None:
    tuned = Tuned(Bowl(), ALL)
    best = tuned.runs("tuned")

    assert [row.key for row in tuned.rows("check-self")] == [row.key for row in tuned.rows("tuned")]
    assert [(row.budget, row.counted_budget) for row in tuned.rows("check-self")] == [(1.0, 1.0)] * 2
    assert [(row.budget, row.counted_budget) for row in tuned.rows("check-budget")] == [(1.25, 1.0)] * 2
    assert [config.tokens for config in tuned.runs("check-budget")] == [16_000] * 2
    assert tuned.runs("check-rate") == [replace(config, base_learning_rate=2.5e-3) for config in best]
    assert [(row.budget, row.counted_budget) for row in tuned.rows("check-rate")] == [(1.0, 1.0)] * 2


def test_the_sweep_is_all_that_was_run_to_find_the_setting() -> None:
    tuned = Tuned(Bowl(), ALL)
    sweep = tuned.rows("tuned", "sweep")

    assert {row.seed for row in sweep} == set(TUNING_SEEDS)
    assert {(row.budget, row.counted_budget) for row in sweep} == {(1.0, 1.0)}
    assert {config.tokens for config in tuned.runs("tuned", "sweep")} == {CONFIG.tokens}
    searched = {key for key, config in tuned.configs.items() if config.seed >= 1_000 and config.tokens == CONFIG.tokens}
    assert {row.key for row in sweep} == searched
    assert tuned.baseline("tokens").n_trials == len(searched)


def test_the_curve_is_tuned_again_at_every_budget() -> None:
    def run(spec: RunSpec) -> RunResult:
        return Bowl(learning_rate=3.16e-2 if spec.config.tokens <= 3_200 else 1e-2)(spec)

    tuned = Tuned(run)
    curve = tuned.rows("tuned", "curve")

    assert Counter(row.budget for row in curve) == dict.fromkeys(CURVE_BUDGETS, 2)
    assert all(row.counted_budget == row.budget for row in curve)
    rates = {config.tokens: config.base_learning_rate for config in tuned.runs("tuned", "curve")}
    assert rates == pytest.approx({1_600: 3.16e-2, 3_200: 3.16e-2, 6_400: 1e-2, 25_600: 1e-2}, rel=0.01)


def test_judged_seeds_are_never_searched_with() -> None:
    tuned = Tuned(Bowl(), ALL)
    judged = {row.key for row in tuned.ledger.rows if row.role != "sweep"}

    assert {tuned.configs[key].seed for key in judged} == {0, 1}
    with pytest.raises(ValueError, match=r"seeds must leave the tuning seeds out, got 1000 in both"):
        ComparisonLedger(range(1_001), TUNING_SEEDS, {}, {}, print)


# Other axes


def test_equal_cost_per_token_gives_all_axes_one_baseline() -> None:
    tuned = Tuned(Bowl(), ALL)

    assert [tuned.baseline(axis).method for axis in ("tokens", "time_s", "energy_j")] == ["tuned"] * 3
    assert not {"tuned-time", "tuned-energy"} & {row.method for row in tuned.ledger.rows}


def test_cheap_large_batches_give_time_and_energy_their_own_baseline() -> None:
    """Loss is 1 + n^-1/4 at a share n of the budget, and 0.1 higher at twice the batch, for half of the cost.

    So twice the batch reaches what the tuned static does at a share of (1.1)^-4 = 0.68, and costs 0.5 / 0.68 = 0.73 of
    it; four times the batch (1.4)^-4 = 0.26, and 0.25 / 0.26 = 0.96.
    """
    tuned = Tuned(Bowl(), table=PER_STEP)

    assert {config.batch_size for config in tuned.runs("tuned")} == {8}
    assert {config.batch_size for config in tuned.runs("tuned-time")} == {16}
    assert [tuned.baseline(axis).method for axis in ("tokens", "time_s", "energy_j")] == [
        "tuned",
        "tuned-time",
        "tuned-time",
    ]
    assert not tuned.rows("tuned-energy")
    assert Counter(row.budget for row in tuned.rows("tuned-time", "curve")) == dict.fromkeys(CURVE_BUDGETS, 2)
    assert {config.batch_size for config in tuned.runs("tuned-time", "curve")} == {16}
    assert tuned.baseline("time_s").config.batch_size == 16
    assert tuned.baseline("time_s").config.seed == TUNING_SEEDS[0]


def test_time_and_energy_may_want_different_settings() -> None:
    def by_axis(time: CostTable, energy: CostTable) -> CostTable:
        rows = [
            replace(one, cost=replace(one.cost, energy_j=other.cost.time_s))
            for one, other in zip(time.rows, energy.rows, strict=True)
        ]
        return replace(time, rows=tuple(rows))

    tuned = Tuned(Bowl(), table=by_axis(PER_TOKEN, PER_STEP))

    assert [tuned.baseline(axis).method for axis in ("tokens", "time_s", "energy_j")] == [
        "tuned",
        "tuned",
        "tuned-energy",
    ]
    assert {config.batch_size for config in tuned.runs("tuned-energy")} == {16}
    assert not tuned.rows("tuned-time")


def test_the_cheapest_batch_may_lie_beyond_the_grid() -> None:
    """With a weight of 0.01, four times the batch reaches a share of (1.04)^-4 = 0.85 and costs 0.25 / 0.85 = 0.29.

    Twice the batch, where the grid ends, costs 0.52.
    """
    tuned = Tuned(Bowl(batch_weight=0.01), table=PER_STEP)

    assert {config.batch_size for config in tuned.runs("tuned-time")} == {32}
    assert {config.batch_size for config in tuned.runs("tuned")} == {8}


def test_where_large_batches_learn_too_badly_they_are_not_taken() -> None:
    """Twice the batch reaches a share of (1.5)^-4 = 0.20, and costs 0.5 / 0.20 = 2.5 times as much."""
    tuned = Tuned(Bowl(batch_weight=0.5), table=PER_STEP)

    assert tuned.baseline("time_s").method == "tuned"


def test_without_joules_there_is_no_baseline_for_them() -> None:
    tuned = Tuned(Bowl(), table=made_table(joules=False))

    assert [baseline.axis for baseline in tuned.ledger.baselines[CASE.name]] == ["tokens", "time_s"]


def test_without_a_table_there_is_the_baseline_for_equal_tokens() -> None:
    tuned = Tuned(Bowl(), ALL, table=None)

    assert [baseline.axis for baseline in tuned.ledger.baselines[CASE.name]] == ["tokens"]
    assert {row.method for row in tuned.ledger.rows if row.role == "method"} == set(ALL)


# What goes wrong


def test_where_everything_diverges_there_is_a_warning_and_no_baseline() -> None:
    tuned = Tuned(lambda spec: made_result(spec, None), ALL)

    assert tuned.warnings == ["made: every setting of the sweep diverged or failed; there is no baseline"]
    assert {row.role for row in tuned.ledger.rows} == {"sweep"}
    assert tuned.ledger.baselines == {}


def test_a_schedule_that_always_diverges_is_judged_all_the_same() -> None:
    def run(spec: RunSpec) -> RunResult:
        return made_result(spec, None) if spec.config.schedule == "constant" else Bowl()(spec)

    tuned = Tuned(run, ALL)

    assert len(tuned.rows("tuned-constant")) == 2
    assert tuned.warnings == []


def test_short_runs_may_diverge_without_ending_the_search() -> None:
    def run(spec: RunSpec) -> RunResult:
        return made_result(spec, None) if spec.config.tokens < CONFIG.tokens else Bowl()(spec)

    tuned = Tuned(run, table=PER_STEP)

    assert Counter(row.budget for row in tuned.rows("tuned", "curve")) == dict.fromkeys(CURVE_BUDGETS, 2)
    assert tuned.baseline("tokens").method == "tuned"


def test_an_edge_is_noted_with_the_baseline() -> None:
    assert Tuned(Bowl()).baseline("tokens").on_edge == ()
    assert Tuned(Bowl(batch_size=32)).baseline("tokens").on_edge == ("batch_size",)


# The untuned curve


def test_untuned_curve_is_the_default_at_other_budgets_with_the_first_seed() -> None:
    case = with_config(schedule="linear", warmup_tokens=256, batch_size=4)
    ledger = made_ledger(case=case, seeds=(3, 4))
    _, waves = drive(untuned_curve(ledger, case), Bowl())
    configs = [spec.config for wave in waves for spec in wave]

    assert [(row.method, row.role, row.budget, row.seed) for row in ledger.rows] == [
        ("cosine", "curve", budget, 3) for budget in UNTUNED_CURVE_BUDGETS
    ]
    assert [config.tokens for config in configs] == [3_200, 6_400, 25_600, 51_200]
    assert [config.warmup_tokens for config in configs] == [64, 128, 512, 1_024]  # 2 % each
    assert [config.decisions for config in configs] == [3, 5, 10, 10]
    for config in configs:
        assert (config.schedule, config.batch_size, config.base_learning_rate) == ("cosine", 4, 1e-3)


def test_the_default_at_the_whole_budget_is_the_case_under_a_cosine() -> None:
    config = at_budget(CASE, 1.0, seed=5)

    assert config == replace(CONFIG, schedule="cosine", seed=5, warmup_tokens=CONFIG.warmup())


# How much budget a loss needs


CURVE = ((0.25, 4.0), (0.5, 3.0), (1.0, 2.0))


@pytest.mark.parametrize(
    ("loss", "share"),
    [
        (2.0, 1.0),
        (3.0, 0.5),
        (4.0, 0.25),
        (math.sqrt(2 * 3), math.sqrt(0.5)),  # halfway, both on logarithms
        (math.sqrt(3 * 4), math.sqrt(0.5 * 0.25)),
        (1.5, 1.0),  # beyond the ends
        (9.0, 0.25),
    ],
)
def test_share_needed_worked_out_by_hand(loss: float, share: float) -> None:
    assert share_needed(loss, CURVE) == pytest.approx(share)


def test_share_needed_passes_over_points_that_are_worse_for_more() -> None:
    # Half the budget ended worse than a quarter: the way from (1/4, 3) to (1, 2) counts.
    curve = ((0.25, 3.0), (0.5, 3.5), (1.0, 2.0))
    assert share_needed(math.sqrt(6), curve) == pytest.approx(0.5)
    assert share_needed(3.0, curve) == pytest.approx(0.25)


def test_share_needed_leaves_out_what_diverged() -> None:
    curve = ((0.125, math.inf), (0.25, 4.0), (0.5, math.inf), (1.0, 2.0))
    assert share_needed(math.sqrt(8), curve) == pytest.approx(0.5)
    assert share_needed(3.0, ((0.5, math.inf), (1.0, 2.0))) == pytest.approx(1.0)


# The ledger


def test_the_cheapest_are_the_first_of_equals_and_at_most_three() -> None:
    trials = Trials(CONFIG, TUNING_SEEDS)
    base = StaticSetting(learning_rate=1e-2, batch_size=8, schedule="linear", warmup_share=0.1, precision="fp32")
    settings = [replace(base, batch_size=batch) for batch in (8, 1, 2, 4, 16)]
    drive(trials.run(settings), lambda spec: made_result(spec, 2.0))
    ledger = made_ledger(PER_STEP)

    cheapest = ledger.cheapest(trials, CURVE, "time_s")
    assert [trial.setting.batch_size for trial in cheapest] == [16, 8, 4]
    alike = made_ledger(PER_TOKEN).cheapest(trials, CURVE, "time_s")
    assert [trial.setting.batch_size for trial in alike] == [8, 1, 2]
    assert ledger.cheapest(trials, CURVE, "time_s", among=()) == []


def test_the_cost_of_a_run_is_its_joules_or_else_its_seconds() -> None:
    result = made_result(RunSpec(config=CONFIG))  # 100 steps

    assert made_ledger(PER_STEP).cost_of(result) == 100
    assert made_ledger(made_table(joules=False, per_step=2.0)).cost_of(result) == 200
    with pytest.raises(ValueError, match="there is no cost table for llama-nano, 16 tokens"):
        made_ledger(None).cost_of(result)


def test_rows_are_noted_once_and_sorted() -> None:
    ledger = made_ledger()
    spec = RunSpec(config=CONFIG)
    for method in ("b", "a", "b"):
        ledger.row(CASE, method, spec)
    ledger.row(CASE, "a", spec, role="curve", budget=0.5)

    assert [(row.method, row.role) for row in ledger.rows] == [("a", "curve"), ("a", "method"), ("b", "method")]
    assert ledger.rows[0].counted_budget == 0.5
