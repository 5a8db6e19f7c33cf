"""Prices of batches are measured where that is cheap, kept, and leave the run as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import steady_meter
from live_runs import LLAMA, advance, case, live_run, same_bits, weights

from trainpilot.llm_runtime import prices as module
from trainpilot.llm_runtime.config import Precision, StepPrice
from trainpilot.llm_runtime.energy.meter import EnergyMeter, NoMeter
from trainpilot.llm_runtime.prices import affordable_rounds, batch_prices


class Clock:
    """Counts passes, and advances by their seconds."""

    def __init__(self) -> None:
        self.now_s, self.calls = 0.0, list[int]()

    def passes(self, overhead_s: float, sequence_s: float) -> dict[int, Callable[[], None]]:
        def take(batch_size: int) -> None:
            self.calls.append(batch_size)
            self.now_s += overhead_s + sequence_s * batch_size

        return {size: partial(take, size) for size in (4, 8, 16)}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))
    return clock


def measure(clock: Clock, path: Path, rounds: int = 2, meter: EnergyMeter | None = None) -> tuple[StepPrice, ...]:
    passes, meter = clock.passes(0.08, 0.01), meter or NoMeter("a test")
    return batch_prices(passes, "fp32", meter, rounds=rounds, path=path, label="here", wait=lambda: None)


def test_a_run_affords_rounds_of_half_a_percent_of_its_steps() -> None:
    # a round over 4, 8 and 16 is 28 sequences; one more warms up
    assert affordable_rounds([4, 8, 16], 28 * 200 * 3) == 2
    assert affordable_rounds([4, 8, 16], 28 * 200 * 2 - 1) == 0
    assert affordable_rounds([4, 8, 16], 28 * 200 * 100) == module.ROUNDS


def test_seconds_in_turns_without_the_first_round(clock: Clock, tmp_path: Path) -> None:
    prices = measure(clock, tmp_path / "prices.json")

    assert clock.calls == [4, 8, 16] * 3
    assert [each.time_s for each in prices] == pytest.approx([0.12, 0.16, 0.24])
    assert [each.energy_j for each in prices] == [None] * 3


def test_joules_if_the_meter_saw_them(clock: Clock, tmp_path: Path) -> None:
    prices = measure(clock, tmp_path / "prices.json", meter=steady_meter(step_j=5.0))

    assert [each.energy_j for each in prices] == pytest.approx([5.0] * 3)  # between any two readings


def test_a_batch_that_was_too_short_for_the_meter_has_no_joules(clock: Clock, tmp_path: Path) -> None:
    meter = steady_meter()
    type(meter).resolution_s = property(lambda self: 0.3)  # type: ignore[method-assign, assignment]
    try:
        prices = measure(clock, tmp_path / "prices.json", meter=meter)  # 0.24, 0.32 and 0.48 s of two rounds
    finally:
        del type(meter).resolution_s

    assert [each.energy_j is None for each in prices] == [True, False, False]


def test_what_was_measured_is_kept_and_nothing_is_measured_without_rounds(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    assert measure(clock, path, rounds=0) == ()
    assert clock.calls == []
    assert not path.exists()
    first = measure(clock, path)
    clock.calls.clear()

    assert measure(clock, path, rounds=0) == first
    assert clock.calls == []
    path.write_text("{")
    assert measure(clock, path, rounds=0) == ()


LONG: dict[str, Any] = {"tokens": 16 * 4_200, "batch_size": 2, "decisions": 100}
"""4,200 sequences: three rounds of 7 are 0.5 %."""


def test_a_long_run_has_a_price_list_and_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINPILOT_CACHE", str(tmp_path / "cache"))
    run = live_run(case(tmp_path, **LONG))
    before, random = weights(run), torch.get_rng_state()
    limits = run.limits()

    assert {(each.batch_size, each.precision) for each in limits.prices} >= {(1, "fp32"), (2, "fp32"), (4, "fp32")}
    assert all(each.time_s > 0 for each in limits.prices)
    assert same_bits(weights(run), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert run.stream.state_dict() == {"position": 0}
    assert run.trainer.optimizer.state == {}
    assert run.trainer.micro_batch_size is None
    plain = live_run(case(tmp_path, **LONG))
    assert [advance(run).train_loss for _ in range(2)] == [advance(plain).train_loss for _ in range(2)]


def test_a_short_run_knows_the_precisions_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINPILOT_CACHE", str(tmp_path / "cache"))
    prices = live_run(case(tmp_path)).limits().prices

    assert {each.batch_size for each in prices} == {2}
    assert {each.precision for each in prices} == {"fp32", "bf16"}


def test_memory_that_runs_out_in_the_measurement_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINPILOT_CACHE", str(tmp_path / "cache"))
    run = live_run(case(tmp_path, LLAMA, **LONG))
    rehearse = run.trainer.rehearse

    def short_of_memory(sequences: np.ndarray, precision: Precision) -> None:
        rehearse(sequences, precision)
        if len(sequences) == 4:
            run.trainer.micro_batch_size = 2

    monkeypatch.setattr(run.trainer, "rehearse", short_of_memory)

    assert {each.batch_size for each in run.limits().prices} == {2}
    assert run.trainer.micro_batch_size is None
    assert not (tmp_path / "cache" / "prices").exists()
