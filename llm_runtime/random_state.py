"""Keep a run's random numbers apart from everyone else's in the same process, such as a policy's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


class RandomState:
    """The state of torch's generators as one run sees them: what dropout draws.

    Args:
        device: Where the run's model lives.
        seed: Where its numbers begin.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self._device = device
        with self.apart():
            torch.manual_seed(seed)
            self._state = self._read()

    def apart(self) -> AbstractContextManager[None]:
        """Leave everyone else's random numbers as they were."""
        return torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else [])

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Go on with the run's own random numbers."""
        with self.apart():
            cpu, cuda = self._state
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, self._device)
            yield
            self._state = self._read()

    def _read(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return torch.get_rng_state(), cuda

    def state_dict(self) -> dict[str, Any]:
        """Return the state, for a snapshot."""
        cpu, cuda = self._state
        return {"cpu": cpu, "cuda": cuda}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state that `state_dict` returned."""
        self._state = (state["cpu"], state["cuda"])
