"""Observations: hand-worked values, unknown values, the frozen table, and the history they are computed from."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from fakes import START, make_limits, make_telemetry
from random_telemetry import random_run

from trainpilot.envs.action import ACTION_FIELDS, FIRST_CHOICES, KEEP
from trainpilot.envs.decision import N_STACK, DecisionState, Preference
from trainpilot.envs.history import RunHistory
from trainpilot.envs.observation import (
    BASIC,
    GROUPS,
    OBSERVATION_FIELDS,
    ObservationField,
    ObservationTable,
    RunView,
    fields_of,
)
from trainpilot.envs.prices import PriceBook
from trainpilot.llm_runtime.config import Controls, Precision, StepPrice
from trainpilot.llm_runtime.simulator.records import ControlBatch, LimitBatch, TelemetryBatch
from trainpilot.llm_runtime.telemetry import Telemetry

GOLDEN = Path(__file__).parents[1] / "golden" / "fields.json"
OBSERVED = Path(__file__).parents[1] / "golden" / "observations.json"
"""Observations of four random runs, recorded when each field was computed from the records of one run."""
FIELDS = {field.name: field for field in OBSERVATION_FIELDS}
encode = ObservationTable(OBSERVATION_FIELDS).encode
BUDGET_USED = 0


def view(*telemetry: Telemetry, **overrides: Any) -> RunView:
    """Return what is seen of one run after these intervals."""
    history = RunHistory(1)
    quiet: dict[str, Any] = {"limits": make_limits(), "controls": START, "precision_switches": 0}
    values = quiet | overrides
    for interval in telemetry:
        history.observe(TelemetryBatch.of([interval]), ControlBatch.of([values["controls"]]))
    prices = PriceBook(LimitBatch.of([values["limits"]]))
    for interval in telemetry:
        prices.observe(TelemetryBatch.of([interval]))
    return RunView(
        history=history,
        prices=prices,
        limits=LimitBatch.of([values["limits"]]),
        controls=ControlBatch.of([values["controls"]]),
        precision_switches=np.array([values["precision_switches"]]),
        last_action=np.full((1, len(ACTION_FIELDS)), 0.5),
        preference=np.array([[0.7, 0.2, 0.1]]),
    )


def raw(name: str, *telemetry: Telemetry, **overrides: Any) -> float | None:
    """Return the only number of a field, `None` while unknown."""
    with np.errstate(all="ignore"):
        (value,) = FIELDS[name].value(view(*telemetry, **overrides))
    return None if np.isnan(value) else float(value)


def nothing(view: RunView) -> np.ndarray:
    return np.array([])


def falling(*losses: float, **overrides: Any) -> list[Telemetry]:
    """Return intervals with these training losses, after 1,000, 2,000, ... tokens."""
    return [make_telemetry(train_loss=loss, tokens=1_000 * (i + 1), **overrides) for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("value", "scaled"),
    [(-2.0, -1.0), (-6.0, -1.0), (0.0, -0.5), (2.0, 0.0), (5.0, 0.75), (6.0, 1.0), (1e9, 1.0), (math.inf, 1.0)],
)
def test_a_value_is_clipped_and_scaled_to_one(value: float, scaled: float) -> None:
    assert ObservationField("x", "m", -2, 6, "", nothing).scale(value) == scaled


def test_an_unknown_value_is_the_middle_of_the_range() -> None:
    assert ObservationField("x", "m", -2, 6, "", nothing).scale([math.nan, 2.0, 6.0]).tolist() == [0.0, 0.0, 1.0]


def test_budget_used_is_the_last_interval_s() -> None:
    assert raw("budget_used") == 0.0
    assert raw("budget_used", make_telemetry(budget_used=0.3)) == 0.3


def test_the_fast_slope_is_the_relative_fall_per_e_fold_of_tokens() -> None:
    # (4.0 - 2.0)/2.0 over ln(2,000/1,000)
    assert raw("loss_slope_fast", *falling(4.0, 2.0)) == pytest.approx(1 / math.log(2))
    # only the last interval counts: (2.2 - 2.0)/2.0 over ln(3/2)
    assert raw("loss_slope_fast", *falling(9.0, 2.2, 2.0)) == pytest.approx(0.1 / math.log(1.5))
    assert raw("loss_slope_fast", *falling(2.0, 2.5)) == pytest.approx(-0.2 / math.log(2))


def test_the_slow_slope_looks_back_over_six_intervals() -> None:
    losses = [9.0, 8.0, 3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.0]

    # from the third to the ninth: (3.0 - 2.0)/2.0 over ln(9/3)
    assert raw("loss_slope_slow", *falling(*losses)) == pytest.approx(0.5 / math.log(3))
    # with less history, from the first
    assert raw("loss_slope_slow", *falling(3.0, 2.0)) == pytest.approx(0.5 / math.log(2))


def test_the_slope_signal_is_in_standard_errors() -> None:
    # each of 4 steps spreads 0.02: variance 2 x 0.02^2/4, fall 0.1
    assert raw("loss_slope_signal", *falling(2.1, 2.0)) == pytest.approx(0.1 / (0.02 / math.sqrt(2)))


def test_spread_and_spike() -> None:
    last = make_telemetry(train_loss=2.0, train_loss_std=0.02, train_loss_max=2.05)

    assert raw("loss_spread", last) == pytest.approx(-2.0)  # log10(0.02/2)
    assert raw("loss_spike", last) == pytest.approx(2.5)  # 0.05/0.02


def test_the_validation_gap_is_relative() -> None:
    before = make_telemetry(train_loss=2.0)
    measured = make_telemetry(train_loss=1.8, validation_loss=2.2)
    stale = make_telemetry(train_loss=1.5, validation_loss=2.2)
    assert raw("validation_gap", before, measured) == pytest.approx(0.1)
    assert raw("validation_gap", before, measured, stale) == pytest.approx(0.1)
    assert raw("validation_gap", measured, stale) is None  # measured before the first interval


def test_learning_rate_scale_and_height() -> None:
    rates = [make_telemetry(learning_rate=rate) for rate in (1e-3, 4e-3, 1e-3)]

    assert raw("learning_rate_scale", controls=Controls(batch_size=8, learning_rate_scale=8.0)) == 3.0
    assert raw("learning_rate_height", *rates) == pytest.approx(-2.0)  # log2(1/4)


def test_the_relative_update_is_a_logarithm() -> None:
    assert raw("relative_update", make_telemetry(relative_update=1e-3)) == pytest.approx(-3.0)


@pytest.mark.parametrize(
    ("linear", "quadratic", "curvature"),
    [
        (-0.01, 0.01, 0.0),  # twice the step would gain nothing
        (-0.02, 0.02 * math.e, 1.0),
        (-0.02, 0.02 / math.e, -1.0),
        (0.001, 0.01, 5.0),  # uphill
        (0.0, 0.0, 5.0),
        (-0.01, -0.5, math.log(1e-10)),  # downhill and bending further down: as flat as can be
    ],
)
def test_the_curvature_compares_the_probe_s_two_parts(linear: float, quadratic: float, curvature: float) -> None:
    last = make_telemetry(probe_linear=linear, probe_quadratic=quadratic)

    assert raw("curvature", last) == pytest.approx(curvature)


def test_the_noise_scale_is_over_the_batch() -> None:
    assert raw("noise_scale", make_telemetry(noise_scale=800.0, batch_size=8.0)) == pytest.approx(2.0)
    assert FIELDS["noise_scale"].scale(raw("noise_scale", make_telemetry(noise_scale=0.0)) or math.nan) == -1.0


def test_the_batch_is_over_the_start() -> None:
    assert raw("batch_scale", controls=Controls(batch_size=32)) == 2.0


def test_throughput_and_watts_are_over_the_best_so_far() -> None:
    # 500, 1,000 and 250 tokens/s; 50, 100 and 80 W
    run = [make_telemetry(time_s=s, power_w=w) for s, w in ((2.0, 50.0), (1.0, 100.0), (4.0, 80.0))]

    assert raw("throughput", *run) == pytest.approx(0.25)
    assert raw("power", *run) == pytest.approx(0.8)


def test_joules_per_token_are_over_the_lowest_so_far() -> None:
    run = [make_telemetry(energy_j=joules) for joules in (200.0, 100.0, 400.0)]

    assert raw("energy_per_token", *run) == pytest.approx(2.0)  # log2(400/100)
    assert raw("energy_per_token", *run[:2]) == 0.0


def test_epochs_are_a_logarithm() -> None:
    assert raw("epochs_seen", make_telemetry(epochs_seen=9.0)) == pytest.approx(1.0)


def test_what_is_in_force_is_told_before_the_first_interval() -> None:
    controls = Controls(batch_size=8, precision="bf16", finish=True)
    names = ("precision_fp32", "precision_tf32", "precision_bf16", "precision_fp16", "finishing", "precision_switches")

    assert [raw(name, controls=controls, precision_switches=1) for name in names] == [0, 0, 1, 0, 1, 1]


def test_the_start_over_the_law_follows_the_controls() -> None:
    limits = make_limits(learning_rate_over_law=0.5, batch_over_law=4.0)
    controls = Controls(batch_size=32, learning_rate_scale=8.0)  # from 8 sequences: four times the batch

    # 0.5 x 8 x sqrt(4) = 8, and 4 x 4 = 16
    assert raw("learning_rate_over_law", limits=limits) == -1.0
    assert raw("learning_rate_over_law", limits=limits, controls=controls) == pytest.approx(3.0)
    assert raw("batch_over_law", limits=limits, controls=controls) == pytest.approx(4.0)


def test_the_whole_run_is_told_beside_the_present() -> None:
    run = falling(3.0, 2.0, 2.0 * math.e**0.25)
    run = [replace(each, budget_used=0.1 * (i + 1)) for i, each in enumerate(run)]

    assert raw("loss_above_best", *run) == pytest.approx(0.25)
    assert raw("since_best", *run) == pytest.approx(0.1)
    assert raw("spikes", *run, replace(run[-1], train_loss_max=9.0)) == 1.0  # log2(1 + 1)
    assert raw("slope_at_lowest_rate", *run[:2]) == pytest.approx(math.log(3 / 2) / math.log(2))


def test_extremes_are_over_the_present_controls() -> None:
    state = DecisionState(make_limits(), Preference())
    for action in ((6, 2, 0, 0, 0), (6, 2, 0, 0, 0), (0, 0, 0, 0, 0)):  # twice doubled, once halved
        state.decide(action)
        state.observe(make_telemetry())
    seen = {name: FIELDS[name].low + (value + 1) / 2 * (FIELDS[name].high - FIELDS[name].low)
            for name, value in state.fields().items()}  # fmt: skip

    names = ("highest_rate", "lowest_rate", "largest_batch", "smallest_batch")
    assert [seen[name] for name in names] == pytest.approx([1.0, 0.0, 1.0, 0.0])


def test_prices_are_told_by_quantity_batch_and_precision() -> None:
    def price(batch: int, time_s: float, energy_j: float, precision: Precision = "fp32") -> StepPrice:
        return StepPrice(batch_size=batch, precision=precision, time_s=time_s, energy_j=energy_j)

    measured = (price(4, 8.0, 16.0), price(8, 8.0, 64.0), price(16, 16.0, 64.0), price(8, 4.0, 64.0, "bf16"))
    seen = {name: raw(name, limits=make_limits(prices=measured)) for name in PRICES}

    # seconds a sequence 2, 1, 1 and 0.5 in bf16; joules 4, 8, 4 and 8, where the line through both ends is 4 + 0 / B
    assert seen["seconds_half"] == pytest.approx(math.log2(1 + (2 - 1) / (1 / 4 - 1 / 16) / 8))
    assert seen["seconds_bf16"] == -1.0
    assert (seen["joules_half"], seen["joules_double"], seen["joules_bf16"]) == (0.0, 0.0, 0.0)
    assert seen["seconds_tf32"] is None


def test_last_action_and_preference_are_passed_on() -> None:
    state = DecisionState(make_limits(), Preference(quality=0.6, energy=0.3, time=0.1))
    state.decide((6, 0, 3, 0, 0))
    state.observe(make_telemetry())
    seen = state.fields()

    # 6/6, 0/2, 3/4, 0/1, 0/1 and the weights, scaled from [0, 1] to [-1, 1]
    expected = {
        **{"last_learning_rate": 1.0, "last_batch_size": -1.0, "last_precision": 0.5},
        **{"last_pruning": -1.0, "last_finish": -1.0},
        **{"prefers_quality": 0.2, "prefers_energy": -0.4, "prefers_time": -0.8},
    }
    assert {name: seen[name] for name in expected} == pytest.approx(expected)


def test_a_refused_choice_is_not_told_as_the_last_action() -> None:
    state = DecisionState(make_limits(), Preference())
    decision = state.decide((3, 1, 0, 1, 1))  # too early for both
    state.observe(make_telemetry())

    assert decision.requested == (3, 1, 0, 1, 1)
    assert decision.allowed == state.last_action == KEEP
    assert len(decision.refusals) == 2
    assert state.fields()["last_pruning"] == state.fields()["last_finish"] == -1.0


KNOWN_AT_THE_START = {
    *("budget_used", "learning_rate_scale", "batch_scale", "precision_switches", "finishing"),
    *(name for name in FIELDS if name.startswith(("precision_", "last_", "prefers_", "budget_in_"))),
}


def test_before_the_first_interval_only_settings_are_known() -> None:
    known = {name for name in FIELDS if raw(name) is not None}

    assert known == KNOWN_AT_THE_START


def test_what_was_not_measured_is_unknown() -> None:
    optional = [name for name, kind in TYPES.items() if type(None) in get_args(kind)]
    bare = make_telemetry(**dict.fromkeys(optional))
    unknown = {name for name in FIELDS if raw(name, bare, replace(bare, tokens=2_000)) is None}

    assert unknown == {
        *("validation_gap", "relative_update", "curvature", "noise_scale", "energy_per_token", "power", "memory"),
        *("learning_rate_over_law", "batch_over_law"),
        *(PRICES - {"seconds_fp32"}),
    }
    assert all(encode(view(bare))[0, i] == 0.0 for i, name in enumerate(FIELDS) if name in unknown)


COUNTED = {"budget_used", "epochs_seen", "batch_size"}
TYPES = get_type_hints(Telemetry)
FLOATS = [name for name in TYPES if float in (TYPES[name], *get_args(TYPES[name]))]
MEASURED = [name for name in FLOATS if name not in COUNTED]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0], ids=str)
@pytest.mark.parametrize("name", MEASURED)
def test_no_measured_number_breaks_the_observation(name: str, bad: float) -> None:
    quiet, odd = make_telemetry(), make_telemetry(**{name: bad})

    for run in ([odd], [quiet, replace(odd, tokens=2_000)], [odd, replace(quiet, tokens=2_000)]):
        observed = encode(view(*run))
        assert np.isfinite(observed).all()
        assert np.abs(observed).max() <= 1.0


def test_a_diverged_interval_is_all_nan_and_still_observed() -> None:
    diverged = make_telemetry(**dict.fromkeys(FLOATS, math.nan), diverged=True)

    assert np.isfinite(encode(view(make_telemetry(), diverged))).all()


def test_stack_begins_with_the_first_observation_and_ends_with_the_newest() -> None:
    state = DecisionState(make_limits(), Preference())
    width = len(OBSERVATION_FIELDS)
    first = state.observation().reshape(N_STACK, width)
    assert (first == first[0]).all()

    for used in (0.25, 0.5):
        state.decide(KEEP)
        state.observe(make_telemetry(budget_used=used))
    stack = state.observation().reshape(N_STACK, width)

    assert state.observation().dtype == np.float32
    assert stack[:, BUDGET_USED].tolist() == [-1.0, -1.0, -1.0, -1.0, -0.5, 0.0]
    assert stack[-1].tolist() == pytest.approx(list(state.fields().values()))


def test_an_observation_does_not_change_afterwards() -> None:
    state = DecisionState(make_limits(), Preference())
    before = state.observation()
    copy = before.copy()
    state.observe(make_telemetry(budget_used=0.9))

    assert (before == copy).all()


METERED = {"throughput", "energy_per_token", "power", "memory"}
PRICES = {field.name for field in fields_of(("prices",)) if field.group == "prices"}


def test_the_metered_fields_are_unknown_to_a_run_for_quality_alone() -> None:
    for preference, blind in ((Preference(quality=3, energy=0, time=0), True), (Preference(), False)):
        fast, slow = DecisionState(make_limits(), preference), DecisionState(make_limits(), preference)
        slow.observe(make_telemetry(time_s=9.0, energy_j=500.0, power_w=80.0, memory_share=0.9))
        fast.observe(make_telemetry())
        differing = {name for name, value in fast.fields().items() if value != slow.fields()[name]}

        assert differing == (set() if blind else {"memory"})  # the others are over their best so far
        assert [fast.fields()[name] for name in METERED] == (
            [0.0] * len(METERED) if blind else pytest.approx([fast.fields()[name] for name in METERED])
        )
    assert {name for name, field in FIELDS.items() if field.metered} == METERED | PRICES
    assert len(PRICES) == 12


def test_a_budget_in_seconds_or_joules_needs_eyes_even_for_quality_alone() -> None:
    limits = make_limits(currency="time_s", timed_precisions=("bf16",))
    state = DecisionState(limits, Preference(quality=1, energy=0, time=0))
    state.observe(make_telemetry())

    assert state.fields()["throughput"] == 1.0
    assert state.limits == limits


@pytest.mark.parametrize(
    ("currency", "flags"), [("tokens", (-1.0, -1.0)), ("time_s", (1.0, -1.0)), ("energy_j", (-1.0, 1.0))]
)
def test_a_policy_sees_what_the_budget_is_counted_in(currency: str, flags: tuple[float, float]) -> None:
    seen = DecisionState(make_limits(currency=currency), Preference()).fields()
    assert (seen["budget_in_seconds"], seen["budget_in_joules"]) == flags


def test_quality_alone_keeps_the_precision_unless_offered_untimed() -> None:
    limits = make_limits(timed_precisions=("bf16",), masked_precisions={"tf32": "measured here", "fp16": "not here"})
    seeing, blind = (DecisionState(limits, each) for each in (Preference(), Preference(quality=1, energy=0, time=0)))
    first = FIRST_CHOICES[2]

    assert seeing.action_masks()[first : first + 5].tolist() == [True, False, False, True, False]
    assert blind.action_masks()[first : first + 5].tolist() == [True, False, False, False, False]
    assert "only a clock" in str(blind.mask_reasons()[2][3])
    assert blind.anew().limits == blind.limits
    offered = DecisionState(make_limits(), Preference(quality=1, energy=0, time=0))
    assert offered.action_masks()[first : first + 5].tolist() == [True, False, True, True, True]


def test_a_policy_sees_the_fields_that_it_names_in_its_order() -> None:
    chosen = tuple(FIELDS[name] for name in ("prefers_time", "budget_used"))
    state, everything = (DecisionState(make_limits(), Preference(), fields) for fields in (chosen, OBSERVATION_FIELDS))
    for each in (state, everything):
        each.observe(make_telemetry(budget_used=0.75))

    assert state.fields() == {name: everything.fields()[name] for name in ("prefers_time", "budget_used")}
    assert state.observation().shape == (N_STACK * 2,)
    assert state.observation()[-1] == 0.5


def test_groups_select_fields_and_the_basic_ones_stay() -> None:
    assert fields_of() == OBSERVATION_FIELDS
    assert {field.group for field in fields_of(())} == {"basic"}
    for group in GROUPS:
        assert {field.group for field in fields_of((group,))} == {"basic", group}
    with pytest.raises(ValueError, match=r"observe must name groups of observation fields .*, got 'mood'"):
        fields_of(("mood",))


def test_names_are_unique_and_ranges_are_ranges() -> None:
    assert len(FIELDS) == len(OBSERVATION_FIELDS)
    assert all(field.low < field.high for field in OBSERVATION_FIELDS)
    assert all(field.unit and field.meaning for field in OBSERVATION_FIELDS)
    assert list(FIELDS)[BUDGET_USED] == "budget_used"


def test_the_tables_are_those_of_the_shipped_policies() -> None:
    """A change here makes every trained policy useless: make it on purpose, with a newly trained policy."""
    present = {
        "stack": N_STACK,
        "observation": [
            {"name": field.name, "unit": field.unit, "low": field.low, "high": field.high}
            for field in OBSERVATION_FIELDS
        ],
        "action": [{"name": field.name, "choices": list(field.choices), "keep": field.keep} for field in ACTION_FIELDS],
    }

    assert present == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_the_observations_are_those_that_the_shipped_policies_learnt_from() -> None:
    recorded = json.loads(OBSERVED.read_text(encoding="utf-8"))
    names = [field.name for field in fields_of(BASIC)]  # those that there were when they were recorded
    present = [
        [[state.fields()[name] for name in names] for state, _ in random_run(seed)] for seed in range(len(recorded))
    ]

    assert np.abs(np.array(present) - np.array(recorded)).max() < 1e-12


def test_many_runs_at_different_decisions_are_observed_like_each_alone() -> None:
    alone = [[(state.fields(), state.controls) for state, _ in random_run(seed)] for seed in range(6)]
    intervals = [[telemetry for _, telemetry in random_run(seed)][1:] for seed in range(6)]
    states = [next(state for state, _ in random_run(seed, decisions=0)) for seed in range(6)]
    limits = LimitBatch.of([state.limits for state in states])
    history, prices = RunHistory(6), PriceBook(limits)
    for step in range(20):  # run i begins anew after 12 intervals, the first time after 12 - i
        decisions = [(step + row) % 12 for row in range(6)]
        ended = np.array([row for row in range(6) if decisions[row] == 0], dtype=np.int64)
        history.reset(ended)
        now = [intervals[row][decision] for row, decision in enumerate(decisions)]
        controls = ControlBatch.of([alone[row][decision + 1][1] for row, decision in enumerate(decisions)])
        telemetry = TelemetryBatch.of([each for each in now if each is not None])
        prices.begin(ended, limits.take(ended))
        prices.observe(telemetry)
        history.observe(telemetry, controls)
        seen = encode(
            RunView(
                history=history,
                prices=prices,
                limits=limits,
                controls=controls,
                precision_switches=np.zeros(6, dtype=np.int64),
                last_action=np.zeros((6, len(ACTION_FIELDS))),
                preference=np.zeros((6, 3)),
            )
        )
        whole = [row for row in range(6) if decisions[row] <= step]  # observed from their beginning
        for row in whole:
            expected, _ = alone[row][decisions[row] + 1]
            same = {name: seen[row, i] for i, name in enumerate(FIELDS) if name not in OF_THE_STATE}
            assert same == pytest.approx({name: expected[name] for name in same}, abs=1e-12)


OF_THE_STATE = KNOWN_AT_THE_START - {"budget_used"}
