"""Collective operations that a run needs across the processes that train one model; no-ops in a single process.

`ProcessGroup` says what they are, in the words of `torch.distributed`. `OneProcess` is the single process;
`agents.integrations.ProcessGroupRanks` uses the default process group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import nn

from trainpilot.llm_runtime.energy.meter import EnergyMeter
from trainpilot.llm_runtime.probe import ProbeResult

Content = TypeVar("Content")


@dataclass(frozen=True, kw_only=True)
class IntervalShare:
    """What one process measured in an interval, or all processes together."""

    losses: list[float]
    """Training loss of each step, in nats/token."""
    probe: ProbeResult | None
    """Result of the curvature probe, if there was one."""
    time_s: float
    """Duration in seconds."""
    energy_j: float | None
    """Energy in joules, `None` where no meter counts it."""


class ProcessGroup(Protocol):
    """The processes that train one model together: all take the same steps under the same controls."""

    world_size: int
    """Number of processes."""
    rank: int
    """Index of this process, from 0."""
    is_first: bool
    """Whether this is rank 0, the process that decides and writes files."""

    def all_reduce_mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean over the processes."""

    def all_gather(self, content: Content) -> list[Content]:
        """Return the content of every process, in the order of the ranks."""

    def all_reduce_interval(self, share: IntervalShare, meter: EnergyMeter) -> IntervalShare:
        """Return an interval of all processes: mean losses, the longest duration, the joules of all devices.

        The joules of a device that several processes measure count once: `meter` says which device it is. The sum is
        `None` where the joules of one process are unknown.
        """

    def broadcast(self, content: Content) -> Content:
        """Return the content of rank 0."""

    def full_tensor(self, norm: torch.Tensor) -> torch.Tensor:
        """Return a norm over all parameters as a plain tensor, also where the parameters are sharded."""

    def set_requires_gradient_sync(self, model: nn.Module, required: bool) -> None:
        """Exchange gradients in the next backward pass, or only add them up in this process."""

    def reshard(self, model: nn.Module) -> None:
        """Free the full weights that a forward pass without a backward pass has gathered: they would become stale."""


class OneProcess:
    """A single process."""

    world_size = 1
    rank = 0
    is_first = True

    def all_reduce_mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values."""
        return values

    def all_gather(self, content: Content) -> list[Content]:
        """Return the content in a list."""
        return [content]

    def all_reduce_interval(self, share: IntervalShare, meter: EnergyMeter) -> IntervalShare:
        """Return the share."""
        return share

    def broadcast(self, content: Content) -> Content:
        """Return the content."""
        return content

    def full_tensor(self, norm: torch.Tensor) -> torch.Tensor:
        """Return the norm."""
        return norm

    def set_requires_gradient_sync(self, model: nn.Module, required: bool) -> None:
        """Do nothing."""

    def reshard(self, model: nn.Module) -> None:
        """Do nothing."""
