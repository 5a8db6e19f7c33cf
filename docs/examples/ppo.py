"""PPO in one file: learn to steer simulated training runs with nothing but torch, numpy and Gymnasium.

python docs/examples/ppo.py [--decisions 2000000] [--seed 0] [--preference quality=1]

In the style of CleanRL. About ten minutes on one core at the default; the printed return rises from the first minute.
"""

from __future__ import annotations

import argparse
import time

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import trainpilot.envs  # registers the environments

N_ENVS, N_STEPS = 64, 50
EPOCHS, MINIBATCH = 6, 640
GAMMA, LAMBDA = 1.0, 0.97  # no discount: what counts is the outcome of the run
CLIP, ENTROPY, VALUE, MAX_NORM = 0.2, 0.002, 0.5, 0.5
LEARNING_RATE = 7e-4
KEEP_PROBABILITY = 0.7
"""Chance that the untrained policy leaves a control alone. It begins near the base schedule, which is far better than
changing everything at random."""


class Agent(nn.Module):
    """A policy over several independent choices, and a value network."""

    def __init__(self, n_inputs: int, choices: list[int], keep: list[int]) -> None:
        super().__init__()
        self.choices = choices
        self.policy = mlp(n_inputs, sum(choices), gain=0.01)
        self.value = mlp(n_inputs, 1, gain=1.0)
        last, first = self.policy[-1], 0
        assert isinstance(last, nn.Linear)
        for n, kept in zip(choices, keep, strict=True):
            odds = KEEP_PROBABILITY / (1 - KEEP_PROBABILITY) * (n - 1)
            last.bias.data[first + kept] = float(np.log(odds))
            first += n

    def distributions(self, observation: Tensor, masks: Tensor) -> list[Categorical]:
        """Return one distribution per choice, over what is allowed."""
        logits = self.policy(observation).masked_fill(~masks, -1e8)
        return [Categorical(logits=part) for part in logits.split(self.choices, dim=-1)]

    def act(self, observation: Tensor, masks: Tensor, greedy: bool = False) -> tuple[Tensor, Tensor]:
        """Return actions, shape (n_envs, n_choices), and their log-probabilities."""
        found = self.distributions(observation, masks)
        actions = torch.stack([each.probs.argmax(-1) if greedy else each.sample() for each in found], dim=-1)
        return actions, self.log_probability(found, actions)

    @staticmethod
    def log_probability(found: list[Categorical], actions: Tensor) -> Tensor:
        """Return the log-probabilities of whole actions."""
        parts = [each.log_prob(actions[:, index]) for index, each in enumerate(found)]
        return torch.stack(parts).sum(dim=0)


def mlp(n_inputs: int, n_outputs: int, gain: float) -> nn.Sequential:
    """Return a network of two hidden layers, initialised orthogonally."""
    layers = [nn.Linear(n_inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, n_outputs)]
    for layer, scale in zip(layers[::2], (2**0.5, 2**0.5, gain), strict=True):
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def make_env(preference: str | None) -> gymnasium.vector.VectorEnv:
    """Return the simulated runs. Without `finish=False` an untrained policy ends its runs after a dozen decisions."""
    return gymnasium.make_vec(
        "trainpilot/SimulatedTraining-Scalar-v0", num_envs=N_ENVS, preference=preference, finish=False
    )


def tensors(env: gymnasium.vector.VectorEnv, observation: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return observations and masks of the allowed choices."""
    return torch.as_tensor(observation), torch.as_tensor(env.unwrapped.action_masks().copy())


def advantages(rewards: Tensor, values: Tensor, ends: Tensor, last_value: Tensor) -> Tensor:
    """Return generalised advantage estimates, shape (N_STEPS, N_ENVS); an end of the budget is an end."""
    estimates, ahead = torch.zeros_like(rewards), torch.zeros_like(last_value)
    for t in reversed(range(len(rewards))):
        following = last_value if t == len(rewards) - 1 else values[t + 1]
        goes_on = 1.0 - ends[t]
        ahead = rewards[t] + GAMMA * following * goes_on - values[t] + GAMMA * LAMBDA * goes_on * ahead
        estimates[t] = ahead
    return estimates


def update(agent: Agent, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """Improve the agent on one rollout."""
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(batch["actions"])).split(MINIBATCH):
            part = {name: values[rows] for name, values in batch.items()}
            found = agent.distributions(part["observation"], part["masks"])
            ratio = (agent.log_probability(found, part["actions"]) - part["log_probability"]).exp()
            better = (part["advantage"] - part["advantage"].mean()) / (part["advantage"].std() + 1e-8)
            gain = torch.min(ratio * better, ratio.clamp(1 - CLIP, 1 + CLIP) * better).mean()
            entropy = torch.stack([each.entropy() for each in found]).sum(dim=0).mean()
            miss = (agent.value(part["observation"]).squeeze(-1) - part["return"]).square().mean()
            loss = VALUE * miss - gain - ENTROPY * entropy
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), MAX_NORM)
            optimizer.step()


def greedy_return(agent: Agent | None, keep: list[int], preference: str | None, seed: int) -> float:
    """Return the mean return of `N_ENVS` new runs, under the most likely actions or, without agent, keeping all."""
    env = make_env(preference)
    observation, _ = env.reset(seed=seed)
    total, running = np.zeros(N_ENVS), np.ones(N_ENVS, dtype=bool)
    while running.any():
        with torch.no_grad():
            actions = np.tile(keep, (N_ENVS, 1)) if agent is None else agent.act(*tensors(env, observation), True)[0]
        observation, rewards, terminated, truncated, _ = env.step(np.asarray(actions))
        total += rewards * running
        running &= ~(terminated | truncated)
    return float(total.mean())


def main() -> None:
    """Train an agent, and print its learning curve and how it compares with the base schedule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=int, default=2_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preference", help="such as quality=0.7,energy=0.15,time=0.15; by default drawn per run")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    env, keep = make_env(options.preference), list(trainpilot.envs.KEEP)
    choices = [int(n) for n in env.unwrapped.single_action_space.nvec]
    agent = Agent(env.single_observation_space.shape[0], choices, keep)
    optimizer = torch.optim.Adam(agent.parameters(), lr=LEARNING_RATE, eps=1e-5)
    observation, _ = env.reset(seed=options.seed)
    n_updates, start_s = max(options.decisions // (N_ENVS * N_STEPS), 1), time.process_time()
    for number in range(1, n_updates + 1):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - (number - 1) / n_updates)
        steps: list[dict[str, Tensor]] = []
        returns: list[float] = []
        for _ in range(N_STEPS):
            seen, masks = tensors(env, observation)
            with torch.no_grad():
                actions, log_probability = agent.act(seen, masks)
                value = agent.value(seen).squeeze(-1)
            observation, rewards, terminated, truncated, infos = env.step(actions.numpy())
            ended = terminated | truncated
            if ended.any():  # utility `linear`: the return is the weighted sum of the episode's reward vectors
                sums = (infos["final_info"]["reward_terms"] * infos["preference"]).sum(axis=1)
                returns += sums[ended].tolist()
            steps.append(
                {
                    **{"observation": seen, "masks": masks, "actions": actions, "log_probability": log_probability},
                    **{"value": value, "reward": torch.as_tensor(rewards, dtype=torch.float32)},
                    "end": torch.as_tensor(ended, dtype=torch.float32),
                }
            )
        rollout = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
        with torch.no_grad():
            last_value = agent.value(torch.as_tensor(observation)).squeeze(-1)
        gains = advantages(rollout.pop("reward"), rollout["value"], rollout.pop("end"), last_value)
        rollout |= {"advantage": gains, "return": gains + rollout.pop("value")}
        update(agent, optimizer, {name: values.flatten(0, 1) for name, values in rollout.items()})
        if returns and (number % max(n_updates // 20, 1) == 0 or number == 1):
            spent_s = time.process_time() - start_s
            made, mean = number * N_ENVS * N_STEPS, np.mean(returns)
            print(f"{made:9,} decisions, {spent_s:4.0f} s: return {mean:.3f}", flush=True)
    print(f"new runs, keeping the base schedule: {greedy_return(None, keep, options.preference, 10**6):.3f}")
    print(f"new runs, the agent's likeliest action: {greedy_return(agent, keep, options.preference, 10**6):.3f}")


if __name__ == "__main__":
    main()
