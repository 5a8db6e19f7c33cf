"""The worked example of docs/measuring.md, with the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from planted_comparison import TUNING_SEED, Planted, note

from trainpilot.experiments.analysis.analyse import analyse
from trainpilot.experiments.analysis.figures import CaseFigures, Figures, MethodFigures
from trainpilot.experiments.results import Comparison, Role, TunedBaseline, cost_key
from trainpilot.llm_runtime.timing import Cost

DOC = Path(__file__).resolve().parents[3] / "docs" / "measuring.md"
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


def test_multipliers_seed_by_seed_give_the_medians_of_the_two_cases(figures: Figures, doc: str) -> None:
    a, b = (on_case(figures, case).multipliers["tuned"]["tokens"] for case in ("A", "B"))

    assert f"{a.value:.3f} [{a.low:.3f}, {a.high:.3f}]" == "1.070 [0.967, 1.127]"
    assert f"{b.value:.3f} [{b.low:.3f}, {b.high:.3f}]" == "0.934 [0.845, 1.017]"
    assert "| A | 1.070 | 0.967 | 1.127 | 1.070 [0.967, 1.127] |" in doc
    assert "| B | 0.934 | 1.017 | 0.845 | 0.934 [0.845, 1.017] |" in doc
    assert f"{over_all(figures).multipliers['tuned']['tokens'].value:.3f}" == "1.002"
    assert "(1.070 + 0.934) / 2 = 1.002" in doc


def test_the_losses_are_those_of_the_page(doc: str) -> None:
    for losses in (TUNED_LOSSES, STEERED_LOSSES):
        for case, of_seeds in losses.items():
            assert f"| {case} | {' | '.join(f'{loss:.4f}' for loss in of_seeds)} |" in doc


def test_in_joules_and_seconds_the_probes_are_paid(figures: Figures, doc: str) -> None:
    found = on_case(figures, "A")

    assert (found.time_s.value, found.energy_j.value) == pytest.approx((4.16, 204))
    assert f"{found.multipliers['tuned']['energy_j'].value:.3f}" == "1.049"
    assert f"{found.multipliers['tuned']['time_s'].value:.3f}" == "1.029"
    assert "214.1 J where the run took 204 J: 1.049" in doc
    assert "4.282 s over 4.16 s: 1.029" in doc


def test_a_diverged_seed_counts_as_worst(doc: str) -> None:
    example = Example()
    key = next(row.key for row in example.rows if (row.case, row.method, row.seed) == ("A", STEERED, 0))
    example.results[key] = replace(example.results[key], final_validation_loss=None, diverged=True)
    found = on_case(example.figures(), "A").multipliers["tuned"]["tokens"]

    assert found.value == pytest.approx(0.967, abs=5e-4)
    assert found.low == 0
    assert "0.967 and 1.127, and their median 0.967" in doc


def test_with_the_sweep_paid_nine_runs_come_on_top(figures: Figures, doc: str) -> None:
    found = on_case(figures, "A").multipliers["tuned_with_sweep"]["tokens"]

    assert f"{found.value:.2f}" == "10.07"
    assert "(1.070 + 9) / 1 = 10.07" in doc


def test_one_case_won_and_one_lost_says_nothing(figures: Figures, doc: str) -> None:
    one, both = (over_all(figures, name).sign_tests["tuned"]["tokens"] for name in (STEERED, SAVING))

    assert (one.wins, one.losses, one.p_value) == (1, 1, 1)
    assert (both.wins, both.losses, both.p_value) == (2, 0, 0.5)
    assert "p = 2 x (1/2)^2 = 0.50" in doc


def test_break_even(figures: Figures, doc: str) -> None:
    found = over_all(figures).break_even_runs

    assert found is not None
    assert found.value == pytest.approx(27.8, abs=0.05)
    on_seed_0 = TRAINING_J / (214.08 + 1_800 - 204)
    assert on_seed_0 == pytest.approx(27.6, abs=0.05)
    assert "214.1 + 1,800 - 204 = 1,810.1 J: 27.6 runs. Over both cases it is 27.8." in doc


def test_the_target_is_reached_a_seventh_of_the_way(figures: Figures, doc: str) -> None:
    assert figures.targets["A"] == 3.0600
    assert on_case(figures, "A").to_target.tokens.value == pytest.approx(160_000 + 40_000 / 7)
    assert "1/7 of the way between: 165.7 k tokens" in doc


def test_product_score(figures: Figures, doc: str) -> None:
    assert f"{on_case(figures, 'A').product_score.value:.3f}" == "0.925"
    assert "0.8976 x 1.03 = 0.925" in doc


def test_the_family_has_two_points_on_the_front_of_case_a(doc: str) -> None:
    example = Example()
    figures = analyse(
        replace(example.comparison(), cases=example.comparison().cases[:1]),
        example.results,
        {cost_key(example.config("A")): replace(next(iter(example.tables().values())), probe_overhead=PROBE)},
    )
    front = next(front for front in figures.fronts if front.family == STEERED)

    assert front.n_points == 2
    assert f"{front.hypervolume.value:.2f}" == "9.72"
    assert f"{front.igd_plus.value:.4f}" == "0.0067"
    assert f"{front.expected_utility.value:.3f}" == "0.073"
    assert "(1 / 1.0704, 204/200) = (0.934, 1.020)" in doc
    assert "(1 / 0.8734, 163.2/200) = (1.145, 0.816)" in doc
    assert "(4 - 0.934) x (4 - 1.020) = 9.136" in doc
    assert "(4 - 1.145) x (1.020 - 0.816) = 0.582: 9.72" in doc
    assert "0.020 / 3 = 0.0067" in doc
    assert "on average over all weights 7.3 % are saved" in doc
