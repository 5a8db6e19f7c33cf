from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from second_physics.law import LAW_NAMES, PUBLISHED_FITS, LawBatch, wsd_mean_factor
from second_physics.runs import MultiPowerRuns

from trainpilot.llm_runtime.schedules import Cooldown, Schedule
from trainpilot.llm_runtime.simulator.records import ControlBatch, TelemetryBatch

N = 64


def published(size: str, edge: float = 1e9) -> LawBatch:
    constants = {name: np.array([value]) for name, value in zip(LAW_NAMES, PUBLISHED_FITS[size], strict=True)}
    return LawBatch(**constants, initial_loss=np.array([10.8]), edge=np.array([edge]))


def runs(n_runs: int = N, **options) -> MultiPowerRuns:
    return MultiPowerRuns(n_runs, 3, **{"noise": 0.0, **options})


def drawn_like(source: MultiPowerRuns, rows: np.ndarray) -> MultiPowerRuns:
    return MultiPowerRuns(len(rows), noise=0.0, draw=lambda *_: source.cases.take(rows))


def controls(
    plants: MultiPowerRuns, scale: float | np.ndarray = 1.0, batch: int = 1, finish: bool = False
) -> ControlBatch:
    start = plants.limits().start
    return replace(
        start,
        learning_rate_scale=start.learning_rate_scale * scale,
        batch_size=start.batch_size * batch,
        finish=np.full(plants.n_runs, finish),
    )


def train(plants: MultiPowerRuns, n: int, **asked) -> list[TelemetryBatch]:
    return [plants.advance(controls(plants, **asked)) for _ in range(n)]


@pytest.mark.parametrize(("size", "measured"), [("25M", 3.3473), ("100M", 3.0354)])
def test_a_constant_learning_rate_gives_the_published_end(size: str, measured: float) -> None:
    law = published(size)
    path = np.array([3e-4 * (24_000 - 2_160 / 2)])  # the warm-up counts half

    loss = law.loss(path, np.full((1, 1), 3e-4), np.full((1, 1), 3e-4), path[:, None])[0]

    floor, scale, alpha, noise, rate, beta, gamma = PUBLISHED_FITS[size]
    s = 6.876
    by_hand = floor + scale * s**-alpha + noise * 3e-4 * (1 - (1 + rate * 3e-4**-gamma * s) ** -beta)
    assert loss == pytest.approx(by_hand, rel=1e-9)
    assert loss == pytest.approx(measured, abs=0.005)  # last point of constant_24000 in the public repository


def test_no_run_starts_above_its_initial_loss() -> None:
    law, none = published("100M"), np.zeros((1, 1))

    assert law.loss(np.zeros(1), none, none, none)[0] == pytest.approx(10.8)


def test_a_step_helps_most_at_the_edge_and_alike_at_ten_times_and_a_tenth() -> None:
    law = published("100M", edge=1e-3)

    at_edge, high, low = (law.progress(np.array([rate]))[0] for rate in (1e-3, 1e-2, 1e-4))

    assert at_edge == pytest.approx(5e-4)
    assert high == pytest.approx(low) == pytest.approx(1e-2 / 101)


@pytest.mark.parametrize(("start", "end"), [(0, 20), (40, 60), (300, 340), (840, 860), (980, 1_000)])
def test_the_mean_factor_is_that_of_the_schedule_over_its_steps(start: int, end: int) -> None:
    schedule = Schedule(name="wsd", budget_tokens=1_000, warmup_tokens=100)
    step, factors = 4, [schedule.factor(t, 4) for t in range(start, end, 4)]

    mean = wsd_mean_factor(*(np.array([float(v)]) for v in (start, end, step, 1_000, 100)))

    assert mean[0] == pytest.approx(np.mean(factors), abs=1e-12)


def test_keeping_the_base_schedule_is_the_reference_run() -> None:
    plants = runs()

    telemetry = train(plants, 50)

    assert plants.finished.all()
    np.testing.assert_allclose(plants.evaluate(), plants.reference_losses[:, 2], atol=5e-3)
    np.testing.assert_allclose(
        sum(t.time_s for t in telemetry), plants.reference_time_s, rtol=0.02
    )  # a reference is not probed
    assert (np.diff(plants.reference_losses, axis=1) < 0).all()


def test_a_run_in_a_batch_is_the_run_alone() -> None:
    together = runs(5)
    alone = [drawn_like(together, np.array([i])) for i in range(5)]
    random = np.random.default_rng(0)
    for decision in range(20):
        scale, grown = 2 ** random.uniform(-2, 2, 5), random.integers(0, 2, 5)
        asked = controls(together, scale=scale)
        asked.batch_size = asked.batch_size << grown
        asked.finish = np.arange(5) < decision - 14  # one after the other cools down
        seen = together.advance(asked)
        for i, one in enumerate(alone):
            mine = one.advance(ControlBatch.of([asked.row(i)]))
            assert mine.train_loss[0] == pytest.approx(seen.train_loss[i], rel=1e-12)
            assert mine.energy_j[0] == pytest.approx(seen.energy_j[i], rel=1e-12)
            assert mine.finished[0] == seen.finished[i]
    np.testing.assert_allclose([one.evaluate()[0] for one in alone], together.evaluate(), rtol=1e-12)


def test_the_best_learning_rate_ends_lowest_among_starts() -> None:
    ends = {}
    best = runs()
    for ratio in (0.1, 0.5, 1.0, 2.0, 10.0):
        cases = best.cases.take(np.arange(N))
        cases.start_ratio = np.full(N, ratio)
        plants = MultiPowerRuns(N, noise=0.0, draw=lambda *_, cases=cases: cases)
        np.testing.assert_allclose(plants.start_learning_rate, ratio * plants.best_learning_rate)
        train(plants, 50)
        ends[ratio] = plants.evaluate()

    assert (ends[1.0] < np.minimum(ends[0.5], ends[2.0])).all()
    assert (ends[0.5] < ends[0.1]).all()
    assert (ends[2.0] < ends[10.0]).all()


def test_correcting_the_start_beats_the_base_schedule() -> None:
    plants = runs()
    off = np.abs(np.log(plants.cases.start_ratio)) > 0.7

    train(plants, 50, scale=1 / plants.cases.start_ratio)

    assert (plants.evaluate() < plants.reference_losses[:, 2])[off].all()


def test_starts_lie_within_the_range_of_the_best() -> None:
    ratio = runs(start_range=4.0).cases.start_ratio

    assert ((ratio > 0.25) & (ratio < 4.0)).all()
    assert ratio.min() < 0.5
    assert ratio.max() > 2


def test_larger_batch_is_neutral_below_the_critical_one_and_waste_above() -> None:
    ends = {}
    for critical in (1e-3, 1e6):
        for batch in (1, 2):
            cases = runs().cases
            cases.critical_ratio = np.full(N, critical)
            plants = MultiPowerRuns(N, noise=0.0, draw=lambda *_, cases=cases: cases)
            train(plants, 50, batch=batch)
            ends[critical, batch] = plants.evaluate()

    np.testing.assert_allclose(ends[1e6, 2], ends[1e6, 1], atol=0.02)
    assert (ends[1e-3, 2] > ends[1e-3, 1] + 0.005).all()


def test_larger_batch_takes_the_root_in_learning_rate_and_fewer_steps() -> None:
    small, large = (train(runs(), 8, batch=batch)[-1] for batch in (1, 2))

    np.testing.assert_allclose(large.learning_rate / small.learning_rate, math.sqrt(2))
    assert (large.steps < small.steps).all()
    assert (large.time_s < small.time_s).all()
    assert (large.power_w > small.power_w).all()


def test_signs_rise_with_the_learning_rate() -> None:
    plants = runs()
    low, high = (train(drawn_like(plants, np.arange(N)), 9, scale=scale)[-1] for scale in (0.5, 1.0))

    np.testing.assert_allclose(high.relative_update, 2 * low.relative_update)
    curvature = [t.probe_quadratic / -t.probe_linear for t in (low, high)]
    assert (curvature[1] > curvature[0]).all()
    at_best = plants.cases.relative_update * plants.start_learning_rate / plants.best_learning_rate
    np.testing.assert_allclose(high.relative_update, at_best)


def test_the_noise_scale_rises_as_the_loss_falls() -> None:
    telemetry = train(runs(), 50)

    assert (telemetry[40].noise_scale > telemetry[10].noise_scale).all()
    assert (telemetry[40].train_loss < telemetry[10].train_loss).all()


def test_loss_rises_at_once_when_the_learning_rate_jumps_over_its_best() -> None:
    plants = runs()
    at_best = 1 / plants.cases.start_ratio
    before = train(plants, 25, scale=at_best)[-1].train_loss

    after = train(plants, 1, scale=8 * at_best)[-1].train_loss

    assert (after > before + 0.05).all()


def test_far_beyond_the_edge_a_run_diverges_and_waits_for_a_reset() -> None:
    plants = runs()
    for _ in range(6):
        telemetry = plants.advance(controls(plants, scale=200 / plants.cases.start_ratio))
    assert telemetry.diverged.all()
    assert np.isnan(telemetry.train_loss).all()
    assert np.isnan(plants.evaluate()).all()
    tokens = telemetry.tokens

    waiting = train(plants, 1)[-1]
    np.testing.assert_array_equal(waiting.tokens, tokens)
    assert not waiting.interval_tokens.any()

    plants.begin(np.array([0]))
    telemetry = train(plants, 1)[-1]
    assert telemetry.decision[0] == 0
    assert telemetry.diverged.tolist() == [False] + [True] * (N - 1)


def test_a_cool_down_falls_to_zero_over_a_fifth_of_what_came_before() -> None:
    plants = runs()
    train(plants, 25)
    begun = plants.state.sequences.copy()
    last = [train(plants, 1, finish=True)[-1] for _ in range(6)]

    assert last[0].finishing.all()
    assert last[-1].finished.all()
    np.testing.assert_allclose(plants.state.sequences, 1.2 * begun, atol=1.0)
    batch = int(plants.cases.batch_size[0])
    schedule = Schedule(
        name="wsd",
        budget_tokens=int(plants.cases.n_sequences[0]),
        warmup_tokens=int(plants.cases.n_sequences[0]) // 10,
    )
    cooldown = Cooldown.begin(schedule, int(begun[0]), batch)
    seen = int(last[1].tokens[0] / 128) - batch  # start of the last step
    expected = plants.start_learning_rate[0] * cooldown.factor(seen)
    assert last[1].learning_rate[0] == pytest.approx(expected, rel=0.01)


def test_a_cool_down_lowers_the_loss() -> None:
    cooled, going = runs(), runs()
    for plants in (cooled, going):
        train(plants, 30, scale=1 / plants.cases.start_ratio)
    for plants, finish in ((cooled, True), (going, False)):
        train(plants, 7, scale=1 / plants.cases.start_ratio, finish=finish)

    assert cooled.finished.all()
    assert (cooled.evaluate() < going.evaluate()).all()


def test_limits_keep_the_batch_within_16_and_4_steps_in_an_interval() -> None:
    limits, cases = runs().limits(), runs().cases

    assert (limits.min_batch_size == np.maximum(cases.batch_size // 16, 1)).all()
    assert (limits.max_batch_size <= 16 * cases.batch_size).all()
    grown = limits.max_batch_size > cases.batch_size
    assert grown.any()
    assert ((cases.n_sequences // 50 // limits.max_batch_size)[grown] >= 4).all()
    assert not limits.prunes.any()
    assert not limits.masked_precisions[:, 0].any()


def test_an_evaluation_enters_the_next_telemetry_of_its_rows_alone() -> None:
    plants = runs()
    train(plants, 3)

    loss = plants.evaluate(np.array([1, 4]))
    seen = train(plants, 1)[-1]

    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(seen.validation_loss)), [1, 4])
    np.testing.assert_array_equal(seen.validation_loss[[1, 4]], loss)
    np.testing.assert_array_equal(np.flatnonzero(seen.evaluation_time_s), [1, 4])
    assert not train(plants, 1)[-1].evaluation_time_s.any()


def test_a_switch_of_precision_takes_time_once() -> None:
    plants = runs()
    asked = replace(plants.limits().start, precision=np.full(N, 2))

    first, second = plants.advance(asked), plants.advance(asked)

    assert (first.switch_time_s > 0).all()
    assert not second.switch_time_s.any()
    faster = plants.cases.bf16_speed > 1.05
    assert (second.time_s < train(runs(), 2)[-1].time_s)[faster].all()


def test_the_same_seed_gives_the_same_runs_whatever_is_done_to_them() -> None:
    first, second = (MultiPowerRuns(4, 7) for _ in range(2))
    train(first, 3, scale=0.5)
    train(second, 5)
    for plants in (first, second):
        plants.begin(np.arange(4))

    np.testing.assert_array_equal(first.best_learning_rate, second.best_learning_rate)
    assert not np.array_equal(first.best_learning_rate, MultiPowerRuns(4, 8).best_learning_rate)


def test_what_is_measured_scatters_around_what_holds() -> None:
    exact, measured = (drawn_like(runs(), np.arange(N)) for _ in range(2))
    measured.noise = 1.0
    for _ in range(10):
        truth, seen = (plants.advance(controls(plants)) for plants in (exact, measured))

    error = (seen.train_loss - truth.train_loss) / (truth.train_loss_std / np.sqrt(truth.steps))
    assert 0.6 < error.std() < 1.4
    np.testing.assert_array_equal(exact.evaluate(), measured.evaluate())


def test_a_run_begun_anew_leaves_the_others_as_they_are() -> None:
    plants, undisturbed = runs(), runs()
    for each in (plants, undisturbed):
        train(each, 5)
    plants.begin(np.array([2]))
    rest = np.arange(N) != 2

    for each in (plants, undisturbed):
        train(each, 5)

    np.testing.assert_array_equal(plants.evaluate()[rest], undisturbed.evaluate()[rest])
    assert plants.state.decision[2] == 5


@pytest.mark.parametrize("option", ["n_runs", "decisions", "start_range"])
def test_counts_and_ranges_below_one_are_refused(option: str) -> None:
    options: dict[str, Any] = {"n_runs": 2, option: 0}

    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        MultiPowerRuns(**options)
