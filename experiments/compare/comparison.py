"""What was compared: cases, methods, baselines found, and the run behind every number. One JSON file, the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trainpilot.experiments.compare.records import Row
from trainpilot.llm_runtime.config import RunConfig

UNTUNED = "cosine"
"""The method that is called the untuned default: AdamW, cosine to 10 %, at the case's own settings."""
TUNED = "tuned"
"""The method that is called the tuned static baseline: the best setting for equal tokens."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, a corpus, a budget and where a run starts."""

    name: str
    config: RunConfig
    """Seed 0; a method's run differs from it in the seed and in what the method sets."""
    architecture: str
    """As transformers calls it: llama, gpt2, gpt_neox, qwen2, opt."""
    target_loss: float | None = None
    """Validation loss whose price is reported; by default the untuned default's median final loss."""


@dataclass(frozen=True, kw_only=True)
class MethodNote:
    """What the report says about a method."""

    name: str
    title: str
    """Two or three words for tables and legends."""
    description: str
    """One sentence."""
    family: str
    """Methods of one family share a Pareto front, as a policy under several preferences does."""
    kind: str
    """`untuned`, `tuned`, `heuristic`, `tuning-free`, `policy` or `check`."""
    training_energy_j: float | None = None
    """Joules that training the policy took; `None` where it is unknown or there is none."""


@dataclass(frozen=True, kw_only=True)
class TunedBaseline:
    """The setting that a search found best on one case for one axis."""

    method: str
    """Name of its rows: `tuned` (equal tokens), `tuned-time`, `tuned-energy`."""
    axis: str
    """`tokens`, `time_s` or `energy_j`."""
    config: RunConfig
    """The setting, with the seed it was tuned on."""
    search: str
    """`grid`, `tpe` or `halving`."""
    n_trials: int
    """Runs that the search made."""
    on_edge: tuple[str, ...] = ()
    """Settings whose best value lies on the edge of what was tried: the grid was too small there."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that was run for one report."""

    cases: tuple[Case, ...]
    methods: tuple[MethodNote, ...]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    baselines: Mapping[str, tuple[TunedBaseline, ...]]
    """Tuned settings by case."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Command, versions, machine, wall-clock seconds, jobs, threads."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Comparison:
        """Rebuild from `to_json`."""
        return cls(
            cases=tuple(Case(**case | {"config": _config(case["config"])}) for case in record["cases"]),
            methods=tuple(MethodNote(**note) for note in record["methods"]),
            seeds=tuple(record["seeds"]),
            rows=tuple(Row(**row) for row in record["rows"]),
            baselines={case: tuple(map(_baseline, found)) for case, found in record["baselines"].items()},
            provenance=record["provenance"],
        )


def _baseline(record: Mapping[str, Any]) -> TunedBaseline:
    return TunedBaseline(**{**record, "config": _config(record["config"]), "on_edge": tuple(record["on_edge"])})


def _config(record: Mapping[str, Any]) -> RunConfig:
    return RunConfig(**{**record, "text": tuple(record["text"])})
