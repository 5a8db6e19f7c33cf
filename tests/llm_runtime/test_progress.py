"""Progress through budgets of tokens, seconds and joules: numbers worked out by hand with a clock that a test sets."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fakes import SetClock, SetMeter

from trainpilot.llm_runtime.budget import Budget, Gauge
from trainpilot.llm_runtime.energy.meter import NoMeter
from trainpilot.llm_runtime.progress import BudgetProgress, MeasuredProgress, TokenProgress
from trainpilot.llm_runtime.schedules import PARTS, Schedule, ScheduleName

BATCH = 8


class Run:
    """A run of 100 s (or joules) in four intervals, whose steps cost what a test says."""

    def __init__(self, budget: str = "100s", schedule: ScheduleName = "linear", decisions: int = 4) -> None:
        self.clock, self.meter = SetClock(), SetMeter()
        parsed = Budget.parse(budget)
        self.joules = parsed.currency == "energy_j"
        self.progress = MeasuredProgress(
            schedule=Schedule(name=schedule, budget_tokens=PARTS, warmup_tokens=PARTS // 10),
            budget=parsed,
            sequence_length=10,
            decisions=decisions,
        )
        self.readings = 0
        wait = self._count
        meter = self.meter if self.joules else NoMeter("seconds need none")
        self.progress.gauge = Gauge(parsed.currency, self.clock, meter, wait=wait)
        self.factors: list[float] = []

    def _count(self) -> None:
        self.readings += 1

    def pass_by(self, cost: float) -> None:
        self.clock.now_s += cost
        assert self.meter.energy_j is not None
        self.meter.energy_j += cost

    def interval(self, step_cost: float, most: int = 10**6) -> int:
        """Train one interval, and return its steps."""
        self.progress.begin_interval()
        steps = 0
        while (steps == 0 or not self.progress.interval_over) and steps < most:
            self.step(step_cost)
            steps += 1
        self.progress.decision += 1
        return steps

    def step(self, cost: float) -> None:
        self.progress.begin_step()
        self.factors.append(self.progress.factor(BATCH))
        self.pass_by(cost)
        self.progress.end_step(self.progress.step_sequences(BATCH))

    def evaluate(self, cost: float) -> None:
        before = self.progress.read()
        self.pass_by(cost)
        self.progress.end_evaluation(before)


@pytest.mark.parametrize("budget", ["100s", "100J"])
def test_even_steps_share_the_budget_evenly_and_follow_the_schedule(budget: str) -> None:
    run = Run(budget)
    run.progress.expect(1.0, BATCH)
    assert run.progress.expected_sequences == 800
    assert [run.interval(1.0) for _ in range(4)] == [25, 25, 25, 25]
    assert run.progress.finished
    assert run.progress.used == pytest.approx(1.0)
    assert (run.progress.sequences, run.progress.tokens, run.progress.end) == (800, 8_000, 800)
    # Warm-up over 10 steps that counts the step itself, then a line to zero over 90 that does not.
    assert run.factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert run.factors[55] == pytest.approx(1 - 45 / 90)
    assert run.factors[99] == pytest.approx(1 / 90, abs=1e-6)


def test_a_reading_is_made_each_time_half_of_what_is_left_is_done() -> None:
    run = Run()
    assert run.interval(0.025) == 1_000
    assert run.readings <= 13, "once at the beginning, then about log2 of 1,000 times"


@pytest.mark.parametrize("cost", [0.3, 0.7, 1.9, 3.0])
def test_a_run_ends_within_half_a_step_of_its_budget(cost: float) -> None:
    run = Run()
    for _ in range(4):
        assert not run.progress.finished
        run.interval(cost)
    assert run.progress.finished
    assert run.clock.now_s == pytest.approx(100, abs=cost / 2 + 1e-9)


def test_dearer_steps_and_stalls_change_the_number_of_steps_not_the_end() -> None:
    run = Run()
    steps = [run.interval(0.1), run.interval(0.25), run.interval(0.2)]
    run.pass_by(10.0)  # something outside of the steps
    steps.append(run.interval(0.2))
    # Of 100 s: 25 at 0.1 s, 25 at 0.25 s, 25 at 0.2 s; 10 elsewhere leave 15 at 0.2 s.
    assert steps == [250, 100, 125, 75]
    assert run.progress.finished
    assert run.clock.now_s == pytest.approx(100, abs=0.2)


def test_what_one_interval_uses_too_much_the_others_share() -> None:
    run = Run()
    assert run.interval(31.0) == 1  # planned: 25
    ends = []
    for _ in range(3):
        run.interval(0.5)
        ends.append(run.clock.now_s)
    assert ends == pytest.approx([54.0, 77.0, 100.0], abs=0.3)


def test_the_first_evaluation_is_free_and_its_cost_is_kept_for_the_last() -> None:
    run = Run()
    run.evaluate(6.0)
    run.pass_by(1_000.0)  # before the first step, too
    assert (run.progress.spent, run.progress.used) == (0.0, 0.0)
    begun_s = run.clock.now_s
    assert run.interval(0.5) == 47  # a quarter of 94
    run.evaluate(4.0)
    # 96 s for steps and this evaluation, of which 23.5 + 4 are used: the other three share 68.5.
    assert run.interval(0.5) == 46
    run.interval(0.5)
    run.interval(0.5)
    assert run.progress.finished
    assert run.clock.now_s - begun_s == pytest.approx(96.0, abs=0.5)
    run.evaluate(4.0)
    assert run.progress.finished
    assert run.progress.spent == pytest.approx(100.0, abs=0.5)


def test_a_cool_down_takes_a_fifth_of_what_was_used_and_ends_the_run() -> None:
    run = Run(schedule="constant", decisions=10)
    for _ in range(5):
        run.interval(0.5)
    run.factors.clear()
    run.progress.begin_cooldown(BATCH)
    assert run.interval(0.5) == 20  # all of 10 s are one interval
    assert run.progress.finished
    assert run.factors[0] == pytest.approx(1.0)
    assert run.factors[10] == pytest.approx(0.5, abs=0.01)
    assert run.clock.now_s == pytest.approx(60, abs=0.3)


def test_the_expected_end_follows_the_pace() -> None:
    run = Run()
    assert run.progress.end == 1, "nothing is known yet, and it is not over"
    run.interval(1.0)
    assert run.progress.end == 800
    run.interval(0.5)
    assert run.progress.end == pytest.approx(1_200, abs=8)


def test_a_saved_run_goes_on_in_another_process_without_the_time_between() -> None:
    run = Run()
    run.evaluate(2.0)
    run.interval(0.5)
    run.interval(0.5, most=20)
    run.progress.decision -= 1  # it was cut short
    state = json.loads(json.dumps(run.progress.state_dict()))
    other = Run()
    other.clock.now_s = 50_000.0
    other.progress.load_state_dict(state)
    other.pass_by(77.0)
    assert other.progress.used == pytest.approx(run.progress.used)
    assert other.progress.interval_progress == pytest.approx(run.progress.interval_progress)
    while not other.progress.interval_over:
        other.step(0.5)
    other.progress.decision += 1
    begun_s, used = other.clock.now_s, other.progress.used
    assert used == pytest.approx(0.5, abs=0.01)
    other.interval(0.5)
    other.interval(0.5)
    assert other.progress.finished
    assert other.clock.now_s - begun_s == pytest.approx(98 * (1 - used), abs=0.5)


def test_going_back_brings_no_seconds_back_and_leaves_the_run_its_end() -> None:
    run = Run()
    run.interval(0.5)
    state = run.progress.state_dict()
    run.interval(0.5)
    run.progress.load_state_dict(state)
    assert (run.progress.decision, run.progress.sequences) == (1, 50 * BATCH)
    assert run.progress.spent == pytest.approx(50.0, abs=0.5)
    assert [run.interval(0.5) for _ in range(3)] == pytest.approx([33, 33, 34], abs=1)
    assert run.progress.finished
    assert run.clock.now_s == pytest.approx(100.0, abs=0.5)


def test_a_clock_that_stands_still_ends_no_interval() -> None:
    run = Run()
    assert run.interval(0.0, most=50) == 50
    assert not run.progress.finished


def test_tokens_are_whole_sequences() -> None:
    schedule = Schedule(name="linear", budget_tokens=1_000, warmup_tokens=0)
    progress: BudgetProgress = TokenProgress(schedule=schedule, budget=100, sequence_length=10, decisions=3)
    told: list[tuple[Any, ...]] = []
    while not progress.finished:
        progress.begin_interval()
        while not progress.interval_over:
            progress.begin_step()
            progress.end_step(progress.step_sequences(16))
        progress.decision += 1
        told.append((progress.sequences, progress.used, progress.begun_share))
    assert told == [(48, 0.48, 0.0), (80, 0.8, 0.48), (100, 1.0, 0.8)]
    assert (progress.currency, progress.read(), progress.end) == ("tokens", 0.0, 100)
