"""Rewards and utilities in numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from fakes import TOY_CASE, ToyPlant, make_telemetry

from trainpilot.envs.action import KEEP
from trainpilot.envs.decision import Preference
from trainpilot.envs.environments import LiveTraining
from trainpilot.envs.reward import (
    DIVERGED_QUALITY,
    MAX_QUALITY,
    UTILITIES,
    Outcome,
    Reference,
    RewardMeter,
    RewardTerms,
    ScalarReward,
    Utility,
    budget_for_loss,
    compute_equivalent,
    constrained,
    linear,
    logarithmic,
    product,
    tchebycheff,
    worth,
)
from trainpilot.llm_runtime.config import Controls

BUDGETS = (0.25, 0.5, 1.0)
HALVING = (8.0, 4.0, 2.0)
"""Final losses of a reference whose loss halves as its budget doubles: a loss is worth 2 over the loss."""
KINKED = (8.0, 4.0, 3.0)


def test_worth_is_the_share_up_to_one_and_logarithmic_above() -> None:
    assert [worth(share) for share in (0.0, 0.5, 1.0)] == [0.0, 0.5, 1.0]
    assert worth(math.e) == pytest.approx(2.0)
    assert worth(1.01) == pytest.approx(1.01, abs=1e-4)  # 1 % better is worth 1 %


@pytest.mark.parametrize(("loss", "share"), [(8.0, 0.25), (4.0, 0.5), (2.0, 1.0)])
def test_a_reference_run_s_loss_is_worth_its_budget(loss: float, share: float) -> None:
    assert compute_equivalent(loss, BUDGETS, HALVING) == pytest.approx(share)


@pytest.mark.parametrize(("loss", "share"), [(5.0, 0.4), (2.5, 0.8), (16.0, 0.125), (1.6, 1.25), (1e6, 2e-6)])
def test_between_and_beyond_the_lines_go_on(loss: float, share: float) -> None:
    assert compute_equivalent(loss, BUDGETS, HALVING) == pytest.approx(share)


def test_between_two_runs_the_logarithms_are_linear() -> None:
    # half-way in log(loss) is half-way in log(budget)
    assert compute_equivalent(math.sqrt(8 * 4), BUDGETS, KINKED) == pytest.approx(math.sqrt(0.25 * 0.5))
    assert compute_equivalent(math.sqrt(4 * 3), BUDGETS, KINKED) == pytest.approx(math.sqrt(0.5))


def test_beyond_the_last_run_the_last_piece_goes_on() -> None:
    # 4/3 less loss for twice the budget, once more
    assert compute_equivalent(3.0 * 3 / 4, BUDGETS, KINKED) == pytest.approx(2.0)
    assert compute_equivalent(4.0 * 4, BUDGETS, KINKED) == pytest.approx(0.125)


@pytest.mark.parametrize("loss", [2 / 3, 0.01, 1e-300])
def test_more_than_three_budgets_are_not_believed(loss: float) -> None:
    assert compute_equivalent(loss, BUDGETS, HALVING) == pytest.approx(MAX_QUALITY)
    assert compute_equivalent(loss, BUDGETS, HALVING) <= MAX_QUALITY


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_what_is_no_loss_is_worth_nothing(loss: float) -> None:
    assert compute_equivalent(loss, BUDGETS, HALVING) == 0.0


@pytest.mark.parametrize(
    ("losses", "loss", "share"),
    [
        ((8.0, 9.0, 2.0), 4.0, 0.5),  # the half run ended worse: the line goes from 8 to 2
        ((8.0, 8.0, 2.0), 4.0, 0.5),
        ((8.0, 1.5, 2.0), 4.0, 0.5),  # the half run ended better than the full one: the same line
        ((8.0, 2.0, 2.0), 4.0, 0.5),
        ((1.5, 4.0, 2.0), 8.0, 0.25),  # the quarter run did: the line goes from 4 to 2
        ((8.0, 9.0, 2.0), 2.0, 1.0),
        ((8.0, 1.5, 2.0), 2.0, 1.0),
        ((1.5, 4.0, 2.0), 2.0, 1.0),
    ],
)
def test_a_run_out_of_order_is_left_out(losses: tuple[float, ...], loss: float, share: float) -> None:
    assert compute_equivalent(loss, BUDGETS, losses) == pytest.approx(share)


@pytest.mark.parametrize("losses", [(2.0, 2.0, 2.0), (1.8, 1.9, 2.0)])
def test_without_a_curve_a_loss_is_as_good_or_not(losses: tuple[float, ...]) -> None:
    assert compute_equivalent(2.0, BUDGETS, losses) == 1.0
    assert compute_equivalent(1.0, BUDGETS, losses) == 1.0
    assert compute_equivalent(2.01, BUDGETS, losses) == 0.0


def test_the_limits_say_what_holds_beyond_the_ends_of_a_curve() -> None:
    losses = [16.0, 1.0, 4.0, 2.0, math.nan]  # two beyond the ends, two points, none

    def found(low: float, high: float) -> list[float]:
        return list(budget_for_loss(losses, BUDGETS, HALVING, limits=(low, high)))

    assert found(0.0, math.inf) == pytest.approx([0.125, 2.0, 0.5, 1.0, 0.0])  # the end pieces go on
    assert found(0.2, 1.5) == pytest.approx([0.2, 1.5, 0.5, 1.0, 0.0])  # up to here
    assert found(0.25, 1.0) == pytest.approx([0.25, 1.0, 0.5, 1.0, 0.0])  # the end values hold


def test_a_flat_piece_is_a_jump_and_a_flat_curve_tells_better_from_worse() -> None:
    limits = (0.125, 2.0)

    assert budget_for_loss([4.0, 4.1, 3.9, 2.0], (0.25, 0.5, 1.0), (4.0, 4.0, 2.0), limits=limits) == pytest.approx(
        [0.5, 0.5 * (4 / 4.1), 0.5 * (4 / 3.9), 1.0]
    )
    assert list(budget_for_loss([1.0, 2.0, 2.1], (0.5, 1.0), (2.0, 2.0), limits=limits)) == [0.5, 0.5, 0.125]


def test_a_thousand_curves_at_once_are_each_interpolated_in_log_log() -> None:
    random = np.random.default_rng(0)
    losses = -np.sort(-np.exp(random.uniform(0.1, 2.3, (1_000, 3))), axis=1)
    inside = losses[:, -1] + random.random(1_000) * (losses[:, 0] - losses[:, -1])
    x, y = np.log(losses[:, ::-1]), np.log(BUDGETS)[::-1]
    expected = [math.exp(np.interp(math.log(one), points, y)) for one, points in zip(inside, x, strict=True)]

    assert budget_for_loss(inside, BUDGETS, losses, limits=(0.0, math.inf)) == pytest.approx(expected)
    assert compute_equivalent(inside, BUDGETS, losses) == pytest.approx(expected)


def test_lower_losses_are_never_worth_less() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        losses = tuple(random.uniform(1.0, 4.0, 3))
        shares = [compute_equivalent(loss, BUDGETS, losses) for loss in np.linspace(0.5, 6.0, 200)]
        assert (np.diff(shares) <= 1e-12).all()
        assert compute_equivalent(losses[-1], BUDGETS, losses) == pytest.approx(1.0)


def test_reward_terms_become_a_float32_vector() -> None:
    vector = RewardTerms(quality=0.1, energy=-0.02, time=-0.03).vector()

    assert vector.dtype == np.float32
    assert vector == pytest.approx([0.1, -0.02, -0.03])


def reference(energy_j: float | None = 1_000.0) -> Reference:
    return Reference(
        budgets=BUDGETS,
        losses=HALVING,
        initial_loss=10.0,
        time_s=20.0,
        energy_j=energy_j,
        energy_source="measured_counter",
        telemetry=(),
    )


def test_an_interval_is_weighed_in_units_of_the_reference() -> None:
    meter = RewardMeter(reference())

    # a loss of 4 is worth half the budget; 100 of 1,000 J; 2 of 20 s
    assert meter.weigh(make_telemetry(energy_j=100.0, time_s=2.0), 4.0) == RewardTerms(0.5, -0.1, -0.1)
    # a loss of 5 is worth 0.4: the quality falls by 0.1
    back = meter.weigh(make_telemetry(energy_j=50.0, time_s=4.0), 5.0)
    assert back.vector() == pytest.approx([-0.1, -0.05, -0.2])


def test_unknown_energy_weighs_nothing() -> None:
    assert RewardMeter(reference()).weigh(make_telemetry(energy_j=None), 4.0).energy == 0.0
    assert RewardMeter(reference(energy_j=None)).weigh(make_telemetry(energy_j=5.0), 4.0).energy == 0.0


@pytest.mark.parametrize(("diverged", "loss"), [(True, math.nan), (False, math.nan), (False, math.inf)])
def test_a_diverged_run_sums_to_a_quality_of_minus_one(diverged: bool, loss: float) -> None:
    meter = RewardMeter(reference())
    terms = [meter.weigh(make_telemetry(), 4.0), meter.weigh(make_telemetry(diverged=diverged), loss)]

    assert sum(term.quality for term in terms) == DIVERGED_QUALITY == -1.0


OUTCOME = Outcome(quality=0.8, energy=-0.6, time=-0.7)
WEIGHTS = np.array([0.5, 0.3, 0.2])


def test_linear_is_the_weighted_sum() -> None:
    assert linear(OUTCOME, WEIGHTS) == pytest.approx(0.08)  # 0.40 - 0.18 - 0.14


def test_logarithmic_is_the_log_of_the_compute_equivalent_less_the_costs() -> None:
    assert logarithmic(OUTCOME, WEIGHTS) == pytest.approx(0.5 * math.log(0.8) - 0.18 - 0.14)
    # Quality above 1 is 1 + log c already.
    assert logarithmic(replace(OUTCOME, quality=1.2), WEIGHTS) == pytest.approx(0.5 * 0.2 - 0.32)
    hopeless = logarithmic(replace(OUTCOME, quality=1e-6), WEIGHTS)
    assert hopeless == pytest.approx(0.5 * math.log(0.01) - 0.32)
    assert logarithmic(replace(OUTCOME, quality=DIVERGED_QUALITY), WEIGHTS) == pytest.approx(hopeless - 0.5)


def best_share(utility: Utility, weight: float, gain: float) -> float:
    """Return the share of the reference's costs at which a run is best, whose quality grows as they do."""
    shares = np.linspace(0.05, 1.0, 96)
    outcome = Outcome(worth(gain * shares), -shares, -shares)
    weights = np.tile([weight, (1 - weight) / 2, (1 - weight) / 2], (len(shares), 1))
    return float(shares[utility(outcome, weights).argmax()])


@pytest.mark.parametrize("gain", [0.9, 1.0])
def test_under_logarithmic_the_best_length_moves_gradually(gain: float) -> None:
    lengths = [best_share(logarithmic, weight, gain) for weight in (0.2, 0.3, 0.4, 0.5, 0.6)]
    assert lengths == pytest.approx([0.25, 3 / 7, 2 / 3, 1.0, 1.0], abs=0.01)
    assert [best_share(linear, weight, 1.0) for weight in (0.49, 0.51)] == pytest.approx([0.05, 1.0])


def test_tchebycheff_is_the_largest_shortfall_and_a_little_of_all() -> None:
    # from the ideal (1, -0.5, -0.5): 0.5 x 0.2 = 0.10, 0.3 x 0.1 = 0.03, 0.2 x 0.2 = 0.04
    assert tchebycheff(OUTCOME, WEIGHTS) == pytest.approx(-(0.10 + 0.05 * 0.17))
    assert tchebycheff(OUTCOME, WEIGHTS, rho=0.0) == pytest.approx(-0.10)
    assert tchebycheff(Outcome(1.0, -0.5, -0.5), WEIGHTS) == 0.0


def test_constrained_saves_within_bounds() -> None:
    # energy and time weigh 0.6 and 0.4
    inside = Outcome(quality=0.9, energy=-0.9, time=-1.05, loss_increase=0.01)
    assert constrained(inside, WEIGHTS) == pytest.approx(-0.54 - 0.42)
    # 0.02 nats and 10 % of time too much, ten times
    outside = Outcome(quality=0.9, energy=-0.9, time=-1.15, loss_increase=0.03)
    assert constrained(outside, WEIGHTS) == pytest.approx(-0.54 - 0.46 - 1.2)
    assert constrained(outside, WEIGHTS, max_loss_increase=0.03, max_slowdown=0.15) == pytest.approx(-1.0)


def test_product_is_perplexity_to_the_one_and_a_half_times_the_cost() -> None:
    # the cost is 0.6 x 0.6 + 0.4 x 0.7; a loss 0.2 nats higher is a perplexity e^0.2 times as high
    assert product(OUTCOME, WEIGHTS) == pytest.approx(-0.64)
    assert product(replace(OUTCOME, loss_increase=0.2), WEIGHTS) == pytest.approx(-0.64 * math.exp(0.3))
    # at most 2 nats count
    assert product(replace(OUTCOME, loss_increase=1e9), WEIGHTS) == pytest.approx(-0.64 * math.exp(3.0))


@pytest.mark.parametrize("utility", UTILITIES.values(), ids=UTILITIES)
def test_every_utility_takes_a_preference_for_quality_alone(utility: object) -> None:
    assert callable(utility)
    assert math.isfinite(utility(OUTCOME, np.array([1.0, 0.0, 0.0])))


def test_an_unknown_utility_is_refused_by_name() -> None:
    names = "linear, logarithmic, tchebycheff, constrained, product"
    with pytest.raises(ValueError, match=f"utility must be one of {names}, got 'sum'"):
        ScalarReward(LiveTraining(make_plant=ToyPlant), "sum")


def toy_loss(scale: float) -> float:
    """Return the toy's final loss when the scale is doubled from 1 to `scale`, once an interval."""
    toy = ToyPlant()
    for i in range(TOY_CASE.decisions):
        toy.advance(Controls(batch_size=8, learning_rate_scale=min(2.0 ** (i + 1), scale)), 1 / TOY_CASE.decisions)
    return toy.loss


@pytest.mark.parametrize("scale", [1.0, ToyPlant.BEST_SCALE])
@pytest.mark.parametrize("utility", UTILITIES)
def test_the_rewards_of_an_episode_sum_to_the_utility_of_its_outcome(utility: str, scale: float) -> None:
    preference = Preference(quality=0.5, energy=0.3, time=0.2)
    env = ScalarReward(LiveTraining([TOY_CASE], preference, make_plant=ToyPlant), utility)
    for _ in range(2):  # the second episode begins anew
        env.reset(seed=0)
        vectors: list[np.ndarray] = []
        rewards: list[float] = []
        ended = False
        action = np.array([6, 1, 0, 0, 0] if scale > 1 else KEEP)  # x2, twice
        while not ended:
            _, reward, terminated, truncated, info = env.step(action if len(rewards) < 2 else np.array(KEEP))
            ended = terminated or truncated
            rewards.append(float(reward))
            vectors.append(info["vector_reward"])
            assert info["reward_weights"] == pytest.approx([0.5, 0.3, 0.2])

    quality, energy, time = np.sum(vectors, axis=0)
    increase = info["loss"] - toy_loss(1.0)
    assert sum(rewards) == pytest.approx(
        UTILITIES[utility](Outcome(quality, energy, time, increase), preference.weights()), abs=1e-6
    )
    assert [energy, time] == pytest.approx([-1.0, -1.0])
    assert info["loss"] == pytest.approx(toy_loss(scale))
    assert quality == pytest.approx(1.0) if scale == 1.0 else quality > 1.5
