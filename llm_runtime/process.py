"""Process-wide tools: torch's threads, random states, and a daemon thread that calls a method regularly."""

from __future__ import annotations

import os
import random
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch

from trainpilot.llm_runtime.plain_values import shown


def use_threads(n_threads: int) -> int:
    """Set the threads of torch's operations, 0 for all cores, and return their number. Raises `ValueError` below 0."""
    if n_threads < 0:
        raise ValueError(f"threads must be 0 (all cores) or more, got {n_threads}")
    count = n_threads or available_cores()
    torch.set_num_threads(count)
    return count


def available_cores() -> int:
    """Return the number of cores (hardware threads) that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_in_use() -> int:
    """Return the number of threads that torch uses in this process."""
    return torch.get_num_threads()


def global_random_state() -> dict[str, Any]:
    """Return the state of the generators of the whole process: Python's, NumPy's and torch's on the CPU."""
    numpys = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpys["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": {**numpys, "state": {"key": key, "pos": int(numpys["state"]["pos"])}},
        "torch": torch.get_rng_state(),
    }


def set_global_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `global_random_state` returned. Raises for anything else, of which NumPy looks at too little."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpys = state["numpy"]
    key, position = numpys["state"]["key"], numpys["state"]["pos"]
    if key.dtype != torch.int64 or not (isinstance(position, int) and 0 <= position <= len(key)):
        raise ValueError(f"random must hold the state of NumPy's generator, got position {shown(position)}")
    np.random.set_state({**numpys, "state": {"key": key.numpy().astype(np.uint32), "pos": position}})
    torch.set_rng_state(state["torch"])


def device_random(device: torch.device) -> torch.Tensor | None:
    """Return the state of the random generator on a device; `None` for the CPU, whose is torch's own."""
    if device.type == "mps":
        return torch.mps.get_rng_state()
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_device_random(device: torch.device, state: torch.Tensor | None) -> None:
    """Restore what `device_random` returned."""
    if state is None:
        return
    if device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)


@contextmanager
def random_apart(device: torch.device) -> Iterator[None]:
    """Put torch's random numbers, those of the device too, back after a `with` block."""
    before = device_random(device)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        set_device_random(device, before)


class RandomState:
    """The state of torch's random generators for one run, from which dropout draws, separate from other users.

    Args:
        device: Device of the run's model.
        seed: Seed of the run's random numbers.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self._device = device
        with self.apart():
            torch.manual_seed(seed)
            self._state = self._read()

    def apart(self) -> AbstractContextManager[None]:
        """Return a context after which torch's generators are as they were before."""
        return random_apart(self._device)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Use the run's own random numbers in a `with` block."""
        with self.apart():
            cpu, on_device = self._state
            torch.set_rng_state(cpu)
            set_device_random(self._device, on_device)
            yield
            self._state = self._read()

    def _read(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return torch.get_rng_state(), device_random(self._device)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, for a snapshot."""
        cpu, cuda = self._state
        return {"cpu": cpu, "cuda": cuda}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise `ValueError` for a state from a file that `load_state_dict` cannot restore."""
        for name, own in self.state_dict().items():
            other = state.get(name)
            fits = (
                isinstance(other, torch.Tensor)
                and own is not None
                and (other.dtype, other.shape) == (own.dtype, own.shape)
            )
            if own is not None and not fits:
                raise ValueError(f"random_state must hold the state of torch's generator on the {name}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self._state = (state["cpu"], state["cuda"])


class Ticker:
    """A daemon thread that calls a bound method every `interval_s` seconds until `stop`.

    It holds the method weakly, so the thread ends when the object is garbage-collected.
    """

    def __init__(self, method: Callable[[], None], interval_s: float) -> None:
        if not interval_s > 0:
            raise ValueError(f"interval_s must be > 0 seconds, got {interval_s}")
        self._method = weakref.WeakMethod(method)
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trainpilot-ticker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            method = self._method()
            if method is None:
                return
            method()
            del method

    def stop(self) -> None:
        """End the thread, and wait up to a second for a call in progress."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)
