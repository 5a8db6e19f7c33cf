"""Several optimizers that step one model together are steered as one: Muon for the matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from steering_loops import Script, far
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Muon, Optimizer

from trainpilot.agents.bundle import BaseSchedule
from trainpilot.agents.steering.guardrails import GuardrailSettings
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.envs.action import KEEP, Action
from trainpilot.llm_runtime.energy.meter import NoMeter
from trainpilot.llm_runtime.optimizer import JointOptimizer, follows_batch

LENGTH, VOCABULARY, BATCH = 8, 11, 4
UP, LARGER = (4, *KEEP[1:]), (KEEP[0], 2, *KEEP[2:])
FLAT = BaseSchedule(schedule="constant", warmup_share=0.0)


class Model(nn.Module):
    """An embedding, two matrices and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.norm = nn.Embedding(VOCABULARY, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(16, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.norm(self.embed(tokens[:, :-1]))
        logits = self.down(F.silu(self.up(hidden)))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def muon_and_adam(model: Model) -> list[Optimizer]:
    matrices = [model.up.weight, model.down.weight]
    others = [model.embed.weight, model.norm.weight, model.norm.bias]
    return [Muon(matrices, lr=0.02, weight_decay=0.0), AdamW(others, lr=0.004, betas=(0.9, 0.95))]


class Loop:
    """A plain loop over sequences that a rule makes."""

    def __init__(self, policy: Any, *, steps: int = 20, **settings: Any) -> None:
        self.model = Model()
        self.optimizers = muon_and_adam(self.model)
        wanted: dict[str, Any] = {
            "sequences": steps * BATCH, "batch_size": BATCH, "sequence_length": LENGTH, "policy": policy,
            "decisions": steps // 2, "base_schedule": FLAT, "max_batch_size": 8, "probe": False, "gradient_clip": 1.0,
        }  # fmt: skip
        wanted |= settings
        self.steering = Steering(self.model, self.optimizers, SteeringSettings(**wanted), meter=NoMeter("a test"))
        self.at = 0

    def train(self, steps: int = 10**9) -> None:
        while not self.steering.finished and steps:
            with self.steering.step() as step:
                rows = sequences(self.at, step.batch_size)
                step.backward(partial(self.model, rows))
            self.at += step.batch_size
            steps -= 1


def sequences(start: int, count: int) -> Tensor:
    rows = torch.arange(start, start + count)[:, None] * 5 + torch.arange(LENGTH + 1) ** 2
    return rows % VOCABULARY


def states(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    held = [state for each in optimizers for state in each.state.values()]
    return [value for state in held for value in state.values() if isinstance(value, Tensor)]


def test_without_control_the_weights_are_those_of_a_plain_loop() -> None:
    model = Model()
    optimizers = muon_and_adam(model)
    for step in range(20):
        model(sequences(step * BATCH, BATCH)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in optimizers:
            each.step()
            each.zero_grad()
    loop = Loop("none")
    loop.train()
    assert far(model, loop.model) == 0.0


def test_one_scale_moves_all_rates_and_keeps_their_ratio() -> None:
    loop = Loop(Script([UP, UP, *[KEEP] * 20]))
    loop.train(5)
    scale = loop.steering.controls.learning_rate_scale
    assert scale > 1
    assert [each.param_groups[0]["lr"] for each in loop.optimizers] == pytest.approx([0.02 * scale, 0.004 * scale])
    assert loop.steering.peak_learning_rate == 0.02
    loop.steering.close()
    assert [each.param_groups[0]["lr"] for each in loop.optimizers] == [0.02, 0.004]


def test_a_larger_batch_changes_each_optimizer_by_its_rule() -> None:
    loop = Loop(Script([KEEP, LARGER, *[KEEP] * 20]))
    loop.train(5)
    assert loop.steering.controls.batch_size == 2 * BATCH
    muon, adam = loop.optimizers
    assert muon.param_groups[0]["lr"] == pytest.approx(0.02 * 2**0.5)
    assert adam.param_groups[0]["betas"] == pytest.approx((0.9, 0.95**2))
    assert muon.param_groups[0]["momentum"] == 0.95


def test_a_rollback_restores_all_of_them() -> None:
    loop = Loop("none")
    loop.train(4)
    copied, weights = loop.steering.loop.snapshot(), [p.detach().clone() for p in loop.model.parameters()]
    held = [value.clone() for value in states(loop.optimizers)]
    loop.train(3)
    assert any(not torch.equal(a, b) for a, b in zip(states(loop.optimizers), held, strict=True))
    loop.steering.loop.restore(copied)
    assert all(torch.equal(a, b) for a, b in zip(loop.model.parameters(), weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(states(loop.optimizers), held, strict=True))


def test_a_run_goes_on_from_the_states_of_each() -> None:
    actions: list[Action] = [UP, LARGER, KEEP, UP, *[KEEP] * 20]
    whole, first = Loop(Script(actions)), Loop(Script(actions))
    whole.train()
    first.train(7)
    saved = first.steering.state_dict(), first.model.state_dict(), [each.state_dict() for each in first.optimizers]
    second = Loop(Script(actions[4:]))  # the constructor asks once
    second.model.load_state_dict(saved[1])
    for each, state in zip(second.optimizers, saved[2], strict=True):
        each.load_state_dict(state)
    second.steering.load_state_dict(saved[0])
    second.steering.controller.controller.policy = Script(actions[first.steering.progress.decision + 1 :])
    second.at = first.at
    second.train()
    assert far(whole.model, second.model) == 0.0
    noise = [record.telemetry.noise_scale for record in whole.steering.records]
    assert noise == [record.telemetry.noise_scale for record in second.steering.records]


def test_the_noise_scale_is_that_of_adam_s_part() -> None:
    loop = Loop("none", steps=40, decisions=2, gradient_clip=None)
    loop.train()
    part, norms = loop.optimizers[1], []
    assert loop.steering.records[-1].telemetry.noise_scale is not None
    model = Model()
    optimizers = muon_and_adam(model)
    for step in range(20):
        model(sequences(step * BATCH, BATCH)).backward()
        norms.append(float(torch.stack([p.grad.norm() for p in optimizers[1].param_groups[0]["params"]]).norm()))
        for each in optimizers:
            each.step()
            each.zero_grad()
    assert len(part.state) == 3
    recorded = Loop("none", steps=40, decisions=2, gradient_clip=None)
    recorded.train(19)
    seen = recorded.steering.loop.recorder.steps
    found = [float(step.adam_gradient_norm) for step in seen if step.adam_gradient_norm is not None]
    assert found == pytest.approx(norms[:19], rel=1e-5)
    assert all(float(step.gradient_norm) > norm for step, norm in zip(seen, found, strict=True))


def test_what_cannot_be_steered_together_is_one_clear_line() -> None:
    model, settings = Model(), SteeringSettings(sequences=80, batch_size=4, policy="none", decisions=8)
    muon, adam = muon_and_adam(model)
    with pytest.raises(ValueError, match="optimizer must be an optimizer, or several, got an empty list"):
        Steering(model, [], settings)
    with pytest.raises(ValueError, match="optimizers must step different parameters, got 3 that two of them step"):
        Steering(model, [muon, adam, adam], settings)
    first = Steering(model, [muon, adam], settings)
    with pytest.raises(ValueError, match="must be steered by one controller"):
        Steering(model, adam, settings)
    first.close()


def test_the_batch_stays_under_an_optimizer_whose_rule_is_not_known() -> None:
    model = Model()
    muon, _ = muon_and_adam(model)
    others = SGD([model.embed.weight], lr=0.1)
    assert follows_batch(muon)
    assert not follows_batch(JointOptimizer([muon, others]))
    bounds = GuardrailSettings(max_rollbacks=0)
    settings = SteeringSettings(sequences=80, batch_size=4, policy=Script([LARGER] * 9), guardrails=bounds, decisions=8)
    steering = Steering(model, [muon, others], settings)
    assert steering.controls.batch_size == 4
    assert repr(steering.loop.optimizer) == "Muon + SGD"
