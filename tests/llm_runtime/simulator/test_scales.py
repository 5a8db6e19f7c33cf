"""Instances of 10 M to 10 B weights: what is drawn, how it hangs together, and that settings cost what sweeps say."""

from __future__ import annotations

import numpy as np
import pytest

from trainpilot.llm_runtime.scaling_laws import step_law
from trainpilot.llm_runtime.schedules import neutral_factor
from trainpilot.llm_runtime.simulator.fitting import FittedPhysics
from trainpilot.llm_runtime.simulator.instances import (
    FINE_TUNING,
    SCRATCH,
    TINY,
    Instances,
    Widening,
    draw_instances,
    rescale,
)
from trainpilot.llm_runtime.simulator.physics import ADDED, Physics, PhysicsState, advance, edge, loss
from trainpilot.llm_runtime.simulator.records import Floats
from trainpilot.llm_runtime.simulator.references import References, ScheduleTable, static_losses
from trainpilot.llm_runtime.simulator.runs import Pool, SimulatedRuns, Start
from trainpilot.llm_runtime.simulator.scales import (
    FINE_TUNED_RATES,
    LORA_RATES,
    MOST_TOKENS,
    SEQUENCE_LENGTHS,
    _stretch,
)
from trainpilot.llm_runtime.simulator.shipped import published_sweeps, shipped_physics

TABLE = ScheduleTable.of("wsd", 0.1, 50)
COMMON = {"scar": 1e-6, "youth": 20.0, "slow_noise": 0.0114, "slow_spectrum": 0.447}
VALUES = {
    268_304_384: {
        "spectrum": 0.312, "rate": 0.515, "floor": 2.1, "gradient_noise": 1.37, "gradient_power": 0.592,
        "gradient_floor": 8.7e-4, "stall_rate": 0.142, "stall_power": 3.23, "stall_batch": 1.54, "stall_slow": 0.737,
        "stall_growth": 0.724, "growth": 0.0264, "shrinking": 0.153, "growth_power": 0.796, "noise": 0.958,
        "noise_power": 0.271, "noise_growth": 3.16, "settling": 0.0984, "update": 0.016,
    },
    429_260_800: {
        "spectrum": 0.344, "rate": 0.427, "floor": 1.94, "gradient_noise": 0.967, "gradient_power": 0.677,
        "gradient_floor": 8.8e-4, "stall_rate": 0.0909, "stall_power": 3.43, "stall_batch": 1.65, "stall_slow": 0.792,
        "stall_growth": 0.804, "growth": 0.0253, "shrinking": 0.168, "growth_power": 1.17, "noise": 0.655,
        "noise_power": 0.138, "noise_growth": 4.07, "settling": 0.11, "update": 0.0222,
    },
}  # fmt: skip
"""Rounded numbers of a fit to sweeps of two models over learning rate, batch and budget (Step Law)."""
PUBLISHED = [
    FittedPhysics(
        values={**ADDED, **COMMON, **values}, initial_loss=11.0, weight_decay=0.1, uncertainty={}, correlation=(),
        n_parameters=size,
    )
    for size, values in VALUES.items()
]  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> Pool:
    """Return instances of both larger kinds and some tiny ones, with an edge."""
    widening = Widening(scratch=0.6, fine_tuning=0.3, edges=1.0)
    return Pool.draw(100, 3, shipped_physics(), widening, published=PUBLISHED)


def of_kind(pool: Pool, kind: int) -> tuple[Instances, References]:
    rows = np.flatnonzero(pool.instances.kind == kind)
    return pool.instances.take(rows), pool.references.take(rows)


def best_rate(instances: Instances, references: References) -> Floats:
    """Return the tuned learning rate at the tuned batch."""
    return references.rate * neutral_factor(references.batch.astype(np.float64), instances.start_batch)


# What is drawn ----------------------------------------------------------------------------------------------


def test_kinds_have_their_shares_and_tiny_ones_are_what_they_were(pool: Pool) -> None:
    shares = [(pool.instances.kind == kind).mean() for kind in (TINY, SCRATCH, FINE_TUNING)]
    alone = Pool.draw(100, 3, shipped_physics())
    rows = np.flatnonzero(pool.instances.kind == TINY)

    assert shares == pytest.approx([0.1, 0.6, 0.3], abs=0.15)
    assert (pool.instances.sequences[rows] == alone.instances.sequences[rows]).all()
    assert (pool.instances.physics.values["rate"][rows] == alone.instances.physics.values["rate"][rows]).all()
    assert (alone.instances.kind == TINY).all()


def test_sizes_budgets_and_batches_are_in_their_ranges(pool: Pool) -> None:
    scratch, _ = of_kind(pool, SCRATCH)
    tokens = scratch.sequences * scratch.sequence_length
    low, high = scratch.batch_limits(50)

    least, most = Widening().weights
    assert least <= scratch.n_parameters.min() < 3e8 < scratch.n_parameters.max() <= most
    assert (tokens <= 1.001 * MOST_TOKENS).all()
    over = tokens / scratch.n_parameters
    least, most = Widening().tokens_per_weight
    assert least * 0.99 <= over.min() < 40 < over.max() <= most * 1.01
    assert set(scratch.sequence_length) <= set(SEQUENCE_LENGTHS)
    assert (low <= scratch.start_batch).all()
    assert (scratch.start_batch <= high).all()
    assert high.max() <= 16_384
    assert (4 * high <= scratch.sequences / 50).all()
    assert (high / low).max() > 256, "a machine's range is wider than that of live runs"
    for limit in (low, high, scratch.start_batch):
        assert (np.log2(limit) % 1 == 0).all()


def test_a_pool_repeats_with_its_seed(pool: Pool) -> None:
    widening = Widening(scratch=0.6, fine_tuning=0.3, edges=1.0)
    again = Pool.draw(100, 3, shipped_physics(), widening, published=PUBLISHED)

    assert (again.references.losses == pool.references.losses).all()
    assert np.isfinite(pool.references.losses).all()


def test_without_edges_nobody_has_one(pool: Pool) -> None:
    free = Pool.draw(12, 3, shipped_physics(), Widening(scratch=1.0), published=PUBLISHED)

    assert (free.instances.physics.values["edge_rate"] > 1e8).all()
    assert (pool.instances.physics.values["edge_rate"] < 1e8).all()


def test_machines_saturate_at_some_tokens_and_draw_much_at_once(pool: Pool) -> None:
    hardware, n = pool.instances.hardware, len(pool)
    half = hardware.overhead_s / hardware.sequence_s
    whole_s = hardware.step_s(half, np.zeros(n, dtype=np.int64), np.zeros(n))
    larger = pool.instances.kind != TINY
    tokens, share = (half * pool.instances.sequence_length)[larger], (hardware.power_w(half) / hardware.load_w)[larger]

    assert whole_s / half == pytest.approx(2 * hardware.sequence_s)
    assert tokens.min() >= 500
    assert tokens.max() < 1024 * 30_000
    assert share.min() > 0.65
    assert share.max() < 1


# How it hangs together --------------------------------------------------------------------------------------


def test_other_units_of_batch_step_and_rate_are_the_same_run() -> None:
    # A batch is four of what it was, a step three and a rate two: a quarter, a third and a half of each are one run.
    def trained(values: dict[str, float], rate: float, batch: float, steps: float) -> float:
        arrays = {name: np.full(1, value) for name, value in values.items()}
        if batch != 64:
            _stretch(arrays, np.full(1, 4.0), np.full(1, 3.0))
            rescale(arrays, np.full(1, 2.0))
        physics = Physics(values=arrays, initial_loss=np.full(1, 11.0), weight_decay=np.full(1, 0.1))
        state = PhysicsState.fresh(1)
        for factor in TABLE.mean:
            advance(physics, state, np.full(1, steps / 50), np.full(1, rate * factor), np.full(1, batch))
        return float(loss(physics, state)[0])

    values = dict(PUBLISHED[0].values)
    assert trained(values, 1e-3, 16, 20_000) == pytest.approx(trained(values, 2e-3, 64, 60_000), abs=2e-4)


def test_best_settings_follow_step_law(pool: Pool) -> None:
    scratch, references = of_kind(pool, SCRATCH)
    tokens = scratch.sequences * scratch.sequence_length
    rate, batch = best_rate(scratch, references), references.batch * scratch.sequence_length
    over = np.log(np.stack([rate / scratch.advice[:, 0], references.batch / scratch.advice[:, 1]]))

    assert np.exp(np.median(over, axis=1)) == pytest.approx([1.0, 2.0], rel=0.5)
    assert (over.std(axis=1) < 1.2).all()
    assert np.abs(over).max() < np.log(30)
    columns = np.stack([np.ones(len(tokens)), np.log(scratch.n_parameters), np.log(tokens)], axis=1)
    exponents = [np.linalg.lstsq(columns, np.log(each), rcond=None)[0][1:] for each in (rate, batch)]
    assert exponents[0] == pytest.approx([-0.713, 0.307], abs=0.3)
    assert exponents[1] == pytest.approx([0.0, 0.571], abs=0.25)


def test_leaving_the_best_setting_costs_what_sweeps_say(pool: Pool) -> None:
    scratch, references = of_kind(pool, SCRATCH)
    best = best_rate(scratch, references)

    def penalty(rate: float, batch: float = 1.0) -> float:
        changed = np.maximum(references.batch * batch, 1.0)
        higher = static_losses(scratch, best * rate, changed, TABLE) - references.losses[:, 2]
        return float(np.median(higher[higher < 1.0]))  # of those within their edge

    # published medians: 0.009, 0.024, 0.020, 0.070, and 0.032 for four times the batch at the same rate
    assert 0.003 < penalty(0.5) < 0.02
    assert 0.012 < penalty(0.25) < 0.05
    assert 0.003 < penalty(2.0) < 0.04
    assert 0.015 < penalty(4.0) < 0.15
    assert 0.015 < penalty(1.0, batch=4.0) < 0.1


def test_larger_models_and_budgets_end_lower(pool: Pool) -> None:
    scratch, references = of_kind(pool, SCRATCH)
    final = references.losses[:, 2]

    assert final[scratch.n_parameters > 1e9].max() < np.median(final[scratch.n_parameters < 1e8])
    assert (np.diff(np.median(references.losses, axis=0)) < 0).all()


def test_the_edge_is_farther_from_the_best_rate_at_small_batches(pool: Pool) -> None:
    scratch, references = of_kind(pool, SCRATCH)
    never = np.full(len(scratch), 1e12)
    batch = references.batch.astype(np.float64)
    over = edge(scratch.physics, batch, never) * 1e-3 / best_rate(scratch, references)
    # the distance was drawn at the best rate without an edge, which may have been nearer to it
    assert over.min() > 1.0
    assert over.max() < 3 * Widening().edge_over_best[1]
    assert np.quantile(over, 0.1) < 4
    assert np.quantile(over, 0.9) > 10

    smaller = np.maximum(batch / 8, 1.0)
    rates = best_rate(scratch, references) * np.geomspace(1 / 32, 2, 19)[:, None]
    found = np.argmin([static_losses(scratch, rate, smaller, TABLE) for rate in rates], axis=0)
    best_there = np.take_along_axis(rates, found[None], axis=0)[0]
    here = edge(scratch.physics, smaller, never) * 1e-3 / best_there
    assert np.median(here / over) > 1.5


# Fine-tuning ------------------------------------------------------------------------------------------------


def test_fine_tuning_starts_trained_and_wants_low_rates(pool: Pool) -> None:
    tuned, references = of_kind(pool, FINE_TUNING)
    rate = best_rate(tuned, references)
    epochs = tuned.sequences / tuned.data

    assert (tuned.physics.initial_loss < 5.5).all()
    assert np.median(tuned.physics.initial_loss - references.losses[:, 2]) > 0.1
    assert FINE_TUNED_RATES[0] / 2 < rate.min()
    assert rate.max() < 2 * LORA_RATES[1]
    assert np.median(rate) < 3e-4
    assert (epochs >= 0.99).all()
    assert epochs.max() > 3
    assert tuned.sequences.max() < 1e6


def test_rates_far_below_the_best_leave_the_loss_of_the_given_model(pool: Pool) -> None:
    tuned, references = of_kind(pool, FINE_TUNING)
    batch = tuned.start_batch.astype(np.float64)
    risen = {
        factor: static_losses(tuned, references.rate * factor, batch, TABLE) - tuned.physics.initial_loss
        for factor in (1e-3, 1e-2, 0.1)
    }

    assert np.quantile(risen[1e-3], 0.9) < 0.1
    assert np.median(risen[1e-3]) > np.median(risen[1e-2]) > np.median(risen[0.1])
    assert np.quantile(risen[0.1], 0.9) < 0
    assert tuned.physics.values["noise_power"] == pytest.approx(np.ones(len(tuned)))


def test_rates_far_from_the_best_lose_much_of_what_sharp_fine_tuning_gains() -> None:
    # In a sweep of a model of 135 M weights, 1/10, 1/3, 3 and 10 times the best rate lose 0.5, 0.25, 0.05 and 0.5 to
    # 0.8 of the gain (benchmarks/results/fine_tuning.json).
    widening = Widening(fine_tuning=1.0, sharp_fine_tuning=True)
    pool = Pool.draw(40, 3, shipped_physics(), widening, published=PUBLISHED)
    tuned, references = pool.instances, pool.references
    batch = references.batch.astype(np.float64)
    best = static_losses(tuned, best_rate(tuned, references), batch, TABLE)
    gain = tuned.physics.initial_loss - best
    lost = {
        factor: (static_losses(tuned, factor * best_rate(tuned, references), batch, TABLE) - best) / gain
        for factor in (0.1, 0.3, 10.0)
    }

    assert (gain > 0).all()
    assert tuned.sequences.min() < 1000
    assert 0.15 < np.median(lost[0.1]) < 0.6
    assert 0.05 < np.median(lost[0.3]) < 0.3
    assert np.median(lost[10.0]) > 0.1


def test_what_an_earlier_training_has_left_is_the_signal() -> None:
    # Half of the modes untouched, half used up: the loss falls from what is left, and faster in what is fresh.
    values = {name: np.full(1, value) for name, value in PUBLISHED[0].values.items()}
    left = np.where(np.arange(48) < 24, 0.0, 1.0)[None]
    fresh = Physics(values=values, initial_loss=np.full(1, 11.0), weight_decay=np.zeros(1))
    tuned = Physics(values=values, initial_loss=np.full(1, 3.0), weight_decay=np.zeros(1), left=left)
    state = PhysicsState.fresh(1)

    assert loss(tuned, state) == pytest.approx(3.0)
    assert tuned.shares.sum() == pytest.approx(1.0)
    assert (tuned.shares[0, :24] == 0).all()
    assert tuned.shares[0, 24:] / tuned.shares[0, 24] == pytest.approx(fresh.shares[0, 24:] / fresh.shares[0, 24])


# Runs -------------------------------------------------------------------------------------------------------


def test_advice_comes_from_the_law_and_fine_tuning_has_none(pool: Pool) -> None:
    runs = SimulatedRuns(300, 1, pool, Start(advice_error=1.0))
    limits, kind, instances = runs.limits(), runs.instances.kind, runs.instances
    row = int(np.flatnonzero(kind == SCRATCH)[0])
    tokens = instances.sequences[row] * instances.sequence_length[row]
    advice = step_law(instances.n_parameters[row], tokens)

    assert limits.learning_rate_over_law[row] == pytest.approx(runs.start_rate[row] / advice.learning_rate)
    in_tokens = instances.start_batch[row] * instances.sequence_length[row]
    assert limits.batch_over_law[row] == pytest.approx(in_tokens / advice.batch_tokens)
    assert (np.isnan(limits.learning_rate_over_law) == (kind == FINE_TUNING)).all()


def test_runs_can_start_at_the_advised_rate(pool: Pool) -> None:
    usual, advised = (SimulatedRuns(300, 1, pool, Start(advised=share)) for share in (0.0, 1.0))
    over, kind = advised.limits().learning_rate_over_law, advised.instances.kind
    batch = np.minimum(np.sqrt(advised.limits().batch_over_law), 1.0)

    assert over[kind != FINE_TUNING] == pytest.approx(batch[kind != FINE_TUNING])
    assert (advised.start_rate == usual.start_rate)[kind == FINE_TUNING].all()
    with pytest.raises(ValueError, match="advised must be a share from 0 to 1, got 2"):
        Start(advised=2)


def test_runs_far_beyond_their_edge_are_lost_and_tuned_ones_are_not(pool: Pool) -> None:
    lost = []
    for over_best in (1.0, 40.0):
        runs = SimulatedRuns(300, 1, pool, Start(rates=(over_best, over_best)))
        controls = runs.limits().start
        controls.batch_size = np.clip(runs.references.batch, *runs.instances.batch_limits(50))
        for _ in range(50):
            telemetry = runs.advance(controls)
        lost.append(float((telemetry.diverged | (runs.state.damage > 0.5)).mean()))
        assert (telemetry.tokens <= 1.001 * runs.instances.sequences * runs.instances.sequence_length).all()

    assert lost[0] == 0.0
    assert lost[1] > 0.9


def test_a_doubling_counts_for_something_in_fine_tuning() -> None:
    pool = Pool.draw(40, 3, shipped_physics(), Widening(fine_tuning=1.0), published=PUBLISHED)
    quarter, half, whole = pool.references.losses.T

    assert (half >= 1.01 * whole * (1 - 1e-12)).all()
    assert (quarter >= 1.02 * whole * (1 - 1e-12)).all()


def test_noise_at_another_batch_is_drawn_around_that_of_calibrations() -> None:
    known, drawn = (
        draw_instances(50, 3, shipped_physics(), Widening(noise_batch=(0.0, most))).physics.values
        for most in (0.0, 0.5)
    )
    at_eight, known_at_eight = (
        values["noise"] * (8.0 ** -values["noise_batch"]) ** values["noise_power"] for values in (drawn, known)
    )

    np.testing.assert_allclose(at_eight, known_at_eight)
    assert 0 < drawn["noise_batch"].min() < 0.25 < drawn["noise_batch"].max() < 0.5
    np.testing.assert_array_equal(drawn["rate"], known["rate"])


def test_published_models_are_chosen_by_name() -> None:
    assert [round((each.n_parameters or 0) / 1e6) for each in published_sweeps()] == [215, 268, 429]
    assert [round((each.n_parameters or 0) / 1e6) for each in published_sweeps(("step-law-429M",))] == [429]
    with pytest.raises(
        ValueError, match=r"widening.published must be names among step-law-215M, .*, got 'step-law-7B'"
    ):
        published_sweeps(("step-law-7B",))
