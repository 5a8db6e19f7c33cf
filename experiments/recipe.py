"""Read training recipes: validated YAML files with the simulator stage, the live cases and PPO's settings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Annotated, Any

from pydantic import ConfigDict

from trainpilot.agents.bundle import BaseSchedule
from trainpilot.agents.ppo import PPOConfig
from trainpilot.agents.simulator_training import SimulatorStage
from trainpilot.envs.reward import UTILITIES
from trainpilot.experiments.config_files import parse_yaml, read_mapping, run_config, validated
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.ranges import Range, Whole, check_ranges


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings for training a policy: an optional stage in the simulator, then live runs."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    simulator: SimulatorStage | None = None
    """Simulator stage, from whose best weights the live stage starts; none by default."""
    cases: str | None = None
    """Live cases: the name of a case set of `trainpilot compare` (such as `train`), or a file of cases. Replaces
    `common` and `vary`."""
    common: dict[str, Any] = field(default_factory=dict)
    """`RunConfig` fields that all live cases share."""
    vary: dict[str, list[Any]] = field(default_factory=dict)
    """`RunConfig` fields with lists of values; the live cases are all combinations of these values."""
    reference_learning_rate: Annotated[float, Range(0, above=True)] | None = None
    """Learning rate of the reference runs; by default each case's own. If that is far too low, every steered run looks
    good in comparison."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """PPO settings for the live stage; with `total_decisions` 0 there is no live stage."""
    n_envs: Annotated[int, Whole(1, 1024)] = 2
    """Number of live runs in parallel, each in its own process."""
    threads: Annotated[int, Whole(1, 1024)] = 1
    """Torch threads per process."""
    utility: str = "linear"
    """Scalarisation of the three objectives: linear, logarithmic, tchebycheff, constrained or product."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.utility not in UTILITIES:
            raise ValueError(f"utility must be one of {', '.join(UTILITIES)}, got {self.utility!r}")
        if self.cases is not None and (self.common or self.vary):
            raise ValueError(f"cases cannot be combined with common or vary, got {self.cases!r}; remove one of them")
        if empty := [name for name, values in self.vary.items() if not values]:
            raise ValueError(f"vary must list at least one value of {empty[0]}, got none; leave it out")
        if self.simulator is None and self.ppo.total_decisions < 1:
            raise ValueError("ppo.total_decisions must be at least 1 where there is no simulator stage, got 0")

    @property
    def base_schedule(self) -> BaseSchedule | None:
        """The base schedule stored in the policy's bundle: that of the simulator stage."""
        return None if self.simulator is None else self.simulator.base_schedule

    def live_cases(self) -> tuple[RunConfig, ...]:
        """Return the live runs with the policy's base schedule; none if there is no live stage.

        Raises:
            ValueError: a field is unknown or a value invalid.
        """
        if self.ppo.total_decisions == 0:
            return ()
        base, cases = self.base_schedule, self._cases()
        if base is None:
            return cases
        return tuple(base.on(case) for case in cases)

    def reference_cases(self) -> tuple[RunConfig, ...]:
        """Return the reference run of each live case."""
        rate = self.reference_learning_rate
        cases = self.live_cases()
        return cases if rate is None else tuple(replace(case, base_learning_rate=rate) for case in cases)

    def _cases(self) -> tuple[RunConfig, ...]:
        if self.cases is not None:
            from trainpilot.experiments.compare.cases import load_cases

            return tuple(case.config for case in load_cases(self.cases))
        names = list(self.vary)
        combinations = itertools.product(*self.vary.values())
        cases = ({**self.common, **dict(zip(names, values, strict=True))} for values in combinations)
        return tuple(run_config(case, "recipe case") for case in cases)


def load_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe or a YAML file, and apply `key=value` changes.

    Raises:
        ValueError: the recipe does not exist, a field is unknown, or a value is invalid.
    """
    content = read_mapping("recipe", name, files("trainpilot.experiments").joinpath("recipes"))
    for change in changes:
        _set(content, change)
    recipe = validated(Recipe, content, f"recipe {name}")
    decisions = {case.decisions for case in recipe.live_cases()}
    if recipe.simulator is not None:
        decisions.add(recipe.simulator.decisions)
    if len(decisions) != 1:
        found = ", ".join(map(str, sorted(decisions)))
        raise ValueError(f"recipe {name}: decisions must be the same in all cases and in the simulator, got {found}")
    return recipe


def _set(content: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals:
        raise ValueError(f"set must look like key=value, got {change!r}")
    *path, last = key.split(".")
    for part in path:
        content = content.setdefault(part, {})
        if not isinstance(content, dict):
            raise ValueError(f"set: {part} in {key!r} has no fields below it")
    content[last] = parse_yaml(f"set: {key}", value)
