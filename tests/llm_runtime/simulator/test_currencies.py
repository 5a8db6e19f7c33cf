"""Simulated runs under budgets in seconds and joules: what fits into them, and the static that is best there."""

from __future__ import annotations

import numpy as np
import pytest

from trainpilot.envs.reward import compute_equivalent
from trainpilot.llm_runtime.budget import CURRENCIES, Currency
from trainpilot.llm_runtime.schedules import BUDGET_SHARES
from trainpilot.llm_runtime.simulator.records import Floats, Ints
from trainpilot.llm_runtime.simulator.references import ScheduleTable, static_losses
from trainpilot.llm_runtime.simulator.runs import Pool, SimulatedRuns, Start
from trainpilot.llm_runtime.simulator.shipped import shipped_physics

POOL = Pool.draw(24, 5, shipped_physics(), currencies=CURRENCIES)
MEASURED: tuple[Currency, ...] = ("time_s", "energy_j")


def many(currency: Currency, n_runs: int = 48, pool: Pool = POOL) -> SimulatedRuns:
    return SimulatedRuns(n_runs, 0, pool, Start(currencies=(currency,), rates=(1.0, 1.0)))


def trained(runs: SimulatedRuns, batch: Floats, precision: Ints | int = 0) -> tuple[Floats, Floats, Floats]:
    """Train to the end at one batch, precision and the tuned rate; return loss, seconds and joules."""
    controls = runs.limits().start
    controls.batch_size[:] = batch
    controls.precision[:] = precision
    time_s, energy_j = np.zeros(runs.n_runs), np.zeros(runs.n_runs)
    for _ in range(runs.start.decisions):
        told = runs.advance(controls)
        time_s, energy_j = time_s + told.time_s, energy_j + told.energy_j
    assert told.finished.all()
    assert told.budget_used == pytest.approx(np.ones(runs.n_runs))
    return runs.evaluate(), time_s, energy_j


@pytest.mark.parametrize("currency", MEASURED)
def test_a_run_uses_its_seconds_or_joules_whatever_its_batch(currency: Currency) -> None:
    for factor in (0.5, 1.0, 2.0):
        runs = many(currency)
        _, time_s, energy_j = trained(runs, np.maximum(factor * runs.instances.start_batch, 1))
        used = time_s if currency == "time_s" else energy_j
        assert used == pytest.approx(runs.budget, rel=0.01)


def test_a_budget_is_what_its_tokens_cost_at_the_starting_batch() -> None:
    instances = POOL.instances.take(np.flatnonzero(POOL.instances.hardware.fastest_precision() == 0))
    assert len(instances)
    start = instances.start_batch.astype(np.float64)
    zeros = np.zeros(len(instances))
    step_s = instances.hardware.step_s(start, zeros.astype(np.int64), zeros)
    assert instances.budget("tokens") == pytest.approx(instances.sequences)
    assert instances.budget("time_s") == pytest.approx(instances.sequences / start * step_s)
    assert instances.budget("energy_j") == pytest.approx(instances.budget("time_s") * instances.hardware.power_w(start))
    for currency in CURRENCIES:
        assert instances.static_sequences(start, currency) == pytest.approx(instances.sequences)
    more = instances.static_sequences(2 * start, "time_s") / instances.sequences
    # Twice the batch takes 2 (overhead + B s) / (overhead + 2 B s) as many sequences into the same seconds.
    hardware = instances.hardware
    assert more == pytest.approx(
        2
        * (hardware.overhead_s + start * hardware.sequence_s)
        / (hardware.overhead_s + 2 * start * hardware.sequence_s)
    )


def test_the_static_tuned_for_seconds_or_joules_uses_the_fastest_precision() -> None:
    instances = POOL.instances
    hardware, start = instances.hardware, instances.start_batch.astype(np.float64)
    fastest = hardware.fastest_precision()
    rows = np.arange(len(instances))
    speed = np.where(hardware.masked, 0.0, hardware.speed)
    assert (fastest > 0).any()
    assert speed[rows, fastest] == pytest.approx(speed.max(axis=1))
    for currency in MEASURED:
        more = instances.static_sequences(start, currency) / instances.sequences
        cost = hardware.sequence_cost(start, currency) / hardware.sequence_cost(start, currency, fastest)
        assert more == pytest.approx(cost)
        assert (more[fastest > 0] > 1).all()
        assert more[fastest == 0] == pytest.approx(1.0)
        references = POOL.references_in(currency)
        spent = references.time_s if currency == "time_s" else references.energy_j
        assert spent == pytest.approx(instances.budget(currency))


def test_the_tuned_static_is_tuned_for_the_currency() -> None:
    table = ScheduleTable.of("wsd", 0.1, 50)
    for currency in CURRENCIES:
        tuned = POOL.references_in(currency)
        for other in CURRENCIES:
            there = POOL.references_in(other)
            rate = there.rate * np.sqrt(there.batch / POOL.instances.start_batch)
            losses = static_losses(POOL.instances, rate, there.batch.astype(float), table, currency=currency)
            assert (losses >= tuned.losses[:, -1] - 1e-3).mean() > 0.9, f"{other}'s static under {currency}"
    batches = {currency: np.median(POOL.references_in(currency).batch) for currency in CURRENCIES}
    assert batches["tokens"] < batches["energy_j"] <= batches["time_s"], "dear steps ask for larger batches"


@pytest.mark.parametrize("currency", CURRENCIES)
def test_the_tuned_static_is_worth_its_whole_budget_in_its_currency(currency: Currency) -> None:
    runs = many(currency)
    precision = 0 if currency == "tokens" else runs.instances.hardware.fastest_precision()
    loss, time_s, energy_j = trained(runs, runs.references.batch.astype(np.float64), precision)
    share = compute_equivalent(loss, BUDGET_SHARES, runs.reference_losses)
    assert np.median(share) == pytest.approx(1.0, abs=0.06)  # probes and switches are not in the reference
    assert time_s == pytest.approx(runs.reference_time_s, rel=0.06)
    assert energy_j == pytest.approx(runs.reference_energy_j, rel=0.06)


def test_each_run_draws_a_currency_and_is_what_it_would_be_alone() -> None:
    mixed = SimulatedRuns(300, 0, POOL, Start(currencies=CURRENCIES))
    counts = np.bincount(mixed.currency, minlength=3)
    assert counts.min() > 70
    start = mixed.limits().start
    together = mixed.advance(start)
    for number, currency in enumerate(CURRENCIES):
        alone = SimulatedRuns(300, 0, POOL, Start(currencies=(currency,)))
        told = alone.advance(start)
        mine = mixed.currency == number
        assert (mixed.budget[mine] == alone.budget[mine]).all()
        assert (mixed.references.losses[mine] == alone.references.losses[mine]).all()
        assert (together.time_s[mine] == told.time_s[mine]).all()
    mixed.begin(np.arange(300))
    assert (np.bincount(mixed.currency, minlength=3) != counts).any()


def test_runs_in_tokens_are_what_they_were_beside_other_currencies() -> None:
    plain = Pool.draw(24, 5, shipped_physics())
    one, other = many("tokens"), many("tokens", pool=plain)
    start = one.limits().start
    for _ in range(5):
        assert (one.advance(start).train_loss == other.advance(start).train_loss).all()


def test_a_currency_that_the_pool_lacks_is_one_clear_line() -> None:
    plain = Pool.draw(2, 5, shipped_physics())
    message = r"^currencies must be among those that the pool was drawn with, got time_s; give them to Pool.draw$"
    with pytest.raises(ValueError, match=message):
        many("time_s", pool=plain)
    with pytest.raises(ValueError, match=r"^currencies must be some of tokens, time_s, energy_j, got none$"):
        Start(currencies=())
