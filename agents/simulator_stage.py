"""Train an agent on thousands of simulated runs, and keep the weights that are best on runs it has not met."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainpilot.agents.bundle import BaseSchedule, PolicyBundle
from trainpilot.agents.hidden_inputs import hidden_from, seen_inputs, without_inputs
from trainpilot.agents.ppo import PPOConfig, train
from trainpilot.agents.sb3_vector import ScalarVecEnv
from trainpilot.agents.simulator_scores import SimulatorScores, evaluate_in_simulator
from trainpilot.agents.simulator_validation import Validation
from trainpilot.agents.training_log import TrainingLog
from trainpilot.envs.decision import N_STACK
from trainpilot.envs.environments import VectorSimulatedTraining
from trainpilot.envs.reward import UTILITIES
from trainpilot.llm_runtime.energy.meter import select_meter
from trainpilot.llm_runtime.files import load_checkpoint
from trainpilot.llm_runtime.simulator.fitting import FittedPhysics
from trainpilot.llm_runtime.simulator.instances import Widening
from trainpilot.llm_runtime.simulator.runs import Pool, SimulatedRuns, Start


@dataclass(frozen=True, kw_only=True)
class SimulatorPPOConfig(PPOConfig):
    """PPO's settings with values for thousands of simulated runs."""

    total_decisions: int = 8_000_000
    n_steps: int = 50
    batch_size: int = 4096
    n_epochs: int = 4
    learning_rate: float = 1e-3
    learning_rate_end: float = 0.05
    gae_lambda: float = 0.98


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """Simulated runs that a policy is judged on while it learns."""

    instances: int = 512
    """How many, each drawn from as many instances."""
    seed: int = 999
    """Draws the instances and the runs; no agent's own."""
    every: int = 10
    """Rollouts from one validation to the next."""

    def __post_init__(self) -> None:
        for name in ("instances", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"validation.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class SimulatorStage:
    """How agents are trained in the simulator."""

    n_runs: int = 1024
    """Runs side by side."""
    instances: int = 2048
    """Instances that runs are drawn from."""
    seeds: int = 2
    """How many agents are trained. They count up from `ppo.seed`."""
    keep: int | None = None
    """Seed of the agent that is kept; by default the best on the validation runs."""
    calibrations: str | tuple[str, ...] = "shipped"
    """What instances are drawn around: `shipped`, or files that `trainpilot calibrate` wrote."""
    widening: Widening = field(default_factory=Widening)
    """How far around."""
    start_rates: tuple[float, float] = (1 / 30, 10.0)
    """Starting learning rates over the tuned one, drawn evenly in the logarithm."""
    base_schedule: BaseSchedule = field(default_factory=lambda: BaseSchedule(schedule="wsd", warmup_share=0.1))
    """What the policy multiplies. It brings it along: live runs are trained on it too."""
    decisions: int = 50
    """Per run."""
    least_quality: float = 0.5
    """Least weight of quality in a preference that is drawn."""
    utility: str = "linear"
    """How the three objectives become one number; all but `linear` are several times slower."""
    hide: tuple[str, ...] = ()
    """Observation fields that the agent must do without."""
    stack: int = N_STACK
    """How many of the newest observations it sees."""
    ppo: SimulatorPPOConfig = field(default_factory=SimulatorPPOConfig)
    """How PPO learns."""
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    """What the agents are judged on."""

    def __post_init__(self) -> None:
        for name in ("n_runs", "instances", "seeds", "decisions"):
            if getattr(self, name) < 1:
                raise ValueError(f"simulator.{name} must be at least 1, got {getattr(self, name)}")
        if self.ppo.total_decisions < 1:
            raise ValueError(f"simulator.ppo.total_decisions must be at least 1, got {self.ppo.total_decisions}")
        if not 0 < self.start_rates[0] <= self.start_rates[1]:
            raise ValueError(f"simulator.start_rates must be two rising positive numbers, got {self.start_rates}")
        if not 0 < self.widening.budget[0] <= self.widening.budget[1] or self.widening.spread < 0:
            raise ValueError(f"simulator.widening must have a rising budget and a spread >= 0, got {self.widening}")
        if not 0 <= self.least_quality <= 1:
            raise ValueError(f"simulator.least_quality must be in [0, 1], got {self.least_quality}")
        if self.validation.seed in self.agents:
            raise ValueError(f"validation.seed must be none of the agents' own seeds, got {self.validation.seed}")
        if self.keep is not None and self.keep not in self.agents:
            raise ValueError(f"simulator.keep must be the seed of an agent, {list(self.agents)}, got {self.keep}")
        if self.utility not in UTILITIES:
            raise ValueError(f"simulator.utility must be one of {', '.join(UTILITIES)}, got {self.utility!r}")
        seen_inputs(self.hide, self.stack)

    @property
    def agents(self) -> range:
        """The seed of each agent."""
        return range(self.ppo.seed, self.ppo.seed + self.seeds)

    @property
    def start(self) -> Start:
        """How simulated runs begin."""
        base = self.base_schedule
        return Start(
            decisions=self.decisions, schedule=base.schedule, warmup_share=base.warmup_share, rates=self.start_rates
        )

    def pool(self, n_instances: int, seed: int, calibrations: Sequence[FittedPhysics]) -> Pool:
        """Draw instances, and tune a static setting on each."""
        base = self.base_schedule
        schedule, share = base.schedule, base.warmup_share
        return Pool.draw(n_instances, seed, calibrations, self.widening, schedule=schedule, warmup_share=share)


@dataclass(frozen=True, kw_only=True)
class SimulatorAgent:
    """An agent trained in the simulator, at its best."""

    seed: int
    decisions: int
    """After how many it was at its best."""
    bundle: PolicyBundle
    scores: Mapping[str, Any]
    """`SimulatorScores` on the validation runs, as plain values."""
    score: float
    cost: Mapping[str, float]
    """Decisions, episodes, and joules (NaN where unknown) and seconds of this machine."""


def train_in_simulator(
    stage: SimulatorStage,
    seed: int,
    calibrations: Sequence[FittedPhysics],
    folder: Path,
    *,
    progress: Callable[[int], None] | None = None,
    side_by_side: int = 1,
) -> SimulatorAgent:
    """Train one agent, or go on training it.

    Args:
        stage: How.
        seed: Draws instances and runs, the initial weights and all that is tried out.
        calibrations: What instances are drawn around.
        folder: Takes checkpoint.pt and tb/.
        progress: Called with the number of decisions made so far.
        side_by_side: How many agents are trained at once: each is told its share of joules that a meter counts for
            the whole machine.
    """
    seen = seen_inputs(stage.hide, stage.stack)
    runs = SimulatedRuns(stage.n_runs, seed, stage.pool(stage.instances, seed, calibrations), stage.start)
    env = ScalarVecEnv(VectorSimulatedTraining(runs, least_quality=stage.least_quality), stage.utility)
    config = SimulatorPPOConfig(**{**asdict(stage.ppo), "seed": seed})
    validation = Validation(judge(stage, calibrations), stage.validation.every, seen)
    callbacks = [TrainingLog({"seed": seed, **asdict(stage)}), validation]
    meter = select_meter("cpu")
    model, cost = train(
        hidden_from(env, seen), config, folder, callbacks=callbacks, progress=progress, meter=meter
    )  # fmt: skip
    if meter.read().source != "estimated":  # what is measured is the whole machine's
        cost = {**cost, "energy_j": cost["energy_j"] / side_by_side}
    meter.close()
    bundle = without_inputs(validation.best_bundle(model), seen)
    best = validation.best
    return SimulatorAgent(
        seed=seed, decisions=best["decisions"], bundle=bundle, scores=best["scores"], score=best["score"], cost=cost
    )


def judge(stage: SimulatorStage, calibrations: Sequence[FittedPhysics]) -> Callable[[PolicyBundle], SimulatorScores]:
    """Return what scores a policy on the validation runs, always the same ones."""
    settings = stage.validation
    pool = stage.pool(settings.instances, settings.seed, calibrations)

    def score(bundle: PolicyBundle) -> SimulatorScores:
        return evaluate_in_simulator(
            bundle, pool, seed=settings.seed, n_runs=settings.instances, start=stage.start
        )  # fmt: skip

    return score


def best_weights(folder: Path) -> dict[str, Any]:
    """Return the best weights of policy and value network of an agent that was trained in `folder`.

    Raises:
        ValueError: its checkpoint is not there or damaged.
    """
    state = load_checkpoint(folder / "checkpoint.pt")
    if state is None:
        raise ValueError(f"out: {folder / 'checkpoint.pt'} is gone; remove the folder above it to train anew")
    weights: dict[str, Any] = state["callbacks"][Validation.__name__]["best"]["policy"]
    return weights
