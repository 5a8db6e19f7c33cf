"""Check trainpilot on an NVIDIA GPU in one command.

Three parts, in this order:

basics     doctor, raw meter readings, demo, overhead: `gpu_doctor.json`, `gpu_readings.csv` (a recording that
           `RecordedMeter` plays back), `gpu_demo.json`, `gpu_overhead.json`
zero-shot  two models of 30 M and 120 M parameters, far larger than any the policy was trained on: a counted sweep of
           learning rates, then steered and untouched runs from 1/10, 1 and 10 times its best: `zero_shot_gpu.json`
fine-tune  a few hundred more decisions of PPO on live runs of another model of 30 M, and the same table after it

All results are written to `benchmarks/results`; the raw meter readings of all runs are `zero_shot_gpu_readings.csv`.
The estimated duration on an H100 is one hour. If the command is interrupted or runs out of time, the same command
resumes after the last finished run. Without a GPU it ends with an error message and exit code 2.

    python benchmarks/gpu_check.py [--time-limit 25] [--parts zero-shot] [--budget 0.25]
    python benchmarks/gpu_check.py --device cpu --tiny        # a dry run of a minute; results in OUT/results
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import RESULTS, write_result
from gpu.models import GpuSetup, Runs, TimeIsUpError, full_setup, tiny_setup
from gpu.zero_shot import POLICY, Ask, fine_tune, table
from rich.console import Console
from rich.table import Table

from trainpilot.agents.bundle import PolicyBundle, policy_digest, policy_path
from trainpilot.llm_runtime.energy import select_meter
from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergyReading, write_recording
from trainpilot.llm_runtime.files import write_json
from trainpilot.llm_runtime.process import use_threads

COLUMNS = ("start", "nats/token", "multiplier, tokens", "multiplier, joules", "s", "J")


def show(result: Mapping[str, Any]) -> None:
    """Print the zero-shot table of every model."""
    for name, found in result["models"].items():
        if "best" in found:
            Console().print(_table(f"{name}, {found['n_parameters']:,} parameters, {found['precision']}", found))


def _table(title: str, found: Mapping[str, Any]) -> Table:
    table = Table(title=title, title_style="bold")
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    whole = [run for run in found["best"] if run["share"] == 1]
    table.add_row("sweep's best", "1", _middle(whole, "validation_loss", ".4f"), "1.00", "1.00", *_cost(whole))
    sweep = [found["sweep"]]
    table.add_row(f"all {sweep[0]['n_runs']} of the sweep", "", "", "", "", *_cost(sweep))
    rows = [("untouched", row) for row in found.get("untuned", [])]
    rows += [(name, row) for name, part in found.get("steered", {}).items() for row in part]
    for name, row in rows:
        runs, multiplier = row["runs"], row["multiplier"]
        worth = (_estimate(multiplier["tokens"]), _estimate(multiplier["energy_j"]))
        table.add_row(name, f"{row['start']:g}", _middle(runs, "validation_loss", ".4f"), *worth, *_cost(runs))
    return table


def _cost(runs: list[dict[str, Any]]) -> tuple[str, str]:
    return _middle(runs, "time_s", ",.1f"), _middle(runs, "energy_j", ",.0f")


def _middle(runs: list[dict[str, Any]], name: str, form: str) -> str:
    values = [run[name] for run in runs]
    return "-" if None in values else format(median(values), form)


def _estimate(found: Mapping[str, Any] | None) -> str:
    if found is None or found["value"] is None:
        return "-"
    return f"{found['censored']}{found['value']:.2f}"


READ_EVERY_S = 0.05
PARTS = ("basics", "zero-shot", "fine-tune")
NAME = "zero_shot_gpu"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all parts in order; the first failure ends the command."""
    options = _parser().parse_args(arguments)
    try:
        _check(options)
        if "basics" in options.parts:
            basics(options.out)
        if options.parts != ["basics"]:
            Tables.of(options).fill("fine-tune" in options.parts)
    except ValueError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except TimeIsUpError:
        print("gpu-check: the time limit has passed; the same command goes on from here", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="all of them by default")
    parser.add_argument("--policy", default="default", help="a bundle's file, or the name of one that is shipped")
    parser.add_argument("--models", nargs="*", default=[], help="llama-30m, llama-120m; both by default")
    parser.add_argument("--seeds", type=int, default=1, help="of the tables; 3 for a look, 5 for a claim")
    parser.add_argument("--budget", type=float, default=1.0, help="factor on every run's budget in tokens")
    parser.add_argument("--preference", default="quality=1", help="what the policy is asked for in the tables")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="minutes; no run of the tables begins later")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder of the runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a dry run on models of a few thousand parameters")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Validate the options and fill in the default parts. Raises `ValueError` for invalid options."""
    if options.device == "cpu" and not options.tiny:
        raise ValueError("device cpu is for --tiny only: the models are too large for it")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("needs an NVIDIA GPU that torch can see, found none")
    if options.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {options.seeds}")
    options.parts = options.parts or list(PARTS[1:] if options.tiny else PARTS)
    if options.tiny and "basics" in options.parts:
        raise ValueError("parts: basics has no dry run, got it with --tiny; leave out one of them")
    if options.parts != ["basics"]:
        PolicyBundle.load(policy_path(options.policy))


# The tables -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The tables before and after fine-tuning."""

    setup: GpuSetup
    policy: str
    preference: str
    seeds: tuple[int, ...]
    budget: float
    runs: Runs
    results: Path

    @classmethod
    def of(cls, options: argparse.Namespace) -> Tables:
        """Build the tables from the command's options. Raises `ValueError` for an unknown model or invalid budget."""
        torch.zeros(1, device=options.device)  # initialises CUDA, which determines the GPU that the meter reads
        if options.tiny:
            use_threads(1)
        setup = tiny_setup(options.device) if options.tiny else full_setup()
        return cls(
            setup=setup.smaller(options.budget, tuple(options.models)),
            policy=options.policy,
            preference=options.preference,
            seeds=tuple(range(options.seeds)),
            budget=options.budget,
            runs=Runs(options.out, options.device, time.monotonic() + 60 * options.time_limit),
            results=(options.out / "results").resolve() if options.tiny else RESULTS,
        )

    def fill(self, fine_tuned: bool) -> None:
        """Measure the tables; the results so far are written even if an error occurs."""
        result = self._header()
        try:
            self._fill(result, {"zero-shot": policy_path(self.policy)})
            if fine_tuned:
                self._fill(result, {"zero-shot": policy_path(self.policy), "fine-tuned": self._tuned(result)})
            result["complete"] = True
        finally:
            print(self._write(result))
            show(result)

    def _header(self) -> dict[str, Any]:
        return {
            "complete": False,
            "policy": {"name": Path(self.policy).name, "digest": policy_digest(policy_path(self.policy))},
            "preference": self.preference,
            "seeds": list(self.seeds),
            "text": self.setup.text_name,
            "batch_size": self.setup.batch_size,
            "sequence_length": self.setup.sequence_length,
            "budget": self.budget,
            "baseline": "the sweep's best learning rate under WSD with a warm-up of 10 %, at the one starting batch",
            "energy_meter": self.runs.meter.description,
            "models": {},
        }

    def _fill(self, result: dict[str, Any], policies: dict[str, Path]) -> None:
        methods = {name: f"policy:{path}@{self.preference.replace(',', '+')}" for name, path in policies.items()}
        for name, size in self.setup.sizes.items():
            precision = self.runs.precision(name, self.setup.config(name))
            ask = Ask(name=name, config=self.setup.config(name, precision), seeds=self.seeds, get=self.runs.get)
            table(ask, size.rates, methods, result["models"].setdefault(name, {}))

    def _tuned(self, result: dict[str, Any]) -> Path:
        bundle = PolicyBundle.load(policy_path(self.policy))
        precision = self.runs.precision("fine-tuning", self.setup.tuning_config())
        folder = self.runs.folder / "fine-tuned"
        tuned = fine_tune(bundle, self.setup, precision, folder, self.runs.end_s)
        result["fine_tuned"] = tuned.provenance["fine_tuned"]
        return folder / POLICY

    def _write(self, result: dict[str, Any]) -> Path:
        self.runs.write_readings(self.results / f"{NAME}_readings.csv")
        return write_result(str(self.results / NAME), result, torch.device(self.setup.device))


# Basics -----------------------------------------------------------------------------------------------------------


def basics(out: Path) -> None:
    """Write the doctor's report and raw meter readings, and run the demo and the overhead benchmark."""
    device = torch.device("cuda")
    command = [sys.executable, "-m", "trainpilot.experiments.cli", "doctor", "--json"]
    doctor = subprocess.run(command, check=True, capture_output=True, text=True)
    write_json(RESULTS / "gpu_doctor.json", json.loads(doctor.stdout))
    print("doctor: written")
    torch.zeros(1, device=device)
    readings = record(select_meter("cuda"), device)
    write_recording(RESULTS / "gpu_readings.csv", readings)
    energies = [r.energy_j for r in readings if r.energy_j is not None]
    print(f"meter: {len(readings)} readings, {energies[-1] - energies[0]:.1f} J" if energies else "meter: no joules")
    _benchmark("demo.py", "--out", str(out / "demo"), "--name", "gpu_demo")
    _benchmark("overhead.py", "--tokens", "4000000", "--name", "gpu_overhead")


def _benchmark(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *arguments], check=True)


def record(meter: EnergyMeter, device: torch.device) -> list[EnergyReading]:
    """Return raw readings over five seconds of idling, five of matrix products and five of idling again."""
    readings: list[EnergyReading] = []
    matrix = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    for busy in (False, True, False):
        end = time.monotonic() + 5
        while time.monotonic() < end:
            if busy:
                for _ in range(20):
                    matrix @ matrix
                torch.cuda.synchronize()
            else:
                time.sleep(READ_EVERY_S)
            readings.append(meter.read())
    return readings


if __name__ == "__main__":
    main()
