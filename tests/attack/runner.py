"""Carry attempts out one after the other, and keep what each said in a file, so that an interrupted suite goes on."""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.attack import ROOT
from tests.attack.attempts import Attempt
from tests.attack.forked import in_fork
from trainpilot.llm_runtime.files import digest

KINDS = ("command_lines", "malformed_files", "kill_points", "hostile_policies", "faults")
"""Modules of this package, in the order in which they run."""
PREPARE_LIMIT_S = 300.0
SOURCES = ("agents", "envs", "experiments", "llm_runtime", "trainpilot", "tests/attack", "tests/helpers")


def kind_of(name: str) -> ModuleType:
    """Return the module of a kind of attack."""
    return importlib.import_module(f"tests.attack.{name}")


def load_everything() -> None:
    """Import what commands import when they run, so that a forked process need not. No gradient is computed here."""
    for name in ("demo", "train_agent", "replay", "compare.command", "calibrate.command", "fit_sweep", "doctor",
                 "export.command", "inspect_run", "report.page", "compare.cases"):  # fmt: skip
        importlib.import_module(f"trainpilot.experiments.{name}")
    from trainpilot.experiments import cli
    from trainpilot.llm_runtime.models import load_model

    cli._parse(["doctor"])
    for preset in ("llama-nano", "gpt2-nano"):
        load_model(preset, 0)


def source_digest(seed: int) -> str:
    """Return a digest of the product, of the suite and of the seed: results are kept for the same ones alone."""
    found = []
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                found.append(f"{path.relative_to(ROOT)} {digest(path.read_bytes())}")
    return digest([seed, *found])


class Suite:
    """The attempts of one kind, and what is known of them.

    Args:
        name: The kind.
        seed: Seeds what is drawn.
        work: Folder for results, and for what the attempts need.
        fresh: Forget what is known.
    """

    def __init__(self, name: str, seed: int, work: Path, *, fresh: bool = False) -> None:
        self.name, self.kind, self.work = name, kind_of(name), work / name
        self.results = work / f"{name}.jsonl"
        self.digest = source_digest(seed)
        mark = json.dumps({"kind": name, "digest": self.digest})
        kept = self.results.read_text(encoding="utf-8").splitlines() if self.results.is_file() else []
        if fresh or kept[:1] != [mark]:
            shutil.rmtree(self.work, ignore_errors=True)
            self.results.parent.mkdir(parents=True, exist_ok=True)
            self.results.write_text(mark + "\n", encoding="utf-8")
            kept = [mark]
        self.done: dict[int, dict[str, Any]] = {}
        for line in kept[1:]:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # cut short by an interruption
            self.done[record["number"]] = record
        self.shared = self.work / "shared"
        self._prepare()
        self.attempts: Sequence[Attempt] = self.kind.attempts(seed, self.shared)

    def _prepare(self) -> None:
        mark = self.shared / ".prepared"
        if mark.is_file():
            return
        shutil.rmtree(self.shared, ignore_errors=True)
        self.shared.mkdir(parents=True)
        ended = in_fork(lambda: _in_folder(self.shared, self.kind.prepare), limit_s=PREPARE_LIMIT_S)
        if ended.death is not None:
            raise RuntimeError(f"{self.name} cannot be prepared: {ended.death}")
        mark.touch()

    def run(self, numbers: Sequence[int], advance: Callable[[int, str], None]) -> None:
        """Make the attempts of these numbers that have not been made."""
        for count, number in enumerate(numbers, start=1):
            if number not in self.done:
                record = self.attempt(number)
                with self.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                self.done[number] = record
            failed = sum(bool(record["failures"]) for record in self.done.values())
            advance(count, f"{self.attempts[number].name[:50]}  {failed} failed")

    def attempt(self, number: int, *, keep: bool = False) -> dict[str, Any]:
        """Make one attempt, and return its record."""
        attempt, place = self.attempts[number], self.work / f"attempt-{number}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        ended = in_fork(
            lambda: _in_folder(place, attempt.run), limit_s=attempt.limit_s, memory_bytes=attempt.memory_bytes
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        failures, measured = ended.value if isinstance(ended.value, list) else (ended.value or {}, None)
        if ended.death is not None:
            failures = dict.fromkeys(attempt.promises, ended.death)
        if not keep:
            shutil.rmtree(place, ignore_errors=True)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {
            "number": number,
            "name": attempt.name,
            "promises": list(attempt.promises),
            "failures": failures,
            "measured": measured,
            "cpu_s": round(cpu_s, 3),
            "wall_s": round(time.monotonic() - start, 3),
        }


def examples() -> dict[str, Any]:
    """Return what failed in one attempt of each kind, by kind."""
    found = {}
    with tempfile.TemporaryDirectory() as work:
        for name in KINDS:
            place = Path(work) / name
            place.mkdir()
            ended = in_fork(partial(_in_folder, place, kind_of(name).example), limit_s=300)
            found[name] = ended.death or ended.value
    return found


def _in_folder(folder: Path, call: Callable[[Path], Any]) -> Any:
    os.chdir(folder)
    os.environ["TRAINPILOT_CACHE"] = str(folder.parent / "cache")
    return call(folder)
