"""Save a trained policy as one small file, and load it without running any code from it.

A bundle is a safetensors file: the weights of the policy network, and a JSON text in the header. The JSON holds the
table of actions, which must match this version, the observation fields that the policy sees, which this version must
know, and the policy's provenance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from trainpilot.envs.action import ACTION_FIELDS, split_choices
from trainpilot.envs.decision import N_STACK
from trainpilot.envs.observation import OBSERVATION_FIELDS, ObservationField
from trainpilot.llm_runtime.config import MAX_DECISIONS, RunConfig
from trainpilot.llm_runtime.files import digest, whole_file
from trainpilot.llm_runtime.json_records import JsonRecord
from trainpilot.llm_runtime.plain_values import check_plain, parse_json, printable, shown
from trainpilot.llm_runtime.ranges import Range, check_ranges
from trainpilot.llm_runtime.schedules import SCHEDULES, ScheduleName

POLICIES = Path(__file__).with_name("policies")
"""Folder of the policies that are shipped with trainpilot."""
FIRST_LAYER = "hidden.0.weight"
"""Name of the first layer's weights, where there is a hidden layer."""
FORMAT = 1
MAX_BYTES = 16 * 2**20
"""Largest file that is read as a bundle; policy networks are much smaller."""
MAX_WEIGHT = 1e4
"""Largest weight that is read. Those of trained policies lie below 10; far larger ones overflow in the logits."""


def policy_path(name: str) -> Path:
    """Return the file of a policy: a bare name is one that is shipped with trainpilot, anything else is a path.

    Raises:
        ValueError: no policy of that name is shipped. A path is checked when it is loaded.
    """
    path = Path(name)
    if path.suffix or path.name != name:
        return path
    shipped = POLICIES / f"{name}.safetensors"
    if not shipped.is_file():
        known = ", ".join(shipped_policies()) or "none"
        raise ValueError(
            f"policy: no policy named {name!r} comes with trainpilot, which has: {known}; "
            f"write a file with its suffix or folder, such as ./{name or 'policy.safetensors'}"
        )
    return shipped


def shipped_policies() -> list[str]:
    """Return the names of the policies that are shipped with trainpilot."""
    return sorted(file.stem for file in POLICIES.glob("*.safetensors"))


def policy_digest(path: Path) -> str:
    """Return a digest of a policy's file, by which a changed file is recognised."""
    return digest(path.read_bytes())


def field_tables(fields: Sequence[ObservationField] = OBSERVATION_FIELDS) -> dict[str, Any]:
    """Return the tables of outputs and inputs of a policy with these observation fields, as a bundle holds them."""
    return {
        "actions": [{"name": f.name, "choices": list(f.choices)} for f in ACTION_FIELDS],
        "observations": [_entry(each) for each in fields],
        "n_stack": N_STACK,
    }


def _entry(field: ObservationField) -> dict[str, Any]:
    return {"name": field.name, "low": field.low, "high": field.high}


@dataclass(frozen=True, kw_only=True)
class BaseSchedule:
    """The base schedule that a policy was trained to multiply."""

    schedule: ScheduleName
    """Name of the decay."""
    warmup_share: Annotated[float, Range(0, 1, below=True)]
    """Share of the budget that is linear warm-up."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        check_ranges(self)

    def on(self, config: RunConfig) -> RunConfig:
        """Return a run with this base schedule."""
        if config.budget is not None:
            return replace(config, schedule=self.schedule, warmup_tokens=None, warmup_share=self.warmup_share)
        tokens = self.warmup_tokens(config.tokens)
        return replace(config, schedule=self.schedule, warmup_tokens=tokens, warmup_share=None)

    def warmup_tokens(self, tokens: int) -> int:
        """Return the tokens of warm-up under a budget of `tokens`."""
        return int(self.warmup_share * tokens)


@dataclass(frozen=True)
class PolicyBundle:
    """A policy network and its provenance."""

    weights: Mapping[str, np.ndarray]
    """`hidden.I.weight`, `hidden.I.bias`, `action.weight`, `action.bias`, float32."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Training cases, preference range, decisions per run, versions and training cost, as plain JSON values."""
    fields: tuple[ObservationField, ...] = OBSERVATION_FIELDS
    """Observation fields that the policy sees, in the order of its inputs."""

    @property
    def decisions(self) -> int:
        """Decisions per run that the policy was trained with."""
        return int(self.provenance.get("decisions", 50))

    @property
    def base_schedule(self) -> BaseSchedule | None:
        """The base schedule that the policy was trained with; `None` if the bundle names none."""
        stored = self.provenance.get("base_schedule")
        return None if stored is None else BaseSchedule(**stored)

    @property
    def start_scale(self) -> float:
        """Learning-rate scale that runs begin with, before the first decision: 1 is the base schedule's own rate.

        A policy that begins lower and doubles the rate where the run bears it is not hurt by a rate that was far too
        high, and loses next to nothing where it was right.
        """
        return float(self.provenance.get("start_scale", 1.0))

    def logits(self, observation: np.ndarray) -> np.ndarray:
        """Return the logits of all choices, float32 of shape (..., sum of choices), for observations (..., inputs)."""
        x = observation.astype(np.float32)
        for index in range(self._n_hidden()):
            x = np.tanh(x @ self.weights[f"hidden.{index}.weight"].T + self.weights[f"hidden.{index}.bias"])
        return np.asarray(x @ self.weights["action.weight"].T + self.weights["action.bias"])

    def choose(self, observations: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """Return the most likely allowed choice of every action field, shape (..., action fields).

        Args:
            observations: Shape (..., inputs).
            masks: Whether a choice is allowed, shape (..., sum of choices).
        """
        logits = np.where(masks, self.logits(observations), -np.inf)
        return np.stack([part.argmax(axis=-1) for part in split_choices(logits)], axis=-1)

    def act(self, observation: np.ndarray, masks: np.ndarray) -> tuple[int, ...]:
        """Return `choose` for the one observation of a run, as an action."""
        return tuple(self.choose(observation, masks).tolist())

    def _n_hidden(self) -> int:
        return sum(name.startswith("hidden.") and name.endswith(".weight") for name in self.weights)

    def digest(self) -> str:
        """Return a digest of what the policy decides by: its weights and the fields that it sees."""
        content = [str([each.name for each in self.fields]).encode()]
        content += [name.encode() + self.weights[name].tobytes() for name in sorted(self.weights)]
        return digest(b"".join(content))

    def save(self, path: str | Path) -> None:
        """Write the bundle; an interrupted write leaves no damaged file."""
        content = {"format": FORMAT, "fields": field_tables(self.fields), "provenance": dict(self.provenance)}
        metadata = {"trainpilot": json.dumps(content, allow_nan=False)}
        weights = {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in self.weights.items()}
        with whole_file(Path(path)) as temporary:
            temporary.write_bytes(to_bytes(weights, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> PolicyBundle:
        """Read a bundle from its file.

        Raises:
            ValueError: there is no such file, it is not a bundle, or its fields, shapes or values do not fit this
                version.
        """
        path = Path(path)
        content, weights = _read(path)
        try:
            fields = _listed_fields(content)
            _check_weights(weights, len(fields))
            Provenance.check(content.get("provenance", {}))
        except ValueError as error:
            raise ValueError(f"policy: {path}: {error}; retrain it") from error
        return cls(weights, content.get("provenance", {}), fields)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not path.is_file():
        raise ValueError(f"policy: no file {path}; give 'none' or a bundle that train-agent wrote")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"policy: {path} is larger than {MAX_BYTES // 2**20} MiB and cannot be a bundle")
    head = path.read_bytes()[:9]
    pickled = head[:1] == b"\x80" and head[8:] != b"{"  # a safetensors header begins there; its length may end in 0x80
    if pickled or head[:4] == b"PK\x03\x04":
        raise ValueError(
            f"policy: {path} is a pickle or an SB3 zip, which could run code when loaded; "
            "give the .safetensors bundle that train-agent wrote"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            content = parse_json((file.metadata() or {})["trainpilot"])
            weights = {name: _tensor(file, name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        why = str(error) if type(error) is ValueError else type(error).__name__
        raise ValueError(f"policy: {path} is not a trainpilot bundle ({why})") from error
    if not isinstance(content, dict):
        raise ValueError(f"policy: {path} is not a trainpilot bundle (its header is no JSON object)")
    return content, weights


def _tensor(file: Any, name: str) -> np.ndarray:
    """Return a tensor of the file. Raises `ValueError` for one of another type than float32."""
    kind = file.get_slice(name).get_dtype()
    if kind != "F32":
        raise ValueError(f"weights must be F32, got {kind} in {shown(name)}")
    tensor: np.ndarray = file.get_tensor(name)
    return tensor


@dataclass(frozen=True, kw_only=True)
class _Tables(JsonRecord):
    """The tables of outputs and inputs in a bundle's header."""

    actions: tuple[Mapping[str, Any], ...]
    observations: tuple[Mapping[str, Any], ...]
    n_stack: int


def _listed_fields(content: Mapping[str, Any]) -> tuple[ObservationField, ...]:
    """Return the observation fields that a bundle lists, looked up by name, once its tables are known to fit."""
    if content.get("format") != FORMAT:
        raise ValueError(f"it has format {shown(content.get('format'))}, expected {FORMAT}")
    stored, expected = _Tables.from_json(content.get("fields", {})), field_tables()
    differences = {
        "actions": _first_difference(stored.actions, expected["actions"]),
        "observations": _first_unknown(stored.observations, expected["observations"]),
    }
    for table, difference in differences.items():
        if difference:
            raise ValueError(f"it does not fit this version: {table}: {difference}")
    if stored.n_stack != N_STACK:
        raise ValueError(f"it has n_stack {stored.n_stack}, expected {N_STACK}")
    known = {each.name: each for each in OBSERVATION_FIELDS}
    return tuple(known[entry["name"]] for entry in stored.observations)


def _first_unknown(stored: Sequence[Mapping[str, Any]], known: Sequence[Any]) -> str | None:
    """Return what is wrong with the observation fields of a bundle: each must be known, and be listed once."""
    by_name = {entry["name"]: entry for entry in known}
    listed: set[str] = set()
    for entry in stored:
        name = entry.get("name")
        if not isinstance(name, str) or name not in by_name:
            return f"{shown(name)} is unknown"
        if entry != by_name[name]:
            return f"{name!r} is {shown(entry)}, expected {by_name[name]}"
        if name in listed:
            return f"{name!r} is listed twice"
        listed.add(name)
    return None if listed else "there are none"


def _first_difference(stored: Sequence[Mapping[str, Any]], expected: Sequence[Any]) -> str | None:
    names = [entry.get("name") for entry in stored]
    known = [entry["name"] for entry in expected]
    if missing := [name for name in known if name not in names]:
        return f"{missing[0]!r} is missing"
    if unknown := [name for name in names if name not in known]:
        return f"{shown(unknown[0])} is unknown"
    if len(names) > len(known):
        return "a control is listed twice"
    for entry, wanted in zip(stored, expected, strict=True):
        if entry != wanted:
            return f"{entry.get('name')!r} is {shown(entry)}, expected {wanted}"
    return None


def _check_weights(weights: Mapping[str, np.ndarray], n_fields: int) -> None:
    """Check the shapes of a bundle's layers, and that their weights are finite and of a usual size."""
    size = N_STACK * n_fields
    n_choices = sum(len(f.choices) for f in ACTION_FIELDS)
    hidden = [name for name in weights if name.startswith("hidden.") and name.endswith(".weight")]
    layers = [*(f"hidden.{index}" for index in range(len(hidden))), "action"]
    if odd := set(weights) - {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}:
        raise ValueError(f"weights must be those of hidden layers and of action, got {shown(min(odd))}")
    for layer in layers:
        weight, bias = weights.get(f"{layer}.weight"), weights.get(f"{layer}.bias")
        if weight is None or bias is None or bias.ndim != 1 or not len(bias) or weight.shape != (len(bias), size):
            got = [None if each is None else each.shape for each in (weight, bias)]
            raise ValueError(f"{layer} must map {size} inputs by a matrix and a vector, got {got[0]} and {got[1]}")
        size = len(bias)
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise ValueError(f"{layer} holds values that are not finite")
        largest = max(float(np.abs(each).max()) for each in (weight, bias))
        if largest > MAX_WEIGHT:
            raise ValueError(f"{layer} must hold weights of at most {MAX_WEIGHT:g}, got {largest:g}")
    if size != n_choices:
        raise ValueError(f"action must have {n_choices} outputs, got {size}")


@dataclass(frozen=True, kw_only=True)
class Provenance(JsonRecord):
    """The parts of a provenance that something relies on; the others are kept and shown, and decide nothing."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "ignore"}

    decisions: Any = 50
    """Decisions per run, in [1, `MAX_DECISIONS`]."""
    start_scale: Any = 1.0
    """Learning-rate scale that runs begin with, in (0, 1]."""
    base_schedule: dict[str, Any] | None = None
    """Fields of a `BaseSchedule`."""
    training_cost: dict[str, Any] | None = None
    """Decisions, episodes, joules and seconds, in all and by stage; `None` where unknown."""
    domain: dict[str, Any] | None = None
    """What the policy was trained on, by fact: two numbers, names, a single value, or the base schedule's fields."""
    simulator: dict[str, Any] | None = None
    """Settings of the training in the simulator."""
    simulator_seed: int | None = None
    """Seed of the agent in the simulator, which names its folder."""

    def __post_init__(self) -> None:
        if not (isinstance(self.decisions, int) and 1 <= self.decisions <= MAX_DECISIONS):
            raise ValueError(f"decisions must be a whole number in [1, {MAX_DECISIONS:,}], got {shown(self.decisions)}")
        if not (_is_number(self.start_scale) and 0 < self.start_scale <= 1):
            raise ValueError(f"start_scale must be a number in (0, 1], got {shown(self.start_scale)}")
        if self.base_schedule is not None:
            _check_schedule("base_schedule", self.base_schedule)
        _check_costs(self.training_cost or {})
        _check_domain(self.domain or {})
        widening = (self.simulator or {}).get("widening")
        if widening is not None:
            _check_widening(widening)

    @classmethod
    def check(cls, content: object) -> None:
        """Check a provenance as a bundle holds it.

        Raises:
            ValueError: it is no mapping of plain values within the bounds, or one of its parts is wrong.
        """
        check_plain(content)
        if not isinstance(content, Mapping):
            raise ValueError(f"provenance must hold names and values, got {shown(content)}")
        known = cls.__dataclass_fields__
        cls.from_json({name: value for name, value in content.items() if name in known})


def _check_schedule(name: str, stored: Mapping[str, Any]) -> None:
    try:
        BaseSchedule(**stored)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _check_costs(costs: Mapping[str, Any]) -> None:
    for name, cost in costs.items():
        if isinstance(cost, dict):
            _check_costs(cost)
        elif cost is not None and not (_is_number(cost) and cost >= 0):
            raise ValueError(f"training_cost: {printable(name)} must be a number >= 0, got {shown(cost)}")


def _check_domain(domain: Mapping[str, Any]) -> None:
    for name, known in domain.items():
        if isinstance(known, dict):
            _check_schedule(f"domain: {printable(name)}", known)
        elif isinstance(known, list):
            names = bool(known) and all(isinstance(each, str) for each in known)
            if not (names or _is_range(known)):
                raise ValueError(f"domain: {printable(name)} must be names or two rising numbers, got {shown(known)}")
        elif not isinstance(known, str) and not _is_number(known):
            raise ValueError(f"domain: {printable(name)} must be a number, got {shown(known)}")


def _check_widening(widening: object) -> None:
    if not isinstance(widening, Mapping):
        raise ValueError(f"simulator.widening must hold names and values, got {shown(widening)}")
    if (budget := widening.get("budget")) and not _is_range(budget):
        raise ValueError(f"simulator.widening.budget must be two rising numbers, got {shown(budget)}")
    for name in ("scratch", "fine_tuning"):
        if not _is_number(share := widening.get(name, 0.0)):
            raise ValueError(f"simulator.widening.{name} must be a number, got {shown(share)}")


def _is_range(value: object) -> bool:
    if not (isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))):
        return False
    return bool(value[0] <= value[1])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
