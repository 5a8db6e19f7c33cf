"""Compute how much sooner a comparison ends with more places for its runs, as its searches wait for their own results.

    python benchmarks/compare_places.py [--cases large test] [--seeds 5]

Nothing is trained. The programs of `trainpilot compare` are carried out with their own scheduler on a loss surface that
is known, and on a clock that is computed: a run takes as long as its tokens, in units of a run of the whole budget. So
the figures say what waiting costs; machines of different speed, start-up and dead ones come on top.
"""

from __future__ import annotations

import argparse
import heapq
import math
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from _common import write_result

from trainpilot.experiments.compare.cases import load_cases
from trainpilot.experiments.compare.command import TUNING_SEEDS, PreparedComparison, _programs
from trainpilot.experiments.compare.execute import failed
from trainpilot.experiments.compare.methods import choose_methods
from trainpilot.experiments.compare.programs import ComparisonLedger
from trainpilot.experiments.compare.scheduler import Scheduler
from trainpilot.experiments.results import RunResult, RunSpec
from trainpilot.experiments.run_store import RunStore
from trainpilot.experiments.workers import Workers
from trainpilot.llm_runtime.config import RunConfig

BEST_RATE, BEST_BATCH_SHARE = 3.0, 0.5
"""Where the surface is lowest, as factors on a case's own settings."""


class Places(Workers[RunResult]):
    """Places for runs on a computed clock.

    Args:
        places: Runs side by side.
        started: The settings of each case by its text, from which losses and times are reckoned.
    """

    def __init__(self, places: int, started: dict[tuple[str, ...], RunConfig]) -> None:
        self.jobs, self.started = places, started
        self.now, self.used, self.count = 0.0, 0.0, 0
        self._under_way: list[tuple[float, int, RunResult]] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._under_way.clear()

    @property
    def free(self) -> bool:
        """Whether a place is free."""
        return len(self._under_way) < self.jobs

    @property
    def busy(self) -> bool:
        """Whether a run is under way."""
        return bool(self._under_way)

    def start(self, *arguments: Any) -> None:
        """Begin a run."""
        spec, key = arguments
        config, started = spec.config, self.started[spec.config.text]
        length = config.tokens / started.tokens
        self.count, self.used = self.count + 1, self.used + length
        heapq.heappush(self._under_way, (self.now + length, self.count, made_run(spec, key, loss(config, started))))

    def finished(self) -> list[RunResult]:
        """Move the clock to the end of the next run, and return its result."""
        self.now, _, result = heapq.heappop(self._under_way)
        return [result]


def loss(config: RunConfig, started: RunConfig) -> float:
    """Return the final loss: quadratic in the logarithms of rate and batch, falling in the budget."""
    rate = math.log10(config.base_learning_rate / (BEST_RATE * started.base_learning_rate))
    batch = math.log2(config.batch_size / (BEST_BATCH_SHARE * started.batch_size))
    shape = 0.02 * (config.schedule != "linear") + 0.003 * (config.seed % 1_000)
    return 1 + (config.tokens / started.tokens) ** -0.25 + rate**2 + 0.1 * batch**2 + shape


def made_run(spec: RunSpec, key: str, value: float) -> RunResult:
    """Return the result of a run that ended with a loss."""
    made = {"failure": None, "initial_validation_loss": 5.0, "final_validation_loss": value, "final_test_loss": value}
    return RunResult(**vars(failed(spec, key, "")) | made)


def timed(cases: str, methods: str, n_seeds: int, places: int) -> dict[str, Any]:
    """Return how long a comparison takes with so many places, in runs of the whole budget."""
    found, chosen = load_cases(cases), choose_methods(methods)
    ledger = ComparisonLedger(
        range(n_seeds), TUNING_SEEDS, {}, {case.name: (case.config.precision,) for case in found}, print
    )
    prepared = PreparedComparison(cases=found, chosen=chosen, ledger=ledger, tables={}, jobs=places, engine=None)
    workers = Places(places, {case.config.text: case.config for case in found})
    with tempfile.TemporaryDirectory() as folder:
        Scheduler(workers, RunStore(Path(folder)), lambda result, kept: None).run(list(_programs(prepared)))
    return {
        "set": cases,
        "cases": len(found),
        "places": places,
        "runs": workers.count,
        "run_lengths": round(workers.used, 1),
        "time_in_runs": round(workers.now, 2),
        "places_busy": round(workers.used / (workers.now * places), 3),
    }


def main() -> None:
    """Compute the times with 1 to 128 places and write `results/compare_places.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["large", "test"])
    parser.add_argument("--methods", default="default")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    results = [
        timed(cases, options.methods, options.seeds, places) for cases in options.cases for places in (1, 8, 16, 32, 64)
    ]
    for each in results:
        print(", ".join(f"{name} {value}" for name, value in each.items()))
    asked = {"methods": options.methods, "seeds": options.seeds}
    print(write_result("compare_places", {"computed": True, **asked, "results": results}, torch.device("cpu")))


if __name__ == "__main__":
    main()
