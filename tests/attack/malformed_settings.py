"""Settings that make no sense, given to what a training loop makes: each must be refused by its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.attack.attempts import Attempt, Failures, one_line
from tests.attack.file_checks import Judge
from trainpilot import Steering, SteeringSettings
from trainpilot.agents.bundle import BaseSchedule
from trainpilot.agents.steering.contract import QualityContract
from trainpilot.agents.steering.guardrails import GuardrailSettings

COUNTS = (0, -1, 1.5, "4", math.nan, True, [4])
NOT_POSITIVE = (0, -1.0, math.nan, math.inf, "1")
WRONG: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "SteeringSettings": {
        "sequences": COUNTS,
        "batch_size": (*COUNTS, None, 10**9),
        "sequence_length": (*COUNTS, None),
        "decisions": (*COUNTS, 10**9),
        "epoch_sequences": (0, "4", math.nan),
        "min_batch_size": (0, 99, "4"),
        "max_batch_size": (0, 1, "4"),
        "budget": ("", "x", "-5s", "nan s", "1M", 5),
        "policy": ("nosuch", "", 7, None, "/dev/null"),
        "mode": ("", "watch", None),
        "preference": ("", "x", "quality=-1", "quality=nan", None, 7),
        "base_schedule": ("wsd", 7, {}),
        "gradient_clip": NOT_POSITIVE[:3],
        "precisions": ((), ("fp8",), ("fp16",), "fp32", ("fp32", "x"), None),
        "pruning": ("x", "width", None),
        "guardrails": (None, {}, 7),
        "contract": ({}, 7, "yes"),
        "fine_tuning": ("yes", 7),
    },
    "QualityContract": {
        "max_loss_increase": (-0.1, math.nan, math.inf, "x", None),
        "max_slowdown": (-0.1, math.nan, "x", None),
        "evidence_share": (0, 0.5, 1, -1, math.nan, "x"),
        "reference": ("losses", 7, (), ((0.1, 2.0),), ((0.2, 2.0), (0.1, 1.9)), ((0.1, math.nan), (0.2, 2.0)),
                      ((0.1, -5.0), (0.2, -5.0)), ((0.1, 1e9), (0.2, 1e9)), ((0.1, 0.0), (0.2, 0.0)),
                      ((-1.0, 2.0), (0.2, 2.0)), ((0.1, 2.0), (5.0, 2.0)), ((0.1, "2"), (0.2, "2")), (1, 2)),
        "reference_s_per_token": (0.0, -1.0, math.nan, math.inf, "x"),
        "paired": (0, -1, 1.5, math.nan, math.inf, "x", True),
    },
    "GuardrailSettings": {
        "learning_rate_range": ((1e-2, 1e-3), (-1, 1), (math.nan, 1), 7, "x", (1e-3,)),
        "batch_size_range": ((8, 4), (0, 4), (-1, 4), 7),
        "max_rise": (0, -1, math.nan, "x"),
        "max_reversals": (-1, "x"),
        "spike": (0, -1, math.nan, "x"),
        "max_rollbacks": (-1, "x"),
        "hold": (-1, "x"),
        "snapshot_every": (0, -1, "x"),
        "finish_from": (-1, 2, math.nan, "x"),
    },
    "BaseSchedule": {"schedule": ("x", None, 7), "warmup_share": (-1, 1, math.nan, "x", None)},
}  # fmt: skip
"""By what is made and the name of a setting: values that make no sense."""
VALID: Mapping[str, tuple[Callable[..., Any], Mapping[str, Any]]] = {
    "SteeringSettings": (SteeringSettings, {"sequences": 100, "batch_size": 2, "policy": "none"}),
    "QualityContract": (QualityContract, {}),
    "GuardrailSettings": (GuardrailSettings, {}),
    "BaseSchedule": (BaseSchedule, {"schedule": "wsd", "warmup_share": 0.1}),
}


def attempts() -> list[Attempt]:
    """Return one attempt for each wrong setting, and for each model and optimizer that cannot be steered."""
    found = []
    for kind, settings in WRONG.items():
        for name, values in settings.items():
            found += [_attempt(f"{kind}({name}={value!r})", partial(_made, kind, name, value)) for value in values]
    found += [_attempt(f"Steering of {name}", partial(_steered, make)) for name, make in OPTIMIZERS.items()]
    found.append(_attempt("Steering of data that have no state_dict", _without_position))
    return found


def _attempt(name: str, run: Callable[[Path], Failures]) -> Attempt:
    return Attempt(name=one_line(name), promises=("settings", "limits"), run=run)


def _made(kind: str, name: str, value: Any, place: Path) -> Failures:
    make, valid = VALID[kind]
    settings = {**valid, name: value}
    if name == "budget":
        settings.pop("sequences")

    def call() -> Any:
        made = make(**settings)
        return _begun(made) if kind == "SteeringSettings" else made

    return _refused_by_name(call, name)


def _begun(settings: SteeringSettings) -> Steering:
    model = nn.Linear(2, 1)
    return Steering(model, torch.optim.AdamW(model.parameters(), lr=1e-3), settings)


def _refused_by_name(call: Callable[[], Any], name: str | None) -> Failures:
    judge, said = Judge(), []

    def noted() -> Any:
        try:
            return call()
        except ValueError as error:
            said.append(str(error))
            raise

    made = judge.loaded(noted, "settings")
    if made is not None:
        judge.failures["settings"] = "accepted"
    elif said and name is not None and name not in said[0]:
        judge.failures["settings"] = f"refused without its name: {one_line(said[0])}"
    return judge.failures


def _optimizer(lr: float, **more: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **more)
        optimizer.param_groups[0]["lr"] = lr
        return model, optimizer

    return make


def _foreign() -> tuple[nn.Module, Any]:
    return nn.Linear(2, 1), torch.optim.AdamW(nn.Linear(3, 3).parameters(), lr=1e-3)


OPTIMIZERS: Mapping[str, Callable[[], tuple[Any, Any]]] = {
    "an optimizer at learning rate 0": _optimizer(0.0),
    "an optimizer at a negative learning rate": _optimizer(-1.0),
    "an optimizer at learning rate NaN": _optimizer(math.nan),
    "an optimizer at an infinite learning rate": _optimizer(math.inf),
    "an optimizer of another model": _foreign,
    "no optimizer": lambda: (nn.Linear(2, 1), None),
    "no model": lambda: (None, torch.optim.AdamW(nn.Linear(2, 1).parameters(), lr=1e-3)),
}


def _without_position(place: Path) -> Failures:
    model, optimizer = _optimizer(1e-3)()
    settings = SteeringSettings(sequences=100, batch_size=2, policy="none")
    data: Any = object()
    return _refused_by_name(lambda: Steering(model, optimizer, settings, data=data), "data")


def _steered(make: Callable[[], tuple[Any, Any]], place: Path) -> Failures:
    def call() -> Any:
        model, optimizer = make()
        return Steering(model, optimizer, SteeringSettings(sequences=100, batch_size=2, policy="none"))

    return _refused_by_name(call, None)
