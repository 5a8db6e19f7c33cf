"""Call a function on another machine as it would be called here, or say in one line what that machine lacks."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from trainpilot.experiments.run_store import versions
from trainpilot.llm_runtime.busy import wait_briefly
from trainpilot.llm_runtime.process import use_threads

ATTEMPTS = 5
"""Attempts per run: one whose process or machine died is begun again elsewhere, unless it seems to kill them itself."""
DECISIVE = ("python", "trainpilot", "torch", "transformers", "numpy")
"""Packages whose versions decide the last bits of a loss."""
PASSED_ON = ("TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "TRAINPILOT_CACHE")
"""Variables of the environment that hold there as they do here."""


@dataclass(frozen=True, kw_only=True)
class Home:
    """What a run finds on its machine as it is where the command was given."""

    folder: str
    """The working directory, which relative paths begin at."""
    versions: Mapping[str, str]
    environment: Mapping[str, str]
    threads: int
    """Torch threads of each run."""

    @classmethod
    def here(cls, threads: int) -> Home:
        """Return what this process has."""
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        return cls(folder=os.getcwd(), versions=versions(), environment=environment, threads=threads)

    def enter(self) -> None:
        """Make this process, on another machine, such a place. Raises `ValueError` where it cannot be."""
        found = versions()
        for name in DECISIVE:
            if found[name] != self.versions[name]:
                raise ValueError(
                    f"on: {socket.gethostname()} has {name} {found[name]}, this machine {self.versions[name]}; install "
                    "the same versions on both"
                )
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise ValueError(
                f"on: {socket.gethostname()} has no folder {self.folder}; give the command in a folder that every "
                "machine has under the same path, such as one on a shared disk"
            ) from error
        os.environ |= {**self.environment, "OMP_NUM_THREADS": str(self.threads)}
        wait_briefly()
        use_threads(self.threads)


@dataclass(frozen=True)
class Answer:
    """What a function returned or raised."""

    result: Any = None
    error: Exception | None = None

    def settle(self, future: Future[Any]) -> None:
        """End the future of the call."""
        if self.error is None:
            future.set_result(self.result)
        else:
            future.set_exception(self.error)


def call(home: Home, function: Callable[..., Any], *arguments: Any) -> Answer:
    """Call a function on this machine as at home; what it raises is part of the answer."""
    try:
        home.enter()
        return Answer(function(*arguments))
    except Exception as error:
        return Answer(error=error)


def check_same(of_run: Callable[[], str], expected: str, what: str) -> None:
    """Check on the machine of a run that its files are those of home.

    Args:
        of_run: Returns a digest of the files of this machine; raises `ValueError` or `OSError` if they cannot be read.
        expected: The digest at home.
        what: Names the files.

    Raises:
        ValueError: they are not the same.
    """
    try:
        reason = None if of_run() == expected else "has others"
    except (ValueError, OSError) as error:
        reason = f"cannot read them ({error})"
    if reason is not None:
        raise ValueError(
            f"on: every machine needs the same files under the same paths, such as on a shared disk; of {what}, "
            f"{socket.gethostname()} {reason}"
        )
