"""The price list: what was measured at the start, what was seen since, and how gaps are filled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import make_limits, make_telemetry

from trainpilot.envs.prices import PriceBook
from trainpilot.llm_runtime.config import PRECISIONS, Precision, StepPrice
from trainpilot.llm_runtime.simulator.records import LimitBatch, TelemetryBatch

OVERHEAD_S, SEQUENCE_S = 0.08, 0.01
"""A step of 8 sequences takes twice as long as its sequences: 0.08 + 8 x 0.01 s."""
SPEED: dict[Precision, float] = {"fp32": 1.0, "bf16": 2.0}


def step_s(batch: int, precision: Precision = "fp32") -> float:
    return OVERHEAD_S + SEQUENCE_S * batch / SPEED[precision]


def measured(*settings: tuple[int, Precision], energy: bool = True) -> tuple[StepPrice, ...]:
    """Return prices at 50 W."""
    return tuple(
        StepPrice(
            batch_size=batch,
            precision=precision,
            time_s=step_s(batch, precision),
            energy_j=50 * step_s(batch, precision) if energy else None,
        )
        for batch, precision in settings
    )


def book(*settings: tuple[int, Precision], **options: Any) -> PriceBook:
    return PriceBook(LimitBatch.of([make_limits(prices=measured(*settings, **options))]))


def seen(prices: PriceBook, batch: int, precision: Precision = "fp32", **changes: Any) -> None:
    """Take in an interval of ten steps at 50 W."""
    time_s = 10 * step_s(batch, precision)
    quiet = {"steps": 10, "batch_size": float(batch), "precision": precision, "time_s": time_s, "energy_j": 50 * time_s}
    prices.observe(TelemetryBatch.of([make_telemetry(**quiet | changes)]))


def told(prices: PriceBook, name: str, quantity: int = 0) -> float:
    """Return a price over the present one."""
    return float(2 ** prices.over_present[quantity, ("half", "double", *PRECISIONS).index(name), 0])


def ratio(batch: int, precision: Precision, now: int, now_precision: Precision = "fp32") -> float:
    return step_s(batch, precision) / batch / (step_s(now, now_precision) / now)


def test_nothing_is_known_without_a_measurement() -> None:
    assert np.isnan(book().over_present).all()


def test_the_measurement_at_the_start_gives_half_double_and_the_precisions() -> None:
    prices = book((4, "fp32"), (8, "fp32"), (16, "fp32"), (8, "bf16"))

    for quantity in (0, 1):
        # at 4: 0.12/4 over 0.16/8; at 16: 0.24/16; in bf16: 0.12/8
        assert told(prices, "half", quantity) == pytest.approx(1.5)
        assert told(prices, "double", quantity) == pytest.approx(0.75)
        assert told(prices, "bf16", quantity) == pytest.approx(0.75)
        assert told(prices, "fp32", quantity) == 1.0
        assert np.isnan(told(prices, "fp16", quantity))


def test_unmeasured_joules_are_unknown_and_seconds_are_not() -> None:
    prices = book((4, "fp32"), (8, "fp32"), (16, "fp32"), energy=False)

    assert told(prices, "half") == pytest.approx(1.5)
    assert np.isnan(prices.over_present[1]).all()


def test_precisions_alone_say_nothing_of_batches() -> None:
    prices = book((8, "fp32"), (8, "bf16"))

    assert told(prices, "bf16") == pytest.approx(0.75)
    assert np.isnan(told(prices, "half"))


def test_two_batches_that_were_seen_tell_the_price_of_others() -> None:
    prices = book()
    seen(prices, 8)
    assert np.isnan(told(prices, "half"))
    seen(prices, 16)

    assert told(prices, "half") == pytest.approx(ratio(8, "fp32", 16))  # seen
    assert told(prices, "double") == pytest.approx(ratio(32, "fp32", 16))  # from the line through 8 and 16
    seen(prices, 32)
    assert told(prices, "double", 1) == pytest.approx(ratio(64, "fp32", 32))


def test_the_latest_price_counts() -> None:
    prices = book((4, "fp32"), (8, "fp32"), (16, "fp32"))
    seen(prices, 16)
    seen(prices, 8)
    assert told(prices, "double") == pytest.approx(0.75)
    seen(prices, 8, time_s=2 * 10 * step_s(8))  # the machine got slower, and so did the present price

    assert told(prices, "double") == pytest.approx(0.75 / 2)


def test_another_precision_at_another_batch() -> None:
    prices = book((4, "fp32"), (8, "fp32"), (16, "fp32"), (8, "bf16"))
    seen(prices, 8)
    seen(prices, 32)
    # never seen: the difference measured at 8, 0.005 s a sequence, holds at 32 too
    assert told(prices, "bf16") == pytest.approx(ratio(32, "bf16", 32))
    seen(prices, 32, "bf16")
    seen(prices, 16, "bf16")

    assert told(prices, "half") == pytest.approx(ratio(8, "bf16", 16, "bf16"))
    assert told(prices, "double") == pytest.approx(ratio(32, "bf16", 16, "bf16"))
    # fp32 was seen at 32 last; the fixed time of a step is that of any precision
    assert told(prices, "fp32") == pytest.approx(ratio(16, "fp32", 16, "bf16"))


def test_probe_and_switching_are_no_part_of_the_price() -> None:
    plain, costly = book(), book()
    for prices, probe_s, switch_s in ((plain, 0.0, 0.0), (costly, 0.7, 0.3)):
        seen(prices, 8)
        time_s = 10 * step_s(16) + probe_s + switch_s
        seen(prices, 16, probe_time_s=probe_s, switch_time_s=switch_s, time_s=time_s, energy_j=50 * time_s)

    assert costly.over_present == pytest.approx(plain.over_present, nan_ok=True)


@pytest.mark.parametrize("bad", [{"time_s": np.nan}, {"time_s": 0.0}, {"energy_j": None}, {"batch_size": np.nan}])
def test_what_was_not_measured_leaves_the_list_as_it_is(bad: dict[str, Any]) -> None:
    prices = book((4, "fp32"), (8, "fp32"), (16, "fp32"))
    before = prices.over_present[0].copy()
    seen(prices, 8, **{"time_s": 10 * step_s(8), **bad})
    seen(prices, 8)

    assert prices.over_present[0] == pytest.approx(before, nan_ok=True)


def test_a_single_sequence_has_no_half() -> None:
    prices = book()
    seen(prices, 2)
    seen(prices, 1)
    assert told(prices, "double") == pytest.approx(ratio(2, "fp32", 1))
    assert told(prices, "fp32") == 1.0


def test_new_runs_begin_with_their_own_list_and_the_others_go_on() -> None:
    limits = LimitBatch.of([make_limits(prices=measured((4, "fp32"), (8, "fp32"), (16, "fp32")))] * 2)
    prices = PriceBook(limits)
    telemetry = make_telemetry(steps=10, batch_size=16.0, time_s=10 * step_s(16), energy_j=None)
    prices.observe(TelemetryBatch.of([telemetry] * 2))
    prices.begin(np.array([1]), limits.take(np.array([1])))

    assert 2 ** prices.over_present[0, 0] == pytest.approx([ratio(8, "fp32", 16), ratio(4, "fp32", 8)])
