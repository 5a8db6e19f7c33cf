"""Read the calibrations that come with trainpilot: physics fitted to live runs of small transformers."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files

from trainpilot.llm_runtime.simulator.fitting import FittedPhysics


@lru_cache
def shipped_physics() -> tuple[FittedPhysics, ...]:
    """Return the physics of every shipped calibration, in the order of their names."""
    found = sorted(files(__name__).iterdir(), key=lambda file: file.name)
    records = (json.loads(file.read_text(encoding="utf-8")) for file in found if file.name.endswith(".json"))
    return tuple(FittedPhysics.from_json(record["physics"]) for record in records)
