"""Measure joules of AMD GPUs, Apple silicon and Jetsons with Zeus, which runs in a process of its own.

Zeus (https://ml.energy/zeus) brings packages that an environment may not want, so it may be installed in another one:
`TRAINPILOT_ZEUS_PYTHON` names the interpreter that has it. The process reads for `ZeusMeter` and answers in lines of
JSON (`zeus_reader.py`); whatever happens to it, the run goes on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

from trainpilot.llm_runtime.energy.meter import (
    EnergyMeter,
    EnergyReading,
    EnergyScope,
    MeterUnavailableError,
    WrongMachineError,
)

PYTHON = "TRAINPILOT_ZEUS_PYTHON"
"""Environment variable with the path of an interpreter that has Zeus; by default this one, if it has it."""
READER = Path(__file__).with_name("zeus_reader.py")
JETSON = (Path("/etc/nv_tegra_release"), Path("/usr/lib/aarch64-linux-gnu/tegra"))
ROCM_DRIVER = Path("/dev/kfd")

ZeusHardware = Literal["amd", "soc"]


def hardware_for(device_type: str) -> ZeusHardware:
    """Return what Zeus would read here for a kind of device: AMD GPUs, or a whole chip.

    Raises:
        WrongMachineError: this machine has nothing of that kind that Zeus reads.
    """
    jetson = sys.platform == "linux" and any(path.exists() for path in JETSON)
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    if (apple and device_type in ("cpu", "mps")) or (jetson and device_type in ("cpu", "cuda")):
        return "soc"
    if device_type == "cuda" and ROCM_DRIVER.exists() and _torch_drives_amd():
        return "amd"
    raise WrongMachineError("Zeus reads AMD GPUs, Apple silicon and Jetsons; this machine has none for this device")


def _torch_drives_amd() -> bool:
    """Return whether `cuda` means an AMD GPU; where torch is not loaded, the driver alone says so."""
    torch = sys.modules.get("torch")
    return torch is None or getattr(torch.version, "hip", None) is not None


def interpreter() -> list[str]:
    """Return the command that starts the interpreter with Zeus. Raises `MeterUnavailableError` where none is known."""
    if named := os.environ.get(PYTHON):
        return [named, "-E"]  # the variables of this interpreter are not meant for another
    if importlib.util.find_spec("zeus") is None:
        raise MeterUnavailableError(f"Zeus is not installed, and {PYTHON} names no interpreter that has it")
    return [sys.executable]


class ZeusMeter(EnergyMeter):
    """Measures what Zeus can read. If its process ends, fails or hangs, the energy is unknown from then on.

    What is measured, and the label of the joules:

    * AMD GPUs: their energy counter (`measured_counter`), or where Zeus finds it wrong their power, sampled every 0.1 s
      and integrated (`measured_power`). Whole GPUs, other programs on them included.
    * Apple silicon: the chip's counters of processor, GPU, Neural Engine and memory, which are filled by a model of the
      chip's (`estimated`). The whole chip, all programs included.
    * Jetson: its power sensor, integrated by Zeus (`measured_power`): the module's input where there is such a rail,
      otherwise processor and GPU.
    """

    def __init__(
        self,
        hardware: ZeusHardware,
        indices: Sequence[int] = (),
        *,
        command: Sequence[str] | None = None,
        start_s: float = 60.0,
        answer_s: float = 5.0,
    ) -> None:
        """Start the process, and wait until it counts.

        Args:
            hardware: `amd` for AMD GPUs, `soc` for Apple silicon or a Jetson.
            indices: AMD GPUs as in `cuda:1`; by default all.
            command: Starts the interpreter that has Zeus; by default `interpreter()`.
            start_s: Seconds that the process may take to start: it imports packages, and Zeus tries each GPU's counter.
            answer_s: Seconds that an answer may take.

        Raises:
            MeterUnavailableError: There is no Zeus, or it finds nothing to read; the message says which.
        """
        if indices and os.environ.get("ROCR_VISIBLE_DEVICES"):
            raise MeterUnavailableError("ROCR_VISIBLE_DEVICES numbers the GPUs anew, which Zeus does not follow")
        start = [*(interpreter() if command is None else command), str(READER), hardware, *map(str, indices)]
        try:
            self._process = subprocess.Popen(
                start,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # so that Ctrl-C reaches the run alone, and what Zeus starts ends with it
            )
        except OSError as error:
            raise MeterUnavailableError(f"{start[0]} does not start: {error}") from error
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        heard = (self._process.stdout, self._lines)
        listener = threading.Thread(target=_listen, args=heard, name="trainpilot-zeus", daemon=True)
        listener.start()
        self._end = weakref.finalize(self, _end, self._process, listener)
        self._answer_s, self._lock = answer_s, threading.Lock()
        self._lost: str | None = None
        self._closed = False
        about = self._next(start_s)
        if self._lost is None and not _says_what(about):
            self._lose(f"it began with {about!r}")
        if self._lost is not None:
            raise MeterUnavailableError(f"Zeus ({start[0]}): {self._lost}")
        self._about = about

    @property
    def description(self) -> str:
        """One line for people: what Zeus reads."""
        return f"Zeus: energy unknown, {self._lost}" if self._lost else f"Zeus: {self._about['what']}"

    @property
    def scope(self) -> EnergyScope:
        """Whose joules are counted: those of whole GPUs, or of the whole chip."""
        scope: EnergyScope = self._about["scope"]
        return scope

    @property
    def uuids(self) -> Sequence[str]:
        """The GPUs, by names that are the same in every process."""
        return [str(name) for name in self._about["uuids"]]

    @property
    def resolution_s(self) -> float:
        """Seconds of a meaningful window."""
        return float(self._about["resolution_s"])

    def read(self) -> EnergyReading:
        """Ask the process, and wait for its answer."""
        with self._lock:
            found = {} if self._closed or self._lost else self._ask()
        reading = EnergyReading(time_s=time.monotonic(), energy_j=None, source=None)
        if "energy_j" not in found:
            return reading
        return EnergyReading(
            time_s=reading.time_s,
            energy_j=found["energy_j"],
            source=found.get("source"),
            power_w=found.get("power_w"),
            power_limit_w=found.get("power_limit_w"),
        )

    def _ask(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("read\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended; its last words may say why
        found = self._next(self._answer_s)
        if self._lost is not None:
            warnings.warn(f"energy is unknown from now on; Zeus: {self._lost}", RuntimeWarning, stacklevel=4)
        return found

    def _next(self, timeout_s: float) -> dict[str, Any]:
        """Return the next answer; nothing, and the reason in `_lost`, where there is none."""
        try:
            line = self._lines.get(timeout=timeout_s)
            found = json.loads(line) if line else {"error": "its process ended"}
        except queue.Empty:
            found = {"error": f"its process did not answer for {timeout_s:g} s"}
        except ValueError:
            found = {"error": f"it answered {line[:80]!r}"}
        if not isinstance(found, dict) or "error" in found:
            self._lose(str(found["error"]) if isinstance(found, dict) else f"it answered {found!r}")
            return {}
        return found

    def _lose(self, why: str) -> None:
        self._lost = why
        self._end()

    def close(self) -> None:
        """End the process; later readings are empty."""
        with self._lock:
            self._closed = True
            self._end()


def _says_what(about: dict[str, Any]) -> bool:
    return about.keys() >= {"what", "scope", "uuids", "resolution_s"}


def _listen(lines: IO[str] | None, heard: queue.SimpleQueue[str]) -> None:
    """Pass on each line of a process, and at its end an empty one."""
    with suppress(ValueError, OSError):  # closed
        for line in lines or ():
            heard.put(line)
    heard.put("")


def _end(process: subprocess.Popen[str], listener: threading.Thread) -> None:
    """End a process and those that it started, by closing its input; by force what goes on."""
    with suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    listener.join(timeout=0.5)  # its output ends when it does
    with suppress(OSError):  # there is none left
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # even a killed process waits for its driver
        process.wait(timeout=1.0)
