"""Thousands of simulated training runs as one Gymnasium vector environment: a step is a few operations on arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from trainpilot.envs.action import KEEP
from trainpilot.envs.decision import Preference, PreferenceLike, draw_weights
from trainpilot.envs.environments import action_space, observation_space, reward_space, simulated_plants
from trainpilot.envs.observation import OBSERVATION_FIELDS, ObservationField
from trainpilot.envs.reward import OBJECTIVES, RewardInfo, Scalariser
from trainpilot.envs.runs import IntervalBatch, ReferencedPlants, SteeredRuns
from trainpilot.llm_runtime.simulator.records import Bools, Floats, Ints

Observations = NDArray[np.float32]


class VectorSimulatedTraining(VectorEnv[Observations, Ints, Floats]):
    """Many simulated language-model training runs as one Gymnasium vector environment.

    Spaces, reward and the end of an episode are those of `trainpilot/LiveTraining-v0`; rewards are float64 of shape
    (n_runs, 3), or (n_runs,) with a `utility`. A run that ends is replaced by a new one. With
    `AutoresetMode.SAME_STEP`, the default, that happens in the same step: the observation returned is that of the new
    run, and `infos["final_obs"]` holds the last one of the old run. With `AutoresetMode.NEXT_STEP` it happens in the
    next step, which ignores the run's action and returns the first observation of the new run, with a reward of 0.

    `infos` holds arrays with one row per run. Of the interval just trained: `loss`, `loss_increase`, `time_s`,
    `energy_j` (NaN where unknown), `diverged`, the `preference` in force and, with a utility, `vector_reward`. Of runs
    that have ended, by the masks `_final_obs` and `_final_info`: `final_obs` (`SAME_STEP`), and in `final_info` the
    sums over the episode `reward_terms`, `energy_j`, `time_s` and `length`.

    Args:
        plants: Number of simulated runs, which `reset` draws by its seed; or the runs themselves, which begin anew in
            all rows at `reset`, drawn by their own seed.
        preference: Fixed preference, also as text, a mapping or three weights; `None` draws one per episode.
        least_quality: Least weight of quality in a preference that is drawn.
        fields: Observation fields, in the order of the observation.
        quality_alone: Share of the drawn preferences that are for quality alone: such runs see no clock and no meter.
        start_scale: Learning-rate scale in force before the first decision.
        utility: One of `trainpilot.envs.UTILITIES`, by which rewards are scalars; `None` gives reward vectors.
        finish: Whether the agent may begin the cool-down before the budget's end.
        autoreset_mode: When a run that has ended is replaced: "SameStep" or "NextStep", or Gymnasium's constant.

    Raises:
        ValueError: an argument is out of its range.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        plants: ReferencedPlants | int,
        preference: PreferenceLike | None = None,
        least_quality: float = 0.5,
        fields: Sequence[ObservationField] = OBSERVATION_FIELDS,
        *,
        quality_alone: float = 0.0,
        start_scale: float = 1.0,
        utility: str | None = None,
        finish: bool = True,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
    ) -> None:
        for name, share in (("least_quality", least_quality), ("quality_alone", quality_alone)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        if isinstance(plants, int) and plants < 1:
            raise ValueError(f"plants must be at least one run, got {plants}")
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.plants = None if isinstance(plants, int) else plants
        self.preference = None if preference is None else Preference.of(preference)
        self.least_quality, self.quality_alone, self.start_scale = least_quality, quality_alone, start_scale
        self.finish = finish
        self.num_envs = plants if isinstance(plants, int) else plants.n_runs
        self.fields = tuple(fields)
        self.single_observation_space = observation_space(self.fields)
        self.single_action_space = action_space()
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._scalariser = None if utility is None else Scalariser(utility, self.num_envs)
        if utility is None:
            self.reward_space = batch_space(reward_space(), self.num_envs)
            self.reward_dim = len(OBJECTIVES)
        self.runs: SteeredRuns | None = None
        self._to_begin: Bools = np.zeros(self.num_envs, dtype=np.bool_)
        """Runs that ended in the last step and begin anew in the next one."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Begin every run; `seed` decides the preferences, and where only a number is given, which runs are drawn."""
        super().reset(seed=seed)
        plants = self.plants
        if plants is None:
            plants = simulated_plants(self.num_envs, int(self.np_random.integers(2**31)))
        weights = self._weights(self.num_envs)
        self.runs = SteeredRuns(plants, weights, self.fields, self.start_scale, finish=self.finish)
        self._to_begin = np.zeros(self.num_envs, dtype=np.bool_)
        if self._scalariser is not None:
            self._scalariser.begin()
        return self.runs.states.observation(), {"preference": self.runs.states.preference}

    def step(self, actions: Ints) -> tuple[Observations, Floats, Bools, Bools, dict[str, Any]]:  # type: ignore[override]
        """Train every run for one interval under its action, and start new runs where one has ended."""
        if self.runs is None:
            raise ValueError("step needs runs; call reset first")
        actions, begun = np.asarray(actions, dtype=np.int64), np.flatnonzero(self._to_begin)
        if begun.size:
            actions = np.where(self._to_begin[:, None], np.array(KEEP), actions)
        interval = self.runs.advance(actions)
        if begun.size:  # what was computed of runs that had ended has no meaning
            interval = _idle(interval, begun)
            self._begin(self.runs, begun)
        infos = self._infos(self.runs, interval)
        rewards = interval.reward
        if self._scalariser is not None:
            infos["vector_reward"] = rewards
            weighing = RewardInfo(preference=infos["preference"], loss_increase=infos["loss_increase"])
            rewards = self._scalariser.rewards(rewards, weighing)
            rewards[begun] = 0.0
            self._scalariser.begin(begun)
        ended = interval.terminated | interval.truncated
        if ended.any():
            infos |= _sums(self.runs, ended)
            if self.autoreset_mode is AutoresetMode.SAME_STEP:
                infos |= {"final_obs": self.runs.states.observation(), "_final_obs": ended}
                self._begin(self.runs, np.flatnonzero(ended))
        self._to_begin = ended & (self.autoreset_mode is AutoresetMode.NEXT_STEP)
        return self.runs.states.observation(), rewards, interval.terminated, interval.truncated, infos

    def _begin(self, runs: SteeredRuns, rows: Ints) -> None:
        runs.begin(rows, self._weights(rows.size))
        if self._scalariser is not None:
            self._scalariser.begin(rows)

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


def vector_simulated_training(num_envs: int = 1, **arguments: Any) -> VectorSimulatedTraining:
    """Return `num_envs` simulated runs: the entry point of `gymnasium.make_vec`."""
    return VectorSimulatedTraining(num_envs, **arguments)


def _autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    known = (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP)
    try:
        found = AutoresetMode(mode)
    except ValueError:
        found = AutoresetMode.DISABLED
    if found not in known:
        raise ValueError(f"autoreset_mode must be one of {', '.join(each.value for each in known)}, got {mode!r}")
    return found


def _idle(interval: IntervalBatch, rows: Ints) -> IntervalBatch:
    """Return the interval without what these rows, which begin anew, have computed."""
    quiet: dict[str, Any] = {"reward": 0.0, "loss": np.nan, "loss_increase": 0.0}
    quiet |= dict.fromkeys(("diverged", "terminated", "truncated"), False)
    costs = {name: _with(getattr(interval.telemetry, name), rows, 0.0) for name in ("time_s", "energy_j")}
    values = {name: _with(getattr(interval, name), rows, value) for name, value in quiet.items()}
    return replace(interval, telemetry=replace(interval.telemetry, **costs), **values)


def _with(values: NDArray[Any], rows: Ints, value: float | bool) -> NDArray[Any]:
    changed = values.copy()
    changed[rows] = value
    return changed


def _sums(runs: SteeredRuns, ended: Bools) -> dict[str, Any]:
    sums = {
        "reward_terms": runs.outcome.copy(),
        "energy_j": runs.energy_j.copy(),
        "time_s": runs.time_s.copy(),
        "length": runs.intervals.copy(),
    }
    return {"final_info": sums, "_final_info": ended}
