"""Tell whether a model comes trained: then a learning rate far above the user's undoes what it knows."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from trainpilot.agents.steering.guardrails import GuardrailSettings

RISE = 2.0
"""Largest factor above the user's learning rate on a model that comes trained."""
FALL = 1e-3
"""Smallest: a learning rate that is too low loses time and nothing else."""


def comes_trained(model: nn.Module) -> bool:
    """Return whether a model says where it was loaded from, and its weights are not as models are made.

    The name alone would not do: `from_config` of somebody's config has it too, with random weights. Gains of
    normalisation layers are one in every new transformer, and in no trained one.
    """
    named = any(getattr(module, "name_or_path", None) for module in model.modules())
    return named and any(not _is_new(gain) for gain in _gains(model))


def _gains(model: nn.Module) -> list[torch.Tensor]:
    names = ("norm", "ln_", "layernorm")
    return [
        parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and name.endswith("weight") and any(part in name.lower() for part in names)
    ]


def _is_new(gain: torch.Tensor) -> bool:
    own = gain.to_local() if hasattr(gain, "to_local") else gain
    return bool((own == 1).all()) or bool((own == 0).all())  # some count from zero: 1 + gain


def within_reach(bounds: GuardrailSettings, learning_rate: float) -> GuardrailSettings:
    """Return bounds that keep the learning rate near the user's, unless they say themselves what it may be."""
    if bounds.learning_rate_range is not None:
        return bounds
    return replace(bounds, learning_rate_range=(FALL * learning_rate, RISE * learning_rate))
