from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from second_physics.law import PARAMETERS, PublishedPhysics, fit_published

from trainpilot.llm_runtime.simulator.physics import DECADES, N_MODES, mode_rates, mode_weights, step_modes

PHYSICS = PublishedPhysics(
    signal_exponent=0.5,
    noise_exponent=0.5,
    top_rate=0.03,
    floor=2.5,
    signal_scale=6.0,
    noise_scale=0.15,
    reference_learning_rate=3e-4,
    covariance=tuple((0.0,) * 6 for _ in range(6)),
    mean_absolute_error=0.0,
)
STEPS = np.arange(200.0, 6_001.0, 100.0)
SCHEDULES = {
    "constant": np.full(len(STEPS), 3e-4),
    "drop": np.where(STEPS < 3_000, 3e-4, 9e-5),
    "linear": 3e-4 * np.linspace(1.0, 0.05, len(STEPS)),
}


def curves(noise: float = 0.0) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    random = np.random.default_rng(0)
    losses = [PHYSICS.predict(lr, STEPS) + noise * random.standard_normal(len(STEPS)) for lr in SCHEDULES.values()]
    return [STEPS] * len(losses), list(SCHEDULES.values()), losses


def test_rates_fall_from_one_over_seven_decades_in_equal_ratios() -> None:
    rates = mode_rates()

    assert rates.shape == (N_MODES,)
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(10.0**-DECADES)
    assert np.ptp(rates[1:] / rates[:-1]) < 1e-12


def test_weights_are_powers_of_the_rates_that_sum_to_one() -> None:
    rates = np.array([1.0, 0.25])

    assert mode_weights(rates, 0.5) == pytest.approx([2 / 3, 1 / 3])
    assert mode_weights(rates, np.array([0.5, 1.0])) == pytest.approx(np.array([[2 / 3, 1 / 3], [0.8, 0.2]]))


def test_a_stretch_lets_the_signal_fade_and_noise_come_to_its_balance() -> None:
    signal, noise = np.ones(1), np.full(1, 2.0)

    step_modes(signal, noise, np.array([0.5]), 1.0, 3.0)  # r = 2 x 0.5 x 1 = 1

    assert signal[0] == pytest.approx(math.exp(-1))
    assert noise[0] == pytest.approx(2 * math.exp(-1) + 3 * (1 - math.exp(-1)))


def test_without_a_learning_rate_nothing_fades_and_noise_adds_up() -> None:
    signal, noise = np.ones(2), np.ones(2)

    step_modes(signal, noise, np.array([1.0, 1e-7]), 0.0, 5.0)

    assert signal.tolist() == [1.0, 1.0]
    assert noise == pytest.approx([6.0, 6.0])


def test_two_half_stretches_are_one_whole() -> None:
    rates, path, injected = mode_rates(), np.array([0.3, 40.0]), np.array([1.0, 7.0])
    whole = np.ones((2, N_MODES)), np.zeros((2, N_MODES))
    halves = np.ones((2, N_MODES)), np.zeros((2, N_MODES))

    step_modes(*whole, rates, path, injected)
    for _ in range(2):
        step_modes(*halves, rates, path / 2, injected / 2)

    np.testing.assert_allclose(halves[0], whole[0], rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(halves[1], whole[1], rtol=1e-11)


def test_runs_side_by_side_are_stepped_as_if_alone() -> None:
    rates, path = mode_rates(), np.array([0.1, 3.0, 90.0])
    signal, noise = np.ones((3, N_MODES)), np.zeros((3, N_MODES))
    step_modes(signal, noise, rates, path, path**2)

    for i in range(3):
        alone = np.ones(N_MODES), np.zeros(N_MODES)
        step_modes(*alone, rates, path[i], path[i] ** 2)
        np.testing.assert_array_equal(signal[i], alone[0])
        np.testing.assert_array_equal(noise[i], alone[1])


def test_the_loss_starts_at_the_floor_plus_the_signal() -> None:
    assert PHYSICS.predict([3e-4])[0] == pytest.approx(2.5 + 6.0)


def test_a_constant_learning_rate_gives_the_sum_over_modes() -> None:
    u = mode_rates()
    r = 2 * u * 0.03 * 500  # 500 steps at the reference learning rate
    signal = mode_weights(u, 0.5) @ np.exp(-r)
    noise = mode_weights(u, 0.5) @ (1 - np.exp(-r))  # 2 u q with q = n (1 - e^-r) / r, times the top rate

    assert PHYSICS.predict(np.full(501, 3e-4))[-1] == pytest.approx(2.5 + 6 * signal + 0.15 * noise, rel=1e-9)


def test_the_floor_of_a_vanishing_learning_rate_is_reached_from_above() -> None:
    high, low = (PHYSICS.predict(np.full(2, lr), [0.0, 1e13])[-1] for lr in (3e-4, 3e-6))

    assert high == pytest.approx(2.5 + 0.15, abs=1e-6)  # noise in balance
    assert low == pytest.approx(2.5 + 0.0015, abs=1e-3)


def test_a_decay_ends_lower_than_a_constant_learning_rate() -> None:
    ends = {name: PHYSICS.predict(lr, STEPS)[-1] for name, lr in SCHEDULES.items()}

    assert max(ends["linear"], ends["drop"]) < ends["constant"] - 0.01


def test_points_far_apart_and_every_step_tell_the_same() -> None:
    every = np.concatenate(
        [np.linspace(0.0, 3e-4, 201)[:-1], np.interp(np.arange(200, 6_001), STEPS, SCHEDULES["linear"])]
    )

    fine, coarse = PHYSICS.predict(every)[200::100], PHYSICS.predict(SCHEDULES["linear"], STEPS)

    np.testing.assert_allclose(fine, coarse, atol=1.5e-3)
    np.testing.assert_allclose(fine[1:], coarse[1:], atol=5e-4)


def test_the_warm_up_can_be_shorter_than_what_comes_before_the_first_point() -> None:
    ramp, none = (PHYSICS.predict(SCHEDULES["constant"], STEPS, warmup_steps=warmup)[0] for warmup in (None, 0.0))
    flat = PHYSICS.predict(np.full(201, 3e-4))[-1]

    assert none == pytest.approx(flat, abs=1e-9)
    assert ramp > none


def test_a_fit_finds_the_numbers_that_made_the_curves() -> None:
    fitted = fit_published(*curves())

    for name in PARAMETERS:
        assert getattr(fitted, name) == pytest.approx(getattr(PHYSICS, name), rel=1e-3), name
    assert fitted.reference_learning_rate == 3e-4
    assert fitted.mean_absolute_error < 1e-6


def test_with_noise_the_truth_lies_within_a_few_standard_errors() -> None:
    fitted = fit_published(*curves(noise=2e-3))

    for name, error in fitted.standard_errors.items():
        assert abs(math.log(getattr(fitted, name) / getattr(PHYSICS, name))) < 4 * error, name
    assert 1e-3 < fitted.mean_absolute_error < 3e-3
    unseen = 3e-4 * 0.5 * (1 + np.cos(np.linspace(0, np.pi, len(STEPS))))
    np.testing.assert_allclose(fitted.predict(unseen, STEPS), PHYSICS.predict(unseen, STEPS), atol=5e-3)


def test_one_curve_without_decay_leaves_the_noise_unsure() -> None:
    losses = PHYSICS.predict(SCHEDULES["constant"], STEPS) + 2e-3 * np.random.default_rng(1).standard_normal(len(STEPS))
    alone = fit_published(STEPS, SCHEDULES["constant"], losses)

    assert alone.mean_absolute_error < 3e-3
    assert alone.standard_errors["noise_scale"] > 3 * fit_published(*curves(noise=2e-3)).standard_errors["noise_scale"]


def test_a_wild_point_hardly_moves_the_fit() -> None:
    steps, rates, losses = curves()
    losses[0] = losses[0].copy()
    losses[0][20] += 1.0

    assert fit_published(steps, rates, losses).floor == pytest.approx(PHYSICS.floor, rel=0.01)


def test_the_learning_rate_unit_does_not_matter() -> None:
    steps, rates, losses = curves()
    scaled = fit_published(steps, [1_000 * lr for lr in rates], losses)

    assert scaled.top_rate == pytest.approx(PHYSICS.top_rate, rel=1e-3)
    assert scaled.predict(1_000 * rates[2], STEPS) == pytest.approx(losses[2], abs=1e-5)


def test_standard_errors_are_the_roots_of_the_diagonal() -> None:
    covariance = tuple(tuple(0.04 if i == j else 0.0 for j in range(6)) for i in range(6))

    assert replace(PHYSICS, covariance=covariance).standard_errors == pytest.approx(dict.fromkeys(PARAMETERS, 0.2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, lr, loss: (s[:-1], lr, loss), "one value for each point"),
        (lambda s, lr, loss: (s[:19], lr[:19], loss[:19]), "at least 20 points, got 19"),
        (lambda s, lr, loss: (s, lr, np.where(s == 1_000, np.nan, loss)), "loss must be finite, got nan"),
        (lambda s, lr, loss: (s, -lr, loss), "lr must be at least 0, got -0.0003"),
        (lambda s, lr, loss: (s, 0 * lr, loss), "lr must be above 0 somewhere"),
        (lambda s, lr, loss: (s[::-1], lr, loss), "step must rise"),
        (lambda s, lr, loss: (s, lr, -loss), "loss must be above 0"),
        (lambda s, lr, loss: ([s, s], [lr], [loss]), "equally many curves"),
    ],
)
def test_curves_that_cannot_be_fitted_are_refused(change, message) -> None:
    lr = SCHEDULES["constant"]

    with pytest.raises(ValueError, match=message):
        fit_published(*change(STEPS, lr, PHYSICS.predict(lr, STEPS)))


def test_a_warm_up_longer_than_the_steps_before_the_first_point_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps must be in \[0, first step = 200\], got 201"):
        PHYSICS.predict(SCHEDULES["constant"], STEPS, warmup_steps=201)
