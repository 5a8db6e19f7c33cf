"""Read a run from its folder, as `inspect` and `report` show it: decisions, summary, settings, reference run.

The folder is that of `trainpilot replay`, of version 0.1 too, or one that `trackers.FolderTracker` wrote beside a loop
of your own. What is missing or damaged besides the decisions is left out: a run is shown while it goes, too.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.steering.guardrails import GROWN_BACK
from trainpilot.envs.action import KEEP, Action
from trainpilot.envs.reward import Reference
from trainpilot.experiments.run_store import read_records
from trainpilot.llm_runtime.energy.meter import sum_known
from trainpilot.llm_runtime.files import real_path
from trainpilot.llm_runtime.plain_values import one_line, printable, printable_values, read_json
from trainpilot.llm_runtime.telemetry import Telemetry

TAKEN_BACK = "taken back"
"""How the refusals of the first decision after a rollback begin."""
NO_CHOICE = (TAKEN_BACK, "not taken back", "policy failed", GROWN_BACK)
"""Beginnings of what stands among the refusals and is no refused choice."""


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """A stretch of a run that was taken back."""

    intervals: tuple[int, ...]
    """Places of the intervals in the records that no longer count, the last one being where it went wrong."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run as its folder holds it."""

    name: str
    """What the run is called where several are shown."""
    folder: Path
    records: tuple[DecisionRecord, ...]
    """In the order in which they were written, those of intervals that were taken back included; at least one."""
    summary: Mapping[str, Any]
    """`summary.json`; empty where the run is not finished."""
    config: Mapping[str, Any]
    """`config.json`; empty where there is none."""
    reference: Reference | None = None
    """The reference run, where the run was made with one."""

    @property
    def last(self) -> Telemetry:
        """Telemetry of the last interval."""
        return self.records[-1].telemetry

    @cached_property
    def _course(self) -> tuple[tuple[int, ...], tuple[Rollback, ...]]:
        standing: list[int] = []
        rollbacks = []
        for place, record in enumerate(self.records):
            dropped: list[int] = []
            while standing and self.records[standing[-1]].telemetry.decision >= record.telemetry.decision:
                dropped.insert(0, standing.pop())
            back = next((reason for reason in record.refusals if reason.startswith(TAKEN_BACK)), None)
            if dropped and back is not None:  # else the run was resumed from before them
                rollbacks.append(Rollback(intervals=tuple(dropped), reason=back.removeprefix(f"{TAKEN_BACK}: ")))
            standing.append(place)
        return tuple(standing), tuple(rollbacks)

    @property
    def standing(self) -> tuple[int, ...]:
        """Places in `records` of the intervals that the run is made of."""
        return self._course[0]

    @property
    def rollbacks(self) -> tuple[Rollback, ...]:
        """What was taken back, in order."""
        return self._course[1]

    def began_at(self, place: int) -> float:
        """Return the share of the budget that was used when an interval began."""
        decision = self.records[place].telemetry.decision
        before = (r.telemetry for r in reversed(self.records[:place]) if r.telemetry.decision == decision - 1)
        return next((telemetry.budget_used for telemetry in before), 0.0)

    @property
    def advised(self) -> bool:
        """Whether the policy only advised."""
        return any(record.advice is not None for record in self.records)

    @property
    def state(self) -> str:
        """`finished`, `diverged`, or how far the run has come."""
        if self.last.diverged:
            return "diverged"
        return "finished" if self.last.finished else f"at {self.last.budget_used:.0%}"

    @property
    def policy(self) -> str:
        """Name of the policy, and whether it only advised."""
        named = self.summary.get("policy", self.config.get("policy", "unknown"))
        return printable(f"{named}, advising" if self.advised else named)

    @property
    def validation_loss(self) -> float | None:
        """Validation loss at the end, or else the last one that was measured, in nats/token."""
        if self.last.diverged:
            return None
        known = [self.summary.get("final_validation_loss"), self.summary.get("validation_loss")]
        return next((float(loss) for loss in known if is_figure(loss)), self.last.validation_loss)

    @property
    def test_loss(self) -> float | None:
        """Loss on the test split, in nats/token."""
        loss = self.summary.get("final_test_loss")
        return float(loss) if is_figure(loss) else None

    @property
    def time_s(self) -> float:
        """Seconds of all intervals, those that were taken back included, evaluation apart."""
        return sum(record.telemetry.time_s for record in self.records)

    @property
    def energy_j(self) -> float | None:
        """Joules of the same, or `None` where an interval's are unknown."""
        return sum_known(record.telemetry.energy_j for record in self.records)

    @property
    def energy_source(self) -> str:
        """Where the joules come from."""
        return self.last.energy_source or "no meter"

    @property
    def n_changes(self) -> int:
        """Decisions that changed something; those that advised a change, where the policy only advises."""
        return sum(taken(record) != KEEP for record in self.records)

    @property
    def n_refusals(self) -> int:
        """Choices that were refused."""
        return sum(len(refused_choices(record)) for record in self.records)


def cost_parts(run: StoredRun) -> dict[str, tuple[float, float | None]]:
    """Return seconds and joules by part of the run; an interval's energy is divided among its parts by their time.

    The joules of the evaluation are not counted, so they are `None`, as are all where an interval's are unknown.
    """
    seconds: dict[str, Callable[[Telemetry], float]] = {
        "training": lambda t: t.time_s - t.probe_time_s - t.switch_time_s,
        "curvature probe": lambda t: t.probe_time_s,
        "switching controls": lambda t: t.switch_time_s,
    }
    intervals = [record.telemetry for record in run.records]
    parts = {name: (sum(map(of, intervals)), _joules(intervals, of)) for name, of in seconds.items()}
    return parts | {"evaluation": (sum(t.evaluation_time_s for t in intervals), None)}


def _joules(intervals: Sequence[Telemetry], part: Callable[[Telemetry], float]) -> float | None:
    return sum_known(None if t.energy_j is None else t.energy_j * part(t) / max(t.time_s, 1e-9) for t in intervals)


def taken(record: DecisionRecord) -> Action:
    """Return the action that was carried out; the one that was advised, where the policy only advises."""
    return record.allowed if record.advice is None else record.advice.action


def refused_choices(record: DecisionRecord) -> list[str]:
    """Return why choices were refused, without what the guardrails said about the run as a whole."""
    return [reason for reason in record.refusals if not reason.startswith(NO_CHOICE)]


def counted_refusals(records: Sequence[DecisionRecord]) -> list[tuple[str, int]]:
    """Count refusals by reason, the most frequent first; reasons that differ only in numbers are counted as one."""
    counts: Counter[str] = Counter()
    example: dict[str, str] = {}
    for reason in (printable(reason) for record in records for reason in record.refusals):
        kind = re.sub(r"\d[\d.,e+-]*", "#", reason)
        counts[kind] += 1
        example.setdefault(kind, reason)
    return [(example[kind], count) for kind, count in counts.most_common()]


def is_figure(value: Any) -> TypeGuard[float]:
    """Return whether a value from a file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def reference_of(run: StoredRun) -> StoredRun | None:
    """Return the reference run that a run was made with, in the same form; `None` where there was none."""
    if run.reference is None:
        return None
    records = [
        DecisionRecord(
            telemetry=telemetry, requested=KEEP, allowed=KEEP, refusals=(), masked={}, observation={}, reward=None
        )
        for telemetry in run.reference.telemetry
    ]
    return StoredRun(
        name="reference run",
        folder=run.folder,
        records=tuple(records),
        summary={"policy": "none", "final_validation_loss": run.reference.losses[-1]},
        config=run.config,
    )


def read_run(folder: Path, name: str = "") -> StoredRun:
    """Read a run's folder.

    Args:
        folder: The folder.
        name: What the run is called; by default as its folder.

    Raises:
        ValueError: the folder has no `telemetry.jsonl`, an empty one, or one that is not a run's.
    """
    if not (folder / "telemetry.jsonl").is_file():
        raise ValueError(f"path must hold a run's telemetry.jsonl, got {folder}")
    records = read_records(folder)
    if not records:
        raise ValueError(f"path must hold at least one decision, got an empty telemetry.jsonl in {folder}")
    return StoredRun(
        name=one_line(name or real_path(folder).name) or "?",
        folder=folder,
        records=tuple(records),
        summary=printable_values(read_object(folder / "summary.json")),
        config=read_object(folder / "config.json"),
        reference=Reference.read(folder / "reference.json"),
    )


def read_runs(folders: Sequence[Path]) -> list[StoredRun]:
    """Read several runs, each named by its folder, or by its path where two folders have the same name.

    Raises:
        ValueError: as `read_run`.
    """
    names = Counter(real_path(folder).name for folder in folders)
    return [read_run(folder, str(folder) if names[real_path(folder).name] > 1 else "") for folder in folders]


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one where it is missing or damaged."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
