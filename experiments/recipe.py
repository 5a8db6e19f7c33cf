"""Read a recipe: the cases that a policy is trained on, and how PPO learns. YAML, with every name checked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from trainpilot.agents.ppo import PPOConfig
from trainpilot.envs.scalarise import UTILITIES
from trainpilot.llm_runtime.run_config import RunConfig

T = TypeVar("T")


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
        return tuple(_case({**self.common, **dict(zip(names, values, strict=True))}) for values in combinations)


def load_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe that comes with trainpilot, or a YAML file, and apply `key=value` changes.

    Raises:
        ValueError: no such recipe, an unknown name in it, or a value that is wrong.
    """
    shipped = {p.name.removesuffix(".yaml"): p for p in files("trainpilot.experiments").joinpath("recipes").iterdir()}
    source = shipped.get(name, Path(name))
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"recipe must be one of {', '.join(sorted(shipped))} or a YAML file, got {name!r}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe: {name} is not readable YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"recipe: {name} must hold names and values, got {type(content).__name__}")
    for change in changes:
        _set(content, change)
    recipe = _validated(Recipe, content, f"recipe {name}")
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


def _case(content: dict[str, Any]) -> RunConfig:
    if isinstance(content.get("text"), str):
        content["text"] = [content["text"]]
    return _validated(RunConfig, content, "recipe case")


def _validated(kind: type[T], content: dict[str, Any], where: str) -> T:
    """Build a dataclass from plain values; the first fault becomes one line."""
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    if unknown := sorted(set(content) - set(known)):
        raise ValueError(f"{where}: {unknown[0]!r} is unknown; known are {', '.join(known)}")
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        own = first["type"] == "value_error"  # a dataclass's own message, which says what it got
        message = first["msg"].removeprefix("Value error, ") + ("" if own else f", got {first['input']!r}")
        raise ValueError(f"{where}: {place + ': ' if place else ''}{message}") from error
