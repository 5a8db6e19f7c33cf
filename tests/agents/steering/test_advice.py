"""A policy that only advises changes nothing to the last bit, and what it would have done is written down."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_runs import DROPOUT, GPT2, LLAMA, case, live_run
from steering_loops import SCRIPT, Loop, Script, asked, far
from torch import nn

from trainpilot.agents.bundle import BaseSchedule
from trainpilot.agents.controller import DecisionRecord, Policy
from trainpilot.agents.steering.contract import QualityContract
from trainpilot.agents.steering.guardrails import GuardrailSettings
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.envs.action import KEEP, Action
from trainpilot.llm_runtime.config import Controls, RunConfig
from trainpilot.llm_runtime.data.batches import BatchStream
from trainpilot.llm_runtime.optimizer import make_optimizer

UP: Action = (6, *KEEP[1:])
TO_BF16: Action = (3, 1, 3, 0, 0)
NO_SCHEDULE = BaseSchedule(schedule="constant", warmup_share=0.0)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return case(tmp_path, LLAMA, tokens=6_400, batch_size=4, decisions=10, pruning="magnitude")


BOLD = GuardrailSettings(cautious=False)
"""Without the rules that hold these policies from doubling the learning rate at once."""


def loop(config: RunConfig, policy: str | Policy, mode: str = "advise", **settings: Any) -> Loop:
    usual = {"pruning": config.pruning, "precisions": ("fp32", "bf16"), "probe": True, "mode": mode}
    return Loop(config, policy, **{**usual, "guardrails": BOLD, **settings})


def trained(*arguments: Any, **settings: Any) -> Loop:
    mine = loop(*arguments, **settings)
    mine.train()
    return mine


class Gambler:
    """Asks for twice the learning rate, and draws from every source of random numbers that training may use."""

    def __call__(self, observation: np.ndarray, masks: np.ndarray) -> Action:
        draw()
        torch.rand(1)
        return UP


def draw(*_: Any) -> None:
    """Draw random numbers of Python and numpy, as a loss with augmentation does."""
    random.random()
    np.random.rand()


# Nothing is changed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [lambda: Script(SCRIPT), Gambler, lambda: "default"], ids=["script", "gambler", "shipped"]
)
@pytest.mark.filterwarnings("ignore:policy outside")
def test_a_plain_loop_is_that_of_its_base_schedule_to_the_last_bit(
    config: RunConfig, policy: Callable[[], str | Policy]
) -> None:
    base, mine = trained(config, "none", "steer"), trained(config, policy())
    assert far(base.model, mine.model) == 0.0
    assert mine.rates == base.rates
    assert asked(mine) == asked(base)
    ours, theirs = ([record.telemetry for record in each.steering.records] for each in (mine, base))
    assert [each.train_loss for each in ours] == [each.train_loss for each in theirs]
    assert [each.probe_quadratic for each in ours] == [each.probe_quadratic for each in theirs]
    assert any(action != KEEP for action in advised(mine))


class Counts(nn.Module):
    """A layer with a buffer that every forward pass changes, also outside of training."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return hidden * (1 + 1e-3 * self.calls)


def made_noisy(model: Any) -> Any:
    model.transformer.drop.register_forward_pre_hook(draw)
    model.transformer.drop = nn.Sequential(model.transformer.drop, Counts())
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    return model


def random_states() -> tuple[Any, ...]:
    state: Any = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), state[1].tolist(), state[2]


def test_a_loop_without_any_steering_ends_with_the_same_bits(tmp_path: Path) -> None:
    """With dropout, a loss and a validation that draw random numbers, and a buffer that counts forward passes."""
    config = case(tmp_path, GPT2 | DROPOUT, tokens=3_200, batch_size=4, decisions=10)

    def validate() -> float:
        draw()
        return float(torch.rand(()))

    mine = Loop(config, Gambler(), mode="advise", probe=True, base_schedule=NO_SCHEDULE)
    mine.steering.validate = validate
    made_noisy(mine.model)
    mine.train()
    ours = random_states()
    assert any(record.telemetry.probe_linear is not None for record in mine.steering.records)
    assert mine.steering.validation_loss is not None

    run = live_run(config)
    alone = Loop.__new__(Loop)  # its model and its loss, without steering
    alone.model = run.loaded.model.train()
    optimizer = make_optimizer(alone.model, config)
    stream = BatchStream(run.corpus.train, config.sequence_length, config.seed)
    made_noisy(alone.model)
    for _ in range(config.n_sequences() // config.batch_size):
        alone.loss(torch.from_numpy(stream.take(config.batch_size))).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(alone.model.parameters(), config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert far(alone.model, mine.model) == 0.0
    assert ours == random_states()


def test_a_users_setting_of_matrix_products_stays(config: RunConfig) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        mine = loop(config, always_up, precisions=("fp32", "tf32"))
        mine.train(5)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


# What is written down ---------------------------------------------------------------------------------------------


def always_up(observation: np.ndarray, masks: np.ndarray) -> Action:
    return UP


def advised(mine: Loop) -> list[Action]:
    return [record.advice.action for record in mine.steering.records if record.advice is not None]


def test_each_decision_says_what_would_have_been_done(config: RunConfig) -> None:
    mine = trained(config, always_up)
    start = Controls(batch_size=4)
    for record in mine.steering.records:
        assert record.requested == UP
        assert record.allowed == KEEP
        assert record.telemetry.requested == start
        assert record.advice is not None
        assert record.advice.controls == Controls(batch_size=4, learning_rate_scale=2.0)
    summary = mine.steering.summary()
    assert summary["mode"] == "advise"
    assert summary["advice"] == {"learning_rate x2": 10}
    assert summary["rollbacks"] == []
    assert summary["fallen_back"] is None


def test_the_advice_is_within_masks_and_guardrails_with_its_reasons(config: RunConfig) -> None:
    pruned = (6, 2, 4, 1, 1)  # fp16 was not offered; no pruning and no cool-down before a fifth of the budget
    mine = trained(config, Script([pruned, KEEP]))
    first = mine.steering.records[0]
    assert first.requested == pruned
    assert first.advice is not None
    assert first.advice.action == (6, 2, 0, 0, 0)
    assert first.advice.controls == Controls(batch_size=8, learning_rate_scale=2.0)
    assert {reason.split(":")[0] for reason in first.refusals} == {"precision fp16", "pruning +5 %", "finish cool down"}
    assert first.refusals[0] in mine.steering.summary()["refusals"]


def test_advice_uses_up_no_switch_of_precision(config: RunConfig) -> None:
    assert advised(trained(config, lambda *_: TO_BF16)) == [TO_BF16] * 10


def test_a_policy_that_begins_lower_says_so_at_the_first_decision(config: RunConfig) -> None:
    class Low:
        start_scale = 0.25

        def __call__(self, observation: np.ndarray, masks: np.ndarray) -> Action:
            return KEEP

    mine = trained(config, Low())
    first, *later = (record.advice.controls for record in mine.steering.records if record.advice is not None)
    assert first == Controls(batch_size=4, learning_rate_scale=0.25)
    assert {each.learning_rate_scale for each in later} == {1.0}
    assert {each.learning_rate_scale for each in asked(mine)} == {1.0}


def test_a_record_of_advice_is_written_and_read(config: RunConfig) -> None:
    mine = trained(config, always_up)
    record = mine.steering.records[3]
    assert DecisionRecord.from_json(record.to_json()).advice == record.advice
    steered = trained(config, "none", "steer").steering
    assert "advice" not in steered.records[3].to_json()
    assert "advice" not in steered.summary()


# What goes wrong --------------------------------------------------------------------------------------------------


def fails(observation: np.ndarray, masks: np.ndarray) -> Action:
    raise ZeroDivisionError("policy")


def test_a_policy_that_fails_costs_its_advice_and_nothing_else(config: RunConfig) -> None:
    base, mine = trained(config, "none", "steer"), trained(config, fails)
    assert far(base.model, mine.model) == 0.0
    assert mine.steering.summary()["advice"] == {}
    assert "ZeroDivisionError" in mine.steering.summary()["fallen_back"]


def test_a_run_that_is_lost_is_not_taken_back(config: RunConfig) -> None:
    """Not even where a contract would be broken: the run is the base schedule's own."""
    contract = QualityContract(reference=((0.0, 0.1), (1.0, 0.1)), reference_s_per_token=1.0)
    mine = loop(config, always_up, contract=contract)
    mine.train(60)
    with torch.no_grad():
        next(iter(mine.model.parameters())).fill_(float("nan"))
    mine.train()
    summary = mine.steering.summary()
    assert mine.steering.finished
    assert summary["rollbacks"] == []
    assert not any(bool(weights.isfinite().all()) for weights in list(mine.model.parameters())[:1])
    reasons = [reason for record in mine.steering.records for reason in record.refusals]
    assert "not taken back, as the policy only advises: training loss is not finite" in reasons
    assert any(reason.startswith("not taken back, as the policy only advises: quality contract") for reason in reasons)
    assert summary["contract"]["held"] is False


# Saving and resuming ----------------------------------------------------------------------------------------------


def gone_on(first: Loop, second: Loop) -> None:
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.stream.load_state_dict(first.stream.state_dict())
    second.steering.load_state_dict(first.steering.state_dict())


def test_a_run_that_was_saved_goes_on_bit_for_bit_with_its_advice(config: RunConfig) -> None:
    whole, first, second = (loop(config, always_up) for _ in range(3))
    whole.train()
    first.train(27)
    gone_on(first, second)
    second.train()
    assert far(whole.model, second.model) == 0.0
    assert advised(second) == advised(whole)


def test_a_run_under_advice_may_go_on_under_steering(config: RunConfig) -> None:
    first, second = loop(config, always_up), loop(config, always_up, "steer")
    first.train(27)
    gone_on(first, second)
    second.train()
    scales = [controls.learning_rate_scale for controls in asked(second)]
    assert scales[:3] == [1.0] * 3
    assert max(scales) > 1.0


def test_a_run_that_was_steered_does_not_go_on_under_advice(config: RunConfig) -> None:
    first, second = loop(config, always_up, "steer"), loop(config, always_up)
    first.train(27)
    with pytest.raises(ValueError, match="mode must be 'steer' for a state"):
        gone_on(first, second)


def test_there_are_two_modes() -> None:
    with pytest.raises(ValueError, match="mode must be one of steer, advise, got 'shadow'"):
        SteeringSettings(sequences=100, batch_size=1, mode="shadow")  # type: ignore[arg-type]
