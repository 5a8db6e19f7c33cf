"""Say what several processes that train one model must agree on; alone, there is nothing to agree on."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from torch import nn

from trainpilot.llm_runtime.energy import EnergyMeter

Content = TypeVar("Content")


class Ranks(Protocol):
    """The processes that train one model together: all of them take the same steps under the same controls."""

    world_size: int
    """How many there are."""
    rank: int
    """Which of them this is, from 0."""
    is_first: bool
    """Whether this is the one that decides and writes."""

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean over the processes."""

    def largest(self, value: float) -> float:
        """Return the largest over the processes."""

    def energy(self, energy_j: float | None, time_s: float, meter: EnergyMeter) -> float | None:
        """Return the joules of all devices, each counted once; `None` where one is unknown.

        Args:
            energy_j: What this process's meter counted.
            time_s: Seconds in which it did.
            meter: The meter: it tells which device was counted.
        """

    def of_first(self, content: Content) -> Content:
        """Return what the first process holds."""

    def whole(self, norm: torch.Tensor) -> torch.Tensor:
        """Return a norm over all parameters, wherever their parts lie, as a plain tensor."""

    def synchronise_gradients(self, model: nn.Module, wanted: bool) -> None:
        """Exchange gradients in the next backward pass, or gather them here until one that does."""

    def settle(self, model: nn.Module) -> None:
        """Drop the weights that a forward pass without a backward pass has gathered, before they are out of date."""


class OneProcess:
    """A single process."""

    world_size = 1
    rank = 0
    is_first = True

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values."""
        return values

    def largest(self, value: float) -> float:
        """Return the value."""
        return value

    def energy(self, energy_j: float | None, time_s: float, meter: EnergyMeter) -> float | None:
        """Return the joules."""
        return energy_j

    def of_first(self, content: Content) -> Content:
        """Return the content."""
        return content

    def whole(self, norm: torch.Tensor) -> torch.Tensor:
        """Return the norm."""
        return norm

    def synchronise_gradients(self, model: nn.Module, wanted: bool) -> None:
        """Do nothing."""

    def settle(self, model: nn.Module) -> None:
        """Do nothing."""
