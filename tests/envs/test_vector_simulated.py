"""Thousands of runs in arrays are what each would be alone: observations, masks, rewards, ends."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import pytest
from fake_plant_batch import ToyPlants, some_actions
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from trainpilot.envs.action import KEEP, N_CHOICES
from trainpilot.envs.decision import Preference, draw_weights
from trainpilot.envs.environments import SimulatedTraining
from trainpilot.envs.reward import ScalarReward, compute_equivalent, worth
from trainpilot.envs.vector import VectorSimulatedTraining
from trainpilot.llm_runtime.schedules import BUDGET_SHARES
from trainpilot.llm_runtime.simulator.records import Ints
from trainpilot.llm_runtime.simulator.runs import OnePlant

PREFERENCE = Preference(quality=0.6, energy=0.3, time=0.1)


class OneToy(ToyPlants):
    """A toy whose best scale is given."""

    def __init__(self, best_scale: float) -> None:
        super().__init__(1)
        self.given = best_scale

    def begin(self, rows: Ints) -> None:
        super().begin(rows)
        self.best_scale[:] = self.given


def single(best_scale: float = 2.0, preference: Preference | None = PREFERENCE) -> SimulatedTraining:
    return SimulatedTraining(preference, make_plant=lambda seed: OneToy(best_scale))


def keep(n_runs: int) -> Ints:
    return np.tile(KEEP, (n_runs, 1))


def action(**choices: int) -> Ints:
    names = ("learning_rate", "batch_size", "precision", "pruning", "finish")
    return np.array([[choices.get(name, k) for name, k in zip(names, KEEP, strict=True)]])


def random_episode(n_runs: int, steps: int) -> list[dict[str, Any]]:
    """Return what a vector environment said at each step under random actions, with the plants' best scales."""
    plants = ToyPlants(n_runs, seed=3)
    env = VectorSimulatedTraining(plants, PREFERENCE)
    random = np.random.default_rng(5)
    observation, _ = env.reset(seed=0)
    told = []
    for _ in range(steps):
        masks, scale = env.action_masks(), plants.best_scale.copy()
        actions = some_actions(random, masks | (random.random(masks.shape) < 0.2), N_CHOICES)  # some are masked
        before = observation
        observation, reward, terminated, truncated, infos = env.step(actions)
        told.append(
            {
                **{"scale": scale, "before": before, "masks": masks, "actions": actions, "reward": reward},
                **{"terminated": terminated, "truncated": truncated, "infos": infos},
            }
        )
    return told


def test_runs_side_by_side_agree_with_each_alone_to_1e_9() -> None:
    n_runs = 8
    told = random_episode(n_runs, 130)
    ends = {"terminated": 0, "truncated": 0, "diverged": 0}
    for row in range(n_runs):
        env = None
        for now in told:
            if env is None:
                env = single(float(now["scale"][row]))
                observation, _ = env.reset(seed=0)
            assert (now["before"][row] == observation).all()
            assert (now["masks"][row] == env.action_masks()).all()
            observation, _, terminated, truncated, info = env.step(now["actions"][row])
            assert now["reward"][row] == pytest.approx(list(info["reward_terms"].values()), abs=1e-9)
            assert (now["terminated"][row], now["truncated"][row]) == (terminated, truncated)
            infos = now["infos"]
            for name in ("loss", "loss_increase", "time_s", "energy_j", "diverged"):
                assert infos[name][row] == pytest.approx(info[name], abs=1e-9, nan_ok=True)
            if terminated or truncated:
                assert (infos["final_obs"][row] == observation).all()
                env = None
                ends["truncated"] += truncated
                ends["diverged"] += info["diverged"]
                ends["terminated"] += terminated
    assert min(ends.values()) > 2
    assert ends["terminated"] > ends["diverged"]  # some cool-downs


def test_always_keeping_is_the_reference() -> None:
    env = VectorSimulatedTraining(ToyPlants(5), PREFERENCE)
    env.reset(seed=0)
    total = np.zeros((5, 3))
    for step in range(20):
        _, reward, terminated, truncated, infos = env.step(keep(5))
        total += reward
        assert not terminated.any()
        assert truncated.tolist() == [step == 19] * 5

    assert total == pytest.approx(np.tile([1.0, -1.0, -1.0], (5, 1)))
    sums = infos["final_info"]
    assert sums["reward_terms"] == pytest.approx(total)
    # 20 intervals of 800 tokens of 1 ms and 0.1 J
    assert sums["time_s"] == pytest.approx(16.0)
    assert sums["energy_j"] == pytest.approx(1_600.0)
    assert sums["length"].tolist() == [20] * 5
    assert infos["loss_increase"] == pytest.approx(0.0, abs=1e-12)


def test_a_run_that_ends_is_begun_anew_in_the_same_step() -> None:
    plants = ToyPlants(3)
    env = VectorSimulatedTraining(plants, PREFERENCE)
    first, _ = env.reset(seed=0)
    for _ in range(4):
        env.step(keep(3))
    plants.diverged[1] = True
    scales = plants.best_scale.copy()
    observation, reward, terminated, truncated, infos = env.step(keep(3))

    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert (terminated.tolist(), truncated.tolist()) == ([False, True, False], [False] * 3)
    assert (plants.best_scale != scales).tolist() == [False, True, False]
    assert plants.tokens.tolist() == [4_000.0, 0.0, 4_000.0]
    assert (observation[1] == first[1]).all()
    assert (observation[0] != first[0]).any()
    assert infos["_final_obs"].tolist() == [False, True, False]
    assert (infos["final_obs"][0] == observation[0]).all()
    assert (infos["final_obs"][1] != observation[1]).any()
    assert np.isfinite(infos["final_obs"]).all()
    assert infos["final_info"]["reward_terms"][1, 0] == pytest.approx(-1.0)
    assert infos["loss_increase"][1] == 10.0
    assert np.isfinite(reward).all()
    # the new run's quality starts at 0 again
    *_, infos = env.step(keep(3))
    assert env.runs is not None
    assert env.runs.outcome[1, 0] == pytest.approx(
        worth(compute_equivalent(infos["loss"][1], BUDGET_SHARES, plants.reference_losses[1].tolist()))
    )
    assert env.runs.intervals.tolist() == [6, 1, 6]


def test_the_validation_loss_is_looked_at_only_where_it_is_due() -> None:
    plants = ToyPlants(3)
    env = VectorSimulatedTraining(plants, PREFERENCE)
    env.reset(seed=0)
    for step in range(20):
        if step == 3:
            plants.diverged[1] = True  # begins anew after the fourth interval
        env.step(keep(3))

    assert [rows.tolist() for rows in plants.evaluated] == [[0, 2], [1], [0, 2]]


def test_a_choice_that_does_not_exist_is_refused_and_changes_nothing() -> None:
    env = VectorSimulatedTraining(ToyPlants(2), PREFERENCE)
    with pytest.raises(ValueError, match="step needs runs; call reset first"):
        env.step(keep(2))
    before, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action learning_rate must be in \[0, 7\), got 7"):
        env.step(np.array([KEEP, (7, 1, 0, 0, 0)]))

    assert env.runs is not None
    assert env.runs.states.observation() is before


def test_what_was_handed_out_does_not_change_afterwards() -> None:
    env = VectorSimulatedTraining(ToyPlants(4))
    random = np.random.default_rng(0)
    handed_out = []
    env.reset(seed=0)
    for _ in range(45):
        observation, reward, _, _, infos = env.step(some_actions(random, env.action_masks(), N_CHOICES))
        arrays = [observation, reward, infos["preference"], infos.get("final_obs", reward), env.action_masks()]
        handed_out.append((arrays, [array.copy() for array in arrays]))

    for arrays, copies in handed_out:
        assert all((array == copy).all() for array, copy in zip(arrays, copies, strict=True))


def test_observations_and_rewards_are_in_their_spaces() -> None:
    env = VectorSimulatedTraining(ToyPlants(4))
    observation, _ = env.reset(seed=0)
    assert observation in env.observation_space
    for now in random_episode(4, 60):
        assert now["actions"] in env.action_space
        assert now["reward"].astype(np.float32) in env.reward_space
        assert now["before"] in env.observation_space


def test_a_preference_is_drawn_per_episode_or_fixed() -> None:
    drawn = VectorSimulatedTraining(ToyPlants(4), least_quality=0.1)
    weights = [drawn.reset(seed=0)[1]["preference"]]
    for _ in range(21):
        weights.append(drawn.step(keep(4))[-1]["preference"])
    fixed = VectorSimulatedTraining(ToyPlants(4), PREFERENCE).reset(seed=0)[1]["preference"]

    assert (weights[0] == weights[20]).all()
    assert (weights[20] != weights[21]).all()  # the first episode had 20 intervals
    assert (drawn.reset(seed=0)[1]["preference"] == weights[0]).all()
    assert fixed.tolist() == [pytest.approx([0.6, 0.3, 0.1])] * 4
    with pytest.raises(ValueError, match=r"least_quality must be in \[0, 1\], got 1.5"):
        VectorSimulatedTraining(ToyPlants(1), least_quality=1.5)


def test_a_share_of_the_preferences_is_for_quality_alone() -> None:
    weights = draw_weights(np.random.default_rng(0), 10_000, 0.2, 0.25)
    alone = weights[:, 0] == 1.0

    assert alone.mean() == pytest.approx(0.25, abs=0.02)
    assert (weights[alone, 1:] == 0).all()
    assert (weights[~alone, 0] < 1).all()
    env = VectorSimulatedTraining(ToyPlants(4), quality_alone=1.0)
    assert (env.reset(seed=0)[1]["preference"] == [1, 0, 0]).all()
    with pytest.raises(ValueError, match=r"quality_alone must be in \[0, 1\], got -1"):
        VectorSimulatedTraining(ToyPlants(1), quality_alone=-1)


def test_weights_are_drawn_like_a_preference() -> None:
    many = draw_weights(np.random.default_rng(0), 10_000, 0.2)
    one = draw_weights(np.random.default_rng(7), 1)[0]

    assert many.sum(axis=1) == pytest.approx(1.0)
    assert many.min() >= 0
    assert many[:, 0].min() == pytest.approx(0.2, abs=0.001)
    assert one == pytest.approx(Preference.draw(np.random.default_rng(7)).weights())


def test_compute_equivalents_are_those_of_one_run() -> None:
    random = np.random.default_rng(0)
    losses = np.exp(random.uniform(0.5, 2.0, (400, 3)))
    losses[:200] = -np.sort(-losses[:200], axis=1)  # half of them in order
    loss = np.exp(random.uniform(0.2, 2.3, 400))
    loss[:40:4], loss[1:40:4], loss[2:40:4], loss[3:40:4] = math.nan, math.inf, 0.0, -1.0
    loss[40:80] = losses[40:80, 1]  # on a point
    shares = compute_equivalent(loss, BUDGET_SHARES, losses)
    alone = [compute_equivalent(float(one), BUDGET_SHARES, row.tolist()) for one, row in zip(loss, losses, strict=True)]

    assert shares == pytest.approx(alone, abs=1e-12)
    assert worth(shares) == pytest.approx([worth(share) for share in alone], abs=1e-12)
    assert {0.0, 3.0} < set(alone)


class Scalarised(SimulatedTraining):
    """The environment with the weighted sum as its reward, for checkers that know no vectors."""

    def __init__(self) -> None:
        super().__init__(make_plant=lambda seed: ToyPlants(1, seed))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, float(reward @ info["preference"]), terminated, truncated, info


@pytest.mark.filterwarnings("error")
def test_both_checkers_find_nothing() -> None:
    check_env(Scalarised(), skip_render_check=True)
    sb3_check_env(ScalarReward(SimulatedTraining(make_plant=lambda seed: ToyPlants(1, seed))), warn=True)


def test_one_seed_gives_one_episode_and_another_a_new_one() -> None:
    envs = [SimulatedTraining(make_plant=lambda seed: ToyPlants(1, seed)) for _ in range(2)]
    firsts = [env.reset(seed=4) for env in envs]
    assert data_equivalence(firsts[0], firsts[1], exact=True)
    for _ in range(20):
        steps = [env.step(action(learning_rate=4)[0]) for env in envs]
        assert data_equivalence(steps[0], steps[1], exact=True)

    assert envs[0].reset()[1]["plant_seed"] != firsts[0][1]["plant_seed"]
    assert envs[1].reset(options={"plant_seed": 12, "preference": PREFERENCE})[1]["plant_seed"] == 12


def test_it_can_be_made_by_its_id() -> None:
    import trainpilot.envs  # noqa: F401

    env: Any = gymnasium.make("trainpilot/SimulatedTraining-v0", make_plant=lambda seed: OneToy(8.0))
    env.reset(seed=0)
    *_, info = env.step(action(precision=3, pruning=1)[0])

    assert isinstance(env.unwrapped, SimulatedTraining)
    assert info["refusals"] == [
        "precision bf16: does not pay on this machine",
        "pruning +5 %: this run does not prune",
    ]


def test_by_default_it_is_the_simulator() -> None:
    env = SimulatedTraining()
    env.action_space.seed(0)
    observation, _ = env.reset(seed=0)
    ended, reward = False, np.zeros(3, dtype=np.float32)
    while not ended:
        assert observation in env.observation_space
        assert reward in env.reward_space
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        ended = terminated or truncated

    assert math.isfinite(info["loss_increase"])
    assert info["energy_source"] == "estimated"


def test_mo_gymnasium_s_linear_reward_works_on_it() -> None:
    mo_gymnasium = pytest.importorskip("mo_gymnasium")
    env = mo_gymnasium.wrappers.LinearReward(
        mo_gymnasium.make("trainpilot/SimulatedTraining-v0", make_plant=lambda seed: OneToy(2.0)),
        weight=np.array([0.6, 0.3, 0.1]),
    )
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.array(KEEP))

    assert reward == pytest.approx(float(info["vector_reward"] @ [0.6, 0.3, 0.1]))


def test_one_plant_goes_back_to_a_snapshot() -> None:
    plant = OnePlant(OneToy(2.0))
    start = plant.limits().start
    plant.advance(start, 0.05)
    snapshot = plant.snapshot()
    went_on = plant.advance(start, 0.05)
    plant.restore(snapshot)

    assert plant.advance(start, 0.05) == went_on
    with pytest.raises(ValueError, match="plants must have one run, got 2"):
        OnePlant(ToyPlants(2))
