"""Keep runs in files: a folder per steered run, a file per run of a comparison, and the versions they were made with.

`RunFolder` holds one run with a line per decision, checkpoints and a summary; `RunStore` holds many finished runs, so
that nothing is run twice.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar

from trainpilot.agents.controller import DecisionRecord
from trainpilot.experiments.results import RunResult, RunSpec
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.data.text_sources import content_digest
from trainpilot.llm_runtime.files import load_checkpoint, resuming, save_checkpoint, whole_file, write_json
from trainpilot.llm_runtime.json_records import JsonRecord
from trainpilot.llm_runtime.plain_values import parse_json, printable, printable_values, read_json, shown
from trainpilot.llm_runtime.ranges import COUNT, Range

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_EVERY_S = 5.0
"""Seconds between two checkpoints, at least; more where writing one takes long."""
CHECKPOINT_COST = 0.02
"""Share of the run's time that checkpoints may take."""
MAX_LINE = 2**20
"""Longest line of telemetry.jsonl that is read, in characters; a decision takes some 3,000."""

Number = Annotated[float, Range()]


@dataclass(frozen=True, kw_only=True)
class _Summary(JsonRecord):
    """The parts of a finished run's summary that are shown again; version 0.1 did not write those with a default."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "ignore"}

    policy: str
    model: str
    n_parameters: Annotated[int, COUNT]
    tokens: Annotated[int, COUNT]
    n_decisions: Annotated[int, COUNT]
    diverged: bool
    time_s: Number
    final_validation_loss: Number | None
    final_test_loss: Number | None
    final_test_bits_per_byte: Number | None = None
    energy_j: Number | None
    energy_source: str | None
    co2e_g: Number | None
    grid_intensity_g_per_kwh: Number
    mode: str = "steer"
    budget: str | None = None
    budget_spent: Number | None = None
    reference: dict[str, Number | str | None] | None = None
    advice: dict[str, Annotated[int, COUNT]] | None = None


@dataclass(frozen=True, kw_only=True)
class _Checkpoint(JsonRecord):
    """The form of a run's checkpoint."""

    snapshot: dict[str, Any]
    initial_loss: Annotated[float, Range()]
    controller: dict[str, Any]
    records: list[str]

    def __post_init__(self) -> None:
        of_controller = self.controller.get("records")
        if not isinstance(of_controller, list) or len(of_controller) != len(self.records):
            raise ValueError(f"records must be those of its controller, got {len(self.records)} of them")


class RunFolder:
    """The folder of one run.

    Args:
        path: The folder; made if it is not there.
        settings: Everything that decides the run's result, as JSON values.

    Raises:
        ValueError: the folder holds a run with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        claim_folder(path, "config.json", settings)
        self._last_checkpoint = time.monotonic()
        self._checkpoint_cost_s = 0.0
        self._unwritten: list[str] = []
        """Lines for which the disk was full."""

    def summary(self) -> dict[str, Any] | None:
        """Return the summary of a finished run, or `None`."""
        file = self.path / "summary.json"
        if not file.is_file():
            return None
        summary = _read_json(file)
        try:
            checked = _Summary.from_json(summary).to_json()
        except ValueError as error:
            raise ValueError(f"out: {file} is damaged ({error}); remove it or choose another --out") from error
        return printable_values({name: checked.get(name, value) for name, value in summary.items()})  # type: ignore[no-any-return]

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the summary; the run counts as finished, and its checkpoint is removed."""
        if self._unwritten:
            self._add(self._unwritten)
        write_json(self.path / "summary.json", dict(summary))
        (self.path / CHECKPOINT).unlink(missing_ok=True)

    def resume(self) -> tuple[dict[str, Any], list[DecisionRecord]] | None:
        """Return the checkpoint of an interrupted run and its decisions so far, or `None` where nothing was kept."""
        path = self.path / CHECKPOINT
        checkpoint = load_checkpoint(path)
        if checkpoint is None:
            self._rewrite([])
            return None
        with resuming(path):
            records = [_record(line) for line in _Checkpoint.from_json(checkpoint).records]
        self._rewrite(records)
        return checkpoint, records

    def append(self, record: DecisionRecord) -> None:
        """Add one line to telemetry.jsonl. On a full disk it waits for the next one, and the run goes on."""
        lines = [*self._unwritten, _line(record)]
        try:
            self._add(lines)
        except OSError as error:
            if not self._unwritten:
                reason = f"telemetry.jsonl could not be written: {error.strerror}; the run goes on, and tries again"
                warnings.warn(reason, stacklevel=2)
            self._unwritten = lines

    def _add(self, lines: Sequence[str]) -> None:
        """Add whole lines to telemetry.jsonl, or none."""
        file = self.path / "telemetry.jsonl"
        size = file.stat().st_size if file.exists() else 0
        try:
            with file.open("a", encoding="utf-8") as stream:
                stream.write("".join(line + "\n" for line in lines))
        except OSError:
            with suppress(OSError):
                os.truncate(file, size)
            raise
        self._unwritten = []

    def checkpoint_due(self) -> bool:
        """Return whether enough time has passed since the last checkpoint."""
        wait = max(CHECKPOINT_EVERY_S, self._checkpoint_cost_s / CHECKPOINT_COST)
        return time.monotonic() - self._last_checkpoint >= wait

    def write_checkpoint(self, content: Mapping[str, Any], records: Sequence[DecisionRecord]) -> None:
        """Write the checkpoint. A full disk costs the checkpoint, not the run; an earlier one stays."""
        start = time.monotonic()
        try:
            self._save(self.path / CHECKPOINT, content, records)
        except OSError as error:
            reason = error.strerror or str(error)
            warnings.warn(f"the checkpoint could not be written: {reason}; the run goes on without", stacklevel=2)
        self._last_checkpoint = time.monotonic()
        self._checkpoint_cost_s = self._last_checkpoint - start

    def keep(self, content: Mapping[str, Any], records: Sequence[DecisionRecord]) -> str:
        """Write a last checkpoint, if need be outside of the folder, and return what to do with it."""
        here = self.path / CHECKPOINT
        goes_on = "the same command goes on from there once it can write"
        try:
            self._save(here, content, records)
        except OSError:
            if here.is_file():
                return f"an earlier state of the run is kept in {here}; {goes_on}"
        else:
            return f"the run is kept in {here}; {goes_on}"
        try:
            there = Path(tempfile.mkdtemp(prefix="trainpilot-")) / CHECKPOINT
            self._save(there, content, records)
        except OSError as error:
            return f"the run is lost, as {tempfile.gettempdir()} cannot be written either ({error.strerror})"
        return f"the run is kept in {there}; move that file to {here}, and {goes_on}"

    @staticmethod
    def _save(path: Path, content: Mapping[str, Any], records: Sequence[DecisionRecord]) -> None:
        save_checkpoint(path, {**content, "records": [_line(record) for record in records]})

    def _rewrite(self, records: Sequence[DecisionRecord]) -> None:
        with whole_file(self.path / "telemetry.jsonl") as temporary:
            temporary.write_text("".join(_line(record) + "\n" for record in records), encoding="utf-8")


def claim_folder(path: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Make the folder and write `settings` into it, or check that it already belongs to the same settings.

    Raises:
        ValueError: the path is a file, or the folder belongs to other settings; nothing is written then.
    """
    file = path / name
    wanted = json.loads(json.dumps(dict(settings)))
    if path.exists() and not path.is_dir():
        raise ValueError(f"out must be a folder, got the file {path}")
    if not file.is_file():
        write_json(file, wanted)
        return
    held = _read_json(file)
    for key in sorted({*held, *wanted}):
        if held.get(key) != wanted.get(key):
            raise ValueError(
                f"out: {path} holds something else ({printable(key)} was {shown(held.get(key))}, now "
                f"{shown(wanted.get(key))}); choose another --out"
            )


def read_records(folder: Path) -> list[DecisionRecord]:
    """Return the decisions in a run's telemetry.jsonl; a last line cut short by a crash is left out."""
    path, records, cut = folder / "telemetry.jsonl", list[DecisionRecord](), None
    try:
        with path.open(encoding="utf-8") as file:
            while line := file.readline(MAX_LINE):
                if cut is not None:
                    raise cut  # it was not the last line
                try:
                    records.append(_record(line))
                except json.JSONDecodeError as error:
                    cut = error
    except ValueError as error:
        raise ValueError(f"{path}, line {len(records) + 1}: {error}") from error
    return records


def _record(line: str) -> DecisionRecord:
    return DecisionRecord.from_json(parse_json(line))


def _line(record: DecisionRecord) -> str:
    return json.dumps(record.to_json(), allow_nan=False)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"out: {path} is not readable JSON ({error}); remove it or choose another --out") from error
    if not isinstance(content, dict):
        raise ValueError(f"out: {path} must hold a JSON object; remove it or choose another --out")
    return content


class RunStore:
    """The folder `runs/` of a comparison, one JSON file per run, named by its key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, RunResult] = {}

    def get(self, key: str) -> RunResult | None:
        """Return a finished run; `None` if it was never run, did not end by itself, or its file is damaged."""
        if key not in self._known:
            result = RunResult.read(self.folder / f"{key}.json")
            if result is None or result.failure is not None or result.key != key:
                return None
            self._known[key] = result
        return self._known[key]

    def put(self, result: RunResult) -> None:
        """Write a run's file whole. A run that failed is kept for the report, and tried again next time."""
        result.write(self.folder / f"{result.key}.json")
        if result.failure is None:
            self._known[result.key] = result


def run_key(spec: RunSpec) -> str:
    """Return the name of a run's file: the same for the same settings, text and model, on every machine.

    Raises:
        ValueError: the text cannot be read.
    """
    return spec.key(_content(spec.config.text, spec.config.model))


@lru_cache(maxsize=256)
def _content(text: tuple[str, ...], model: str) -> str:
    digest = content_digest(RunConfig(text=text, model=model))
    return digest if Path(model).exists() else f"{digest} {model}"


PACKAGES = ("trainpilot", "torch", "transformers", "gymnasium", "stable-baselines3", "sb3-contrib", "numpy")


def versions() -> dict[str, str]:
    """Return Python's and the main packages' versions."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
