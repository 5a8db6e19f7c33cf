"""Turn YAML and JSON files into records, with every name and value checked; a fault is one line."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.json_records import first_fault
from trainpilot.llm_runtime.plain_values import MAX_DEPTH, check_plain, one_line, parse_json, read_text, shown

T = TypeVar("T")
MAX_YAML = 64 * 2**10
"""Largest YAML file that is read, which takes Python up to a second; JSON may be larger."""


def read_mapping(what: str, name: str, shipped: Traversable) -> dict[str, Any]:
    """Read the YAML file called `name` in the folder `shipped`, or else the user's YAML or JSON file at that path.

    Raises:
        ValueError: no such file, or it does not hold names and values.
    """
    known = {file.name.removesuffix(".yaml"): file for file in shipped.iterdir() if file.name.endswith(".yaml")}
    source = known.get(name, Path(name))
    is_json = source.name.endswith(".json")
    try:
        text = read_text(source) if is_json else read_text(source, MAX_YAML)
    except OSError:
        raise ValueError(f"{what} must be one of {', '.join(sorted(known))} or a YAML file, got {name!r}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}: {name} is not readable YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{what}: {name} cannot be read: {error}") from error
    content = _parsed_json(f"{what}: {name}", text) if is_json else parse_yaml(f"{what}: {name}", text)
    if not isinstance(content, dict):
        raise ValueError(f"{what}: {name} must hold names and values, got {type(content).__name__}")
    return content


def parse_yaml(where: str, text: str) -> Any:
    """Return the values of a YAML text: plain ones, within the bounds.

    Raises:
        ValueError: it is no YAML, names types of a language, or holds too much; the message begins with `where`.
    """
    try:
        content = yaml.load(text, _ShallowLoader)
        check_plain(content)
    except RecursionError:
        raise ValueError(f"{where} is not readable YAML: it is nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: too much, or a date that no calendar has
        raise ValueError(f"{where} is not readable YAML: {one_line(error)}") from error
    return content


class _ShallowLoader(yaml.SafeLoader):
    """Refuses content that is nested too deep while it is read: the deeper the nesting, the longer PyYAML takes."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node with all that is in it."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _parsed_json(where: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where} is not readable JSON: {one_line(error)}") from error


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
        raise ValueError(f"{where}: {shown(unknown[0])} is unknown; known are {', '.join(known)}")
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise ValueError(first_fault(error, where)) from error
