"""Measure slope and curvature of the loss along the last update, to see whether steps of this size overshoot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from trainpilot.llm_runtime.optimizer import norm_of


@dataclass(frozen=True)
class ProbeResult:
    """Result of a curvature probe: three forward passes on one micro-batch that has not been trained on."""

    linear: float
    """Loss change along the update predicted by the slope, in nats/token; negative is downhill."""
    quadratic: float
    """Loss change that the curvature adds, in nats/token."""
    relative_update: float
    """Norm of the update over the norm of the weights."""

    @property
    def finite(self) -> bool:
        """Whether both changes are finite; a micro-batch without labels has no loss."""
        return math.isfinite(self.linear) and math.isfinite(self.quadratic)


def mean_probe(results: Sequence[ProbeResult]) -> ProbeResult | None:
    """Return the mean of several processes' results, each on its own text; `None` if there are none."""
    if not results:
        return None
    return ProbeResult(
        linear=sum(each.linear for each in results) / len(results),
        quadratic=sum(each.quadratic for each in results) / len(results),
        relative_update=sum(each.relative_update for each in results) / len(results),
    )


@torch.no_grad()
def probe_curvature(updates: list[tuple[nn.Parameter, torch.Tensor]], loss: Callable[[], torch.Tensor]) -> ProbeResult:
    """Return slope and curvature of the loss along the update d, by central differences of the step's own length.

    With L(w + s d) at s = -1, 0, 1: linear = (L(1) - L(-1))/2 and quadratic = (L(1) + L(-1))/2 - L(0) = d'Hd/2 up to
    fourth order. The weights are restored bit for bit.

    Args:
        updates: Each parameter with its last update.
        loss: Mean loss of the model on the probe's micro-batch, a scalar tensor in nats/token.
    """
    parameters: list[torch.Tensor] = [parameter for parameter, _ in updates]
    directions = [update for _, update in updates]
    saved = [parameter.detach().clone() for parameter in parameters]
    centre = loss()
    try:
        torch._foreach_add_(parameters, directions)
        ahead = loss()
        torch._foreach_add_(parameters, directions, alpha=-2.0)
        behind = loss()
    finally:
        for parameter, before in zip(parameters, saved, strict=True):  # shards have no _foreach_copy_
            parameter.copy_(before)
    l_ahead, l_centre, l_behind = torch.stack([ahead, centre, behind]).tolist()
    return ProbeResult(
        linear=(l_ahead - l_behind) / 2,
        quadratic=(l_ahead + l_behind) / 2 - l_centre,
        relative_update=float(norm_of(directions) / norm_of(saved).clamp_min(1e-12)),
    )
