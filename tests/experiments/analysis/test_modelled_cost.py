"""What a run costs by a cost table: steps, probes, evaluations and switches, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from live_runs import case

from trainpilot.experiments.analysis.figures import PARTS
from trainpilot.experiments.analysis.modelled_cost import cumulative, modelled_cost
from trainpilot.experiments.compare.execute import execute
from trainpilot.experiments.costs.measure import measure_cost_table
from trainpilot.experiments.costs.table import CostRow, CostTable
from trainpilot.experiments.results import IntervalResult, RunResult, RunSpec, SteeringSpec
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.timing import Cost

WATTS = 10.0
STEPS = {"fp32": {4: 4.0, 8: 6.0}, "bf16": {4: 2.0, 8: 3.0}}
FORWARD = {4: 1.0, 8: 1.5}


def cost(time_s: float) -> Cost:
    return Cost(time_s=time_s, energy_j=WATTS * time_s)


def table(*, removed: bool = False, watts: float | None = WATTS) -> CostTable:
    """Return a table at 10 W; a model without half of its channels takes half the time."""
    seconds = [("step", name, batch, s) for name, by_batch in STEPS.items() for batch, s in by_batch.items()]
    seconds += [("forward", "fp32", batch, s) for batch, s in FORWARD.items()]

    def known(time_s: float) -> Cost:
        return Cost(time_s=time_s, energy_j=None if watts is None else watts * time_s)

    rows = [
        CostRow(kind=kind, precision=name, batch_size=batch, removed=share, cost=known(s * (1 - share)))  # type: ignore[arg-type]
        for share in ((0.0, 0.5) if removed else (0.0,))
        for kind, name, batch, s in seconds
    ]
    return CostTable(
        device="a test",
        model="llama-nano",
        sequence_length=16,
        energy_source=None if watts is None else "estimated",
        rows=tuple(rows),
        probe_overhead=known(0.25),
        extras={"prodigy": known(0.5), "magnitude": known(0.125)},
        switches={"batch": known(0.01), "precision": known(0.02), "magnitude": known(0.03), "width": known(0.04)},
        rounds=4,
        spread=1.0,
    )


def interval(**changes: Any) -> IntervalResult:
    """Return ten steps of 4 sequences in fp32, without probe and evaluation."""
    quiet: dict[str, Any] = {
        "tokens": 0,
        "steps": 10,
        "train_loss": 2.0,
        "validation_loss": None,
        "learning_rate": 1e-3,
        "batch_size": 4.0,
        "precision": "fp32",
        "sparsity": 0.0,
        "probe_sequences": 0,
        "evaluation_sequences": 0,
        "time_s": 1.0,
        "probe_time_s": 0.0,
        "switch_time_s": 0.0,
        "evaluation_time_s": 0.0,
        "energy_j": None,
        "evaluation_energy_j": None,
    }
    return IntervalResult(**quiet | changes)


def result(*intervals: IntervalResult, **config: Any) -> RunResult:
    settings: dict[str, Any] = {"tokens": 16_000, "batch_size": 4, "sequence_length": 16, "decisions": 10}
    return RunResult(
        key="",
        spec=RunSpec(config=RunConfig(**settings | config)),
        n_parameters=1,
        initial_validation_loss=5.0,
        final_validation_loss=2.0,
        final_test_loss=2.0,
        diverged=False,
        stopped_early=False,
        failure=None,
        energy_source=None,
        energy_shared=False,
        device="a test",
        intervals=intervals,
    )


def parts(run: RunResult, **settings: Any) -> dict[str, float]:
    """Return the parts that are not 0, in seconds."""
    return {name: s for name, s in modelled_cost(run, table(**settings)).time_parts_s.items() if s}


def test_a_run_is_its_steps_its_probes_its_evaluations_and_its_switches() -> None:
    run = result(
        interval(probe_sequences=1),
        interval(steps=5, batch_size=8.0, precision="bf16", evaluation_sequences=20),
    )
    found = modelled_cost(run, table())

    training = 10 * 4.0 + 5 * 3.0
    probe = 3 * 0.625 + 0.25  # below the smallest batch the line through 4 and 8 goes on
    evaluation = 2 * 1.5 + 1.0
    switching = 0.01 + 0.02
    assert found.time_parts_s == pytest.approx(dict(zip(PARTS, (training, probe, evaluation, switching), strict=True)))
    assert found.time_s == pytest.approx(training + probe + evaluation + switching)
    assert found.energy_j == pytest.approx(WATTS * found.time_s)
    assert found.energy_parts_j == pytest.approx({name: WATTS * s for name, s in found.time_parts_s.items()})


def test_the_cost_so_far_ends_with_the_whole() -> None:
    run = result(interval(), interval(evaluation_sequences=4), interval(batch_size=8.0))
    so_far = cumulative(run, table())

    assert [c.time_s for c in so_far] == pytest.approx([40.0, 81.0, 141.01])
    assert so_far[-1].time_s == pytest.approx(modelled_cost(run, table()).time_s)
    assert so_far[-1].energy_j == pytest.approx(1410.1)


def test_unknown_joules_stay_unknown() -> None:
    found = modelled_cost(result(interval()), table(watts=None))

    assert found.time_s == 40.0
    assert (found.energy_j, found.energy_parts_j) == (None, None)
    assert cumulative(result(interval()), table(watts=None))[0].energy_j is None


def test_a_run_that_did_nothing_cost_nothing() -> None:
    found = modelled_cost(result(), table())

    assert (found.time_s, found.energy_j) == (0.0, 0.0)
    assert modelled_cost(result(), table(watts=None)).energy_j is None
    assert cumulative(result(), table()) == ()


def test_other_optimisers_pay_their_extra_at_every_step() -> None:
    assert parts(result(interval(), optimizer="prodigy")) == {"training": 45.0}


def test_masks_cost_extra_once_they_hold_weights_and_at_each_rise() -> None:
    run = result(interval(), interval(sparsity=0.05), interval(sparsity=0.05), pruning="magnitude")

    assert parts(run) == pytest.approx({"training": 3 * 40.0 + 2 * 10 * 0.125, "switching": 0.03})


def test_removed_channels_make_everything_cheaper() -> None:
    run = result(interval(sparsity=0.25, evaluation_sequences=4), pruning="width")

    assert parts(run, removed=True) == pytest.approx({"training": 30.0, "evaluation": 0.75, "switching": 0.04})


def test_a_last_step_cut_short_is_no_change_of_batch() -> None:
    cut = interval(batch_size=3.8, evaluation_sequences=4)  # nine steps of 4 and one of 2

    found = parts(result(interval(), cut))
    assert found == pytest.approx({"training": 40.0 + 10 * 3.9, "evaluation": 1.0})
    assert "switching" in parts(result(cut, interval()))  # in mid-run a mean of 3.8 is no cut


def test_a_table_for_other_sequences_is_refused() -> None:
    with pytest.raises(ValueError, match=r"table must be for sequences of 32 tokens.*got 16"):
        modelled_cost(result(interval(), sequence_length=32), table())


def test_a_precision_that_was_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="precision must be"):
        modelled_cost(result(interval(precision="fp16")), table())


def test_a_real_run_has_a_cost_for_each_of_its_parts(tmp_path: Path) -> None:
    config = case(tmp_path)
    measured = measure_cost_table(config, batch_sizes=(2, 8), precisions=("fp32",), limit_s=0.1)
    run = execute(RunSpec(config=config, steering=SteeringSpec(probe=True)), "a key")
    assert run.failure is None

    found = modelled_cost(run, measured)
    assert all(found.time_parts_s[name] > 0 for name in ("training", "probe", "evaluation"))
    assert modelled_cost(replace(run, intervals=run.intervals[:5]), measured).time_s < found.time_s
