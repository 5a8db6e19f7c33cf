"""A scheduler of torch, or any function, is a base schedule: the same rates, and the scheduler is left as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from live_runs import LLAMA, case
from steering_loops import Loop
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.torch_schedules import schedule_of
from trainpilot.envs.action import KEEP
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.schedules import Cooldown, OwnSchedule

STEPS = 20


def optimizer(*rates: float) -> SGD:
    return SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates or (0.4,)])


def warm_up_then_cosine(of: SGD) -> SequentialLR:
    parts = [LinearLR(of, 0.25, total_iters=5), CosineAnnealingLR(of, STEPS - 5)]
    return SequentialLR(of, parts, milestones=[5])


MAKERS: list[Callable[[SGD], LRScheduler]] = [
    lambda of: LambdaLR(of, lambda step: step / 10 if step < 10 else 1.0),
    lambda of: StepLR(of, 7, gamma=0.5),
    lambda of: ExponentialLR(of, 0.9),
    lambda of: CosineAnnealingLR(of, STEPS, eta_min=0.1),
    warm_up_then_cosine,
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.filterwarnings("ignore")
def test_the_factors_are_those_of_the_stepped_scheduler(make: Callable[[SGD], LRScheduler]) -> None:
    of = optimizer(0.4, 0.1)
    if make is MAKERS[3]:  # its eta_min is the same for all groups, so they have no common curve
        of = optimizer(0.4)
    scheduler = make(of)
    factor_of = schedule_of(scheduler, STEPS)
    for step in range(STEPS):
        assert factor_of(step / STEPS) == pytest.approx(of.param_groups[0]["lr"] / 0.4, rel=1e-12), step
        assert factor_of((step + 0.5) / STEPS) == factor_of(step / STEPS)
        of.step()
        scheduler.step()


def test_the_scheduler_and_its_optimizer_stay_as_they_are() -> None:
    of = optimizer(0.4, 0.1)
    scheduler = LambdaLR(of, lambda step: (step + 1) / 10)
    before, rates = scheduler.state_dict(), [group["lr"] for group in of.param_groups]
    schedule_of(scheduler, STEPS)
    assert scheduler.state_dict() == before
    assert [group["lr"] for group in of.param_groups] == rates
    assert scheduler.optimizer is of


def stepped() -> LRScheduler:
    of = optimizer()
    scheduler = StepLR(of, 3)
    of.step()
    scheduler.step()
    return scheduler


@pytest.mark.parametrize(
    ("scheduler", "steps", "says"),
    [
        (lambda: ReduceLROnPlateau(optimizer()), 5, "from the number of steps alone, got ReduceLROnPlateau"),
        (stepped, 5, "must not have been stepped, got StepLR after 1 steps"),
        (lambda: StepLR(optimizer(), 3), 0, "steps must be at least 1, got 0"),
        (lambda: LambdaLR(optimizer(1, 1), [lambda _: 1.0, lambda _: 0.5]), 5, "one curve for all parameter groups"),
        (lambda: StepLR(optimizer(0.0), 3), 5, "learning rate above 0"),
    ],
)
def test_what_is_no_curve_over_steps_is_refused(scheduler: Callable[[], Any], steps: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        schedule_of(scheduler(), steps)


# Any function ---------------------------------------------------------------------------------------------------


def hump(share: float) -> float:
    return math.sin(math.pi * share)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return case(tmp_path, LLAMA, tokens=3_200, batch_size=4, decisions=10, pruning="none")


def test_a_function_of_the_share_is_a_base_schedule(config: RunConfig) -> None:
    loop = Loop(config, lambda *_: KEEP, base_schedule=hump)
    rates = []
    while not loop.steering.finished:
        rates.append(loop.steering.learning_rate)
        loop.one_step()
    peak = loop.steering.peak_learning_rate
    assert rates == pytest.approx([peak * hump(step / 50) for step in range(50)], rel=1e-12)


def test_a_run_goes_on_under_the_same_function_only(config: RunConfig) -> None:
    loop = Loop(config, lambda *_: KEEP, base_schedule=hump)
    loop.train(12)
    saved = loop.steering.state_dict()
    loop.steering.close()
    Loop(config, lambda *_: KEEP, base_schedule=lambda share: math.sin(math.pi * share)).steering.load_state_dict(saved)
    with pytest.raises(ValueError, match="base_schedule must be what it was"):
        Loop(config, lambda *_: KEEP, base_schedule=lambda share: 1 - share).steering.load_state_dict(saved)


def test_a_cool_down_falls_from_where_the_function_stood() -> None:
    cooldown = Cooldown.begin(OwnSchedule(factor_of=hump, budget_tokens=1_000), 500, 10)
    assert cooldown.start_factor == pytest.approx(1.0)
    assert cooldown.end_tokens == 600
    assert cooldown.factor(550) == pytest.approx(0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
def test_a_function_that_returns_no_factor_is_one_clear_line(value: float) -> None:
    with pytest.raises(ValueError, match=r"base_schedule must return a finite factor >= 0 .* at 0.25"):
        OwnSchedule(factor_of=lambda _: value, budget_tokens=100).factor(25, 1)


def test_a_text_is_no_base_schedule() -> None:
    with pytest.raises(ValueError, match=r"base_schedule must be .* got 'wsd'; for a named one: BaseSchedule"):
        SteeringSettings(sequences=100, batch_size=2, base_schedule="wsd")  # type: ignore[arg-type]
