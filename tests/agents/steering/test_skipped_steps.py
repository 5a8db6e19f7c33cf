"""A step whose gradient is not finite is not made, in every form of a loop, and no more than that happens."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from live_runs import LLAMA, case
from steering_loops import Loop

from trainpilot.agents.steering.contract import QualityContract
from trainpilot.envs.action import KEEP
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.interval import IntervalRecorder


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return case(tmp_path, LLAMA, tokens=6_400, batch_size=4, decisions=10, base_learning_rate=3e-3, schedule="wsd")


def spoil(mine: Loop, lost: set[int]) -> None:
    """Make the loss of these steps, counted from 1, not a number."""
    clean, steps = mine.loss, 0

    def spoilt(batch: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return clean(batch) * (math.nan if steps in lost else 1.0)

    mine.loss = spoilt  # type: ignore[method-assign]


@pytest.mark.parametrize("policy", ["none", "keeps"])
def test_a_lost_step_changes_no_weight_and_is_counted(config: RunConfig, policy: str) -> None:
    mine = Loop(config, "none" if policy == "none" else lambda *_: KEEP)
    spoil(mine, {4})
    mine.train(3)
    before = [p.detach().clone() for p in mine.model.parameters()]
    mine.train(1)
    assert all(torch.equal(a, b) for a, b in zip(before, mine.model.parameters(), strict=True))
    mine.train(6)
    assert mine.steering.summary()["skipped_steps"] == 1
    first = mine.steering.records[0].telemetry
    assert math.isfinite(first.train_loss)
    assert not first.diverged
    assert first.steps == 10


def test_one_lost_step_in_ten_costs_no_rollback_and_breaks_no_contract(config: RunConfig) -> None:
    base = Loop(config, "none")
    base.train()
    contract = QualityContract.against(base.steering.records, max_slowdown=1e9)
    mine = Loop(config, lambda *_: KEEP, contract=contract)
    spoil(mine, set(range(5, 101, 10)))
    mine.train()
    told = mine.steering.summary()
    assert told["skipped_steps"] == 10
    assert told["rollbacks"] == []
    assert told["contract"]["broken_at_decision"] is None
    assert mine.steering.records[-1].telemetry.train_loss < 1.1 * base.steering.records[-1].telemetry.train_loss


def test_an_interval_that_is_mostly_lost_is_taken_back(config: RunConfig) -> None:
    mine = Loop(config, lambda *_: KEEP, rewinds=True)
    spoil(mine, set(range(34, 40)))
    mine.train()
    told = mine.steering.summary()
    assert len(told["rollbacks"]) == 1
    assert "not finite" in told["rollbacks"][0]["reason"]
    assert told["skipped_steps"] == 6


def test_the_count_goes_on_from_a_file(config: RunConfig) -> None:
    mine = Loop(config, "none")
    spoil(mine, {4})
    mine.train(15)
    again = Loop(config, "none")
    again.model.load_state_dict(mine.model.state_dict())
    again.optimizer.load_state_dict(mine.optimizer.state_dict())
    again.steering.load_state_dict(mine.steering.state_dict())
    assert again.steering.summary()["skipped_steps"] == 1


def test_nothing_is_skipped_under_advice(config: RunConfig) -> None:
    mine = Loop(config, lambda *_: KEEP, mode="advise")
    spoil(mine, {4})
    mine.train(12)
    assert mine.steering.summary()["skipped_steps"] == 0
    assert mine.steering.records[0].telemetry.diverged


def test_the_half_of_an_interval_decides() -> None:
    recorder = IntervalRecorder.__new__(IntervalRecorder)
    recorder.skipped_steps = 0
    nan = math.nan
    assert recorder._without_skipped([1.0, nan], [0.5, 0.5]) == ([1.0], [0.5])
    assert recorder._without_skipped([1.0, 2.0], [0.5, math.inf]) == ([1.0], [0.5])
    losses, _ = recorder._without_skipped([1.0, nan, nan], [0.5, 0.5, 0.5])
    assert len(losses) == 3
    assert recorder.skipped_steps == 4
