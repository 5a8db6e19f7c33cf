"""A fit finds physics that runs were made with, says how sure it is, and survives being written down."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from fakes import make_telemetry

from trainpilot.llm_runtime.config import Controls, RunConfig
from trainpilot.llm_runtime.schedules import Cooldown, ScheduleName
from trainpilot.llm_runtime.simulator.evidence import CalibrationRun, Evidence, mean_rates, of_live_runs
from trainpilot.llm_runtime.simulator.fitting import (
    SCALE_PRIOR,
    Fit,
    FittedPhysics,
    Model,
    SizeLaw,
    fit,
    fit_physics,
)
from trainpilot.llm_runtime.simulator.physics import (
    ADDED,
    NAMES,
    PARAMETERS,
    RATE_UNIT,
    Physics,
    PhysicsState,
    advance,
    loss,
)
from trainpilot.llm_runtime.simulator.shipped import shipped_physics
from trainpilot.llm_runtime.simulator.sweeps import FinalLoss, of_final_losses
from trainpilot.llm_runtime.telemetry import Telemetry

DECISIONS, SEQUENCES, LENGTH = 10, 1_600, 8
INITIAL = 5.5
NOISE = 0.004
PLANTED = {"spectrum": 0.3, "rate": 0.09, "gradient_noise": 0.25, "growth": 0.012, "noise": 0.08, "update": 0.012}
FLOOR = 1.6


def planted() -> Physics:
    """Return the physics that runs are made with: typical, but for the numbers in `PLANTED`."""
    values = {name: np.full(1, parameter.typical) for name, parameter in PARAMETERS.items()}
    values |= {name: np.full(1, value) for name, value in PLANTED.items()} | {"floor": np.full(1, FLOOR)}
    return Physics(values=values, initial_loss=np.full(1, INITIAL), weight_decay=np.full(1, 0.1))


def config(rate: float, batch: int, schedule: ScheduleName = "wsd") -> RunConfig:
    return RunConfig(
        tokens=SEQUENCES * LENGTH,
        sequence_length=LENGTH,
        batch_size=batch,
        base_learning_rate=rate,
        schedule=schedule,
        warmup_tokens=SEQUENCES * LENGTH // 10,
        decisions=DECISIONS,
    )


def made_run(of: RunConfig, seed: int = 0, scales: tuple[float, ...] = (1.0,) * DECISIONS) -> CalibrationRun:
    """Return a run as the planted physics train it, losses and updates seen through noise."""
    physics, state, random = planted(), PhysicsState.fresh(1), np.random.default_rng(seed)
    telemetry: list[Telemetry] = []
    validation, before = [(0, INITIAL)], INITIAL
    per_interval = SEQUENCES // DECISIONS
    steps = per_interval // of.batch_size
    for decision, scale in enumerate(scales):
        asked = Controls(batch_size=of.batch_size, learning_rate_scale=scale)
        begins = (decision * per_interval + np.arange(steps) * of.batch_size) * LENGTH
        factors = [of.base_schedule().factor(int(at), of.batch_size * LENGTH) for at in begins]
        rates = of.base_learning_rate * scale * np.array(factors)
        moments = advance(physics, state, np.full(1, steps), np.full(1, rates.mean()), np.full(1, of.batch_size))
        after = float(loss(physics, state)[0]) + NOISE * random.standard_normal()
        update = PLANTED["update"] * math.sqrt(moments.momentum_power[0] / state.growth[0]) * rates[-1] / RATE_UNIT
        telemetry.append(
            make_telemetry(
                **{"decision": decision, "steps": steps, "interval_tokens": per_interval * LENGTH, "requested": asked},
                **{"learning_rate": float(rates[-1]), "batch_size": float(of.batch_size), "probe_linear": None},
                **{
                    "train_loss": (before + after) / 2,
                    "relative_update": update * math.exp(0.1 * random.standard_normal()),
                },
            )
        )
        validation.append((decision + 1, after))
        before = after
    return CalibrationRun(
        config=of,
        telemetry=tuple(telemetry),
        validation=tuple(validation),
        wide_probe=(None,) * len(scales),
        n_parameters=1_000,
        role="fit",
    )


RUNS = [
    made_run(config(rate, batch), seed=index)
    for index, (rate, batch) in enumerate((r, b) for r in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2) for b in (1, 4, 16))
]
UNSEEN = [
    made_run(config(1.7e-3, 8, "cosine"), seed=100),
    made_run(config(5e-3, 2, "linear"), seed=101),
    made_run(config(2e-3, 4, "constant"), seed=102, scales=(0.5, 0.5, 1, 2, 2, 4, 2, 1, 0.5, 0.2)),
]


def test_the_best_runs_of_each_budget_count_most() -> None:
    # The longer run ends far lower. It must not make the best of the shorter ones look bad, whose last loss is to be
    # met within 0.03 / (1 + 2) / 3.
    ends = sorted(RUNS, key=lambda run: run.final_loss)
    good, bad = ends[0], ends[-1]
    longer = replace(good, config=replace(good.config, tokens=8 * good.config.tokens))
    longer = replace(longer, validation=(*longer.validation[:-1], (DECISIONS, 1.7)))
    tolerance = of_live_runs([good, bad, longer]).tolerance[:, -1]

    assert bad.final_loss > good.final_loss + 0.3
    assert tolerance[[0, 2]] == pytest.approx(0.03 / 3 / 3)
    assert tolerance[1] > 0.03 / 2 / 3


@pytest.fixture(scope="module")
def fitted() -> FittedPhysics:
    return fit_physics(RUNS, starts=1)


def test_unseen_runs_are_predicted_to_within_the_noise_of_a_look(fitted: FittedPhysics) -> None:
    for run in UNSEEN:
        assert fitted.predict_final(run) == pytest.approx(run.final_loss, abs=0.03)
        along = fitted.predict(run) - [each.train_loss for each in run.telemetry]
        assert np.abs(along).mean() < 0.03


def test_planted_numbers_are_found_within_their_own_uncertainty(fitted: FittedPhysics) -> None:
    for name, value in (PLANTED | {"floor": FLOOR}).items():
        off = math.log(fitted.values[name] / value)
        assert abs(off) < 4 * fitted.uncertainty[name] + 0.02, name
    for name in ("rate", "spectrum", "update"):
        assert fitted.values[name] == pytest.approx(PLANTED[name], rel=0.25), name
    assert fitted.initial_loss == pytest.approx(INITIAL)
    assert fitted.weight_decay == 0.1


def test_fewer_runs_make_it_less_sure(fitted: FittedPhysics) -> None:
    fewer = fit_physics(RUNS[:12:2], starts=1)
    ratios = [fewer.uncertainty[name] / fitted.uncertainty[name] for name in NAMES]

    assert np.median(ratios) > 1.1
    assert np.mean(np.array(ratios) > 1) > 0.7


def test_uncertainty_and_correlation_are_those_of_numbers(fitted: FittedPhysics) -> None:
    correlation = np.array(fitted.correlation)

    assert set(fitted.uncertainty) == set(fitted.values) == set(NAMES)
    assert all(0 < error < 5 for error in fitted.uncertainty.values())
    assert correlation.shape == (len(NAMES), len(NAMES))
    assert np.diag(correlation) == pytest.approx(1.0)
    assert correlation == pytest.approx(correlation.T)
    assert np.abs(correlation).max() <= 1.001


def test_every_number_stays_in_its_range(fitted: FittedPhysics) -> None:
    for name, parameter in PARAMETERS.items():
        if name != "floor":
            assert parameter.low <= fitted.values[name] * 1.000001, name
            assert fitted.values[name] <= parameter.high * 1.000001, name
    least = min(value for run in RUNS for _, value in run.validation)
    assert PARAMETERS["floor"].low * least <= fitted.values["floor"] <= PARAMETERS["floor"].high * least


def test_runs_that_diverged_or_were_pruned_are_left_out() -> None:
    last = RUNS[7].telemetry[-1]
    diverged = replace(RUNS[7], telemetry=(*RUNS[7].telemetry[:-1], replace(last, diverged=True)))
    pruned = replace(RUNS[8], telemetry=(*RUNS[8].telemetry[:-1], replace(last, sparsity=0.1)))

    with pytest.raises(ValueError, match="runs must hold at least 6 that neither diverged nor were pruned, got 5"):
        fit_physics([*RUNS[:5], diverged, pruned])


def test_it_survives_being_written_down(fitted: FittedPhysics) -> None:
    again = FittedPhysics.from_json(json.loads(json.dumps(fitted.to_json())))

    assert again == fitted
    assert again.predict_final(UNSEEN[0]) == fitted.predict_final(UNSEEN[0])


def test_another_set_of_parameters_is_refused(fitted: FittedPhysics) -> None:
    record = fitted.to_json()
    values = dict(record["values"], vigour=1.0)
    del values["rate"]

    with pytest.raises(ValueError, match="physics parameters missing or unknown: rate, vigour; calibrate anew"):
        FittedPhysics.from_json(record | {"values": values})


def test_the_same_physics_for_many_runs(fitted: FittedPhysics) -> None:
    physics = fitted.physics(3)

    assert physics.values["rate"].tolist() == [fitted.values["rate"]] * 3
    assert physics.initial_loss.tolist() == [fitted.initial_loss] * 3


# Mean rates of live telemetry ---------------------------------------------------------------------------------


def test_the_mean_rate_of_an_interval_counts_warm_up_scale_and_batch() -> None:
    # 160 sequences an interval, 40 steps of 4; warm-up over the first interval: factors 1/40 to 40/40, then 1.
    of = config(1e-3, 4, "constant")
    run = made_run(of, scales=(1.0, 0.5))
    doubled = replace(run.telemetry[1], requested=Controls(batch_size=16, learning_rate_scale=0.5), steps=10)

    assert mean_rates(of, run.telemetry) == pytest.approx([1e-3 * 20.5 / 40, 0.5e-3])
    assert mean_rates(of, (run.telemetry[0], doubled))[1] == pytest.approx(0.5e-3 * math.sqrt(16 / 4))


def test_the_mean_rate_follows_a_cool_down() -> None:
    of = config(1e-3, 4, "constant")
    run = made_run(of)
    finishing = tuple(replace(each, finishing=each.decision >= 5) for each in run.telemetry[:6])
    cooldown = Cooldown.begin(of.base_schedule(), 5 * 1_280, 32)  # 1,280 tokens an interval, a step of 32

    # it lasts a fifth of 5 intervals: one, with factors 40/40 down to 1/40
    assert cooldown.end_tokens == 6 * 1_280
    assert mean_rates(of, finishing)[4:] == pytest.approx([1e-3, 1e-3 * 20.5 / 40])


# Several models ---------------------------------------------------------------------------------------------

SIZES = (50_000_000, 200_000_000)
EXPONENTS = {"rate": 0.5, "stall_rate": -0.6, "floor": -0.06}


def planted_law() -> SizeLaw:
    values = {name: SCALE_PRIOR.centre[name] for name in NAMES} | {"floor": 2.4, "gradient_noise": 60.0}
    reference = FittedPhysics(
        values=values, initial_loss=10.9, weight_decay=0.1, uncertainty={}, correlation=(), n_parameters=100_000_000
    )
    return SizeLaw(reference=reference, exponents=dict.fromkeys(NAMES, 0.0) | EXPONENTS, fitted_sizes=SIZES)


def planted_sweep(n_parameters: int) -> list[FinalLoss]:
    asked = [
        FinalLoss(
            n_parameters=n_parameters, steps=round(5_120_000 / batch), learning_rate=rate, batch=batch, final_loss=0.0,
            schedule=schedule, warmup_steps=200,
        )
        for schedule in ("cosine", "constant")
        for rate in (3e-4, 1e-3, 2e-3)
        for batch in (32, 128, 256)
    ]  # fmt: skip
    evidence = of_final_losses(asked, [n_parameters])
    losses = evidence.at_end(planted_law().at(n_parameters).losses(evidence))
    return [replace(run, final_loss=float(loss)) for run, loss in zip(asked, losses, strict=True)]


@pytest.fixture(scope="module")
def joint() -> Fit:
    runs = [run for size in SIZES for run in planted_sweep(size)]
    models = [Model(n_parameters=size, initial_loss=10.9) for size in SIZES]
    return fit(of_final_losses(runs, SIZES), models, max_steps=25)


def test_two_models_are_fitted_together_and_a_third_follows_their_law(joint: Fit) -> None:
    for size, physics in zip(SIZES, joint.physics, strict=True):
        evidence = of_final_losses(planted_sweep(size), [size])
        assert evidence.at_end(physics.losses(evidence)) == pytest.approx(evidence.final, abs=0.01)
    assert joint.law is not None
    assert joint.law.fitted_sizes == SIZES
    evidence = of_final_losses(planted_sweep(100_000_000), [100_000_000])
    assert evidence.at_end(joint.law.at(100_000_000).losses(evidence)) == pytest.approx(evidence.final, abs=0.03)


def test_a_law_at_its_reference_is_its_reference_and_survives_json() -> None:
    law = planted_law()
    same = law.at(100_000_000)

    assert dict(same.values) == pytest.approx(dict(law.reference.values))
    assert law.at(400_000_000).values["rate"] == pytest.approx(2 * law.reference.values["rate"])
    assert SizeLaw.from_json(json.loads(json.dumps(law.to_json()))) == law


def test_a_fit_keeps_above_bounds_but_is_not_drawn_to_them() -> None:
    runs = planted_sweep(SIZES[0])
    inside = of_final_losses(runs, SIZES[:1])
    free, loose = (
        fit(Evidence.joined(parts), [Model(n_parameters=SIZES[0], initial_loss=10.9)], max_steps=6)
        for parts in ([inside], [inside, _bound(runs[0], -1.0)])
    )
    tight = fit(
        Evidence.joined([inside, _bound(runs[0], 0.05)]), [Model(n_parameters=SIZES[0], initial_loss=10.9)], max_steps=6
    )
    ends = [float(inside.at_end(each.losses(inside))[0]) for each in (free, loose, tight)]

    assert ends[1] == pytest.approx(ends[0], abs=1e-6)
    assert ends[2] > ends[0] + 0.005


def _bound(run: FinalLoss, above: float) -> Evidence:
    bound = of_final_losses([replace(run, final_loss=run.final_loss + above)], SIZES[:1])
    bound.bound[:], bound.tolerance[:] = True, 0.001
    return bound


def test_every_model_needs_a_measured_loss() -> None:
    evidence = of_final_losses(planted_sweep(SIZES[0]), SIZES)
    with pytest.raises(ValueError, match="measured loss of each model, got none of 200,000,000"):
        fit(evidence, [Model(n_parameters=size, initial_loss=10.9) for size in SIZES])


def test_calibrations_from_before_a_parameter_was_added_still_load() -> None:
    record = shipped_physics()[0].to_json()
    del record["values"]["settling"], record["uncertainty"]["settling"]

    assert FittedPhysics.from_json(record).values["settling"] == ADDED["settling"]
