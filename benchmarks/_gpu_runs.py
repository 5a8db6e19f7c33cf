"""Carry out runs one after the other, each kept as a file with the raw readings of its energy meter beside it."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

from trainpilot.experiments.compare.execute import execute
from trainpilot.experiments.compare.results import RunResult, RunSpec
from trainpilot.experiments.run_store import RunStore, run_key
from trainpilot.llm_runtime.config import Precision, RunConfig
from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergyReading, select_meter, sum_known, write_recording
from trainpilot.llm_runtime.files import whole_file, write_json
from trainpilot.llm_runtime.live_run import LiveRun


class TimeIsUpError(Exception):
    """The time limit has passed; what has been run is kept."""


class KeptMeter:
    """A meter that remembers what it said."""

    def __init__(self, meter: EnergyMeter) -> None:
        self.meter = meter
        self.readings: list[EnergyReading] = []

    @property
    def description(self) -> str:
        """One line for people: what is measured, and how."""
        return self.meter.description

    def read(self) -> EnergyReading:
        """Return the meter's reading, and keep it."""
        self.readings.append(self.meter.read())
        return self.readings[-1]

    def close(self) -> None:
        """Do nothing: the meter is for the next run too."""


class Runs:
    """The runs in a folder, kept there or carried out now.

    Args:
        folder: Takes `runs/KEY.json` and `readings/KEY.csv`, which `RecordedMeter` plays back.
        device: Whose joules are measured. A model should have been on it before.
        end_s: No run begins after this moment of `time.monotonic`.
    """

    def __init__(self, folder: Path, device: str, end_s: float) -> None:
        self.folder = folder
        self.store = RunStore(folder / "runs")
        self.meter = select_meter(device)
        self.end_s = end_s
        self.names: dict[str, str] = {}
        """What each key was asked for as, the first time."""

    def get(self, name: str, spec: RunSpec) -> RunResult:
        """Return a run, kept or carried out now; one that failed says so, and is tried again by the next command.

        Raises:
            TimeIsUpError: it would have to be carried out, and the time limit has passed.
            ValueError: its text cannot be read.
        """
        key = run_key(spec)
        self.names.setdefault(key, name)
        if (kept := self.store.get(key)) is not None:
            return kept
        self.check_time()
        meter = KeptMeter(self.meter)
        result = execute(spec, key, meter=meter)
        write_recording(self._readings(key), meter.readings)
        self.store.put(result)
        print(f"{name}: {_line(result)}", flush=True)
        return result

    def check_time(self) -> None:
        """Raise `TimeIsUpError` once the time limit has passed."""
        if time.monotonic() >= self.end_s:
            raise TimeIsUpError

    def precision(self, name: str, config: RunConfig) -> Precision:
        """Return bf16 where it pays for a model, fp32 otherwise; measured once."""
        path = self.folder / "precisions.json"
        known: dict[str, Precision] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if name not in known:
            self.check_time()
            masked = LiveRun(config, meter=self.meter).limits().masked_precisions
            known[name] = "fp32" if "bf16" in masked else "bf16"
            write_json(path, known)
        return known[name]

    def write_readings(self, path: Path) -> None:
        """Write the raw readings of all runs that were asked for, with the run's name in the first column."""
        with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            for key, name in self.names.items():
                for number, row in enumerate(self._rows(key)):
                    if number or file.tell() == 0:
                        writer.writerow([name if number else "run", *row])

    def _rows(self, key: str) -> list[list[str]]:
        if not self._readings(key).is_file():
            return []
        with self._readings(key).open(newline="", encoding="utf-8") as file:
            return list(csv.reader(file))

    def _readings(self, key: str) -> Path:
        return self.folder / "readings" / f"{key}.csv"


def used(result: RunResult) -> dict[str, float | None]:
    """Return the tokens, measured seconds and measured joules of a run, evaluation apart; `None` where unknown."""
    return {
        "tokens": float(result.tokens),
        "time_s": sum(interval.time_s for interval in result.intervals),
        "energy_j": sum_known(interval.energy_j for interval in result.intervals) if result.intervals else None,
    }


def _line(result: RunResult) -> str:
    if result.failure is not None:
        return f"FAILED: {result.failure}"
    loss = result.final_validation_loss
    cost = used(result)
    energy = "energy unknown" if cost["energy_j"] is None else f"{cost['energy_j']:,.0f} J"
    return f"{'diverged' if loss is None else f'{loss:.4f} nats/token'}, {cost['time_s']:.1f} s, {energy}"
