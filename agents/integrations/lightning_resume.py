"""Go on with a steered fit where its checkpoint was written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from trainpilot.agents.steering.steering import Steering
from trainpilot.llm_runtime.optimizer import change_batch


def peaks(steered: Mapping[str, Any]) -> list[float]:
    """Return the peak of each parameter group's learning rate, from a state of `Steering`."""
    levers = steered["levers"]
    return [levers["peak"] * ratio for ratio in levers["ratios"]]


def set_rates(optimizer: Optimizer, rates: Iterable[float]) -> None:
    """Set the learning rate of each parameter group."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def go_on(steering: Steering, state: Mapping[str, Any]) -> None:
    """Go to where `SteeringCallback.state_dict` was called; the optimiser has been loaded from the same checkpoint.

    A checkpoint written after a fit has the optimiser as it was given back.
    """
    steered = state["steering"]
    optimizer = steering.levers.optimizer
    if state.get("given_back"):
        change_batch(optimizer, steered["controls"]["batch_size"] / steered["settings"]["batch_size"])
    set_rates(optimizer, steered["levers"]["set"])
    steering.load_state_dict(steered)
