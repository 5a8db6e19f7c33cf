"""Train an agent on thousands of simulated runs, score it on runs held out from training, and keep its best weights.

`SimulatorStage` holds the settings, `train_in_simulator` trains one agent, `Validation` scores it every few rollouts,
and `evaluate_in_simulator` gives the scores: the share of the tuned static's budget that the losses reached are worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from sb3_contrib import MaskablePPO
from stable_baselines3.common.vec_env import VecEnv

from trainpilot.agents.bundle import BaseSchedule, PolicyBundle
from trainpilot.agents.logging.tags import TAGS
from trainpilot.agents.logging.training_log import TrainingLog
from trainpilot.agents.ppo import PPOConfig, RememberedCallback, bundle_of, check_weights, train
from trainpilot.agents.sb3_env import PrivilegedVecEnv, ScalarVecEnv, hidden_from, seen_inputs, without_inputs
from trainpilot.envs.decision import N_STACK, Preference
from trainpilot.envs.observation import GROUPS, OBSERVATION_FIELDS, ObservationField, fields_of
from trainpilot.envs.reward import UTILITIES, compute_equivalent
from trainpilot.envs.runs import IntervalBatch, SteeredRuns
from trainpilot.envs.vector import VectorSimulatedTraining
from trainpilot.llm_runtime.budget import Currency
from trainpilot.llm_runtime.config import MAX_DECISIONS
from trainpilot.llm_runtime.energy import select_meter
from trainpilot.llm_runtime.files import load_checkpoint, resuming
from trainpilot.llm_runtime.ranges import Range, Whole, check_ranges
from trainpilot.llm_runtime.saved_loop import Count, NotNegative, SavedRecord
from trainpilot.llm_runtime.schedules import BUDGET_SHARES
from trainpilot.llm_runtime.simulator.fitting import FittedPhysics
from trainpilot.llm_runtime.simulator.instances import Widening
from trainpilot.llm_runtime.simulator.records import Bools, Floats, Ints
from trainpilot.llm_runtime.simulator.runs import PRIVILEGED, Pool, SimulatedRuns, Start
from trainpilot.llm_runtime.simulator.shipped import published_sweeps

QUALITY_ALONE = Preference(quality=1.0, energy=0.0, time=0.0)
START_GROUPS = {
    "far_below": (0.0, 0.18),
    "below": (0.18, 0.56),
    "near": (0.56, 1.8),
    "above": (1.8, 5.6),
    "far_above": (5.6, math.inf),
}
"""Starting learning rates over the tuned static's, by name."""

Act = Callable[[np.ndarray, Bools], Ints]
"""Turns observations (n_runs, inputs) and masks (n_runs, sum of choices) into actions (n_runs, fields)."""


@dataclass(frozen=True, kw_only=True)
class SimulatorScores:
    """Scores of a policy on simulated runs; medians over the runs unless stated otherwise."""

    n_runs: int
    multiplier: float
    """Share of the budget that the tuned static needs for the loss reached; a run that diverged counts 0."""
    multiplier_p10: float
    """10th percentile over the runs."""
    by_start: Mapping[str, float | None]
    """`multiplier` of the runs in each of `START_GROUPS`; `None` for a group without runs."""
    time_over_reference: float
    """Seconds over the tuned static's."""
    energy_over_reference: float | None
    """Joules over the tuned static's; `None` where unknown."""
    diverged_share: float
    """Share of the runs."""
    learning_rate_over_best: tuple[float, ...]
    """At each decision: peak of the schedule times the policy's factor, over the tuned static's peak, both at the
    starting batch; of the runs that had not ended."""
    batch_over_start: tuple[float, ...]

    @property
    def score(self) -> float:
        """The number that agents are chosen by: the mean of median and 10th percentile of the multiplier."""
        return (self.multiplier + self.multiplier_p10) / 2

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def evaluate_in_simulator(
    policy: PolicyBundle | Act,
    pool: Pool,
    *,
    preference: Preference = QUALITY_ALONE,
    seed: int = 0,
    n_runs: int = 512,
    start: Start | None = None,
    fields: Sequence[ObservationField] = OBSERVATION_FIELDS,
    start_scale: float | None = None,
) -> SimulatorScores:
    """Control simulated runs to their ends with a policy, and score it.

    Args:
        policy: A bundle, or a function that chooses for many runs at once.
        pool: Instances that the runs are drawn from; for a fair score, none of them used in training.
        preference: Weights of quality, energy and time in the policy's observations.
        seed: Seeds the draw of the runs, their starting learning rates and all their noise.
        n_runs: Number of runs.
        start: Schedule, decisions and range of starting learning rates.
        fields: Observation fields that a function sees; a bundle has its own.
        start_scale: Learning-rate scale that the runs begin with; by default the bundle's, and 1 for a function.

    Raises:
        ValueError: `n_runs` is not at least 1.
    """
    if n_runs < 1:
        raise ValueError(f"n_runs must be at least 1, got {n_runs}")
    plants = SimulatedRuns(n_runs, seed, pool, start)
    act, fields = (policy.choose, policy.fields) if isinstance(policy, PolicyBundle) else (policy, fields)
    if start_scale is None:
        start_scale = policy.start_scale if isinstance(policy, PolicyBundle) else 1.0
    runs = SteeredRuns(plants, np.tile(preference.weights(), (n_runs, 1)), fields, start_scale)
    outcomes = _Outcomes(plants)
    while not outcomes.ended.all():
        interval = runs.advance(act(runs.states.observation(), runs.states.action_masks()))
        done = outcomes.add(runs, interval)
        runs.begin(done, runs.states.preference[done])  # all rows are stepped; only a row's first run is scored
    return outcomes.scores()


class _Outcomes:
    """Loss, seconds and joules of the first run in each row."""

    def __init__(self, plants: SimulatedRuns) -> None:
        n_runs = plants.n_runs
        self.start_over_best: Floats = plants.start_learning_rate / plants.best_learning_rate
        self.start_batch = plants.instances.start_batch.copy()
        self.reference_losses = plants.reference_losses.copy()
        self.reference_time_s = plants.reference_time_s.copy()
        self.reference_energy_j = plants.reference_energy_j.copy()
        self.ended: Bools = np.zeros(n_runs, dtype=np.bool_)
        self.loss: Floats = np.full(n_runs, np.nan)
        self.time_s: Floats = np.zeros(n_runs)
        self.energy_j: Floats = np.zeros(n_runs)
        self.diverged: Bools = np.zeros(n_runs, dtype=np.bool_)
        self.rates: list[float] = []
        self.batches: list[float] = []

    def add(self, runs: SteeredRuns, interval: IntervalBatch) -> Ints:
        """Add an interval, and return the rows whose present run has ended, whether it is scored or not."""
        going, controls = ~self.ended, runs.states.controls
        rate = controls.learning_rate_scale * self.start_over_best
        self.rates.append(float(np.median(rate[going])))
        self.batches.append(float(np.median((controls.batch_size / self.start_batch)[going])))
        done = interval.terminated | interval.truncated
        first = done & going
        self.loss[first] = interval.loss[first]
        self.time_s[first] = runs.time_s[first]
        self.energy_j[first] = runs.energy_j[first]
        self.diverged[first] = interval.diverged[first]
        self.ended |= done
        return np.flatnonzero(done)

    def scores(self) -> SimulatorScores:
        loss = np.where(self.diverged, np.nan, self.loss)
        multiplier = compute_equivalent(loss, BUDGET_SHARES, self.reference_losses)
        energy = float(np.median(self.energy_j / self.reference_energy_j))
        return SimulatorScores(
            n_runs=len(loss),
            multiplier=float(np.median(multiplier)),
            multiplier_p10=float(np.percentile(multiplier, 10)),
            by_start={name: self._group(multiplier, *ends) for name, ends in START_GROUPS.items()},
            time_over_reference=float(np.median(self.time_s / self.reference_time_s)),
            energy_over_reference=energy if math.isfinite(energy) else None,
            diverged_share=float(self.diverged.mean()),
            learning_rate_over_best=tuple(self.rates),
            batch_over_start=tuple(self.batches),
        )

    def _group(self, multiplier: Floats, low: float, high: float) -> float | None:
        inside = (self.start_over_best >= low) & (self.start_over_best < high)
        return float(np.median(multiplier[inside])) if inside.any() else None


@dataclass(frozen=True, kw_only=True)
class _SavedScores(SavedRecord):
    """The scores that are shown and kept in the bundle, which holds all of them."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "ignore"}

    multiplier: NotNegative
    multiplier_p10: NotNegative


@dataclass(frozen=True, kw_only=True)
class _SavedBest(SavedRecord):
    """The best weights so far, and what they scored."""

    score: NotNegative
    scores: _SavedScores
    decisions: Count
    policy: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _SavedValidation(SavedRecord):
    """The form of a validation's state."""

    rollouts: Count
    last: int
    best: dict[str, Any]
    """Empty before the first validation."""


class Validation(RememberedCallback):
    """Scores the policy without exploration every few rollouts, and keeps the best weights.

    Args:
        judge: Scores a policy.
        every: Rollouts between two validations.
        seen: Inputs that the policy sees.
        fields: Observation fields of the policy.
    """

    def __init__(
        self,
        judge: Callable[[PolicyBundle], SimulatorScores],
        every: int,
        seen: Bools,
        fields: tuple[ObservationField, ...] = OBSERVATION_FIELDS,
    ) -> None:
        super().__init__()
        self.judge = judge
        self.every = every
        self.seen = seen
        self.fields = fields
        self.rollouts = 0
        self.last = -1
        """Decisions at the last validation."""
        self.best: dict[str, Any] = {}
        """`score`, `scores`, `decisions` and the weights `policy` of policy and value network."""

    def state(self) -> dict[str, Any]:
        """Return the number of rollouts so far and the best weights."""
        return {"rollouts": self.rollouts, "last": self.last, "best": self.best}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned. Raises `ValueError` for anything else, or weights of another policy."""
        if best := _SavedValidation.from_json(state).best:
            check_weights(self.model.policy, _SavedBest.from_json(best).policy)
        self.rollouts, self.last, self.best = state["rollouts"], state["last"], state["best"]

    def best_bundle(self, model: MaskablePPO) -> PolicyBundle:
        """Put the best weights into the model, and return its policy."""
        model.policy.load_state_dict(self.best["policy"])
        return bundle_of(model, {}, self.fields)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.rollouts % self.every == 0:  # the update on the last rollout is done
            self._validate()

    def _on_rollout_end(self) -> None:
        self.rollouts += 1

    def _on_training_end(self) -> None:
        self._validate()
        self.logger.dump(self.model.num_timesteps)  # SB3 writes nothing after the last update

    def _validate(self) -> None:
        assert isinstance(self.model, MaskablePPO)
        if self.model.num_timesteps == self.last:
            return
        self.last = self.model.num_timesteps
        scores = self.judge(without_inputs(bundle_of(self.model, {}, self.fields), self.seen))
        if not self.best or scores.score > self.best["score"]:
            weights = {name: value.clone() for name, value in self.model.policy.state_dict().items()}
            plain = scores.to_json()
            self.best = {"score": scores.score, "scores": plain, "decisions": self.last, "policy": weights}
        self._log(scores)

    def _log(self, scores: SimulatorScores) -> None:
        names = ("multiplier", "multiplier_p10", "time_over_reference", "energy_over_reference", "diverged_share")
        values: dict[str, float | None] = {name: getattr(scores, name) for name in names}
        values |= {"score": scores.score, "best_score": self.best["score"]}
        values |= {f"from_{group}": value for group, value in scores.by_start.items()}
        for name, value in values.items():
            if value is not None:
                self.logger.record(TAGS[f"validation/{name}"].name, value)


@dataclass(frozen=True, kw_only=True)
class SimulatorPPOConfig(PPOConfig):
    """PPO's settings with values for thousands of simulated runs."""

    total_decisions: Annotated[int, Whole(1, 10**12)] = 8_000_000
    n_steps: Annotated[int, Whole(1, 10**6)] = 50
    batch_size: Annotated[int, Whole(2, 10**7)] = 4096
    n_epochs: Annotated[int, Whole(1, 1000)] = 4
    learning_rate: Annotated[float, Range(0, 1, above=True)] = 1e-3
    learning_rate_end: Annotated[float, Range(0, 1)] = 0.05
    gae_lambda: Annotated[float, Range(0, 1)] = 0.98


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """Simulated runs that a policy is scored on while it is trained."""

    instances: Annotated[int, Whole(1, 10**6)] = 512
    """Number of runs, and of instances that they are drawn from."""
    seed: Annotated[int, Whole(0, 2**32 - 1)] = 999
    """Seeds the draw of instances and runs; must differ from the seed of every agent."""
    every: Annotated[int, Whole(1, 10**6)] = 10
    """Rollouts between two validations."""

    def __post_init__(self) -> None:
        check_ranges(self, "validation.")


@dataclass(frozen=True, kw_only=True)
class SimulatorStage:
    """Settings of the training in the simulator."""

    n_runs: Annotated[int, Whole(1, 10**6)] = 1024
    """Runs side by side."""
    instances: Annotated[int, Whole(1, 10**6)] = 2048
    """Instances that runs are drawn from."""
    seeds: Annotated[int, Whole(1, 1000)] = 2
    """Number of agents that are trained, with seeds from `ppo.seed` on."""
    keep: Annotated[int, Whole(0, 2**32 - 1)] | None = None
    """Seed of the agent whose policy is saved; by default the best on the validation runs."""
    calibrations: str | tuple[str, ...] = "shipped"
    """Calibrations that instances are drawn around: `shipped`, or files that `trainpilot calibrate` wrote."""
    widening: Widening = field(default_factory=Widening)
    """How far from the calibrations instances are drawn."""
    start_rates: tuple[Annotated[float, Range(1e-6, 1e6)], Annotated[float, Range(1e-6, 1e6)]] = (1 / 30, 10.0)
    """Starting learning rates over the tuned one, drawn evenly in the logarithm."""
    start_advised: Annotated[float, Range(0, 1)] = 0.0
    """Share of runs that start at a scaling law's learning rate instead, with the error of its advice."""
    base_schedule: BaseSchedule = field(default_factory=lambda: BaseSchedule(schedule="wsd", warmup_share=0.1))
    """The schedule that the policy multiplies. It is saved in the bundle, and live runs follow it too."""
    start_scale: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Learning-rate scale that runs begin with, before the first decision. It is saved in the bundle, and live runs
    begin with it too."""
    decisions: Annotated[int, Whole(1, MAX_DECISIONS)] = 50
    """Decisions per run."""
    currencies: tuple[Currency, ...] = ("tokens",)
    """What the runs' budgets are counted in: `tokens`, `time_s`, `energy_j`; each run draws one of them."""
    least_quality: Annotated[float, Range(0, 1)] = 0.5
    """Least weight of quality in a preference that is drawn."""
    quality_alone: Annotated[float, Range(0, 1)] = 0.0
    """Share of the drawn preferences that are for quality alone, whose runs are blind to clocks and meters."""
    utility: str = "linear"
    """How the three objectives become one number."""
    observe: tuple[str, ...] = GROUPS
    """Groups of observation fields that the agent has beside the basic ones."""
    hide: tuple[str, ...] = ()
    """Observation fields that are hidden from the agent."""
    stack: Annotated[int, Whole(1, N_STACK)] = N_STACK
    """Number of the newest observations that it sees."""
    privileged_critic: bool = True
    """Whether the value network sees the instance too: its best setting, its edge and the loss left to gain."""
    ppo: SimulatorPPOConfig = field(default_factory=SimulatorPPOConfig)
    """Settings of PPO."""
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    """Runs that the agents are scored on."""

    def __post_init__(self) -> None:
        check_ranges(self, "simulator.")
        if not self.start_rates[0] <= self.start_rates[1]:
            raise ValueError(f"simulator.start_rates must be two rising positive numbers, got {self.start_rates}")
        if not self.calibrations:
            raise ValueError(f"simulator.calibrations must name at least one, or be shipped, got {self.calibrations!r}")
        if self.ppo.seed + self.seeds > 2**32:
            raise ValueError(f"simulator.ppo.seed must leave room for {self.seeds} seeds, got {self.ppo.seed}")
        if self.validation.seed in self.agents:
            raise ValueError(f"validation.seed must be none of the agents' own seeds, got {self.validation.seed}")
        if self.keep is not None and self.keep not in self.agents:
            raise ValueError(f"simulator.keep must be the seed of an agent, {list(self.agents)}, got {self.keep}")
        if self.utility not in UTILITIES:
            raise ValueError(f"simulator.utility must be one of {', '.join(UTILITIES)}, got {self.utility!r}")
        self.seen()
        _ = self.start
        published_sweeps(self.widening.published)  # raises for a name that is not known

    @property
    def fields(self) -> tuple[ObservationField, ...]:
        """Observation fields of the agents."""
        return fields_of(self.observe)

    def seen(self) -> Bools:
        """Return which inputs the agents see, as `seen_inputs` does."""
        return seen_inputs(self.hide, self.stack, self.fields)

    @property
    def agents(self) -> range:
        """The seed of each agent."""
        return range(self.ppo.seed, self.ppo.seed + self.seeds)

    @property
    def start(self) -> Start:
        """Schedule, decisions and starting learning rates of the simulated runs."""
        base = self.base_schedule
        return Start(
            decisions=self.decisions,
            schedule=base.schedule,
            warmup_share=base.warmup_share,
            rates=self.start_rates,
            advised=self.start_advised,
            currencies=self.currencies,
        )

    def pool(self, n_instances: int, seed: int, calibrations: Sequence[FittedPhysics]) -> Pool:
        """Draw instances, and tune a static schedule on each."""
        return Pool.draw(
            n_instances,
            seed,
            calibrations,
            self.widening,
            schedule=self.base_schedule.schedule,
            warmup_share=self.base_schedule.warmup_share,
            currencies=self.currencies,
        )


@dataclass(frozen=True, kw_only=True)
class SimulatorAgent:
    """An agent trained in the simulator, with its best weights."""

    seed: int
    decisions: int
    """Decisions after which its score was best."""
    bundle: PolicyBundle
    scores: Mapping[str, Any]
    """`SimulatorScores` on the validation runs, as plain JSON values."""
    score: float
    cost: Mapping[str, float]
    """Decisions, episodes, joules (NaN where unknown) and seconds of its training."""


def train_in_simulator(
    stage: SimulatorStage,
    seed: int,
    calibrations: Sequence[FittedPhysics],
    folder: Path,
    *,
    progress: Callable[[int], None] | None = None,
    side_by_side: int = 1,
) -> SimulatorAgent:
    """Train one agent, or resume its training.

    Args:
        stage: Settings of the training.
        seed: Seeds the draw of instances and runs, the initial weights and the exploration.
        calibrations: Calibrations that instances are drawn around.
        folder: Folder of checkpoint.pt and tb/.
        progress: Called with the number of decisions made so far.
        side_by_side: Number of agents that are trained at once. Each counts an equal part of the joules of a meter
            that measures the whole machine.
    """
    seen, fields = stage.seen(), stage.fields
    runs = SimulatedRuns(stage.n_runs, seed, stage.pool(stage.instances, seed, calibrations), stage.start)
    simulated = VectorSimulatedTraining(
        runs,
        least_quality=stage.least_quality,
        fields=fields,
        quality_alone=stage.quality_alone,
        start_scale=stage.start_scale,
    )
    env: VecEnv = hidden_from(ScalarVecEnv(simulated, stage.utility), seen)
    if stage.privileged_critic:
        env = PrivilegedVecEnv(env, runs)
    config = SimulatorPPOConfig(**{**asdict(stage.ppo), "seed": seed})
    validation = Validation(judge(stage, calibrations), stage.validation.every, seen, fields)
    callbacks = [TrainingLog({"seed": seed, **asdict(stage)}), validation]
    meter = select_meter("cpu")
    privileged = PRIVILEGED if stage.privileged_critic else 0
    model, cost = train(env, config, folder, callbacks=callbacks, progress=progress, meter=meter, privileged=privileged)
    if meter.read().source != "estimated":  # such a meter measures the whole machine
        cost = {**cost, "energy_j": cost["energy_j"] / side_by_side}
    meter.close()
    bundle = without_inputs(validation.best_bundle(model), seen)
    best = validation.best
    return SimulatorAgent(
        seed=seed, decisions=best["decisions"], bundle=bundle, scores=best["scores"], score=best["score"], cost=cost
    )


def judge(stage: SimulatorStage, calibrations: Sequence[FittedPhysics]) -> Callable[[PolicyBundle], SimulatorScores]:
    """Return a function that scores a policy on the validation runs, which are the same each time."""
    settings = stage.validation
    pool = stage.pool(settings.instances, settings.seed, calibrations)

    def score(bundle: PolicyBundle) -> SimulatorScores:
        return evaluate_in_simulator(
            bundle,
            pool,
            seed=settings.seed,
            n_runs=settings.instances,
            start=stage.start,
            start_scale=stage.start_scale,
        )

    return score


def best_weights(folder: Path, n_inputs: int) -> dict[str, Any]:
    """Return the best weights of policy and value network of the agent that was trained in `folder`.

    Args:
        folder: Folder of its checkpoint.
        n_inputs: Inputs of the policy network. Weights on privileged inputs, which live runs lack, are left out.

    Raises:
        ValueError: its checkpoint is missing or damaged.
    """
    state = load_checkpoint(folder / "checkpoint.pt")
    if state is None:
        raise ValueError(f"out: {folder / 'checkpoint.pt'} is gone; remove the folder above it to train anew")
    with resuming(folder / "checkpoint.pt"):
        weights: dict[str, Any] = state["callbacks"][Validation.__name__]["best"]["policy"]
        wide = n_inputs + PRIVILEGED
        return {
            name: value[:, :n_inputs] if value.ndim == 2 and value.shape[1] == wide else value
            for name, value in weights.items()
        }
