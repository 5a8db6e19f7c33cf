"""The policy learns in which pass over the data a run is, wherever that is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from trainpilot import Steering, SteeringSettings, batches
from trainpilot.envs.action import KEEP, Action
from trainpilot.llm_runtime.energy.meter import NoMeter
from trainpilot.llm_runtime.telemetry import Telemetry


def run(*, says: bool, **settings: Any) -> list[Any]:
    """Return the records of three passes over 40 rows, each in four intervals."""

    def policy(observation: np.ndarray, masks: np.ndarray) -> Action:
        return KEEP

    torch.manual_seed(0)
    model, data = nn.Linear(4, 1), batches(DataLoader(torch.ones(40, 4), 8))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    wanted = SteeringSettings(sequences=120, batch_size=5, policy=policy, decisions=12, **settings)
    steering = Steering(model, optimizer, wanted, meter=NoMeter("a test"), data=data if says else None)
    while not steering.finished:
        with steering.step() as step:
            for batch in data.take(step.batch_size):
                step.backward(lambda rows: model(rows).square().mean(), batch=batch)
    return steering.records


def test_a_stream_of_a_loader_says_the_epoch() -> None:
    records = run(says=True)
    assert [each.telemetry.epochs_seen for each in records] == pytest.approx([0.25 * (i + 1) for i in range(12)])
    scaled = [each.observation["epochs_seen"] for each in records]
    assert scaled[0] == 0.0, "before the first interval nothing is known"
    assert scaled[1:] == pytest.approx([2 * np.log10(1 + 0.25 * i) / 1.5 - 1 for i in range(1, 12)])


def test_so_do_the_settings() -> None:
    records = run(says=False, epoch_sequences=40)
    assert records[-1].telemetry.epochs_seen == 3.0


def test_what_nobody_says_is_unknown_and_the_policy_sees_a_first_pass() -> None:
    records = run(says=False)
    assert {each.telemetry.epochs_seen for each in records} == {None}
    assert {each.observation["epochs_seen"] for each in records[1:]} == {-1.0}
    told = records[0].telemetry
    assert Telemetry.from_json(told.to_json()) == told


def test_an_epoch_has_at_least_one_sequence() -> None:
    with pytest.raises(ValueError, match="epoch_sequences must be a whole number of at least 1, got 0"):
        SteeringSettings(sequences=120, batch_size=5, epoch_sequences=0)
