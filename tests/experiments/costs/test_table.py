"""What a cost table says between the settings that were measured, and how it is measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from live_runs import case

from trainpilot.experiments.costs.measure import measure_cost_table
from trainpilot.experiments.costs.table import CostRow, CostTable
from trainpilot.llm_runtime.energy.meter import EnergyReading, EnergySource, NoMeter, RecordedMeter
from trainpilot.llm_runtime.timing import MIN_ROUNDS, Cost, Visit, alternate, summarise

WATTS = 10.0


def cost(time_s: float) -> Cost:
    return Cost(time_s=time_s, energy_j=WATTS * time_s)


def rows(kind: Any, seconds: dict[int, float], *, removed: float = 0.0) -> list[CostRow]:
    return [
        CostRow(kind=kind, precision="fp32", batch_size=batch, removed=removed, cost=cost(time_s))
        for batch, time_s in seconds.items()
    ]


def table(*more: CostRow, **changes: Any) -> CostTable:
    """Return a table of three batch sizes, at 10 W throughout."""
    usual = [*rows("step", {2: 3.0, 4: 4.0, 8: 8.0}), *rows("forward", {2: 1.0, 4: 1.5, 8: 2.5})]
    values: dict[str, Any] = {
        "device": "a test",
        "model": "llama-nano",
        "sequence_length": 16,
        "energy_source": "estimated",
        "rows": (*usual, *more),
        "probe_overhead": cost(0.25),
        "extras": {"prodigy": cost(0.5), "magnitude": cost(0.125)},
        "switches": {"batch": cost(0.0625)},
        "rounds": 4,
        "spread": 1.0,
    }
    return CostTable(**values | changes)


# Looking up -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "seconds"),
    [(2, 3.0), (3, 3.5), (4, 4.0), (5.5, 5.5), (8, 8.0), (16, 16.0), (1, 2.5)],
)
def test_a_step_lies_on_the_line_between_the_batches_measured(batch_size: float, seconds: float) -> None:
    assert table().step(batch_size, "fp32") == cost(seconds)


def test_small_batch_costs_per_sequence_at_least_as_the_smallest_measured() -> None:
    steep = table(rows=tuple(rows("step", {4: 4.0, 8: 12.0})))

    assert steep.step(1, "fp32").time_s == 1.0  # the line would say -2


def test_a_large_batch_costs_no_less_than_the_largest_measured() -> None:
    falling = table(rows=tuple(rows("step", {4: 4.0, 8: 3.0})))

    assert falling.step(32, "fp32").time_s == 3.0  # the line would say -3


def test_a_single_batch_is_taken_in_proportion() -> None:
    single = table(rows=tuple(rows("step", {4: 4.0})))

    assert [single.step(batch, "fp32").time_s for batch in (2, 4, 8)] == [2.0, 4.0, 8.0]


def test_width_is_linear_in_the_share_removed() -> None:
    narrow = table(*rows("step", {2: 2.0, 8: 6.0}, removed=0.5))

    assert narrow.step(2, "fp32", removed=0.25) == cost(2.5)
    assert narrow.step(5, "fp32", removed=0.5) == cost(4.0)
    assert narrow.step(2, "fp32", removed=0.75) == cost(1.5)


def test_other_optimisers_and_masks_pay_their_extra() -> None:
    assert table().step(4, "fp32", optimizer="prodigy") == cost(4.5)
    assert table().step(4, "fp32", pruning="magnitude") == cost(4.125)
    assert table().step(4, "fp32", optimizer="adamw", pruning="width") == cost(4.0)


def test_an_evaluation_goes_through_the_model_in_batches() -> None:
    assert table().evaluation(20, 8) == cost(2 * 2.5 + 1.5)
    assert table().evaluation(8, 8) == cost(2.5)
    assert table().evaluation(4, 8) == cost(1.5)


def test_a_probe_is_three_passes_and_its_overhead() -> None:
    assert table().probe(2, 8) == cost(3 * 1.0 + 0.25)


def test_a_switch_that_was_not_measured_costs_nothing() -> None:
    assert table().switch("batch") == cost(0.0625)
    assert table().switch("precision") == cost(0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "bf16"}, "precision must be one that the cost table has.*fp32.*'bf16'"),
        ({"precision": "fp32", "optimizer": "schedule-free"}, "optimizer must be .*'schedule-free'"),
        ({"precision": "fp32", "pruning": "evolution"}, "pruning must be .*'evolution'"),
        ({"precision": "fp32", "removed": 0.25}, "removed must be 0.0 .*0.25.*width"),
    ],
)
def test_what_was_not_measured_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table().step(4, **settings)


def test_unknown_joules_stay_unknown() -> None:
    silent = [replace(row, cost=Cost(time_s=row.cost.time_s, energy_j=None)) for row in table().rows]
    step = table(rows=tuple(silent)).step(3, "fp32")

    assert step == Cost(time_s=3.5, energy_j=None)
    assert (step + cost(1.0)).energy_j is None
    assert (step * 2).energy_j is None


def test_a_table_survives_json() -> None:
    narrow = table(*rows("step", {2: 2.0}, removed=0.5))

    assert CostTable.from_json(json.loads(json.dumps(narrow.to_json()))) == narrow


# Timing -----------------------------------------------------------------------------------------------------


class Clock:
    """Goes on by what the passes take, and notes their order."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now_s

    def take(self, name: str, seconds: float) -> None:
        self.now_s += seconds
        if self.order[-1:] != [name]:
            self.order.append(name)


def test_every_round_visits_every_setting_in_turn() -> None:
    clock, shares = Clock(), list[float]()
    passes = {"quick": lambda: clock.take("quick", 0.5), "slow": lambda: clock.take("slow", 3.0)}
    timings = alternate(passes, NoMeter(""), visit_s=2.0, limit_s=1e-9, clock=clock, progress=shares.append)

    assert clock.order == ["quick", "slow"] * (1 + MIN_ROUNDS)  # the first are for warming up
    assert {name: timing.cost.time_s for name, timing in timings.items()} == {"quick": 0.5, "slow": 3.0}
    assert len(shares) == MIN_ROUNDS
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def visits(source: EnergySource | None, *seconds_and_joules: tuple[float, float | None]) -> Sequence[Visit]:
    return [
        Visit(n_passes=2, time_s=time_s, metered_s=time_s, energy_j=energy_j, source=source)
        for time_s, energy_j in seconds_and_joules
    ]


def test_the_fastest_visit_counts_and_counters_give_the_mean_power() -> None:
    timing = summarise(visits("measured_counter", (4.0, 0.0), (2.0, 60.0), (6.0, 60.0)))

    assert timing.cost == Cost(time_s=1.0, energy_j=10.0)  # 120 J in 12 s
    assert timing.spread == 3.0
    assert timing.source == "measured_counter"


def test_an_estimate_takes_the_power_of_the_visit_that_waited_least() -> None:
    assert summarise(visits("estimated", (4.0, 12.0), (2.0, 8.0))).cost == Cost(time_s=1.0, energy_j=4.0)


def test_a_visit_without_joules_makes_the_energy_unknown() -> None:
    timing = summarise(visits(None, (4.0, None), (2.0, None)))

    assert timing.cost == Cost(time_s=1.0, energy_j=None)
    assert timing.source is None


# Measuring --------------------------------------------------------------------------------------------------


def test_a_real_table_is_positive_and_grows_with_the_batch(tmp_path: Path) -> None:
    config = case(tmp_path)
    measured = measure_cost_table(
        config,
        batch_sizes=(1, 256),
        precisions=("fp32",),
        optimizers=("adamw",),
        prunings=("none", "width", "magnitude"),
        limit_s=0.1,
    )

    small, large = (measured.step(batch, "fp32") for batch in (1, 256))
    assert 0 < small.time_s < large.time_s  # by a factor of about fifty, which a busy machine does not hide
    assert 0 < measured.evaluation(1, 1).time_s < measured.evaluation(256, 256).time_s
    assert {row.removed for row in measured.rows} == {0.0, 0.5}
    assert set(measured.extras) == {"magnitude"}
    assert set(measured.switches) == {"batch", "width", "magnitude"}
    assert measured.switch("width").time_s > 0
    assert measured.sequence_length == config.sequence_length
    assert measured.rounds == MIN_ROUNDS
    assert CostTable.from_json(json.loads(json.dumps(measured.to_json()))) == measured


def test_the_energy_has_the_meters_source_or_stays_unknown(tmp_path: Path) -> None:
    config = case(tmp_path)
    readings = [EnergyReading(time_s=0.5 * i, energy_j=10.0 * i, source="measured_counter") for i in range(2_000)]

    for meter in (RecordedMeter(readings), NoMeter("a test")):
        measured = measure_cost_table(config, batch_sizes=(2,), precisions=("fp32",), meter=meter, limit_s=0.1)
        step = measured.step(2, "fp32")
        if isinstance(meter, NoMeter):
            assert (measured.energy_source, step.energy_j) == (None, None)
        else:
            assert measured.energy_source == "measured_counter"
            assert step.energy_j == pytest.approx(20 * step.time_s)  # 10 J in half a second


@pytest.mark.parametrize("name", ["schedule-free", "prodigy"])
def test_other_optimisers_have_their_extra_measured(tmp_path: Path, name: Any) -> None:
    pytest.importorskip({"schedule-free": "schedulefree", "prodigy": "prodigyopt"}[name])
    config = case(tmp_path)
    measured = measure_cost_table(config, batch_sizes=(2,), precisions=("fp32",), optimizers=(name,), limit_s=0.1)

    assert measured.extras[name].time_s >= 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_sizes": ()}, "batch_sizes must be"),
        ({"batch_sizes": (0, 2)}, "batch_sizes must be"),
        ({"precisions": ()}, "precisions must name"),
        ({"precisions": ("tf32",)}, "precisions must be ones that the device has, got 'tf32'"),
    ],
)
def test_a_measurement_of_nothing_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"batch_sizes": (2,), "precisions": ("fp32",)}
    with pytest.raises(ValueError, match=message):
        measure_cost_table(case(tmp_path), **asked | settings)
