"""Real runs under budgets of seconds and joules: they end where they should, with their schedule at its end.

How near a run ends by the system's clock is measured by `benchmarks/measured_budgets.py`. Here a clock advances by the
same time with each pass through the model, so that it does not matter how busy the machine is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import PassClock
from live_runs import LLAMA, case

from trainpilot.llm_runtime import live_run as live_run_module
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.drive import DrivenInterval, drive
from trainpilot.llm_runtime.energy.host import CpuEstimateMeter
from trainpilot.llm_runtime.energy.meter import NoMeter
from trainpilot.llm_runtime.live_run import LiveRun

NEAR = 0.01
"""Relative distance from the budget: two steps or so."""


@pytest.fixture(name="clock")
def a_clock() -> Iterator[PassClock]:
    with PassClock() as clock:
        yield clock


def config_of(folder: Path, budget: str, **options: Any) -> RunConfig:
    return case(folder, LLAMA, budget=budget, schedule="linear", **options)


def train(run: LiveRun, *, most: int = 100, pause: Callable[[], object] = lambda: None) -> list[DrivenInterval]:
    """Train at most so many intervals under the base schedule, from where the run is, with a pause after each."""
    done: list[DrivenInterval] = []
    for interval in drive(run, lambda _: run.config.start(), run.config.decisions):
        done.append(interval)
        pause()
        if len(done) == most:
            break
    return done


def test_a_run_ends_with_its_seconds_and_its_schedule_with_it(tmp_path: Path, clock: PassClock) -> None:
    run = LiveRun(config_of(tmp_path, "3s", warmup_share=0.1), meter=NoMeter("a test"), clock=clock, probe=True)
    run.evaluate()
    begun_s = clock.now_s
    done = train(run)
    assert run.spent == pytest.approx(3.0, rel=NEAR)
    assert clock.now_s - begun_s == pytest.approx(3.0, rel=NEAR)
    assert [each.telemetry.finished for each in done] == [False] * 9 + [True]
    assert [each.telemetry.budget_used for each in done] == pytest.approx([k / 10 for k in range(1, 11)], abs=0.01)
    rates = [each.telemetry.learning_rate for each in done]
    assert max(rates) == pytest.approx(run.config.base_learning_rate, rel=0.15)
    assert rates[-1] < 0.03 * run.config.base_learning_rate
    assert (done[-1].telemetry.epochs_seen or 0.0) > 1, "text is drawn as long as it is needed"
    assert done[-1].validation_loss is not None


def test_by_the_system_s_clock_a_run_takes_its_seconds(tmp_path: Path) -> None:
    run = LiveRun(config_of(tmp_path, "0.5s"), meter=NoMeter("a test"), probe=False)
    start_s = time.perf_counter()
    train(run)
    assert time.perf_counter() - start_s > 0.4  # a busy machine may take longer
    assert run.finished


def test_a_run_ends_with_its_joules(tmp_path: Path, clock: PassClock) -> None:
    meter = CpuEstimateMeter(idle_w=10.0, watts_per_busy_core=0.0, clock=clock)
    run = LiveRun(config_of(tmp_path, "20J"), meter=meter, clock=clock, probe=False)
    before = meter.read().energy_j
    done = train(run)
    after = meter.read().energy_j
    assert before is not None
    assert after is not None
    assert run.spent == pytest.approx(20.0, rel=NEAR)
    assert after - before == pytest.approx(20.0, rel=NEAR)
    assert {each.telemetry.energy_source for each in done} == {"estimated"}
    assert done[-1].telemetry.learning_rate < 0.03 * run.config.base_learning_rate


def test_joules_without_a_meter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^budget in joules needs a meter .* give a budget in seconds or tokens$"):
        LiveRun(config_of(tmp_path, "50kJ"), meter=NoMeter("a test"))


def test_a_resumed_run_has_what_was_left(tmp_path: Path, clock: PassClock) -> None:
    config = config_of(tmp_path, "2s")
    run = LiveRun(config, meter=NoMeter("a test"), clock=clock, probe=False)
    train(run, most=5)
    torch.save(run.snapshot(), tmp_path / "snapshot.pt")
    assert run.spent is not None
    left_s = 2.0 - run.spent
    assert left_s == pytest.approx(1.0, abs=0.03)

    again = LiveRun(config, meter=NoMeter("a test"), clock=clock, probe=False)
    again.restore(torch.load(tmp_path / "snapshot.pt", weights_only=True))
    clock.now_s += 500.0  # down time
    begun_s = clock.now_s
    done = train(again)
    assert [each.telemetry.decision for each in done] == [5, 6, 7, 8, 9]
    assert clock.now_s - begun_s == pytest.approx(left_s, abs=0.03)
    assert again.spent == pytest.approx(2.0, rel=NEAR)


@pytest.mark.parametrize("counts", [True, False])
def test_pauses_count_only_where_asked(tmp_path: Path, counts: bool, clock: PassClock) -> None:
    run = LiveRun(config_of(tmp_path, "2s"), meter=NoMeter("a test"), clock=clock, probe=False, counts_pauses=counts)

    def pause() -> None:
        clock.now_s += 0.06

    begun_s = clock.now_s
    train(run, pause=pause)
    wall_s = clock.now_s - begun_s
    assert wall_s == pytest.approx(2.06 if counts else 2.6, abs=0.04)  # the pause after the end counts in neither
    assert run.spent == pytest.approx(2.0, rel=NEAR)


def test_the_test_split_is_paid_by_nobody(tmp_path: Path, clock: PassClock) -> None:
    run = LiveRun(config_of(tmp_path, "8s"), meter=NoMeter("a test"), clock=clock, probe=False)
    train(run, most=1)
    spent_s = run.progress.read()
    run.progress.suspend()

    def slow(sequences: Any) -> float:
        clock.now_s += 0.3
        return 1.0

    run.trainer.evaluate = slow  # type: ignore[method-assign, assignment]
    run.test()
    assert run.progress.read() - spent_s < 0.1
    run.evaluate()
    assert run.progress.read() - spent_s >= 0.3


def test_the_cost_of_a_step_is_measured_once_and_gives_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINPILOT_CACHE", str(tmp_path / "cache"))
    first = LiveRun(config_of(tmp_path, "4s"), meter=NoMeter("a test"))
    monkeypatch.setattr(live_run_module, "alternate", None)
    again = LiveRun(config_of(tmp_path, "4s"), meter=NoMeter("a test"))
    longer = LiveRun(config_of(tmp_path, "8s"), meter=NoMeter("a test"))
    assert again.tokens == first.tokens
    assert longer.tokens == pytest.approx(2 * first.tokens, rel=0.01)
    sequences = first.tokens // 16
    assert first.base_limits().max_batch_size == min(32, max(sequences // 10 // 4, 2))
    assert first.evaluation_sequences == max(1, int(0.02 * first.tokens) // 16)
