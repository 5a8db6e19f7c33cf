"""A quality contract tells made-up runs that keep it from those that break it, and owns to what it cannot know."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import make_telemetry

from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.steering.contract import ContractWatch, QualityContract
from trainpilot.agents.steering.power_law import PowerLaw
from trainpilot.envs.action import KEEP
from trainpilot.llm_runtime.telemetry import Telemetry

N = 50
TOKENS = 1_000


def law(share: float) -> float:
    """Return the base schedule's loss where `share` of the budget is used: 2 + (share / 0.01)^-0.3."""
    return float(2 + (share / 0.01) ** -0.3)


def interval(index: int, extra: float = 0.0, time_s: float = 2.0, **changes: Any) -> Telemetry:
    share = (index + 1) / N
    return make_telemetry(**{
        "decision": index, "budget_used": share, "tokens": (index + 1) * TOKENS, "interval_tokens": TOKENS,
        "steps": 25, "train_loss_std": 0.005, "train_loss": law(share - 0.5 / N) + extra, "time_s": time_s,
    } | changes)  # fmt: skip


def run(watch: ContractWatch, extra: Callable[[int], float] = lambda i: 0.0, **changes: Any) -> int | None:
    """Return the decision after which the contract broke."""
    for index in range(N):
        if watch.observe(interval(index, extra(index), **changes)) is not None:
            return index
    return None


REFERENCE = tuple(((i + 1) / N, law((i + 0.5) / N)) for i in range(N))
KNOWN = QualityContract(reference=REFERENCE)


def test_a_power_law_is_carried_on() -> None:
    tokens = np.arange(1, 11) * 100.0
    losses = 2 + 3 * (tokens / 100) ** -0.4
    fitted = PowerLaw.fit(tokens, losses, np.full(10, 1e-3))
    mean, error = fitted.at(5_000)
    assert mean == pytest.approx(2 + 3 * 50**-0.4, abs=2 * error)
    assert error < 0.05


def test_the_band_widens_with_the_distance() -> None:
    tokens = np.arange(1, 6) * 100.0
    losses = 2 + 3 * (tokens / 100) ** -0.4
    fitted = PowerLaw.fit(tokens, losses, np.full(5, 1e-2))
    errors = [fitted.at(tokens)[1] for tokens in (500.0, 1_000.0, 5_000.0)]
    assert errors == sorted(errors)
    assert errors[-1] > 4 * errors[0]


def test_losses_that_scatter_more_than_they_say_widen_it_too() -> None:
    tokens = np.arange(1, 9) * 100.0
    losses = 2 + 3 * (tokens / 100) ** -0.4
    shaken = losses + 0.05 * np.array([1, -1, 1, -1, 1, -1, 1, -1])
    errors = np.full(8, 1e-3)
    assert PowerLaw.fit(tokens, shaken, errors).at(1_000)[1] > 10 * PowerLaw.fit(tokens, losses, errors).at(1_000)[1]


def test_rising_losses_are_carried_on_flat() -> None:
    tokens = np.arange(1, 6) * 100.0
    mean, _ = PowerLaw.fit(tokens, 2 + tokens / 1_000, np.full(5, 1e-2)).at(10_000)
    assert mean == pytest.approx(2.3, abs=0.01)


def test_a_better_run_holds_it() -> None:
    watch = ContractWatch(KNOWN)
    assert run(watch, lambda i: -0.05) is None
    summary = watch.summary()
    assert summary["held"] is True
    assert summary["loss_increase"] == pytest.approx(-0.05)
    assert summary["standard_error"] == pytest.approx(0.001 / math.sqrt(3))
    assert summary["broken_at_decision"] is None
    assert "interpolated" in summary["evidence"]


def test_a_worse_run_breaks_it_in_the_second_interval_outside() -> None:
    watch = ContractWatch(KNOWN)
    assert run(watch, lambda i: 0.1 if i >= 20 else 0.0) == 21
    assert watch.harmed
    assert watch.summary()["held"] is False
    assert watch.summary()["broken_at_decision"] == 21
    assert "nats above" in watch.summary()["broken_because"]


def test_it_breaks_only_once() -> None:
    watch = ContractWatch(KNOWN)
    assert sum(watch.observe(interval(i, 0.5)) is not None for i in range(N)) == 1


def test_the_first_fifth_is_not_judged() -> None:
    assert run(ContractWatch(KNOWN), lambda i: 1.0 if i < 7 else 0.0) is None
    assert run(ContractWatch(KNOWN), lambda i: 1.0) == 10  # the tenth and the eleventh interval


def test_a_difference_within_the_errors_is_neither_held_nor_broken() -> None:
    watch = ContractWatch(KNOWN)
    assert run(watch, lambda i: 0.0095) is None
    assert watch.summary()["held"] is None


def test_a_slow_run_breaks_it_without_harm_to_the_model() -> None:
    contract = QualityContract(reference=REFERENCE, reference_s_per_token=2e-3)
    watch = ContractWatch(contract)
    assert run(watch, lambda i: -0.05, time_s=2.2) == 10
    assert not watch.harmed
    assert watch.summary()["slowdown"] == pytest.approx(0.1)
    assert run(ContractWatch(contract), lambda i: -0.05, time_s=2.08) is None


def test_unknown_time_is_not_judged() -> None:
    watch = ContractWatch(KNOWN)
    assert run(watch, lambda i: -0.05, time_s=100.0) is None
    assert watch.summary()["slowdown"] is None


def test_without_a_reference_a_tenth_after_the_warm_up_is_observed() -> None:
    watch = ContractWatch(QualityContract())
    observed = []
    for index in range(N):
        observed.append(watch.observing)
        warming = 1e-3 * min((index + 1) / 5, 1.0)
        watch.observe(interval(index, learning_rate=warming))
    assert observed.index(False) == 10  # warm-up ends with interval 4; the evidence is intervals 5 to 9
    assert not any(observed[10:])
    assert "5 intervals" in watch.summary()["evidence"]


def test_the_forecast_finds_gross_damage_and_its_time() -> None:
    assert run(ContractWatch(QualityContract())) is None
    broken_at = run(ContractWatch(QualityContract()), lambda i: 0.5 if i >= 12 else 0.0)
    assert broken_at is not None
    assert broken_at <= 16
    slow = ContractWatch(QualityContract())
    breaches = [slow.observe(interval(i, time_s=2.0 if i < 10 else 3.0)) for i in range(N)]
    assert any(reason is not None and "50% more seconds" in reason for reason in breaches)


def test_without_evidence_nothing_is_claimed() -> None:
    watch = ContractWatch(QualityContract())
    for index in range(N):
        watch.observe(interval(index, 0.5, learning_rate=1e-5 * 1.1**index))  # warms up for ever
    summary = watch.summary()
    assert not watch.observing  # given up after half of the budget
    assert summary["held"] is None
    assert summary["evidence"].startswith("none")
    assert summary["loss_increase"] is None


def test_the_run_may_end_early_only_where_the_base_schedule_would_end() -> None:
    watch = ContractWatch(KNOWN)
    watch.observe(interval(0))
    assert "expected to end" in str(watch.refuses_finish())
    for index in range(1, 4):
        watch.observe(interval(index, train_loss=law(1.0)))
    assert watch.refuses_finish() is None
    assert ContractWatch(QualityContract()).refuses_finish() is not None


def test_a_rollback_takes_intervals_back_but_not_the_breach() -> None:
    watch = ContractWatch(KNOWN)
    for index in range(12):
        watch.observe(interval(index))
    before = json.loads(json.dumps(watch.past_state()))
    for index in range(12, 15):
        watch.observe(interval(index, 0.5))
    assert watch.broken is not None
    watch.load_past_state(before)
    found = watch.loss_increase()
    assert found is not None
    assert found == pytest.approx((0.0, 0.001 / math.sqrt(3)))
    assert watch.summary()["held"] is False


def test_the_state_passes_through_json() -> None:
    one, other = ContractWatch(QualityContract()), ContractWatch(QualityContract())
    for index in range(20):
        one.observe(interval(index))
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.summary() == one.summary()


def test_a_run_that_changes_nothing_breaks_no_contract_whatever_its_data() -> None:
    one, other = ContractWatch(KNOWN), ContractWatch(KNOWN)
    worse = [replace(interval(index), train_loss=9.0) for index in range(30)]
    assert not any(one.observe(each, steers=False) for each in worse)
    assert any(other.observe(each, steers=True) for each in worse)
    again = ContractWatch(KNOWN)
    again.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert again.observe(worse[-1], steers=False) is None
    assert any(again.observe(worse[-1], steers=True) for _ in range(2))


def test_the_summary_says_how_much_it_can_see() -> None:
    watch = ContractWatch(QualityContract(max_loss_increase=0.02, reference=REFERENCE))
    assert watch.summary()["detects_from"] is None
    for index in range(20):
        watch.observe(interval(index))
    summary = watch.summary()
    # the first ten intervals are not judged: from then on the longest window is one of six
    assert summary["detects_from"] == pytest.approx(0.02 + 2 * summary["standard_error"] * math.sqrt(3 / 6))


def test_a_small_increase_is_seen_in_many_intervals() -> None:
    watch = ContractWatch(QualityContract(max_loss_increase=0.01, reference=REFERENCE))
    noise = interval(0).train_loss_std / math.sqrt(interval(0).steps)
    extra = 0.01 + 1.0 * noise  # two standard errors of a mean of three are 1.15 of one interval's
    broken_at = run(watch, lambda i: extra)
    assert broken_at is not None
    assert broken_at > 14


def test_an_earlier_run_whose_clock_stood_still_says_nothing_of_time() -> None:
    told = [make_telemetry(budget_used=share, time_s=0.0) for share in (0.5, 1.0)]
    nothing: dict[str, Any] = {"refusals": (), "masked": {}, "observation": {}, "reward": None}
    records = [DecisionRecord(telemetry=each, requested=KEEP, allowed=KEEP, **nothing) for each in told]
    assert QualityContract.against(records).reference_s_per_token is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_loss_increase", -0.1), ("max_slowdown", math.nan), ("evidence_share", 0.0), ("reference", [(0.1, 2.0)]),
     ("reference", [(0.2, 2.0), (0.1, 1.9)]), ("reference", "losses"), ("reference", [0.1, 0.2]),
     ("reference", [("a", 2.0), ("b", 1.0)]), ("reference", [(0.1, 0.0), (0.2, 1.0)]),
     ("reference", [(0.1, -5.0), (0.2, 1.0)]), ("reference", [(0.1, math.inf), (0.2, 1.0)]),
     ("reference", [(0.1, 1e9), (0.2, 1e9)]), ("reference", [(0.1, 10**400), (0.2, 1.0)]),
     ("reference_s_per_token", 0.0), ("reference_s_per_token", math.nan), ("reference_s_per_token", -1.0),
     ("reference_s_per_token", "fast"), ("max_slowdown", "none"), ("evidence_share", None)],
)  # fmt: skip
def test_terms_that_make_no_sense_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        QualityContract(**{name: value})


def test_a_contract_against_an_earlier_run_has_its_losses_and_its_pace() -> None:
    told = [make_telemetry(budget_used=share, train_loss=loss, time_s=2.0, interval_tokens=100)
            for share, loss in ((0.5, 3.0), (1.0, 2.5))]  # fmt: skip
    nothing: dict[str, Any] = {"refusals": (), "masked": {}, "observation": {}, "reward": None}
    records = [DecisionRecord(telemetry=each, requested=KEEP, allowed=KEEP, **nothing) for each in told]
    contract = QualityContract.against(records, max_loss_increase=0.5)
    assert contract.reference == ((0.5, 3.0), (1.0, 2.5))
    assert contract.reference_s_per_token == 0.02
    assert contract.max_loss_increase == 0.5
    with pytest.raises(ValueError, match="reference must be at least two"):
        QualityContract.against(records[:1])
