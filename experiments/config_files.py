"""Turn YAML and JSON files into records, with every name and value checked; a fault is one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.json_records import first_fault

T = TypeVar("T")


def read_mapping(what: str, name: str, shipped: Traversable) -> dict[str, Any]:
    """Read the YAML file called `name` in the folder `shipped`, or else the user's YAML or JSON file at that path.

    Raises:
        ValueError: no such file, or it does not hold names and values.
    """
    known = {file.name.removesuffix(".yaml"): file for file in shipped.iterdir() if file.name.endswith(".yaml")}
    source = known.get(name, Path(name))
    try:
        text = source.read_text(encoding="utf-8")
        content = json.loads(text) if source.name.endswith(".json") else yaml.safe_load(text)
    except OSError:
        raise ValueError(f"{what} must be one of {', '.join(sorted(known))} or a YAML file, got {name!r}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, not JSON, a date that no calendar has
        kind = "JSON" if source.name.endswith(".json") else "YAML"
        raise ValueError(f"{what}: {name} is not readable {kind}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what}: {name} must hold names and values, got {type(content).__name__}")
    return content


def run_config(content: Mapping[str, Any], where: str) -> RunConfig:
    """Build a run from plain values; its text may be one source instead of a list.

    Raises:
        ValueError: a field is unknown or a value wrong; the message begins with `where`.
    """
    if content.get("budget") is not None and content.get("tokens") is not None:
        raise ValueError(
            f"{where}: tokens cannot be combined with budget, got {content['tokens']} and {content['budget']}; give one"
        )
    text = {"text": [content["text"]]} if isinstance(content.get("text"), str) else {}
    return validated(RunConfig, {**content, **text}, where)


def validated(kind: type[T], content: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from plain values.

    Raises:
        ValueError: a field is unknown or a value wrong: the first fault, beginning with `where`.
    """
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    if unknown := sorted(map(str, set(content) - set(known))):
        raise ValueError(f"{where}: {unknown[0]!r} is unknown; known are {', '.join(known)}")
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise ValueError(first_fault(error, where)) from error
