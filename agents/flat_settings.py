"""Flatten nested settings into what TensorBoard's tables hold: one key, one number or text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def hparams(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return settings as the HPARAMS tab takes them."""
    flat = flatten(settings)
    return {key: value if isinstance(value, bool | int | float) else text(value) for key, value in flat.items()}


def text(value: Any) -> str:
    """Return a value as text for one cell of a table."""
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(text(item) for item in value)
    return " ".join(str(value).split())


def markdown_table(settings: Mapping[str, Any]) -> str:
    """Return settings as a table of two columns."""
    rows = [f"| {key} | {text(value).replace('|', chr(92) + '|')} |" for key, value in flatten(settings).items()]
    return "\n".join(["| | |", "|---|---|", *rows])
