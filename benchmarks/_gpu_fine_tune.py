"""Go on training a policy on a few live runs of a larger model: the default recipe's live stage from a given bundle."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _gpu_bed import STARTS, Bed
from _gpu_runs import TimeIsUpError
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.logging.training_log import TrainingLog
from trainpilot.agents.ppo import PPOConfig, bundle_of, make_ppo, train
from trainpilot.envs.environments import LiveTraining
from trainpilot.envs.reference import live_reference
from trainpilot.envs.reward import ScalarReward
from trainpilot.experiments.recipe import load_recipe
from trainpilot.experiments.train_agent import total_cost
from trainpilot.llm_runtime.config import Precision, RunConfig

POLICY = "policy.safetensors"
RECIPE = "default"


def cases_for(bundle: PolicyBundle, bed: Bed, precision: Precision) -> tuple[RunConfig, ...]:
    """Return the live runs: the policy's own base schedule and decisions, started too low, right and too high."""
    config = replace(bed.tuning_config(precision), decisions=bundle.decisions)
    base = bundle.base_schedule
    if base is not None:
        config = replace(config, schedule=base.schedule, warmup_tokens=base.warmup_tokens(config.tokens))
    return tuple(replace(config, base_learning_rate=config.base_learning_rate * start) for start in STARTS)


def fine_tune(bundle: PolicyBundle, bed: Bed, precision: Precision, folder: Path, end_s: float) -> PolicyBundle:
    """Return the policy after some more live runs, trained now or before; an interrupted training goes on.

    Raises:
        TimeIsUpError: `end_s` of `time.monotonic` has passed before the training was complete.
    """
    if (folder / POLICY).is_file():
        return PolicyBundle.load(folder / POLICY)
    left_s = end_s - time.monotonic()
    if left_s <= 0:
        raise TimeIsUpError
    cases = cases_for(bundle, bed, precision)
    against = replace(cases[0], base_learning_rate=bed.tuning.learning_rate)
    config = ppo_config(bundle, bed, left_s)
    env = one_live_env(cases, against)
    log = TrainingLog({"recipe": RECIPE, **asdict(config)})
    start = weights_from(bundle, make_ppo(env, config))
    model, cost = train(env, config, folder, callbacks=[log], progress=_say(config), start=start)
    if model.num_timesteps < config.total_decisions:
        raise TimeIsUpError
    tuned = PolicyBundle(
        bundle_of(model, {}).weights, _provenance(bundle, bed, cases=cases, config=config, cost=cost, against=against)
    )
    tuned.save(folder / POLICY)
    return tuned


def ppo_config(bundle: PolicyBundle, bed: Bed, time_limit_s: float) -> PPOConfig:
    """Return the live stage's settings in the default recipe, but for the numbers that a small training needs."""
    widths = [
        len(bundle.weights[f"hidden.{i}.bias"]) for i in range(sum(".bias" in name for name in bundle.weights) - 1)
    ]
    return replace(
        load_recipe(RECIPE, ["ppo.total_decisions=1"]).ppo,
        total_decisions=bed.tuning.decisions,
        n_steps=bed.tuning.n_steps,
        batch_size=bed.tuning.n_steps,
        hidden=tuple(widths),
        time_limit_s=time_limit_s if time_limit_s < float("inf") else None,
    )


def one_live_env(cases: tuple[RunConfig, ...], against: RunConfig) -> VecEnv:
    """Return one environment in this process: two runs on one GPU would be told each other's joules."""
    make = partial(LiveTraining, cases, reference_cases=[against] * len(cases))
    return VecMonitor(DummyVecEnv([lambda: ScalarReward(make(), "linear")]))


def weights_from(bundle: PolicyBundle, model: Any) -> Mapping[str, torch.Tensor]:
    """Return an agent's weights with the policy network of a bundle; its value network is a fresh one."""
    weights = dict(model.policy.state_dict())
    for name, value in bundle.weights.items():
        layer, _, kind = name.rpartition(".")
        place = "action_net" if layer == "action" else f"mlp_extractor.policy_net.{2 * int(layer.partition('.')[2])}"
        assert weights[f"{place}.{kind}"].shape == value.shape
        weights[f"{place}.{kind}"] = torch.from_numpy(value.copy())
    return weights


def _say(config: PPOConfig) -> Any:
    def say(decisions: int) -> None:
        if decisions % config.n_steps == 0:
            print(f"fine-tuning: {decisions} of {config.total_decisions} decisions", flush=True)

    return say


def _provenance(
    bundle: PolicyBundle,
    bed: Bed,
    *,
    cases: tuple[RunConfig, ...],
    config: PPOConfig,
    cost: Mapping[str, float],
    against: RunConfig,
) -> dict[str, Any]:
    """Return where the policy comes from; the three reference runs are not in its cost, but told beside it."""
    live = total_cost([cost])
    reference = live_reference(against)  # cached: it was run for the training
    full = reference.energy_j
    before = bundle.provenance.get("training_cost")
    return {
        **bundle.provenance,
        "training_cost": total_cost([before, live]) if before else live,
        "fine_tuned": {
            "model": dict(bed.tuning.model),
            "text": bed.tuning.text,
            "tokens": cases[0].tokens,
            "precision": cases[0].precision,
            "learning_rates": [case.base_learning_rate for case in cases],
            "reference_learning_rate": against.base_learning_rate,
            "ppo": asdict(replace(config, time_limit_s=None)),
            "cost": live,
            "reference_energy_j": None if full is None else full * sum(reference.budgets),
        },
    }
