"""Policies by name: which bundle, under which preference, and where their runs start."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from trainpilot.agents.bundle import PolicyBundle, policy_path
from trainpilot.envs.decision import Preference
from trainpilot.experiments.compare.settings import Setting, rounded
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.schedules import ScheduleName

POLICY, OPEN_LOOP = "policy", "open-loop"
START = "start="
USUAL_SCHEDULE: ScheduleName = "linear"
"""Base schedule of a policy whose bundle brings none."""


@dataclass(frozen=True, kw_only=True)
class PolicyName:
    """What a method's name says: `policy:FILE`, with `@PREFERENCE` and `@start=F` behind it in any order."""

    kind: str
    """`policy` or `open-loop`."""
    file: str
    """A bundle's path, or the bare name of one that comes with trainpilot."""
    preference: str = ""
    """As written; empty is the usual one."""
    start: float | None = None
    """Starting learning rate over the tuned static's; `None` is the case's own rate."""

    @classmethod
    def parse(cls, name: str) -> PolicyName:
        """Read a method's name.

        Raises:
            ValueError: no bundle is named, something is named twice, or a start is none.
        """
        kind, _, rest = name.partition(":")
        file, *options = (part.strip() for part in rest.split("@"))
        if not file:
            raise ValueError(f"methods: {name!r} must name a bundle, as in {kind}:runs/agent/policy.safetensors")
        starts = [option for option in options if option.startswith(START)]
        preferences = [option for option in options if option and option not in starts]
        if len(starts) > 1 or len(preferences) > 1:
            raise ValueError(f"methods: {name!r} may hold one preference and one start, as in policy:FILE@time=1")
        start = _factor(name, starts[0].removeprefix(START)) if starts else None
        if start is not None and kind == OPEN_LOOP:
            raise ValueError(f"methods: an open loop has no start of its own, got {name!r}; leave out @{starts[0]}")
        return cls(kind=kind, file=file, preference="".join(preferences), start=start)

    @property
    def short(self) -> str:
        """The bundle in a word or two: files are mostly called policy.safetensors, so their folder's name."""
        return Path(self.file).parent.name or Path(self.file).stem

    @property
    def family(self) -> str:
        """What shares a front: one bundle under several preferences, started at the same rate."""
        return f"policy {self.file}" + ("" if self.start is None else f" from {self.start:g}")


def is_policy(name: str) -> bool:
    """Return whether a method's name is one of a policy, or of its open loop."""
    return name.startswith((f"{POLICY}:", f"{OPEN_LOOP}:"))


def starts_from_tuned(name: str) -> bool:
    """Return whether a method's runs start at a factor of the tuned static's learning rate."""
    return is_policy(name) and PolicyName.parse(name).start is not None


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A bundle that has been read, and what its runs are steered towards."""

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
        """Joules that training it took; `None` where nobody knows."""
        cost = self.bundle.provenance.get("training_cost") or {}
        value = cost.get("energy_j")
        return float(value) if value is not None else None

    def configure(self, config: RunConfig) -> RunConfig:
        """Return a case's run as this policy wants it: its base schedule, and as many of its decisions as fit."""
        fit = config.tokens // (config.batch_size * config.sequence_length)
        run = replace(config, schedule=USUAL_SCHEDULE, decisions=max(1, min(self.bundle.decisions, fit)))
        base = self.bundle.base_schedule
        if base is None:
            return run
        return replace(run, schedule=base.schedule, warmup_tokens=base.warmup_tokens(config.tokens))


def spoken(preference: Preference) -> str:
    """Return a preference without what weighs nothing: `quality=0.5,time=0.5`."""
    return ",".join(part for part in str(preference).split(",") if not part.endswith("=0"))


def from_tuned(config: RunConfig, tuned: Setting, factor: float) -> RunConfig:
    """Return the run started at `factor` times the tuned learning rate, carried over to its own starting batch."""
    from trainpilot.llm_runtime.schedules import neutral_factor

    rate = factor * tuned.learning_rate * neutral_factor(config.batch_size, tuned.batch_size)
    return replace(config, base_learning_rate=rounded(rate))


def _factor(name: str, text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise ValueError(f"methods: start must be a factor above 0, as in @start=0.1, got {text!r} in {name!r}")
    return factor
