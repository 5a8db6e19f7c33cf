"""States of `Steering` in which one value is spoilt."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fakes import SetClock
from torch import nn

from tests.attack.attempts import Attempt, Failures
from tests.attack.file_checks import Judge
from tests.attack.mutations import PLAUSIBLE, Mutation
from trainpilot import Steering, SteeringSettings
from trainpilot.agents.bundle import BaseSchedule
from trainpilot.agents.steering.contract import QualityContract
from trainpilot.envs.action import KEEP, Action
from trainpilot.llm_runtime.energy.meter import NoMeter

STEPS, SAVED_AFTER = 60, 33


def rises(observation: np.ndarray, masks: np.ndarray) -> Action:
    """Ask for a higher learning rate, so that guardrails and contract have something to remember."""
    return (4, *KEEP[1:])


class TinyRun:
    """A steered run of six weights: the same with every start."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(5, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        settings = SteeringSettings(
            sequences=2 * STEPS, batch_size=2, decisions=20, policy=rises, probe=False,
            base_schedule=BaseSchedule(schedule="wsd", warmup_share=0.1),
            contract=QualityContract(max_slowdown=1e6),
        )  # fmt: skip
        self.steering = Steering(self.model, self.optimizer, settings, meter=NoMeter("an attack"), clock=SetClock())

    def train(self, steps: int) -> None:
        """Make steps on rows that follow from the number of sequences so far."""
        for _ in range(steps):
            if self.steering.finished:
                return
            with self.steering.step() as step:
                rows = torch.sin(torch.arange(10.0) + self.steering.sequences).view(2, 5)[: step.batch_size]
                step.backward(lambda batch: self.model(batch).sub(1).square().mean(), batch=rows)

    def everything(self) -> dict[str, Any]:
        """Return all that a state is loaded into."""
        parts = {
            "steering": self.steering.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        return copy.deepcopy(parts)


def saved_state() -> dict[str, Any]:
    """Return model, optimizer and steering of a run in its middle."""
    run = TinyRun()
    run.train(SAVED_AFTER)
    return run.everything()


def state_attempt(shared: Path, mutation: Mutation) -> Attempt:
    """Return the attempt that loads a spoilt state."""
    run = partial(_load_spoilt, shared, mutation)
    return Attempt(name=f"state of Steering, {mutation}", promises=("state", "limits"), run=run)


def _load_spoilt(shared: Path, mutation: Mutation, place: Path) -> Failures:
    saved = torch.load(shared / "state.pt", weights_only=True)
    run, judge = _loaded(saved), Judge()
    before = run.everything()

    def load() -> bool:
        run.steering.load_state_dict(mutation.of(saved["steering"]))
        return True

    accepted = judge.loaded(load, "state")
    if accepted:
        plausible = mutation.change in PLAUSIBLE
        return judge.sound(lambda: _goes_on(run, saved, plausible=plausible), "state")
    if not _same(before, run.everything()):
        judge.failures["state"] = f"{judge.failures.get('state', 'refused')}, with half of the state applied"
    return judge.failures


def _loaded(saved: dict[str, Any]) -> TinyRun:
    run = TinyRun()
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # torch would keep its tensors
    return run


def _goes_on(run: TinyRun, saved: dict[str, Any], *, plausible: bool) -> str | None:
    """Return what is wrong with a run that took a spoilt state, against one that took the unspoilt one."""
    other = _loaded(saved)
    other.steering.load_state_dict(copy.deepcopy(saved["steering"]))
    for each in (run, other):
        each.train(STEPS)
    same = all(torch.equal(a, b) for a, b in zip(run.model.parameters(), other.model.parameters(), strict=True))
    if plausible and all(torch.isfinite(weights).all() for weights in run.model.parameters()):
        return None
    return None if same else "accepted, and trains on differently"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other) or one is other
