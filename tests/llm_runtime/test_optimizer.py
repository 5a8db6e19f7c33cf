"""AdamW's groups, its last update read from the buffers, and a change of batch that leaves it where it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.optimizer import (
    change_batch,
    effective_learning_rate,
    first_moment_norm,
    make_optimizer,
    norm_of,
    set_learning_rate,
    update_direction,
)
from trainpilot.llm_runtime.schedules import neutral_factor


def model_and_optimizer(**options: float) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    settings = {"base_learning_rate": 1e-2} | options
    return model, make_optimizer(model, RunConfig(**settings))  # type: ignore[arg-type]


def one_step(model: nn.Module, optimizer: Optimizer, seed: int) -> list[Tensor]:
    """Take a step; return the real change of each parameter, in the optimiser's order."""
    generator = torch.Generator().manual_seed(seed)
    loss = (model(torch.randn(8, 4, generator=generator)) - 1).square().mean()
    torch.autograd.backward(loss)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    optimizer.zero_grad()
    return [p.detach() - old for p, old in zip(parameters, before, strict=True)]


def test_decay_on_matrices_only() -> None:
    model, optimizer = model_and_optimizer(weight_decay=0.3)
    decayed, others = optimizer.param_groups

    assert [tuple(p.shape) for p in decayed["params"]] == [(3, 4), (2, 3)]
    assert [tuple(p.shape) for p in others["params"]] == [(3,), (3,), (3,), (2,)]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_the_default_is_fused_adamw() -> None:
    _, optimizer = model_and_optimizer()
    assert type(optimizer) is AdamW
    assert optimizer.defaults["fused"]


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(4, 3)
    model.bias.requires_grad = False
    groups = make_optimizer(model, RunConfig()).param_groups
    assert [len(group["params"]) for group in groups] == [1, 0]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_update_direction_is_the_real_change(steps: int, weight_decay: float) -> None:
    model, optimizer = model_and_optimizer(weight_decay=weight_decay)
    for seed in range(steps):
        changes = one_step(model, optimizer, seed)

    updates = [update for _, update in update_direction(optimizer)]

    # The decay is taken of the weights after the step, not before: lr x decay of the change itself.
    tolerance = 1e-6 + 1e-2 * weight_decay * max(float(change.abs().max()) for change in changes)
    assert len(updates) == len(changes) == 6
    for update, change in zip(updates, changes, strict=True):
        assert torch.allclose(update, change, rtol=1e-4, atol=tolerance)


def test_first_update_by_hand() -> None:
    # The first step of Adam is lr x sign(gradient), and the decay comes on top: -0.1 (1 + 0.5 x w).
    weight = nn.Parameter(torch.tensor([[2.0, -4.0]]))
    optimizer = AdamW([weight], lr=0.1, betas=(0.9, 0.95), eps=0.0, weight_decay=0.5)
    weight.grad = torch.tensor([[3.0, 3.0]])

    optimizer.step()

    assert weight.tolist() == [[pytest.approx(2 - 0.1 - 0.1), pytest.approx(-4 - 0.1 + 0.2)]]
    ((_, update),) = update_direction(optimizer)
    # ... of 1.8 and -3.9, the weights after the step.
    assert update.tolist() == [[pytest.approx(-0.1 - 0.05 * 1.8), pytest.approx(-0.1 + 0.05 * 3.9)]]


def test_update_direction_before_the_first_step_is_empty() -> None:
    _, optimizer = model_and_optimizer()
    assert update_direction(optimizer) == []
    assert first_moment_norm(optimizer) is None


def test_update_direction_changes_nothing() -> None:
    model, optimizer = model_and_optimizer()
    one_step(model, optimizer, 0)
    state = {id(p): {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}

    update_direction(optimizer)

    for parameter, values in optimizer.state.items():
        assert all(torch.equal(values[key], old) for key, old in state[id(parameter)].items())


def test_neutral_factor_by_hand() -> None:
    assert neutral_factor(16, 16) == 1.0
    assert neutral_factor(32, 16) == pytest.approx(1.41421356)
    assert neutral_factor(4, 16) == 0.5


@pytest.mark.parametrize("ratio", [2.0, 4.0, 0.5, 0.25, 1.5])
def test_half_life_in_tokens_stays(ratio: float) -> None:
    _, optimizer = model_and_optimizer(beta2=0.95)

    def half_life_steps() -> float:
        return math.log(0.5) / math.log(optimizer.param_groups[0]["betas"][1])

    before = half_life_steps()
    assert before == pytest.approx(13.51, abs=0.01)

    change_batch(optimizer, ratio)

    assert half_life_steps() * ratio == pytest.approx(before, rel=1e-9)
    assert {group["betas"][0] for group in optimizer.param_groups} == {0.9}


@pytest.mark.parametrize("steps", [1, 3, 40])
@pytest.mark.parametrize("ratio", [2.0, 0.5, 8.0])
def test_change_of_batch_does_not_move_the_update(ratio: float, steps: int) -> None:
    model, optimizer = model_and_optimizer()
    for seed in range(steps):
        one_step(model, optimizer, seed)
    before = update_direction(optimizer)
    norm = first_moment_norm(optimizer)

    change_batch(optimizer, ratio)

    assert {float(state["step"]) for state in optimizer.state.values()} == {steps / ratio}
    for (_, old), (_, new) in zip(before, update_direction(optimizer), strict=True):
        assert torch.allclose(old, new, rtol=1e-4, atol=1e-8)
    assert torch.allclose(norm, first_moment_norm(optimizer), rtol=1e-4)  # type: ignore[arg-type]


def test_there_and_back_is_where_it_was() -> None:
    model, optimizer = model_and_optimizer()
    for seed in range(5):
        one_step(model, optimizer, seed)
    betas = optimizer.param_groups[0]["betas"]

    change_batch(optimizer, 2.0)
    change_batch(optimizer, 0.5)

    assert optimizer.param_groups[0]["betas"] == pytest.approx(betas)
    assert {float(state["step"]) for state in optimizer.state.values()} == {5.0}


@pytest.mark.parametrize("ratio", [2.0, 0.5])
def test_a_constant_gradient_moves_by_the_rate_through_a_change(ratio: float) -> None:
    weight = nn.Parameter(torch.zeros(1, 1))
    optimizer = AdamW([weight], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(20):
        if step == 3:
            change_batch(optimizer, ratio)
        weight.grad = torch.ones_like(weight)
        optimizer.step()

    # Both moments, bias-corrected, are 1 throughout: 20 steps of exactly the rate.
    assert float(weight.detach()) == pytest.approx(-0.2, rel=1e-5)


def test_set_learning_rate_reaches_every_group() -> None:
    _, optimizer = model_and_optimizer()
    set_learning_rate(optimizer, 0.123)
    assert [group["lr"] for group in optimizer.param_groups] == [0.123, 0.123]
    assert effective_learning_rate(optimizer) == 0.123


def test_norm_of_by_hand() -> None:
    assert float(norm_of([torch.tensor([3.0, 0.0]), torch.tensor([[4.0], [12.0]])])) == 13.0
