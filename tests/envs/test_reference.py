"""Reference runs: what they hold, and when they are run again."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import TOY_CASE, ToyPlant

from trainpilot.envs.reference import reference_for, run_reference
from trainpilot.envs.reward import Reference
from trainpilot.llm_runtime.config import Controls, RunConfig
from trainpilot.llm_runtime.telemetry import Telemetry


class CountingFactory:
    """Makes toy plants and remembers the cases they were made for."""

    def __init__(self, kind: type[ToyPlant] = ToyPlant) -> None:
        self.kind = kind
        self.cases: list[RunConfig] = []

    def __call__(self, config: RunConfig) -> ToyPlant:
        self.cases.append(config)
        return self.kind(config)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINPILOT_CACHE", str(tmp_path))
    return tmp_path


def test_the_base_schedule_is_run_at_three_budgets() -> None:
    factory = CountingFactory()
    reference = run_reference(replace(TOY_CASE, warmup_tokens=800), factory)

    assert [(case.tokens, case.decisions, case.warmup_tokens) for case in factory.cases] == [
        (4_000, 5, 200),
        (8_000, 10, 400),
        (16_000, 20, 800),
    ]
    # 4 (1 + tokens/100)^-1/4 after 4,000, 8,000 and 16,000 tokens
    assert reference.losses == pytest.approx((4 * 41**-0.25, 4 / 3, 4 * 161**-0.25))
    assert reference.initial_loss == 4.0
    assert len(reference.telemetry) == 20
    assert reference.time_s == pytest.approx(16.0)
    assert reference.energy_j == pytest.approx(1_600.0)
    assert reference.energy_source == "measured_counter"
    assert reference.quality(reference.losses[-1]) == pytest.approx(1.0)


def test_under_a_budget_in_seconds_the_three_budgets_are_in_seconds() -> None:
    factory = CountingFactory()
    reference = run_reference(replace(TOY_CASE, budget="10s", warmup_share=0.1), factory)

    assert [(case.budget, case.decisions, case.warmup_share) for case in factory.cases] == [
        ("2.5s", 5, 0.1),
        ("5s", 10, 0.1),
        ("10s", 20, 0.1),
    ]
    assert (reference.currency, reference.budgets) == ("time_s", (0.25, 0.5, 1.0))
    assert Reference.from_json(reference.to_json()) == reference


def test_progress_is_told_before_each_run() -> None:
    lines: list[str] = []
    run_reference(TOY_CASE, ToyPlant, lines.append)

    assert lines == [f"reference llama-nano, {share} of 16,000 tokens" for share in ("25%", "50%", "100%")]


@pytest.mark.parametrize("decisions", [1, 2, 3, 5, 6, 10, 11])
def test_the_smallest_budget_that_a_case_may_have_can_be_referred_to(decisions: int) -> None:
    smallest = replace(TOY_CASE, decisions=decisions, tokens=decisions * 80)

    assert run_reference(smallest, ToyPlant).budgets == (0.25, 0.5, 1.0)


class NoMeterToy(ToyPlant):
    """Does not know its joules in one interval."""

    def advance(self, controls: Controls, share: float) -> Telemetry:
        telemetry = super().advance(controls, share)
        return replace(telemetry, energy_j=None) if telemetry.decision == 3 else telemetry


def test_energy_is_unknown_when_one_interval_s_is() -> None:
    assert run_reference(TOY_CASE, NoMeterToy).energy_j is None


def test_a_second_call_runs_nothing(cache: Path) -> None:
    first = CountingFactory()
    reference = reference_for(TOY_CASE, first, setting="cpu one")
    again = CountingFactory()

    assert reference_for(TOY_CASE, again, setting="cpu one") == reference
    assert (len(first.cases), len(again.cases)) == (3, 0)
    assert len(list((cache / "reference").iterdir())) == 1


@pytest.mark.parametrize(
    ("case", "device"),
    [(TOY_CASE, "cpu two"), (replace(TOY_CASE, seed=1), "cpu one"), (replace(TOY_CASE, beta2=0.9), "")],
)
def test_another_device_or_another_case_has_its_own_entry(cache: Path, case: RunConfig, device: str) -> None:
    reference_for(TOY_CASE, ToyPlant, setting="cpu one")
    factory = CountingFactory()
    reference_for(case, factory, setting=device)

    assert len(factory.cases) == 3
    assert len(list((cache / "reference").iterdir())) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "{}", '{"telemetry": [], "budgets": 1}', "\udcff"])
def test_a_damaged_entry_is_run_again_and_replaced(cache: Path, damage: str) -> None:
    reference = reference_for(TOY_CASE, ToyPlant, setting="cpu one")
    (entry,) = (cache / "reference").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage.encode("utf-8", "surrogateescape"))
    factory = CountingFactory()

    assert reference_for(TOY_CASE, factory, setting="cpu one") == reference
    assert len(factory.cases) == 3
    assert entry.read_bytes() == whole


def test_a_cut_off_entry_is_run_again(cache: Path) -> None:
    reference_for(TOY_CASE, ToyPlant, setting="cpu one")
    (entry,) = (cache / "reference").iterdir()
    entry.write_text(entry.read_text()[:500])
    factory = CountingFactory()
    reference_for(TOY_CASE, factory, setting="cpu one")

    assert len(factory.cases) == 3


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("TRAINPILOT_CACHE", str(file / "below"))

    assert reference_for(TOY_CASE, ToyPlant, setting="cpu one").initial_loss == 4.0


def test_a_reference_survives_json() -> None:
    reference = run_reference(TOY_CASE, ToyPlant)

    assert Reference.from_json(reference.to_json()) == reference


class DivergingToy(ToyPlant):
    """Blows up after some intervals."""

    def advance(self, controls: Controls, share: float) -> Telemetry:
        telemetry = super().advance(controls, share)
        return replace(telemetry, train_loss=math.nan, diverged=telemetry.decision == 2)


class LastStepDivergingToy(ToyPlant):
    """Has finite training losses to the end, and no finite weights after it."""

    def evaluate(self) -> float:
        return math.nan if self.tokens else super().evaluate()


@pytest.mark.parametrize("kind", [DivergingToy, LastStepDivergingToy])
def test_a_base_schedule_that_diverges_is_refused_with_the_way_out(cache: Path, kind: type[ToyPlant]) -> None:
    message = "base_learning_rate: the base schedule itself diverged on llama-nano at 0.001; lower it"

    with pytest.raises(ValueError, match=message):
        reference_for(TOY_CASE, kind, setting="cpu one")
    assert not (cache / "reference").exists()
