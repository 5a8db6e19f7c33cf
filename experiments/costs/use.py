"""Define what a trained model costs where it is used: bytes, seconds and joules per generated token.

The cost depends on the model's shape and format and not on its weights, so that all runs that end alike share it.
`costs.measure_use` measures it. This module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainpilot.experiments.results import RunResult, cost_key
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.energy.meter import EnergySource
from trainpilot.llm_runtime.json_records import JsonRecord

Used = tuple[RunConfig, str | None]
"""A run on the model that is used, and its format; `None` is float32."""


@dataclass(frozen=True, kw_only=True)
class UseCost(JsonRecord):
    """What a model in a format costs in use."""

    n_parameters: int
    weight_bytes: int
    """Of the files with weights; of a packed file where nothing packs the format."""
    bits_per_weight: float
    """Of the quantised matrices with their scales."""
    latency_s: float | None
    """Seconds per generated token of one request; `None` where nothing runs the format, or it drowned in noise."""
    energy_j: float | None
    """Joules per generated token; `None` likewise, and without a meter."""
    energy_source: EnergySource | None
    device: str


def use_key(config: RunConfig, model_format: str | None) -> str:
    """Return the key of the cost of a run's model in a format."""
    return f"{cost_key(config)}, used as {model_format or 'fp32'}"


def used_model(result: RunResult) -> Used | None:
    """Return the model that a run ended with, and its format; `None` if its controls left it another shape."""
    last = result.intervals[-1] if result.intervals else None
    if result.spec.config.pruning == "width" and last is not None and last.sparsity:
        return None
    return result.spec.phases()[-1].config, result.spec.format
