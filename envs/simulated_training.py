"""Wrap one simulated training run as a Gymnasium environment."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from trainpilot.envs.preference import Preference
from trainpilot.envs.reference import BUDGET_SHARES
from trainpilot.envs.reward import Reference
from trainpilot.envs.steered_runs import ReferencedPlants
from trainpilot.envs.training_env import TrainingEnv
from trainpilot.llm_runtime.simulator.runs import OnePlant

if TYPE_CHECKING:
    from trainpilot.llm_runtime.simulator.runs import Pool

PlantMaker = Callable[[int], ReferencedPlants]
"""Takes a seed, returns plants of one run."""


def simulated_plant(seed: int) -> ReferencedPlants:
    """Return the simulator with one run, drawn from its whole range."""
    from trainpilot.llm_runtime.simulator.runs import SimulatedRuns

    return SimulatedRuns(n_runs=1, seed=seed, pool=_pool())


@lru_cache(maxsize=1)
def _pool() -> Pool:
    """Return what runs are drawn from, once per process: finding the references takes a second."""
    from trainpilot.llm_runtime.simulator.runs import default_pool

    return default_pool()


class SimulatedTraining(TrainingEnv):
    """A simulated language-model training run, steered interval by interval.

    Actions, observations, reward, masks and the end of an episode are those of `trainpilot/LiveTraining-v0`: a policy
    cannot tell which of the two it steers. An episode takes milliseconds, draws another run from the simulator's
    ranges each time, and repeats exactly under one seed.

    ## Arguments

    | Argument | Type | Default | Meaning |
    |---|---|---|---|
    | preference | Preference or None | None | fixed preference; None draws one per episode |
    | make_plant | callable | the simulator | makes plants of one run from a seed |

    `reset(options={"preference": Preference(...), "plant_seed": i})` chooses instead of drawing.

    ## Version history

    * v0: first version
    """

    def __init__(self, preference: Preference | None = None, make_plant: PlantMaker | None = None) -> None:
        super().__init__()
        self.preference = preference
        self._make_plant = make_plant or simulated_plant

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a run that is drawn."""
        super().reset(seed=seed)
        options = options or {}
        plant_seed = int(options.get("plant_seed", self.np_random.integers(2**31)))
        drawn = self.preference or Preference.draw(self.np_random)
        preference: Preference = options.get("preference", drawn)
        plants = self._make_plant(plant_seed)
        observation = self._begin(OnePlant(plants), reference_of(plants), preference)
        return observation, {"plant_seed": plant_seed, "preference": preference.weights()}


def reference_of(plants: ReferencedPlants) -> Reference:
    """Return what the base schedule reaches on the only run of a `PlantBatch`, without its intervals."""
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
