"""Wrap a real training run as a Gymnasium environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainpilot.envs.live_plant import live_plant, live_reference
from trainpilot.envs.preference import Preference
from trainpilot.envs.reference import PlantFactory, run_reference
from trainpilot.envs.reward import Reference
from trainpilot.envs.training_env import TrainingEnv
from trainpilot.llm_runtime.config import RunConfig

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

    `Box(-1, 1, (6 * 34,), float32)`: the last six observations, the newest last. Each field is a ratio or a
    logarithm, clipped to its range and scaled linearly to [-1, 1]; what is unknown is 0. The fields with unit, range
    and meaning are `trainpilot.envs.observation.OBSERVATION_FIELDS`, printed in `docs/environment.md`.

    ## Reward

    A vector, float32 of shape (3,) (`reward_space`, `reward_dim`: MO-Gymnasium's convention). `ScalarReward` makes
    it one number. With gamma = 1 an episode sums to (quality, -energy, -time) in units of the reference run, so that
    1 % of each is the same size on every model.

    | Num | Objective | Per interval | Unit |
    |---|---|---|---|
    | 0 | quality | change of the worth of the loss's compute-equivalent | shares of the reference's budget |
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
    | reference_cases | sequence of RunConfig or None | None | runs to measure each case against; None: its own |

    `reset(options={"case": i, "preference": Preference(...)})` chooses instead of drawing.

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
    ) -> None:
        super().__init__()
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
        """Begin a run of a case; the first time a case is met, its reference is run."""
        super().reset(seed=seed)
        options = options or {}
        index = int(options.get("case", self.np_random.integers(len(self.cases))))
        if not 0 <= index < len(self.cases):
            raise ValueError(f"options case must be in [0, {len(self.cases)}), got {index}")
        drawn = self.preference or Preference.draw(self.np_random)
        preference: Preference = options.get("preference", drawn)
        self.case = self.cases[index]
        self.plant = None  # frees the last run's memory before the next is made
        self.reference = self._reference(index)
        observation = self._begin(self._make_plant(self.case), self.reference, preference)
        return observation, {"case": index, "preference": preference.weights()}

    def _reference(self, index: int) -> Reference:
        """Return the reference of a case. A caller's own plants are no live runs: theirs never go to the disk cache."""
        if index not in self._references:
            case = self.reference_cases[index]
            if self._own_plants:
                self._references[index] = run_reference(case, self._make_plant)
            else:
                self._references[index] = live_reference(case, self._make_plant)
        return self._references[index]
