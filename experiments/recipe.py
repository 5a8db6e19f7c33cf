"""Read a recipe: what a policy is trained on, in the simulator and live, and how PPO learns. YAML, checked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

import yaml
from pydantic import ConfigDict

from trainpilot.agents.bundle import BaseSchedule
from trainpilot.agents.ppo import PPOConfig
from trainpilot.agents.simulator_training import SimulatorStage
from trainpilot.envs.reward import UTILITIES
from trainpilot.experiments.config_files import read_mapping, run_config, validated
from trainpilot.llm_runtime.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a policy is trained: in the simulator where it says so, then on live runs."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    simulator: SimulatorStage | None = None
    """The stage before the live one, which goes on from its best weights; none by default."""
    cases: str | None = None
    """Live cases as a set that `trainpilot compare` knows (`train`), or a file of cases; instead of the next two."""
    common: dict[str, Any] = field(default_factory=dict)
    """Fields that all live cases share; names are `RunConfig`'s."""
    vary: dict[str, list[Any]] = field(default_factory=dict)
    """Fields that vary: the cases are all combinations of the listed values."""
    reference_learning_rate: float | None = None
    """Learning rate of the runs that live ones are measured against; by default each case's own. Where that is far too
    low, everything looks good beside it."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """How PPO learns on live runs; `total_decisions` 0 leaves out the live stage."""
    n_envs: int = 2
    """Live runs side by side, each in a process of its own."""
    threads: int = 1
    """Torch threads per process."""
    utility: str = "linear"
    """How the three objectives become one number: linear, tchebycheff, constrained or product."""

    def __post_init__(self) -> None:
        for name in ("n_envs", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.utility not in UTILITIES:
            raise ValueError(f"utility must be one of {', '.join(UTILITIES)}, got {self.utility!r}")
        if self.cases is not None and (self.common or self.vary):
            raise ValueError(f"cases must stand alone, got {self.cases!r} beside common or vary; leave out one of them")
        rate = self.reference_learning_rate
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"reference_learning_rate must be a positive number, got {rate}")
        if self.simulator is None and self.ppo.total_decisions < 1:
            raise ValueError("ppo.total_decisions must be at least 1 where there is no simulator stage, got 0")

    @property
    def base_schedule(self) -> BaseSchedule | None:
        """The base schedule that the policy brings along: that of the simulator stage."""
        return None if self.simulator is None else self.simulator.base_schedule

    def live_cases(self) -> tuple[RunConfig, ...]:
        """Return the live runs, on the policy's base schedule; none where the live stage is left out.

        Raises:
            ValueError: a field is unknown or a value wrong.
        """
        if self.ppo.total_decisions == 0:
            return ()
        base, cases = self.base_schedule, self._cases()
        if base is None:
            return cases
        return tuple(
            replace(case, schedule=base.schedule, warmup_tokens=base.warmup_tokens(case.tokens)) for case in cases
        )

    def reference_cases(self) -> tuple[RunConfig, ...]:
        """Return the run that each live one is measured against."""
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
    """Read a recipe that comes with trainpilot, or a YAML file, and apply `key=value` changes.

    Raises:
        ValueError: no such recipe, an unknown name in it, or a value that is wrong.
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
    content[last] = yaml.safe_load(value)
