"""Heuristics on schedules worked out by hand, the limits that none may break, and the average of steered runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import live_runs
import numpy as np
import pytest
from fakes import START, make_limits, make_telemetry
from heuristic_runs import CONSTANT, batches, scales, steer

from trainpilot.agents.heuristics import (
    ControlledRun,
    GradualPruning,
    Greedy,
    Heuristic,
    KeepBase,
    NoiseScaleBatch,
    OpenLoop,
    RandomPolicy,
    ReduceOnPlateau,
    SchedulePoint,
    Seesaw,
    average_schedule,
    schedule_from_json,
    schedule_to_json,
    uniform_policy,
)
from trainpilot.envs.action import ACTION_FIELDS
from trainpilot.llm_runtime.config import ControlLimits, Controls, RunConfig
from trainpilot.llm_runtime.schedules import neutral_factor
from trainpilot.llm_runtime.telemetry import Telemetry


def test_keep_base_never_changes_anything() -> None:
    assert set(steer(KeepBase(make_limits()), 10)) == {START}


# GreedyLR


def test_greedy_raises_the_rate_while_the_loss_falls() -> None:
    # With a patience of 1, every second fall or rise of the loss in a row counts.
    losses = [3.0, 2.9, 2.8, 2.7, 2.75, 2.76, 2.77, 2.78, 2.6]
    decided = steer(Greedy(make_limits(), factor=0.5), 10, train_loss=losses)

    assert scales(decided) == [1, 1, 2, 2, 4, 4, 2, 2, 1, 1]
    assert {controls.batch_size for controls in decided} == {8}
    falling = steer(Greedy(make_limits(), factor=0.5), 40, train_loss=[3.0 - 0.01 * i for i in range(40)])
    assert max(scales(falling)) == 64
    for settings, message in (({"factor": 1.0}, r"factor must be in \(0, 1\)"), ({"patience": -1}, "patience must")):
        with pytest.raises(ValueError, match=message):
            Greedy(make_limits(), **settings)


# Reduce on plateau


def test_plateau_halves_after_a_reading_that_is_no_improvement() -> None:
    # An improvement is below 3 x 0.9999 = 2.9997, then below 2.5 x 0.9999 = 2.49975.
    losses = [3.0, 2.9998, 2.9999, 2.5, 2.5001, 2.4998, 2.0]

    decided = steer(ReduceOnPlateau(make_limits()), 8, validation_loss=losses)

    # The cut shows in the decision after the reading.
    assert scales(decided) == [1, 1, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 16, 1 / 16]
    assert {controls.batch_size for controls in decided} == {8}


def test_plateau_counts_small_gains_together() -> None:
    # Each reading gains 0.6 of the threshold on the one before: every second one counts, so no two in a row fail.
    losses = [3.0 * (1 - 0.6e-4) ** i for i in range(20)]
    steerer = ReduceOnPlateau(make_limits(), patience=1)
    assert set(scales(steer(steerer, 20, validation_loss=losses))) == {1.0}


def test_plateau_does_not_count_a_reading_that_is_repeated() -> None:
    # One look in five decisions. Only the first of each five is a reading, the last two without improvement.
    losses = [None] * 4 + [2.9] * 5 + [2.95] * 5 + [2.94] * 5

    decided = steer(ReduceOnPlateau(make_limits()), 20, validation_loss=losses)

    assert scales(decided) == [1.0] * 10 + [0.5] * 5 + [0.25] * 5


def test_plateau_patience_is_the_number_of_failures_let_pass() -> None:
    losses = [3.0, 3.1, 3.2, 3.3, 3.4]
    for patience in (0, 1, 2):
        steerer = ReduceOnPlateau(make_limits(), patience=patience, factor=0.1)
        first_cut = scales(steer(steerer, 6, validation_loss=losses)).index(0.1)
        assert first_cut == 2 + patience


def test_plateau_ends_the_run_after_five_failures_in_a_row() -> None:
    losses = [3.0, 3.1, 2.9, *(3.0 + 0.01 * i for i in range(20))]

    decided = steer(ReduceOnPlateau(make_limits()), 20, validation_loss=losses)

    # One failure, a better reading, then five: there is no decision after the fifth.
    assert scales(decided) == [1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_plateau_ends_the_run_below_a_64th() -> None:
    losses = [3.0 + 0.01 * i for i in range(30)]
    steerer = ReduceOnPlateau(make_limits(), stop_patience=100)

    decided = steer(steerer, 30, validation_loss=losses)

    assert scales(decided) == [1.0] + [2.0**-i for i in range(7)]
    assert steerer.scale == 1 / 128


def test_plateau_without_readings_is_the_base_schedule() -> None:
    assert set(steer(ReduceOnPlateau(make_limits()), 10)) == {START}


def test_a_loss_that_is_no_number_is_no_improvement() -> None:
    decided = steer(ReduceOnPlateau(make_limits()), 20, validation_loss=[3.0, math.nan])
    assert scales(decided) == [1, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]


# Batch by the gradient noise scale


def test_batch_doubles_when_the_smoothed_noise_scale_reaches_the_double() -> None:
    # Geometric mean of three: (8, 8, 64) -> 16, then (8, 64, 64) -> 32, then (64, 64, 4) -> 25.4, below 64.
    decided = steer(NoiseScaleBatch(make_limits(), window=3), 7, noise_scale=[8.0, 8.0, 64.001, 64.0, 4.0, 4.0])

    assert batches(decided) == [8, 8, 8, 16, 32, 32, 32]
    assert set(scales(decided)) == {1.0}


def test_batch_never_falls_when_the_noise_scale_does() -> None:
    decided = steer(NoiseScaleBatch(make_limits(), window=1), 9, noise_scale=[16.001, 0.0, None, 1.0, 0.5])
    assert batches(decided) == [8] + [16] * 8


def test_batch_stays_at_its_start_below_the_noise_scale_of_a_doubling() -> None:
    assert set(batches(steer(NoiseScaleBatch(make_limits()), 20, noise_scale=[15.9]))) == {8}


def test_batch_waits_for_as_many_readings_as_it_smooths_over() -> None:
    decided = steer(NoiseScaleBatch(make_limits()), 10, noise_scale=[None, 1e6])
    assert batches(decided) == [8] * 6 + [16, 32, 32, 32]


def test_batch_by_noise_scale_stays_within_its_limits_on_random_readings() -> None:
    random = np.random.default_rng(0)
    for largest in (8, 20, 32, 128):
        readings = np.exp(random.normal(3, 2, 50)).tolist()
        decided = batches(steer(NoiseScaleBatch(make_limits(max_batch_size=largest)), 50, noise_scale=readings))
        assert all(8 <= size <= largest for size in decided)
        assert all(later in (earlier, 2 * earlier) for earlier, later in pairwise(decided))


# Seesaw

# 0.1 + 0.45 (1 + cos(pi p)) is 1/2 where the cosine is -1/9, 1/4 where it is -2/3, and 1/8 where it is -17/18.
CUT_SHARES = [math.acos(cosine) / math.pi for cosine in (-1 / 9, -2 / 3, -17 / 18)]


def test_seesaw_cuts_where_the_cosine_has_halved() -> None:
    assert pytest.approx([0.5354, 0.7323, 0.8934], abs=5e-5) == CUT_SHARES

    decided = steer(Seesaw(make_limits(max_batch_size=64), CONSTANT), 100)

    # The first of the hundred decisions after each point: 54, 74, 90.
    assert batches(decided) == [8] * 54 + [16] * 20 + [32] * 16 + [64] * 10
    assert scales(decided) == [1.0] * 54 + [0.5] * 20 + [0.25] * 16 + [0.125] * 10


def test_seesaw_lowers_the_learning_rate_by_the_root_of_alpha() -> None:
    decided = steer(Seesaw(make_limits(max_batch_size=64), CONSTANT), 100)
    learning_rates = [c.learning_rate_scale * neutral_factor(c.batch_size, START.batch_size) for c in decided]
    assert [learning_rates[i] for i in (0, 54, 74, 90)] == pytest.approx([1, 2**-0.5, 2**-1, 2**-1.5])


def test_seesaw_cuts_as_the_cosine_does_once_the_batch_is_at_its_limit() -> None:
    decided = steer(Seesaw(make_limits(max_batch_size=16), CONSTANT), 100)
    learning_rates = [c.learning_rate_scale * neutral_factor(c.batch_size, START.batch_size) for c in decided]
    assert batches(decided) == [8] * 54 + [16] * 46
    assert [learning_rates[i] for i in (54, 74, 90)] == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5])


def test_seesaw_by_fours_has_one_cut_before_a_tenth() -> None:
    decided = steer(Seesaw(make_limits(), CONSTANT, alpha=4), 100)
    assert batches(decided) == [8] * 74 + [32] * 26
    assert scales(decided) == [1.0] * 74 + [0.25] * 26


def test_seesaw_takes_warm_up_for_no_cut_and_begins_the_cosine_after_it() -> None:
    config = RunConfig(**vars(CONSTANT) | {"warmup_tokens": 20_000})
    steerer = Seesaw(make_limits(max_batch_size=64), config)
    # The first cut comes at 0.2 + 0.8 x 0.5354 = 0.6283 of the budget.
    assert [steerer.cuts(tokens) for tokens in (0, 100, 19_999, 20_000, 62_800, 62_900)] == [0, 0, 0, 0, 0, 1]
    assert batches(steer(steerer, 100)).index(16) == 63


def test_seesaw_gives_a_live_run_the_learning_rates_that_it_promises(tmp_path: Path) -> None:
    config = live_runs.case(tmp_path, schedule="constant", tokens=6_400, warmup_tokens=0)
    run = live_runs.live_run(config)
    steerer = Seesaw(run.base_limits(), config)
    measured: list[Telemetry] = []
    while not run.finished:
        controls = steerer.decide(measured[-1] if measured else None)
        assert controls is not None
        measured.append(run.advance(controls, 1 / config.decisions))

    # 400 sequences in ten intervals: four steps of at most 10, so the third doubling to 16 does not fit.
    assert [telemetry.requested.batch_size for telemetry in measured] == [2] * 6 + [4] * 2 + [8] * 2
    promised = [1.0] * 6 + [2**-0.5] * 2 + [2**-1, 2**-2]
    assert [telemetry.learning_rate / 1e-2 for telemetry in measured] == pytest.approx(promised)


# Gradual pruning


def test_pruning_follows_the_cubic_from_a_quarter_to_three_quarters() -> None:
    decided = steer(GradualPruning(make_limits(decisions=8)), 8)
    # Interval i ends at (i + 1) / 8, so that 1 - progress is 1, 3/4, 1/2, 1/4, 0 at the end of intervals 1 to 5.
    expected = [0, 0, *(0.5 * (1 - left**3) for left in (0.75, 0.5, 0.25)), 0.5, 0.5, 0.5]
    assert [controls.sparsity for controls in decided] == pytest.approx(expected)


def test_pruning_begins_and_ends_where_it_is_told() -> None:
    steerer = GradualPruning(make_limits(decisions=100), final_sparsity=0.8, start=0.1, end=0.3)
    sparsity = [controls.sparsity for controls in steer(steerer, 100)]
    # An interval's sparsity is the one at its end: the tenth ends at 0.1, the thirtieth at 0.3.
    assert max(sparsity[:10]) == pytest.approx(0)
    assert 0 < sparsity[10] < sparsity[28] < 0.8
    assert sparsity[29:] == pytest.approx([0.8] * 71)
    assert sparsity == sorted(sparsity)


# Random


def test_random_policy_is_the_same_for_the_same_seed() -> None:
    runs = [steer(RandomPolicy(make_limits(decisions=40), seed), 40) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("seed", range(5))
def test_random_policy_is_never_refused(seed: int) -> None:
    steerer = RandomPolicy(make_limits(masked_precisions={"fp16": "a test"}), seed)
    refusals = []
    telemetry = None
    for decision in range(50):
        controls = steerer.decide(telemetry)
        assert steerer.controller.decision is not None
        refusals += steerer.controller.decision.refusals
        telemetry = make_telemetry(decision=decision, budget_used=(decision + 1) / 50, requested=controls)
    assert refusals == []


def test_random_policy_takes_all_allowed_choices_equally_often() -> None:
    masks = np.ones(sum(len(field.choices) for field in ACTION_FIELDS), dtype=bool)
    masks[[0, 1, 8]] = False  # two learning-rate factors, and keeping the batch
    policy = uniform_policy(0)
    drawn = np.array([policy(np.zeros(1), masks) for _ in range(5_000)])

    rates, sizes = (np.bincount(drawn[:, column]) for column in (0, 1))

    assert rates.tolist()[:2] == [0, 0]
    assert rates[2:] == pytest.approx([1_000] * 5, rel=0.15)
    assert (sizes[0], sizes[1]) == pytest.approx((2_500, 0), rel=0.1)


# All of them, and the replay of a schedule


def rules(limits: ControlLimits) -> dict[str, Heuristic]:
    schedule = [
        SchedulePoint(share=i / 10, learning_rate_scale=2**i, batch_factor=2**i, sparsity=i / 10) for i in range(9)
    ]
    return {
        "keep": KeepBase(limits),
        "plateau": ReduceOnPlateau(limits),
        "noise-batch": NoiseScaleBatch(limits),
        "seesaw": Seesaw(limits, CONSTANT),
        "gradual-pruning": GradualPruning(limits),
        "random": RandomPolicy(limits, 0),
        "open-loop": OpenLoop(schedule, limits),
    }


@pytest.mark.parametrize("name", rules(make_limits()))
@pytest.mark.parametrize(("smallest", "largest"), [(8, 8), (1, 20), (4, 64)])
def test_no_rule_breaks_a_limit(name: str, smallest: int, largest: int) -> None:
    limits = make_limits(
        min_batch_size=smallest, max_batch_size=largest, decisions=50, masked_precisions={"fp16": "a test"}
    )
    random = np.random.default_rng(3)
    series = {
        "noise_scale": np.exp(random.normal(4, 2, 50)).tolist(),
        "validation_loss": (3 + 0.01 * random.normal(size=50)).tolist(),
    }
    decided = steer(rules(limits)[name], 50, **series)
    assert decided
    assert all(smallest <= c.batch_size <= largest for c in decided)
    assert all(2.0**-6 <= c.learning_rate_scale <= 2.0**6 and c.precision != "fp16" for c in decided)
    assert all(earlier.sparsity <= later.sparsity < 0.9 + 1e-9 for earlier, later in pairwise(decided))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReduceOnPlateau(make_limits(), factor=1.0), "factor must be in"),
        (lambda: ReduceOnPlateau(make_limits(), patience=5), "patience must be in"),
        (lambda: NoiseScaleBatch(make_limits(), window=0), "window must be at least 1"),
        (lambda: Seesaw(make_limits(), RunConfig()), "schedule must be constant for Seesaw.* got linear"),
        (lambda: Seesaw(make_limits(), CONSTANT, alpha=1), "alpha must be a whole number of at least 2"),
        (lambda: GradualPruning(make_limits(pruning="none")), "pruning must be magnitude, evolution or width"),
        (lambda: GradualPruning(make_limits(), final_sparsity=1.0), "final_sparsity must be in"),
        (lambda: GradualPruning(make_limits(), start=0.8), "0 <= start < end <= 1, got 0.8 and 0.75"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_rules_can_be_imported_without_torch() -> None:
    code = "import sys, trainpilot.agents.heuristics, trainpilot.agents.heuristics; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Open loop: the average of steered runs -----------------------------------------------------------------------------


def test_average_of_two_runs_worked_out_by_hand() -> None:
    first = [
        Controls(batch_size=8, learning_rate_scale=1.0, precision="fp32"),
        Controls(batch_size=16, learning_rate_scale=4.0, precision="bf16", sparsity=0.1),
        Controls(batch_size=32, learning_rate_scale=4.0, precision="bf16", sparsity=0.3, finish=True),
    ]
    second = [
        Controls(batch_size=2, learning_rate_scale=1.0, precision="fp32"),
        Controls(batch_size=2, learning_rate_scale=1.0, precision="fp32", sparsity=0.2),
        Controls(batch_size=2, learning_rate_scale=0.25, precision="bf16", sparsity=0.2),
        Controls(batch_size=1, learning_rate_scale=0.25, precision="bf16", sparsity=0.3),
    ]
    runs = [ControlledRun(start_batch_size=8, controls=first), ControlledRun(start_batch_size=2, controls=second)]

    schedule = average_schedule(runs, decisions=4)

    assert [point.share for point in schedule] == [0.0, 0.25, 0.5, 0.75]
    # Roots of 1 x 1, 4 x 1, 4 x 1/4, and once more 4 x 1/4: the first run counts on with its last controls.
    assert [point.learning_rate_scale for point in schedule] == pytest.approx([1, 2, 1, 1])
    # Roots of 1 x 1, 2 x 1, 4 x 1, 4 x 1/2.
    assert [point.batch_factor for point in schedule] == pytest.approx([1, math.sqrt(2), 2, math.sqrt(2)])
    assert [point.sparsity for point in schedule] == pytest.approx([0, 0.15, 0.25, 0.3])
    # One of each in the second decision: the more exact one.
    assert [point.precision for point in schedule] == ["fp32", "fp32", "bf16", "bf16"]
    assert [point.finish for point in schedule] == [False, False, True, True]


def test_cool_down_begins_when_half_of_the_runs_have_begun_theirs() -> None:
    def run(finish_at: int) -> ControlledRun:
        controls = [Controls(batch_size=8, finish=index >= finish_at) for index in range(min(finish_at + 2, 10))]
        return ControlledRun(start_batch_size=8, controls=controls)

    for finish_at, expected in (((2, 4, 7), 4), ((2, 4, 7, 9), 4), ((2, 99, 99), None)):
        finishes = [point.finish for point in average_schedule([run(at) for at in finish_at], decisions=10)]
        assert (finishes.index(True) if True in finishes else None) == expected
        assert finishes == sorted(finishes)


def test_the_average_of_one_run_replays_that_run() -> None:
    limits = make_limits(decisions=30, masked_precisions={})
    for seed in range(5):
        decided = steer(RandomPolicy(limits, seed), 30)
        schedule = average_schedule([ControlledRun(start_batch_size=8, controls=decided)], decisions=30)
        again = steer(OpenLoop.from_json(json.loads(json.dumps(schedule_to_json(schedule))), limits), 30)
        assert batches(again) == batches(decided)
        assert scales(again) == pytest.approx(scales(decided))
        for name in ("precision", "finish"):
            assert [getattr(c, name) for c in again] == [getattr(c, name) for c in decided]
        assert [c.sparsity for c in again] == pytest.approx([c.sparsity for c in decided])


def test_schedule_goes_to_json_and_back() -> None:
    schedule = (SchedulePoint(share=0.0), SchedulePoint(share=0.5, batch_factor=2.0, precision="bf16", finish=True))
    record = json.loads(json.dumps(schedule_to_json(schedule)))
    assert schedule_from_json(record) == schedule
    assert OpenLoop.from_json(record, make_limits()).to_json() == record


def test_open_loop_clips_what_this_run_cannot_do() -> None:
    wild = {"share": 0.0, "learning_rate_scale": 1e3, "batch_factor": 100.0, "sparsity": 0.99, "precision": "bf16"}
    limits = make_limits(masked_precisions={"bf16": "a test"}, max_batch_size=20)
    assert steer(OpenLoop.from_json([wild | {"finish": True}], limits), 10) == [
        Controls(batch_size=16, learning_rate_scale=64.0, sparsity=0.9, finish=decision >= 2) for decision in range(10)
    ]
    dense = make_limits(pruning="none", start=Controls(batch_size=6), min_batch_size=1)
    low = wild | {"learning_rate_scale": 1e-3, "batch_factor": 0.01}
    # Six sequences can be halved once.
    expected = Controls(batch_size=3, learning_rate_scale=1 / 64, precision="bf16")
    assert steer(OpenLoop.from_json([low], dense), 1) == [expected]


@pytest.mark.parametrize(("factor", "size"), [(0.6, 4), (0.8, 8), (2**0.5, 8), (1.42, 16), (2.8, 16), (2.9, 32)])
def test_open_loop_takes_the_batch_nearest_in_ratio(factor: float, size: int) -> None:
    assert batches(steer(OpenLoop([SchedulePoint(share=0.0, batch_factor=factor)], make_limits()), 1)) == [size]


@pytest.mark.parametrize("decisions", [5, 10, 20])
def test_open_loop_fits_runs_with_another_number_of_decisions(decisions: int) -> None:
    # Ten points, the scale of each its own number.
    schedule = [SchedulePoint(share=i / 10, learning_rate_scale=i + 1) for i in range(10)]
    decided = steer(OpenLoop(schedule, make_limits(decisions=decisions)), decisions)
    # An interval takes the last point before its middle. The middles of five are points themselves: not before.
    expected = {5: [1, 3, 5, 7, 9], 10: list(range(1, 11)), 20: [i // 2 + 1 for i in range(20)]}
    assert scales(decided) == expected[decisions]


def test_open_loop_never_unprunes_and_never_takes_a_cool_down_back() -> None:
    schedule = [
        SchedulePoint(share=0.0),
        SchedulePoint(share=0.3, sparsity=0.4, finish=True),
        SchedulePoint(share=0.6, sparsity=0.1),
    ]
    decided = steer(OpenLoop(schedule, make_limits()), 10)
    assert [c.sparsity for c in decided] == [0.0] * 3 + [0.4] * 7
    assert [c.finish for c in decided] == [False] * 3 + [True] * 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OpenLoop([], make_limits()), "schedule must begin at share 0"),
        (lambda: OpenLoop([SchedulePoint(share=0.1)], make_limits()), "schedule must begin at share 0"),
        (lambda: schedule_from_json([{"share": 0.0, "speed": 1}]), "schedule points must have share"),
        (lambda: schedule_from_json([{"share": 0.0, "batch_factor": "2"}]), "batch_factor must be a positive number"),
        (lambda: schedule_from_json([{"share": 0.0, "precision": "int1"}]), "precision must be one of"),
        (lambda: schedule_from_json([{"share": 1.0}]), "share must be in"),
        (lambda: schedule_from_json([{"share": 0.0, "finish": 1}]), "finish must be true or false"),
        (lambda: average_schedule([], 10), "runs must be at least one"),
        (lambda: average_schedule([ControlledRun(start_batch_size=8, controls=[START] * 3)], 2), "got intervals"),
    ],
)
def test_open_loop_refuses_what_makes_no_sense(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
