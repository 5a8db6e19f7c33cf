"""Preferences: how they are read, drawn and refused."""

from __future__ import annotations

import numpy as np
import pytest

from trainpilot.envs.decision import Preference


def test_only_the_ratios_count() -> None:
    assert Preference(quality=6, energy=3, time=1).weights() == pytest.approx([0.6, 0.3, 0.1])
    assert Preference().weights() == pytest.approx([0.7, 0.15, 0.15])


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("quality=0.7,energy=0.2,time=0.1", [0.7, 0.2, 0.1]),
        ("time=1,quality=3", [0.75, 0.0, 0.25]),
        (" energy = 2 ", [0.0, 1.0, 0.0]),
    ],
)
def test_a_preference_is_read_by_name(text: str, weights: list[float]) -> None:
    assert Preference.parse(text).weights() == pytest.approx(weights)


def test_what_is_printed_can_be_read_again() -> None:
    preference = Preference(quality=0.5, energy=0.25, time=0.25)

    assert str(preference) == "quality=0.5,energy=0.25,time=0.25"
    assert Preference.parse(str(preference)) == preference


@pytest.mark.parametrize("text", ["", "quality", "0.7", "speed=1", "quality=1,", "quality:1"])
def test_what_does_not_look_like_a_preference_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"preference must look like quality=0\.7,energy=0\.15,time=0\.15, got"):
        Preference.parse(text)


def test_a_weight_must_be_a_number() -> None:
    with pytest.raises(ValueError, match="preference energy must be a number, got 'much'"):
        Preference.parse("quality=1,energy=much")


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["quality", "energy", "time"])
def test_a_weight_must_be_finite_and_not_negative(name: str, weight: float) -> None:
    with pytest.raises(ValueError, match=f"preference {name} must be a number >= 0, got {weight}"):
        Preference(**{name: weight})


def test_one_weight_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="preference must have one weight above 0"):
        Preference(quality=0, energy=0, time=0)


def test_a_drawn_preference_gives_quality_at_least_half() -> None:
    random = np.random.default_rng(0)
    drawn = np.array([Preference.draw(random).weights() for _ in range(2_000)])

    assert (drawn >= 0).all()
    assert drawn.sum(axis=1) == pytest.approx(1.0)
    assert drawn[:, 0].min() >= 0.5
    # quality is uniform on [0.5, 1], and what it leaves is halved on average
    assert drawn.mean(axis=0) == pytest.approx([0.75, 0.125, 0.125], abs=0.01)


def test_a_drawn_preference_repeats_under_one_seed() -> None:
    assert Preference.draw(np.random.default_rng(7)) == Preference.draw(np.random.default_rng(7))
