"""A population without Ray: what a member trains, what it copies, and how the stretches of all become one result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comparison_runs import CONFIG, made_interval, made_result
from live_runs import case, same_bits, weights

from trainpilot.experiments.compare.execute import execute
from trainpilot.experiments.compare.methods import population_method
from trainpilot.experiments.compare.population import SCALES, Member, Stretch, allowed, batches_of, population_result
from trainpilot.experiments.results import Case, RunSpec, SteeringSpec
from trainpilot.llm_runtime.energy.meter import NoMeter


def spec_of(config: Any) -> RunSpec:
    """Return the run of a population of four on a case."""
    return population_method("pbt").spec(Case(name="a", config=config, architecture="llama"), 0)


def member(spec: RunSpec) -> Member:
    return Member(spec, "key", energy_shared=False, meter=NoMeter("a test"))


def test_a_member_that_is_left_alone_is_a_plain_run(tmp_path: Path) -> None:
    spec = spec_of(case(tmp_path))
    alone = member(spec)
    stretches = [alone.train(0, 1.0, 2) for _ in range(5)]
    plain = execute(
        RunSpec(config=spec.config, steering=SteeringSpec(evaluate_every=2)), "key", meter=NoMeter("a test")
    )
    found = population_result(spec, stretches)

    assert [len(each.intervals) for each in stretches] == [2] * 5
    assert [each.result is not None for each in stretches] == [False] * 4 + [True]
    assert [each.validation_loss for each in found.intervals] == [each.validation_loss for each in plain.intervals]
    assert [each.train_loss for each in found.intervals] == [each.train_loss for each in plain.intervals]
    assert [each.tokens for each in found.intervals] == [each.tokens for each in plain.intervals]
    assert found.final_test_loss == plain.final_test_loss
    assert found.initial_validation_loss == plain.initial_validation_loss
    assert (found.spec, found.stopped_early, found.tokens) == (spec, False, 3_200)


def test_a_copy_goes_on_as_its_original_would_and_then_its_own_way(tmp_path: Path) -> None:
    spec = spec_of(case(tmp_path))
    good, copy = member(spec), member(spec)
    good.train(0, 1.0, 2)
    copy.train(1, 20.0, 4)
    copy.restore(good.state())
    there, here = good.train(0, 1.0, 2), copy.train(1, 1.0, 2)

    assert same_bits(weights(good.execution.run), weights(copy.execution.run))
    assert there.loss == here.loss
    assert (there.lineage, here.lineage) == ((0, 0), (0, 1))

    changed = copy.train(1, 0.5, 4)
    assert {each.batch_size for each in changed.intervals} == {4.0}
    assert {each.learning_rate_scale for each in changed.intervals} == {0.5}
    copy.restart()
    assert copy.train(1, 1.0, 2).lineage == (1,)


def stretch(number: int, member: int, lineage: tuple[int, ...], loss: float | None, tokens: int = 100) -> Stretch:
    spec = RunSpec(config=CONFIG)
    ended = made_result(spec, loss) if number == 1 else None
    interval = made_interval(CONFIG, tokens=tokens, validation_loss=loss)
    return Stretch(number=number, member=member, lineage=lineage, intervals=(interval,), loss=loss, result=ended)


def test_the_best_member_counts_at_the_cost_of_all() -> None:
    # Member 1 copies member 0 at the milestone, and ends below it; what it had trained before that is paid for too.
    stretches = [
        stretch(1, 0, (0, 0), 2.5),
        stretch(0, 1, (1,), None, tokens=50),
        stretch(1, 1, (0, 1), 2.25),
        stretch(0, 0, (0,), 3.0),
    ]
    spec = spec_of(CONFIG)
    found = population_result(spec, stretches)

    assert found.final_validation_loss == 2.25
    assert found.spec == spec
    assert [each.tokens for each in found.intervals] == [50, 150, 250, 350]
    assert [each.rolled_back for each in found.intervals] == [True, False, True, False]
    assert [each.validation_loss for each in found.intervals] == [None, 3.0, 2.5, 2.25]


def test_a_population_that_diverges_has_diverged() -> None:
    found = population_result(spec_of(CONFIG), [stretch(1, 0, (0, 0), None), stretch(1, 1, (1, 1), None)])

    assert (found.diverged, found.final_validation_loss, found.tokens) == (True, None, 200)


def test_a_diverged_member_trains_no_more_until_it_copies(tmp_path: Path) -> None:
    spec = spec_of(case(tmp_path))
    good, hot = member(spec), member(spec)
    good.train(0, 1.0, 2)
    assert good.last is not None
    hot.last = replace(good.last, diverged=True)
    lost = hot.train(1, 1.0, 2)
    assert (lost.loss, lost.score, lost.intervals) == (None, 20.0, ())

    hot.restore(good.state())
    assert hot.train(1, 1.0, 2).loss is not None


def test_what_members_may_have(tmp_path: Path) -> None:
    # 200 sequences in 10 intervals of 20: at most 20 / 4 = 5 in a batch; half, one and two times 2 are whole.
    config = case(tmp_path)
    assert batches_of(config) == [1, 2, 4]
    assert batches_of(replace(config, optimizer="prodigy")) == [2]
    assert list(SCALES) == pytest.approx([10**-0.5, 10**1.5])
    assert allowed({"learning_rate_scale": 100.0, "batch_size": 4}) == {"learning_rate_scale": 64.0, "batch_size": 4}
    assert allowed({"learning_rate_scale": 1.23456})["learning_rate_scale"] == 1.23
