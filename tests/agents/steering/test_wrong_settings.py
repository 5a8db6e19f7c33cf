"""Settings of the wrong kind are refused by their name when they are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trainpilot.agents.steering.guardrails import GuardrailSettings
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("budget", 5, "text such as"),
        ("preference", None, "text such as"),
        ("contract", {}, r"QualityContract\(...\)"),
        ("fine_tuning", "yes", "one of True, False, None"),
        ("probe", 1, "one of True, False"),
        ("gradient_clip", "1", "above 0"),
        ("precisions", 7, "some of fp32"),
        ("precisions", "fp32", "some of fp32"),
        ("mode", ["advise"], "one of steer, advise"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused(name: str, value: Any, rule: str) -> None:
    settings: dict[str, Any] = {"sequences": 900, "batch_size": 4, "sequence_length": 8, name: value}

    with pytest.raises(ValueError, match=f"^{name} must be {rule}"):
        SteeringSettings(**settings)


@pytest.mark.parametrize("model", [None, "llama-nano", [nn.Linear(2, 1)]])
def test_what_is_no_model_is_refused(model: Any) -> None:
    optimizer = torch.optim.AdamW(nn.Linear(2, 1).parameters())
    with pytest.raises(ValueError, match=r"^model must be a torch.nn.Module, got "):
        Steering(model, optimizer, SteeringSettings(sequences=100, batch_size=2, policy="none"))


def test_what_are_no_settings_is_refused() -> None:
    settings: Any = None
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"^settings must be SteeringSettings, got NoneType$"):
        Steering(model, torch.optim.AdamW(model.parameters()), settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate_range", 7),
        ("batch_size_range", "ab"),
        ("max_rise", "2"),
        ("max_rollbacks", None),
        ("finish_from", None),
        ("cautious", 1),
        ("throughput_floor", "0.8"),
    ],
)
def test_a_guardrail_of_the_wrong_kind_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be "):
        GuardrailSettings(**{name: value})
