"""Scores on simulated runs say what a policy reached, by where it was started, and are the same every time."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from fake_plant_batch import some_actions
from policies import random_weights

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.simulator_training import START_GROUPS, evaluate_in_simulator
from trainpilot.envs.action import KEEP, N_CHOICES
from trainpilot.llm_runtime.simulator.records import Bools, Ints
from trainpilot.llm_runtime.simulator.runs import Pool, Start, default_pool


@pytest.fixture(scope="module")
def pool() -> Pool:
    return default_pool(24, seed=7)


def keep(observations: np.ndarray, masks: Bools) -> Ints:
    return np.tile(KEEP, (len(observations), 1))


def first_then_keep(**choices: int) -> Callable[[np.ndarray, Bools], Ints]:
    """Return a policy that takes other choices at its first decision only."""
    fields = ("learning_rate", "batch_size", "precision", "pruning", "finish")
    calls: list[int] = []

    def act(observations: np.ndarray, masks: Bools) -> Ints:
        actions = keep(observations, masks)
        for name, choice in choices.items() if not calls else ():
            actions[:, fields.index(name)] = choice
        calls.append(1)
        return actions

    return act


def test_keeping_the_best_learning_rate_comes_near_the_tuned_static(pool: Pool) -> None:
    scores = evaluate_in_simulator(keep, pool, n_runs=48, start=Start(rates=(1.0, 1.0)))

    assert scores.learning_rate_over_best == pytest.approx([1.0] * 50)
    assert scores.batch_over_start == pytest.approx([1.0] * 50)
    assert scores.diverged_share == 0
    assert scores.by_start == {**dict.fromkeys(START_GROUPS), "near": scores.multiplier}
    assert 0 <= scores.multiplier_p10 <= scores.multiplier <= 1.2
    assert scores.score == pytest.approx((scores.multiplier + scores.multiplier_p10) / 2)


def test_a_wrong_start_costs_and_a_step_towards_the_best_rate_pays(pool: Pool) -> None:
    low = Start(rates=(0.1, 0.1))
    wrong = evaluate_in_simulator(keep, pool, n_runs=48, start=low)
    better = evaluate_in_simulator(first_then_keep(learning_rate=6), pool, n_runs=48, start=low)

    assert wrong.by_start["far_below"] == wrong.multiplier
    assert better.learning_rate_over_best == pytest.approx([0.2] * 50)
    assert better.multiplier > wrong.multiplier


def test_a_run_that_finishes_early_is_scored_as_it_ended(pool: Pool) -> None:
    def finish(observations: np.ndarray, masks: Bools) -> Ints:
        actions = keep(observations, masks)
        actions[:, 4] = 1
        return actions

    early = evaluate_in_simulator(finish, pool, n_runs=16)
    full = evaluate_in_simulator(keep, pool, n_runs=16)

    assert len(early.learning_rate_over_best) < 50
    assert early.time_over_reference < full.time_over_reference / 2
    assert early.multiplier < full.multiplier


def test_the_record_is_plain_json_and_the_same_every_time(pool: Pool) -> None:
    bundle = PolicyBundle(random_weights())
    one = evaluate_in_simulator(bundle, pool, seed=3, n_runs=8)

    assert one == evaluate_in_simulator(bundle, pool, seed=3, n_runs=8)
    assert one != evaluate_in_simulator(bundle, pool, seed=4, n_runs=8)
    assert json.loads(json.dumps(one.to_json(), allow_nan=False))["n_runs"] == 8


def test_many_rows_are_decided_as_one_is() -> None:
    bundle, random = PolicyBundle(random_weights()), np.random.default_rng(0)
    observations = random.uniform(-1, 1, (20, bundle.weights["hidden.0.weight"].shape[1])).astype(np.float32)
    masks = random.random((20, sum(N_CHOICES))) < 0.6
    masks[:, np.cumsum([0, *N_CHOICES[:-1]]) + np.array(KEEP)] = True

    actions = bundle.choose(observations, masks)

    assert [tuple(row) for row in actions] == [bundle.act(o, m) for o, m in zip(observations, masks, strict=True)]
    assert some_actions(random, masks, N_CHOICES).shape == actions.shape


def test_no_runs_are_refused(pool: Pool) -> None:
    with pytest.raises(ValueError, match="n_runs must be at least 1, got 0"):
        evaluate_in_simulator(keep, pool, n_runs=0)
