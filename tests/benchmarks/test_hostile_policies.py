"""Hostile policies on a run of seconds: within guardrails alone they do little harm, and none under a contract."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.steering.contract import QualityContract
from trainpilot.envs.action import KEEP, check_action

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def hostile() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield import_module("_hostile")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def base_run(hostile: ModuleType) -> tuple[float, Sequence[DecisionRecord]]:
    loss, records = import_module("hostile_policies").base_run(0)
    return loss, records


@pytest.fixture(scope="module")
def base(base_run: tuple[float, Sequence[DecisionRecord]]) -> float:
    return base_run[0]


@pytest.fixture(scope="module")
def contract(hostile: ModuleType, base_run: tuple[float, Sequence[DecisionRecord]]) -> QualityContract:
    made = import_module("hostile_policies").CONTRACTS["reference"][0](base_run[1])
    assert isinstance(made, QualityContract)
    return made


def test_every_hostile_policy_gives_valid_actions(hostile: ModuleType) -> None:
    assert len(hostile.HOSTILE) == 26
    for make in hostile.HOSTILE.values():
        policy = make(1)
        for _ in range(hostile.DECISIONS):
            check_action(policy(np.zeros(1), np.ones(1)))


@pytest.mark.parametrize("name", ["always up", "always down", "up, then finish"])
def test_guardrails_alone_leave_little_harm(hostile: ModuleType, base: float, name: str) -> None:
    assert hostile.SmallRun(hostile.HOSTILE[name](0)).train() < base + 0.15


@pytest.mark.parametrize("name", ["down from 10", "up from 40"])
def test_a_contract_holds_what_shows_in_the_cool_down_or_comes_late(
    hostile: ModuleType, base: float, contract: QualityContract, name: str
) -> None:
    run = hostile.SmallRun(hostile.HOSTILE[name](0), contract=contract)
    assert run.train() < base + 0.01  # 0.08 above it where only losses are compared, 0.06 where weights alone go back


def test_bad_batches_break_no_contract_where_nothing_is_steered(hostile: ModuleType, contract: QualityContract) -> None:
    run = hostile.SmallRun(lambda *_: KEEP, contract=contract)
    run.train(lambda number, rows: rows.flip(1) if 100 <= number < 140 else rows)
    assert run.steering.summary()["contract"]["broken_at_decision"] is None
