"""A loop prepared by Accelerate is steered like a plain one, whichever way steering is attached to it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from policies import zigzag_bundle
from torch import nn

from trainpilot.agents import Steering, SteeringSettings
from trainpilot.agents.integrations import accelerated
from trainpilot.agents.steering import model_checks
from trainpilot.llm_runtime.energy.meter import NoMeter

accelerate = pytest.importorskip("accelerate")


def records(attach: Any, settings: SteeringSettings, *, prepare: bool) -> list[tuple[int, float | None, float]]:
    """Return batch, noise scale and learning rate of each interval of a regression."""
    torch.manual_seed(0)
    model: Any = nn.Linear(4, 1)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if prepare:
        model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    steering = attach(model, optimizer, settings, meter=NoMeter("a test"))
    while not steering.finished:
        with steering.step() as step:
            rows = torch.randn(step.batch_size, 4)
            step.backward(lambda rows=rows: (model(rows) - rows.sum(1, keepdim=True)).square().mean())
    told = [record.telemetry for record in steering.records]
    return [(each.requested.batch_size, each.noise_scale, each.learning_rate) for each in told]


@pytest.mark.filterwarnings("ignore:policy outside")
def test_a_prepared_optimizer_is_steered_as_the_one_inside_it(tmp_path: Path) -> None:
    zigzag_bundle(tmp_path / "policy.safetensors")
    settings = SteeringSettings(sequences=640, batch_size=8, policy=tmp_path / "policy.safetensors")
    plain = records(Steering, settings, prepare=False)
    assert len({batch for batch, _, _ in plain}) > 1
    assert any(noise is not None for _, noise, _ in plain)
    assert records(Steering, settings, prepare=True) == plain

    def attach(*arguments: Any, **options: Any) -> Steering:
        return accelerated(accelerate.Accelerator(cpu=True), *arguments, **options)

    assert records(attach, settings, prepare=True) == plain


def test_float16_of_accelerate_is_refused() -> None:
    optimizer: Any = type("AcceleratedOptimizer", (), {"scaler": object()})()
    with pytest.raises(ValueError, match="must not be 'fp16', whose loss scaler"):
        model_checks.own_optimizer(optimizer)


def test_processes_that_train_together_must_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2)
    monkeypatch.setattr(model_checks, "dist", group)
    monkeypatch.setattr(model_checks, "DistributedDataParallel", nn.Sequential)
    model_checks.check_alone(nn.Linear(2, 2))  # each process trains a model of its own
    with pytest.raises(ValueError, match="ranks must be given where 2 processes train one model, got None"):
        model_checks.check_alone(nn.Sequential(nn.Linear(2, 2)))
