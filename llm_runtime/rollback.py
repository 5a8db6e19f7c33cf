"""Keep one copy of a run to go back to: weights, optimizer state, data, budget and random numbers, taken together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from trainpilot.llm_runtime.plain_values import shown
from trainpilot.llm_runtime.process import device_random, set_device_random

if TYPE_CHECKING:
    from trainpilot.llm_runtime.loop import ControlledLoop


class Stateful(Protocol):
    """An object that can save and restore its position: a data loader, a sampler."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the position."""

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Go to a position that `state_dict` returned."""


class RollbackCopy:
    """One copy of a loop's state to go back to, with the position of its data and of torch's random numbers.

    Data whose position cannot be copied or restored, in one of the processes, go on after a rollback.

    Args:
        loop: The loop.
        data: Position of the data; without it the data go on after a rollback.
        warn: Told of data that fail.
    """

    def __init__(self, loop: ControlledLoop, data: Stateful | None, warn: Callable[[str], None]) -> None:
        self._loop, self._data, self._warn = loop, data, warn
        self._copy: dict[str, Any] | None = None
        self.rolled_back: list[int] = []
        """Intervals that were taken back."""

    @property
    def rewinds(self) -> bool:
        """Whether `restore` would now take the data and the budget back too, and not the weights alone.

        Where the same interval went wrong before, the data are to blame: then the data and the budget go on.
        """
        if self._data is None or (self._copy is not None and "data" not in self._copy):
            return False
        return self._loop.progress.decision not in self.rolled_back

    @property
    def exists(self) -> bool:
        """Whether there is a copy to go back to."""
        return self._copy is not None

    def take(self) -> None:
        """Copy the loop's state."""
        self._copy = None  # or there would be two copies at once
        taken: dict[str, Any] = {"loop": self._loop.snapshot(), "progress": self._loop.progress.state_dict()}
        position: list[Any] = []
        if self._of_data("state_dict", lambda data: position.append(data.state_dict())):
            taken |= {"data": position[0], "random": (torch.get_rng_state(), device_random(self._loop.device))}
        self._copy = taken

    def restore(self) -> None:
        """Go back to the copy: the weights, and where it `rewinds` the data and the budget."""
        assert self._copy is not None, "guardrails ask for a rollback only after a snapshot"
        copied, progress = self._copy, self._loop.progress
        here, rewinds = progress.decision, self.rewinds
        self._loop.restore(copied["loop"])
        if rewinds and self._of_data("load_state_dict", lambda data: data.load_state_dict(copied["data"])):
            self._restore_random(*copied["random"])
            progress.load_state_dict(copied["progress"])
        else:
            progress.load_state_dict({**progress.state_dict(), "cooldown": copied["progress"]["cooldown"]})
        self.rolled_back.append(here)

    def _of_data(self, method: str, call: Callable[[Stateful], object]) -> bool:
        """Return whether the data of every process can do what is asked of them."""
        able = self._data is not None
        if self._data is not None:
            try:
                call(self._data)
            except (Exception, SystemExit) as error:  # the position of the data may not cost the run
                able, fault = False, f"{type(error).__name__}: {error}"
                self._warn(f"data.{method} raised {fault}; the data go on where the weights are taken back")
        return all(self._loop.ranks.all_gather(able))

    def _restore_random(self, cpu: Tensor, on_device: Tensor | None) -> None:
        torch.set_rng_state(cpu)
        set_device_random(self._loop.device, on_device)

    def drop(self) -> None:
        """Free the copy."""
        self._copy = None

    def state_dict(self) -> dict[str, Any] | None:
        """Return the copy, which `torch.save` can write; `None` where there is none."""
        return self._copy

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` for a copy from a file that this loop cannot go back to, or that is none."""
        if missing := {"loop", "progress", "data", "random"} - state.keys():
            raise ValueError(f"copy of a run must hold {min(missing)}, got one without")
        if not isinstance(state["loop"], Mapping):
            raise ValueError(f"copy of a run must hold a snapshot of the loop, got {shown(state['loop'])}")
        self._loop.check_snapshot({"scaler": {}, "micro_batch_size": None, **state["loop"]})
        self._loop.progress.check_state(state["progress"])
        random, n_bytes = state["random"], torch.get_rng_state().numel()
        cpu = random[0] if isinstance(random, Sequence) and len(random) == 2 else None
        if not (isinstance(cpu, Tensor) and cpu.dtype == torch.uint8 and cpu.numel() == n_bytes):
            raise ValueError(f"copy of a run must hold the state of torch's random numbers, got {shown(random)}")

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take the copy that `state_dict` returned."""
        self._copy = None if state is None else dict(state)
