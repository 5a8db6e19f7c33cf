"""Measure the CPU time of a reset, a step and a picture of the simulated environment with a single run.

python benchmarks/environment_speed.py [--episodes 100]

CPU seconds of the process count, not the clock's. On a busy machine they still rise, because programs share caches and
the halves of a core: the least of many episodes is nearest to an idle machine.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from _common import write_result

import trainpilot.envs  # noqa: F401, registers the environments
from trainpilot.envs.action import KEEP, N_CHOICES
from trainpilot.llm_runtime.process import use_threads

KEEP_PROBABILITY = 0.7
"""Probability that a random action keeps a control, as with an untrained policy."""


def episode(env: gymnasium.Env[np.ndarray, np.ndarray], seed: int, pictures: bool) -> tuple[float, float, float, int]:
    """Return the CPU seconds of the reset, of all steps and of a picture, and the number of steps."""
    random = np.random.default_rng(seed)
    start_s = time.process_time()
    env.reset(seed=seed)
    reset_s, steps, ended = time.process_time() - start_s, 0, False
    drawn = random.integers(N_CHOICES, size=(50, len(KEEP)))
    actions = np.where(random.random(drawn.shape) < KEEP_PROBABILITY, KEEP, drawn)
    start_s = time.process_time()
    while not ended:
        _, _, terminated, truncated, _ = env.step(actions[steps])
        ended, steps = terminated or truncated, steps + 1
    step_s = time.process_time() - start_s
    start_s = time.process_time()
    if pictures:
        env.render()
    return reset_s, step_s, time.process_time() - start_s, steps


def milliseconds(values: Sequence[float]) -> dict[str, float]:
    """Return least, median and 90th percentile, in ms."""
    found = 1000 * np.array(values)
    shares = {"least": 0, "median": 50, "p90": 90}
    return {name: round(float(np.percentile(found, share)), 3) for name, share in shares.items()}


def main() -> None:
    """Measure and write `results/environment_speed.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=100)
    options = parser.parse_args()
    use_threads(1)
    env = gymnasium.make(
        "trainpilot/SimulatedTraining-Scalar-v0", finish=False, render_mode="rgb_array", disable_env_checker=True
    )
    episode(env, 0, pictures=True)  # draws the pool of instances, and loads what draws pictures
    measured = [episode(env, 1 + number, pictures=number < 20) for number in range(options.episodes)]
    summary: dict[str, Any] = {
        "episodes": options.episodes,
        "load_of_the_machine": [round(load, 2) for load in os.getloadavg()],
        "reset_ms": milliseconds([reset_s for reset_s, *_ in measured]),
        "step_ms": milliseconds([step_s / steps for _, step_s, _, steps in measured]),
        "episode_ms": milliseconds([reset_s + step_s for reset_s, step_s, *_ in measured]),
        "picture_ms": milliseconds([picture_s for _, _, picture_s, _ in measured[:20]]),
    }
    print(summary)
    print(write_result("environment_speed", summary, torch.device("cpu")))


if __name__ == "__main__":
    main()
