"""What the checks on a GPU are made with: two models of 30 M and 120 M parameters, their text, and a dry run's.

Carry out runs one after the other, each kept as a file with the raw readings of its energy meter beside it.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainpilot.experiments.compare.cases import model_file
from trainpilot.experiments.compare.execute import execute
from trainpilot.experiments.compare.results import RunResult, RunSpec
from trainpilot.experiments.run_store import RunStore, run_key
from trainpilot.llm_runtime.config import Precision, RunConfig
from trainpilot.llm_runtime.energy import select_meter
from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergyReading, sum_known, write_recording
from trainpilot.llm_runtime.files import whole_file, write_json
from trainpilot.llm_runtime.live_run import LiveRun

STARTS = (0.1, 1.0, 10.0)
"""Starting learning rates over the sweep's best."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model that is trained from scratch on bytes, and its budget."""

    model: Mapping[str, Any]
    """A transformers config."""
    tokens: int
    rates: tuple[float, ...]
    """Learning rates that the sweep begins with, rising, a factor of 2 apart."""


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """The live runs that a policy goes on learning from: another model and another text than the judged ones."""

    model: Mapping[str, Any]
    text: str
    tokens: int
    learning_rate: float = 1e-3
    """Of the reference runs, not tuned; the runs themselves start at `STARTS` times it."""
    decisions: int = 600
    n_steps: int = 100
    """Decisions between two updates."""


@dataclass(frozen=True, kw_only=True)
class Bed:
    """Everything that the figures depend on, but for the policy."""

    sizes: Mapping[str, Size]
    text: str
    text_said: str
    """The text without a path of this machine."""
    batch_size: int
    sequence_length: int
    device: str
    tuning: FineTuning

    def config(self, name: str, precision: Precision = "fp32") -> RunConfig:
        """Return the run of a model; schedule, learning rate and seed are set by whoever asks for runs."""
        size = self.sizes[name]
        return self._config(size.model, self.text, size.tokens, size.rates[len(size.rates) // 2], precision)

    def tuning_config(self, precision: Precision = "fp32") -> RunConfig:
        """Return the run that a policy is fine-tuned on."""
        tuning = self.tuning
        return self._config(tuning.model, tuning.text, tuning.tokens, tuning.learning_rate, precision)

    def _config(self, model: Mapping[str, Any], text: str, tokens: int, rate: float, precision: Precision) -> RunConfig:
        return RunConfig(
            model=str(model_file(model)),
            text=(text,),
            tokens=tokens,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            base_learning_rate=rate,
            precision=precision,
            device=self.device,
        )

    def smaller(self, budget: float, names: tuple[str, ...] = ()) -> Bed:
        """Return the same with all budgets times `budget`, and with the models of these names only.

        Raises:
            ValueError: an unknown name, or a budget that is not positive.
        """
        if not budget > 0:
            raise ValueError(f"budget must be a positive factor, got {budget}")
        if unknown := [name for name in names if name not in self.sizes]:
            raise ValueError(f"models must be among {', '.join(self.sizes)}, got {unknown[0]!r}")
        sizes = {name: self.sizes[name] for name in names or self.sizes}
        sizes = {name: replace(size, tokens=round(size.tokens * budget)) for name, size in sizes.items()}
        return replace(
            self, sizes=sizes, tuning=replace(self.tuning, tokens=round(self.tuning.tokens * budget))
        )  # fmt: skip


def _llama(hidden: int, width: int, layers: int, heads: int, context: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
    }


def _gpt2(hidden: int, layers: int, heads: int, context: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": context,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def full_bed() -> Bed:
    """Return the bed for a GPU: each run of the two models is meant to take about a minute on an H100.

    The judged text, torch's own Python sources, is long enough that no run of the whole budget sees a byte twice.
    """
    return Bed(
        sizes={
            "llama-30m": Size(
                model=_llama(512, 1408, 9, 8, 1024), tokens=32_768_000, rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
            ),
            "llama-120m": Size(
                model=_llama(1024, 2816, 9, 16, 1024), tokens=16_384_000, rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
            ),
        },
        text=str(Path(torch.__file__).parent / "**" / "*.py"),
        text_said=f"the Python sources of torch {torch.__version__}",
        batch_size=32,
        sequence_length=512,
        device="cuda",
        tuning=FineTuning(model=_gpt2(512, 9, 8, 1024), text="stdlib", tokens=8_192_000),
    )


def tiny_bed(device: str) -> Bed:
    """Return the bed of a dry run, which shows that everything runs and nothing else."""
    return Bed(
        sizes={
            "llama-tiny": Size(model=_llama(16, 32, 1, 2, 64), tokens=12_800, rates=(2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2))
        },
        text="stdlib:json",
        text_said="stdlib:json",
        batch_size=16,
        sequence_length=16,
        device=device,
        tuning=FineTuning(model=_gpt2(16, 1, 2, 64), text="stdlib:logging", tokens=12_800, decisions=60, n_steps=30),
    )


class TimeIsUpError(Exception):
    """The time limit has passed; what has been run is kept."""


class KeptMeter(EnergyMeter):
    """A meter that remembers what it said."""

    def __init__(self, meter: EnergyMeter) -> None:
        self.meter = meter
        self.readings: list[EnergyReading] = []

    @property
    def description(self) -> str:
        """One line for people: what is measured, and how."""
        return self.meter.description

    @property
    def resolution_s(self) -> float:
        """Seconds of a meaningful window, as of the meter."""
        return self.meter.resolution_s

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
