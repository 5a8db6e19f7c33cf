"""Train a policy with sb3-contrib's MaskablePPO on any vectorised environment, resumably, and export it as a bundle."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from gymnasium import Env
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecMonitor

from trainpilot.agents.bundle import FIRST_LAYER, PolicyBundle
from trainpilot.agents.logging.training_log import EventLog
from trainpilot.envs.action import ACTION_FIELDS
from trainpilot.envs.decision import N_STACK
from trainpilot.envs.observation import OBSERVATION_FIELDS, ObservationField
from trainpilot.llm_runtime.energy.meter import EnergyMeter, energy_between
from trainpilot.llm_runtime.files import load_checkpoint, resuming, save_checkpoint
from trainpilot.llm_runtime.json_records import JsonRecord
from trainpilot.llm_runtime.optimizer import check_state
from trainpilot.llm_runtime.plain_values import shown
from trainpilot.llm_runtime.process import global_random_state, set_global_random_state
from trainpilot.llm_runtime.ranges import COUNT, Range, Whole, check_ranges


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Settings of PPO. Names and meanings are those of Stable-Baselines3."""

    total_decisions: Annotated[int, Whole(0, 10**12)] = 20_000
    """Environment steps to learn from; with 0 the policy is not trained."""
    n_steps: Annotated[int, Whole(1, 10**6)] = 100
    """Decisions per environment between two updates."""
    batch_size: Annotated[int, Whole(2, 10**7)] = 100
    """Minibatch of an update, in decisions."""
    n_epochs: Annotated[int, Whole(1, 1000)] = 6
    """Passes over the collected decisions per update."""
    learning_rate: Annotated[float, Range(0, 1, above=True)] = 5e-4
    """Of the policy's optimiser."""
    learning_rate_end: Annotated[float, Range(0, 1)] = 1.0
    """Share of the learning rate that is left at the end; linear in between."""
    gamma: Annotated[float, Range(0, 1)] = 1.0
    """No discount: the outcome of the run is what counts."""
    gae_lambda: Annotated[float, Range(0, 1)] = 0.97
    """Bias against variance of the advantage estimate."""
    clip_range: Annotated[float, Range(0, 1, above=True)] = 0.2
    """Trust region of the probability ratio."""
    ent_coef: Annotated[float, Range(0, 100)] = 0.003
    """Weight of the entropy bonus."""
    vf_coef: Annotated[float, Range(0, 100)] = 0.5
    """Weight of the value loss."""
    max_grad_norm: Annotated[float, Range(0, 1000, above=True)] = 0.5
    """Largest gradient norm of an update."""
    hidden: tuple[Annotated[int, Whole(1, 4096)], ...] = (64, 64)
    """Width of each hidden layer, of policy and value network alike."""
    keep_probability: Annotated[float, Range(0, 1, above=True, below=True)] = 0.7
    """Chance that the untrained policy leaves a control alone: learning starts near the base schedule."""
    finish_probability: Annotated[float, Range(0, 1, above=True, below=True)] = 0.003
    """Chance per decision that the untrained policy begins the cool-down."""
    time_limit_s: Annotated[float, Range(0, above=True)] | None = None
    """Seconds after which training stops early; `None` is no limit."""
    seed: Annotated[int, Whole(0, 2**32 - 1)] = 0
    """Seeds the policy's initial weights and its sampling."""

    def __post_init__(self) -> None:
        check_ranges(self, "ppo.")

    def learning_rate_at(self, left: float) -> float:
        """Return the learning rate while a share `left` of the decisions is still to come."""
        end = self.learning_rate_end
        return self.learning_rate * (end + (1 - end) * min(max(left, 0.0), 1.0))


class RememberedCallback(BaseCallback):
    """An SB3 callback whose state is part of the checkpoint."""

    def state(self) -> dict[str, Any]:
        """Return the state as tensors, numbers, text and containers of these."""
        raise NotImplementedError

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        raise NotImplementedError


@runtime_checkable
class ResumableEnv(Protocol):
    """A vectorised environment whose runs can go on from a checkpoint, to the last bit."""

    def state(self) -> dict[str, Any]:
        """Return the state of all runs, as arrays, numbers, text and dictionaries of these."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; the next `reset` goes on with these runs."""


def side_by_side(make_env: Callable[[], Env[np.ndarray, np.ndarray]], n_envs: int) -> VecEnv:
    """Return `n_envs` environments, each in a process of its own, for which `make_env` is pickled."""
    return VecMonitor(SubprocVecEnv([make_env] * n_envs, start_method="spawn"))


def end_processes(env: VecEnv) -> None:
    """End the processes of `side_by_side` at once; `close` would wait for intervals, and for ever after a signal."""
    for process in getattr(env.unwrapped, "processes", ()):
        process.terminate()
        process.join()


def make_ppo(env: VecEnv, config: PPOConfig, privileged: int = 0) -> MaskablePPO:
    """Return a new agent, whose untrained policy mostly chooses "keep".

    Args:
        env: Vectorised environment with scalar rewards and `action_masks`.
        config: Settings of PPO.
        privileged: Number of inputs at the end of the observation that only the value network sees.
    """
    model = MaskablePPO(
        "MlpPolicy",
        env,
        learning_rate=config.learning_rate_at,
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip_range,
        ent_coef=config.ent_coef,
        vf_coef=config.vf_coef,
        max_grad_norm=config.max_grad_norm,
        policy_kwargs={"net_arch": list(config.hidden), "activation_fn": torch.nn.Tanh},
        seed=config.seed,
        device="cpu",  # a small network is faster there
    )
    with torch.no_grad():
        _action_layer(model).bias.copy_(torch.from_numpy(initial_bias(config)))
    if privileged:
        _hide_from_policy(model, privileged)
    return model


def _hide_from_policy(model: MaskablePPO, privileged: int) -> None:
    """Show zeros to the first layer of the policy network instead of the last inputs, and zero its weights on them."""
    first = model.policy.mlp_extractor.policy_net[0] if model.policy.net_arch else model.policy.action_net
    assert isinstance(first, torch.nn.Linear)
    with torch.no_grad():
        first.weight[:, -privileged:] = 0.0

    def hidden(layer: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.pad(inputs[0][:, :-privileged], (0, privileged))

    first.register_forward_pre_hook(hidden)


def _action_layer(model: MaskablePPO) -> torch.nn.Linear:
    layer = model.policy.action_net
    assert isinstance(layer, torch.nn.Linear)
    return layer


def initial_bias(config: PPOConfig) -> np.ndarray:
    """Return the bias of the action layer, float32 of shape (sum of choices,), that mostly chooses "keep"."""
    parts = []
    for field in ACTION_FIELDS:
        keep = 1 - config.finish_probability if field.name == "finish" else config.keep_probability
        logits = np.zeros(len(field.choices), dtype=np.float32)
        logits[field.keep] = math.log(keep / (1 - keep) * (len(field.choices) - 1))
        parts.append(logits)
    return np.concatenate(parts)


def train(
    env: VecEnv,
    config: PPOConfig,
    folder: Path,
    *,
    callbacks: Sequence[BaseCallback] = (),
    progress: Callable[[int], None] | None = None,
    start: Mapping[str, torch.Tensor] | None = None,
    meter: EnergyMeter | None = None,
    privileged: int = 0,
) -> tuple[MaskablePPO, dict[str, float]]:
    """Train up to `config.total_decisions`, from the checkpoint in `folder` if there is one.

    Args:
        env: Vectorised environment with scalar rewards and `action_masks`.
        config: Settings of PPO.
        folder: Folder of the checkpoint and the TensorBoard events (`tb/`).
        callbacks: Further SB3 callbacks, such as `TrainingLog`.
        progress: Called with the number of decisions made so far.
        start: Initial weights of policy and value network where there is no checkpoint.
        meter: Measures joules and seconds of this process; needed where the runs are simulated. By default the joules
            and seconds of the runs themselves are added up.
        privileged: Number of inputs at the end of the observation that only the value network sees.

    Returns:
        The agent, and the cost of its training: decisions, episodes, joules (NaN where unknown), seconds.
    """
    model = make_ppo(env, config, privileged)
    if start is not None:
        check_weights(model.policy, start)
        model.policy.load_state_dict(start)
    bookkeeping = _CheckpointAndCost(folder / "checkpoint.pt", progress, config.time_limit_s, callbacks, meter)
    everyone = CallbackList([*callbacks, bookkeeping])
    everyone.init_callback(model)
    bookkeeping.load(model)
    model.set_logger(Logger(str(folder / "tb"), [EventLog(folder / "tb")]))
    left = config.total_decisions - model.num_timesteps
    if left > 0:
        model.learn(left, callback=everyone, reset_num_timesteps=False)
    return model, bookkeeping.cost


class _CheckpointAndCost(BaseCallback):
    """Writes a checkpoint after every update, adds up the cost of training, and reports progress.

    One callback, not three: the cost is part of the checkpoint, and is completed just before it is written.
    """

    def __init__(
        self,
        path: Path,
        progress: Callable[[int], None] | None,
        time_limit_s: float | None,
        others: Sequence[BaseCallback],
        meter: EnergyMeter | None,
    ) -> None:
        super().__init__()
        self.remembered = {type(other).__name__: other for other in others if isinstance(other, RememberedCallback)}
        self.meter = meter
        self.reading = meter.read() if meter is not None else None
        self.end_s = math.inf if time_limit_s is None else time.monotonic() + time_limit_s
        self.path = path
        self.progress = progress
        self.cost = {"decisions": 0.0, "episodes": 0.0, "energy_j": 0.0, "time_s": 0.0}

    def _on_step(self) -> bool:
        self.cost["episodes"] += float(np.sum(self.locals["dones"]))
        for info in self.locals["infos"] if self.meter is None else ():
            self._add(info.get("energy_j"), float(info["time_s"]))
        self.cost["decisions"] = self.num_timesteps
        if self.progress is not None:
            self.progress(self.num_timesteps)
        return time.monotonic() < self.end_s

    def _add(self, energy_j: float | None, time_s: float) -> None:
        self.cost["energy_j"] += math.nan if energy_j is None else float(energy_j)
        self.cost["time_s"] += time_s

    def _add_measured(self) -> None:
        if self.meter is not None and self.reading is not None:
            last, self.reading = self.reading, self.meter.read()
            self._add(energy_between(last, self.reading)[0], self.reading.time_s - last.time_s)

    def _on_rollout_start(self) -> None:
        if self.num_timesteps:
            self.save()  # the update on the last rollout is done

    def _on_training_end(self) -> None:
        self.save()

    def save(self) -> None:
        self._add_measured()
        state = {
            "policy": self.model.policy.state_dict(),
            "optimizer": self.model.policy.optimizer.state_dict(),
            "num_timesteps": self.model.num_timesteps,
            "n_updates": self.model._n_updates,
            "cost": self.cost,
            "callbacks": {name: callback.state() for name, callback in self.remembered.items()},
            "random": global_random_state(),
            "env": _env_state(self.training_env),
        }
        save_checkpoint(self.path, state)

    def load(self, model: MaskablePPO) -> None:
        state = load_checkpoint(self.path)
        if state is None:
            return
        with resuming(self.path):
            saved = _SavedTraining.from_json(state)
            check_weights(model.policy, saved.policy)
            check_state(model.policy.optimizer, saved.optimizer)
            model.policy.load_state_dict(saved.policy)
            model.policy.optimizer.load_state_dict(saved.optimizer)
            model.num_timesteps = saved.num_timesteps
            model._n_updates = saved.n_updates
            self.cost = saved.cost
            for name, callback in self.remembered.items():
                if name in (saved.callbacks or {}):
                    callback.restore((saved.callbacks or {})[name])
            if saved.random is not None and saved.env is not None:
                assert model.env is not None
                _restore_env(model.env, saved.env)
                set_global_random_state(saved.random)


@dataclass(frozen=True, kw_only=True)
class _SavedTraining(JsonRecord):
    """The form of a training's checkpoint."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "ignore"}

    policy: dict[str, Any]
    optimizer: dict[str, Any]
    num_timesteps: Annotated[int, COUNT]
    n_updates: Annotated[int, COUNT]
    cost: dict[str, float]
    callbacks: dict[str, dict[str, Any]] | None = None
    random: Any = None
    """State of the global random generators; version 0.2 did not save it, nor the runs under way."""
    env: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if missing := {"decisions", "episodes", "energy_j", "time_s"} - set(self.cost):
            raise ValueError(f"cost must name {', '.join(sorted(missing))}")


def check_weights(policy: torch.nn.Module, weights: Mapping[str, Any]) -> None:
    """Raise `ValueError` for weights from a file that are not those of an agent's policy, or not finite."""
    expected = policy.state_dict()
    if strange := sorted(map(str, weights.keys() - expected.keys())):
        raise ValueError(f"policy must hold the weights of this agent alone, got {shown(strange[0])}")
    for name, own in expected.items():
        other = weights.get(name)
        if not isinstance(other, torch.Tensor) or (other.shape, other.dtype) != (own.shape, own.dtype):
            raise ValueError(f"policy must hold {name} of shape {tuple(own.shape)} in {own.dtype}")
        if not bool(torch.isfinite(other).all()):
            raise ValueError(f"policy holds values that are not finite in {name}")


def _env_state(env: VecEnv) -> dict[str, Any]:
    """Return the runs under way where they can be saved; else only the generators that draw the next ones."""
    if isinstance(env.unwrapped, ResumableEnv):
        return {"runs": _each(env.unwrapped.state(), np.ndarray, torch.from_numpy)}
    return {"generators": [json.dumps(random.bit_generator.state) for random in env.get_attr("np_random")]}


def _restore_env(env: VecEnv, state: Mapping[str, Any]) -> None:
    if isinstance(env.unwrapped, ResumableEnv):
        env.unwrapped.restore(_each(state["runs"], torch.Tensor, torch.Tensor.numpy))
        return
    for index, text in enumerate(state["generators"]):
        random = np.random.default_rng()
        random.bit_generator.state = json.loads(text)
        env.set_attr("np_random", random, index)
    env.unwrapped._reset_seeds()  # the next reset draws from the generators, not from the first seed anew


def _each(nested: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Return nested dictionaries with all values of a kind changed."""
    if isinstance(nested, dict):
        return {name: _each(value, kind, change) for name, value in nested.items()}
    return change(nested) if isinstance(nested, kind) else nested


def bundle_of(
    model: MaskablePPO, provenance: Mapping[str, Any], fields: tuple[ObservationField, ...] = OBSERVATION_FIELDS
) -> PolicyBundle:
    """Return the policy network of an agent with these observation fields as a bundle, without privileged inputs."""
    weights: dict[str, np.ndarray] = {}
    linears = [m for m in model.policy.mlp_extractor.policy_net if isinstance(m, torch.nn.Linear)]
    for index, layer in enumerate(linears):
        weights[f"hidden.{index}.weight"] = layer.weight.detach().numpy()
        weights[f"hidden.{index}.bias"] = layer.bias.detach().numpy()
    weights["action.weight"] = _action_layer(model).weight.detach().numpy()
    weights["action.bias"] = _action_layer(model).bias.detach().numpy()
    first = FIRST_LAYER if linears else "action.weight"
    weights[first] = weights[first][:, : N_STACK * len(fields)]
    return PolicyBundle({name: value.copy() for name, value in weights.items()}, provenance, fields)
