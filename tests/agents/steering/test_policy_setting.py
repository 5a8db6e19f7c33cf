"""A policy may be given by name, file, bundle or function; anything else is refused, and a failing policy is told."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policies import zigzag_bundle
from torch import nn

from trainpilot.agents import PolicyBundle, Steering, SteeringSettings
from trainpilot.envs.action import KEEP, Action
from trainpilot.llm_runtime.energy.meter import NoMeter


def steered(policy: Any, **settings: Any) -> tuple[nn.Module, Steering]:
    """Return a small regression and its steering, which sees the domain warning of no bundle."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wanted = SteeringSettings(sequences=160, batch_size=8, policy=policy, decisions=20, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="policy outside")
        return model, Steering(model, optimizer, wanted, meter=NoMeter("a test"))


def train(model: nn.Module, steering: Steering) -> None:
    random = torch.Generator().manual_seed(1)
    while not steering.finished:
        with steering.step() as step:
            rows = torch.randn(step.batch_size, 4, generator=random)
            step.backward(lambda rows=rows: (model(rows) - rows.sum(1, keepdim=True)).square().mean())


def decisions(policy: Any) -> list[Action]:
    model, steering = steered(policy)
    train(model, steering)
    return [record.allowed for record in steering.records]


@pytest.mark.filterwarnings("error")
def test_file_text_path_and_bundle_steer_alike(tmp_path: Path) -> None:
    file = tmp_path / "policy.safetensors"
    zigzag_bundle(file)
    by_name = decisions(str(file))
    assert by_name != [KEEP] * len(by_name)
    assert decisions(file) == by_name
    assert decisions(PolicyBundle.load(str(file))) == by_name


def test_a_bundle_is_recognised_where_a_run_goes_on(tmp_path: Path) -> None:
    zigzag_bundle(tmp_path / "one.safetensors")
    bundle = PolicyBundle.load(tmp_path / "one.safetensors")
    bundle.save(str(tmp_path / "same.safetensors"))
    other = PolicyBundle({name: 2 * value for name, value in bundle.weights.items()}, bundle.provenance, bundle.fields)
    state = steered(bundle)[1].state_dict()
    steered(PolicyBundle.load(tmp_path / "same.safetensors"))[1].load_state_dict(state)
    with pytest.raises(ValueError, match="policy must be what it was"):
        steered(other)[1].load_state_dict(state)


@pytest.mark.parametrize("policy", [None, 3, ["default"], b"default", {}])
def test_anything_else_is_refused(policy: Any) -> None:
    with pytest.raises(ValueError, match="policy must be a name, the file of a bundle, a PolicyBundle, 'none', or"):
        SteeringSettings(sequences=160, batch_size=8, policy=policy)


def test_a_policy_that_fails_is_told_once_and_so_is_the_end_of_steering() -> None:
    def broken(observation: np.ndarray, masks: np.ndarray) -> Action:
        raise TypeError("no such thing")

    with pytest.warns(UserWarning, match="policy failed") as caught:
        train(*steered(broken))
    told = [str(warning.message) for warning in caught]
    assert len(told) == 2
    assert told[0] == "policy failed: TypeError: no such thing; nothing changes in this interval"
    assert told[1].startswith(
        "steering has ended at decision 4, the run goes on under its base schedule: policy failed"
    )
