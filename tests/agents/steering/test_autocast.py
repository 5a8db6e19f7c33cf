"""A loop's own `torch.autocast` holds, is read back, and is refused where steering chooses the precision itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainpilot.agents import Steering, SteeringSettings
from trainpilot.llm_runtime.config import Precision
from trainpilot.llm_runtime.energy.meter import NoMeter

BF16 = torch.bfloat16


class Loop:
    """A regression under `torch.autocast`, and the number formats of its outputs in training and in the probe."""

    def __init__(self, *precisions: Precision) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 1)
        self.trained: set[torch.dtype] = set()
        self.probed: set[torch.dtype] = set()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        settings = SteeringSettings(sequences=160, batch_size=8, policy="none", decisions=4, precisions=precisions)
        self.steering = Steering(self.model, optimizer, settings, meter=NoMeter("a test"))

    def train(self, dtype: torch.dtype) -> None:
        while not self.steering.finished:
            with torch.autocast("cpu", dtype), self.steering.step() as step:
                rows = torch.randn(step.batch_size, 4)
                step.backward(lambda rows=rows: self.loss(rows))

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        output = self.model(rows)
        (self.trained if self.model.training else self.probed).add(output.dtype)
        squared: torch.Tensor = output.float().square().mean()
        return squared


def test_autocast_around_the_step_holds_in_training_and_is_recorded() -> None:
    loop = Loop("fp32")
    loop.train(BF16)
    assert loop.trained == {BF16}
    assert loop.probed == {torch.float32}, "differences of losses need all their digits"
    assert {record.telemetry.precision for record in loop.steering.records} == {"bf16"}


def test_autocast_of_the_only_precision_changes_nothing() -> None:
    loop = Loop("bf16")
    loop.train(BF16)
    assert loop.trained == {BF16}


def test_autocast_beside_precisions_to_choose_from_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be left out where steering chooses .* precisions fp32, bf16"):
        Loop("fp32", "bf16").train(BF16)


def test_float16_is_refused_for_want_of_a_loss_scaler() -> None:
    with pytest.raises(ValueError, match=r"no loss scaler; take torch\.bfloat16"):
        Loop("fp32").train(torch.float16)
