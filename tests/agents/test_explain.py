"""An explanation names the field that moved a decision, by how much, and nothing that did not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from explained_runs import (
    CURVATURE,
    DOUBLE,
    DOUBLE_RATE,
    HALF,
    KEEP_RATE,
    KEPT,
    NOISE,
    NOISE_BY_DECISION,
    planted,
    seen,
    steered,
)

from trainpilot.agents import explain as explanations
from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.explain import CONTROLS, explain, input_shares
from trainpilot.envs.action import ACTION_FIELDS, KEEP
from trainpilot.envs.observation import OBSERVATION_FIELDS

N_CHOICES = sum(len(field.choices) for field in ACTION_FIELDS)


@pytest.fixture
def run() -> list[DecisionRecord]:
    """Four decisions at noise scales 0, 0, 0.9 and 0.3, mean 0.3; the curvature never changes."""
    return [seen(decision, noise_scale=noise, curvature=0.1) for decision, noise in enumerate(NOISE_BY_DECISION)]


def test_effects_by_hand(run: list[DecisionRecord]) -> None:
    explanation = explain(planted(), steered(run, planted()))
    batch = CONTROLS.index("batch_size")

    # double: 3 x newest + 1 x the one before; keep: 1; half: 0. Without the field: 3 x 0.3 + 1 x 0.3 = 1.2.
    double = [4 * 0.0, 3 * 0.0 + 0.0, 3 * 0.9 + 0.0, 3 * 0.3 + 0.9]
    assert double == pytest.approx([0, 0, 2.7, 1.8])
    assert explanation.choices[:, batch].tolist() == [KEPT, KEPT, DOUBLE, DOUBLE]
    assert explanation.rivals[:, batch].tolist() == [HALF, HALF, KEPT, KEPT]
    assert explanation.log_odds[:, batch] == pytest.approx([1, 1, 1.7, 0.8], abs=1e-5)
    assert explanation.effects[:, batch, NOISE] == pytest.approx([0, 0, 2.7 - 1.2, 1.8 - 1.2], abs=1e-5)
    others = np.delete(explanation.effects[:, batch], NOISE, axis=1)
    assert np.abs(others).max() < 1e-5
    assert explanation.n_repeated == 4


def test_a_long_run_is_explained_in_parts(run: list[DecisionRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = explain(planted(), steered(run, planted()))
    monkeypatch.setattr(explanations, "AT_ONCE", 3)
    parts = explain(planted(), steered(run, planted()))
    np.testing.assert_allclose(parts.effects, whole.effects, rtol=0, atol=1e-5)


def test_a_push_tells_the_value_in_its_own_unit(run: list[DecisionRecord]) -> None:
    (push,) = explain(planted(), steered(run, planted())).pushes(2, "batch_size", 3)

    # The noise scale's range is log10 of [-2, 3]: 0.9 on [-1, 1] is 2.75, the mean of 0.3 is 1.25.
    assert push.field == "noise_scale"
    assert [push.value, push.mean] == pytest.approx([2.75, 1.25])
    assert push.effect == pytest.approx(1.5, abs=1e-5)


def test_constant_field_has_no_effect_and_opposing_one_is_negative() -> None:
    records = [seen(decision, curvature=value) for decision, value in enumerate((0.5, 0.5, 0.3, 0.1))]
    explanation = explain(planted(), steered(records, planted()))
    rate = CONTROLS.index("learning_rate")

    assert explanation.choices[:, rate].tolist() == [DOUBLE_RATE] * 3 + [KEEP_RATE]
    # The mean is 0.35. For doubling: 5 x (0.5 - 0.35), 5 x (0.3 - 0.35); for keep against doubling: 5 x (0.35 - 0.1).
    assert explanation.effects[:, rate, CURVATURE] == pytest.approx([0.75, 0.75, -0.25, 1.25], abs=1e-5)
    assert explanation.rivals[:, rate].tolist() == [KEEP_RATE] * 3 + [DOUBLE_RATE]
    assert explanation.pushes(0, "batch_size", 3) == [], "the noise scale never changed"


def test_a_control_without_choice_is_left_out(run: list[DecisionRecord]) -> None:
    masked = {"pruning +5 %": "the case does not prune"}
    explanation = explain(planted(), steered([replace(record, masked=masked) for record in run], planted()))

    assert (explanation.rivals[:, CONTROLS.index("pruning")] == -1).all()
    assert explanation.pushes(0, "pruning", 3) == []
    assert "pruning" not in explanation.importance()
    assert "batch_size" in explanation.importance()


def test_importance_is_the_mean_absolute_effect(run: list[DecisionRecord]) -> None:
    importance = explain(planted(), steered(run, planted())).importance()["batch_size"]

    assert importance["noise_scale"] == pytest.approx((0 + 0 + 1.5 + 0.6) / 4, abs=1e-5)
    assert max(value for name, value in importance.items() if name != "noise_scale") < 1e-5


def test_decisions_of_another_policy_are_counted(run: list[DecisionRecord]) -> None:
    records = steered(run, planted())
    records[1] = replace(records[1], requested=(6, *KEEP[1:]))

    assert explain(planted(), records).n_repeated == 3


def test_the_first_layer_is_shared_out_among_the_fields() -> None:
    shares = input_shares(planted())

    # Norms over choices and stack: noise scale sqrt(3^2 + 1^2), curvature 5.
    total = 5 + 10**0.5
    assert list(shares)[:2] == ["curvature", "noise_scale"]
    assert shares["curvature"] == pytest.approx(5 / total)
    assert shares["noise_scale"] == pytest.approx(10**0.5 / total)
    assert sum(shares.values()) == pytest.approx(1)
    assert len(shares) == len(OBSERVATION_FIELDS)


def test_what_cannot_be_explained_is_refused(run: list[DecisionRecord]) -> None:
    with pytest.raises(ValueError, match="at least one decision"):
        explain(planted(), [])
    other = replace(run[0], observation={**run[0].observation, "mood": 1.0})
    with pytest.raises(ValueError, match="difference in mood"):
        explain(planted(), [other])
