"""A plain PyTorch loop under `Steering`, over the model and data of a live run; and policies that play a script."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from live_runs import live_run
from torch.nn import functional as F

from trainpilot.agents.bundle import BaseSchedule
from trainpilot.agents.controller import Policy
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.envs.action import KEEP, Action
from trainpilot.llm_runtime.config import Controls, RunConfig
from trainpilot.llm_runtime.data.batches import BatchStream
from trainpilot.llm_runtime.energy.meter import NoMeter
from trainpilot.llm_runtime.optimizer import make_optimizer

SCRIPT: list[Action] = [
    (4, 1, 0, 0, 0), (3, 2, 0, 0, 0), (3, 1, 3, 1, 0), (2, 2, 0, 1, 0), (3, 1, 0, 1, 0), (3, 0, 1, 0, 0),
    (4, 1, 0, 0, 0), (3, 0, 0, 1, 0), KEEP, KEEP,
]  # fmt: skip
"""Changes every control several times: rate, batch, precision and pruning."""


class Script:
    """Plays a list of actions, one for each decision."""

    def __init__(self, actions: list[Action]) -> None:
        self.actions, self.at = actions, 0

    def __call__(self, observation: np.ndarray, masks: np.ndarray) -> Action:
        self.at += 1
        return self.actions[min(self.at, len(self.actions)) - 1]


class Loop:
    """A plain PyTorch loop over the model, optimiser and data of a live run that is never advanced itself."""

    def __init__(
        self,
        config: RunConfig,
        policy: str | Policy,
        micro: int = 64,
        rewinds: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        **settings: Any,
    ) -> None:
        run = live_run(config)
        self.config, self.micro = config, micro
        self.model = run.loaded.model.train()
        self.optimizer = make_optimizer(self.model, config)
        self.stream = BatchStream(run.corpus.train, config.sequence_length, config.seed)
        options: dict[str, Any] = {
            "sequences": config.n_sequences(),
            "batch_size": config.batch_size,
            "sequence_length": config.sequence_length,
            "policy": policy,
            "decisions": config.decisions,
            "base_schedule": BaseSchedule(schedule=config.schedule, warmup_share=0.02),
            "gradient_clip": config.gradient_clip,
            "probe": False,
        }
        meter = NoMeter("a test")
        wanted = SteeringSettings(**options | settings)
        data = self.stream if rewinds else None
        self.steering = Steering(self.model, self.optimizer, wanted, meter=meter, data=data, clock=clock)
        self.rates: list[float] = []

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    def one_step(self) -> None:
        with self.steering.step() as step:
            batch = torch.from_numpy(self.stream.take(step.batch_size))
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            for part in batch.split(self.micro):
                few = partial(lambda part, count: self.loss(part[:count]), part)
                step.backward(partial(self.loss, part), sequences=len(part), probe_loss=few)

    def train(self, steps: int = 10**9) -> None:
        while not self.steering.finished and steps:
            self.one_step()
            steps -= 1


def far(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """Return the largest difference between the weights of two models."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def asked(loop: Loop) -> list[Controls]:
    return [record.telemetry.requested for record in loop.steering.records]
