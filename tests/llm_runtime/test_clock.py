"""A clock that fails or goes back is replaced by the system's, and a good one is passed on as it is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from trainpilot.llm_runtime.clock import TrustedClock, trusted_clock


def raises() -> float:
    raise OSError("no clock")


def exits() -> float:
    raise SystemExit(1)


def scripted(*values: Any) -> Callable[[], float]:
    left = list(values)

    def clock() -> Any:
        value = left.pop(0) if len(left) > 1 else left[0]
        return value() if callable(value) else value

    return clock


def test_a_good_clock_is_passed_on() -> None:
    clock = TrustedClock(scripted(-5, 0.0, 0.0, 7.25))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [clock() for _ in range(5)] == [-5, 0.0, 0.0, 7.25, 7.25]
    assert trusted_clock(clock) is clock


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (math.nan, "got nan"),
        (math.inf, "got inf"),
        (99.0, "went back from 100 s to 99 s"),
        (None, "got None"),
        ("noon", "got 'noon'"),
        (raises, "raised OSError: no clock"),
        (exits, "raised SystemExit: 1"),
        (10**400, "raised OverflowError: int too large"),
    ],
)
def test_a_bad_clock_is_replaced_from_its_last_good_reading(bad: Any, says: str) -> None:
    clock = TrustedClock(scripted(100.0, bad, 5.0))
    assert clock() == 100.0
    with pytest.warns(RuntimeWarning, match=says) as caught:
        told = [clock() for _ in range(3)]
    assert len(caught) == 1
    assert told == sorted(told)
    assert 100.0 <= told[0] <= told[-1] < 160.0


def test_seconds_are_plain_numbers() -> None:
    clock = TrustedClock(scripted(np.float32(1.5), Fraction(7, 4)))
    told = [clock(), clock()]
    assert told == [1.5, 1.75]
    assert {type(each) for each in told} == {float}


def test_a_clock_that_never_worked_counts_from_zero() -> None:
    clock = TrustedClock(raises)
    with pytest.warns(RuntimeWarning, match="raised OSError"):
        first = clock()
    assert 0 <= first <= clock() < 60
