"""Keep a copy of somebody else's run to go back to, and go back to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from trainpilot.agents.steering.course import Course
from trainpilot.agents.steering.levers import Levers


class Stateful(Protocol):
    """Anything that can say where it stands, and go back there: a data loader, a sampler."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return where it stands."""

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Go back there."""


class Snapshots:
    """One copy of a run: what training changes, where it stands, and where its data and random numbers do.

    Args:
        levers: Model and optimiser.
        course: Where the run stands.
        data: The data's position; without it the data go on after a rollback.
    """

    def __init__(self, levers: Levers, course: Course, data: Stateful | None) -> None:
        self._levers, self._course, self._data = levers, course, data
        self._kept: dict[str, Any] | None = None
        self.spoilt: list[int] = []
        """Intervals that were taken back."""

    @property
    def there(self) -> bool:
        """Whether there is something to go back to."""
        return self._kept is not None

    def take(self) -> None:
        """Copy the run."""
        self._kept = None  # or there would be two of them at once
        kept = {"levers": self._levers.snapshot(), "controls": self._levers.controls}
        kept["course"] = self._course.state_dict()
        if self._data is not None:
            device = self._levers.device
            cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            kept |= {"data": self._data.state_dict(), "random": (torch.get_rng_state(), cuda)}
        self._kept = kept

    def go_back(self) -> None:
        """Put the run back to where it was copied.

        Where the same interval went wrong before, the data are to blame, and go on.
        """
        assert self._kept is not None, "guardrails only ask for it after a snapshot"
        kept, here = self._kept, self._course.decision
        self._levers.restore(kept["levers"], kept["controls"])
        course = kept["course"]
        if self._data is not None and here not in self.spoilt:
            self._data.load_state_dict(kept["data"])
            self._restore_random(*kept["random"])
        else:
            course = {**self._course.state_dict(), "cooldown": course["cooldown"]}
        self._course.load_state_dict(course)
        self.spoilt.append(here)

    def _restore_random(self, cpu: torch.Tensor, cuda: torch.Tensor | None) -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self._levers.device)

    def drop(self) -> None:
        """Let go of the copy."""
        self._kept = None
