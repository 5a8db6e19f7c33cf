"""Keep every finished run as its own file, so that nothing is run twice."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from trainpilot.experiments.compare.records import RunResult, RunSpec
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.data.text_sources import content_digest
from trainpilot.llm_runtime.files import write_json


class RunStore:
    """The folder `runs/` of a comparison, one JSON file per run, named by its key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, RunResult] = {}

    def get(self, key: str) -> RunResult | None:
        """Return a finished run; `None` if it was never run, did not end by itself, or its file is damaged."""
        if key not in self._known:
            result = _read(self.folder / f"{key}.json")
            if result is None or result.failure is not None or result.key != key:
                return None
            self._known[key] = result
        return self._known[key]

    def put(self, result: RunResult) -> None:
        """Write a run's file whole. A run that failed is kept for the report, and tried again next time."""
        write_json(self.folder / f"{result.key}.json", result.to_json())
        if result.failure is None:
            self._known[result.key] = result


def run_key(spec: RunSpec) -> str:
    """Return the name of a run's file: the same for the same settings, text and model, on every machine.

    Raises:
        ValueError: the text cannot be read.
    """
    return spec.key(_content(spec.config.text, spec.config.model))


@lru_cache(maxsize=256)
def _content(text: tuple[str, ...], model: str) -> str:
    digest = content_digest(RunConfig(text=text, model=model))
    return digest if Path(model).exists() else f"{digest} {model}"


def _read(path: Path) -> RunResult | None:
    try:
        return RunResult.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
