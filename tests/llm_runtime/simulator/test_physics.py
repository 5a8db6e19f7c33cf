"""The physics of simulated runs: single terms by hand, and what every run of it must show."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import ArrayLike

from trainpilot.llm_runtime.simulator.physics import (
    ADDED,
    DECADES,
    LATE,
    N_MODES,
    PARAMETERS,
    RELATIVE_RATES,
    Physics,
    PhysicsState,
    advance,
    loss,
    mode_rates,
    mode_weights,
)
from trainpilot.llm_runtime.simulator.records import Floats
from trainpilot.llm_runtime.simulator.references import ScheduleTable
from trainpilot.llm_runtime.simulator.shipped import shipped_physics

RATES = np.geomspace(1e-4, 1e-1, 13)
WSD = ScheduleTable.of("wsd", 0.1, 50).mean
PLAIN = {"gradient_noise": 0.0, "stall_rate": 1e9, "scar": 0.0, "growth": 0.0}
"""No noise in the gradients, no stalling, no scars, no growth: modes only."""


def made(n_runs: int = 1, /, *, weight_decay: float = 0.0, **changes: float) -> Physics:
    """Return typical physics of a loss from 6.0 to 1.5 nats/token, without late signal; name what shall differ."""
    values = {name: np.full(n_runs, parameter.typical) for name, parameter in PARAMETERS.items()}
    values |= {name: np.full(n_runs, ADDED[name]) for name in LATE} | {"floor": np.full(n_runs, 1.5)}
    values |= {name: np.full(n_runs, value, dtype=np.float64) for name, value in changes.items()}
    return Physics(values=values, initial_loss=np.full(n_runs, 6.0), weight_decay=np.full(n_runs, weight_decay))


def one(value: float) -> Floats:
    return np.array([value])


def stepped(physics: Physics, steps: float, rate: float, batch: float = 1.0) -> PhysicsState:
    state = PhysicsState.fresh(1)
    advance(physics, state, one(steps), one(rate), one(batch))
    return state


def trained(
    physics: Physics,
    rate: ArrayLike,
    factors: Sequence[float] | Floats = WSD,
    batch: float = 16,
    sequences: float = 4_000,
) -> Floats:
    """Return the loss after each of the intervals, whose factors on the learning rate are given."""
    state = PhysicsState.fresh(len(physics.initial_loss))
    per_run = np.ones(len(physics.initial_loss))
    losses = []
    for factor in factors:
        steps = sequences / len(factors) / batch * per_run
        advance(physics, state, steps, np.asarray(rate) * factor * per_run, batch * per_run)
        losses.append(loss(physics, state))
    return np.array(losses)


MODELS: list[Callable[[int], Physics]] = [
    lambda n: made(n, weight_decay=0.1),
    *(fitted.physics for fitted in shipped_physics()),
]


# By hand ----------------------------------------------------------------------------------------------------


def test_a_mode_fades_by_its_rate_times_twice_the_path() -> None:
    # 10 steps at twice the rate unit, 0.01 a step: the fastest mode keeps e^-(2 x 0.01 x 2 x 10) = e^-0.4.
    state = stepped(made(rate=0.01, **PLAIN), steps=10, rate=2e-3)

    assert state.signal[0, 0] == pytest.approx(0.670320, abs=1e-6)
    assert state.signal[0] == pytest.approx(np.exp(-0.4 * RELATIVE_RATES), abs=1e-9)
    assert state.steps[0] == 10


def test_gradient_noise_slows_every_step_down() -> None:
    # Noise of three times the signal: the root of the second moment is 2, and a step worth half of it.
    state = stepped(made(rate=0.01, **{**PLAIN, "gradient_noise": 12.0}), steps=10, rate=2e-3, batch=4)

    assert state.signal[0, 0] == pytest.approx(np.exp(-0.2), abs=1e-9)


def test_at_the_stalling_rate_the_fastest_mode_has_half_its_speed() -> None:
    physics = made(rate=0.01, **{**PLAIN, "stall_rate": 2.0, "stall_slow": 0.5})
    left = stepped(physics, steps=10, rate=2e-3).signal[0]

    assert left[0] == pytest.approx(np.exp(-0.2), abs=1e-9)
    # u^-0.5 is 1 at the fastest mode and sqrt(10^7) = 3162.28 at the slowest
    assert -np.log(left[-1]) == pytest.approx(0.4e-7 / 3_163.28, rel=1e-5)


def test_a_larger_batch_and_grown_weights_postpone_stalling() -> None:
    # (1 / 2)^1 x 4^-0.5 = 1/4: four fifths of the speed; weights twice as large: (1 / (2 x 2))^1 x 1/2 = 1/8.
    changes = {**PLAIN, "stall_rate": 2.0, "stall_power": 1.0, "stall_batch": 0.5, "stall_growth": 1.0}
    physics = made(rate=0.01, growth_power=0.0, **changes)
    state, grown = PhysicsState.fresh(1), PhysicsState.fresh(1)
    grown.growth[:] = 4.0
    for each in (state, grown):
        advance(physics, each, one(10), one(1e-3), one(4))

    assert state.signal[0, 0] == pytest.approx(np.exp(-0.2 * 4 / 5), abs=1e-9)
    assert grown.signal[0, 0] == pytest.approx(np.exp(-0.2 * 8 / 9), abs=1e-9)


def test_scars_come_from_young_steps_only_which_are_youth_in_all() -> None:
    physics = made(**{**PLAIN, "scar": 0.01, "youth": 20.0, "stall_batch": 0.5})
    state = stepped(physics, steps=20, rate=3e-3)
    # 20 x (1 - 1/e) young steps of 0.01
    assert state.scar[0] == pytest.approx(0.1264241, abs=1e-7)

    advance(physics, state, one(1e6), one(3e-3), one(1))
    assert state.scar[0] == pytest.approx(0.2)
    advance(physics, state, one(1e6), one(3e-2), one(1))
    assert state.scar[0] == pytest.approx(0.2), "a grown model is not hurt, and does not heal"
    # all of youth in one go, at twice the rate and on four sequences: 0.2 x 2^4 x 4^-0.5
    assert stepped(physics, steps=1e6, rate=6e-3, batch=4).scar[0] == pytest.approx(1.6)


def test_a_scar_stalls_later_steps_as_a_large_rate_does() -> None:
    physics, state = made(rate=0.01, stall_slow=0.0, **PLAIN), PhysicsState.fresh(1)
    state.scar[:] = 3.0
    advance(physics, state, one(10), one(2e-3), one(1))

    assert state.signal[0] == pytest.approx(np.exp(-0.1 * RELATIVE_RATES), abs=1e-9)  # a quarter of 0.4


def test_without_weight_decay_squared_weights_grow_equally_at_every_step() -> None:
    physics = made(**{**PLAIN, "growth": 0.01})

    # 0.01 x 2^2 x 10 steps on top of 1
    assert stepped(physics, steps=10, rate=2e-3).growth[0] == pytest.approx(1.4)


def test_weights_grow_to_the_balance_of_steps_and_weight_decay() -> None:
    # Shrinking by 2 x 0.002 x 0.1 = 4e-4 a step, growing by 0.04: balance at 100, half the way after ln 2 / 4e-4.
    physics = made(weight_decay=0.1, **{**PLAIN, "growth": 0.01, "shrinking": 1.0})

    assert stepped(physics, steps=np.log(2) / 4e-4, rate=2e-3).growth[0] == pytest.approx(50.5)
    assert stepped(physics, steps=1e6, rate=2e-3).growth[0] == pytest.approx(100.0)


def test_of_pure_noise_a_step_s_first_moment_keeps_a_nineteenth() -> None:
    physics = made(**{**PLAIN, "growth": 0.01, "gradient_noise": 1e12})

    assert stepped(physics, steps=10, rate=2e-3).growth[0] == pytest.approx(1 + 0.4 * 0.0526, rel=1e-9)


def test_grown_weights_make_steps_smaller() -> None:
    physics, state = made(rate=0.01, growth_power=2.0, **PLAIN), PhysicsState.fresh(1)
    state.growth[:] = 4.0
    advance(physics, state, one(10), one(2e-3), one(1))

    # weights twice as large, to the power of two: a quarter of the path
    assert state.signal[0, 0] == pytest.approx(np.exp(-0.1), abs=1e-9)


def test_the_loss_is_its_floor_its_signal_and_its_noise() -> None:
    physics, state = made(slow_noise=2.0, rate=0.5), PhysicsState.fresh(1)
    assert loss(physics, state)[0] == pytest.approx(6.0)

    state.signal[:] = 0.25
    state.excess[:] = 0.125
    state.noise[:] = 1 / RELATIVE_RATES  # so that the weights' sum, which is 1, is left
    assert loss(physics, state)[0] == pytest.approx(1.5 + 4.5 / 4 + 0.125 + 2.0 * 0.5)


def test_noise_that_settles_at_once_follows_the_learning_rate() -> None:
    physics = made(noise=0.05, noise_power=1.0, settling=1e3, **PLAIN)
    state = stepped(physics, steps=1_000, rate=4e-3)
    assert state.excess[0] == pytest.approx(0.2)
    advance(physics, state, one(1), one(1e-3), one(1))
    assert state.excess[0] == pytest.approx(0.05)


def test_noise_approaches_its_floor_along_the_path() -> None:
    physics = made(noise=0.05, noise_power=1.0, rate=0.01, settling=0.5, growth_power=0.0, **PLAIN)
    state = stepped(physics, steps=10_000, rate=4e-3)
    assert state.excess[0] == pytest.approx(0.2)
    moments = advance(physics, state, one(20), one(1e-3), one(1))
    path = 2 * 0.01 * 1.0 * 20 / np.sqrt(moments.signal_power[0] + moments.noise_power[0])
    assert state.excess[0] == pytest.approx(0.05 + 0.15 * np.exp(-0.5 * path))
    left = state.excess[0]
    advance(physics, state, one(1_000), one(0.0), one(1))
    assert state.excess[0] == left


def test_noise_is_the_same_at_another_batch_with_the_neutral_rate() -> None:
    physics = made(noise=0.05, noise_power=0.8, noise_batch=0.5, settling=1e3, **PLAIN)
    small = stepped(physics, 1e4, rate=1e-3, batch=4.0)
    large = stepped(physics, 1e4, rate=2e-3, batch=16.0)
    same_rate = stepped(physics, 1e4, rate=1e-3, batch=16.0)

    assert small.excess == pytest.approx(0.05 * 4**-0.4)
    assert large.excess == pytest.approx(small.excess)
    assert same_rate.excess == pytest.approx(small.excess * 4**-0.4)


def test_no_steps_change_nothing() -> None:
    physics, state = made(), PhysicsState.fresh(1)
    advance(physics, state, one(30), one(2e-3), one(8))
    before = state.copy()
    advance(physics, state, one(0), one(2e-3), one(8))

    for name, old in vars(before).items():
        assert getattr(state, name) == pytest.approx(old, abs=1e-15)


def test_putting_and_taking_rows_move_everything_of_a_run() -> None:
    many, other = made(3, rate=0.1), made(2, weight_decay=0.3, spectrum=1.0, rate=0.2, floor=2.0)
    many.put(np.array([2, 0]), other)
    taken = many.take(np.array([0, 1]))

    assert many.values["rate"].tolist() == [0.2, 0.1, 0.2]
    assert many.amplitude.tolist() == [4.0, 4.5, 4.0]
    assert taken.weight_decay.tolist() == [0.3, 0.0]
    for name in ("shares", "slow_weights", "stall", "gradient_shares"):
        assert (getattr(taken, name)[0] == getattr(other, name)[0]).all()
    taken.values["rate"][:] = 9.0
    assert many.values["rate"].tolist() == [0.2, 0.1, 0.2]


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


# Properties -------------------------------------------------------------------------------------------------


def test_halving_an_interval_changes_nothing_at_fixed_gradients() -> None:
    physics = made(gradient_noise=5.0, gradient_power=0.0, scar=0.0, growth=0.0, slow_noise=1.0, settling=1e3)
    whole = stepped(physics, steps=40, rate=3e-3, batch=8)
    halves = stepped(physics, steps=20, rate=3e-3, batch=8)
    advance(physics, halves, one(20), one(3e-3), one(8))

    assert halves.signal == pytest.approx(whole.signal, abs=1e-12)
    assert halves.noise == pytest.approx(whole.noise, rel=1e-9)
    assert loss(physics, halves) == pytest.approx(loss(physics, whole), abs=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_halving_all_intervals_moves_the_end_by_less_than_0_02_nats(model: Callable[[int], Physics]) -> None:
    rates = RATES[:7]  # 1e-4 to 3e-3
    once, twice = trained(model(7), rates)[-1], trained(model(7), rates, np.repeat(WSD, 2))[-1]

    assert np.abs(twice - once).max() < 0.02


@pytest.mark.parametrize("model", MODELS)
def test_in_the_safe_range_a_larger_learning_rate_is_never_worse_early(model: Callable[[int], Physics]) -> None:
    losses = trained(model(7), RATES[:7])  # 1e-4 to 3e-3

    assert (np.diff(losses[[1, 3, 5, 8]], axis=1) < 0).all()


@pytest.mark.parametrize("model", MODELS)
def test_the_best_learning_rate_is_inside_and_both_sides_are_worse(model: Callable[[int], Physics]) -> None:
    final = trained(model(13), RATES)[-1]
    best = int(np.argmin(final))

    assert 1e-3 < RATES[best] < 3e-2
    assert final[0] > final[best] + 0.3
    assert final[-1] > final[best] + 0.1
    assert np.isfinite(final).all()


@pytest.mark.parametrize("model", MODELS)
def test_a_spell_at_a_far_too_large_rate_does_damage_that_lasts(model: Callable[[int], Physics]) -> None:
    best = RATES[np.argmin(trained(model(13), RATES)[-1])]
    spell = WSD.copy()
    spell[6:9] *= 10

    assert trained(model(1), best, spell)[-1] > trained(model(1), best)[-1] + 0.05


def test_a_hot_first_stretch_leaves_a_lasting_loss_and_a_later_one_no_scar() -> None:
    def cost_of_scars(hot: int) -> Floats:
        factors = np.full(50, 0.1)
        factors[hot] = 10.0
        hurt, spared = (trained(made(scar=scar), 1e-3, factors) for scar in (1e-2, 0.0))
        return (hurt - spared)[:, 0]

    assert (cost_of_scars(0)[1:] > 0.05).all()
    assert np.abs(cost_of_scars(30)).max() < 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_a_rate_above_the_best_needs_warm_up_and_one_below_does_not(model: Callable[[int], Physics]) -> None:
    at_once = ScheduleTable.of("wsd", 0.0, 50).mean
    best = RATES[np.argmin(trained(model(13), RATES)[-1])]
    rates = np.array([0.1, 4.0, 8.0]) * best
    cost = trained(model(3), rates, at_once)[-1] - trained(model(3), rates)[-1]

    assert cost[0] < 0 < cost[1] < cost[2]


def test_typical_physics_lose_much_without_warm_up() -> None:
    at_once = ScheduleTable.of("wsd", 0.0, 50).mean

    # 7e-3 is four times the best rate
    assert trained(MODELS[0](1), 7e-3, at_once)[-1] > trained(MODELS[0](1), 7e-3)[-1] + 0.05


def test_where_noise_dominates_only_the_neutral_rate_counts() -> None:
    physics = made(gradient_noise=1e6, rate=0.6, stall_rate=1e9, noise=1e-9)
    finals = [trained(physics, 3e-3 * np.sqrt(batch / 16), batch=batch)[-1, 0] for batch in (4, 8, 16, 32)]

    assert finals == pytest.approx([finals[0]] * 4, abs=2e-3)
    assert finals[0] < 5.9  # it does learn


def test_where_the_signal_dominates_steps_count_and_the_batch_does_not() -> None:
    physics = made(gradient_noise=1e-9, stall_rate=1e9, noise_batch=0.0)
    finals = [trained(physics, 1e-3, batch=batch, sequences=batch * 250)[-1, 0] for batch in (4, 8, 16, 32)]

    assert finals == pytest.approx([finals[0]] * 4, abs=1e-6)
    assert trained(physics, 1e-3, batch=32, sequences=4_000)[-1, 0] > finals[-1] + 0.1  # half as many steps


def test_the_late_signal_is_learnt_around_its_own_rate() -> None:
    # Half of the signal lies around a hundredth of the fastest mode. The path of the steps is 2 x rate x l / root(g) x
    # steps with g = 1: 2 x 0.05 x 20 = 2 after 20 steps, when nearly nothing of it is learnt (1 - e^-0.02, some more as
    # the modes spread), and 2,000 after 20,000, when all of it is (e^-20).
    late = made(
        late=0.5, late_rate=0.01, spectrum=2.0, rate=0.05, gradient_floor=1.0, noise=0.0, slow_noise=0.0, **PLAIN
    )
    begun, ended = stepped(late, 20, 1e-3), stepped(late, 20_000, 1e-3)

    assert late.shares.sum(axis=1) == pytest.approx([1.0])
    assert 0.45 < ((late.shares * begun.signal)[0, RELATIVE_RATES < 0.1]).sum() < 0.5
    assert ((late.shares * ended.signal)[0, RELATIVE_RATES > 1e-3]).sum() < 0.02


def test_without_a_late_signal_the_shares_are_those_of_the_power_law() -> None:
    assert made(late=1e-300).shares[0] == pytest.approx(mode_weights(RELATIVE_RATES, 0.35), rel=1e-12)
