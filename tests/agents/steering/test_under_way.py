"""Steering takes over a run that is under way: schedule, budget and decisions go on from where it stands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_runs import LLAMA, case
from policies import zigzag_bundle
from steering_loops import Loop, Script, far

from trainpilot.agents.bundle import BaseSchedule
from trainpilot.agents.controller import keep
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.envs.action import KEEP, Action
from trainpilot.envs.observation import OBSERVATION_FIELDS
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.energy.meter import NoMeter

WHOLE, DONE, BATCH = 200, 60, 4
"""Sequences of the whole run and of the part that is done, and of a step."""
LARGER: Action = (KEEP[0], 2, *KEEP[2:])
USED = [each.name for each in OBSERVATION_FIELDS].index("budget_used")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return case(tmp_path, LLAMA, tokens=16 * WHOLE, batch_size=BATCH, decisions=50, schedule="linear")


def taken_over(config: RunConfig, policy: Any, **settings: Any) -> Loop:
    """Return a loop whose first part was trained without a policy, and that goes on under one that knows only that."""
    first = Loop(config, "none")
    first.train(DONE // BATCH)
    return gone_on(config, first, policy, **settings)


def gone_on(config: RunConfig, first: Loop, policy: Any, **settings: Any) -> Loop:
    """Return a loop that has another's weights and position, and is steered from there."""
    loop = Loop(config, "none", **settings)
    loop.steering.close()
    loop.model.load_state_dict(first.model.state_dict())
    loop.optimizer.load_state_dict(first.optimizer.state_dict())
    for group in loop.optimizer.param_groups:
        group["lr"] = config.base_learning_rate  # the peak, as for any run
    loop.stream.load_state_dict(first.stream.state_dict())
    wanted = replace(loop.steering.settings, policy=policy, sequences_done=DONE)
    loop.steering = Steering(loop.model, loop.optimizer, wanted, meter=NoMeter("a test"))
    return loop


def test_under_a_policy_that_keeps_it_ends_where_the_whole_run_does(config: RunConfig) -> None:
    whole = Loop(config, keep)
    whole.train()
    loop = taken_over(config, keep)
    loop.train()
    assert far(whole.model, loop.model) == 0.0
    assert loop.rates == whole.rates[DONE // BATCH :]


def test_what_is_measured_counts_from_the_beginning_of_the_run(config: RunConfig) -> None:
    loop = taken_over(config, keep)
    assert loop.steering.sequences == DONE
    loop.train()
    told = [record.telemetry for record in loop.steering.records]
    assert len(told) == 35  # of 50 decisions, as 70 % of the budget are left
    assert [each.steps for each in told] == [1] * 35  # 140 sequences in 35 intervals of 4
    assert told[0].budget_used == pytest.approx((DONE + 4) / WHOLE)
    assert told[0].tokens == (DONE + 4) * config.sequence_length
    assert (told[-1].budget_used, told[-1].finished) == (1.0, True)
    assert loop.steering.summary()["sequences"] == WHOLE


def test_the_policy_sees_the_budget_used_and_watches_before_it_acts(config: RunConfig) -> None:
    seen: list[float] = []

    def larger(observation: np.ndarray, masks: np.ndarray) -> Action:
        seen.append(float(observation[USED - len(OBSERVATION_FIELDS)]))
        return LARGER

    loop = taken_over(config, larger, max_batch_size=8)
    loop.train()
    assert seen[0] == pytest.approx(2 * DONE / WHOLE - 1)  # shares are scaled to [-1, 1]
    records = loop.steering.records
    assert [record.telemetry.requested.batch_size for record in records[:7]] == [BATCH] * 6 + [8]
    assert "is watched for 6 intervals" in records[0].refusals[0]


def test_a_short_rest_is_watched_for_a_fifth_of_it(config: RunConfig) -> None:
    loop = taken_over(config, Script([LARGER] * 50), decisions=10, max_batch_size=8)  # seven are left
    loop.train()
    asked = [record.telemetry.requested.batch_size for record in loop.steering.records]
    assert asked[:2] == [BATCH, 8]


@pytest.mark.filterwarnings("ignore:policy outside")
def test_it_goes_on_at_its_own_learning_rate(config: RunConfig, tmp_path: Path) -> None:
    zigzag_bundle(tmp_path / "policy.safetensors", start_scale=0.5)
    policy = tmp_path / "policy.safetensors"
    schedule = BaseSchedule(schedule="constant", warmup_share=0.0)
    loop = taken_over(config, policy, base_schedule=schedule)
    loop.one_step()
    assert loop.rates == [config.base_learning_rate]


def test_a_run_that_was_taken_over_is_saved_and_goes_on(config: RunConfig) -> None:
    whole = taken_over(config, Script([LARGER] * 50), max_batch_size=8)
    whole.train()
    first = taken_over(config, Script([LARGER] * 50), max_batch_size=8)
    first.train(12)
    state = first.steering.state_dict()
    second = gone_on(config, first, Script([LARGER] * 50), max_batch_size=8)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.steering.load_state_dict(state)
    second.train()
    assert far(whole.model, second.model) == 0.0


def test_a_state_is_loaded_only_where_as_much_was_done(config: RunConfig) -> None:
    state = taken_over(config, keep).steering.state_dict()
    with pytest.raises(ValueError, match="sequences_done must be what it was when the state was saved, 60, got 0"):
        Loop(config, keep).steering.load_state_dict(state)
    earlier = Loop(config, keep).steering.state_dict()
    del earlier["settings"]["sequences_done"]  # as earlier versions saved it
    Loop(config, keep).steering.load_state_dict(earlier)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sequences_done": -1}, "sequences_done must be a whole number of at least 0, got -1"),
        ({"sequences_done": 0.3}, "sequences_done must be a whole number of at least 0, got 0.3"),
        ({"sequences_done": 900}, "sequences_done must be below sequences 900"),
        ({"sequences_done": 90, "budget": "600s"}, "sequences_done must be 0 under a budget in seconds"),
    ],
)
def test_a_wrong_number_of_sequences_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SteeringSettings(**{"sequences": 900, "batch_size": 4, **settings})


def test_a_trainer_refuses_it(config: RunConfig, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from huggingface_runs import arguments

    from trainpilot.agents.integrations.huggingface import SteeredTrainer

    model = Loop(config, keep).model
    rows: Any = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    with pytest.raises(ValueError, match="sequences_done must be 0 under a framework's Trainer"):
        SteeredTrainer(model, arguments(tmp_path), train_dataset=rows, steering={"sequences_done": 4})
