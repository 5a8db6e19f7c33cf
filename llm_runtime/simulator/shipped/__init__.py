"""Read the physics that come with trainpilot: of live runs of small transformers, and of published runs at scale."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any

from trainpilot.llm_runtime.simulator.fitting import FittedPhysics, SizeLaw


@lru_cache
def shipped_physics() -> tuple[FittedPhysics, ...]:
    """Return the physics of every shipped calibration of live runs, in the order of their names."""
    found = sorted(files(__name__).iterdir(), key=lambda file: file.name)
    records = (json.loads(file.read_text(encoding="utf-8")) for file in found if file.name.endswith(".json"))
    return tuple(FittedPhysics.from_json(record["physics"]) for record in records)


@lru_cache
def published_physics() -> Mapping[str, FittedPhysics]:
    """Return physics fitted to published runs of 25 M to 430 M parameters, by the name of model and source."""
    return {name: FittedPhysics.from_json(record) for name, record in _published()["models"].items()}


@lru_cache
def published_sweeps(names: tuple[str, ...] = ()) -> tuple[FittedPhysics, ...]:
    """Return physics of the published models whose learning rate and batch were both varied, smallest first.

    Args:
        names: Names of some of them; by default all.

    Raises:
        ValueError: there is no such model.
    """
    known = {name: physics for name, physics in published_physics().items() if name.startswith("step-law")}
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"simulator.widening.published must be names among {', '.join(known)}, got {unknown[0]!r}")
    return tuple(sorted((known[name] for name in names or known), key=lambda physics: physics.n_parameters or 0))


@lru_cache
def shipped_law() -> SizeLaw:
    """Return how the physics of the published runs depend on the number of weights."""
    return SizeLaw.from_json(_published()["law"])


@lru_cache
def _published() -> Mapping[str, Any]:
    file = files(__name__) / "published" / "physics.json"
    content: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
