"""Train a policy in the simulator, then on live runs, resumably, and write it as a bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.controller import Controller, DecisionRecord
from trainpilot.agents.logging.training_log import TrainingLog
from trainpilot.agents.ppo import bundle_of, side_by_side, train
from trainpilot.agents.sb3_env import hidden_from, seen_inputs, without_inputs
from trainpilot.agents.simulator_training import SimulatorAgent, SimulatorStage, best_weights
from trainpilot.envs.decision import Preference
from trainpilot.envs.environments import LiveTraining
from trainpilot.envs.reference import live_plant, live_reference
from trainpilot.envs.reward import Reference, RewardMeter, ScalarReward, current_loss
from trainpilot.experiments.options import TrainAgentOptions
from trainpilot.experiments.progress import progress_bar
from trainpilot.experiments.recipe import Recipe, load_recipe
from trainpilot.experiments.run_folder import claim_folder
from trainpilot.experiments.simulator_agents import total_cost, train_agents
from trainpilot.experiments.versions import versions
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.process import use_threads

POLICY = "policy.safetensors"


def train_agent(options: TrainAgentOptions, console: Console) -> PolicyBundle:
    """Train, or go on training, and return the bundle.

    Raises:
        ValueError: the recipe is wrong, or the folder belongs to another one.
    """
    recipe = load_recipe(options.recipe, options.set)
    claim_folder(options.out, "recipe.json", asdict(recipe))
    path = options.out / POLICY
    if path.is_file():
        console.print(f"[dim]{path} is already trained[/dim]", soft_wrap=True)
        return PolicyBundle.load(path)
    use_threads(recipe.threads)
    simulated = None
    if recipe.simulator is not None:
        simulated = simulator_stage(recipe.simulator, options, console)
    if recipe.ppo.total_decisions == 0 and simulated is not None:
        bundle = simulated
    else:
        bundle = live_stage(recipe, options, simulated, console)
    bundle.save(path)
    _say(console, options, bundle.provenance["training_cost"])
    return bundle


# The simulator stage ----------------------------------------------------------------------------------------------


def simulator_stage(stage: SimulatorStage, options: TrainAgentOptions, console: Console) -> PolicyBundle:
    """Return the best agent of the simulator stage, trained now or before, and write it into its folder."""
    folder = options.out / "simulator"
    if (folder / POLICY).is_file():
        return PolicyBundle.load(folder / POLICY)
    agents = train_agents(stage, folder, console)
    for agent in agents:
        console.print(_scores_line(agent), highlight=False, soft_wrap=True)
    kept = next((agent for agent in agents if agent.seed == stage.keep), agents[0])
    bundle = PolicyBundle(kept.bundle.weights, _simulator_provenance(options.recipe, stage, agents, kept))
    bundle.save(folder / POLICY)
    return PolicyBundle.load(folder / POLICY)


def _scores_line(agent: SimulatorAgent) -> str:
    median, low = agent.scores["multiplier"], agent.scores["multiplier_p10"]
    return f"agent {agent.seed}: compute multiplier {median:.2f} (10th percentile {low:.2f}) on simulated runs not met"


def _simulator_provenance(
    name: str, stage: SimulatorStage, agents: Sequence[SimulatorAgent], kept: SimulatorAgent
) -> dict[str, Any]:
    cost = total_cost(agent.cost for agent in agents)
    spread = {"lowest_score": agents[-1].score, "highest_score": agents[0].score}
    each = [{"seed": agent.seed, "best_after": agent.decisions, **agent.scores} for agent in agents]
    return {
        **_common_provenance(name, stage.least_quality, stage.utility),
        "decisions": stage.decisions,
        "base_schedule": asdict(stage.base_schedule),
        "training_cases": [],
        "simulator": asdict(stage),
        "simulator_seed": kept.seed,
        "scores": {"simulator": {**_plain_scores(kept.scores), **spread}},
        "simulator_agents": each,
        "training_cost": {**cost, "simulator": cost},
    }


def _plain_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in scores.items() if not isinstance(value, list | tuple)}


# The live stage ---------------------------------------------------------------------------------------------------


def live_stage(
    recipe: Recipe, options: TrainAgentOptions, simulated: PolicyBundle | None, console: Console
) -> PolicyBundle:
    """Train on live runs, from the simulator's best weights where there are any, and return the bundle."""
    cases, against = recipe.live_cases(), recipe.reference_cases()
    references = run_references(against, recipe, console)
    log = TrainingLog({"recipe": options.recipe, **asdict(recipe.ppo)})
    seen = seen_inputs() if recipe.simulator is None else seen_inputs(recipe.simulator.hide, recipe.simulator.stack)
    start = _start(options.out, simulated)
    env = hidden_from(side_by_side(partial(_make_env, cases, against, recipe), recipe.n_envs), seen)
    try:
        with progress_bar(console, "PPO on live runs, decisions", recipe.ppo.total_decisions) as advance:
            model, cost = train(env, recipe.ppo, options.out, callbacks=[log], progress=advance, start=start)
    finally:
        env.close()
    bundle = without_inputs(bundle_of(model, _provenance(options.recipe, recipe, cases, cost, simulated)), seen)
    records = greedy_run(bundle, cases[0], references[0])
    log.log_greedy_run(records, references[0])
    return bundle


def _start(out: Path, simulated: PolicyBundle | None) -> dict[str, Any] | None:
    if simulated is None or (out / "checkpoint.pt").is_file():
        return None
    return best_weights(out / "simulator" / str(simulated.provenance["simulator_seed"]))


def run_references(cases: Sequence[RunConfig], recipe: Recipe, console: Console) -> list[Reference]:
    """Return every case's reference, from the cache or run now, as many side by side as training will."""
    context = get_context("spawn")
    different = list(dict.fromkeys(cases))
    found: dict[RunConfig, Reference] = {}
    with (
        progress_bar(console, "reference runs of the base schedule", len(different)) as advance,
        ProcessPoolExecutor(recipe.n_envs, mp_context=context) as pool,
    ):
        for case, reference in zip(
            different, pool.map(partial(_reference, threads=recipe.threads), different), strict=True
        ):
            found[case] = reference
            advance(len(found))
    return [found[case] for case in cases]


def _reference(case: RunConfig, threads: int) -> Reference:
    use_threads(threads)
    return live_reference(case)


def _make_env(cases: Sequence[RunConfig], against: Sequence[RunConfig], recipe: Recipe) -> ScalarReward:
    return ScalarReward(LiveTraining(cases, threads=recipe.threads, reference_cases=against), recipe.utility)


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


# Provenance -------------------------------------------------------------------------------------------------------


def _common_provenance(name: str, least_quality: float, utility: str) -> dict[str, Any]:
    rest = 1.0 - least_quality
    return {
        "recipe": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "preference_range": {"quality": [least_quality, 1.0], "energy": [0.0, rest], "time": [0.0, rest]},
        "utility": utility,
        "versions": versions(),
    }


def _provenance(
    name: str,
    recipe: Recipe,
    cases: Sequence[RunConfig],
    cost: Mapping[str, float | None],
    simulated: PolicyBundle | None,
) -> dict[str, Any]:
    live = total_cost([cost])
    before = dict(simulated.provenance) if simulated is not None else {}
    costs: dict[str, Any] = live
    if earlier := before.get("training_cost"):
        costs = {**total_cost([earlier, live]), "simulator": earlier["simulator"], "live": live}
    return {
        **before,
        **_common_provenance(name, 0.5, recipe.utility),
        "decisions": cases[0].decisions,
        "training_cases": [asdict(case) for case in cases],
        "reference_learning_rate": recipe.reference_learning_rate,
        "ppo": asdict(recipe.ppo),
        "training_cost": costs,
    }


def _say(console: Console, options: TrainAgentOptions, cost: Mapping[str, float | None]) -> None:
    joules = cost["energy_j"]
    energy = f"{joules:,.0f} J" if joules is not None and math.isfinite(joules) else "energy unknown"
    console.print(
        f"policy: {options.out / POLICY}  ({cost['decisions']:,.0f} decisions, {cost['episodes']:,.0f} "
        f"runs, {energy})\nwatch:  tensorboard --logdir {options.out}",
        soft_wrap=True,
    )
