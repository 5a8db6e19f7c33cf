"""The throughput floor: no batch that wastes the device's tokens/s, and no batch that moves because of noise."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from fakes import ToyPlant, make_limits, make_telemetry

from trainpilot.agents.controller import Controller, Policy
from trainpilot.agents.steering.advice import AdvisingController
from trainpilot.agents.steering.guarded_controller import GuardedController
from trainpilot.agents.steering.guardrails import Guardrails, GuardrailSettings
from trainpilot.agents.steering.saved_state import SavedGuardrails
from trainpilot.agents.steering.throughput import NEWEST, PROVEN, Throughput
from trainpilot.envs.action import KEEP, Action, Situation
from trainpilot.envs.decision import Preference
from trainpilot.llm_runtime.config import ControlLimits, Controls, StepPrice
from trainpilot.llm_runtime.telemetry import Telemetry

HALF: Action = (3, 0, 0, 0, 0)
DOUBLE: Action = (3, 2, 0, 0, 0)


def interval(batch_size: int, token_ms: float, **more: Any) -> Telemetry:
    """Return an interval of 1,000 tokens, of which each took so many milliseconds."""
    return make_telemetry(**{"requested": Controls(batch_size=batch_size), "time_s": token_ms, **more})


def watched(*intervals: tuple[int, float], floor: float = 0.8) -> Guardrails:
    """Return guardrails of a run that has measured these batches, each with milliseconds per token."""
    guardrails = Guardrails(GuardrailSettings(throughput_floor=floor))
    guardrails.throughput = Throughput()
    for batch_size, token_ms in intervals:
        guardrails.judge(interval(batch_size, token_ms))
    return guardrails


def at(batch_size: int, **limits: Any) -> Situation:
    """Return the situation at a batch, in a run that starts at 8 sequences."""
    controls = Controls(batch_size=batch_size)
    return Situation(limits=make_limits(**limits), controls=controls, budget_used=0.5, precision_switches=0)


def test_a_smaller_batch_is_tried_once_the_present_one_is_known() -> None:
    for seen in ([], [(8, 1.0)]):
        assert watched(*seen).review(HALF, at(8)) == (
            KEEP,
            ["batch_size half refused: not before 2 intervals at batch 8, which throughput_floor compares it with"],
        )
    assert watched((8, 1.0), (8, 1.0)).review(HALF, at(8)) == (HALF, [])
    assert watched((8, 1.0), (8, 1.0), (4, 1.0)).review(HALF, at(4))[0] == KEEP


def test_a_batch_that_has_proven_too_slow_grows_back() -> None:
    seen = (8, 1.0), (8, 1.0), (4, 1.0 / 0.61), (4, 1.0 / 0.61)
    reason = "batch grown back to 8: batch 4 gives 0.61 of this machine's best tokens/s; throughput_floor=0.8"
    for wanted in (KEEP, HALF, DOUBLE):
        assert watched(*seen).review(wanted, at(4)) == (DOUBLE, [reason])
    assert watched(*seen, floor=0.6).review(KEEP, at(4)) == (KEEP, [])
    assert watched(*seen, floor=0).review(HALF, at(4)) == (HALF, [])
    assert watched(*seen).review(HALF, at(8)) == (
        KEEP,
        ["batch_size half refused: batch 4 would give 0.61 of this machine's best tokens/s; throughput_floor=0.8"],
    )


def test_a_batch_that_was_never_tried_is_predicted() -> None:
    # 1 = a/8 + c and 1.1 = a/4 + c: a = 0.8, c = 0.9, so at 2 a token costs 1.3, and 1/1.3 = 0.77
    seen = (8, 1.0), (8, 1.0), (4, 1.1), (4, 1.1)
    (allowed, (reason,)) = watched(*seen).review(HALF, at(4))
    assert allowed == KEEP
    assert "batch 2 would give 0.77" in reason
    assert watched(*seen, floor=0.76).review(HALF, at(4)) == (HALF, [])


def test_one_slow_interval_moves_no_batch() -> None:
    quiet = [(8, 1.0), (8, 1.0), (4, 1.1), (4, 1.1)]
    for slow in range(len(quiet)):
        seen = [(size, token_ms * (5 if place == slow else 1)) for place, (size, token_ms) in enumerate(quiet)]
        assert watched(*seen).review(KEEP, at(4)) == (KEEP, [])
    assert watched(*quiet, *[(4, 9.0)] * 20).review(KEEP, at(4)) == (
        KEEP,
        [],
    )  # the machine is busy, not the batch slow


def test_a_machine_that_becomes_slower_before_the_change_is_no_slow_batch() -> None:
    seen = [(8, 1.0)] * 4 + [(8, 3.0)] * 3 + [(4, 3.3)] * 3
    guardrails = watched(*seen)
    assert guardrails.throughput is not None
    assert guardrails.throughput.share(4) == pytest.approx(1 / 1.1)
    assert guardrails.review(KEEP, at(4)) == (KEEP, [])


def test_a_batch_misjudged_on_a_busy_machine_gets_another_chance() -> None:
    # The machine becomes three times slower at the very change: 4 grows back, and 8 is then as slow.
    seen = [(8, 1.0)] * 3 + [(4, 3.3)] * 2
    assert watched(*seen).review(KEEP, at(4))[0] == DOUBLE
    assert watched(*seen, (8, 3.0)).review(HALF, at(8))[0] == KEEP
    assert watched(*seen, (8, 3.0), (8, 3.0)).review(HALF, at(8))[0] == HALF


def test_the_starting_batch_is_never_raised() -> None:
    seen = (8, 1.0), (8, 1.0), (16, 0.5), (16, 0.5), (8, 1.0), (8, 1.0)
    assert watched(*seen).review(KEEP, at(8)) == (KEEP, [])
    assert watched(*seen[:4]).review(HALF, at(16)) == (HALF, [])
    # 1 = a/8 + c and 0.5 = a/16 + c: at 4 a token costs 2, against the best of 0.5
    assert "batch 4 would give 0.25" in watched(*seen).review(HALF, at(8))[1][0]


@pytest.mark.parametrize(("half_ms", "allowed"), [(1.2, HALF), (1.3, KEEP)])
def test_prices_measured_at_the_start_decide_at_once(half_ms: float, allowed: Action) -> None:
    prices = [
        StepPrice(batch_size=size, precision="fp32", time_s=size * token_ms, energy_j=None)
        for size, token_ms in ((4, half_ms), (8, 1.0), (16, 0.1))  # the double batch was not tried, and does not count
    ]
    assert watched().review(HALF, at(8, prices=tuple(prices)))[0] == allowed
    assert watched().review(HALF, at(8, prices=tuple(prices[1:])))[0] == KEEP  # without the half nothing is known


def test_probes_and_changes_of_controls_are_no_part_of_a_batch() -> None:
    guardrails = watched((8, 1.0), (8, 1.0))
    for _ in range(2):
        guardrails.judge(interval(4, 9.0, probe_time_s=5.0, switch_time_s=2.9))
    assert guardrails.review(KEEP, at(4)) == (KEEP, [])


@pytest.mark.parametrize("broken", [{"time_s": 0.0}, {"time_s": float("nan")}, {"interval_tokens": 0}])
def test_an_interval_that_was_not_timed_says_nothing(broken: dict[str, Any]) -> None:
    guardrails = watched()
    guardrails.judge(interval(8, 1.0, **broken))
    assert guardrails.throughput == Throughput()


def test_bounds_of_the_user_hold_against_the_floor() -> None:
    guardrails = watched((8, 1.0), (8, 1.0), (4, 2.0), (4, 2.0))
    guardrails.settings = replace(guardrails.settings, batch_size_range=(1, 4))
    allowed, reasons = guardrails.review(KEEP, at(4))
    assert allowed == KEEP
    assert reasons[-1] == "batch_size double refused: batch size would leave [1, 4]"


# A whole run --------------------------------------------------------------------------------------------------------


def token_ms(fixed_ms: float, batch_size: int) -> float:
    """Return the cost of a token where a step takes so many milliseconds besides 1 for each token of 10 a sequence."""
    return 1 + fixed_ms / (10 * batch_size)


def halved(fixed_ms: float, noise: float = 0.0, seed: int = 0, floor: float = 0.8) -> list[int]:
    """Return the batches of 40 intervals, from 8 sequences, under a policy that always halves; saved in between."""
    guardrails, random, batch_size, sizes = watched(floor=floor), np.random.default_rng(seed), 8, list[int]()
    for _ in range(40):
        allowed, _ = guardrails.review(HALF if batch_size > 1 else KEEP, at(batch_size))
        guardrails.note(allowed)
        batch_size = batch_size * 2 if allowed == DOUBLE else batch_size // 2 if allowed == HALF else batch_size
        slower = 1 + noise * random.exponential()
        guardrails.judge(interval(batch_size, token_ms(fixed_ms, batch_size) * slower))
        sizes.append(batch_size)
        state, guardrails = json.loads(json.dumps(guardrails.state_dict())), watched(floor=floor)
        guardrails.load_state_dict(state)
    return sizes


@pytest.mark.parametrize("fixed_ms", [0.0, 5.0, 20.0, 80.0, 1e4])
def test_a_policy_that_always_halves_stops_at_the_floor(fixed_ms: float) -> None:
    sizes = halved(fixed_ms)
    fast = [size for size in (1, 2, 4, 8) if token_ms(fixed_ms, 8) >= 0.8 * token_ms(fixed_ms, size)]
    assert sizes[-20:] == [min(fast)] * 20
    assert sum(size < min(fast) for size in sizes) <= PROVEN  # only the first half cannot be predicted
    assert halved(fixed_ms, floor=0)[:5] == [4, 2, 1, 1, 1]


def test_noise_moves_a_good_batch_seldom_and_never_far() -> None:
    # 4 gives 0.89 of the best tokens/s, 2 gives 0.73
    runs = [halved(10.0, noise=0.3, seed=seed) for seed in range(20)]
    rises = [sum(after > before for before, after in pairwise(sizes)) for sizes in runs]
    assert np.mean(rises) < 2
    assert max(rises) <= 5
    seconds = np.mean([token_ms(10.0, size) for sizes in runs for size in sizes])
    assert seconds < token_ms(10.0, 8) / 0.8


class BatchPlant(ToyPlant):
    """A toy that offers several batches."""

    def limits(self) -> ControlLimits:
        return replace(super().limits(), min_batch_size=1, max_batch_size=32)


def guarded(policy: Policy, preference: Preference, kind: type[GuardedController] = GuardedController) -> Any:
    return kind(Controller(policy, BatchPlant().limits(), preference), Guardrails())


def halves(observation: np.ndarray, masks: np.ndarray) -> Action:
    return HALF


def test_runs_that_are_blind_to_clocks_have_no_floor() -> None:
    blind = guarded(halves, Preference(quality=1, energy=0, time=0))
    assert blind.decide(None).controls.batch_size == 4
    assert blind.state_dict()["guardrails"]["throughput"] is None
    timed = guarded(halves, Preference(quality=1, energy=0, time=1e-3))
    assert timed.decide(None).controls.batch_size == 8


def test_a_run_of_an_earlier_version_keeps_its_rules_about_batches() -> None:
    state = json.loads(json.dumps(guarded(halves, Preference()).state_dict()))
    del state["guardrails"]["throughput"]
    old = guarded(halves, Preference())
    old.load_state_dict(state)
    assert old.guardrails.throughput is None
    assert old.decide(None).controls.batch_size == 4


def test_a_run_goes_on_from_a_file_with_what_it_has_measured() -> None:
    plant, one, telemetry = BatchPlant(), guarded(halves, Preference()), None
    for _ in range(5):
        telemetry = plant.advance(one.decide(telemetry).controls, 0.05)
        one.record(telemetry)
    other = guarded(halves, Preference())
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.guardrails.throughput == one.guardrails.throughput
    assert one.guardrails.throughput.costs == {8: 1.0, 4: 1.0}  # the toy's seconds are those of its tokens
    assert other.decide(telemetry) == one.decide(telemetry)


def test_advice_keeps_to_the_floor_too() -> None:
    plant, advising, telemetry = BatchPlant(), guarded(halves, Preference(), AdvisingController), None
    for _ in range(4):
        telemetry = plant.advance(advising.decide(telemetry).controls, 0.05)
        advising.record(telemetry)
    assert [record.advice.action for record in advising.records] == [KEEP, KEEP, HALF, HALF]
    assert {record.telemetry.requested.batch_size for record in advising.records} == {8}


@pytest.mark.parametrize(
    "damage",
    [
        {"costs": {"0": 1.0}},
        {"costs": {"8": 0.0}},
        {"stayed": -1},
        {"newest": [0.0]},
        {"machine": -1.0},
        {"newest": []},
    ],
)
def test_a_damaged_state_is_refused(damage: dict[str, Any]) -> None:
    state = json.loads(json.dumps(watched((8, 1.0), (8, 1.0), (4, 1.0)).state_dict()))
    assert SavedGuardrails.from_json(state).parts()[2] == watched((8, 1.0), (8, 1.0), (4, 1.0)).throughput
    state["throughput"] |= damage
    with pytest.raises(ValueError, match=r"throughput|newest"):
        SavedGuardrails.from_json(state)


@pytest.mark.parametrize("floor", [-0.1, 1.1, float("nan"), "0.8", None])
def test_a_floor_that_is_no_share_is_refused_by_name(floor: Any) -> None:
    with pytest.raises(ValueError, match="throughput_floor must be"):
        GuardrailSettings(throughput_floor=floor)
    assert NEWEST >= PROVEN
