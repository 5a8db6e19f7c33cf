"""Trainers of frameworks under budgets in seconds: they end with these, whatever their own steps and epochs say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import PassClock
from huggingface_runs import arguments, plain, rows, steered_trainer
from live_runs import LLAMA, case
from steering_loops import Loop, Script
from transformers import Trainer

from trainpilot.agents.integrations.huggingface_callback import SteeringCallback
from trainpilot.envs.action import KEEP
from trainpilot.llm_runtime import loop as loop_module
from trainpilot.llm_runtime.config import RunConfig

SECONDS = 2.0


@pytest.fixture(name="clock", autouse=True)
def one_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[PassClock]:
    """Give every loop a clock that does not depend on how busy the machine is."""
    with PassClock() as clock:
        monkeypatch.setattr(loop_module, "trusted_clock", lambda _: clock)
        yield clock


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return case(tmp_path, LLAMA, tokens=3_200, batch_size=4, decisions=10)


def test_a_steered_trainer_ends_with_its_seconds(config: RunConfig, tmp_path: Path, clock: PassClock) -> None:
    loop = plain(config, [KEEP])
    settings = replace(loop.steering.settings, sequences=None, budget=f"{SECONDS:g}s", policy=Script([KEEP]))
    trainer = steered_trainer(loop, tmp_path, steering=settings)
    begun_s = clock.now_s
    trainer.train()
    assert clock.now_s - begun_s == pytest.approx(SECONDS, abs=0.02)
    steering = trainer.steering
    assert steering.finished
    assert steering.summary()["budget_used"] == pytest.approx(1.0, abs=0.01)
    assert len(steering.records) == 10
    assert trainer.state.epoch != pytest.approx(1.0), "the epochs of the arguments were an estimate"
    assert trainer.state.global_step == trainer.state.max_steps
    assert steering.records[-1].telemetry.learning_rate < 0.05 * config.base_learning_rate


def test_a_fit_of_lightning_ends_with_its_seconds(config: RunConfig, clock: PassClock) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    import torch
    from lightning_runs import steer, trainer

    from trainpilot.llm_runtime.optimizer import make_optimizer

    loop = Loop(config, Script([KEEP]))
    loop.steering.close()

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = loop.model

        def training_step(self, batch: Any) -> Any:
            return loop.loss(batch)

        def configure_optimizers(self) -> Any:
            return make_optimizer(self.net, config)

    given = {"budget": f"{SECONDS:g}s", "sequence_length": 16, "policy": Script([KEEP]), "decisions": 10}
    callback = steer(given)
    data: Any = torch.from_numpy(loop.stream.take(100))
    begun_s = clock.now_s
    trainer(callback).fit(Module(), torch.utils.data.DataLoader(data, batch_size=4))
    assert clock.now_s - begun_s == pytest.approx(SECONDS, abs=0.02)
    steering = callback.steering
    assert steering is not None
    assert steering.finished
    assert steering.sequences > 100, "one epoch after the other"
    assert steering.summary()["budget_used"] == pytest.approx(1.0, abs=0.01)


def test_a_plain_trainer_that_counts_steps_refuses(config: RunConfig, tmp_path: Path) -> None:
    loop = plain(config, [KEEP])
    loop.steering.close()
    callback = SteeringCallback({"budget": "600s"})
    options: dict[str, Any] = {"optimizers": (loop.optimizer, None), "callbacks": [callback]}
    trainer = Trainer(loop.model, arguments(tmp_path, max_grad_norm=0.0), train_dataset=rows(loop), **options)
    message = r"^budget must be in sequences with SteeringCallback, .*, got 600s; use SteeredTrainer$"
    with pytest.raises(ValueError, match=message):
        trainer.train()
