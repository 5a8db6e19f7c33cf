"""The curvature probe on a loss whose slope and curvature are known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from live_runs import advance, case, live_run, same_bits, weights
from torch import Tensor, nn

from trainpilot.llm_runtime.optimizer import update_direction
from trainpilot.llm_runtime.probe import probe_curvature


class Bowl:
    """L(w) = w'Hw/2 + g'w + 1, of a weight vector kept in two parts."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(6, 6, generator=generator)
        self.hessian = root @ root.T
        self.slope = torch.randn(6, generator=generator)
        self.parts = [nn.Parameter(torch.randn(size, generator=generator)) for size in ((2, 2), (2,))]
        self.steps = [0.01 * torch.randn(size, generator=generator) for size in ((2, 2), (2,))]

    def loss(self) -> Tensor:
        w = torch.cat([part.flatten() for part in self.parts]).double()
        return w @ self.hessian.double() @ w / 2 + self.slope.double() @ w + 1

    def updates(self) -> list[tuple[nn.Parameter, Tensor]]:
        return list(zip(self.parts, self.steps, strict=True))


def test_linear_and_quadratic_part_are_exact() -> None:
    bowl = Bowl()
    w = torch.cat([part.detach().flatten() for part in bowl.parts]).double()
    d = torch.cat([step.flatten() for step in bowl.steps]).double()

    result = probe_curvature(bowl.updates(), bowl.loss)

    # The rest is what rounding w + d to float32 leaves.
    assert result.linear == pytest.approx(float((bowl.hessian.double() @ w + bowl.slope.double()) @ d), rel=1e-4)
    assert result.quadratic == pytest.approx(float(d @ bowl.hessian.double() @ d / 2), rel=1e-2)
    assert result.relative_update == pytest.approx(float(d.norm() / w.norm()), rel=1e-5)


def test_one_weight_by_hand() -> None:
    # L = 3 w^2 at w = 2, d = -0.5: L(1.5) = 6.75, L(2) = 12, L(2.5) = 18.75.
    weight = nn.Parameter(torch.tensor([2.0]))

    result = probe_curvature([(weight, torch.tensor([-0.5]))], lambda: 3 * weight.square().sum())

    assert result.linear == -6.0  # slope 12 times d
    assert result.quadratic == 0.75  # curvature 6 times d^2 / 2
    assert result.relative_update == 0.25


def test_overshoot_shows_as_quadratic_above_linear() -> None:
    # From w = 2 a step of -5 goes beyond the minimum and up the other side.
    weight = nn.Parameter(torch.tensor([2.0]))

    result = probe_curvature([(weight, torch.tensor([-5.0]))], lambda: 3 * weight.square().sum())

    assert result.linear == -60.0
    assert result.quadratic == 75.0


def test_weights_are_put_back_bit_for_bit() -> None:
    bowl = Bowl()
    bowl.parts[0].data.mul_(1e4)  # so that adding and subtracting a small step loses bits
    before = [part.detach().clone() for part in bowl.parts]

    probe_curvature(bowl.updates(), bowl.loss)

    assert all(torch.equal(part, old) for part, old in zip(bowl.parts, before, strict=True))


def test_weights_are_put_back_after_an_error() -> None:
    bowl = Bowl()
    before = [part.detach().clone() for part in bowl.parts]
    looks: list[int] = []

    def broken() -> Tensor:
        looks.append(1)
        if len(looks) == 3:
            raise KeyboardInterrupt
        return bowl.loss()

    with pytest.raises(KeyboardInterrupt):
        probe_curvature(bowl.updates(), broken)

    assert all(torch.equal(part, old) for part, old in zip(bowl.parts, before, strict=True))


def test_weights_at_zero_have_a_finite_relative_update() -> None:
    weight = nn.Parameter(torch.zeros(2))
    result = probe_curvature([(weight, torch.ones(2))], weight.sum)
    assert math.isfinite(result.relative_update)


def test_probe_of_a_run_agrees_with_its_gradient(tmp_path: Path) -> None:
    run = live_run(case(tmp_path, base_learning_rate=1e-3))
    advance(run)
    trainer, before = run.trainer, weights(run)
    sequences = run.stream.peek(4)
    position = run.stream.state_dict()

    result = trainer.probe_on(sequences)

    assert result is not None
    assert same_bits(weights(run), before)
    assert run.stream.state_dict() == position
    updates = update_direction(trainer.optimizer)
    gradients = torch.autograd.grad(trainer.loss(torch.from_numpy(sequences)), [p for p, _ in updates])
    slope = sum(float((g * d).sum()) for g, (_, d) in zip(gradients, updates, strict=True))
    assert slope < 0
    assert result.linear == pytest.approx(slope, rel=0.02)


def test_no_step_yet_is_not_measured(tmp_path: Path) -> None:
    run = live_run(case(tmp_path))
    assert run.trainer.probe_on(run.stream.peek(1)) is None


def test_telemetry_carries_the_probe(tmp_path: Path) -> None:
    run, unprobed = live_run(case(tmp_path), probe=True), live_run(case(tmp_path))

    telemetry, without = advance(run), advance(unprobed)

    assert telemetry.probe_linear is not None
    assert telemetry.probe_quadratic is not None
    assert telemetry.relative_update is not None
    assert 0 < telemetry.relative_update < 1
    assert 0 < telemetry.probe_time_s < telemetry.time_s
    assert (without.probe_linear, without.probe_quadratic, without.relative_update) == (None, None, None)
