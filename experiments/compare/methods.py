"""Define the methods that can be compared (schedules, heuristics, policies, searches) and the runs of each on a case.

The heuristics are those that `agents/heuristics.py` registers. A policy's name holds its bundle, and may hold a
preference, where its runs start, and that it acts without guardrails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainpilot.agents.bundle import PolicyBundle, policy_digest, policy_path
from trainpilot.agents.heuristics import HEURISTIC_METHODS, HeuristicMethod
from trainpilot.agents.steering.guardrails import GuardrailSettings
from trainpilot.envs.decision import Preference
from trainpilot.experiments.compare.cases import StaticSetting, rounded
from trainpilot.experiments.compare.compression import HELP as COMPRESSED_HELP
from trainpilot.experiments.compare.compression import CompressedMethod, is_compressed
from trainpilot.experiments.results import (
    POPULATION,
    TUNED,
    WITHOUT_GUARDRAILS,
    Case,
    MethodNote,
    PolicyName,
    RunSpec,
    SteeringSpec,
    is_policy,
)
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.schedules import ScheduleName

USUAL_SCHEDULE: ScheduleName = "linear"
"""Base schedule of a policy whose bundle has none."""


def starts_from_tuned(name: str) -> bool:
    """Return whether a method's runs start at a factor of the tuned static's learning rate."""
    return is_policy(name) and PolicyName.parse(name).start is not None


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A loaded bundle, and the preference of its runs."""

    path: Path
    bundle: PolicyBundle
    preference: Preference

    @classmethod
    def load(cls, name: PolicyName) -> Policy:
        """Read the bundle.

        Raises:
            ValueError: there is no such file, it is no bundle, or the preference cannot be read.
        """
        given = name.preference.replace("+", ",")
        preference = Preference.parse(given) if given else Preference()
        path = policy_path(name.file)
        return cls(path=path, bundle=PolicyBundle.load(path), preference=preference)

    @property
    def training_energy_j(self) -> float | None:
        """Joules that training it took; `None` if unknown."""
        cost = self.bundle.provenance.get("training_cost") or {}
        value = cost.get("energy_j")
        return float(value) if value is not None else None

    def configure(self, config: RunConfig) -> RunConfig:
        """Return a case's run with the policy's base schedule and its decisions, at most one a step."""
        fit = config.tokens // (config.batch_size * config.sequence_length)
        run = replace(config, schedule=USUAL_SCHEDULE, decisions=max(1, min(self.bundle.decisions, fit)))
        base = self.bundle.base_schedule
        if base is None:
            return run
        return replace(run, schedule=base.schedule, warmup_tokens=base.warmup_tokens(config.tokens))


def spoken(preference: Preference) -> str:
    """Return a preference without its zero weights, as in `quality=0.5,time=0.5`."""
    return ",".join(part for part in str(preference).split(",") if not part.endswith("=0"))


def from_tuned(config: RunConfig, tuned: StaticSetting, factor: float) -> RunConfig:
    """Return the run started at `factor` times the tuned learning rate, carried over to its own starting batch."""
    from trainpilot.llm_runtime.schedules import neutral_factor

    rate = factor * tuned.learning_rate * neutral_factor(config.batch_size, tuned.batch_size)
    return replace(config, base_learning_rate=rounded(rate))


PER_SCHEDULE: dict[str, ScheduleName] = {
    "tuned-linear": "linear",
    "tuned-cosine": "cosine",
    "tuned-wsd": "wsd",
    "tuned-constant": "constant",
}


CHECKS: dict[str, Callable[[StaticSetting], tuple[StaticSetting, float]]] = {
    "check-self": lambda setting: (setting, 1.0),
    "check-budget": lambda setting: (setting, 1.25),
    "check-rate": lambda setting: (replace(setting, learning_rate=setting.learning_rate / 4), 1.0),
}
"""Planted methods with a known compute multiplier: the setting, and the share of the budget to run."""


SCHEDULE_FREE_LEARNING_RATE = 2.5e-3
"""Default of the package schedulefree, as used without tuning."""
PRODIGY_FACTOR = 1.0
"""Prodigy adapts its own learning rate; its authors recommend a factor of 1."""

KEEP = SteeringSpec()


@dataclass(frozen=True)
class Method:
    """A method whose runs are determined by case and seed (and the tuned static, for runs that start at its rate)."""

    note: MethodNote
    configure: Callable[[RunConfig], RunConfig]
    """Returns the run on a case's config, before the seed is set."""
    steering: SteeringSpec = KEEP
    start: float | None = None
    """Starting learning rate over the tuned static's; `None` is the rate that `configure` sets."""

    def placed(self, tuned: StaticSetting) -> Method:
        """Return the method with its start at the tuned static's learning rate times `start`."""
        assert self.start is not None, "it starts where the case starts"
        factor = self.start
        return replace(self, configure=lambda config: from_tuned(self.configure(config), tuned, factor), start=None)

    def spec(self, case: Case, seed: int) -> RunSpec:
        """Return the run on a case with a seed."""
        return RunSpec(config=replace(self.configure(case.config), seed=seed), steering=self.steering)


def as_a_law_advises(config: RunConfig) -> RunConfig:
    """Return a run with WSD at the learning rate and batch that Step Law advises for its model and budget.

    Raises:
        ValueError: the model comes trained, of which the law says nothing.
    """
    from trainpilot.llm_runtime.models import body_parameters_of
    from trainpilot.llm_runtime.scaling_laws import step_law

    n_parameters, length = body_parameters_of(config.model), config.sequence_length
    if n_parameters is None:
        raise ValueError(f"method law is of training from scratch, got the trained model {config.model}; leave it out")
    advice = step_law(n_parameters, config.tokens)
    batch_size = advice.batch_size(
        sequence_length=length, n_sequences=config.tokens // length, decisions=config.decisions
    )
    rate = rounded(advice.learning_rate_at(float(batch_size * length)))
    return replace(config, schedule="wsd", batch_size=batch_size, base_learning_rate=rate)


def _set(**fields: Any) -> Callable[[RunConfig], RunConfig]:
    return lambda config: replace(config, **fields)


def _note(name: str, title: str, kind: str, description: str, **more: Any) -> MethodNote:
    return MethodNote(name=name, title=title, kind=kind, description=description, **{"family": name} | more)


def _heuristic(name: str, of: HeuristicMethod) -> Method:
    """Return the method that runs a heuristic."""

    def configure(config: RunConfig) -> RunConfig:
        decisions = config.decisions if of.max_decisions is None else min(config.decisions, of.max_decisions)
        return replace(config, decisions=decisions, **of.run)

    steering = SteeringSpec(kind=name, settings=of.settings, evaluate_every=of.evaluate_every)
    return Method(_note(name, of.title, "heuristic", of.description), configure, steering)


_SIMPLE = (
    Method(
        _note("constant", "constant", "untuned", "AdamW at the case's own learning rate, no decay."),
        _set(schedule="constant"),
    ),
    Method(
        _note("cosine", "cosine to 10 %", "untuned", "The untuned default: AdamW, its own rate, cosine to 10 %."),
        _set(schedule="cosine"),
    ),
    Method(
        _note("linear", "linear to zero", "untuned", "AdamW at the case's own learning rate, linear to zero."),
        _set(schedule="linear"),
    ),
    Method(
        _note("wsd", "WSD", "untuned", "AdamW at the case's own learning rate, the last fifth linear to zero."),
        _set(schedule="wsd"),
    ),
    Method(
        _note("schedule-free", "schedule-free AdamW", "tuning-free", "schedulefree's AdamW with its default rate."),
        _set(optimizer="schedule-free", schedule="constant", base_learning_rate=SCHEDULE_FREE_LEARNING_RATE),
    ),
    Method(
        _note("prodigy", "Prodigy", "tuning-free", "prodigyopt's Prodigy, factor 1, cosine to 10 %."),
        _set(optimizer="prodigy", schedule="cosine", base_learning_rate=PRODIGY_FACTOR),
    ),
    Method(
        _note("law", "Step Law + WSD", "untuned", "AdamW at the learning rate and batch that Step Law advises, WSD."),
        as_a_law_advises,
    ),
    *(_heuristic(name, of) for name, of in HEURISTIC_METHODS.items()),
)
SIMPLE: Mapping[str, Method] = {method.note.name: method for method in _SIMPLE}

SEARCHED: Mapping[str, MethodNote] = {
    note.name: note
    for note in (
        _note("tuned", "tuned static", "tuned", "Best static setting for equal tokens.", family="tuned static"),
        _note("tuned-linear", "tuned linear", "tuned", "Linear to zero with its own best rate."),
        _note("tuned-cosine", "tuned cosine", "tuned", "Cosine to 10 % with its own best rate."),
        _note("tuned-wsd", "tuned WSD", "tuned", "WSD with its own best rate."),
        _note("tuned-constant", "tuned constant", "tuned", "No decay, with its own best rate."),
        _note("check-self", "check: itself", "check", "The tuned static again: must come out as 1.00."),
        _note("check-budget", "check: 1.25 x budget", "check", "The tuned static with a quarter more, not counted."),
        _note("check-rate", "check: rate / 4", "check", "The tuned static with a quarter of its learning rate."),
    )
}
COST_NOTES: Mapping[str, MethodNote] = {
    "tuned-time": _note("tuned-time", "tuned for time", "tuned", "Best for equal seconds.", family="tuned static"),
    "tuned-energy": _note("tuned-energy", "tuned for energy", "tuned", "Best for equal joules.", family="tuned static"),
}
"""Methods that are added if the best setting for a cost differs from that for tokens."""

OPTIONAL: Mapping[str, MethodNote] = {
    "tuned-tpe": _note("tuned-tpe", "tuned by TPE", "tuned", "Best of Optuna's TPE with as many runs as the grid."),
    "tuned-halving": _note(
        "tuned-halving", "tuned by halving", "tuned", "Best of Optuna's successive halving with eight runs' tokens."
    ),
    "nsga2": _note("nsga2", "NSGA-II", "tuned", "Front of Optuna's NSGA-II over settings, width and depth."),
}

OPTIONAL_RUNS: Mapping[str, float] = {"tuned-tpe": 78, "tuned-halving": 8, "nsga2": 60}
"""Cost of each of these searches, in runs of the whole budget."""

BY_NAME_ALONE = ("law", "greedy")
"""Simple methods that are left out by default."""
DEFAULT_METHODS = (*(name for name in SIMPLE if name not in BY_NAME_ALONE), *SEARCHED)
HELP = (
    f"{', '.join(SIMPLE)}; {', '.join(SEARCHED)}; {', '.join(OPTIONAL)}; {COMPRESSED_HELP}; "
    "policy:FILE[@quality=0.5+energy=0.5][@start=0.1][@unguarded] for a bundle or the name of one that comes with "
    "trainpilot, started at the case's learning rate or at so many times the tuned static's, within the guardrails "
    "of `replay` or without them; "
    "open-loop:FILE for its average schedule without feedback; "
    f"{POPULATION} or {POPULATION}@8 for Ray Tune's Population Based Training of four runs, or of eight"
)


def known_methods() -> tuple[str, ...]:
    """Return the names that need no file."""
    return (*SIMPLE, *SEARCHED, *OPTIONAL, POPULATION)


MEMBERS, MAX_MEMBERS = 4, 1024
MILESTONES = 5
"""Stretches that the budget of a population's runs is divided into; between two of them the worst copy the best."""


def is_population(name: str) -> bool:
    """Return whether a method's name is `pbt`, or `pbt@` with a number."""
    return name.partition("@")[0] == POPULATION


def members_of(name: str) -> int:
    """Return how many runs a method makes for each seed: those of a population, or 1.

    Raises:
        ValueError: the size of a population is no whole number in its range.
    """
    _, at, size = name.partition("@")
    if not is_population(name) or not at:
        return MEMBERS if is_population(name) else 1
    if not size.isdecimal() or not 2 <= int(size) <= MAX_MEMBERS:
        raise ValueError(f"methods: a population must have 2 to {MAX_MEMBERS} runs, as in {POPULATION}@8, got {name!r}")
    return int(size)


def population_method(name: str) -> Method:
    """Return the method `pbt` or `pbt@8`. Raises `ValueError` under the same conditions as `members_of`."""
    members = members_of(name)
    note = _note(
        name,
        f"PBT of {members}",
        "heuristic",
        f"Ray Tune's Population Based Training of learning rate and batch: {members} runs, which all count.",
    )
    settings = {"population": members, "milestones": MILESTONES}
    return Method(note, _set(schedule=USUAL_SCHEDULE), SteeringSpec(kind=POPULATION, settings=settings))


def policy_method(name: str) -> Method:
    """Return the method `policy:FILE[@PREFERENCE][@start=F][@unguarded]`.

    Raises:
        ValueError: the name cannot be read, the file is no bundle, or the preference is none.
    """
    named = PolicyName.parse(name)
    policy = Policy.load(named)
    words = [named.short]
    words += [] if named.start is None else [f"\N{MULTIPLICATION SIGN} {named.start:g}"]
    words += [spoken(policy.preference)] if named.preference else []
    words += [] if named.guarded else [WITHOUT_GUARDRAILS]
    began = "" if named.start is None else f", started at {named.start:g} times the tuned static's learning rate"
    bounds = "within" if named.guarded else "without"
    note = _note(
        name,
        " ".join(words),
        "policy",
        f"The policy {named.file}, which decides from the run's telemetry, {bounds} guardrails{began}.",
        family=named.family,
        training_energy_j=policy.training_energy_j,
    )
    settings: dict[str, Any] = {
        "path": str(policy.path),
        "digest": policy_digest(policy.path),
        "preference": str(policy.preference),
    }
    if named.guarded:  # a run without this entry is unguarded, as all were before this option existed
        settings["guardrails"] = asdict(GuardrailSettings())
    return Method(note, policy.configure, SteeringSpec(kind="policy", settings=settings, probe=True), start=named.start)


def open_loop_note(name: str) -> MethodNote:
    """Return the note of `open-loop:FILE`. Raises `ValueError` under the same conditions as `policy_method`."""
    named = PolicyName.parse(name)
    policy = Policy.load(named)
    description = f"The average schedule of {named.file} over all cases, without feedback."
    more = {"family": named.family, "training_energy_j": policy.training_energy_j}
    title = "open loop" if named.guarded else f"open loop {WITHOUT_GUARDRAILS}"
    return _note(name, title, "policy", description, **more)


def open_loop_method(note: MethodNote, closed: Method, schedule: Any) -> Method:
    """Return the method that replays `schedule`, the average of a closed-loop method's runs."""
    return Method(note, closed.configure, SteeringSpec(kind="open-loop", settings={"schedule": schedule}))


def rests_on_search(names: Sequence[str]) -> bool:
    """Return whether any of the methods needs the tuned static's search."""
    return any(name == TUNED or name in PER_SCHEDULE or name in CHECKS or starts_from_tuned(name) for name in names)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The methods of one comparison, grouped by how they run."""

    names: tuple[str, ...]
    direct: tuple[Method, ...]
    """Methods that need no search."""
    searched: tuple[str, ...]
    """Methods that need the tuned static's search."""
    started: tuple[Method, ...]
    """Policies that start at a factor of the tuned static's learning rate, so that they need its search too."""
    optional: tuple[str, ...]
    """Other searches."""
    open_loop: tuple[tuple[Method, MethodNote], ...]
    """A policy's closed loop, and the note of its average schedule."""
    compressed: tuple[CompressedMethod, ...] = ()
    """Methods that make the model smaller or cheaper; they take the tuned static's setting where there is one."""

    @property
    def tunes(self) -> bool:
        """Whether the tuned static is searched."""
        return bool(self.searched or self.started)

    @property
    def varies_size(self) -> bool:
        """Whether models of other sizes than the cases' will run."""
        return "nsga2" in self.optional

    @property
    def populations(self) -> tuple[str, ...]:
        """Methods that need Ray Tune."""
        return tuple(name for name in self.names if is_population(name))

    def notes(self, with_rows: Collection[str]) -> tuple[MethodNote, ...]:
        """Return the notes of all methods, in the order of their names; those that were added come last."""
        known = {**SEARCHED, **OPTIONAL, **{m.note.name: m.note for m in (*self.direct, *self.started)}}
        known |= {note.name: note for _, note in self.open_loop}
        known |= {method.note.name: method.note for method in self.compressed}
        named = [known[name] for name in self.names]
        extra = {**SEARCHED, **COST_NOTES, **_front_notes(with_rows)}
        return (*named, *(note for name, note in extra.items() if name in with_rows and name not in self.names))

    def any_spec(self, case: Case) -> RunSpec:
        """Return a run on a case, for checking that the case can be run at all."""
        return SIMPLE["cosine"].spec(case, 0)


def _front_notes(names: Collection[str]) -> dict[str, MethodNote]:
    """Return a note for every judged point of NSGA-II's front: `nsga2-1`, the cheapest, and so on."""
    front = OPTIONAL["nsga2"]
    points = sorted(name for name in names if name.startswith(f"{front.name}-"))
    return {name: replace(front, name=name, title=f"{front.title} {name.rpartition('-')[2]}") for name in points}


def choose_methods(text: str) -> Chosen:
    """Return the methods in a comma-separated list of names; `default` means all that need no file.

    Raises:
        ValueError: a method does not exist or is named twice, or a policy's file cannot be used.
    """
    names: list[str] = []
    parts = re.split(r",(?!\s*\w+\s*=)", text)  # not between the weights of a policy's preference
    for name in map(str.strip, parts):
        if not name and len(parts) > 1:
            raise ValueError(f"methods must be names with commas between them, got an empty one in {text!r}")
        names += DEFAULT_METHODS if name == "default" else [name] if name else []
    check_names(names)
    policies = [policy_method(name) for name in names if name.startswith("policy:")]
    open_loop = [name for name in names if name.startswith("open-loop:")]
    return Chosen(
        names=tuple(names),
        direct=(
            *(SIMPLE[name] for name in names if name in SIMPLE),
            *(population_method(name) for name in names if is_population(name)),
            *(policy for policy in policies if policy.start is None),
        ),
        searched=tuple(name for name in names if name in SEARCHED),
        started=tuple(policy for policy in policies if policy.start is not None),
        optional=tuple(name for name in names if name in OPTIONAL),
        open_loop=tuple((policy_method(name), open_loop_note(name)) for name in open_loop),
        compressed=tuple(CompressedMethod.parse(name) for name in names if is_compressed(name)),
    )


def check_names(names: Sequence[str]) -> None:
    """Raise `ValueError` for a method that does not exist, or is named twice."""
    for name in names:
        known = name in known_methods() or is_policy(name) or is_compressed(name) or is_population(name)
        if not known:
            raise ValueError(f"methods must be among {HELP}; got {name!r}")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"methods must be named once each, got {twice[0]!r} twice")
    if not names:
        raise ValueError("methods must name at least one method, got none")
