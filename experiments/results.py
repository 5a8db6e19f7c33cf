"""Define the records of a comparison: specs and results of runs, cases, methods, tuned baselines, and the whole.

A run's file holds a `RunResult`; `comparison.json`, the manifest, holds a `Comparison`. A policy's place in it is its
`PolicyName`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from trainpilot.llm_runtime.config import Controls, RunConfig
from trainpilot.llm_runtime.files import digest
from trainpilot.llm_runtime.json_records import JsonForm, JsonRecord, null_if_not_finite
from trainpilot.llm_runtime.schedules import EVALUATE_EVERY

FORMAT = 1
"""Version of the run files, to be raised when their meaning changes; runs of older versions are repeated."""

Role = Literal["method", "sweep", "curve"]
POPULATION = "pbt"
"""Kind of steering, and name of the method, by which several runs are one: Population Based Training."""


@dataclass(frozen=True, kw_only=True)
class SteeringSpec(JsonRecord):
    """Kind and settings of the controller of a run."""

    kind: str = "keep"
    """`keep`, `plateau`, `greedy`, `noise-batch`, `seesaw`, `gradual-pruning`, `random`, `early-stop`, `policy`,
    `open-loop` or `pbt`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of that kind, as JSON values. `path` is the location of a file and not part of the run's key.

    A policy whose settings have no `guardrails` ran without them.
    """
    probe: bool = False
    """Whether the curvature probe runs (and is charged); only policies use it."""
    evaluate_every: int = EVALUATE_EVERY
    """Decisions between two evaluations of the validation loss; the last interval is always evaluated."""


@dataclass(frozen=True, kw_only=True)
class Compression(JsonRecord):
    """How a run makes its model smaller on the way, and in which format the model is then used."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    """Feed-forward channels (`ffn`), groups of heads (`heads`) and blocks (`depth`) that the small model has; empty
    where the model keeps its shape."""
    small: str | None = None
    """Config file of the small model, without weights. Its place is not part of the run's key."""
    new: bool = False
    """Whether the small model begins with new weights, instead of as a cut of the whole one."""
    taught: bool = False
    """Whether the small model learns from the whole one's predictions too."""
    whole: float = 1.0
    """Share of the budget on which the whole model is trained."""
    rest: float = 0.0
    """Share of the budget on which the small model is trained afterwards. A cut goes on in the same schedule."""
    format: str | None = None
    """Format of `trainpilot export` that the final model is rounded to; `None` is float32."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run in which one model is trained."""

    config: RunConfig
    """Of this part. Its model has the shape that is trained, for cost tables; only a new one is made from it."""
    decisions: int
    """Intervals of the part; all that remain in the last one."""
    teacher: RunConfig | None = None
    """A run on the model that teaches."""
    ranked_sequences: int = 0
    """Sequences that the model before it read, without a gradient, to find what does least."""


RANKING_TOKENS = 8_192
"""Tokens of training text on which it is measured what does least, before each cut of a part."""


def ranking_sequences(config: RunConfig) -> int:
    """Return the sequences on which it is measured what does least."""
    return max(RANKING_TOKENS // config.sequence_length, 1)


def share_of(config: RunConfig, share: float) -> RunConfig:
    """Return a run on a share of the budget, with the whole schedule in it and about as many tokens per decision."""
    if share == 1:
        return config
    step = config.batch_size * config.sequence_length
    tokens = max(round(config.tokens * share), step)
    decisions = max(1, min(round(config.decisions * share), tokens // step))
    warmup = min(round(config.warmup() * share), tokens - 1)
    return replace(config, tokens=tokens, decisions=decisions, warmup_tokens=warmup, warmup_share=None)


@dataclass(frozen=True, kw_only=True)
class RunSpec(JsonRecord):
    """Specification of one run. Two specs with the same key are the same run, for any case or method."""

    left_out_at_default: ClassVar[tuple[str, ...]] = ("compression",)

    config: RunConfig
    steering: SteeringSpec = field(default_factory=SteeringSpec)
    compression: Compression | None = None
    """How the model becomes smaller; `None` where it stays as it is."""

    @property
    def format(self) -> str | None:
        """Format that the final model is used in; `None` is float32."""
        return None if self.compression is None else self.compression.format

    def phases(self) -> tuple[Phase, ...]:
        """Return the parts of the run, each with the model that is trained in it."""
        made, config = self.compression, self.config
        if made is None or made.small is None:
            return (Phase(config=config, decisions=config.decisions),)
        if made.new:
            first, second = share_of(config, made.whole), share_of(config, made.rest)
            ranked, decisions = 0, second.decisions
        else:
            first, second = config, config
            ranked = len(made.sizes) * ranking_sequences(config)
            decisions = config.decisions - self.decisions_before_cut
        small = replace(second, model=made.small)
        teacher = config if made.taught else None
        return (
            Phase(config=first, decisions=first.decisions if made.new else self.decisions_before_cut),
            Phase(config=small, decisions=decisions, teacher=teacher, ranked_sequences=ranked),
        )

    @property
    def decisions_before_cut(self) -> int:
        """Intervals before the model is cut; all of them where it is not cut."""
        made, decisions = self.compression, self.config.decisions
        if made is None or not made.sizes or made.new:
            return decisions
        return max(1, min(round(made.whole * decisions), decisions - 1))

    @property
    def members(self) -> int:
        """Runs that train side by side and count together, in a population; else 1."""
        return int(self.steering.settings["population"]) if self.steering.kind == POPULATION else 1

    def key(self, content: str) -> str:
        """Return the name of the run's file; `content` is the digest of its text and its model."""
        settings = {name: value for name, value in self.steering.settings.items() if name != "path"}
        config = {name: value for name, value in self.config.settings().items() if name not in ("model", "text")}
        label = [FORMAT, content, config, asdict(self.steering) | {"settings": settings}]
        if self.compression is not None:
            label.append({name: value for name, value in asdict(self.compression).items() if name != "small"})
        return digest(label, 10)


@dataclass(frozen=True, kw_only=True)
class IntervalResult(JsonRecord):
    """Stored telemetry of one interval."""

    tokens: int
    """Tokens trained on since the run's start, intervals that were rolled back included."""
    steps: int
    """Optimiser steps in this interval."""
    train_loss: float | None
    """Mean training loss, in nats/token; `None` if it was not finite."""
    validation_loss: float | None
    """Validation loss at the interval's end, in nats/token; `None` if it was not measured."""
    learning_rate: float
    """Learning rate of the last step."""
    learning_rate_scale: float = 1.0
    """Requested factor on the base schedule."""
    finishing: bool = False
    """Whether the cool-down has begun."""
    batch_size: float
    """Mean sequences per step."""
    precision: str
    """Number format of the matrix products."""
    sparsity: float
    """Share of zero weights or of removed channels."""
    probe_sequences: int
    """Sequences of the curvature probe, which makes three forward passes of each; 0 without a probe."""
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
    """The run was later restored to a snapshot from before this interval, or a population went on from others."""

    def controls(self) -> Controls:
        """Return the controls of the interval, in whole sequences per step."""
        return Controls(
            learning_rate_scale=self.learning_rate_scale,
            batch_size=max(1, round(self.batch_size)),
            precision=self.precision,  # type: ignore[arg-type]
            sparsity=self.sparsity,
            finish=self.finishing,
        )


def _columns(intervals: Sequence[IntervalResult]) -> dict[str, list[Any]]:
    """Return the intervals as columns, which takes a fifth of the space; values that are not finite become `None`."""
    columns = {each.name: [getattr(interval, each.name) for interval in intervals] for each in fields(IntervalResult)}
    return {
        name: [null_if_not_finite(value) if isinstance(value, float) else value for value in column]
        for name, column in columns.items()
    }


def _rows(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@dataclass(frozen=True, kw_only=True)
class RunResult(JsonRecord):
    """Result of one run, stored as one JSON file."""

    left_out_at_default: ClassVar[tuple[str, ...]] = ("unquantised_validation_loss",)

    key: str
    spec: RunSpec
    n_parameters: int
    """Of the model at the end."""
    initial_validation_loss: float | None
    """Before training, in nats/token."""
    final_validation_loss: float | None
    """In nats/token, of the model in the format that it is used in; `None` if the run diverged or failed."""
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
    """Whether other runs ran in parallel, so that the measured joules (and seconds) include part of theirs."""
    device: str
    """Device, cores and threads."""
    intervals: Annotated[tuple[IntervalResult, ...], JsonForm(write=_columns, read=_rows)]
    """In the order in which they were trained, those that were rolled back included; of a population those of all
    members, milestone after milestone."""
    guardrails: Mapping[str, Any] | None = None
    """What the guardrails did, from `GuardedController.summary`; `None` for a run without them."""
    unquantised_validation_loss: float | None = None
    """Final validation loss before the model was rounded to its format; `None` where it was not."""

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
    """Share of the case's budget that is counted as used; it differs from `budget` only in planted checks."""
    key: str
    """Names the run's file."""


def cost_key(config: RunConfig) -> str:
    """Return the key of a run's cost table, which depends on model, vocabulary and sequence length."""
    vocabulary = "" if config.vocabulary == RunConfig.vocabulary else f", vocabulary {config.vocabulary}"
    return f"{config.model}, {config.sequence_length} tokens{vocabulary}"


UNTUNED = "cosine"
"""Name of the untuned default: AdamW, cosine to 10 %, at the case's own settings."""
TUNED = "tuned"
"""Name of the tuned static baseline: the best setting for equal tokens."""


@dataclass(frozen=True, kw_only=True)
class Case(JsonRecord):
    """A run that methods are compared on: model, text, budget, starting learning rate and batch."""

    name: str
    config: RunConfig
    """Seed 0; a method's run differs from it in the seed and in what the method sets."""
    architecture: str
    """Name of the architecture in transformers: llama, gpt2, gpt_neox, qwen2, opt."""
    target_loss: float | None = None
    """Validation loss for which the costs are reported; by default the untuned default's median final loss."""


@dataclass(frozen=True, kw_only=True)
class MethodNote(JsonRecord):
    """Description of a method in the report."""

    name: str
    title: str
    """Two or three words for tables and legends."""
    description: str
    """One sentence."""
    family: str
    """Methods of one family share a Pareto front, as a policy under several preferences does."""
    kind: str
    """`untuned`, `tuned`, `heuristic`, `tuning-free`, `compressed`, `policy` or `check`."""
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
    """Settings whose best value lies on the edge of the tried values, so that the grid was too small."""


@dataclass(frozen=True, kw_only=True)
class Comparison(JsonRecord):
    """All runs of one report, with cases, methods and baselines."""

    cases: tuple[Case, ...]
    methods: tuple[MethodNote, ...]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    baselines: Mapping[str, tuple[TunedBaseline, ...]]
    """Tuned settings by case."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Command, versions, machine, wall-clock seconds, jobs, threads."""


# Names of policies --------------------------------------------------------------------------------------------------

POLICY, OPEN_LOOP = "policy", "open-loop"
START = "start="
WITHOUT_GUARDRAILS = "unguarded"


@dataclass(frozen=True, kw_only=True)
class PolicyName:
    """The parts of `policy:FILE`; `@PREFERENCE`, `@start=F` and `@unguarded` may follow in any order."""

    kind: str
    """`policy` or `open-loop`."""
    file: str
    """A bundle's path, or the bare name of one that is shipped with trainpilot."""
    preference: str = ""
    """The preference as written; empty means the default one."""
    start: float | None = None
    """Starting learning rate over the tuned static's; `None` is the case's own rate."""
    guarded: bool = True
    """Whether the policy acts within guardrails, as it does in `replay` and in `Steering`."""

    @classmethod
    def parse(cls, name: str) -> PolicyName:
        """Read a method's name.

        Raises:
            ValueError: no bundle is named, an option is given twice, or a start is no factor above 0.
        """
        kind, _, rest = name.partition(":")
        file, *options = (part.strip() for part in rest.split("@"))
        if not file:
            raise ValueError(f"methods: {name!r} must name a bundle, as in {kind}:runs/agent/policy.safetensors")
        if "" in options:
            raise ValueError(f"methods: an option must follow each @, got {name!r}; leave the @ out")
        starts = [option for option in options if option.startswith(START)]
        unguarded = [option for option in options if option == WITHOUT_GUARDRAILS]
        preferences = [option for option in options if option not in (*starts, *unguarded)]
        if max(len(starts), len(preferences), len(unguarded)) > 1:
            raise ValueError(
                f"methods: {name!r} may hold one preference and one start, as in policy:FILE@time=1, "
                f"and @{WITHOUT_GUARDRAILS} once"
            )
        start = _factor(name, starts[0].removeprefix(START)) if starts else None
        if start is not None and kind == OPEN_LOOP:
            raise ValueError(f"methods: an open loop has no start of its own, got {name!r}; leave out @{starts[0]}")
        return cls(kind=kind, file=file, preference="".join(preferences), start=start, guarded=not unguarded)

    @property
    def short(self) -> str:
        """A short name of the bundle: its folder's, as files are mostly called policy.safetensors."""
        return Path(self.file).parent.name or Path(self.file).stem

    @property
    def family(self) -> str:
        """Name of the Pareto front: one bundle from one start, under any preference."""
        parts = [f"policy {self.file}"]
        parts += [] if self.start is None else [f"from {self.start:g}"]
        parts += [] if self.guarded else [WITHOUT_GUARDRAILS]
        return " ".join(parts)


def is_policy(name: str) -> bool:
    """Return whether a method's name is one of a policy, or of its open loop."""
    return name.startswith((f"{POLICY}:", f"{OPEN_LOOP}:"))


def _factor(name: str, text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise ValueError(f"methods: start must be a factor above 0, as in @start=0.1, got {text!r} in {name!r}")
    return factor
