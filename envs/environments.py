"""Gymnasium environments of training runs: a live one, a simulated one, and a vector of thousands of simulated ones.

All three have the same spaces of actions, observations and reward vectors. In the vector environment a step is a few
operations on arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from trainpilot.envs.action import N_CHOICES
from trainpilot.envs.decision import N_STACK, Decision, DecisionState, Preference, draw_weights
from trainpilot.envs.observation import OBSERVATION_FIELDS, ObservationField
from trainpilot.envs.reference import PlantFactory, live_plant, live_reference, run_reference
from trainpilot.envs.reward import (
    DIVERGED_LOSS_INCREASE,
    DIVERGED_QUALITY,
    MAX_QUALITY,
    Reference,
    RewardInfo,
    RewardMeter,
    RewardTerms,
)
from trainpilot.envs.runs import IntervalBatch, ReferencedPlants, SteeredRuns
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.drive import DrivenInterval, drive
from trainpilot.llm_runtime.schedules import BUDGET_SHARES
from trainpilot.llm_runtime.simulator.records import Bools, Floats, Ints
from trainpilot.llm_runtime.simulator.runs import OnePlant
from trainpilot.llm_runtime.telemetry import Plant, Telemetry

if TYPE_CHECKING:
    from trainpilot.llm_runtime.simulator.runs import Pool


def action_space() -> spaces.MultiDiscrete:
    """Return one choice per control."""
    return spaces.MultiDiscrete(list(N_CHOICES))


def observation_space(fields: Sequence[ObservationField] = OBSERVATION_FIELDS) -> spaces.Box:
    """Return the stacked observation of these fields, in [-1, 1]."""
    return spaces.Box(-1.0, 1.0, (N_STACK * len(fields),), np.float32)


def reward_space() -> spaces.Box:
    """Return the bounds of quality, energy and time in one interval."""
    low = np.array([DIVERGED_QUALITY - MAX_QUALITY, -np.inf, -np.inf], dtype=np.float32)
    high = np.array([MAX_QUALITY, 0.0, 0.0], dtype=np.float32)
    return spaces.Box(low, high, dtype=np.float32)


class TrainingEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """Base class of the single-run environments. `reset` of a subclass makes the plant and calls `_begin`."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012, Gymnasium's own form

    def __init__(self, fields: Sequence[ObservationField] = OBSERVATION_FIELDS, start_scale: float = 1.0) -> None:
        self.fields, self.start_scale = tuple(fields), start_scale
        self.action_space = action_space()
        self.observation_space = observation_space(self.fields)
        self.reward_space = reward_space()
        self.reward_dim = 3
        self._drop_run()

    def _drop_run(self) -> None:
        """Release the current run, so that its memory is free before the next one is created."""
        self.plant: Plant | None = None
        self._intervals: Iterator[DrivenInterval] = iter(())

    def _begin(self, plant: Plant, reference: Reference, preference: Preference) -> np.ndarray:
        """Start an episode with a new run, and return its first observation."""
        self.plant, self.reference = plant, reference
        self.state = DecisionState(plant.limits(), preference, self.fields, self.start_scale)
        self._meter = RewardMeter(reference)
        self._intervals = drive(plant, lambda _: self.state.controls, self.state.limits.decisions)
        return self.state.observation()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """Train one interval under the action's controls.

        Returns:
            Observation, reward vector, terminated, truncated and info, as in Gymnasium.

        Raises:
            ValueError: there is no run, it has ended, or the action is invalid.
        """
        if self.plant is None:
            raise ValueError("step needs a run; call reset first")
        decision = self.state.decide(action)
        if (interval := next(self._intervals, None)) is None:
            raise ValueError("step needs a run that goes on; call reset first")
        telemetry, loss = interval.telemetry, interval.loss
        self.state.observe(telemetry)
        terms = self._meter.weigh(telemetry, loss)
        info = self._info(decision, telemetry, terms, loss)
        terminated = info["diverged"] or (telemetry.finished and telemetry.finishing)
        truncated = telemetry.finished and not terminated
        return self.state.observation(), terms.vector(), terminated, truncated, info

    def action_masks(self) -> np.ndarray:
        """Return which choices are allowed now, bool of shape (sum of choices,), for MaskablePPO."""
        return self.state.action_masks()

    def _info(self, decision: Decision, telemetry: Telemetry, terms: RewardTerms, loss: float) -> dict[str, Any]:
        effective = {
            "learning_rate": telemetry.learning_rate,
            "batch_size": telemetry.batch_size,
            "precision": telemetry.precision,
            "sparsity": telemetry.sparsity,
            "finishing": telemetry.finishing,
        }
        finite = math.isfinite(loss)
        weighing = RewardInfo(
            preference=self.state.preference.weights(),
            loss_increase=loss - self.reference.losses[-1] if finite else DIVERGED_LOSS_INCREASE,
        )
        return {
            **weighing,
            "requested": asdict(decision.controls),
            "effective": effective,
            "refusals": decision.refusals,
            "reward_terms": asdict(terms),
            "loss": loss,
            "time_s": telemetry.time_s,
            "energy_j": telemetry.energy_j,
            "energy_source": telemetry.energy_source,
            "diverged": telemetry.diverged or not finite,
        }


DEFAULT_CASE = RunConfig(model="llama-nano", tokens=204_800, batch_size=8, sequence_length=64)


class LiveTraining(TrainingEnv):
    """A real language-model training run, steered interval by interval.

    ## Description

    Each episode is one run of one case: a transformers model trained with AdamW on real text under a token budget.
    The agent decides `decisions` times, at equal shares of the budget. It multiplies the case's base schedule
    (residual control): an agent that always chooses "keep" is the base schedule. The environment measures time and
    energy, so it is registered as nondeterministic; under one seed everything else repeats on a CPU.

    ## Action space

    `MultiDiscrete([7, 3, 5, 2, 2])`. Masked choices (`action_masks()`) are treated as "keep"; `info` says why.

    | Num | Action | Choices | Unit |
    |---|---|---|---|
    | 0 | learning_rate | x0.5, x0.71, x0.84, x1, x1.19, x1.41, x2 | factor on the present scale |
    | 1 | batch_size | half, keep, double | factor on the batch, neutral for Adam |
    | 2 | precision | keep, fp32, tf32, bf16, fp16 | number format of the matrix products |
    | 3 | pruning | keep, +5 % | share of the prunable weights or channels |
    | 4 | finish | go on, cool down | linear fall to zero over a fifth of the tokens so far |

    ## Observation space

    `Box(-1, 1, (6 * 62,), float32)`: the last six observations, the newest last. Each field is a ratio or a
    logarithm, clipped to its range and scaled linearly to [-1, 1]; what is unknown is 0. The fields with unit, range
    and meaning are `trainpilot.envs.observation.OBSERVATION_FIELDS`, printed in `docs/environment.md`.

    ## Reward

    A vector, float32 of shape (3,) (`reward_space`, `reward_dim`: MO-Gymnasium's convention). `ScalarReward` converts
    it to a scalar. With gamma = 1 the rewards of an episode sum to (quality, -energy, -time) relative to the reference
    run, so that 1 % of each means the same on every model.

    | Num | Objective | Per interval | Unit |
    |---|---|---|---|
    | 0 | quality | change of the quality, a function of the compute-equivalent | shares of the reference's budget |
    | 1 | energy | -joules / reference's joules | share; 0 while unknown |
    | 2 | time | -seconds / reference's seconds | share |

    Quality is a potential: within the run it follows the training loss, at the end the validation loss. A diverged
    run ends with a quality of -1.

    ## Starting state

    A fresh model (or the pretrained one) of a case drawn from `cases`, with the case's own seed for weights and data,
    before its first step. The preference is drawn per episode unless it is given.

    ## Episode end

    Terminated: the run diverged (loss not finite), or a cool-down that the agent began is complete.
    Truncated: the budget is used up.

    ## Arguments

    | Argument | Type | Default | Meaning |
    |---|---|---|---|
    | cases | sequence of RunConfig | one llama-nano run | training runs to draw from |
    | preference | Preference or None | None | fixed preference; None draws one per episode |
    | make_plant | callable | LiveRun | makes the plant for a case |
    | threads | int or None | None | torch threads of this process; None leaves them alone |
    | reference_cases | sequence of RunConfig or None | None | reference run of each case; None: the case itself |
    | fields | sequence of ObservationField | all | observation fields, in the order of the observation |
    | start_scale | float | 1 | learning-rate scale in force before the first decision |

    `reset(options={"case": i, "preference": Preference(...)})` selects instead of drawing.

    ## Version history

    * v0: first version
    """

    def __init__(
        self,
        cases: Sequence[RunConfig] = (DEFAULT_CASE,),
        preference: Preference | None = None,
        make_plant: PlantFactory | None = None,
        threads: int | None = None,
        reference_cases: Sequence[RunConfig] | None = None,
        *,
        fields: Sequence[ObservationField] = OBSERVATION_FIELDS,
        start_scale: float = 1.0,
    ) -> None:
        super().__init__(fields, start_scale)
        if not cases:
            raise ValueError("cases must name at least one run, got none")
        self.cases = tuple(cases)
        self.reference_cases = self.cases if reference_cases is None else tuple(reference_cases)
        if len(self.reference_cases) != len(self.cases):
            counts = f"{len(self.reference_cases)} for {len(self.cases)} cases"
            raise ValueError(f"reference_cases must name one run for each case, got {counts}")
        self.preference = preference
        self._own_plants = make_plant is not None
        if threads is not None:
            from trainpilot.llm_runtime.process import use_threads

            use_threads(threads)
        self._make_plant = make_plant or live_plant()
        self._references: dict[int, Reference] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a run of a case; the first run of a case is preceded by its reference run."""
        super().reset(seed=seed)
        options = options or {}
        index = int(options.get("case", self.np_random.integers(len(self.cases))))
        if not 0 <= index < len(self.cases):
            raise ValueError(f"options case must be in [0, {len(self.cases)}), got {index}")
        drawn = self.preference or Preference.draw(self.np_random)
        preference: Preference = options.get("preference", drawn)
        self.case = self.cases[index]
        self._drop_run()
        self.reference = self._reference(index)
        observation = self._begin(self._make_plant(self.case), self.reference, preference)
        return observation, {"case": index, "preference": preference.weights()}

    def _reference(self, index: int) -> Reference:
        """Return the reference of a case; that of a live run is cached on disk, that of a caller's own plant is not."""
        if index not in self._references:
            case = self.reference_cases[index]
            if self._own_plants:
                self._references[index] = run_reference(case, self._make_plant)
            else:
                self._references[index] = live_reference(case, self._make_plant)
        return self._references[index]


PlantMaker = Callable[[int], ReferencedPlants]
"""Takes a seed, and returns plants that hold one run."""


def simulated_plant(seed: int) -> ReferencedPlants:
    """Return a simulator of one run, drawn from the whole range of the shipped calibrations."""
    from trainpilot.llm_runtime.simulator.runs import SimulatedRuns

    return SimulatedRuns(n_runs=1, seed=seed, pool=_pool())


@lru_cache(maxsize=1)
def _pool() -> Pool:
    """Return the instances that runs are drawn from, once per process: finding their references takes a second."""
    from trainpilot.llm_runtime.simulator.runs import default_pool

    return default_pool()


class SimulatedTraining(TrainingEnv):
    """A simulated language-model training run, steered interval by interval.

    Actions, observations, reward, masks and the end of an episode are those of `trainpilot/LiveTraining-v0`, so a
    policy works in both. An episode takes milliseconds, draws a new run from the simulator's ranges, and is exactly
    reproducible with the same seed.

    ## Arguments

    | Argument | Type | Default | Meaning |
    |---|---|---|---|
    | preference | Preference or None | None | fixed preference; None draws one per episode |
    | make_plant | callable | the simulator | makes plants of one run from a seed |
    | fields | sequence of ObservationField | all | observation fields, in the order of the observation |
    | start_scale | float | 1 | learning-rate scale in force before the first decision |

    `reset(options={"preference": Preference(...), "plant_seed": i})` selects instead of drawing.

    ## Version history

    * v0: first version
    """

    def __init__(
        self,
        preference: Preference | None = None,
        make_plant: PlantMaker | None = None,
        fields: Sequence[ObservationField] = OBSERVATION_FIELDS,
        start_scale: float = 1.0,
    ) -> None:
        super().__init__(fields, start_scale)
        self.preference = preference
        self._make_plant = make_plant or simulated_plant

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a run that is drawn at random."""
        super().reset(seed=seed)
        options = options or {}
        plant_seed = int(options.get("plant_seed", self.np_random.integers(2**31)))
        drawn = self.preference or Preference.draw(self.np_random)
        preference: Preference = options.get("preference", drawn)
        plants = self._make_plant(plant_seed)
        observation = self._begin(OnePlant(plants), reference_of(plants), preference)
        return observation, {"plant_seed": plant_seed, "preference": preference.weights()}


def reference_of(plants: ReferencedPlants) -> Reference:
    """Return the reference of the only run of a `PlantBatch`, without intervals."""
    energy = float(plants.reference_energy_j[0])
    known = np.isfinite(energy)
    return Reference(
        budgets=BUDGET_SHARES,
        losses=tuple(plants.reference_losses[0].tolist()),
        initial_loss=float("nan"),
        time_s=float(plants.reference_time_s[0]),
        energy_j=energy if known else None,
        energy_source="estimated" if known else None,
        telemetry=(),
    )


Observations = NDArray[np.float32]


class VectorSimulatedTraining(VectorEnv[Observations, Ints, Floats]):
    """Many simulated language-model training runs as one Gymnasium vector environment.

    Spaces, reward and the end of an episode are those of `trainpilot/LiveTraining-v0`; rewards are float64 of shape
    (n_runs, 3). A run that ends is replaced by a new one in the same step (`AutoresetMode.SAME_STEP`): the observation
    returned is that of the new run, and `infos["final_obs"]` holds the last one of the old run.

    `infos` holds arrays with one row per run. Of the interval just trained: `loss`, `loss_increase`, `time_s`,
    `energy_j` (NaN where unknown), `diverged` and the `preference` in force. Of runs that have ended, by the masks
    `_final_obs` and `_final_info`: `final_obs`, and in `final_info` the sums over the episode `reward_terms`,
    `energy_j`, `time_s` and `length`.

    Args:
        plants: The simulated runs. `reset` starts new ones in all rows, drawn by the plants' own seed.
        preference: Fixed preference; `None` draws one per episode.
        least_quality: Least weight of quality in a preference that is drawn.
        fields: Observation fields, in the order of the observation.
        quality_alone: Share of the drawn preferences that are for quality alone: such runs see no clock and no meter.
        start_scale: Learning-rate scale in force before the first decision.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        plants: ReferencedPlants,
        preference: Preference | None = None,
        least_quality: float = 0.5,
        fields: Sequence[ObservationField] = OBSERVATION_FIELDS,
        *,
        quality_alone: float = 0.0,
        start_scale: float = 1.0,
    ) -> None:
        for name, share in (("least_quality", least_quality), ("quality_alone", quality_alone)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        self.plants = plants
        self.preference = preference
        self.least_quality, self.quality_alone, self.start_scale = least_quality, quality_alone, start_scale
        self.num_envs = plants.n_runs
        self.fields = tuple(fields)
        self.single_observation_space = observation_space(self.fields)
        self.single_action_space = action_space()
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.reward_space = batch_space(reward_space(), self.num_envs)
        self.reward_dim = 3
        self.runs: SteeredRuns | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Begin every run; `seed` decides the preferences."""
        super().reset(seed=seed)
        self.runs = SteeredRuns(self.plants, self._weights(self.num_envs), self.fields, self.start_scale)
        return self.runs.states.observation(), {"preference": self.runs.states.preference}

    def step(self, actions: Ints) -> tuple[Observations, Floats, Bools, Bools, dict[str, Any]]:  # type: ignore[override]
        """Train every run for one interval under its action, and start new runs where one has ended."""
        if self.runs is None:
            raise ValueError("step needs runs; call reset first")
        interval = self.runs.advance(np.asarray(actions, dtype=np.int64))
        infos = self._infos(self.runs, interval)
        ended = interval.terminated | interval.truncated
        if ended.any():
            infos |= _final(self.runs, ended)
            rows = np.flatnonzero(ended)
            self.runs.begin(rows, self._weights(rows.size))
        return self.runs.states.observation(), interval.reward, interval.terminated, interval.truncated, infos

    def action_masks(self) -> Bools:
        """Return which choices are allowed now, shape (n_runs, sum of choices), for MaskablePPO."""
        if self.runs is None:
            raise ValueError("action_masks needs runs; call reset first")
        return self.runs.states.action_masks()

    def _weights(self, n_runs: int) -> Floats:
        if self.preference is not None:
            return np.tile(self.preference.weights(), (n_runs, 1))
        return draw_weights(self.np_random, n_runs, self.least_quality, self.quality_alone)

    @staticmethod
    def _infos(runs: SteeredRuns, interval: IntervalBatch) -> dict[str, Any]:
        return {
            **RewardInfo(preference=runs.states.preference, loss_increase=interval.loss_increase),
            "loss": interval.loss,
            "time_s": interval.telemetry.time_s,
            "energy_j": interval.telemetry.energy_j,
            "diverged": interval.diverged,
        }


def _final(runs: SteeredRuns, ended: Bools) -> dict[str, Any]:
    sums = {
        "reward_terms": runs.outcome.copy(),
        "energy_j": runs.energy_j.copy(),
        "time_s": runs.time_s.copy(),
        "length": runs.intervals.copy(),
    }
    observations = runs.states.observation()
    return {"final_obs": observations, "_final_obs": ended, "final_info": sums, "_final_info": ended}
