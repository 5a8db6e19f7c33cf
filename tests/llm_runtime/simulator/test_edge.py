"""The edge of the learning rate: by hand, what it never does, and what is seen of it in the telemetry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import ArrayLike

from trainpilot.llm_runtime.simulator.fitting import FittedPhysics, SizeLaw
from trainpilot.llm_runtime.simulator.physics import EDGE, PARAMETERS, Physics, PhysicsState, advance, edge, loss
from trainpilot.llm_runtime.simulator.records import Floats
from trainpilot.llm_runtime.simulator.runs import Pool, SimulatedRuns, Start
from trainpilot.llm_runtime.simulator.shipped import shipped_physics

AT_TEN = {"edge_rate": 10.0, "edge_batch": 1e-4, "edge_warmup": 0.1, "edge_patience": 50.0, "edge_damage": 0.5}
"""An edge at ten rate units, 0.01, at once."""


def made(n: int = 1, /, **changes: float) -> Physics:
    """Return typical physics of a loss from 6.0 to 2.0 nats/token with that edge and some parameters replaced."""
    values = {name: np.full(n, parameter.typical) for name, parameter in PARAMETERS.items()}
    values |= {name: np.full(n, value) for name, value in ({"floor": 2.0} | AT_TEN | changes).items()}
    return Physics(values=values, initial_loss=np.full(n, 6.0), weight_decay=np.full(n, 0.1))


def damage(physics: Physics, rates: ArrayLike, steps: float = 10.0, batch: float = 1.0) -> Floats:
    """Return the damage after stretches of these rates, of shape (n_stretches,) or (n_stretches, n_runs)."""
    n = len(physics.initial_loss)
    state, ones = PhysicsState.fresh(n), np.ones(n)
    for rate in np.asarray(rates):
        advance(physics, state, steps * ones, rate * ones, batch * ones)
    return state.damage


def test_a_run_at_e_times_the_edge_dies_within_its_patience() -> None:
    # 25 steps of a patience of 50: 1 - e^-1/2; at e^2 times the edge four times as fast
    assert damage(made(), [1e-2 * np.e], steps=25) == pytest.approx(0.393469, abs=1e-6)
    assert damage(made(), [1e-2 * np.e**2], steps=25) == pytest.approx(1 - np.exp(-2), abs=1e-6)


def test_damage_is_a_share_of_the_whole_signal_that_stays() -> None:
    physics, state = made(), PhysicsState.fresh(1)
    state.damage[:] = 0.25
    fresh = loss(physics, PhysicsState.fresh(1))

    assert loss(physics, state) - fresh == pytest.approx(0.5)  # 0.25 x 0.5 x (6 - 2)
    for rate in (1e-3, 9e-3, 0.0):
        advance(physics, state, np.full(1, 100.0), np.full(1, rate), np.ones(1))
    assert state.damage.tolist() == [0.25]
    state.restart(np.arange(1))
    assert state.damage.tolist() == [0.0]


def test_below_the_edge_nothing_changes_to_the_last_bit() -> None:
    with_edge, without = made(), made(edge_rate=1e9)
    states = PhysicsState.fresh(1), PhysicsState.fresh(1)
    for physics, state in zip((with_edge, without), states, strict=True):
        for rate in np.geomspace(1e-4, 9.9e-3, 30):
            advance(physics, state, np.full(1, 7.0), np.full(1, rate), np.full(1, 4.0))

    for name, one in vars(states[0]).items():
        assert (one == getattr(states[1], name)).all(), name
    assert loss(with_edge, states[0]) == loss(without, states[1])


def test_damage_rises_with_rate_and_time_and_never_beyond_one() -> None:
    physics, rates = made(40), np.geomspace(1e-3, 10.0, 40)
    after = np.array([damage(physics, [rates] * n) for n in (1, 2, 5, 50)])

    assert (np.diff(after, axis=1) >= 0).all()
    assert (np.diff(after, axis=0) >= 0).all()
    assert after.max() <= 1
    assert (after[:, rates < 1e-2] == 0).all()
    assert (after[0, rates > 1.1e-2] > 0).all()


def test_from_little_harm_to_a_dead_run_within_a_factor_of_1_4() -> None:
    # A run of 2,500 steps at its peak, as one of fifty intervals of patience, at 1.05 and 1.4 times the edge.
    little, dead = damage(made(2), [np.array([1.05e-2, 1.4e-2])], steps=2_500)

    assert little < 0.15
    assert dead > 0.99


def test_halving_a_stretch_changes_nothing_once_the_edge_stands() -> None:
    physics = made()

    assert damage(physics, [2e-2] * 2, steps=20) == pytest.approx(damage(physics, [2e-2], steps=40), rel=1e-12)


def test_warm_up_prevents_damage_and_too_short_a_one_kills() -> None:
    # An edge that needs 1,000 steps to rise, and a rate of half of it: the warm-up must last 500 steps. In published
    # runs 1,000 steps of it were enough and 500 deadly.
    physics = made(edge_warmup=1_000.0, edge_patience=20.0)
    ends = {}
    for warmup in (250, 400, 550, 1_000):
        step = np.arange(2_000) + 0.5
        ends[warmup] = float(damage(physics, 5e-3 * np.minimum(step / warmup, 1.0), steps=1.0)[0])

    assert ends[1_000] == ends[550] == 0.0
    assert ends[400] > 0.1
    assert ends[250] > 0.9


def test_long_stretches_judge_a_warm_up_as_single_steps_do() -> None:
    physics = made(edge_warmup=1_000.0)
    middles = np.arange(50, 2_000, 100)  # means of the rate over stretches of 100 steps

    assert damage(physics, 5e-3 * np.minimum(middles / 600, 1.0), steps=100.0)[0] == 0.0


def test_the_edge_rises_with_the_batch_as_much_as_it_is_told_to() -> None:
    steps, batches = np.full(2, 1.0), np.array([1.0, 16.0])

    assert edge(made(2, edge_batch=0.5), batches, steps) == pytest.approx([10.0, 40.0])
    # published: by less than a tenth from 64 k to 8 M tokens
    assert edge(made(2), batches, steps) == pytest.approx([10.0, 10.0], rel=1e-3)
    assert edge(made(2, edge_warmup=4.0), batches, steps) == pytest.approx([2.5, 2.5], rel=1e-3)


def test_older_calibrations_and_laws_have_no_edge() -> None:
    record = shipped_physics()[0].to_json()
    for name in EDGE:
        record["values"].pop(name, None)
        record["uncertainty"].pop(name, None)
    exponents = dict.fromkeys(record["values"], 0.1)
    law = {"reference": record | {"n_parameters": 1_000_000}, "exponents": exponents, "fitted_sizes": [1_000_000]}

    for physics in (FittedPhysics.from_json(record), SizeLaw.from_json(law).at(100_000_000)):
        assert physics.values["edge_rate"] == 1e9
        assert damage(physics.physics(1), [100.0]) == 0.0


@pytest.fixture(scope="module")
def pools() -> tuple[Pool, Pool]:
    """Return a pool without edge, and the same with one at five times each instance's best rate."""
    free = Pool.draw(24, 5, shipped_physics())
    instances = free.instances.copy()
    instances.physics.values |= {name: np.full(24, value) for name, value in AT_TEN.items()}
    instances.physics.values["edge_rate"] = 5e3 * free.references.rate
    instances.physics.values["edge_damage"] = np.full(24, 2.0)
    return free, replace(free, instances=instances)


def run(pool: Pool, over_best: float, n: int = 2_000) -> tuple[SimulatedRuns, dict[str, Floats]]:
    """Train at a rate relative to the tuned one and return the runs with the telemetry of the tenth interval."""
    runs = SimulatedRuns(n, 1, pool, Start(rates=(over_best, over_best)))
    controls = runs.limits().start
    for _ in range(10):
        telemetry = runs.advance(controls)
    names = ("train_loss_std", "train_loss_max", "gradient_norm", "clipped_share", "probe_quadratic")
    return runs, {name: getattr(telemetry, name) for name in names}


def test_the_telemetry_warns_weakly_before_the_edge_and_not_far_below_it(pools: tuple[Pool, Pool]) -> None:
    for over_best, warned in ((0.9, False), (4.0, True)):
        (_, free), (runs, near) = (run(pool, over_best) for pool in pools)
        for name, before in free.items():
            rise = np.nanmedian(near[name] / before)
            assert rise > 1.02 if warned else rise == 1.0, name
        assert runs.state.damage.max() == 0.0


def test_far_beyond_the_edge_runs_die_or_diverge(pools: tuple[Pool, Pool]) -> None:
    free, dead = (run(pool, 20.0, n=200)[0] for pool in pools)

    assert free.diverged.mean() < 0.3
    assert dead.diverged.mean() > 0.9
