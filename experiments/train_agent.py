"""Train a policy by a recipe, resumably: agents in the simulator, the best of them on live runs; write its bundle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.controller import Controller, DecisionRecord
from trainpilot.agents.logging.training_log import TrainingLog
from trainpilot.agents.ppo import bundle_of, end_processes, side_by_side, train
from trainpilot.agents.remote_env import HostedEnv, MakeEnv, elsewhere
from trainpilot.agents.sb3_env import hidden_from, seen_inputs, without_inputs
from trainpilot.agents.simulator_training import SimulatorAgent, SimulatorStage, best_weights, train_in_simulator
from trainpilot.envs.decision import N_STACK, Preference
from trainpilot.envs.environments import LiveTraining
from trainpilot.envs.observation import BASIC, GROUPS, fields_of
from trainpilot.envs.reference import live_plant, live_reference
from trainpilot.envs.reward import Reference, RewardMeter, ScalarReward
from trainpilot.experiments.calibrate.calibration import SHIPPED, load_calibrations
from trainpilot.experiments.elsewhere import ATTEMPTS, check_same
from trainpilot.experiments.engines import check_engine_of_envs, engine_of_envs
from trainpilot.experiments.options import TrainAgentOptions
from trainpilot.experiments.progress import progress_bar
from trainpilot.experiments.recipe import Recipe, load_recipe
from trainpilot.experiments.run_store import claim_folder, versions
from trainpilot.experiments.workers import TaskExecutor, Workers, report
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.data.text_sources import content_digest
from trainpilot.llm_runtime.drive import drive
from trainpilot.llm_runtime.files import load_checkpoint, resuming
from trainpilot.llm_runtime.models import load_model_of
from trainpilot.llm_runtime.process import available_cores, use_threads
from trainpilot.llm_runtime.simulator.fitting import FittedPhysics
from trainpilot.llm_runtime.simulator.shipped import shipped_physics

if TYPE_CHECKING:
    from trainpilot.experiments.workers_ray import RayEngine


def train_agents(stage: SimulatorStage, folder: Path, console: Console) -> list[SimulatorAgent]:
    """Train every agent of the stage in its own folder, or resume their training; return them, the best first.

    Raises:
        ValueError: a calibration is not there, or the process of an agent was killed.
    """
    calibrations = physics_of(stage.calibrations)
    jobs = min(stage.seeds, available_cores())
    total = stage.seeds * stage.ppo.total_decisions
    with progress_bar(console, "PPO on simulated runs, decisions", total) as advance:
        train = _in_processes if jobs > 1 else _in_turn
        agents = train(stage, calibrations, folder, jobs, advance)
    return sorted(agents, key=lambda agent: -agent.score)


def physics_of(sources: str | Sequence[str]) -> tuple[FittedPhysics, ...]:
    """Return the physics of calibrations: the shipped ones, or those in files or folders of `trainpilot calibrate`.

    Raises:
        ValueError: one of the sources holds no calibration.
    """
    found: list[FittedPhysics] = []
    for source in [sources] if isinstance(sources, str) else sources:
        if source == SHIPPED:
            found += shipped_physics()
        else:
            found += [each.physics for each in load_calibrations(source) if isinstance(each.physics, FittedPhysics)]
    return tuple(found)


def total_cost(costs: Iterable[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the sum of training costs; `None` where a part is unknown. Seconds of parallel trainings are added too."""
    total = {"decisions": 0.0, "episodes": 0.0, "energy_j": 0.0, "time_s": 0.0}
    for cost in costs:
        for name in total:
            part = cost[name]
            total[name] += math.nan if part is None else part
    return {name: value if math.isfinite(value) else None for name, value in total.items()}


Advance = Callable[[int], None]


def _in_turn(
    stage: SimulatorStage, calibrations: Sequence[FittedPhysics], folder: Path, jobs: int, advance: Advance
) -> list[SimulatorAgent]:
    agents: list[SimulatorAgent] = []
    for seed in stage.agents:
        before = len(agents) * stage.ppo.total_decisions

        def progress(done: int, before: int = before) -> None:
            advance(before + min(done, stage.ppo.total_decisions))

        agents.append(train_in_simulator(stage, seed, calibrations, folder / str(seed), progress=progress))
    return agents


def _in_processes(
    stage: SimulatorStage, calibrations: Sequence[FittedPhysics], folder: Path, jobs: int, advance: Advance
) -> list[SimulatorAgent]:
    def killed(*_: object) -> SimulatorAgent:
        raise ValueError(
            "simulator: the process of an agent was killed, perhaps for lack of memory; the same command goes on where "
            f"it was, got n_runs {stage.n_runs}; fewer need less"
        )

    total = stage.seeds * stage.ppo.total_decisions
    train = partial(train_in_simulator, progress=report, side_by_side=jobs)
    tasks = [(stage, seed, calibrations, folder / str(seed)) for seed in stage.agents]
    with Workers(train, jobs, on_death=killed) as workers:
        ended = workers.run(tasks, progress=lambda done: advance(min(int(done), total)))
        agents = {arguments[1]: agent for arguments, agent in ended}
    return [agents[seed] for seed in stage.agents]


POLICY = "policy.safetensors"


def train_agent(options: TrainAgentOptions, console: Console) -> PolicyBundle:
    """Train a policy, or resume its training, and return the bundle.

    Raises:
        ValueError: the recipe is invalid, or the folder belongs to another one.
    """
    recipe = load_recipe(options.recipe, options.set)
    if options.on != "local" and recipe.ppo.total_decisions == 0:
        raise ValueError(
            f"on: recipe {options.recipe} has no live runs to be executed on {options.on}; leave it out, or set "
            "ppo.total_decisions"
        )
    check_engine_of_envs(options)
    path = options.out / POLICY
    if not path.is_file():
        check_sources(recipe)
    claim_folder(options.out, "recipe.json", asdict(recipe))
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


def check_sources(recipe: Recipe) -> None:
    """Check that the calibrations, texts and models of a recipe can be read, before anything is written or started.

    Raises:
        ValueError: one of them cannot be used.
    """
    if recipe.simulator is not None:
        physics_of(recipe.simulator.calibrations)
    for case in {(case.model, case.text, case.vocabulary): case for case in recipe.live_cases()}.values():
        content_digest(case)
        load_model_of(case)


# The simulator stage ----------------------------------------------------------------------------------------------


def simulator_stage(stage: SimulatorStage, options: TrainAgentOptions, console: Console) -> PolicyBundle:
    """Return the best agent of the simulator stage as a bundle, trained now or read from its folder."""
    folder = options.out / "simulator"
    if (folder / POLICY).is_file():
        return PolicyBundle.load(folder / POLICY)
    agents = train_agents(stage, folder, console)
    for agent in agents:
        console.print(_scores_line(agent), highlight=False, soft_wrap=True)
    kept = kept_of(agents, stage.keep)
    console.print(_kept_line(agents, kept), highlight=False, soft_wrap=True)
    bundle = replace(kept.bundle, provenance=_simulator_provenance(options.recipe, stage, agents, kept))
    bundle.save(folder / POLICY)
    return PolicyBundle.load(folder / POLICY)


def kept_of(agents: Sequence[SimulatorAgent], keep: int | None) -> SimulatorAgent:
    """Return the agent that the recipe keeps, by default the best; `agents` are in the order of their scores."""
    return next((agent for agent in agents if agent.seed == keep), agents[0])


def _kept_line(agents: Sequence[SimulatorAgent], kept: SimulatorAgent) -> str:
    best = agents[0]
    if kept is best or kept.score == best.score:
        return f"kept: agent {kept.seed}"
    return (
        f"kept: agent {kept.seed}, as simulator.keep says, though agent {best.seed} scored {best.score:.3g} against "
        f"{kept.score:.3g}"
    )


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
        "start_scale": stage.start_scale,
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
    """Train on live runs, starting from the simulator's best weights if there are any, and return the bundle."""
    with _engine(options, recipe) as engine:
        return _live_stage(recipe, options, simulated, console, engine)


@contextmanager
def _engine(options: TrainAgentOptions, recipe: Recipe) -> Iterator[RayEngine | None]:
    """Yield where the live runs are executed, if not on this machine. A machine that dies ends the command."""
    devices = [case.device for case in recipe.live_cases()]
    engine = engine_of_envs(options, devices, recipe.n_envs, recipe.threads)
    try:
        yield engine
    except BrokenExecutor as error:
        raise ValueError(
            "on: a machine of the Ray cluster, or a process on it, has died; the same command goes on from the last "
            "update"
        ) from error
    finally:
        if engine is not None:
            engine.close()


def _live_stage(
    recipe: Recipe,
    options: TrainAgentOptions,
    simulated: PolicyBundle | None,
    console: Console,
    engine: RayEngine | None,
) -> PolicyBundle:
    cases, against = recipe.live_cases(), recipe.reference_cases()
    references = run_references(against, recipe, console, engine)
    log = TrainingLog({"recipe": options.recipe, **asdict(recipe.ppo)})
    groups = _groups(recipe, options.out)
    fields = fields_of(groups)
    seen = seen_inputs(fields=fields) if recipe.simulator is None else recipe.simulator.seen()
    start = _start(options.out, simulated, seen.size)
    make_env = partial(_make_env, cases, against, recipe, groups)
    if engine is None:
        envs = side_by_side(make_env, recipe.n_envs)
    else:
        hosted = partial(_hosted, make_env, {case: content_digest(case) for case in (*cases, *against)})
        envs = elsewhere([engine.begin(hosted) for _ in range(recipe.n_envs)])
    env = hidden_from(envs, seen)
    try:
        with progress_bar(console, "PPO on live runs, decisions", recipe.ppo.total_decisions) as advance:
            model, cost = train(env, recipe.ppo, options.out, callbacks=[log], progress=advance, start=start)
    except BaseException:
        end_processes(env)
        raise
    env.close()
    provenance = _provenance(options.recipe, recipe, cases, cost, simulated)
    bundle = without_inputs(bundle_of(model, provenance, fields), seen)
    records = greedy_run(bundle, cases[0], references[0])
    log.log_greedy_run(records, references[0])
    return bundle


def _start(out: Path, simulated: PolicyBundle | None, n_inputs: int) -> dict[str, Any] | None:
    if simulated is None or (out / "checkpoint.pt").is_file():
        return None
    return best_weights(out / "simulator" / str(simulated.provenance["simulator_seed"]), n_inputs)


def _hosted(make_env: MakeEnv, contents: Mapping[RunConfig, str]) -> HostedEnv:
    """Return an environment on another machine. Raises `ValueError` where that has other texts or models than home."""
    for case, content in contents.items():
        check_same(partial(content_digest, case), content, f"the text {' '.join(case.text)} and the model {case.model}")
    return HostedEnv(make_env)


def run_references(
    cases: Sequence[RunConfig], recipe: Recipe, console: Console, executor: TaskExecutor | None = None
) -> list[Reference]:
    """Return every case's reference, from the cache or run now in `recipe.n_envs` processes, or by an executor."""
    different = list(dict.fromkeys(cases))
    found: dict[RunConfig, Reference] = {}
    with (
        progress_bar(console, "reference runs of the base schedule", len(different)) as advance,
        Workers(
            live_reference,
            recipe.n_envs,
            recipe.threads,
            attempts=1 if executor is None else ATTEMPTS,
            executor=executor,
        ) as workers,
    ):
        for (case,), reference in workers.run((case,) for case in different):
            found[case] = reference
            advance(len(found))
    return [found[case] for case in cases]


def _groups(recipe: Recipe, out: Path) -> Sequence[str]:
    """Return the groups of observation fields of the live stage, which goes on with those that it began with."""
    if recipe.simulator is not None:
        return recipe.simulator.observe
    checkpoint, inputs = load_checkpoint(out / "checkpoint.pt"), None
    if checkpoint is not None:
        with resuming(out / "checkpoint.pt"):
            policy = checkpoint["policy"]
            inputs = policy.get("mlp_extractor.policy_net.0.weight", policy["action_net.weight"]).shape[1]
    return BASIC if inputs == N_STACK * len(fields_of(BASIC)) else GROUPS  # version 0.2 had the basic fields alone


def _make_env(
    cases: Sequence[RunConfig], against: Sequence[RunConfig], recipe: Recipe, groups: Sequence[str]
) -> ScalarReward:
    start_scale = 1.0 if recipe.simulator is None else recipe.simulator.start_scale
    env = LiveTraining(
        cases,
        threads=recipe.threads,
        reference_cases=against,
        fields=fields_of(groups),
        start_scale=start_scale,
    )
    return ScalarReward(env, recipe.utility)


def greedy_run(bundle: PolicyBundle, case: RunConfig, reference: Reference) -> list[DecisionRecord]:
    """Return the records of one run of a case under the bundle's most likely actions."""
    run = live_plant()(case)
    controller = Controller.of_bundle(bundle, run.limits(), Preference())
    meter = RewardMeter(reference)
    return [
        controller.record(interval.telemetry, meter.weigh(interval.telemetry, interval.loss))
        for interval in drive(run, controller.decide, case.decisions)
    ]


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
