"""A stream of random rows with a position, for loops that steer a small net."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class Rows:
    """Random rows, the same at the same place."""

    def __init__(self) -> None:
        self.at = 0

    def take(self, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.at)
        self.at += count
        return torch.randn(count, 4, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.at = state["at"]
