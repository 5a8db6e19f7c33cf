"""Train a policy on live runs, resumably, and write it as a bundle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from typing import Any

from rich.console import Console

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.controller import Controller
from trainpilot.agents.ppo import bundle_of, side_by_side, train
from trainpilot.agents.run_record import DecisionRecord
from trainpilot.agents.training_log import TrainingLog
from trainpilot.envs.live_plant import live_plant, live_reference
from trainpilot.envs.live_training import LiveTraining
from trainpilot.envs.preference import Preference
from trainpilot.envs.reference import Reference
from trainpilot.envs.reward import RewardMeter, current_loss
from trainpilot.envs.scalarise import ScalarReward
from trainpilot.experiments.options import TrainAgentOptions
from trainpilot.experiments.progress import progress_bar
from trainpilot.experiments.recipe import Recipe, load_recipe
from trainpilot.experiments.run_folder import claim_folder
from trainpilot.experiments.versions import versions
from trainpilot.llm_runtime.run_config import RunConfig
from trainpilot.llm_runtime.threads import use_threads


def train_agent(options: TrainAgentOptions, console: Console) -> PolicyBundle:
    """Train, or go on training, and return the bundle.

    Raises:
        ValueError: the recipe is wrong, or the folder belongs to another one.
    """
    recipe = load_recipe(options.recipe, options.set)
    claim_folder(options.out, "recipe.json", asdict(recipe))
    path = options.out / "policy.safetensors"
    if path.is_file():
        console.print(f"[dim]{path} is already trained[/dim]", soft_wrap=True)
        return PolicyBundle.load(path)
    cases = recipe.cases()
    use_threads(recipe.threads)
    references = run_references(cases, recipe, console)
    log = TrainingLog({"recipe": options.recipe, **asdict(recipe.ppo)})
    env = side_by_side(partial(_make_env, cases, recipe), recipe.n_envs)
    try:
        with progress_bar(console, "PPO on live runs, decisions", recipe.ppo.total_decisions) as advance:
            model, cost = train(env, recipe.ppo, options.out, callbacks=[log], progress=advance)
    finally:
        env.close()
    bundle = bundle_of(model, _provenance(options.recipe, recipe, cases, cost))
    records = greedy_run(bundle, cases[0], references[0])
    log.log_greedy_run(records, references[0])
    bundle.save(path)
    _say(console, options, cost)
    return bundle


def run_references(cases: Sequence[RunConfig], recipe: Recipe, console: Console) -> list[Reference]:
    """Return every case's reference, from the cache or run now, as many side by side as training will."""
    context = get_context("spawn")
    with (
        progress_bar(console, "reference runs of the base schedule", len(cases)) as advance,
        ProcessPoolExecutor(recipe.n_envs, mp_context=context) as pool,
    ):
        references = []
        for reference in pool.map(partial(_reference, threads=recipe.threads), cases):
            references.append(reference)
            advance(len(references))
    return references


def _reference(case: RunConfig, threads: int) -> Reference:
    use_threads(threads)
    return live_reference(case)


def _make_env(cases: Sequence[RunConfig], recipe: Recipe) -> ScalarReward:
    return ScalarReward(LiveTraining(cases, threads=recipe.threads), recipe.utility)


def greedy_run(bundle: PolicyBundle, case: RunConfig, reference: Reference) -> list[DecisionRecord]:
    """Return the decisions of the bundle's most likely actions over one run of a case."""
    run = live_plant()(case)
    controller = Controller.of_bundle(bundle, run.limits(), Preference())
    meter = RewardMeter(reference)
    records: list[DecisionRecord] = []
    telemetry = None
    while telemetry is None or not (telemetry.finished or telemetry.diverged):
        telemetry = run.advance(controller.decide(telemetry), 1 / case.decisions)
        records.append(controller.record(telemetry, meter.weigh(telemetry, current_loss(run, telemetry))))
    return records


def _provenance(name: str, recipe: Recipe, cases: Sequence[RunConfig], cost: dict[str, float]) -> dict[str, Any]:
    return {
        "recipe": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "decisions": cases[0].decisions,
        "training_cases": [asdict(case) for case in cases],
        "preference_range": {"quality": [0.5, 1.0], "energy": [0.0, 0.5], "time": [0.0, 0.5]},
        "utility": recipe.utility,
        "ppo": asdict(recipe.ppo),
        "training_cost": {key: value if math.isfinite(value) else None for key, value in cost.items()},
        "versions": versions(),
    }


def _say(console: Console, options: TrainAgentOptions, cost: dict[str, float]) -> None:
    energy = f"{cost['energy_j']:,.0f} J" if math.isfinite(cost["energy_j"]) else "energy unknown"
    console.print(
        f"policy: {options.out / 'policy.safetensors'}  ({cost['decisions']:,.0f} decisions, {cost['episodes']:,.0f} "
        f"runs, {energy})\nwatch:  tensorboard --logdir {options.out / 'tb'}",
        soft_wrap=True,
    )
