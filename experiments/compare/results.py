"""Define the records of a comparison: specs and results of runs, cases, methods, tuned baselines, and the whole.

A run's file holds a `RunResult`; `comparison.json`, the manifest, holds a `Comparison`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal, Self

from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.files import digest
from trainpilot.llm_runtime.json_records import JsonForm, JsonRecord, null_if_not_finite

FORMAT = 1
"""Raised when what a kept run means changes; older runs are then run again."""

Role = Literal["method", "sweep", "curve"]


@dataclass(frozen=True, kw_only=True)
class SteeringSpec(JsonRecord):
    """Who sets the controls during a run."""

    kind: str = "keep"
    """`keep`, `plateau`, `noise-batch`, `seesaw`, `gradual-pruning`, `random`, `policy` or `open-loop`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of that kind, as JSON values. Those named `path` say where a file lies and are no part of the run.

    A policy whose settings have no `guardrails` ran without them.
    """
    probe: bool = False
    """Whether the curvature probe runs (and is paid for): only policies look at it."""
    evaluate_every: int = 10
    """Decisions between two looks at the validation loss; the last interval always has one."""


@dataclass(frozen=True, kw_only=True)
class RunSpec(JsonRecord):
    """One run. Two specs with the same key are the same run, whatever case or method asked for them."""

    config: RunConfig
    steering: SteeringSpec = field(default_factory=SteeringSpec)

    def key(self, content: str) -> str:
        """Return the name of the run's file; `content` is the digest of its text and its model."""
        settings = {name: value for name, value in self.steering.settings.items() if name != "path"}
        config = {name: value for name, value in asdict(self.config).items() if name not in ("model", "text")}
        label = [FORMAT, content, config, asdict(self.steering) | {"settings": settings}]
        return digest(label, 10)


@dataclass(frozen=True, kw_only=True)
class IntervalResult(JsonRecord):
    """What is kept of one interval."""

    tokens: int
    """Tokens trained on since the run's start, intervals that were rolled back included."""
    steps: int
    """Optimiser steps in this interval."""
    train_loss: float | None
    """Mean training loss, in nats/token; `None` where it was not finite."""
    validation_loss: float | None
    """Validation loss measured at the interval's end, in nats/token; `None` where nobody looked."""
    learning_rate: float
    """Learning rate of the last step."""
    learning_rate_scale: float = 1.0
    """Factor on the base schedule that was asked for."""
    finishing: bool = False
    """The cool-down has begun."""
    batch_size: float
    """Mean sequences per step."""
    precision: str
    """Number format of the matrix products."""
    sparsity: float
    """Share of zero weights or of removed channels."""
    probe_sequences: int
    """Sequences that the curvature probe looked at, three times each; 0 without one."""
    evaluation_sequences: int
    """Sequences of the validation at the interval's end; 0 without one."""
    time_s: float
    """Seconds measured, probe and switching included, evaluation apart."""
    probe_time_s: float
    switch_time_s: float
    evaluation_time_s: float
    energy_j: float | None
    """Joules measured, evaluation apart."""
    evaluation_energy_j: float | None
    rolled_back: bool = False
    """The run was later restored to a snapshot from before this interval."""


def _columns(intervals: Sequence[IntervalResult]) -> dict[str, list[Any]]:
    """Return the intervals column by column, which is a fifth of the size; what is not finite becomes `None`."""
    columns = {each.name: [getattr(interval, each.name) for interval in intervals] for each in fields(IntervalResult)}
    return {
        name: [null_if_not_finite(value) if isinstance(value, float) else value for value in column]
        for name, column in columns.items()
    }


def _rows(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@dataclass(frozen=True, kw_only=True)
class RunResult(JsonRecord):
    """What came out of one run. One JSON file."""

    key: str
    spec: RunSpec
    n_parameters: int
    initial_validation_loss: float | None
    """Before training, in nats/token."""
    final_validation_loss: float | None
    """In nats/token; `None` if the run diverged or failed."""
    final_test_loss: float | None
    """In nats/token; `None` if the run diverged or failed."""
    diverged: bool
    """The run ended with a loss that is not finite; guardrails may have rolled it back from others."""
    stopped_early: bool
    """The method ended the run before its budget was used up."""
    failure: str | None
    """Why there is no result, in one line; `None` for a run that ended by itself."""
    energy_source: str | None
    """`measured_counter`, `measured_power`, `estimated`, or `None` without a meter."""
    energy_shared: bool
    """Other runs ran beside this one, so that the measured joules (and seconds) hold a part of theirs."""
    device: str
    """Device, cores and threads."""
    intervals: Annotated[tuple[IntervalResult, ...], JsonForm(write=_columns, read=_rows)]
    """In the order in which they were trained, those that were rolled back included."""
    guardrails: Mapping[str, Any] | None = None
    """What the guardrails did, from `GuardedController.summary`; `None` for a run without them."""

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.intervals[-1].tokens if self.intervals else 0

    @property
    def usable(self) -> bool:
        """Whether the run ended with a finite loss."""
        return self.final_validation_loss is not None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return super().to_json() | {"format": FORMAT}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the result that `to_json` gave. Raises `ValueError`, `KeyError` or `TypeError` for anything else."""
        values = dict(content)
        if values.pop("format") != FORMAT:
            raise ValueError("written by another version")
        if not values["spec"]["config"]["text"]:
            raise ValueError("a run has a text")
        return super().from_json(values)


@dataclass(frozen=True, kw_only=True)
class Row(JsonRecord):
    """One run's place in a comparison."""

    case: str
    method: str
    """Name of the method, of the baseline whose curve the run belongs to, or of the search that tried it."""
    role: Role
    """`method`: judged; `sweep`: tried by a search; `curve`: a baseline at another budget."""
    seed: int
    budget: float = 1.0
    """Share of the case's budget in tokens that this run was given."""
    counted_budget: float = 1.0
    """Share of the case's budget that it is said to have used: differs from `budget` in planted checks alone."""
    key: str
    """Names the run's file."""


def cost_key(config: RunConfig) -> str:
    """Return which cost table a run belongs to: models and sequence lengths have their own speeds."""
    return f"{config.model}, {config.sequence_length} tokens"


UNTUNED = "cosine"
"""The method that is called the untuned default: AdamW, cosine to 10 %, at the case's own settings."""
TUNED = "tuned"
"""The method that is called the tuned static baseline: the best setting for equal tokens."""


@dataclass(frozen=True, kw_only=True)
class Case(JsonRecord):
    """A model, a corpus, a budget and where a run starts."""

    name: str
    config: RunConfig
    """Seed 0; a method's run differs from it in the seed and in what the method sets."""
    architecture: str
    """As transformers calls it: llama, gpt2, gpt_neox, qwen2, opt."""
    target_loss: float | None = None
    """Validation loss whose price is reported; by default the untuned default's median final loss."""


@dataclass(frozen=True, kw_only=True)
class MethodNote(JsonRecord):
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
class TunedBaseline(JsonRecord):
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
class Comparison(JsonRecord):
    """Everything that was run for one report."""

    cases: tuple[Case, ...]
    methods: tuple[MethodNote, ...]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    baselines: Mapping[str, tuple[TunedBaseline, ...]]
    """Tuned settings by case."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Command, versions, machine, wall-clock seconds, jobs, threads."""
