"""Turn the steering that a run's spec names into the thing that decides during the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.controller import Controller
from trainpilot.agents.heuristics import (
    GradualPruning,
    KeepBase,
    NoiseScaleBatch,
    OpenLoop,
    RandomPolicy,
    ReduceOnPlateau,
    Seesaw,
    Steerer,
)
from trainpilot.envs.decision import Preference
from trainpilot.experiments.compare.records import Steering

if TYPE_CHECKING:
    from trainpilot.llm_runtime.live_run import LiveRun

Settings = Mapping[str, Any]
Maker = Callable[[Settings, "LiveRun"], Steerer]


def make_steerer(steering: Steering, run: LiveRun) -> Steerer:
    """Return what sets the controls of `run`.

    Raises:
        ValueError: the kind is unknown, or its policy file cannot be used.
    """
    if steering.kind not in MAKERS:
        raise ValueError(f"steering must be one of {', '.join(MAKERS)}, got {steering.kind!r}")
    return MAKERS[steering.kind](steering.settings, run)


def _policy(settings: Settings, run: LiveRun) -> Steerer:
    bundle = PolicyBundle.load(Path(settings["path"]))
    return Controller.of_bundle(bundle, run.limits(), Preference.parse(settings["preference"]))


MAKERS: Mapping[str, Maker] = {
    "keep": lambda settings, run: KeepBase(run.base_limits()),
    "plateau": lambda settings, run: ReduceOnPlateau(run.base_limits(), **settings),
    "noise-batch": lambda settings, run: NoiseScaleBatch(run.base_limits(), **settings),
    "seesaw": lambda settings, run: Seesaw(run.base_limits(), run.config, **settings),
    "gradual-pruning": lambda settings, run: GradualPruning(run.base_limits(), **settings),
    "random": lambda settings, run: RandomPolicy(run.limits(), run.config.seed),
    "policy": _policy,
    "open-loop": lambda settings, run: OpenLoop.from_json(settings["schedule"], run.base_limits()),
}
