"""Steer language-model training by a policy: the names that a training loop needs, imported when they are first used.

    from trainpilot import Steering, SteeringSettings, batches

The sub-packages are `llm_runtime`, `envs`, `agents` and `experiments`; the adapters of frameworks are in
`trainpilot.agents.integrations`.
"""

from __future__ import annotations

from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainpilot.agents import (
        BaseSchedule,
        GuardrailSettings,
        PolicyBundle,
        QualityContract,
        Steering,
        SteeringSettings,
        batches,
        schedule_of,
        shipped_policies,
    )
    from trainpilot.llm_runtime import distillation_loss

__all__ = [
    "BaseSchedule",
    "GuardrailSettings",
    "PolicyBundle",
    "QualityContract",
    "Steering",
    "SteeringSettings",
    "batches",
    "distillation_loss",
    "schedule_of",
    "shipped_policies",
]
_OF_RUNTIME = ("distillation_loss",)
"""Names that come from `llm_runtime`; the others come from `agents`."""

_HERE = Path(__file__).resolve().parent
if not (_HERE / "envs").is_dir():  # in a checkout the sub-packages stand beside this folder, not in it
    __path__.append(str(_HERE.parent))


def _version() -> str:
    try:
        return metadata.version("trainpilot")
    except metadata.PackageNotFoundError:
        return "unknown"


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Return a public name, or the installed version."""
        if name == "__version__":
            return _version()
        if name not in __all__:
            raise AttributeError(f"module 'trainpilot' has no attribute {name!r}")
        package = "trainpilot.llm_runtime" if name in _OF_RUNTIME else "trainpilot.agents"
        return getattr(import_module(package), name)

    def __dir__() -> list[str]:
        """Return the public names."""
        return sorted({*globals(), *__all__, "__version__"})
