"""The first signal ends a command in order, after the step under way if it is short; the second one at once."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from trainpilot.experiments import cli, stopping
from trainpilot.experiments.stopping import SIGNALS, Stopped, answered, asked, postponed, raise_if_asked


@pytest.fixture(autouse=True)
def _not_ignored() -> Iterator[None]:
    """Let signals through that whoever started the tests has ignored, as `nohup` and `&` do."""
    usual: dict[signal.Signals, Any] = {number: signal.SIG_DFL for number in SIGNALS} | {
        signal.SIGINT: signal.default_int_handler
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_one_line_and_its_exit_code(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(sys, "argv", ["trainpilot", "doctor"])
    monkeypatch.setattr(cli, "_run", lambda _: signal.raise_signal(number))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().err
    assert stop.value.code == 128 + number
    assert said.startswith("trainpilot: " + ("interrupted" if number == signal.SIGINT else f"ended by {number.name}"))
    assert said.count("\n") == 1
    assert signal.getsignal(number) is before
    assert not asked()


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with answered():
            signal.raise_signal(signal.SIGTERM)
            assert not asked()
    finally:
        signal.signal(signal.SIGTERM, before)


def in_a_step(*numbers: signal.Signals, wait_s: float = 0.0) -> None:
    """Receive signals while they are postponed, then go on for some seconds."""
    with answered(), postponed():
        raise_if_asked()
        for number in numbers:
            signal.raise_signal(number)
        assert asked()
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            time.sleep(0.01)
        raise_if_asked()
        pytest.fail("the step has ended")


def test_a_postponed_signal_waits_for_the_end_of_the_step() -> None:
    with pytest.raises(Stopped) as stopped:
        in_a_step(signal.SIGTERM)
    assert stopped.value.number == signal.SIGTERM


def test_a_postponed_signal_waits_no_longer_than_the_block() -> None:
    with answered(), pytest.raises(Stopped), postponed():
        signal.raise_signal(signal.SIGTERM)


def test_a_postponed_signal_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "PATIENCE_S", 0.05)
    start = time.monotonic()
    with pytest.raises(Stopped):
        in_a_step(signal.SIGTERM, wait_s=600)
    assert time.monotonic() < start + 600


class Ended(BaseException):
    """The process is gone."""


@pytest.mark.parametrize(("burst_s", "ends"), [(0.0, True), (3600.0, False)])
def test_a_second_signal_ends_at_once_but_not_an_echo(
    burst_s: float, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(stopping, "BURST_S", burst_s)
    with pytest.raises(Ended if ends else Stopped) as error:
        in_a_step(signal.SIGTERM, signal.SIGINT)
    assert error.value.args == ((128 + signal.SIGINT,) if ends else (signal.SIGTERM,))
