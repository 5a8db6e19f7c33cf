"""The worked example of docs/measuring.md, with the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from planted_comparison import STEP_TOKENS, TOKENS, TUNING_SEED, Planted, note

from trainpilot.experiments.compare.comparison import Comparison, TunedBaseline
from trainpilot.experiments.compare.records import Role, cost_key
from trainpilot.experiments.measuring.analyse import analyse
from trainpilot.experiments.measuring.figures import CaseFigures, Figures, MethodFigures
from trainpilot.experiments.measuring.statistics import over_seeds
from trainpilot.llm_runtime.cost_table import Cost

DOC = Path(__file__).resolve().parent.parent / "docs" / "measuring.md"
STEERED, SAVING = "policy:steered", "policy:steered@saving"
TUNED_LOSSES = {"A": (3.0000, 2.9400, 3.0600), "B": (2.5000, 2.5200, 2.4800)}
UNTUNED_LOSSES = {"A": (3.0600, 3.0000, 3.1200), "B": (2.5500, 2.5700, 2.5300)}
STEERED_LOSSES = {"A": (2.9880, 2.9459, 3.0386), "B": (2.5100, 2.5175, 2.5048)}
SAVING_LOSSES = {"A": (3.0240, 2.9694, 3.0906), "B": (2.5250, 2.5400, 2.5100)}
BETTER_PER_DOUBLING = 0.96
TRAINING_J = 50_000.0
PROBE = Cost(time_s=0.032, energy_j=0.8)


class Example(Planted):
    """Two cases, three seeds; a run of 200 k tokens takes 4 s and 200 J."""

    def __init__(self) -> None:
        super().__init__(efficiencies={}, cases=("A", "B"))
        for case in self.cases:
            for seed in range(3):
                self.run(case, "cosine", seed, UNTUNED_LOSSES[case][seed])
                self.run(case, STEERED, seed, STEERED_LOSSES[case][seed], probes=True)
                self.run(case, SAVING, seed, SAVING_LOSSES[case][seed], probes=True, intervals=4)
                for budget, doublings in ((0.5, -1), (1.0, 0), (2.0, 1)):
                    loss = TUNED_LOSSES[case][seed] * BETTER_PER_DOUBLING**doublings
                    self.run(case, "tuned", seed, loss, role="method" if budget == 1 else "curve", budget=budget)
            for trial in range(9):
                self.run(case, "tuned", TUNING_SEED + trial, 3.1, role="sweep")

    def run(
        self,
        case: str,
        method: str,
        seed: int,
        loss: float,
        *,
        role: Role = "method",
        budget: float = 1.0,
        probes: bool = False,
        intervals: int = 5,
    ) -> None:
        """Note a run with a final loss; it was 0.084 nats worse one interval before its end."""
        made = self.add(case, method, seed, role=role, budget=budget)
        kept = [replace(i, probe_sequences=int(probes), validation_loss=None) for i in made.intervals[:intervals]]
        kept[-2] = replace(kept[-2], validation_loss=loss + 0.084)
        kept[-1] = replace(kept[-1], validation_loss=loss)
        self.results[made.key] = replace(
            made,
            final_validation_loss=loss,
            final_test_loss=loss,
            stopped_early=intervals < len(made.intervals),
            intervals=tuple(kept),
        )

    def comparison(self) -> Comparison:
        tuned = tuple(
            TunedBaseline(method="tuned", axis=axis, config=self.config("A"), search="grid", n_trials=9)
            for axis in ("tokens", "time_s", "energy_j")
        )
        notes = [note(name) for name in ("cosine", "tuned", STEERED, SAVING)]
        steered = [replace(found, training_energy_j=TRAINING_J) if found.kind == "policy" else found for found in notes]
        return replace(super().comparison(), methods=tuple(steered), baselines={"A": tuned, "B": tuned})

    def figures(self) -> Figures:
        tables = {key: replace(table, probe_overhead=PROBE) for key, table in self.tables().items()}
        return analyse(self.comparison(), self.results, tables)


@pytest.fixture(scope="module")
def figures() -> Figures:
    return Example().figures()


@pytest.fixture(scope="module")
def doc() -> str:
    return " ".join(DOC.read_text(encoding="utf-8").split())


def on_case(figures: Figures, case: str, method: str = STEERED) -> CaseFigures:
    return next(found for found in figures.cases if (found.case, found.method) == (case, method))


def over_all(figures: Figures, method: str = STEERED) -> MethodFigures:
    return next(found for found in figures.methods if found.method == method)
