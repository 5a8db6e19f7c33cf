"""The gradient noise scale from Adam's buffers, against gradients whose noise is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from live_runs import advance, case, live_run

from trainpilot.llm_runtime.interval import interval_noise_scale, loss_statistics, mean_finite, noise_scale_from_moments
from trainpilot.llm_runtime.optimizer import first_moment_norm

SIZE, STEPS = 1_000, 2_000


def simulate(noise_scale: float, batch_size: int, beta1: float) -> tuple[list[float], list[float]]:
    """Return |g| of each step, and every tenth |m|, for gradients of |G|^2 = 1 and tr(Sigma) = `noise_scale`."""
    generator = np.random.default_rng(0)
    signal = np.full(SIZE, 1 / math.sqrt(SIZE))
    deviation = math.sqrt(noise_scale / SIZE / batch_size)
    moment, gradient_norms, moment_norms = np.zeros(SIZE), [], []
    for step in range(1, STEPS + 1):
        gradient = signal + deviation * generator.standard_normal(SIZE)
        moment = beta1 * moment + (1 - beta1) * gradient
        gradient_norms.append(float(np.linalg.norm(gradient)))
        if step % 10 == 0:
            moment_norms.append(float(np.linalg.norm(moment)) / (1 - beta1**step))
    return gradient_norms, moment_norms


@pytest.mark.parametrize("beta1", [0.8, 0.9, 0.95])
@pytest.mark.parametrize(("noise_scale", "batch_size"), [(4.0, 8), (32.0, 8), (160.0, 8), (500.0, 64)])
def test_known_noise(noise_scale: float, batch_size: int, beta1: float) -> None:
    gradient_norms, moment_norms = simulate(noise_scale, batch_size, beta1)

    estimate = interval_noise_scale(gradient_norms, moment_norms, batch_size, gradient_clip=1e9, beta1=beta1)

    assert estimate == pytest.approx(noise_scale, rel=0.1)


def test_moments_by_hand() -> None:
    # |G|^2 = 1 and tr(Sigma)/B = 19 at b = 0.9: E|g|^2 = 20, E|m|^2 = 1 + 19 (0.1 / 1.9) = 2.
    assert noise_scale_from_moments(20.0, 2.0, beta1=0.9, batch_size=4) == pytest.approx(19 * 4)


def test_no_noise_is_zero() -> None:
    assert noise_scale_from_moments(3.0, 3.0, beta1=0.9, batch_size=4) == 0.0
    assert noise_scale_from_moments(3.0, 3.1, beta1=0.9, batch_size=4) == 0.0


def test_signal_lost_in_the_noise_saturates() -> None:
    # Pure noise: |m|^2 = |g|^2 / 19, and the signal would be 0. It counts as 1 % of |m|^2: tr/B is then 1,900.
    value = noise_scale_from_moments(19.0, 1.0, beta1=0.9, batch_size=2)
    assert value == pytest.approx(1_900 * 2, rel=1e-6)


@pytest.mark.parametrize(("moment", "beta1"), [(0.0, 0.9), (1.0, 0.0), (1.0, 1.0)])
def test_no_meaning_is_none(moment: float, beta1: float) -> None:
    assert noise_scale_from_moments(1.0, moment, beta1=beta1, batch_size=2) is None


def test_gradients_are_taken_as_adam_saw_them() -> None:
    clipped = interval_noise_scale([5.0, 0.5, 3.0], [0.4], 2, gradient_clip=1.0, beta1=0.9)
    assert clipped == interval_noise_scale([1.0, 0.5, 1.0], [0.4], 2, gradient_clip=1.0, beta1=0.9)
    free = interval_noise_scale([5.0, 0.5, 3.0], [0.4], 2, gradient_clip=math.inf, beta1=0.9)
    assert free is not None
    assert clipped is not None
    assert free > clipped


@pytest.mark.parametrize(
    ("gradients", "moments"),
    [([1.0], []), ([math.nan, 1.0], [0.5]), ([1.0], [math.nan]), ([1.0], [math.inf]), ([math.inf], [0.5])],
)
def test_unknown_is_none(gradients: list[float], moments: list[float]) -> None:
    assert interval_noise_scale(gradients, moments, 2, gradient_clip=1.0, beta1=0.9) is None


def test_skipped_steps_do_not_count() -> None:
    whole = interval_noise_scale([2.0, 2.0], [1.0], 2, gradient_clip=10.0, beta1=0.9)
    assert interval_noise_scale([2.0, math.inf, 2.0], [1.0], 2, gradient_clip=10.0, beta1=0.9) == whole
    assert mean_finite([2.0, math.inf, 4.0, math.nan]) == 3.0
    assert math.isnan(mean_finite([math.inf]))


def test_first_moment_norm_is_bias_corrected(tmp_path: Path) -> None:
    run = live_run(case(tmp_path))
    assert first_moment_norm(run.trainer.optimizer) is None
    trainer = run.trainer
    batch = run.stream.take(2)
    loss = trainer.loss(torch.from_numpy(batch))
    gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
    norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())

    trainer.set_learning_rate(0.0)
    trainer.step(batch)

    # After one step m / (1 - beta1) is the gradient itself, clipped to a norm of 1.
    moment = first_moment_norm(trainer.optimizer)
    assert moment is not None
    assert float(moment) == pytest.approx(min(norm, 1.0), rel=1e-5)


def test_a_run_measures_a_noise_scale(tmp_path: Path) -> None:
    run = live_run(case(tmp_path, tokens=25_600, batch_size=16, decisions=4, base_learning_rate=1e-4))
    noise_scale = advance(run).noise_scale
    assert noise_scale is not None
    assert 0 < noise_scale < 1_000


# Loss statistics --------------------------------------------------------------------------------------------


def test_loss_statistics_by_hand() -> None:
    # A straight line through 4, 3, 2, 1 with +0.3, -0.3, -0.3, +0.3 on it: the pattern has neither mean nor slope.
    statistics = loss_statistics([4.3, 2.7, 1.7, 1.3])
    assert statistics.mean == pytest.approx(2.5)
    assert statistics.std == pytest.approx(math.sqrt(4 * 0.09 / 2))
    assert statistics.maximum == 4.3
    assert statistics.finite


def test_progress_is_no_spread() -> None:
    assert loss_statistics([5.0, 4.0, 3.0, 2.0]).std == pytest.approx(0.0, abs=1e-12)
    assert loss_statistics([5.0, 4.0]).std == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(bad: float) -> None:
    statistics = loss_statistics([1.0, bad, 1.0])
    assert not statistics.finite
    assert math.isnan(statistics.mean)
