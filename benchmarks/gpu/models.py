"""Define the models and texts of the GPU checks, and carry out their runs.

`full_setup` has two models of 30 M and 120 M parameters; `tiny_setup` is for a dry run. `Runs` executes runs one after
the other and stores each as a file, with the raw readings of its energy meter in another file.
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
from trainpilot.experiments.results import RunResult, RunSpec
from trainpilot.experiments.run_store import RunStore, run_key
from trainpilot.llm_runtime.config import Precision, RunConfig
from trainpilot.llm_runtime.energy import select_meter
from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergyReading, sum_known, write_recording
from trainpilot.llm_runtime.files import whole_file, write_json
from trainpilot.llm_runtime.live_run import LiveRun

STARTS = (0.1, 1.0, 10.0)
"""Starting learning rates relative to the sweep's best."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model trained from scratch on bytes, with its budget."""

    model: Mapping[str, Any]
    """Configuration for transformers."""
    tokens: int
    rates: tuple[float, ...]
    """Initial learning rates of the sweep, ascending by factors of 2."""


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Live runs for fine-tuning a policy, on a model and a text that are not part of the test."""

    model: Mapping[str, Any]
    text: str
    tokens: int
    learning_rate: float = 1e-3
    """Learning rate of the reference runs, not tuned; the runs start at `STARTS` times it."""
    decisions: int = 600
    n_steps: int = 100
    """Decisions between two updates."""


@dataclass(frozen=True, kw_only=True)
class GpuSetup:
    """Models, texts, budgets and device: everything except the policy that the figures depend on."""

    sizes: Mapping[str, Size]
    text: str
    text_name: str
    """Name of the text for the result file, without a path of this machine."""
    batch_size: int
    sequence_length: int
    device: str
    tuning: FineTuning

    def config(self, name: str, precision: Precision = "fp32") -> RunConfig:
        """Return the run of a model; schedule, learning rate and seed are set by the caller."""
        size = self.sizes[name]
        return self._config(size.model, self.text, size.tokens, size.rates[len(size.rates) // 2], precision)

    def tuning_config(self, precision: Precision = "fp32") -> RunConfig:
        """Return the run on which a policy is fine-tuned."""
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

    def smaller(self, budget: float, names: tuple[str, ...] = ()) -> GpuSetup:
        """Return a copy with all budgets multiplied by `budget`, and with only the named models if any are named.

        Raises:
            ValueError: a name is unknown, or the budget is not positive.
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


def full_setup() -> GpuSetup:
    """Return the setup for a GPU; a run of either model is estimated to take about a minute on an H100.

    The test text (torch's own Python sources) is long enough that no run of the whole budget repeats a byte.
    """
    return GpuSetup(
        sizes={
            "llama-30m": Size(
                model=_llama(512, 1408, 9, 8, 1024), tokens=32_768_000, rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
            ),
            "llama-120m": Size(
                model=_llama(1024, 2816, 9, 16, 1024), tokens=16_384_000, rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
            ),
        },
        text=str(Path(torch.__file__).parent / "**" / "*.py"),
        text_name=f"the Python sources of torch {torch.__version__}",
        batch_size=32,
        sequence_length=512,
        device="cuda",
        tuning=FineTuning(model=_gpt2(512, 9, 8, 1024), text="stdlib", tokens=8_192_000),
    )


def tiny_setup(device: str) -> GpuSetup:
    """Return the setup of a dry run, which only shows that everything works."""
    return GpuSetup(
        sizes={
            "llama-tiny": Size(model=_llama(16, 32, 1, 2, 64), tokens=12_800, rates=(2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2))
        },
        text="stdlib:json",
        text_name="stdlib:json",
        batch_size=16,
        sequence_length=16,
        device=device,
        tuning=FineTuning(model=_gpt2(16, 1, 2, 64), text="stdlib:logging", tokens=12_800, decisions=60, n_steps=30),
    )


class TimeIsUpError(Exception):
    """Raised when the time limit has passed; finished runs are kept."""


class KeptMeter(EnergyMeter):
    """An energy meter that records its readings."""

    def __init__(self, meter: EnergyMeter) -> None:
        self.meter = meter
        self.readings: list[EnergyReading] = []

    @property
    def description(self) -> str:
        """One line that describes what is measured, and how."""
        return self.meter.description

    @property
    def resolution_s(self) -> float:
        """Seconds of a meaningful window, as of the meter."""
        return self.meter.resolution_s

    def read(self) -> EnergyReading:
        """Return the meter's reading and record it."""
        self.readings.append(self.meter.read())
        return self.readings[-1]

    def close(self) -> None:
        """Do nothing: the meter is shared by all runs."""


class Runs:
    """Executes runs and stores their results in a folder; stored runs are not repeated.

    Args:
        folder: Folder for `runs/KEY.json` and `readings/KEY.csv`, which `RecordedMeter` can play back.
        device: Device whose energy is measured. It should have been used before, so that it is initialised.
        end_s: Value of `time.monotonic` after which no run begins.
    """

    def __init__(self, folder: Path, device: str, end_s: float) -> None:
        self.folder = folder
        self.store = RunStore(folder / "runs")
        self.meter = select_meter(device)
        self.end_s = end_s
        self.names: dict[str, str] = {}
        """Name under which each key was first requested."""

    def get(self, name: str, spec: RunSpec) -> RunResult:
        """Return a stored run, or execute it. A failed run is returned as failed and repeated by the next command.

        Raises:
            TimeIsUpError: the run is not stored, and the time limit has passed.
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
        """Return bf16 if it speeds up a model, else fp32; measured once."""
        path = self.folder / "precisions.json"
        known: dict[str, Precision] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if name not in known:
            self.check_time()
            masked = LiveRun(config, meter=self.meter).limits().masked_precisions
            known[name] = "fp32" if "bf16" in masked else "bf16"
            write_json(path, known)
        return known[name]

    def write_readings(self, path: Path) -> None:
        """Write the raw readings of all requested runs as one CSV file, with the run's name in the first column."""
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
    """Return tokens, measured seconds and measured joules of a run, without evaluation; `None` if unknown."""
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
