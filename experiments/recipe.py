"""Read a recipe: the cases that a policy is trained on, and how PPO learns. YAML, with every name checked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml
from pydantic import ConfigDict

from trainpilot.agents.ppo import PPOConfig
from trainpilot.envs.scalarise import UTILITIES
from trainpilot.experiments.validated import read_mapping, run_config, validated
from trainpilot.llm_runtime.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a policy is trained."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    common: dict[str, Any] = field(default_factory=dict)
    """Fields that all training cases share; names are `RunConfig`'s."""
    vary: dict[str, list[Any]] = field(default_factory=dict)
    """Fields that vary: the cases are all combinations of the listed values."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """How PPO learns."""
    n_envs: int = 2
    """Training runs side by side, each in a process of its own."""
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

    def cases(self) -> tuple[RunConfig, ...]:
        """Return every combination. Raises `ValueError` naming a field that is unknown or a value that is wrong."""
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
    if len({case.decisions for case in recipe.cases()}) != 1:
        raise ValueError(f"recipe {name}: decisions must be the same in all cases")
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
