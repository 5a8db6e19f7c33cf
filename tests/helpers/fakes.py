"""Stand-ins for tests: telemetry, a clock, a meter, and a plant whose best control is known."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import PreTrainedModel

from trainpilot.llm_runtime.config import ControlLimits, Controls, RunConfig
from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergyReading, RecordedMeter
from trainpilot.llm_runtime.telemetry import Snapshot, Telemetry

START = Controls(batch_size=8)


def make_telemetry(**overrides: Any) -> Telemetry:
    """Return the first of ten quiet intervals of a run; name what shall differ."""
    quiet: dict[str, Any] = {
        "decision": 0,
        "budget_used": 0.1,
        "tokens": 1_000,
        "interval_tokens": 1_000,
        "steps": 4,
        "epochs_seen": 0.5,
        "train_loss": 2.0,
        "train_loss_std": 0.02,
        "train_loss_max": 2.05,
        "validation_loss": None,
        "gradient_norm": 0.5,
        "clipped_share": 0.0,
        "noise_scale": 16.0,
        "relative_update": 1e-3,
        "probe_linear": -0.01,
        "probe_quadratic": 0.01,
        "requested": START,
        "learning_rate": 1e-3,
        "batch_size": 8.0,
        "micro_batch_size": 8,
        "precision": "fp32",
        "sparsity": 0.0,
        "finishing": False,
        "finished": False,
        "diverged": False,
        "time_s": 2.0,
        "probe_time_s": 0.0,
        "switch_time_s": 0.0,
        "evaluation_time_s": 0.0,
        "energy_j": 100.0,
        "energy_source": "measured_counter",
        "power_w": 50.0,
        "memory_share": 0.25,
    }
    return Telemetry(**quiet | overrides)


def make_limits(**overrides: Any) -> ControlLimits:
    """Return the limits of a run that starts at 8 sequences and has every control; name what shall differ."""
    wide: dict[str, Any] = {
        "start": START,
        "min_batch_size": 1,
        "max_batch_size": 32,
        "masked_precisions": {},
        "pruning": "magnitude",
        "decisions": 10,
    }
    return ControlLimits(**wide | overrides)


class FixedClock:
    """Advances by the same time at each call, in seconds."""

    def __init__(self, step_s: float = 0.25) -> None:
        self._step_s = step_s
        self._calls = 0

    def __call__(self) -> float:
        self._calls += 1
        return self._calls * self._step_s


class PassClock:
    """Advances by the same time with each pass through a language model, however busy the machine is.

    A pass without gradients takes a tenth of it. Use it as a context manager, in which the passes are counted.
    """

    def __init__(self, pass_s: float = 0.01) -> None:
        self.pass_s, self.now_s = pass_s, 0.0

    def __call__(self) -> float:
        return self.now_s

    def __enter__(self) -> PassClock:
        self._hook = register_module_forward_hook(self._passed)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _passed(self, module: nn.Module, *_: Any) -> None:
        if isinstance(module, PreTrainedModel) and module.can_generate():  # the whole model, no part of it
            self.now_s += self.pass_s if torch.is_grad_enabled() else self.pass_s / 10


class SetClock:
    """Tells the seconds that it was set to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class SetMeter(EnergyMeter):
    """Tells the joules that it was set to; `None` says that it fails."""

    def __init__(self, energy_j: float | None = 0.0) -> None:
        self.energy_j = energy_j
        self.readings = 0

    @property
    def description(self) -> str:
        return "a meter that a test sets"

    def read(self) -> EnergyReading:
        self.readings += 1
        return EnergyReading(time_s=0.0, energy_j=self.energy_j, source="measured_counter")


def steady_meter(step_j: float = 5.0, readings: int = 2_000) -> RecordedMeter:
    """Return a meter that is `step_j` joules further at each reading."""
    return RecordedMeter(
        [EnergyReading(time_s=float(i), energy_j=i * step_j, source="estimated") for i in range(readings)]
    )


TOY_CASE = RunConfig(tokens=16_000, batch_size=8, sequence_length=10, decisions=20)
"""A case for `ToyPlant`, which reads only the budget, the batch and the number of decisions."""


class ToyPlant:
    """A plant without a model: its loss falls with the work done, and work goes fastest at a scale of `BEST_SCALE`.

    The loss is 4 (1 + work/100)^-1/4, so that twice the work is worth about twice the budget. A token does
    2^(1 - (log2(scale) - 2)^2/4) work: 1 at a scale of 1 (the base schedule) and of 16, 2 at the best scale of 4.
    """

    BEST_SCALE = 4.0

    def __init__(self, config: RunConfig = TOY_CASE) -> None:
        self.config = config
        self.tokens = 0
        self.work = 0.0
        self.decision = 0
        self.end_tokens = config.tokens
        self.finishing = False

    @staticmethod
    def rate(scale: float) -> float:
        """Return the work per token at a learning-rate scale."""
        return float(2 ** (1 - (math.log2(scale) - 2) ** 2 / 4))

    @property
    def loss(self) -> float:
        """Loss now, in nats/token."""
        return float(4 * (1 + self.work / 100) ** -0.25)

    def limits(self) -> ControlLimits:
        """Return limits that leave only the learning rate and the cool-down."""
        return make_limits(
            start=self.config.start(),
            min_batch_size=self.config.batch_size,
            max_batch_size=self.config.batch_size,
            masked_precisions={name: "a toy multiplies nothing" for name in ("tf32", "bf16", "fp16")},
            pruning="none",
            decisions=self.config.decisions,
        )

    def advance(self, controls: Controls, share: float) -> Telemetry:
        """Do `share` of the budget's work; a cool-down takes a fifth of the tokens so far."""
        if controls.finish and not self.finishing:
            self.finishing = True
            self.end_tokens = min(self.tokens * 6 // 5, self.end_tokens)
        tokens = max(min(round(share * self.config.tokens), self.end_tokens - self.tokens), 1)
        self.tokens += tokens
        self.work += tokens * self.rate(controls.learning_rate_scale)
        self.decision += 1
        return make_telemetry(
            decision=self.decision - 1,
            budget_used=min(self.tokens / self.config.tokens, 1.0),
            tokens=self.tokens,
            interval_tokens=tokens,
            train_loss=self.loss,
            train_loss_max=self.loss,
            requested=controls,
            learning_rate=self.config.base_learning_rate * controls.learning_rate_scale,
            finishing=self.finishing,
            finished=self.tokens >= self.end_tokens,
            time_s=tokens * 1e-3,
            energy_j=tokens * 0.1,
            power_w=100.0,
        )

    def evaluate(self) -> float:
        """Return the loss."""
        return self.loss

    def snapshot(self) -> Snapshot:
        """Return what changes along a run."""
        return {name: value for name, value in vars(self).items() if name != "config"}

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a state that `snapshot` returned."""
        vars(self).update(snapshot)
