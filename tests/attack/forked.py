"""Call a function in a forked process, with limits on its time and memory, so that a crash or a hang is contained."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.attack.attempts import last_frame


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a call in a forked process ended."""

    value: Any = None
    """What it returned, as JSON holds it."""
    death: str | None = None
    """Why there is no value: an exception, a signal or a limit."""
    code: int | None = None
    """Exit status; `None` after a signal."""


_inside = False
"""Whether this process is a forked one already."""


def in_fork(call: Callable[[], Any], *, limit_s: float, memory_bytes: int | None = None) -> Ended:
    """Return how a call ends in a forked process, which is killed with all that it started after `limit_s`."""
    sys.stdout.flush()
    sys.stderr.flush()
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        _be_child(call, theirs, memory_bytes)
    os.close(theirs)
    try:
        answer, late = _read(ours, limit_s)
        if late:
            _kill(child)
        status = os.waitpid(child, 0)[1]
    finally:
        os.close(ours)
        _kill(child)
    if late:
        return Ended(death=f"ran on for {limit_s:.0f} s")
    if os.WIFSIGNALED(status):
        return Ended(death=f"killed by {signal.Signals(os.WTERMSIG(status)).name}")
    code = os.WEXITSTATUS(status)
    if not answer:
        return Ended(death=f"ended the process with status {code}", code=code)
    told = json.loads(answer)
    return Ended(value=told.get("value"), death=told.get("death"), code=code)


def _kill(child: int) -> None:
    """Kill a forked process with all that it started: its group, if it has one of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(child, signal.SIGKILL) if _inside else os.killpg(child, signal.SIGKILL)


def _read(handle: int, limit_s: float) -> tuple[bytes, bool]:
    """Return what comes through a pipe until its end, and whether that took too long."""
    parts: list[bytes] = []
    end = time.monotonic() + limit_s
    while True:
        ready, _, _ = select.select([handle], [], [], max(end - time.monotonic(), 0))
        if not ready:
            return b"".join(parts), True
        part = os.read(handle, 2**16)
        if not part:
            return b"".join(parts), False
        parts.append(part)


def _be_child(call: Callable[[], Any], answer: int, memory_bytes: int | None) -> NoReturn:
    """Call the function, send what it returns, and end the process without any clearing up."""
    global _inside
    try:
        if not _inside:
            os.setpgid(0, 0)
        _inside = True
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if memory_bytes is not None and sys.platform == "linux":
            limit = _address_space() + memory_bytes
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            told = {"value": call()}
        except BaseException as error:
            told = {"death": last_frame(error)}
        text = json.dumps(told).encode()
        while text:
            text = text[os.write(answer, text) :]
        os._exit(0)
    finally:
        os._exit(1)


def _address_space() -> int:
    """Return the bytes of this process's address space, on Linux."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize()


def grown_bytes() -> int:
    """Return the most memory that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True, kw_only=True)
class Called:
    """What a command line said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Everything that was said, line by line, without empty ones."""
        return [line for line in (self.out + self.err).splitlines() if line.strip()]


@contextlib.contextmanager
def said_to(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Send what this process writes to its outputs, native code included, to two files in `folder`."""
    files = folder / ".stdout", folder / ".stderr"
    kept = [os.dup(number) for number in (1, 2)]
    streams = sys.stdout, sys.stderr
    for number, file in zip((1, 2), files, strict=True):
        handle = os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    try:
        yield files
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams
        for number, handle in zip((1, 2), kept, strict=True):
            os.dup2(handle, number)
            os.close(handle)


def trainpilot(arguments: Sequence[str], said: Path) -> Called:
    """Carry a command line out in this process. What it says passes through files in the folder `said`."""
    from trainpilot.experiments import cli

    sys.argv = ["trainpilot", *arguments]
    with said_to(said) as (out, err):
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            code = 1
    texts = [file.read_text(encoding="utf-8", errors="backslashreplace") for file in (out, err)]
    return Called(code=code, out=texts[0], err=texts[1])
