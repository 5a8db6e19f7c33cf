"""Score reinforcement learners and fixed rules on simulated training runs that no agent was trained on.

python benchmarks/rl_baselines.py [--decisions 120000] [--seeds 5] [--runs 256]
python benchmarks/rl_baselines.py --redraw    (the picture alone, from the result)

Every learner starts from scratch with the settings of `docs/examples/rl_zoo/` and meets runs of the 256 instances that
`trainpilot/SimulatedTraining-Scalar-v0` draws from. What is scored are runs of 512 other instances, the same ones for
everybody, with the most likely action. The score is the sum of an episode's rewards under the utility `linear` and a
preference drawn for each run, as in that environment. The result is written after each seed. The picture shows the
learning curves.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import matplotlib
import numpy as np
import torch
import yaml
from _common import RESULTS, write_result
from _simulated import estimate, rounded, unseen_pool
from gymnasium.spaces import Discrete
from matplotlib.figure import Figure
from sb3_contrib import RecurrentPPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvStepReturn, VecEnvWrapper

from trainpilot.agents.bundle import PolicyBundle, policy_path
from trainpilot.agents.heuristics import HEURISTICS
from trainpilot.agents.sb3_env import ScalarVecEnv
from trainpilot.envs.action import KEEP, split_choices
from trainpilot.envs.decision import draw_weights
from trainpilot.envs.discrete import ONE_AT_A_TIME
from trainpilot.envs.observation import OBSERVATION_FIELDS, ObservationField
from trainpilot.envs.runs import SteeredRuns, reference_batch
from trainpilot.envs.vector import VectorSimulatedTraining
from trainpilot.llm_runtime.config import LEARNING_RATE_SCALE_RANGE, ControlLimits, Controls
from trainpilot.llm_runtime.drive import RunController, evaluation_due
from trainpilot.llm_runtime.process import use_threads
from trainpilot.llm_runtime.schedules import EVALUATE_EVERY
from trainpilot.llm_runtime.simulator.records import Bools, ControlBatch, Floats, Ints
from trainpilot.llm_runtime.simulator.runs import OnePlant, Pool, SimulatedRuns, Start, default_pool
from trainpilot.llm_runtime.telemetry import Telemetry

SETTINGS = Path(__file__).parents[1] / "docs" / "examples" / "rl_zoo"
ENV_ID = "trainpilot/SimulatedTraining-Scalar-v0"
TEST_RUNS_SEED = 7_000
"""Seeds the draw of the scored runs and of their preferences."""
CURVE_POINTS = 8
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "rl_baselines.png"
SOFT = "#62676f"
INKS = {"PPO": "#0a3d7a", "PPO, finish=False": "#2a9d8f", "recurrent PPO": "#c7772b", "DQN": "#8a4fa3"}
LEVELS = {"shipped policy": "-.", "keep": ":"}
"""Rules that are drawn as levels beside the learning curves."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """An algorithm, with the file of its settings."""

    algorithm: type[BaseAlgorithm]
    file: str
    finish: bool = True
    one_control: bool = False


LEARNERS = {
    "PPO": Learner(algorithm=PPO, file="ppo.yml"),
    "PPO, finish=False": Learner(algorithm=PPO, file="ppo.yml", finish=False),
    "recurrent PPO": Learner(algorithm=RecurrentPPO, file="ppo_lstm.yml"),
    "DQN": Learner(algorithm=DQN, file="dqn.yml", one_control=True),
}


class Chooser(Protocol):
    """Chooses the actions of all runs."""

    def __call__(self, observation: np.ndarray, masks: Bools) -> Ints:
        """Return one choice per control, shape (n_runs, number of controls)."""


@dataclass(frozen=True, kw_only=True)
class TestRuns:
    """The runs that everybody is scored on."""

    pool: Pool
    n_runs: int
    weights: Floats
    instance: Ints

    @classmethod
    def draw(cls, n_runs: int) -> TestRuns:
        """Draw runs of instances that nobody was trained on."""
        pool = unseen_pool()
        runs = SimulatedRuns(n_runs, TEST_RUNS_SEED, pool)
        runs.begin(np.arange(n_runs))  # as everybody who steers them does
        weights = draw_weights(np.random.default_rng(TEST_RUNS_SEED), n_runs)
        return cls(pool=pool, n_runs=n_runs, weights=weights, instance=runs.index.copy())


@dataclass(kw_only=True)
class Outcome:
    """Ends of all runs; arrays with one row per run."""

    terms: Floats
    """Quality, energy and time, shape (n_runs, 3)."""
    diverged: Bools
    length: Ints
    """Decisions until the end."""

    @classmethod
    def empty(cls, n_runs: int) -> Outcome:
        """Return room for the ends of some runs."""
        zeros = np.zeros(n_runs, dtype=np.int64)
        return cls(terms=np.zeros((n_runs, 3)), diverged=np.zeros(n_runs, dtype=np.bool_), length=zeros)

    def returns(self, test: TestRuns) -> Floats:
        """Return the sum of the rewards of each run."""
        total: Floats = (self.terms * test.weights).sum(axis=1)
        return total

    def figures(self, test: TestRuns) -> dict[str, Any]:
        """Return the mean return with a bootstrap interval over instances, and means of what it is made of."""
        quality, energy, time_share = self.terms.mean(axis=0)
        return {
            "return": estimate(self.returns(test), test.instance, lambda values: float(values.mean())),
            "quality": rounded(quality),
            "energy": rounded(-energy),
            "time": rounded(-time_share),
            "diverged": rounded(float(self.diverged.mean())),
            "decisions": rounded(float(self.length.mean())),
        }


def play(
    choose: Chooser,
    test: TestRuns,
    *,
    fields: tuple[ObservationField, ...] = OBSERVATION_FIELDS,
    start_scale: float = 1.0,
    finish: bool = True,
) -> Outcome:
    """Return the ends of the scored runs under somebody's actions."""
    plants = SimulatedRuns(test.n_runs, TEST_RUNS_SEED, test.pool)
    runs = SteeredRuns(plants, test.weights, fields, start_scale, finish=finish)
    outcome, running = Outcome.empty(test.n_runs), np.ones(test.n_runs, dtype=np.bool_)
    while running.any():
        interval = runs.advance(choose(runs.states.observation(), runs.states.action_masks()))
        ended = interval.terminated | interval.truncated
        new = ended & running
        outcome.terms[new], outcome.diverged[new] = runs.outcome[new], interval.diverged[new]
        outcome.length[new] = runs.intervals[new]
        running &= ~ended
        rows = np.flatnonzero(ended)
        runs.begin(rows, test.weights[rows])  # all rows are stepped; only a row's first run is scored
    return outcome


def control(
    make: Callable[[ControlLimits], RunController], test: TestRuns, start: Start, evaluate_every: int = EVALUATE_EVERY
) -> Outcome:
    """Return the ends of the scored runs under a rule that sets the controls of a single run."""
    everyone, outcome = np.arange(test.n_runs), Outcome.empty(test.n_runs)
    alone = (SimulatedRuns(1, TEST_RUNS_SEED, test.pool, start, first_row=row) for row in range(test.n_runs))
    rules = [make(OnePlant(plants).limits()) for plants in alone]
    plants = SimulatedRuns(test.n_runs, TEST_RUNS_SEED, test.pool, start)
    plants.begin(everyone)
    controls = [plants.limits().start.row(row) for row in everyone]
    last: list[Telemetry | None] = [None] * test.n_runs
    running = np.ones(test.n_runs, dtype=np.bool_)
    while running.any():
        for row in np.flatnonzero(running):
            decided = rules[row].decide(last[row])
            running[row], controls[row] = decided is not None, decided or controls[row]
        telemetry = plants.advance(ControlBatch.of(controls))
        due = np.flatnonzero(evaluation_due(telemetry, evaluate_every) & running)
        loss = telemetry.train_loss.copy()
        validation_loss = plants.evaluate(due)
        loss[due] = np.where(telemetry.finished[due], validation_loss, loss[due])
        references = reference_batch(plants)
        quality = references.quality(loss, telemetry.diverged)
        costs = {"time_s": telemetry.time_s, "energy_j": telemetry.energy_j}
        reward = references.reward(quality, outcome.terms[:, 0], **costs)
        outcome.terms += np.where(running[:, None], reward, 0.0)
        outcome.length += running
        outcome.diverged |= running & telemetry.diverged
        for row in np.flatnonzero(running):
            last[row] = telemetry.row(int(row), controls[row])
        running &= ~(telemetry.finished | telemetry.diverged)
    return outcome


class StartAsAdvised:
    """Holds the learning rate that a scaling law advises, whose advice is off by up to ten times in these runs."""

    def __init__(self, limits: ControlLimits) -> None:
        over = limits.learning_rate_over_law or 1.0
        scale = float(np.clip(1 / over, *LEARNING_RATE_SCALE_RANGE))
        self.controls = replace(limits.start, learning_rate_scale=scale)

    def decide(self, telemetry: object) -> Controls:
        """Return the same controls always."""
        return self.controls


def fixed_rules(test: TestRuns) -> dict[str, Any]:
    """Return the figures of everybody that does not learn here."""
    random, bundle = np.random.default_rng(0), PolicyBundle.load(policy_path("default"))

    def at_random(observation: np.ndarray, masks: Bools) -> Ints:
        drawn = [(random.random(part.shape) * part).argmax(axis=1) for part in split_choices(masks)]
        return np.stack(drawn, axis=1)

    def keep(observation: np.ndarray, masks: Bools) -> Ints:
        return np.tile(KEEP, (len(masks), 1))

    found = {
        "random": play(at_random, test),
        "random, finish=False": play(at_random, test, finish=False),
        "keep": play(keep, test),
        "law": control(StartAsAdvised, test, Start()),
        "greedy": control(HEURISTICS["greedy"], test, Start()),
        "noise-batch": control(HEURISTICS["noise-batch"], test, Start(schedule="linear")),
        "plateau": control(HEURISTICS["plateau"], test, Start(schedule="constant"), evaluate_every=2),
        "shipped policy": play(bundle.choose, test, fields=bundle.fields, start_scale=bundle.start_scale),
    }
    for name, outcome in found.items():
        print(f"{name:22} return {outcome.returns(test).mean():.3f}", flush=True)
    return {name: outcome.figures(test) for name, outcome in found.items()}


class OneControlVecEnv(VecEnvWrapper):
    """Simulated runs with one change of one control at a time, as `trainpilot.envs.OneControl`."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv, action_space=Discrete(len(ONE_AT_A_TIME)))

    def reset(self) -> Any:
        """Start new runs."""
        return self.venv.reset()

    def step_async(self, actions: np.ndarray) -> None:
        """Store the actions of the next step."""
        self.venv.step_async(ONE_AT_A_TIME[actions])

    def step_wait(self) -> VecEnvStepReturn:
        """Train every run for one interval."""
        return self.venv.step_wait()


class Greedily:
    """The most likely actions of a model, which may have a memory."""

    def __init__(self, model: BaseAlgorithm, learner: Learner) -> None:
        self.model, self.learner = model, learner
        self.state: Any = None
        self.starts: Bools | None = None

    def __call__(self, observation: np.ndarray, masks: Bools) -> Ints:
        """Return one choice per control. Runs that have ended and begun anew are not scored."""
        starts = np.full(len(masks), self.starts is None)
        self.starts = starts
        actions, self.state = self.model.predict(observation, self.state, starts, deterministic=True)
        return ONE_AT_A_TIME[actions] if self.learner.one_control else actions


class Curve(BaseCallback):
    """Scores the agent at equal distances of decisions."""

    def __init__(self, learner: Learner, test: TestRuns, every: int) -> None:
        super().__init__()
        self.learner, self.test, self.every = learner, test, every
        self.points: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        if self.num_timesteps >= len(self.points) * self.every:
            outcome = play(Greedily(self.model, self.learner), self.test, finish=self.learner.finish)
            self.points.append((self.num_timesteps, rounded(float(outcome.returns(self.test).mean()))))
        return True


def settings(file: str) -> dict[str, Any]:
    """Return an algorithm's settings in the form of rl-baselines3-zoo."""
    content: Mapping[str, dict[str, Any]] = yaml.safe_load((SETTINGS / file).read_text(encoding="utf-8"))
    return dict(content[ENV_ID])


def learn(learner: Learner, seed: int, decisions: int, test: TestRuns) -> dict[str, Any]:
    """Train an agent from scratch, and return its figures, its learning curve and what it cost."""
    chosen = settings(learner.file)
    n_envs, policy = chosen.pop("n_envs"), chosen.pop("policy")
    for name in ("n_timesteps", "env_wrapper"):
        chosen.pop(name, None)
    runs = SimulatedRuns(n_envs, seed, default_pool())
    env: VecEnv = ScalarVecEnv(VectorSimulatedTraining(runs, finish=learner.finish))
    env.seed(seed)
    if learner.one_control:
        env = OneControlVecEnv(env)
    model = learner.algorithm(policy, env, seed=seed, device="cpu", **chosen)
    curve = Curve(learner, test, decisions // CURVE_POINTS)
    start_s = time.process_time()
    model.learn(decisions, callback=curve)
    cpu_s = time.process_time() - start_s
    outcome = play(Greedily(model, learner), test, finish=learner.finish)
    return {
        "seed": seed,
        "cpu_s": round(cpu_s, 1),
        "decisions": model.num_timesteps,
        **outcome.figures(test),
        "curve": [*curve.points, (model.num_timesteps, rounded(float(outcome.returns(test).mean())))],
    }


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean, the lowest and the highest return over the seeds of a learner."""
    returns = [run["return"]["value"] for run in runs]
    means = {name: rounded(float(np.mean([run[name] for run in runs]))) for name in ("quality", "energy", "time")}
    return {
        "return": {"value": rounded(float(np.mean(returns))), "low": min(returns), "high": max(returns)},
        **means,
        "diverged": rounded(float(np.mean([run["diverged"] for run in runs]))),
        "runs": runs,
    }


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture of the learning curves: each seed a thin line, their mean a thick one."""
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    panel = figure.subplots()
    for name, found in result["learners"].items():
        curves = np.array([run["curve"] for run in found["runs"]])
        thousands = curves[0, :, 0] / 1_000
        panel.plot(thousands, curves[:, :, 1].T, color=INKS[name], linewidth=0.7, alpha=0.4)
        panel.plot(
            thousands, curves[:, :, 1].mean(axis=0), "o-", color=INKS[name], linewidth=2, markersize=4, label=name
        )
    for name, style in LEVELS.items():
        panel.axhline(result["rules"][name]["return"]["value"], color=SOFT, linestyle=style, linewidth=1.2, label=name)
    panel.set_xlabel("decisions learned from, thousands", fontsize=9.5)
    panel.set_ylabel("mean return on the scored runs", fontsize=9.5)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "trainpilot"}):
        figure.savefig(path, dpi=160, metadata={"Software": None})


def main() -> None:
    """Score everybody, and write `results/rl_baselines.json` and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=int, default=120_000, help="that every agent learns from")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=256, help="that everybody is scored on")
    parser.add_argument("--redraw", action="store_true", help="draw the picture alone, from the result that is there")
    options = parser.parse_args()
    if options.redraw:
        draw(json.loads((RESULTS / "rl_baselines.json").read_text(encoding="utf-8")), IMAGE)
        return
    use_threads(1)
    start_s, test = time.process_time(), TestRuns.draw(options.runs)
    rules = fixed_rules(test)
    learned: dict[str, list[dict[str, Any]]] = {name: [] for name in LEARNERS}

    def write(seeds: int) -> None:
        summary = {
            "n_runs": options.runs,
            "decisions_of_each_agent": options.decisions,
            "seeds": seeds,
            "cpu_s": round(time.process_time() - start_s),
            "rules": rules,
            "learners": {name: over_seeds(found) for name, found in learned.items() if found},
        }
        print(write_result("rl_baselines", summary, torch.device("cpu")), flush=True)
        draw(summary, IMAGE)

    write(0)
    for seed in range(options.seeds):
        for name, learner in LEARNERS.items():
            learned[name].append(learn(learner, seed, options.decisions, test))
            result = learned[name][-1]
            print(f"{name:22} seed {seed}: {result['return']['value']:.3f} in {result['cpu_s']:.0f} s", flush=True)
        write(seed + 1)


if __name__ == "__main__":
    main()
