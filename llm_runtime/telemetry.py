"""`Telemetry`, the measurements of one interval, and `Plant`, the interface of a run under control.

Units are SI and stand in the field names. A `Plant` is a live run, or a simulator that stands in for one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from trainpilot.llm_runtime.config import PRECISIONS, ControlLimits, Controls
from trainpilot.llm_runtime.energy.meter import EnergySource
from trainpilot.llm_runtime.json_records import Amount, Float, JsonForm, JsonRecord, KnownAmount, KnownFloat
from trainpilot.llm_runtime.plain_values import shown
from trainpilot.llm_runtime.ranges import COUNT

Count = Annotated[int, COUNT]


def _known_precision(value: object) -> object:
    if value not in PRECISIONS:
        raise ValueError(f"must be one of {', '.join(PRECISIONS)}, got {shown(value)}")
    return value


PrecisionRead = Annotated[str, JsonForm(write=str, read=_known_precision)]


@dataclass(frozen=True, kw_only=True)
class Telemetry(JsonRecord):
    """One interval of a run, between two decisions. `None` means not measured here."""

    decision: Count
    """Which interval, from 0."""
    budget_used: Amount
    """Share of the budget used at the interval's end, in [0, 1]: of its tokens, or of its seconds or joules."""
    tokens: Count
    """Tokens trained on since the run's start."""
    interval_tokens: Count
    """Tokens trained on in this interval."""
    steps: Count
    """Optimiser steps in this interval."""
    epochs_seen: KnownAmount
    """Passes over the training split since the start."""

    train_loss: Float
    """Mean training loss over the interval, in nats/token; NaN when the run diverged."""
    train_loss_std: Amount
    """Standard deviation of the per-step training loss around its trend, in nats/token."""
    train_loss_max: Float
    """Largest per-step training loss, in nats/token."""
    validation_loss: KnownFloat
    """Latest validation loss, in nats/token; may be from an earlier interval."""

    gradient_norm: Amount
    """Mean Euclidean norm of the gradient before clipping."""
    clipped_share: Amount
    """Share of the steps whose gradient was clipped."""
    noise_scale: KnownAmount
    """Gradient noise scale tr(Sigma)/|G|^2, in sequences (McCandlish et al. 2018)."""
    relative_update: KnownAmount
    """Norm of the last update over the norm of the weights."""
    probe_linear: KnownFloat
    """Loss change along the last update predicted by the slope, in nats/token; negative is downhill."""
    probe_quadratic: KnownFloat
    """What curvature adds to that change, in nats/token."""

    requested: Controls
    """Controls that were requested."""
    learning_rate: Amount
    """Learning rate of the last step, read back from the optimiser."""
    batch_size: Amount
    """Mean sequences per step, from the tokens really consumed."""
    micro_batch_size: Count
    """Sequences that go through the model at once."""
    precision: PrecisionRead
    """Number format of a matrix product, read back from its output."""
    sparsity: Amount
    """Share of zero weights or of removed channels, counted in the model."""
    finishing: bool
    """The cool-down has begun."""
    finished: bool
    """The run has ended: budget used up or cool-down complete."""
    diverged: bool
    """The training loss was not finite."""

    time_s: Amount
    """Seconds of this interval, probe and switching included, evaluation apart."""
    probe_time_s: Amount
    """Seconds of it spent on the curvature probe."""
    switch_time_s: Amount
    """Seconds of it spent on changing controls."""
    evaluation_time_s: Amount
    """Seconds spent on evaluation since the last interval, not part of `time_s`."""
    energy_j: KnownAmount
    """Joules of this interval."""
    energy_source: EnergySource | None
    """Where `energy_j` comes from."""
    power_w: KnownAmount
    """Mean draw over the interval, in watts."""
    memory_share: KnownAmount
    """Peak memory over the device's memory, in [0, 1]."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens trained on per second of this interval."""
        return self.interval_tokens / max(self.time_s, 1e-9)

    @property
    def energy_per_token_j(self) -> float | None:
        """Joules per token of this interval."""
        return None if self.energy_j is None else self.energy_j / max(self.interval_tokens, 1)


READ_BACK = ("learning_rate", "batch_size", "precision", "sparsity", "finishing")
"""Fields of `Telemetry` that say what became of each control, in the order of the actions."""

Snapshot = dict[str, Any]
"""Everything that a continued run depends on: tensors, numbers, text and containers of these."""


class Plant(Protocol):
    """A run under control, live or simulated; control theory calls the controlled system the plant."""

    def limits(self) -> ControlLimits:
        """Return the limits of the controls."""

    def advance(self, controls: Controls, share: float) -> Telemetry:
        """Train on `share` of the budget under `controls`, and return what was measured."""

    def evaluate(self) -> float:
        """Return the validation loss, in nats/token."""

    def snapshot(self) -> Snapshot:
        """Return a copy of the state."""

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a state that `snapshot` returned."""
