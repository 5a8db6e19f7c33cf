"""PPO of RLlib on simulated training runs.

python docs/examples/rllib_ppo.py [--iterations 40] [--seed 0] [--preference quality=1]

Needs `pip install 'ray[rllib]>=2.60'` in an environment of its own beside trainpilot, without `constraints.txt`: RLlib
2.60 pins Gymnasium 1.2.2. One process samples and learns, about two minutes on one core at the default; the printed
return rises from the first minute.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before the import, which reads it

import gymnasium
import numpy as np
import ray
from gymnasium.vector import VectorWrapper
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.tune.registry import register_env

ENV_ID = "trainpilot.envs:trainpilot/SimulatedTraining-Scalar-v0"  # the first half is imported, and registers the id
N_ENVS, N_STEPS = 64, 50


class EndOfBudget(VectorWrapper):
    """Makes the end of the budget an end, behind which no reward is expected: without discount nothing else is one."""

    def step(self, actions: np.ndarray) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Train every run for one interval."""
        observation, rewards, terminated, truncated, infos = super().step(actions)
        return observation, rewards, terminated | truncated, np.zeros_like(truncated), infos


def make_env(settings: Mapping[str, Any]) -> VectorWrapper:
    """Return runs that are stepped as arrays.

    RLlib resets a run that has ended in the step after, hence `autoreset_mode`. It knows no masks of actions: one that
    is not allowed keeps. Without `finish=False` an untrained policy ends its runs after a dozen decisions.
    """
    return EndOfBudget(gymnasium.make_vec(ENV_ID, finish=False, autoreset_mode="NextStep", **settings))


def make_ppo(preference: str | None, seed: int) -> Algorithm:
    """Return an untrained agent."""
    register_env("simulated-training", make_env)
    config = (
        PPOConfig()
        .environment("simulated-training", env_config={"preference": preference})
        .env_runners(
            num_env_runners=0,  # in this process
            num_envs_per_env_runner=N_ENVS,
            gym_env_vectorize_mode="vector_entry_point",
            rollout_fragment_length=N_STEPS,
            batch_mode="truncate_episodes",
        )
        .learners(num_learners=0)
        .training(
            train_batch_size_per_learner=N_ENVS * N_STEPS,
            minibatch_size=N_ENVS * 10,
            num_epochs=6,
            lr=5e-4,
            gamma=1.0,  # no discount: what counts is the outcome of the run
            lambda_=0.97,
            entropy_coeff=0.001,
            clip_param=0.2,
            grad_clip=0.5,
            vf_loss_coeff=0.5,
            use_kl_loss=False,
        )
        .rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[64, 64], vf_share_layers=False))
        .debugging(seed=seed, log_level="ERROR")
    )
    return config.build_algo()


def main() -> None:
    """Train an agent, and print the mean return of the runs that ended in each iteration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=40, help="of 3,200 decisions each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preference", help="such as quality=0.7,energy=0.15,time=0.15; by default drawn per run")
    options = parser.parse_args()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    algorithm = make_ppo(options.preference, options.seed)
    for _ in range(options.iterations):
        found = algorithm.train()
        made = found["num_env_steps_sampled_lifetime"]
        print(f"{made:9,.0f} decisions: return {found['env_runners']['episode_return_mean']:.3f}", flush=True)
    algorithm.stop()
    ray.shutdown()


if __name__ == "__main__":
    main()
