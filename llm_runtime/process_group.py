"""Say what several processes that train one model must agree on; alone, there is nothing to agree on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import nn

from trainpilot.llm_runtime.energy.meter import EnergyMeter
from trainpilot.llm_runtime.probe import ProbeResult

Content = TypeVar("Content")


@dataclass(frozen=True, kw_only=True)
class Share:
    """What an interval was in one process, or in all of them together."""

    losses: list[float]
    """Of its steps, in nats/token."""
    probe: ProbeResult | None
    """What the curvature probe found, if there was one."""
    time_s: float
    """Seconds it took."""
    energy_j: float | None
    """Joules counted in it; unknown where nothing counts them."""


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

    def gathered(self, content: Content) -> list[Content]:
        """Return what each process holds, the first one's first."""

    def together(self, share: Share, meter: EnergyMeter) -> Share:
        """Return an interval in all processes: mean losses, the longest time, the joules of all devices.

        A device that several processes count is counted once: their `meter` tells which it was. The joules are `None`
        where one process's are unknown.
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

    def gathered(self, content: Content) -> list[Content]:
        """Return the content."""
        return [content]

    def together(self, share: Share, meter: EnergyMeter) -> Share:
        """Return the share."""
        return share

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
