"""Steer the training loops of other frameworks: Hugging Face, Lightning, Accelerate and torch.distributed.

Each name needs its own library only, which is imported when the name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainpilot.llm_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from trainpilot.agents.integrations.common import ProcessGroupRanks, accelerated
    from trainpilot.agents.integrations.huggingface import SteeredTrainer, SteeringMixin
    from trainpilot.agents.integrations.huggingface_callback import SteeringCallback
    from trainpilot.agents.integrations.lightning import LightningSteering

__all__ = [
    "LightningSteering",
    "ProcessGroupRanks",
    "SteeredTrainer",
    "SteeringCallback",
    "SteeringMixin",
    "accelerated",
]

_NAMES = {
    "common": ["ProcessGroupRanks", "accelerated"],
    "huggingface": ["SteeredTrainer", "SteeringMixin"],
    "huggingface_callback": ["SteeringCallback"],
    "lightning": ["LightningSteering"],
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _NAMES)
