"""Gymnasium environments of a training run: a live one and a simulated one.

Both have the same spaces of actions, observations and reward vectors, and so has `vector.VectorSimulatedTraining`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium import spaces

from trainpilot.envs.action import N_CHOICES
from trainpilot.envs.decision import N_STACK, Decision, DecisionState, Preference, PreferenceLike
from trainpilot.envs.observation import OBSERVATION_FIELDS, ObservationField
from trainpilot.envs.reference import PlantFactory, live_plant, live_reference, run_reference
from trainpilot.envs.reward import (
    DIVERGED_LOSS_INCREASE,
    DIVERGED_QUALITY,
    MAX_QUALITY,
    OBJECTIVES,
    Reference,
    RewardInfo,
    RewardMeter,
    RewardTerms,
    ScalarisedReward,
)
from trainpilot.envs.runs import ReferencedPlants
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.drive import DrivenInterval, drive
from trainpilot.llm_runtime.schedules import BUDGET_SHARES
from trainpilot.llm_runtime.simulator.runs import OnePlant
from trainpilot.llm_runtime.telemetry import READ_BACK, Plant, Telemetry

if TYPE_CHECKING:
    from trainpilot.envs.picture import RunPicture
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

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012, Gymnasium's own form

    def __init__(
        self,
        fields: Sequence[ObservationField] = OBSERVATION_FIELDS,
        start_scale: float = 1.0,
        *,
        utility: str | None = None,
        finish: bool = True,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f'render_mode must be "rgb_array" or None, got {render_mode!r}')
        self.fields, self.start_scale = tuple(fields), start_scale
        self.finish, self.render_mode = finish, render_mode
        self.action_space = action_space()
        self.observation_space = observation_space(self.fields)
        self._scalar = None if utility is None else ScalarisedReward(utility)
        if utility is None:
            self.reward_space = reward_space()
            self.reward_dim = len(OBJECTIVES)
        self._picture: RunPicture | None = None
        self._drop_run()

    def _drop_run(self) -> None:
        """Release the current run, so that its memory is free before the next one is created."""
        self.plant: Plant | None = None
        self._intervals: Iterator[DrivenInterval] = iter(())

    def _begin(self, plant: Plant, reference: Reference, preference: Preference) -> np.ndarray:
        """Start an episode with a new run, and return its first observation."""
        self.plant, self.reference = plant, reference
        self.state = DecisionState(plant.limits(), preference, self.fields, self.start_scale, finish=self.finish)
        self._meter = RewardMeter(reference)
        if self._scalar is not None:
            self._scalar.begin()
        self._intervals = drive(plant, lambda _: self.state.controls, self.state.limits.decisions)
        return self.state.observation()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """Train one interval under the action's controls.

        Returns:
            Observation, reward (a vector, or a float with a utility), terminated, truncated and info, as in Gymnasium.

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
        reward = terms.vector() if self._scalar is None else self._scalar.of(terms.vector(), info)
        return self.state.observation(), reward, terminated, truncated, info

    def render(self) -> Any:
        """Return the run so far as a picture, uint8 of shape (height, width, 3): loss, learning rate and batch.

        Raises:
            ValueError: there is no run.
        """
        if self.render_mode is None:
            gymnasium.logger.warn('render needs render_mode="rgb_array"; give it to gymnasium.make')
            return None
        if self.plant is None:
            raise ValueError("render needs a run; call reset first")
        if self._picture is None:
            from trainpilot.envs.picture import RunPicture

            self._picture = RunPicture()
        return self._picture.draw(self.state.telemetry, self.reference)

    def action_masks(self) -> np.ndarray:
        """Return which choices are allowed now, bool of shape (sum of choices,), for MaskablePPO."""
        return self.state.action_masks()

    def _info(self, decision: Decision, telemetry: Telemetry, terms: RewardTerms, loss: float) -> dict[str, Any]:
        effective = {name: getattr(telemetry, name) for name in READ_BACK}
        finite = math.isfinite(loss)
        weighing = RewardInfo(
            preference=self.state.preference.weights(),
            loss_increase=loss - self.reference.losses[-1] if finite else DIVERGED_LOSS_INCREASE,
        )
        return {
            **weighing,
            "requested": dict(vars(decision.controls)),
            "effective": effective,
            "refusals": decision.refusals,
            "reward_terms": dict(vars(terms)),
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

    A vector, float32 of shape (3,) (`reward_space`, `reward_dim`: MO-Gymnasium's convention). The argument `utility`,
    the id `trainpilot/LiveTraining-Scalar-v0` and the wrapper `ScalarReward` make it a scalar. With gamma = 1 the
    rewards of an episode sum to (quality, -energy, -time) relative to the reference run, so that 1 % of each means the
    same on every model.

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
    | preference | Preference, text, mapping, three weights or None | None | fixed; None draws one per episode |
    | make_plant | callable | LiveRun | makes the plant for a case |
    | threads | int or None | None | torch threads of this process; None leaves them alone |
    | reference_cases | sequence of RunConfig or None | None | reference run of each case; None: the case itself |
    | fields | sequence of ObservationField | all | observation fields, in the order of the observation |
    | start_scale | float | 1 | learning-rate scale in force before the first decision |
    | utility | str or None | None | one of `UTILITIES`, for scalar rewards; "linear" in the id that ends in Scalar-v0 |
    | finish | bool | True | whether the agent may begin the cool-down early; False always masks the choice |
    | render_mode | str or None | None | "rgb_array": `render` returns the run so far as a picture |

    `reset(options={"case": i, "preference": Preference(...)})` selects instead of drawing.

    ## Version history

    * v0: first version
    """

    def __init__(
        self,
        cases: Sequence[RunConfig] = (DEFAULT_CASE,),
        preference: PreferenceLike | None = None,
        make_plant: PlantFactory | None = None,
        threads: int | None = None,
        reference_cases: Sequence[RunConfig] | None = None,
        *,
        fields: Sequence[ObservationField] = OBSERVATION_FIELDS,
        start_scale: float = 1.0,
        utility: str | None = None,
        finish: bool = True,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(fields, start_scale, utility=utility, finish=finish, render_mode=render_mode)
        if not cases:
            raise ValueError("cases must name at least one run, got none")
        self.cases = tuple(cases)
        self.reference_cases = self.cases if reference_cases is None else tuple(reference_cases)
        if len(self.reference_cases) != len(self.cases):
            counts = f"{len(self.reference_cases)} for {len(self.cases)} cases"
            raise ValueError(f"reference_cases must name one run for each case, got {counts}")
        self.preference = None if preference is None else Preference.of(preference)
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
        preference = Preference.of(options.get("preference", drawn))
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


def simulated_plants(n_runs: int, seed: int) -> ReferencedPlants:
    """Return a simulator of some runs, drawn from the whole range of the shipped calibrations."""
    from trainpilot.llm_runtime.simulator.runs import SimulatedRuns

    return SimulatedRuns(n_runs=n_runs, seed=seed, pool=_pool())


def simulated_plant(seed: int) -> ReferencedPlants:
    """Return a simulator of one run, drawn from the whole range of the shipped calibrations."""
    return simulated_plants(1, seed)


@lru_cache(maxsize=1)
def _pool() -> Pool:
    """Return the instances that runs are drawn from, once per process: finding their references takes a second."""
    from trainpilot.llm_runtime.simulator.runs import default_pool

    return default_pool()


class SimulatedTraining(TrainingEnv):
    """A simulated language-model training run, steered interval by interval.

    Actions, observations, reward, masks and the end of an episode are those of `trainpilot/LiveTraining-v0`, so a
    policy works in both. An episode draws a new run from the simulator's ranges, and is exactly
    reproducible with the same seed.

    ## Arguments

    | Argument | Type | Default | Meaning |
    |---|---|---|---|
    | preference | Preference, text, mapping, three weights or None | None | fixed; None draws one per episode |
    | make_plant | callable | the simulator | makes plants of one run from a seed |
    | fields | sequence of ObservationField | all | observation fields, in the order of the observation |
    | start_scale | float | 1 | learning-rate scale in force before the first decision |
    | utility | str or None | None | one of `UTILITIES`, for scalar rewards; "linear" in the id that ends in Scalar-v0 |
    | finish | bool | True | whether the agent may begin the cool-down early; False always masks the choice |
    | render_mode | str or None | None | "rgb_array": `render` returns the run so far as a picture |

    `reset(options={"preference": Preference(...), "plant_seed": i})` selects instead of drawing.

    ## Version history

    * v0: first version
    """

    def __init__(
        self,
        preference: PreferenceLike | None = None,
        make_plant: PlantMaker | None = None,
        fields: Sequence[ObservationField] = OBSERVATION_FIELDS,
        start_scale: float = 1.0,
        *,
        utility: str | None = None,
        finish: bool = True,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(fields, start_scale, utility=utility, finish=finish, render_mode=render_mode)
        self.preference = None if preference is None else Preference.of(preference)
        self._make_plant = make_plant or simulated_plant

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a run that is drawn at random."""
        super().reset(seed=seed)
        options = options or {}
        plant_seed = int(options.get("plant_seed", self.np_random.integers(2**31)))
        drawn = self.preference or Preference.draw(self.np_random)
        preference = Preference.of(options.get("preference", drawn))
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
